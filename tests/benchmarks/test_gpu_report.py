"""What is made of results: bars, the table, the files, the page, and the choice of backends."""

from __future__ import annotations

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.case import Bar, Case
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.choose import choose
from benchmarks.gpu.tests import gpu_test_files, is_about
from parl_core.bench.results import Contest, Entry
from parl_core.errors import ConfigError
from parl_core.ops.choice import Rule, format_table, parse, rules

ENVIRONMENT = {"gpu": "NVIDIA H200", "date": "2026-11-21", "copy_bytes_per_s": 4.3e12, "commit": "0123456789abcdef"}


def entry(name, median, *, ours=False, **fields):
    return Entry(name=name, ours=ours, median=median, lower_quartile=median, upper_quartile=median, **fields)


def contest(*entries, name="gae 3x5"):
    return Contest(topic="scan", name=name, entries=entries)


CALLED = contest(
    entry("triton", 2e-3, ours=True, speedup=3.0),
    entry("cuda", 4e-3, ours=True),
    Entry(name="reference", ours=True, withheld="not here: slow"),
    entry("eager", 6e-3),
    entry("compiled", 9e-3),
    Entry(name="JAX", ours=False, withheld="failed: ValueError: no"),
)
ALONE = contest(
    entry("triton", 1e-3, ours=True, to_floor=1.6),
    entry("cuda", 8e-4, ours=True, to_floor=1.28),
    entry("eager", 2e-3),
    name="gae 3x5, on the device",
)


def case(*bars, name="gae 3x5", **fields):
    return Case("scan", name, setup=lambda lab: None, tests=(), bars=bars, **fields)


@pytest.mark.parametrize(
    "bar, expected",
    [
        (Bar(0.8, floor=True), 1 / 1.28),
        (Bar(1.5, peers=("compiled", "eager")), 3.0),
        (Bar(1.5, peers=("compiled",)), 4.5),
        (Bar(1.5, peers=("eager",), on_device=True), 2.5),
        (Bar(1.5, peers=("compiled",), on_device=True), "compiled has no times"),
        (Bar(1.5, peers=("eager", "JAX")), "JAX failed"),
        (Bar(1500.0, work=1.0), 500.0),
    ],
    ids=str,
)
def test_bars(bar, expected):
    found = bar.measured(CALLED, ALONE)
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_bars_of_what_was_not_timed():
    assert Bar(0.8, floor=True).measured(CALLED, None) == "no times on the device"
    slow = contest(Entry(name="cuda", ours=True), entry("reference", 1e-3, ours=True), entry("eager", 9e-3))
    for bar in (Bar(1.5, peers=("eager",)), Bar(10.0, work=1.0)):
        assert report.verdict(bar, slow, None) == "not measured (none of our kernels was timed)"
    assert (
        Bar(1.5, peers=("eager",)).measured(
            contest(entry("cuda, one graph", 1.0, ours=True), entry("eager", 2.0)), None
        )
        == 2
    )


def test_the_table_tells_bars_and_verdicts():
    cases = [case(Bar(0.8, floor=True), Bar(2.0, peers=("eager",))), case(name="not run")]
    header, _, row = report.table(cases, [CALLED, ALONE]).strip().splitlines()
    assert row.startswith("| scan gae 3x5 | triton | 2 ms | 800 µs | 78% | 3× |")
    assert row.endswith("| 78%: NO; 3×: yes |") and row.count("|") == header.count("|")


def test_the_table_marks_what_is_untested():
    cases = [case(), case(name="other")]
    assert "| scan gae 3x5 | triton, untested | 2 ms" in report.table(cases, [CALLED, ALONE], ["scan gae 3x5"])
    assert "untested" not in report.table(cases, [CALLED, ALONE], ["scan other"])


def test_a_contest_without_times_tells_why():
    nothing = contest(Entry(name="triton", ours=True, withheld="failed: a|b"))
    assert "triton failed: a/b" in report.table([case()], [nothing])


def test_broken_contestants_once_ours_and_peers_apart():
    fallen = Entry(name="cuda", ours=True, withheld="failed: x"), Entry(name="JAX", ours=False, withheld="wrong: y")
    halves = [contest(*fallen), contest(*fallen, name="gae 3x5, on the device")]
    assert report.broken(halves, ours=True) == ["scan gae 3x5: cuda failed: x"]
    assert report.broken(halves, ours=False) == ["scan gae 3x5: JAX wrong: y"]
    assert report.broken([CALLED], ours=True) == []


def test_files_and_page(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_page([case()], tmp_path, page)
    assert page.read_text() == f"before\n{report.BEGIN}\n{report.NOTHING}{report.END}\nafter\n"
    (path,) = report.write(tmp_path, ENVIRONMENT, [CALLED, ALONE])
    assert path.name == "gpu-scan.json"
    assert report.read(tmp_path) == (ENVIRONMENT, [CALLED, ALONE])
    report.write_page([case()], tmp_path, page)
    text = page.read_text()
    assert "Measured on NVIDIA H200" in text and "copy 4.3 TB/s" in text and "commit 0123456789ab" in text
    assert (
        "| scan gae 3x5 | triton |" in text and "| eager | 6 ms |" in text and text.endswith(f"{report.END}\nafter\n")
    )
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="must hold the lines"):
        report.write_page([case()], tmp_path, page)


def times(name, cuda, triton, reference=9.0):
    seconds = {"cuda": cuda, "triton": triton, "reference": reference}
    entries = [entry(backend, median, ours=True) for backend, median in seconds.items() if median]
    return contest(*entries, entry("a peer", 1e-9), name=name)


def test_choice_of_backends():
    sizes = {"a": 100, "b": 1000, "c": 1000, "d": 100_000, "e": 10_000_000}
    cases = [case(name=name, op="gae", size=size) for name, size in sizes.items()]
    cases.append(case(name="whole", op="linearize"))
    cases.append(case(name="plain", op="f_divergence", size=5))
    contests = [
        times("a", 1.0, 2.0),
        times("b", 1.0, 4.0, None),  # the two of one size count together, √(4 · 0.5), by what took part in both
        times("c", 1.0, 0.5, 1e-9),
        times("d", 1.0, 0.8),
        times("e", 1.0, 0.5),
        times("whole", 1.0, 1.5),
        times("plain", None, 3.0, 2.0),
    ]
    before = {"gae": (Rule("triton", "thought"),), "vtrace": (Rule("triton", "thought"),)}
    table = choose(before, cases, contests, ENVIRONMENT)
    short, long = table["gae"]
    assert (short.backend, short.up_to) == ("cuda", 10_000)  # between 1000 and 100 000
    assert short.because == "2.00 times as fast as triton at 100; 1.41 times as fast as triton at 1,000"
    assert (long.backend, long.up_to, long.device, long.date) == ("triton", None, "NVIDIA H200", "2026-11-21")
    assert long.because == "1.25 times as fast as cuda at 100,000; 2.00 times as fast as cuda at 10,000,000"
    assert table["linearize"] == (Rule("cuda", "1.50 times as fast as triton", None, "NVIDIA H200", "2026-11-21"),)
    assert table["f_divergence"][0].backend == "reference"
    assert table["vtrace"] == before["vtrace"]
    assert parse(format_table(table)) == table


def test_an_op_with_one_backend_keeps_its_rules():
    contests = [contest(entry("triton", 1.0, ours=True), Entry(name="cuda", ours=True, withheld="not here: no"))]
    assert choose({}, [case(op="gae", size=5)], contests, ENVIRONMENT) == {}


@pytest.mark.parametrize("tiny", [False, True])
def test_cases_are_told_apart_and_name_test_files(tiny):
    cases = all_cases(tiny=tiny)
    assert len({case.id for case in cases}) == len(cases)
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    assert all(case.tests for case in cases)
    if tiny:
        return
    barred = {case.topic for case in cases if case.bars}
    assert barred == {case.topic for case in cases} - {"gaussian"}
    # What a rule is about can be measured.
    assert {case.op for case in cases if case.op is not None} >= set(rules()) - {"f_divergence, elementwise"}
    first = [case for case in cases if case.rank == 0]
    assert [case.topic for case in first[:4]] == ["sac", "hypergradient", "linearization", "linearization"]
    assert {case.topic for case in first} == barred - {"preference"} and len(first) == 7  # the bars that were set
    assert all(case.bars for case in first) and all(case.rank <= 1 for case in cases if case.bars)
    files = gpu_test_files()
    assert all(any(is_about(file, (part,)) for file in files) for case in cases for part in case.tests)
