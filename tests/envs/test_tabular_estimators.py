"""Every exact estimator against finite differences of the upper objective over a lower level solved anew."""

import functools
import itertools
import sys

import numpy as np
import pytest
import scipy.stats

from parl_core.envs import tabular
from parl_core.envs.tabular import (
    TabularMDP,
    amd,
    amd_iteration,
    bc_hg,
    exact_hypergradient,
    fisher_implicit,
    hpgd,
    nudged_contrast,
    occupancy,
    policy_value,
    sobirl_shortcut,
    soft_value_iteration,
    value_penalty,
    zero_order,
)
from parl_core.errors import MissingExtraError, NonFiniteError
from tests.envs.tabular_problems import central_difference, make_problem, resolved_objective

TEMPERATURE = 0.3
EXACT = [exact_hypergradient, fisher_implicit, hpgd, bc_hg, amd]
APPROXIMATE = [
    sobirl_shortcut,
    functools.partial(nudged_contrast, penalty=100.0),
    functools.partial(value_penalty, penalty=100.0),
    functools.partial(zero_order, radius=0.01, directions=3, seed=0),
]


@functools.lru_cache
def _problem(seed=0, dynamics="dense", discount=0.9):
    """The positional arguments of an estimator, ∇r_U, and df/dν by finite differences."""
    mdp, reward, upper_reward, params = make_problem(seed=seed, dynamics=dynamics, discount=discount)
    objective = resolved_objective(mdp, reward, upper_reward, TEMPERATURE)
    upper, upper_jacobian = upper_reward(params)
    return (mdp, *reward(params), upper), upper_jacobian, central_difference(objective, params), objective(params)


def _relative(value, reference):
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: e.__name__)
@pytest.mark.parametrize("dynamics", ["dense", "sparse", "deterministic"])
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 0.99])
def test_matches_finite_differences(estimator, dynamics, discount):
    for seed in range(4):
        args, upper_jacobian, numeric, objective = _problem(seed, dynamics, discount)
        exact = estimator(*args, temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian)
        assert _relative(exact.total, numeric) <= 1e-7
        assert exact.objective == pytest.approx(objective, rel=1e-9)
        assert np.linalg.norm(exact.implicit) > 1e-3 and np.linalg.norm(exact.direct) > 1e-3


@pytest.mark.parametrize("estimator", EXACT[1:], ids=lambda e: e.__name__)
@pytest.mark.parametrize("dynamics", ["dense", "sparse", "deterministic"])
def test_terms_agree_with_the_adjoint_form_one_by_one(estimator, dynamics):
    for seed in range(4):
        args, upper_jacobian, _, _ = _problem(seed, dynamics)
        reference = exact_hypergradient(*args, temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian)
        exact = estimator(*args, temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian)
        assert _relative(exact.implicit, reference.implicit) < 1e-9
        assert _relative(exact.direct, reference.direct) < 1e-9


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: e.__name__)
def test_an_upper_reward_that_does_not_depend_on_the_parameters(estimator):
    mdp, reward, upper_reward, params = make_problem()
    fixed = upper_reward(params)[0]
    numeric = central_difference(resolved_objective(mdp, reward, lambda _: (fixed, None), TEMPERATURE), params)
    exact = estimator(mdp, *reward(params), fixed, temperature=TEMPERATURE)
    assert _relative(exact.total, numeric) <= 1e-7
    assert not exact.direct.any()


@pytest.mark.parametrize("estimator", [*EXACT, *APPROXIMATE], ids=lambda e: getattr(e, "func", e).__name__)
def test_nothing_changes_with_a_shift_of_the_rewards(estimator):
    (mdp, rewards, jacobian, upper), _, _, _ = _problem()
    plain = estimator(mdp, rewards, jacobian, upper, temperature=TEMPERATURE)
    shifted = estimator(mdp, rewards - 5.0, jacobian, upper - 5.0, temperature=TEMPERATURE)
    np.testing.assert_allclose(shifted.total, plain.total, rtol=1e-6)


@pytest.mark.parametrize("estimator", EXACT, ids=lambda e: e.__name__)
def test_an_almost_greedy_policy(estimator):
    """τ = .02: some actions have probabilities far below machine precision, and Fisher blocks eigenvalues of 1e-18."""
    mdp, reward, upper_reward, params = make_problem(seed=3)
    assert soft_value_iteration(mdp, reward(params)[0], 0.02).policy.min() < 1e-25
    numeric = central_difference(resolved_objective(mdp, reward, upper_reward, 0.02), params, step=1e-6)
    upper, upper_jacobian = upper_reward(params)
    exact = estimator(mdp, *reward(params), upper, temperature=0.02, upper_reward_jacobian=upper_jacobian)
    assert _relative(exact.total, numeric) <= 1e-6


def test_fisher_implicit_is_the_implicit_function_theorem():
    """bᵀ(−H)⁻¹C over all logits at once, F_d and the gradients summed over (s, a) from per-step scores e_a − π(s)."""
    (mdp, rewards, jacobian, upper), _, _, _ = _problem()
    policy = soft_value_iteration(mdp, rewards, TEMPERATURE).policy
    visits = occupancy(mdp, policy)
    scores = np.zeros((*policy.shape, *policy.shape))  # [s, a] is ∇ log π(a|s), (S, A)
    for s, a in np.ndindex(policy.shape):
        scores[s, a, s] = np.eye(mdp.num_actions)[a] - policy[s]
    scores = scores.reshape(policy.size, policy.size)
    fisher = scores.T @ (visits.reshape(-1, 1) * scores)

    def policy_gradient(of):
        return scores.T @ (visits * policy_value(mdp, policy, of).q).ravel()

    cross = np.stack([policy_gradient(jacobian[..., p]) for p in range(jacobian.shape[2])], axis=1)
    implicit = policy_gradient(upper) @ np.linalg.pinv(TEMPERATURE * fisher, rcond=1e-10) @ cross
    exact = fisher_implicit(mdp, rewards, jacobian, upper, temperature=TEMPERATURE)
    np.testing.assert_allclose(exact.implicit, implicit, rtol=1e-8)


def test_the_shortcut_is_right_without_a_future_and_wrong_with_one():
    for seed in range(4):
        args, _, _, _ = _problem(seed, "deterministic", 0.0)
        reference = exact_hypergradient(*args, temperature=TEMPERATURE).implicit
        assert _relative(sobirl_shortcut(*args, temperature=TEMPERATURE).implicit, reference) < 1e-12
    errors, cosines = [], []
    for seed in range(20):
        args, _, _, _ = _problem(seed, "deterministic", 0.9)
        reference = exact_hypergradient(*args, temperature=TEMPERATURE).implicit
        shortcut = sobirl_shortcut(*args, temperature=TEMPERATURE).implicit
        errors.append(_relative(shortcut, reference))
        cosines.append(shortcut @ reference / np.linalg.norm(shortcut) / np.linalg.norm(reference))
    assert 0.6 < np.median(errors) < 1.1
    assert 0.4 < np.median(cosines) < 0.95


@pytest.mark.parametrize(("estimator", "order"), [(nudged_contrast, 2), (value_penalty, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_contrasts_converge_at_their_order(estimator, order, seed):
    args, upper_jacobian, _, _ = _problem(seed)
    kwargs = dict(temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian, tolerance=1e-14)
    reference = exact_hypergradient(*args, **kwargs)
    penalties = np.array([300.0, 1e3, 3e3, 1e4])
    estimates = [estimator(*args, penalty=penalty, **kwargs) for penalty in penalties]
    for name in ("direct", "implicit", "total"):
        errors = [_relative(getattr(e, name), getattr(reference, name)) for e in estimates]
        slope = np.polyfit(np.log(penalties), np.log(errors), 1)[0]
        assert slope == pytest.approx(-order, abs=0.1), name
    assert _relative(estimates[-1].total, reference.total) < {1: 5e-3, 2: 1e-6}[order]
    assert all(e.objective == reference.objective for e in estimates)


@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_contrasts_are_gradients_of_their_own_objectives(penalty):
    """Also far from f, where λ is small."""
    mdp, reward, upper_reward, params = make_problem()

    def value(at, weight):
        rewards = reward(at)[0] + weight * upper_reward(at)[0]
        return mdp.initial @ soft_value_iteration(mdp, rewards, TEMPERATURE, tolerance=1e-14).value

    own = {
        value_penalty: lambda at: penalty * (value(at, 1 / penalty) - value(at, 0.0)),
        nudged_contrast: lambda at: penalty / 2 * (value(at, 1 / penalty) - value(at, -1 / penalty)),
    }
    upper, upper_jacobian = upper_reward(params)
    for estimator, objective in own.items():
        estimate = estimator(
            mdp,
            *reward(params),
            upper,
            temperature=TEMPERATURE,
            penalty=penalty,
            upper_reward_jacobian=upper_jacobian,
        )
        assert _relative(estimate.total, central_difference(objective, params)) < 1e-7


def _zero_order_draws(radius, count, directions=10):
    args, _, _, _ = _problem()
    return np.array(
        [
            zero_order(*args, temperature=TEMPERATURE, radius=radius, directions=directions, seed=seed).implicit
            for seed in range(count)
        ]
    )


def _lowest_p_value(draws, mean):
    return scipy.stats.ttest_1samp(draws, mean).pvalue.min() * draws.shape[1]  # Bonferroni


def test_zero_order_is_unbiased_at_a_small_radius():
    """t-tests of 400 independent means: false-alarm rate 1e-6. The same test sees the bias of a wide radius."""
    args, _, _, _ = _problem()
    reference = exact_hypergradient(*args, temperature=TEMPERATURE).implicit
    draws = _zero_order_draws(1e-3, 400)
    assert _lowest_p_value(draws, reference) > 1e-6
    assert np.linalg.norm(draws.std(axis=0) / 20) < 0.1 * np.linalg.norm(reference)  # sharp enough to mean something
    assert _lowest_p_value(_zero_order_draws(1.0, 400), reference) < 1e-6


def test_zero_order_averages_its_directions_and_repeats_itself():
    args, _, _, _ = _problem()
    reference = exact_hypergradient(*args, temperature=TEMPERATURE).implicit
    spread = {n: np.linalg.norm(_zero_order_draws(1e-3, 100, n).std(axis=0)) for n in (1, 16)}
    assert spread[1] / spread[16] == pytest.approx(4.0, rel=0.3)
    first, again = (zero_order(*args, temperature=TEMPERATURE, radius=0.1, directions=2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.implicit, again.implicit)
    # One direction at a tiny radius is the directional derivative along it, by hand.
    direction = np.random.default_rng(7).normal(size=4)
    one = zero_order(*args, temperature=TEMPERATURE, radius=1e-6, directions=1, seed=7, tolerance=1e-14)
    np.testing.assert_allclose(one.implicit, (reference @ direction) * direction, rtol=1e-4)


def test_amd_contracts_and_is_not_converged_before_it_is():
    args, upper_jacobian, _, _ = _problem(discount=0.7)
    mdp = args[0]
    kwargs = dict(temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian)
    reference = exact_hypergradient(*args, **kwargs)
    errors = []
    for sweeps in (10, 20, 30, 40):
        state = amd_iteration(*args, **kwargs, max_iterations=sweeps)
        assert state.iterations == sweeps and not state.converged
        errors.append(_relative(state.hypergradient(mdp).total, reference.total))
    # O(k γ^k): the derivatives wait for the values
    assert all(later < 0.7**10 * 4 * earlier for earlier, later in itertools.pairwise(errors))
    with pytest.raises(ValueError, match=r"amd must converge, got a residual of .* after 5 iterations"):
        amd(*args, **kwargs, max_iterations=5)


@pytest.mark.parametrize("wrong", ["value", "value_jacobian", "upper_value", "upper_direct", "upper_implicit"])
def test_amd_goes_on_while_any_of_its_parts_moves(wrong):
    args, upper_jacobian, _, _ = _problem()
    sweep = functools.partial(
        amd_iteration, *args, temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian, tolerance=1e-10
    )
    start = sweep()._replace(**{wrong: getattr(sweep(), wrong) + 0.5})
    once = sweep(start=start, max_iterations=1)
    changes = [
        np.abs(new - old).max() / max(1.0, np.abs(new).max()) for new, old in zip(once[:5], start[:5], strict=True)
    ]
    assert once.residual == pytest.approx(max(changes), rel=1e-12) and not once.converged
    assert sweep(start=start).iterations > 50


def test_amd_warm_start():
    mdp, reward, upper_reward, params = make_problem()

    def arguments(at):
        upper, upper_jacobian = upper_reward(at)
        return (mdp, *reward(at), upper), dict(temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian)

    args, kwargs = arguments(params)
    cold = amd_iteration(*args, **kwargs)
    assert cold.converged
    assert amd_iteration(*args, **kwargs, start=cold).iterations == 1
    in_steps = amd_iteration(*args, **kwargs, max_iterations=20)
    before = [field.copy() for field in in_steps[:5]]
    in_steps_again = amd_iteration(*args, **kwargs, start=in_steps, max_iterations=30)
    at_once = amd_iteration(*args, **kwargs, max_iterations=50)
    for split, whole in zip(in_steps_again[:5], at_once[:5], strict=True):
        np.testing.assert_array_equal(split, whole)
    for field, copy in zip(in_steps[:5], before, strict=True):
        np.testing.assert_array_equal(field, copy)  # a start is not written over

    nearby_args, nearby_kwargs = arguments(params + 1e-3)
    warm = amd_iteration(*nearby_args, **nearby_kwargs, start=cold, max_iterations=20).hypergradient(mdp)
    from_zero = amd_iteration(*nearby_args, **nearby_kwargs, max_iterations=20).hypergradient(mdp)
    reference = exact_hypergradient(*nearby_args, **nearby_kwargs).total
    assert _relative(warm.total, reference) < 1e-2 * _relative(from_zero.total, reference)
    # A start with a direct part does not leak into a problem without one.
    without = amd_iteration(*args, temperature=TEMPERATURE, start=cold, max_iterations=1)
    assert not without.upper_direct.any()


@pytest.mark.parametrize("estimator", [*EXACT, *APPROXIMATE], ids=lambda e: getattr(e, "func", e).__name__)
def test_bad_arguments_are_refused(estimator):
    (mdp, rewards, jacobian, upper), upper_jacobian, _, _ = _problem()
    estimate = functools.partial(estimator, temperature=TEMPERATURE)
    with pytest.raises(ValueError, match=r"reward_jacobian must have shape \(S, A, P\), got \(5, 3\)"):
        estimate(mdp, rewards, rewards, upper)
    with pytest.raises(ValueError, match=r"upper_rewards must have shape \(5, 3\), got \(3, 5\)"):
        estimate(mdp, rewards, jacobian, upper.T)
    with pytest.raises(NonFiniteError, match="rewards must be finite, got nan"):
        estimate(mdp, np.nan * rewards, jacobian, upper)
    with pytest.raises(ValueError, match=r"upper_reward_jacobian must have shape \(5, 3, 4\) as reward_jacobian has"):
        estimate(mdp, rewards, jacobian, upper, upper_reward_jacobian=upper_jacobian[..., :2])
    with pytest.raises(ValueError, match="temperature must be positive"):
        estimator(mdp, rewards, jacobian, upper, temperature=0.0)
    with pytest.raises(ValueError, match="converge"):
        estimate(mdp, rewards, jacobian, upper, max_iterations=5)


def test_bad_settings_are_refused():
    args, upper_jacobian, _, _ = _problem()
    for value in (0.0, -1.0, float("inf"), float("nan")):
        for estimator in (nudged_contrast, value_penalty):
            with pytest.raises(ValueError, match="penalty must be positive and finite"):
                estimator(*args, temperature=TEMPERATURE, penalty=value)
        with pytest.raises(ValueError, match="radius must be positive and finite"):
            zero_order(*args, temperature=TEMPERATURE, radius=value, directions=1, seed=0)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        zero_order(*args, temperature=TEMPERATURE, radius=0.1, directions=0, seed=0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        amd_iteration(*args, temperature=TEMPERATURE, max_iterations=0)
    start = amd_iteration(*args, temperature=TEMPERATURE, upper_reward_jacobian=upper_jacobian, max_iterations=1)
    with pytest.raises(ValueError, match=r"start.value_jacobian must have shape \(5, 4\), got \(5, 2\)"):
        amd_iteration(*args, temperature=TEMPERATURE, start=start._replace(value_jacobian=start.value_jacobian[:, :2]))


def test_a_missing_numba_names_the_extra(monkeypatch):
    args, _, _, _ = _problem()
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtraError, match=r"parl-core\[numba\]"):
        amd(*args, temperature=TEMPERATURE)


def test_unreachable_states_do_not_matter():
    """State 2 is never visited: its rewards move nothing, and a pseudo-inverse does not stumble over its zero block."""
    transitions = np.zeros((3, 2, 3))
    transitions[:, 0, 0] = transitions[:, 1, 1] = 1.0
    mdp = TabularMDP(transitions, np.array([0.5, 0.5, 0.0]), 0.9)
    rng = np.random.default_rng(0)
    rewards, upper = rng.normal(size=(2, 3, 2))
    jacobian = np.eye(6).reshape(3, 2, 6)
    reference = exact_hypergradient(mdp, rewards, jacobian, upper, temperature=TEMPERATURE).implicit
    for estimator in EXACT:
        implicit = estimator(mdp, rewards, jacobian, upper, temperature=TEMPERATURE).implicit
        np.testing.assert_allclose(implicit, reference, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(implicit[4:], 0.0, atol=1e-13)


def test_the_front_door_names_what_exists():
    assert sorted(tabular.__all__) == tabular.__all__
    assert all(hasattr(tabular, name) for name in tabular.__all__)
