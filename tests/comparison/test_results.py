"""Tables of a comparison against numbers worked out by hand."""

from __future__ import annotations

import pytest

from parl_core.comparison.results import Run, clock, results, run_name, tables


def run(algorithm, seed, returns, env="a/b", labels=(0, 8, 16), success=None, seconds=(4.0, 6.0)):
    """Evaluations at the steps 100, 200 and 300, in two sittings of 150 steps."""
    rows = [
        {"step": 100.0 * (k + 1), "true_return": value, "labels": float(labels[k])} for k, value in enumerate(returns)
    ]
    for row, rate in zip(rows, success or ()):  # noqa: B905, it may be too short or none
        row["success_rate"] = rate
    sittings = [
        {"from_step": 0, "to_step": 150, "seconds": seconds[0]},
        {"from_step": 150, "to_step": 300, "seconds": seconds[1]},
    ]
    return Run(env, algorithm, seed, rows, sittings)


ORACLE = [
    run("oracle", 0, (0.0, 90.0, 100.0), labels=(0, 0, 0)),
    run("oracle", 1, (20.0, 40.0, 140.0), labels=(0, 0, 0)),
]
PEBBLE = [run("pebble", 1, (0.0, 100.0, 60.0), labels=(4, 9, 16)), run("pebble", 0, (0.0, 20.0, 120.0))]


def test_the_numbers_of_two_algorithms():
    oracle, pebble = results([*PEBBLE, *ORACLE])
    assert (oracle["algorithm"], pebble["algorithm"], pebble["runs"]) == ("oracle", "pebble", 2)
    assert oracle["final_mean"] == oracle["final_iqm"] == 120.0
    assert oracle["percent_of_oracle"] == 100.0
    assert pebble["final_mean"] == 90.0
    assert pebble["final_std"] == pytest.approx(30 * 2**0.5)
    assert (pebble["final_iqm_low"], pebble["final_iqm_high"]) == (60.0, 120.0)
    assert pebble["percent_of_oracle"] == 75.0
    assert pebble["area_under_curve"] == pytest.approx(
        ((0 + 100) / 4 + (100 + 60) / 4 + (0 + 20) / 4 + (20 + 120) / 4) / 2
    )
    # Pebble's mean curve is 0, 60, 90; half, three quarters and nine tenths of 120 are 60, 90 and 108.
    assert [pebble[f"steps_to_{share}"] for share in (50, 75, 90)] == [200, 300, None]
    assert [pebble[f"labels_to_{share}"] for share in (50, 75, 90)] == [8.5, 16.0, None]
    assert [oracle[f"steps_to_{share}"] for share in (50, 75, 90)] == [200, 300, 300]
    assert pebble["wall_seconds"] == 10.0
    assert pebble["steps_per_second"] == 30.0
    assert pebble["success_mean"] is None


@pytest.mark.parametrize("oracle", [[], [run("oracle", 0, (-9.0, -5.0, -3.0))], [run("oracle", 0, (0.0, 0.0, 0.0))]])
def test_without_an_oracle_that_earns_something_nothing_is_a_share_of_it(oracle):
    row = results([*oracle, *PEBBLE])[-1]
    assert row["percent_of_oracle"] is row["steps_to_50"] is row["labels_to_90"] is None


def test_the_tables_say_so():
    reached, cost = tables([*ORACLE, *PEBBLE])
    assert reached.rows[1] == ("pebble", "2", "90.0 ± 42.4", "90.0 [60.0, 120.0]", "75", "52.5")
    assert cost.rows[1] == ("pebble", "200", "300", "–", "8", "16", "–", "10 s", "30")
    single, _ = tables([run("a-parl", 0, (1.0, 2.0, 3.0))])
    assert single.rows == (("a-parl", "1", "3.000", "3.000 [3.000, 3.000]", "–", "2.000"),)


def test_success_is_watched_apart_from_the_return():
    """The Oracle ends at 80%, pebble's mean curve is 0, 45%, 60%: half of it at 200 steps, three quarters at 300."""
    oracle = [run("oracle", 0, (9.0, 9.0, 9.0), labels=(0, 0, 0), success=(0.0, 0.4, 0.8))]
    pebble = [
        run("pebble", 0, (9.0, 9.0, 9.0), success=(0.0, 0.2, 0.4)),
        run("pebble", 1, (9.0, 9.0, 9.0), labels=(4, 9, 16), success=(0.0, 0.7, 0.8)),
    ]
    reached, cost, success = tables([*oracle, *pebble])
    assert reached.rows[1][-2] == "100"  # of the Oracle's return, from the first evaluation on
    assert cost.rows[1][1:4] == ("100", "100", "100")
    assert success.title == "a/b: success rate"
    assert success.rows == (
        ("oracle", "80%", "40%", "200", "300", "300", "0", "0", "0"),
        ("pebble", "60% ± 28%", "38%", "200", "300", "–", "8", "16", "–"),
    )
    row = results([*oracle, *pebble])[1]
    assert row["success_area_under_curve"] == pytest.approx((0.2 + 0.55) / 2)
    assert row["success_labels_to_50"] == 8.5
    helpless = tables([run("oracle", 0, (9.0, 9.0, 9.0), success=(0.0, 0.0, 0.0)), *pebble])[-1]
    assert helpless.rows[1][3:] == ("–",) * 6  # no share of nothing


def test_several_environments_are_taken_together_each_by_its_oracle():
    other = [run("oracle", 0, (0.0, 0.0, 8.0), env="c/d"), run("pebble", 0, (0.0, 0.0, 2.0), env="c/d")]
    *_, overall = tables([*ORACLE, *PEBBLE, *other])
    # Pebble: 50% and 100% of 120, and 25% of 8. The resamples' means run from (50 + 50 + 25) / 3 to (100 + 100 + 25) / 3.
    assert overall.rows[1] == ("pebble", "3", "58.3 [41.7, 75.0]")
    assert overall.rows[0][0] == "oracle"
    missing = tables([*ORACLE, *PEBBLE, other[0]])[-1]
    assert [row[0] for row in missing.rows] == ["oracle"]
    assert len(tables([*ORACLE, *PEBBLE, other[1]])) == 4  # no Oracle there: nothing to take together


def test_durations_and_names_in_words():
    assert [clock(seconds) for seconds in (0.4, 59.6, 61, 3599.7, 7325)] == [
        "0 s", "1 min 00 s", "1 min 01 s", "1 h 00 min", "2 h 02 min",
    ]  # fmt: skip
    assert run_name("dm_control/walker-walk", "a-parl", 2) == "dm_control-walker-walk_a-parl_seed2"
    assert run_name("my.module:make", "oracle", 0) == "my.module-make_oracle_seed0"
