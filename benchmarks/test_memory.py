"""Peak memory of curvature products in chunks: it must not grow with the number of steps.

Each case runs in a process of its own. Its extra memory is the peak resident set from after the data are built, less what
was resident then; float32, one thread. `make bench` asserts the bound; this prints and writes the table:

    python benchmarks/test_memory.py benchmarks/results/memory.json
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHUNK_STEPS = 10_000
TRAJECTORY_STEPS = 1000
TIMED_RUNS = 3
SMALL, LARGE = 10_000, 1_000_000
# What may grow with T: log-probabilities, weights, a product's pieces and their concatenation, masks of finiteness.
BYTES_PER_STEP = 32


def _vjp(linear: Any, w: Any, v: Any) -> None:
    linear.vjp(w)


def _jvp_and_hvp(linear: Any, w: Any, v: Any) -> None:
    linear.jvp_and_hvp(w, v)


def _fisher_vp(linear: Any, w: Any, v: Any) -> None:
    linear.fisher_vp(w, v)


def product_case(product: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, int | None], None]:
    """A case that linearises the policy and takes one product."""

    def case(policy: Any, trajectories: Any, chunk_steps: int | None) -> None:
        import torch

        import parl_core

        linear = parl_core.linearize(policy, trajectories, chunk_steps=chunk_steps)
        product(linear, torch.ones(trajectories.num_steps), torch.ones(linear.num_params))

    return case


def whole_call(policy: Any, trajectories: Any, chunk_steps: int | None) -> None:
    """A hypergradient of three iterations; the upper data are small."""
    import torch

    import parl_core as parl

    reward = parl.rewards.RewardEnsemble(24, 6, hidden=(64, 64), members=1)
    upper = trajectories.select(torch.zeros(2, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parl.HypergradientWarning)  # three iterations are not meant to converge
        parl.hypergradient(
            policy,
            reward,
            trajectories,
            parl.PreferencePairs(upper, upper, torch.tensor([0.0, 1.0])),
            loss=parl.PreferenceLoss(),
            discount=0.99,
            curvature=parl.Fisher(0.1, damping=0.1),
            solver=parl.CG(max_iterations=3),
            baseline=False,  # the two pairs are alike, and b would be zero
            chunk_steps=chunk_steps,
        )


CASES: dict[str, Callable[[Any, Any, int | None], None]] = {
    "vjp": product_case(_vjp),
    "jvp_and_hvp": product_case(_jvp_and_hvp),
    "fisher_vp": product_case(_fisher_vp),
    "hypergradient": whole_call,
}
"""Name -> case(policy, trajectories, chunk_steps), whose memory and time are measured from its call to its return."""


def measure(case: str, num_steps: int, chunk_steps: int | None) -> dict[str, float]:
    """Run a case in a fresh process.

    Returns:
        "extra_mib", and "microseconds_per_step", the best of further runs in the same process.
    """
    command = [sys.executable, __file__, "--case", case, str(num_steps), str(chunk_steps or 0)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def main(path: str) -> None:
    """Print and write extra memory and time of every case, in chunks and, for contrast, in one piece."""
    results = {}
    for case in CASES:
        for num_steps, chunk_steps in (
            (10**4, None),
            (10**5, None),
            (10**4, CHUNK_STEPS),
            (10**5, CHUNK_STEPS),
            (10**6, CHUNK_STEPS),
        ):
            name = f"{case} T={num_steps} {f'chunks of {chunk_steps}' if chunk_steps else 'one piece'}"
            results[name] = measure(case, num_steps, chunk_steps)
            print(
                f"{name:45}{results[name]['extra_mib']:8.1f} MiB{results[name]['microseconds_per_step']:8.2f} µs/step"
            )
    report = {
        "command": "python benchmarks/test_memory.py benchmarks/results/memory.json",
        "date": time.strftime("%Y-%m-%d"),
        "policy": "GaussianPolicy 24-64-64-6, float32",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "results": results,
    }
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def run_case(case: str, num_steps: int, chunk_steps: int | None) -> dict[str, float]:
    """What the fresh process does."""
    import torch

    import parl_core

    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = parl_core.policies.GaussianPolicy(24, 6, hidden=(64, 64))

    def data(steps: int) -> Any:
        offsets = torch.arange(0, steps + 1, min(TRAJECTORY_STEPS, steps))
        return parl_core.Trajectories(torch.randn(steps, 24), torch.randn(steps, 6), offsets)

    CASES[case](policy, data(100), chunk_steps)  # libraries and kernels are loaded
    trajectories = data(num_steps)
    # What building the data left free goes back, or the case could use it without being seen; then the peak starts anew.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    CASES[case](policy, trajectories, chunk_steps)
    extra = _resident("VmHWM") - before
    seconds = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        CASES[case](policy, trajectories, chunk_steps)
        seconds.append(time.perf_counter() - start)
    return {"extra_mib": round(extra / 2**20, 1), "microseconds_per_step": round(1e6 * min(seconds) / num_steps, 2)}


def _resident(field: str) -> int:
    """Bytes, now (VmRSS) or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures through Linux's /proc")
@pytest.mark.parametrize("case", CASES)
def test_memory_in_chunks_does_not_grow_with_the_number_of_steps(case: str) -> None:
    small, large = (measure(case, steps, CHUNK_STEPS)["extra_mib"] for steps in (SMALL, LARGE))
    assert large <= 1.5 * small + BYTES_PER_STEP * LARGE / 2**20
    assert large < 0.5 * measure(case, LARGE // 10, None)["extra_mib"]  # a tenth of the steps in one piece


if __name__ == "__main__":
    if sys.argv[1] == "--case":
        print(json.dumps(run_case(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None)))
    else:
        main(sys.argv[1])
