"""The race: answers are checked, then everyone is timed in turns (A B C A B C …), and floor and gradient with them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, quantiles
from typing import Any

from parl_core.bench.results import ABSENT, MISSING, Contest, Entry

from .answers import Absent, Check, Unrecordable, WrongAnswer, first_line
from .clock import seconds_per_call, wait_for
from .device import Clock
from .floors import Floor
from .memory import peak_mib

Run = Callable[[], Any]
Make = Callable[[], Run]
"""Prepares a contestant and returns the function that is timed, which returns its answer."""
Time = Callable[[Run], float]

MIN_ROUNDS, MAX_ROUNDS = 7, 101
SLOW_SECONDS, SLOW_ROUNDS = 60.0, 3
"""A race that has lasted so long ends after so many rounds."""


@dataclass(frozen=True)
class Peer:
    """A peer with a remark; without one its maker alone will do."""

    make: Make
    limited: str | None = None
    """What it cannot do that the others can; shown, and not counted as the best peer that is not limited."""


@dataclass
class Racer:
    """A contestant on its way through a contest."""

    entry: Entry
    run: Run | None = None
    seconds: list[float] | None = None


def run_contest(
    topic: str,
    name: str,
    check: Check,
    *,
    ours: Mapping[str, Make],
    peers: Mapping[str, Make | Peer] | None = None,
    floor: Floor | None = None,
    gradient: Make | None = None,
    seconds: float = 8.0,
    timer: Time = seconds_per_call,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Contest, dict[str, list[float]]]:
    """Check every contestant, time those that are right, and set their times in proportion.

    Args:
        topic, name: the contest's.
        check: of an answer; see `answers.against`.
        ours, peers: makers by name.
        floor: what the machine allows.
        gradient: maker of one forward and backward pass of the same network.
        seconds: rounds begin until this much time has passed, but at least `MIN_ROUNDS`, or `SLOW_ROUNDS` of contestants
            that take very long, and at most `MAX_ROUNDS`.
        timer: seconds per call of a function.
        clock: seconds, for the length of the race.

    Returns:
        The contest, and the seconds per call of each contestant in each round.
    """
    racers = prepare(check, ours, peers)
    return race(topic, name, check, racers, floor=floor, gradient=gradient, seconds=seconds, timer=timer, clock=clock)


def prepare(check: Check, ours: Mapping[str, Make], peers: Mapping[str, Make | Peer] | None = None) -> list[Racer]:
    """Everyone made, and checked; who cannot race has the reason in its entry."""
    entries = [(Entry(name=known, ours=True), make) for known, make in ours.items()]
    for known, peer in (peers or {}).items():
        peer = peer if isinstance(peer, Peer) else Peer(peer)
        entries.append((Entry(name=known, ours=False, limited=peer.limited), peer.make))
    return [_prepared(entry, make, check) for entry, make in entries]


def race(
    topic: str,
    name: str,
    check: Check,
    racers: Sequence[Racer],
    *,
    floor: Floor | None,
    gradient: Make | None,
    seconds: float,
    timer: Time,
    clock: Callable[[], float] = time.monotonic,
    peak: Callable[[Callable[[], Any]], float | None] = peak_mib,
) -> tuple[Contest, dict[str, list[float]]]:
    """Time those who can race, and set their times in proportion; see `run_contest`.

    Args:
        racers: as `prepare` returns them; their entries and times are written.
        peak: MiB at the peak of a call.
    """
    fit = [racer for racer in racers if racer.run is not None]
    unit = None if gradient is None else gradient()
    extras = [floor.run if floor else None, unit]
    runs = [run for run in [*(racer.run for racer in fit), *extras] if run is not None]
    times = _take_turns(runs, seconds, timer, clock) if fit else []
    for racer, own in zip(fit, times, strict=False):
        if isinstance(own, Exception):
            racer.entry = replace(racer.entry, error=None, withheld=f"failed while being timed: {_told(own)}")
            continue
        racer.seconds = own
        _check_again(racer, check, peak)
    floor_seconds = times[len(fit)] if floor and fit else None
    unit_seconds = times[-1] if unit and fit else None
    floor_times = (
        [floor.scale * second for second in floor_seconds] if floor and isinstance(floor_seconds, list) else None
    )
    unit_times = unit_seconds if isinstance(unit_seconds, list) else None
    contest = Contest(
        topic=topic,
        name=name,
        entries=tuple(_rated(racer, racers, floor_times, unit_times) for racer in racers),
        floor=median(floor_times) if floor_times else None,
        floor_of=floor.name if floor else None,
        gradient=median(unit_times) if unit_times else None,
    )
    return contest, {racer.entry.name: racer.seconds for racer in racers if racer.seconds}


def _prepared(entry: Entry, make: Make, check: Check) -> Racer:
    try:
        run = make()
        return Racer(replace(entry, error=check(wait_for(run()))), run)
    except WrongAnswer as wrong:
        return Racer(replace(entry, withheld=f"wrong: {wrong}"))
    except Absent as absent:
        return Racer(replace(entry, withheld=f"{ABSENT}: {first_line(absent)}"))
    except Exception as broken:  # whatever a peer may raise; the contest goes on and is red
        if isinstance(broken, ImportError) and not entry.ours:
            return Racer(replace(entry, withheld=f"{MISSING}: {broken}"))
        return Racer(replace(entry, withheld=f"failed: {_told(broken)}"))


def _take_turns(
    runs: Sequence[Run], seconds: float, timer: Time, clock: Callable[[], float]
) -> list[list[float] | Exception]:
    """Seconds per call of each run in each round; of one that raised, what it raised: the others go on without it."""
    gc.collect()
    times: list[list[float] | Exception] = [[] for _ in runs]
    start = clock()
    for done in range(MAX_ROUNDS):
        passed = clock() - start
        if (done >= MIN_ROUNDS and passed >= seconds) or (done >= SLOW_ROUNDS and passed >= SLOW_SECONDS):
            break
        for number, run in enumerate(runs):
            own = times[number]
            if isinstance(own, Exception):
                continue
            try:
                own.append(timer(run))
            except Exception as error:  # as in _prepared
                times[number] = error
    return times


def _check_again(racer: Racer, check: Check, peak_of: Callable[[Callable[[], Any]], float | None]) -> None:
    """What was timed must still be right: buffers that are written again and again, graphs that are kept.

    The memory of this call is measured along the way.
    """
    run, answers = racer.run, []
    assert run is not None
    try:
        peak = peak_of(lambda: answers.append(wait_for(run())))
        check(answers[0])
        racer.entry = replace(racer.entry, peak_mib=peak)
    except Exception as wrong:  # as in _prepared
        racer.seconds = None
        why = f"wrong after having been timed: {first_line(wrong)}"
        racer.entry = replace(racer.entry, error=None, withheld=why)


def _rated(racer: Racer, racers: Sequence[Racer], floor: Sequence[float] | None, unit: Sequence[float] | None) -> Entry:
    """The entry with its times, and in proportion to what was measured in the same rounds."""
    own = racer.seconds
    if own is None:
        return racer.entry
    others = [other for other in racers if other is not racer and not other.entry.ours and other.seconds]
    unlimited = [other for other in others if other.entry.limited is None]
    lower, middle, upper = quantiles(own, n=4, method="inclusive")
    return replace(
        racer.entry,
        median=middle,
        lower_quartile=lower,
        upper_quartile=upper,
        rounds=len(own),
        speedup=_best_over(others, own),
        speedup_unlimited=_best_over(unlimited, own) if len(unlimited) < len(others) else None,
        to_floor=_proportion(own, floor),
        gradients=_proportion(own, unit),
    )


def _best_over(others: Sequence[Racer], own: Sequence[float]) -> float | None:
    proportions = [_proportion(other.seconds, own) for other in others if other.seconds]
    return min((proportion for proportion in proportions if proportion is not None), default=None)


def _proportion(these: Sequence[float], those: Sequence[float] | None) -> float | None:
    """The median over rounds: a slow round is slow for both."""
    return None if those is None else median(one / other for one, other in zip(these, those, strict=True))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


ON_THE_DEVICE = ", on the device"
"""Ends the name of a contest's second half."""


def run_device_contest(
    topic: str,
    name: str,
    check: Check,
    *,
    ours: Mapping[str, Make],
    device: Clock,
    peers: Mapping[str, Make | Peer] | None = None,
    floor: Floor | None = None,
    gradient: Make | None = None,
    seconds: float = 1.0,
    cold: bool = False,
    alone: bool = True,
    unrecorded: Container[str] = (),
) -> Iterator[Contest]:
    """As `run_contest`, twice with the same contestants: what a call costs, and what it costs on the device alone.

    The first is told before the second begins, which may end the process.

    Args:
        device: its clock.
        seconds: of each of the two.
        cold: on the device, with caches that hold nothing of the contestant's.
        alone: whether there is a second half, on the device.
        unrecorded: those who read the device or are a graph already, so that they take no part in the second half.
    """
    with device.running():
        racers = prepare(check, ours, peers)
        called, _ = race(
            topic,
            name,
            check,
            racers,
            floor=floor,
            gradient=gradient,
            seconds=seconds,
            timer=device.a_call,
            peak=device.peak_mib,
        )
        yield called
        if not alone or called.fastest is None:
            return
        recorded_floor = None if floor is None else _recorded_or_none(device, floor.run, cold=False)
        unit = None if gradient is None else _recorded_or_none(device, gradient(), cold=cold)
        again = []
        for racer, entry in zip(racers, called.entries, strict=True):
            again.append(_recorded(racer, entry, device, cold, entry.name not in unrecorded))
        replayed, _ = race(
            topic,
            name + ON_THE_DEVICE,
            check,
            again,
            floor=replace(floor, run=recorded_floor) if floor and recorded_floor else None,
            gradient=None if unit is None else lambda: unit,
            seconds=seconds,
            timer=device.on_device,
            peak=_not_measured,
        )
        yield replayed


def _recorded_or_none(device: Clock, run: Run, *, cold: bool) -> Run | None:
    """Contestants are told without what they are set in proportion to."""
    try:
        return device.recorded(run, cold=cold)
    except Exception:
        return None


def _not_measured(call: Callable[[], Any]) -> None:
    """The memory of a graph is its own, and was allocated when it was recorded."""
    call()


def _recorded(racer: Racer, rated: Entry, device: Clock, cold: bool, recordable: bool) -> Racer:
    """The racer for the second half; who fell out before, or cannot be recorded, has the reason in its entry."""
    entry = Entry(name=rated.name, ours=rated.ours, limited=rated.limited, error=rated.error)
    if rated.withheld is not None or racer.run is None:
        return Racer(replace(entry, error=None, withheld=rated.withheld))
    try:
        if not recordable:
            raise Absent("it reads the device, which a CUDA graph cannot, or is one already")
        return Racer(entry, device.recorded(racer.run, cold=cold))
    except Absent as absent:
        # A reference may read the device; a kernel must not.
        broken = isinstance(absent, Unrecordable) and entry.ours and entry.name != "reference"
        return Racer(replace(entry, error=None, withheld=f"{'failed' if broken else ABSENT}: {first_line(absent)}"))
    except Exception as error:  # as in _prepared
        return Racer(replace(entry, error=None, withheld=f"failed: {_told(error)}"))
