"""Contests: one problem, several contestants, timed in turns within one process, and only if their answers are right.

A benchmark is a pytest function in `benchmarks/test_<topic>.py` that takes the fixture `contest` and calls it once:

    from benchmarks.harness import Peer, against, copy_floor

    @pytest.mark.parametrize("num_trajectories, horizon", [(64, 1000), (4096, 50)], ids=["64x1000", "4096x50"])
    def test_returns(contest, num_trajectories, horizon):
        values, offsets = …
        contest(
            against(loop_in_float64(values), rtol=1e-5),
            ours={"cpp": lambda: lambda: discounted_returns(values, 0.99, offsets)},
            peers={"numba": lambda: numba_returns(values), "torchrl": lambda: torchrl_returns(values)},
            floor=copy_floor(2 * values.nbytes),
        )

Every contestant is a *maker*: it imports, compiles and prepares what it likes and returns the function of no arguments that
is timed, which returns its answer. A peer whose maker raises ImportError is listed as "not installed", with the reason; any
other exception, here or in the first call, makes the benchmark red, and so does an ImportError of ours. Peers belong into
`benchmarks/peers/`, one module for each topic; each imports its package inside the maker.

A maker that raises `Absent` has no contestant here, such as an op without that backend; this is shown, and is no failure.

The answer is a tensor or an array, or a tuple or list of them; `against` checks it before anything is timed and once more
after. Where "right" means something else (the true residual of a solve), pass any function from an answer to an error that
raises `WrongAnswer`. JAX answers are waited for by the harness, inside the time.

`peers` takes `Peer(maker, limited="compiled for one θ")` as well as makers: such a peer is raced, and told apart.

`floor` is `gemm_floor(flops, rows, width)` or `copy_floor(num_bytes)`, measured in the same rounds. `gradient` is the maker
of one forward and backward pass of the same network, measured likewise; costs are then told in multiples of it.

The first of `ours` is what users get without asking: README's table tells its numbers.

    pytest benchmarks -k returns                    prints a table for each contest
    pytest benchmarks --results runs/bench          also writes runs/bench/<topic>.json
    pytest benchmarks --seconds 2                   less time for each contest, for a first look
"""

from .answers import Absent, WrongAnswer, against, agrees_with, moved_alike
from .contest import Peer, run_contest
from .floors import Floor, copy_floor, gemm_floor

__all__ = [
    "Absent",
    "Floor",
    "Peer",
    "WrongAnswer",
    "against",
    "agrees_with",
    "copy_floor",
    "gemm_floor",
    "moved_alike",
    "run_contest",
]
