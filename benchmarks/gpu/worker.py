"""The process in which contests are held, one after the other; whoever started it knows what to do when it dies.

    python -m benchmarks.gpu.worker run CASE… [--dry] [--seconds S]
    python -m benchmarks.gpu.worker prepare CASE… [--dry]           compiles what the cases will need, and times nothing
    python -m benchmarks.gpu.worker machine [--dry]                 the floors of the machine, a line of JSON

`run` writes a line of JSON when it begins a case, one with the contests so far after each, and one when it is over.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.harness.contest import prepare, run_device_contest
from benchmarks.harness.device import GpuClock, HostClock

from .case import Case, Lab
from .cases import all_cases
from .machine import measure

BROKEN = 3
"""Exit status when a case has broken something that a new process has whole: the device's context, or recording."""
_DRY_TURN, _DRY_SECONDS = 1e-4, 0.01


def lab(*, dry: bool) -> Lab:
    """The GPU, or the CPU in its role."""
    if dry:
        torch.set_num_threads(1)
        return Lab(torch.device("cpu"), HostClock(_DRY_TURN))
    # Products are compared in float32 for everyone.
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", torch.cuda.current_device())
    return Lab(device, GpuClock(device))


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    parser.add_argument("task", choices=("run", "prepare", "machine"))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("cases", nargs="*")
    given = parser.parse_args(argv)
    where = lab(dry=given.dry)
    if given.task == "machine":
        print(json.dumps(measure(where)), flush=True)
        return 0
    known = {case.id: case for case in all_cases(tiny=given.dry)}
    for name in given.cases:
        if given.task == "prepare":
            _prepare(known[name], where)
            continue
        _say(begin=name)
        _say(**_run(known[name], where, _DRY_SECONDS if given.dry else given.seconds))
        if not _answers(where) or where.clock.broken:
            return BROKEN
    return 0


def _run(case: Case, where: Lab, seconds: float) -> dict[str, Any]:
    contests: list[dict[str, Any]] = []
    try:
        with where.clock.running():
            setup = case.setup(where)
        for contest in run_device_contest(
            case.topic,
            case.name,
            setup.check,
            ours=setup.ours,
            peers=setup.peers,
            floor=setup.floor,
            gradient=setup.gradient,
            device=where.clock,
            seconds=seconds,
            cold=setup.cold,
            alone=setup.alone,
            unrecorded=setup.unrecorded,
        ):
            contests.append(asdict(contest))
            _say(so_far=case.id, contests=contests)
        return {"case": case.id, "contests": contests}
    except Exception as error:  # of the problem or its reference; those of contestants are in their entries
        traceback.print_exc()
        known = {"contests": contests} if contests else {}
        return {"case": case.id, **known, "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        _forget(where)


def _prepare(case: Case, where: Lab) -> None:
    try:
        with where.clock.running():
            setup = case.setup(where)
            prepare(setup.check, setup.ours, setup.peers)
    except Exception:  # it will be told when the case is run
        traceback.print_exc()
    _forget(where)


def _forget(where: Lab) -> None:
    """The memory of a case, and its compiled functions."""
    torch._dynamo.reset()
    gc.collect()
    if where.device.type == "cuda" and _answers(where):
        torch.cuda.empty_cache()


def _answers(where: Lab) -> bool:
    try:
        if where.device.type == "cuda":
            torch.cuda.synchronize(where.device)
    except RuntimeError:
        return False
    return True


def _say(**message: Any) -> None:
    print(json.dumps(message, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
