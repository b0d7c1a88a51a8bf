"""A policy, a reward and an upper loss as a problem to check, with every estimator of the implicit term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...trajectories import PreferencePairs, Trajectories
from ..curvature import Fisher, Identity, LogProbHessian, ScoreHessian, lower_gradient
from ..estimators import (
    BCHG,
    HPGD,
    DirectOnly,
    NudgedContrast,
    SoBiRL,
    Unrolled,
    ValuePenalty,
    ZeroOrder,
    hypergradient,
)
from ..flat import assign, flatten, trainable_parameters
from ..linearize import Linearization, linearize
from ..losses import UpperLoss
from ..modules import reward_values
from ..result import Hypergradient
from ..solvers import CG, MINRES, Woodbury
from .lower_level import Slopes
from .sampling import Sight
from .subject import (
    Candidate,
    Compute,
    Options,
    Subject,
    check_extra,
    common_random_numbers,
    same_parameters,
    tolerance,
    with_every_solver,
)

Upper = Trajectories | PreferencePairs
_UNROLLED_STEPS = 50
_POWER_ITERATIONS = 20
_SIGN_DRAWS = 10
_NO_TEMPERATURE = "does not apply: no temperature"
_NO_RECURRENCE = "does not apply: no state recurs"


@dataclass
class PolicyProblem:
    """A policy problem of your own for `check_hypergradient`, small enough to solve some hundred times.

    A bandit whose reward is a parameter for each of three arms, judged by its squared distance from what the arms are worth:

    >>> import torch
    >>> import parl_core as parl
    >>> from torch import nn
    >>> class Arms(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.values = nn.Parameter(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    ...     def log_prob(self, observations, actions):  # as a policy
    ...         return self.values.log_softmax(0)[actions]
    ...     def forward(self, observations, actions):  # as a reward
    ...         return self.values[actions]
    >>> arms, offsets, worth = torch.arange(3), torch.arange(4), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    >>> def losses(reward, trajectories):
    ...     return (reward(trajectories.observations, trajectories.actions) - worth) ** 2
    >>> def data(policy):  # every trajectory there is, with its probability
    ...     weights = policy.log_prob(None, arms).exp().detach()
    ...     every = parl.Trajectories(torch.zeros(3, 1, dtype=torch.float64), arms, offsets, weights=weights)
    ...     return every, every
    >>> def solve(policy, reward, nudge):  # the soft optimum
    ...     with torch.no_grad():
    ...         policy.values.copy_((reward.values + nudge * (reward.values - worth) ** 2) / 0.3)
    >>> table = parl.check_hypergradient(
    ...     parl.PolicyProblem(
    ...         Arms(), Arms(), parl.TrajectoryLoss(losses), discount=1.0, data=data, solve=solve, temperature=0.3
    ...     )
    ... )
    >>> {row.name: row.relative_error < 1e-8 for row in table.rows if row.name in ("Fisher", "ScoreHessian", "HPGD")}
    {'Fisher': True, 'ScoreHessian': True, 'HPGD': True}
    """

    policy: nn.Module
    """As in `hypergradient`; it need not be at the optimum, and is left as it was."""
    reward: nn.Module
    """As in `hypergradient`; it is left as it was."""
    loss: UpperLoss
    """As in `hypergradient`."""
    discount: float
    """γ of the lower level, in [0, 1]."""
    data: Callable[[nn.Module], tuple[Trajectories, Upper]]
    """policy -> (lower, upper), as in `hypergradient`, under that policy. Finite differences need upper smooth in it:

    - every trajectory with its probability: the one kind of data under which an estimator's own error shows;
    - a fixed sample whose weights are its density ratios to the policy that it was drawn from, divided by their sum;
    - a sample of continuous actions, each a smooth function of the policy and of noise that is the same at each call. The
      global random generators of torch are seeded alike before each call of `solve` and `data`.

    In the latter two estimators and differences agree up to sampling noise only. A sample of discrete actions will not do:
    while the policy moves a little it stays the same, and the differences miss the implicit term; the header says so."""
    solve: Callable[[nn.Module, nn.Module, float], None]
    """(policy, reward, nudge): put the policy at the optimum of V + nudge·L, V with the entropy and L2 terms, L the expected
    upper loss of the reward as it is. It writes into the parameters there are: new objects in their place are refused."""
    temperature: float = 0.0
    """Entropy temperature of the lower problem, in units of reward per nat."""
    damping: float = 0.0
    """L2 weight of the lower objective."""
    name: str = "policy problem"
    """For the header of the table."""

    def __post_init__(self) -> None:
        for name in ("policy", "reward"):
            if not isinstance(getattr(self, name), nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(getattr(self, name)).__name__}")
        if isinstance(self.loss, type):
            raise TypeError(f"loss must be an instance, got the class: write {self.loss.__name__}(…)")
        for name in ("data", "solve"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a callable, got {type(getattr(self, name)).__name__}")
        for name in ("temperature", "damping"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {self.discount}")


def policy_subject(problem: PolicyProblem, extra: Mapping[str, Options] | None) -> Subject:
    """The problem at its lower optimum, with every estimator; policy and reward are changed while it is in use."""
    policy, reward = problem.policy, problem.reward
    policy_params = list(trainable_parameters(policy, "policy").values())
    reward_params = list(trainable_parameters(reward, "reward").values())
    start = flatten(p.detach() for p in reward_params).clone()

    def solved(judge: nn.Module, nudge: float) -> tuple[Trajectories, Upper]:
        """Data under the optimum for the reward `judge`; the policy stays there."""
        with common_random_numbers(start.device), same_parameters("solve", policy=policy, reward=judge):
            problem.solve(policy, judge, nudge)
        with common_random_numbers(start.device), same_parameters("data", policy=policy):
            return _checked(problem.data(policy))

    lower, upper = solved(reward, 0.0)
    best = flatten(p.detach() for p in policy_params).clone()

    def back_to_optimum() -> None:
        assign(policy_params, best)

    def expected(judge: nn.Module, data: Upper) -> float:
        with torch.no_grad():
            losses = problem.loss.per_sample(judge, data)
            return float(data.weights.to(losses) @ losses)

    def loss_of(judge: nn.Module) -> float:
        try:
            return expected(judge, solved(judge, 0.0)[1])
        finally:
            back_to_optimum()

    here, rewards = linearize(policy, lower), reward_values(reward, lower)
    expected(reward, upper)  # the loss refuses data of the wrong kind, which what follows would take
    sight = Sight.at(policy, problem.loss, upper)
    slopes = Slopes(left=[_slope(problem, here, rewards, best).norm()])

    def loss_at(values: Tensor) -> float:
        assign(reward_params, values)
        try:
            change = reward_values(reward, lower) - rewards
            slopes.added.append(lower_gradient(here, change, problem.discount, 0.0).norm())
            data, judged = solved(reward, 0.0)
            sight.look(policy, judged)
            there = flatten(p.detach() for p in policy_params)
            slopes.left.append(_slope(problem, linearize(policy, data), reward_values(reward, data), there).norm())
            return expected(reward, judged)
        finally:
            back_to_optimum()
            assign(reward_params, start)

    def best_response(nudge: float) -> Trajectories:
        try:
            return solved(reward, nudge)[0]
        finally:
            back_to_optimum()

    def gradient(**options: Any) -> Callable[[], Hypergradient]:
        return lambda: hypergradient(
            policy, reward, lower, upper, loss=problem.loss, discount=problem.discount, **options
        )

    def unrolled() -> Hypergradient:
        step_size = 1.0 / _largest_curvature(problem, lower)
        estimator = Unrolled(_UNROLLED_STEPS, step_size, problem.temperature, problem.damping)
        return gradient(estimator=estimator)()

    candidates = _implicit_function(problem, best, gradient)
    candidates += _closed_forms(problem, lower, upper, gradient)
    nudged, penalised = NudgedContrast(best_response), ValuePenalty(best_response)
    zero_order = ZeroOrder(loss_of)
    candidates += [
        Candidate("NudgedContrast", gradient(estimator=nudged), f"2 lower solves, β = {nudged.nudge:g}"),
        Candidate("ValuePenalty", gradient(estimator=penalised), f"1 lower solve, λ = {penalised.penalty:g}"),
        Candidate("Unrolled", unrolled, f"{_UNROLLED_STEPS} steps of 1 / λ_max"),
        Candidate("ZeroOrder", gradient(estimator=zero_order), f"{2 * zero_order.directions} lower solves"),
        Candidate("DirectOnly", gradient(estimator=DirectOnly())),
    ]
    for name, options in check_extra(candidates, extra).items():
        candidates.append(Candidate(name, gradient(**options)))

    title = (
        f"{problem.name}: {best.numel()} policy, {start.numel()} reward parameters; γ {problem.discount:g}, "
        f"temperature {problem.temperature:g}, damping {problem.damping:g}"
    )

    def remarks() -> list[str]:
        noise = _noise(problem, here, rewards) if lower.is_sample else 0.0
        return [slopes.describe(tolerance(start.dtype), "let solve go further", noise), *sight.remarks(lower)]

    return Subject(title, start, loss_at, candidates, remarks, blind=lambda: sight.blind > 0)


def _slope(problem: PolicyProblem, linearization: Linearization, rewards: Tensor, params: Tensor) -> Tensor:
    """(P,) gradient of the lower objective; of a sample with the baseline that spares it most of its noise."""
    baseline = linearization.trajectories.is_sample
    ascent = lower_gradient(linearization, rewards, problem.discount, problem.temperature, baseline=baseline)
    return ascent - problem.damping * params


def _noise(problem: PolicyProblem, here: Linearization, rewards: Tensor) -> float:
    """Root mean square of the sampling error of `_slope` at the optimum, by random signs of the trajectories."""
    sample, generator = here.trajectories, torch.Generator().manual_seed(0)
    gains = rewards - problem.temperature * here.log_prob
    squares = []
    for _ in range(_SIGN_DRAWS):
        signs = 2 * torch.randint(2, (sample.num_trajectories,), generator=generator) - 1
        signed = linearize(problem.policy, sample.with_weights(signs.to(sample.weights) * sample.weights))
        squares.append(lower_gradient(signed, gains - gains.mean(), problem.discount, 0.0).square().sum())
    return float(torch.stack(squares).mean().sqrt())


def _implicit_function(problem: PolicyProblem, params: Tensor, gradient: Callable[..., Compute]) -> list[Candidate]:
    """Every curvature, and the first that applies with every solver."""
    temperature, damping = problem.temperature, problem.damping
    hessian = ScoreHessian(temperature=temperature, damping=damping)
    curvature = Fisher(temperature, damping) if temperature else hessian
    found = with_every_solver(
        partial(gradient, curvature=curvature),
        params.dtype,
        params.numel(),
        curvature=type(curvature).__name__,
    )
    rtol = tolerance(params.dtype)
    if temperature:
        rows = Fisher(temperature, damping, scores="trajectories")
        found.append(Candidate("Fisher, Woodbury", gradient(curvature=rows, solver=Woodbury(rtol))))
        found.append(Candidate("ScoreHessian", gradient(curvature=hessian, solver=CG(rtol, max_iterations=1000))))
    else:
        found.insert(0, Candidate("Fisher", None, _NO_TEMPERATURE))
    for ablation in (LogProbHessian(temperature=temperature, damping=damping), Identity()):
        solver = MINRES(rtol, max_iterations=1000)
        found.append(Candidate(type(ablation).__name__, gradient(curvature=ablation, solver=solver)))
    return found


def _closed_forms(
    problem: PolicyProblem,
    lower: Trajectories,
    upper: Upper,
    gradient: Callable[..., Compute],
) -> list[Candidate]:
    found = []
    parts = problem.loss.trajectories(upper)
    for kind in (HPGD, BCHG, SoBiRL):
        # HPGD averages over visits to a state at any time, the other two over those at the same time.
        recurs = _recurs(lower, timed=False) if kind is HPGD else all(_recurs(part, timed=True) for part in parts)
        reason = "" if problem.temperature and recurs else _NO_RECURRENCE if problem.temperature else _NO_TEMPERATURE
        note = "takes the lower level as undamped" if problem.damping and not reason else reason
        compute = None if reason else gradient(estimator=kind(problem.temperature))
        found.append(Candidate(kind.__name__, compute, note))
    return found


def _recurs(trajectories: Trajectories, *, timed: bool) -> bool:
    """Whether two trajectories share an observation, at the same time if `timed`."""
    columns = [trajectories.observations.to(torch.float64), trajectories.trajectory_index.unsqueeze(-1)]
    if timed:
        columns.insert(1, trajectories.time.unsqueeze(-1).to(torch.float64))
    seen = torch.unique(torch.cat(columns, dim=1), dim=0)[:, :-1]  # once for each trajectory
    return torch.unique(seen, dim=0).shape[0] < seen.shape[0]


def _largest_curvature(problem: PolicyProblem, lower: Trajectories) -> float:
    """The largest |eigenvalue| of the lower Hessian, by power iteration from a fixed start."""
    linearization = linearize(problem.policy, lower)
    curvature = ScoreHessian(temperature=problem.temperature, damping=problem.damping)
    operator = curvature.operator(linearization, reward_values(problem.reward, lower), problem.discount)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(linearization.num_params, generator=generator, dtype=torch.float64).to(linearization.log_prob)
    largest = 0.0
    for _ in range(_POWER_ITERATIONS):
        vector = operator(vector / vector.norm())
        largest = max(largest, float(vector.norm()))
    return largest


def _checked(data: object) -> tuple[Trajectories, Upper]:
    if not (isinstance(data, tuple) and len(data) == 2):
        raise TypeError(f"data(policy) must return (lower, upper), got {type(data).__name__}")
    lower, upper = data
    if not isinstance(lower, Trajectories):
        raise TypeError(f"data(policy) must return Trajectories as lower, got {type(lower).__name__}")
    return lower, upper
