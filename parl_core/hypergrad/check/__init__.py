"""Every estimator of the hypergradient against finite differences of a re-solved lower level.

check_hypergradient        the call
PolicyProblem              a policy, a reward and an upper loss of your own
BilevelProblem             two losses of your own
LinearQuadraticGame        a bilevel problem with a closed form
CheckTable                 what comes back
"""

from .bilevel import BilevelProblem, LinearQuadraticGame
from .call import check_hypergradient
from .policy import PolicyProblem
from .table import CheckRow, CheckTable

__all__ = [
    "BilevelProblem",
    "CheckRow",
    "CheckTable",
    "LinearQuadraticGame",
    "PolicyProblem",
    "check_hypergradient",
]
