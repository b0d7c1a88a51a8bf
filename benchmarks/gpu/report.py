"""The short table, benchmarks/results/gpu-*.json, and the table in docs/gpu.md that is made of these."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness.contest import ON_THE_DEVICE
from parl_core.bench.page import ON_GPUS
from parl_core.bench.results import Contest, Entry, Results, by_name, read_files, write_results
from parl_core.bench.show import duration, number, times
from parl_core.errors import ConfigError
from parl_core.files import write_atomically

from .case import Bar, Case, best_of_ours
from .store import ROOT

PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- results: made by python -m benchmarks.gpu page -->", "<!-- end of results -->"
NOTHING = "No results are committed: nothing here has been measured on a GPU yet.\n"

_FLOORS = {
    "copy_bytes_per_s": ("copy", 1e12, "TB/s"),
    "gemm_fp32_flops": ("float32 product", 1e12, "TFLOP/s"),
    "gemm_tf32_flops": ("TF32 product", 1e12, "TFLOP/s"),
    "gemm_bf16_flops": ("bfloat16 product", 1e12, "TFLOP/s"),
    "launch_s": ("a launch", 1e-6, "µs"),
    "launch_on_device_s": ("a kernel in a graph", 1e-6, "µs"),
}


def write(folder: Path, environment: Mapping[str, Any], contests: Iterable[Contest]) -> list[Path]:
    """A file for each topic, as `parl bench --compare` reads it."""
    named = tuple(replace(contest, topic=ON_GPUS + contest.topic) for contest in contests)
    return write_results(folder, Results(dict(environment), named)) if named else []


def read(folder: Path) -> tuple[dict[str, Any], list[Contest]]:
    """The environment and the contests of a folder's GPU results; both empty if there are none."""
    try:
        files = [file for file in read_files(folder) if file.contests[0].topic.startswith(ON_GPUS)]
    except (ConfigError, IndexError):
        files = []
    contests = [
        replace(contest, topic=contest.topic.removeprefix(ON_GPUS)) for file in files for contest in file.contests
    ]
    return (files[0].environment if files else {}), contests


def table(cases: Sequence[Case], contests: Sequence[Contest], untested: Container[str] = ()) -> str:
    """A row for each case that has results, those with bars first; in Markdown, and short enough for a terminal.

    Args:
        untested: ids of cases of whose tests some were not run; marked.
    """
    known = by_name(contests)
    lines = [
        "| contest | ours | a call | on the device | of the floor | vs best peer | bar | reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in sorted(cases, key=lambda case: (not case.bars, case.rank)):
        called = known.get((case.topic, case.name))
        if called is not None:
            lines.append(_row(case, called, known.get((case.topic, case.name + ON_THE_DEVICE)), case.id in untested))
    return "\n".join(lines) + "\n"


def _row(case: Case, called: Contest, alone: Contest | None, untested: bool) -> str:
    ours = best_of_ours(called)
    if ours is None:
        withheld = [f"{entry.name} {entry.withheld}" for entry in called.entries if entry.ours]
        return f"| {case.id} | – | {'; '.join(withheld).replace('|', '/')[:150]} | | | | | |"
    replayed = best_of_ours(alone) if alone else None
    to_floor = replayed.to_floor if replayed else ours.to_floor
    cells = [
        case.id,
        f"{ours.name}, untested" if untested else ours.name,
        duration(ours.median),
        duration(replayed.median) if replayed else "",
        f"{100 / to_floor:.0f}%" if to_floor else "",
        times(ours.speedup),
        "; ".join(map(str, case.bars)),
        "; ".join(verdict(bar, called, alone) for bar in case.bars),
    ]
    return f"| {' | '.join(cells)} |"


def broken(contests: Iterable[Contest], *, ours: bool) -> list[str]:
    """A line for each contestant that failed or was wrong; once, though one that falls out of the first half is out of the
    second, too.
    """
    lines = [
        f"{contest.topic} {contest.name.removesuffix(ON_THE_DEVICE)}: {entry.name} {entry.withheld}"
        for contest in contests
        for entry in contest.broken
        if entry.ours == ours
    ]
    return list(dict.fromkeys(lines))


def verdict(bar: Bar, called: Contest, alone: Contest | None) -> str:
    """What was measured, and whether that is enough."""
    measured = bar.measured(called, alone)
    if isinstance(measured, str):
        return f"not measured ({measured})".replace("|", "/")
    told = f"{100 * measured:.0f}%" if bar.floor else times(measured) if bar.peers else number(measured)
    return f"{told}: {'yes' if measured >= bar.at_least else 'NO'}"


def machine_lines(environment: Mapping[str, Any]) -> list[str]:
    """What was measured on, and its floors."""
    facts = environment
    where = facts.get("gpu") or f"{facts.get('cpu')}, in the role of a GPU"
    versions = [f"{name} {facts[name]}" for name in ("torch", "triton", "jax") if facts.get(name)]
    commit = str(facts.get("commit") or facts.get("sources") or "unknown")[:12]
    driver = [f"driver {facts['driver_version']}"] if facts.get("driver_version") else []
    clocks = [f"SM clock {facts['clocks_sm']} when read"] if facts.get("clocks_sm") else []
    lines = [f"Measured on {', '.join([where, *driver, *versions, *clocks])}, {facts.get('date')}, commit {commit}."]
    floors = [
        f"{name} {number(facts[key] / unit)} {sign}" for key, (name, unit, sign) in _FLOORS.items() if facts.get(key)
    ]
    return lines + ([f"Floors, measured in the same run: {', '.join(floors)}."] if floors else [])


def write_page(cases: Sequence[Case], folder: Path, page: Path = PAGE) -> Path:
    """Put the results of `folder` between the two lines of docs/gpu.md that stand for them.

    Raises:
        ConfigError: the page lacks them.
    """
    environment, contests = read(folder)
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{page} must hold the lines {BEGIN} and {END}")
    block = NOTHING
    if contests:
        block = "\n".join([*machine_lines(environment), "", table(cases, contests, environment.get("untested", ()))])
        block += _contestants(contests)
    write_atomically(page, f"{head}{BEGIN}\n{block}{END}{tail}".encode())
    return page


def _contestants(contests: Sequence[Contest]) -> str:
    """All times of all contestants, folded."""
    lines = [
        "",
        "<details><summary>All contestants</summary>",
        "",
        "| contest | contestant | median | quartiles |",
        "|---|---|---|---|",
    ]
    for contest in contests:
        for entry in contest.entries:
            name = f"**{entry.name}**" if entry.ours else entry.name
            lines.append(f"| {contest.topic} {contest.name} | {name} | {_times(entry)} |")
    return "\n".join([*lines, "", "</details>", ""])


def _times(entry: Entry) -> str:
    if entry.withheld is not None:
        return f"{entry.withheld.replace('|', '/')[:120]} | "
    return f"{duration(entry.median)} | {duration(entry.lower_quartile)} – {duration(entry.upper_quartile)}"
