"""The scripted teachers: by hand, against the formulas on the uniforms they draw, and B-Pref's deviations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parl_core.errors import ConfigError, NonFiniteError
from parl_core.preference.teachers import TEACHERS, ScriptedTeacher, TeacherConfig
from parl_core.rl.rollout import Segments

NAN = math.nan


def segments(rewards: list[list[float]] | torch.Tensor) -> Segments:
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    return Segments(torch.zeros(*rewards.shape, 3), torch.zeros(*rewards.shape, 2), rewards)


def make_teacher(
    config: TeacherConfig,
    length: int = 2,
    horizon: int = 20,
    returns: tuple[float, ...] = (),
    seed: int = 0,
    bpref_compat: bool = False,
) -> ScriptedTeacher:
    generator = torch.Generator().manual_seed(seed)
    teacher = ScriptedTeacher(
        config, segment_length=length, horizon=horizon, generator=generator, bpref_compat=bpref_compat
    )
    for true_return in returns:
        teacher.episode_ended(true_return, horizon)
    return teacher


def judge(teacher: ScriptedTeacher, pairs: list[tuple[list[float], list[float]]]) -> list[float | None]:
    """Labels of pairs of rewards, None for a skipped one (NaN is not equal to itself)."""
    labels = teacher.label(segments([first for first, _ in pairs]), segments([second for _, second in pairs]))
    assert labels.dtype == torch.float32
    return [None if math.isnan(label) else label for label in labels.tolist()]


def test_the_presets_are_those_of_bpref():
    expected = {
        "oracle": TeacherConfig(beta=-1, discount=1, mistake=0, skip=0, equal=0),
        "mistake": TeacherConfig(beta=-1, discount=1, mistake=0.1, skip=0, equal=0),
        "noisy": TeacherConfig(beta=1, discount=1, mistake=0, skip=0, equal=0),
        "skip": TeacherConfig(beta=-1, discount=1, mistake=0, skip=0.1, equal=0),
        "equal": TeacherConfig(beta=-1, discount=1, mistake=0, skip=0, equal=0.1),
        "myopic": TeacherConfig(beta=-1, discount=0.9, mistake=0, skip=0, equal=0),
    }
    assert expected == TEACHERS


def test_the_oracle_by_hand():
    pairs = [([1.0, 2.0], [2.0, 2.0]), ([5.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [2.0, 1.0]), ([0.0, 0.0], [-1e-30, 0.0])]
    assert judge(make_teacher(TEACHERS["oracle"]), pairs) == [1.0, 0.0, 0.5, 0.0]
    # Low, negative and nearly equal returns make no difference to it, whatever it is told of episodes.
    told = make_teacher(TEACHERS["oracle"], returns=(1e6, 1e6))
    assert judge(told, pairs) == [1.0, 0.0, 0.5, 0.0]


def test_a_difference_below_float32_rounding_of_the_sum_still_counts():
    first = torch.full((1, 50), 1e4)
    second = first.clone()
    second[0, 0] += 2**-10
    assert make_teacher(TEACHERS["oracle"], length=50).label(segments(first), segments(second)).tolist() == [1.0]


def test_the_myopic_one_by_hand():
    """Weights γ², γ, 1 for γ = 1/2: 4 at the start is worth 1, 2 in the middle as well."""
    teacher = make_teacher(TeacherConfig(discount=0.5), length=3)
    pairs = [
        ([4.0, 0.0, 0.0], [0.0, 0.0, 1.5]),  # 1 against 1.5, though 4 against 1.5 undiscounted
        ([4.0, 0.0, 0.0], [0.0, 0.0, 0.5]),
        ([4.0, 0.0, 0.0], [0.0, 2.0, 0.0]),  # 1 against 1
    ]
    assert judge(teacher, pairs) == [1.0, 0.0, 0.5]
    blind = make_teacher(TeacherConfig(discount=0.0), length=3)
    assert judge(blind, [([9.0, 9.0, 0.0], [0.0, 0.0, 0.1])]) == [1.0]


def test_the_skipping_one_by_hand():
    """m = mean(10, 30)·2/20 = 2, so the threshold is 0.2·m = 0.4: one of the two must return more."""
    teacher = make_teacher(TeacherConfig(skip=0.2), returns=(10.0, 30.0))
    pairs = [
        ([0.125, 0.25], [0.0, 0.0]),
        ([0.25, 0.25], [0.0, 0.0]),
        ([0.0, 0.0], [0.25, 0.25]),
        ([0.5, 0.5], [0.0, 3.0]),
        ([-9.0, 0.0], [0.125, 0.125]),
    ]
    assert judge(teacher, pairs) == [None, 0.0, 1.0, 1.0, None]
    exactly = make_teacher(TeacherConfig(skip=0.25), returns=(20.0,))
    assert judge(exactly, [([0.25, 0.25], [0.0, 0.0])]) == [None]  # the threshold itself is not exceeded


def test_nothing_is_skipped_where_returns_are_negative():
    teacher = make_teacher(TeacherConfig(skip=0.2, equal=0.2), returns=(-10.0, -30.0))
    assert judge(teacher, [([-9.0, 0.0], [-8.0, 0.0]), ([0.0, 0.0], [-0.1, 0.0])]) == [1.0, 0.0]


def test_the_equal_one_by_hand():
    """The threshold is 0.25·mean(20)·2/20 = 0.5; a difference of just that is told."""
    teacher = make_teacher(TeacherConfig(equal=0.25), returns=(20.0,))
    pairs = [([1.0, 1.0], [1.0, 1.25]), ([1.0, 1.25], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.5]), ([1.0, 1.5], [1.0, 1.0])]
    assert judge(teacher, pairs) == [0.5, 0.5, 1.0, 0.0]


def test_equality_is_of_undiscounted_returns_and_preference_of_weighted_ones():
    teacher = make_teacher(TeacherConfig(discount=0.5, equal=0.25), returns=(20.0,))
    # Weighted .5·2 = 1 against 2, undiscounted 2 against 2; weighted a tie, undiscounted 4 against 2.
    assert judge(teacher, [([2.0, 0.0], [0.0, 2.0]), ([4.0, 0.0], [0.0, 2.0])]) == [0.5, 0.5]
    assert judge(teacher, [([4.0, 0.0], [0.0, 2.5])]) == [1.0]


def test_skipping_is_of_undiscounted_returns():
    teacher = make_teacher(TeacherConfig(discount=0.1, skip=0.5), returns=(20.0,))  # threshold 1
    assert judge(teacher, [([2.0, 0.0], [0.0, 0.5])]) == [1.0]


def test_a_skipped_pair_is_skipped_though_it_is_equal_and_an_equal_one_is_equal_whatever_the_mistake():
    teacher = make_teacher(TeacherConfig(mistake=1.0, skip=0.25, equal=0.25), returns=(20.0,))  # both thresholds 0.5
    pairs = [([0.25, 0.0], [0.0, 0.0]), ([3.0, 0.0], [3.0, 0.25]), ([3.0, 0.0], [1.0, 0.0]), ([0.0, 0.0], [1.0, 0.0])]
    assert judge(teacher, pairs) == [None, 0.5, 1.0, 0.0]


def test_thresholds_are_of_the_last_ten_episodes():
    """Eleven returns, of which the first would raise the mean beyond all bounds: m = 20·2/20 = 2."""
    teacher = make_teacher(TeacherConfig(equal=0.5), returns=(1e9, *[10.0, 30.0] * 5))
    assert judge(teacher, [([0.0, 0.0], [0.9, 0.0]), ([0.0, 0.0], [1.1, 0.0])]) == [0.5, 1.0]


def test_before_the_first_episode_there_are_no_thresholds():
    teacher = make_teacher(TeacherConfig(skip=0.5, equal=0.5))
    assert judge(teacher, [([0.0, 0.0], [0.1, 0.0])]) == [1.0]


def test_mistakes_are_made_where_the_drawn_uniforms_say():
    num = 1000
    teacher = make_teacher(TeacherConfig(mistake=0.3), length=1, seed=5)
    rewards = torch.randn(2, num, 1, generator=torch.Generator().manual_seed(1))
    labels = teacher.label(segments(rewards[0]), segments(rewards[1]))
    wrong = torch.rand(num, generator=torch.Generator().manual_seed(5), dtype=torch.float64) < 0.3
    right = rewards[1, :, 0] > rewards[0, :, 0]
    assert torch.equal(labels, (right ^ wrong).float())
    assert 200 < wrong.sum() < 400


def test_a_tie_stays_one_after_a_mistake():
    assert judge(make_teacher(TeacherConfig(mistake=1.0)), [([1.0, 0.0], [0.0, 1.0])]) == [0.5]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 5), st.floats(0, 1), st.floats(0, 0.5), st.integers(1, 6), st.integers(0, 2**31))
def test_the_noisy_one_answers_where_the_drawn_uniforms_say(beta, discount, mistake, length, seed):
    """P(second) = e^{βG₁}/(e^{βG₀} + e^{βG₁}) in plain NumPy; the uniforms of answers come before those of mistakes."""
    num = 50
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(2, num, length)).astype(np.float32)
    teacher = make_teacher(TeacherConfig(beta, discount, mistake), length=length, seed=seed)
    labels = teacher.label(segments(torch.from_numpy(rewards[0])), segments(torch.from_numpy(rewards[1])))
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(num, generator=generator, dtype=torch.float64).numpy()
    slips = torch.rand(num, generator=generator, dtype=torch.float64).numpy() < mistake
    for pair in range(num):
        returns = [
            sum(float(r) * discount ** (length - 1 - t) for t, r in enumerate(rewards[side, pair])) for side in (0, 1)
        ]
        probability = math.exp(beta * returns[1]) / (math.exp(beta * returns[0]) + math.exp(beta * returns[1]))
        if abs(uniforms[pair] - probability) > 1e-9:
            assert bool(labels[pair]) == (uniforms[pair] < probability) ^ slips[pair]


def test_the_noisy_one_is_as_often_right_as_its_formula_says():
    """20 000 answers to one pair, σ(1.5·0.8) = .7685: off by .0149 (five standard deviations) once in 1.7 million."""
    num, probability = 20_000, 1 / (1 + math.exp(-1.2))
    teacher = make_teacher(TeacherConfig(beta=1.5), length=1)
    labels = teacher.label(segments(torch.zeros(num, 1)), segments(torch.full((num, 1), 0.8)))
    assert abs(labels.mean().item() - probability) < 5 * math.sqrt(probability * (1 - probability) / num)
    assert set(labels.tolist()) == {0.0, 1.0}


def test_a_noisy_one_of_great_returns_is_a_rational_one():
    assert judge(make_teacher(TEACHERS["noisy"]), [([1e30, 0.0], [0.0, 0.0]), ([0.0, 0.0], [1e30, 0.0])]) == [0.0, 1.0]


def test_bpref_the_share_multiplies_again_from_the_second_session_on():
    """m = 20·2/20 = 2: thresholds .5·2 = 1 in the first session, .5²·2 = .5 later; ours stay 1."""
    pairs = [([0.0, 0.0], [0.75, 0.0]), ([3.0, 0.0], [3.75, 0.0]), ([0.0, 0.0], [0.4, 0.0]), ([3.0, 0.0], [3.4, 0.0])]
    config = TeacherConfig(skip=0.5, equal=0.5)
    theirs = make_teacher(config, returns=(20.0,) * 10, bpref_compat=True)
    later = [1.0, 1.0, None, 0.5]
    assert [judge(theirs, pairs) for _ in range(3)] == [[None, 0.5, None, 0.5], later, later]
    ours = make_teacher(config, returns=(20.0,) * 10)
    assert [judge(ours, pairs) for _ in range(3)] == [[None, 0.5, None, 0.5]] * 3


def test_bpref_a_tie_goes_to_the_first_segment():
    tie = [([1.0, 2.0], [2.0, 1.0])]
    assert judge(make_teacher(TEACHERS["oracle"], bpref_compat=True), tie) == [0.0]
    assert judge(make_teacher(TEACHERS["oracle"]), tie) == [0.5]


def test_bpref_the_mean_of_returns_begins_with_a_zero():
    """One episode of 40: m = 20·2/20 = 2 there, 4 here; ten episodes push the zero out."""
    pair = [([0.0, 0.0], [1.5, 0.0])]
    config = TeacherConfig(equal=0.5)
    assert judge(make_teacher(config, returns=(40.0,), bpref_compat=True), pair) == [1.0]
    assert judge(make_teacher(config, returns=(40.0,)), pair) == [0.5]
    assert judge(make_teacher(config, returns=(40.0,) * 10, bpref_compat=True), pair) == [0.5]


@pytest.mark.parametrize("bpref_compat", [False, True])
def test_a_restored_teacher_goes_on_as_the_saved_one(bpref_compat):
    config = TeacherConfig(beta=1.0, mistake=0.2, skip=0.6, equal=0.2)
    rewards = torch.rand(2, 200, 2, generator=torch.Generator().manual_seed(1))
    pairs = segments(rewards[0]), segments(rewards[1])
    one = make_teacher(config, returns=(10.0, 20.0, 30.0), bpref_compat=bpref_compat)
    one.label(*pairs)
    state = one.state_dict()
    other = make_teacher(config, seed=9, bpref_compat=bpref_compat)
    other.load_state_dict(state)
    for teacher in (one, other):
        teacher.episode_ended(25.0, 20)
    assert state["returns"] == [0.0] * bpref_compat + [10.0, 20.0, 30.0]
    for _ in range(2):
        mine, theirs = one.label(*pairs), other.label(*pairs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        assert mine.isnan().any() and (mine == 0.5).any() and (mine == 1).any()


def test_bad_rewards_are_refused():
    teacher = make_teacher(TEACHERS["oracle"], length=4)
    rewards = torch.zeros(3, 4)
    for first, second in ((rewards, rewards[:2]), (rewards[:, 1:], rewards[:, 1:]), (rewards[0], rewards[0])):
        with pytest.raises(ValueError, match=r"must both have shape \(M, 4\), got"):
            teacher.label(segments(first), segments(second))
    for value in (NAN, math.inf):
        bad = rewards.clone()
        bad[1, 1] = value
        with pytest.raises(NonFiniteError, match=r"second\.true_rewards must be finite"):
            teacher.label(segments(rewards), segments(bad))
        with pytest.raises(NonFiniteError, match=r"first\.true_rewards must be finite"):
            teacher.label(segments(bad), segments(rewards))
        with pytest.raises(NonFiniteError, match=f"true_return must be finite, got {value}"):
            teacher.episode_ended(value, 4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("beta", value) for value in (0.0, -0.5, math.inf, NAN)],
        *[(field, value) for field in ("discount", "mistake") for value in (-0.1, 1.1, NAN)],
        *[(field, value) for field in ("skip", "equal") for value in (-0.1, math.inf, NAN)],
    ],
)
def test_what_no_teacher_can_be_is_refused(field, value):
    with pytest.raises(ConfigError, match=rf"teacher\.{field} must .*got {value}"):
        make_teacher(TeacherConfig(**{field: value}))


def test_lengths_below_one_are_refused():
    for length, horizon in ((0, 1), (1, 0)):
        with pytest.raises(
            ValueError, match=f"segment_length and horizon must be at least 1, got {length} and {horizon}"
        ):
            make_teacher(TEACHERS["oracle"], length=length, horizon=horizon)
