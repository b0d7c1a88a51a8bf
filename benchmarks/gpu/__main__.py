"""The steps of `benchmarks/gpu.sh`, in order, within a number of minutes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .store import ROOT, Store, fingerprint

PASSED, FAILED, INCOMPLETE = 0, 1, 2
"""Exit statuses: everything is right; a build, test or contest is not; something did not run for want of time."""

_TESTS_SHARE = 0.5
"""Of what is left after the build, the most that the tests take."""
_NO_RANK = 9
"""Of tests that no contest is about."""
_LAST = 10.0
"""Seconds kept for the report."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    given = _arguments(argv)
    began = _shell_began()
    _set_environment(given.work, dry=given.dry)
    from . import report  # after the environment, which torch and Triton read as they are imported
    from .cases import all_cases

    cases = all_cases(tiny=given.dry)
    if given.command == "page":
        print(report.write_page(cases, given.results))
        return PASSED
    if given.command == "choose":
        return _choose(given.results, cases)
    return _run(given, began)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Builds the CUDA kernels, runs every GPU test, then the benchmarks. The same command goes on where it "
        "was stopped.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=("run", "choose", "page"),
        help="run everything; or, from results, write parl_core/ops/choice.json or the table in docs/gpu.md",
    )
    parser.add_argument("--fresh", action="store_true", help="run again what has been run")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it; 9.5 unless given")
    parser.add_argument(
        "--only", default="", metavar="PART", help="only contests with this in their name, and their tests"
    )
    parser.add_argument("--work", type=Path, help="the folder of what is done; runs/gpu unless given")
    parser.add_argument("--results", type=Path, help="the folder of the results; benchmarks/results unless given")
    parser.add_argument(
        "--dry", action="store_true", help="on the CPU, with tiny sizes, to try all of this without a GPU"
    )
    given = parser.parse_args(argv)
    given.work = (given.work or ROOT / "runs" / ("gpu-dry" if given.dry else "gpu")).resolve()
    given.results = (
        given.results or (given.work / "results" if given.dry else ROOT / "benchmarks" / "results")
    ).resolve()
    return given


def _set_environment(work: Path, *, dry: bool) -> None:
    """For this process and all that it starts."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    defaults = {
        "OMP_NUM_THREADS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # its default on GPUs is TF32
        "JAX_COMPILATION_CACHE_DIR": str(work / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",  # several processes compile at once
    }
    if dry:
        defaults |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        for path in (ROOT / "build" / "emulated").glob("_emulated*.so"):
            defaults["PARL_CUDA_EMULATED"] = str(path)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _shell_began() -> float:
    """Of `time.monotonic`: when the shell's command began, which tells the seconds since 1970; else now."""
    now = time.monotonic()
    return now - max(0.0, time.time() - float(os.environ.get("PARL_GPU_BEGAN") or time.time()))


def _choose(results: Path, cases: Sequence[Any]) -> int:
    from parl_core.ops.choice import TABLE, format_table, rules

    from . import choose, report

    environment, contests = report.read(results)
    if not environment.get("gpu"):
        print(f"{results} holds no results of a GPU", file=sys.stderr)
        return FAILED
    TABLE.write_text(format_table(choose.choose(rules(), cases, contests, environment)))
    print(TABLE)
    return PASSED


def _run(given: argparse.Namespace, began: float) -> int:
    import torch

    from . import build, contests, machine, report, tests
    from .cases import all_cases

    if not given.dry and not torch.cuda.is_available():
        print("No NVIDIA GPU is visible to torch. --dry tries the harness on the CPU.", file=sys.stderr)
        return FAILED
    if not _has("pytest"):
        print("pytest is not installed", file=sys.stderr)
        return FAILED
    device = "cpu" if given.dry else torch.cuda.get_device_name(0)
    sources = fingerprint(device, given.dry, torch.__version__)
    store = Store(given.work, sources)
    if given.fresh:
        store.forget()
    end = began + 60.0 * given.minutes - _LAST
    problems: list[str] = []

    build.link_kernels()
    if not given.dry and (why := build.why_build()):
        print(f"Building the extension: {why}", flush=True)
        if failure := build.build(store.folder / "build.log", end):
            problems.append(f"build: {failure}")
            print(f"  {failure}", flush=True)

    cases = [case for case in all_cases(tiny=given.dry) if given.only in case.id]
    files = all_files = tests.gpu_test_files(dry=given.dry)
    if given.only:
        files = [file for file in files if any(tests.is_about(file, case.tests) for case in cases)]
    # What the first contests need comes first.
    files = sorted(
        files, key=lambda file: min((case.rank for case in cases if tests.is_about(file, case.tests)), default=_NO_RANK)
    )
    print(f"Tests: {len(files)} files", flush=True)
    preparing = [] if given.dry else contests.start_preparing(cases, store.folder / "prepare.log", 3)
    now = time.monotonic()
    outcomes = tests.run_tests(files, store, now + _TESTS_SHARE * max(end - now, 0.0), _say)
    for process in preparing:
        contests.processes.stop(process)

    print("Floors of the machine", flush=True)
    floors = contests.measure_machine(store, end, dry=given.dry)
    if not floors and time.monotonic() < end:
        problems.append(f"machine: its floors could not be measured; see {store.folder / 'contests.log'}")

    red = {case.id: tests.red(outcomes, case.tests) for case in cases}
    withheld = {name: f"its tests are red: {', '.join(found)}" for name, found in red.items() if found}
    every = all_cases(tiny=given.dry)
    tested = {**tests.known(all_files, store), **outcomes}
    untested = [case.id for case in every if tests.untested(all_files, tested, case.tests)]
    environment = {**machine.describe(), **floors, "sources": sources, "untested": untested}

    def write() -> list[Path]:
        """What there is by now: whoever stops this command has it."""
        known = {case.id: store.read(f"case {case.id}") or {} for case in every if case.id not in withheld}
        return report.write(given.results, environment, _contests(known, every))

    def say_and_write(line: str) -> None:
        _say(line)
        write()

    print(f"Contests: {len(cases)}", flush=True)
    found = contests.run_cases(cases, withheld, store, end, say_and_write, dry=given.dry)
    held = _contests(found, cases)
    written = write()

    problems += [f"test {name}: {line}" for name, outcome in outcomes.items() for line in outcome.failed]
    problems += [f"{name}: {outcome['why']}" for name, outcome in found.items() if "why" in outcome]
    problems += report.broken(held, ours=True)
    missing = [f"test {file}" for file in files if file not in outcomes]
    missing += [case.id for case in cases if case.id not in found]

    print()
    for line in [*report.machine_lines(environment), "", report.table(cases, held, environment["untested"])]:
        print(line)
    _summary(outcomes, problems, report.broken(held, ours=False), missing, written)
    return FAILED if problems else INCOMPLETE if missing else PASSED


def _contests(found: dict[str, dict[str, Any]], cases: Sequence[Any]) -> list[Any]:
    from parl_core.bench.results import contest_of

    return [contest_of(fields) for case in cases for fields in found.get(case.id, {}).get("contests", ())]


def _summary(
    outcomes: dict[str, Any], problems: list[str], peers: list[str], missing: list[str], written: list[Path]
) -> None:
    passed = sum(outcome.passed for outcome in outcomes.values())
    skipped: dict[str, int] = {}
    for outcome in outcomes.values():
        for reason, count in outcome.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    print(f"{passed} tests passed, {sum(len(outcome.failed) for outcome in outcomes.values())} failed.")
    for reason, count in sorted(skipped.items(), key=lambda item: -item[1])[:8]:
        print(f"  {count} skipped: {reason}")
    for title, lines in (
        ("Wrong or broken:", problems),
        ("Peers that are wrong or broken here:", peers),
        ("Not run, for want of time; the same command goes on:", missing),
    ):
        if lines:
            print(title)
            for line in lines[:40]:
                print(f"  {line}")
            if len(lines) > 40:
                print(f"  and {len(lines) - 40} more")
    if written:
        print(f"Results: {', '.join(map(str, written))}")


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
