"""README's table and docs/benchmarks.md, from the committed results and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..files import write_atomically
from .results import Contest, Entry, Results, read_files
from .run import RESULTS
from .show import duration, number, times

BEGIN, END = "<!-- benchmarks: made by parl bench --table -->", "<!-- end of benchmarks -->"
PAGE = Path("docs", "benchmarks.md")
ON_GPUS = "gpu-"
"""Begins the topics of what was measured on a GPU, which docs/gpu.md shows."""

_PREAMBLE = """# Benchmarks

`parl bench --table` writes this page from [benchmarks/results](../benchmarks/results); it is never edited by hand. The
contestants of a contest take turns within one process, after their answers have been checked. Times are medians, ratios
medians of the ratios within rounds. A floor is the fewest flops at the best rate of a matrix product of that shape, or the
bytes at the speed of a copy; a gradient is one forward and backward pass of the same network; both are measured in the same
rounds. Memory is that at the peak of one call, beyond what was resident before it. A limited peer, such as one compiled for
one θ, serves nothing else; the column "vs best unlimited" leaves it out.
"""


def write_table(root: Path) -> str:
    """Write README's table and the page with all contests; returns what was written.

    Raises:
        ConfigError: there are no results, or README lacks the two lines that the table stands between.
        RunFolderError: a file cannot be written.
    """
    files = cpu_results(root)
    readme = root / "README.md"
    write_atomically(readme, with_table(readme.read_text(), table(files)).encode())
    write_atomically(root / PAGE, page(files).encode())
    return f"{readme}\n{root / PAGE}"


def cpu_results(root: Path) -> list[Results]:
    """The committed results of CPUs; those of GPUs, in the same folder, have a page of their own.

    Raises:
        ConfigError: there are none.
    """
    return [file for file in read_files(root / RESULTS) if not file.contests[0].topic.startswith(ON_GPUS)]


def with_table(readme: str, lines: str) -> str:
    """README with what stands between the two marks replaced.

    Raises:
        ConfigError: it does not have each of them once, in their order.
    """
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ConfigError(f"README.md must hold the lines {BEGIN} and {END} once each, in this order")
    return f"{head}{BEGIN}\n{lines}{END}{tail}"


def table(files: Sequence[Results]) -> str:
    """A row for each benchmark, over all its sizes; ours is the first of ours, which is what users get."""
    rows = ["| benchmark | sizes | time | × floor | vs best peer | best peers |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Contest]] = {}
    for contest in (contest for results in files for contest in results.contests):
        groups.setdefault((contest.topic, contest.name.split(" ")[0]), []).append(contest)
    for (topic, benchmark), contests in groups.items():
        ours = [entry for contest in contests if (entry := first_of_ours(contest)) is not None]
        if not ours:
            continue
        rows.append(
            f"| {topic}: {benchmark.replace('_', ' ')} | {len(contests)} "
            f"| {_range((entry.median for entry in ours), duration)}{_withheld(ours)} "
            f"| {_range((entry.to_floor for entry in ours), number)} "
            f"| {_range((entry.speedup for entry in ours), times)} "
            f"| {', '.join(dict.fromkeys(filter(None, map(best_peer, contests))))} |"
        )
    return "\n".join(rows) + "\n\n" + "\n".join(_environments(files)) + "\n"


def page(files: Sequence[Results]) -> str:
    """All contests with all their contestants."""
    parts = [_PREAMBLE]
    for results in files:
        parts.append(f"\n## {results.contests[0].topic}\n\n{_environments([results])[0]}\n")
        parts += [_section(contest) for contest in results.contests]
    return "".join(parts)


def first_of_ours(contest: Contest) -> Entry | None:
    """What users get, whether it has times or not."""
    return next((entry for entry in contest.entries if entry.ours), None)


def best_peer(contest: Contest) -> str | None:
    """Its name, by the median; marked where it is limited."""
    peers = [entry for entry in contest.entries if not entry.ours and entry.median is not None]
    best = min(peers, key=lambda entry: entry.median or 0.0, default=None)
    return None if best is None else best.name + (f" ({best.limited})" if best.limited else "")


def _range(values: Iterable[float | None], show: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    low, high = show(min(known)), show(max(known))
    return low if low == high else f"{low} – {high}"


def _withheld(ours: Sequence[Entry]) -> str:
    """How many have no times, if any."""
    number_withheld = sum(entry.median is None for entry in ours)
    return f" ({number_withheld} withheld)" if number_withheld else ""


def _section(contest: Contest) -> str:
    lines = [f"\n**{contest.name}**"]
    if contest.floor is not None:
        lines[0] += f" (floor {duration(contest.floor)}: {contest.floor_of})"
    lines += [
        "",
        "| | median | quartiles | × floor | vs best peer | vs best unlimited | gradients | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in sorted(contest.entries, key=lambda entry: (entry.median is None, entry.median or 0.0)):
        name = f"**{entry.name}**" if entry.ours else entry.name
        if entry.withheld is not None:
            lines.append(f"| {name} | {entry.withheld.replace('|', '/')} | | | | | | |")
            continue
        cells = [
            duration(entry.median),
            f"{duration(entry.lower_quartile)} – {duration(entry.upper_quartile)}",
            number(entry.to_floor),
            times(entry.speedup),
            times(entry.speedup_unlimited),
            number(entry.gradients),
            number(entry.peak_mib),
        ]
        limit = f" ({entry.limited})" if entry.limited else ""
        lines.append(f"| {name}{limit} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _environments(files: Sequence[Results]) -> list[str]:
    """A line for each environment, with the topics that were measured in it."""
    topics: dict[str, list[str]] = {}
    for results in files:
        topics.setdefault(_environment(results.environment), []).append(results.contests[0].topic)
    if len(topics) == 1:
        return [f"Measured on {line}." for line in topics]
    return [f"{', '.join(names)}: measured on {line}.  " for line, names in topics.items()]


def _environment(facts: dict[str, object]) -> str:
    packages = [f"{name} {facts[name]}" for name in ("torch", "numba", "jax") if facts.get(name)]
    commit = str(facts.get("commit") or "unknown")[:12] + (" with changes" if facts.get("dirty") else "")
    parts = [f"{facts.get('cpu')}", f"{facts.get('threads')} threads of {facts.get('cores')} cores"]
    return ", ".join([*parts, f"Python {facts.get('python')}", *packages, f"{facts.get('date')}, commit {commit}"])
