"""What A-PARL adds to the reward gradient, step by step."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

import parl_core as parl
from parl_core.models.policies import GaussianPolicy
from parl_core.models.rewards import RewardEnsemble
from parl_core.rl.rollout import EpisodeStore
from parl_core.training.config import ImplicitConfig
from parl_core.training.implicit_term import ImplicitTerm, agreement, on_policy_queries

# Random data are from no policy's optimum.
pytestmark = pytest.mark.filterwarnings("ignore::parl_core.hypergrad.HypergradientWarning")

DAMPING_RATIO = 100.0  # enough for the sampled full Hessian to be definite
TEMPERATURE = 0.1


def setting():
    torch.manual_seed(0)
    policy, reward = GaussianPolicy(3, 2, (4,), squash=True), RewardEnsemble(3, 2, (5,), members=2)

    with torch.no_grad():
        policy.network[-1].bias[2:] = 0.45  # standard deviations about 1

    def windows(number: int) -> parl.Trajectories:
        observations = torch.randn(number * 5, 3)
        with torch.no_grad():
            actions, _ = policy.sample(observations)
        return parl.Trajectories(observations, actions, torch.arange(0, number * 5 + 1, 5))

    return (
        policy,
        reward,
        windows(6),
        parl.PreferencePairs(windows(4), windows(4), torch.tensor([0.0, 1, 1, 0])),
    )


CURVATURES = {
    "fisher": (parl.Fisher(TEMPERATURE, damping=DAMPING_RATIO * TEMPERATURE), parl.CG(rtol=1e-5)),
    "score": (
        parl.ScoreHessian("mean", TEMPERATURE, damping=DAMPING_RATIO * TEMPERATURE),
        parl.MINRES(rtol=1e-5, max_iterations=200),
    ),
    "identity": (parl.Identity(), parl.CG(rtol=1e-5)),
}


def expected_implicit(policy, reward, lower, upper, curvature="fisher", loss=None) -> torch.Tensor:
    """By the public call, for each member on its own: there are two."""
    chosen, solver = CURVATURES[curvature]
    loss = loss or parl.PreferenceLoss()
    result = parl.hypergradient(policy, reward, lower, upper, loss=loss, discount=0.9, curvature=chosen, solver=solver)
    return 2 * result.implicit


def expected_agreement(policy, reward, lower, upper, curvature="fisher") -> float:
    """g₁·g₂ / |ĝ|² between −1 and 1, of the first and the last half of windows and pairs."""
    windows, pairs = torch.arange(lower.num_trajectories), torch.arange(upper.num_pairs)
    halves = [
        expected_implicit(policy, reward, lower.select(w), upper.select(p), curvature)
        for w, p in ((windows[:3], pairs[:2]), (windows[3:], pairs[2:]))
    ]
    whole = expected_implicit(policy, reward, lower, upper, curvature)
    return min(max(float(halves[0] @ halves[1] / whole.square().sum()), -1.0), 1.0)


def hook_of(*, known: float | None = 1.0, **changes):
    """A term of two members on the setting's data; `known` stands in for the weight of what is known."""
    data = setting()
    options = dict(damping_ratio=DAMPING_RATIO, rtol=1e-5, max_iterations=200, max_ratio=1e9)
    term = ImplicitTerm(ImplicitConfig(**{**options, **changes}), discount=0.9)
    if known is not None:
        term._agreement = lambda *_: known
    return term, term.gradient_hook(*data, TEMPERATURE), data


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_term_is_the_public_hypergradients(curvature):
    term, hook, data = hook_of(share=0.5, curvature=curvature)
    gradient = torch.randn(sum(p.numel() for p in data[1].parameters()))
    expected = 0.5 * expected_implicit(*data, curvature)
    torch.testing.assert_close(hook(gradient) - gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.norm()))
    report = term.report()
    assert report is not None
    assert report.solver_residual <= 2e-5  # rtol, or the rounding of float32
    assert report.solver_iterations >= 1
    assert report.unconverged_solves == 0
    assert report.implicit_to_direct == pytest.approx(2 * float(expected.norm() / gradient.norm()), rel=1e-3)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_weight_is_what_two_halves_of_the_data_agree_on(curvature):
    term, hook, data = hook_of(known=None, curvature=curvature)
    weight = max(0.0, expected_agreement(*data, curvature))
    gradient = torch.randn(sum(p.numel() for p in data[1].parameters()))
    whole = expected_implicit(*data, curvature)
    added = hook(gradient) - gradient
    torch.testing.assert_close(added, weight * whole, rtol=1e-2, atol=2e-3 * float(whole.norm()))
    report = term.report()
    assert report is not None
    assert report.signal == pytest.approx(weight, abs=2e-3)


def test_the_weight_is_a_running_mean_that_outlives_the_session():
    term, hook, data = hook_of(refresh_interval=1)
    gradient, weights = torch.ones(sum(p.numel() for p in data[1].parameters())), []
    for found in (0.5, -1.0, 0.0):
        term._agreement = lambda *_, found=found: found
        hook(gradient)
        weights.append(term._refreshes[-1].signal)
    assert weights == pytest.approx([0.5, 0.2, 0.16])
    later = ImplicitTerm(term.config, discount=0.9)
    later.load_state_dict(term.state_dict())
    later._agreement = lambda *_: -1.0
    later.gradient_hook(*data, TEMPERATURE)(gradient)
    report = later.report()
    assert report is not None
    assert report.signal == 0.0  # .8 · .16 − .2 is below


def test_the_weight_of_a_known_signal_in_known_noise():
    """Means of n vectors, signal plus white noise: the weight is near s²/(s² + noise), the mean of many near exactly."""
    generator = torch.Generator().manual_seed(0)
    signal, number = torch.full((2000,), 0.1), 16  # |signal|² = 20; noise of the mean 2000 / 16 = 125
    found = []
    for _ in range(200):
        draws = signal + torch.randn(number, 2000, generator=generator)
        halves = draws[: number // 2].mean(0), draws[number // 2 :].mean(0)
        found.append(agreement(draws.mean(0), *halves))
    # Each has a standard deviation of about 2·125/√2000/145 = .04, their mean .003: a false alarm in 10⁻¹⁵ runs.
    assert sum(found) / len(found) == pytest.approx(20 / 145, abs=0.025)


def test_where_it_scatters_the_mean_weight_is_too_small_by_less_than_a_tenth():
    """Products of a matrix's and a vector's means over two halves: E[g₁·g₂] / E|ĝ|² is what the weight should be."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(20, 20, generator=generator), torch.randn(20, generator=generator)
    products, lengths, found = [], [], []
    for _ in range(3000):
        matrices = matrix + torch.randn(2, 20, 20, generator=generator)
        vectors = vector + torch.randn(2, 20, generator=generator)
        first, second = matrices[0] @ vectors[0], matrices[1] @ vectors[1]
        estimate = matrices.mean(0) @ vectors.mean(0)
        products.append(float(first @ second))
        lengths.append(float(estimate.square().sum()))
        found.append(agreement(estimate, first, second))
    spread = statistics.stdev(found)
    assert 0.3 < spread < 0.45
    # About .08. The mean's standard error is .4/√3000 = .008 and that of the ratio of means is like it: .04 is 3.5 of both.
    assert 0.04 < sum(products) / sum(lengths) - statistics.fmean(found) < 0.12


def test_the_agreement_lies_between_its_bounds():
    ones = torch.ones(3)
    assert agreement(ones, ones, -2 * ones) == -1
    assert agreement(ones, 3 * ones, ones) == 1
    assert agreement(ones, 0.5 * ones, 0.5 * ones) == pytest.approx(0.25)
    assert agreement(ones, ones, torch.zeros(3)) == 0


def test_without_two_of_everything_nothing_is_known():
    term, _, (policy, reward, lower, upper) = hook_of(known=None)
    for fewer in ((lower.select(torch.tensor([0])), upper), (lower, upper.select(torch.tensor([0])))):
        hook = term.gradient_hook(policy, reward, *fewer, TEMPERATURE)
        gradient = torch.randn(sum(p.numel() for p in reward.parameters()))
        assert torch.equal(hook(gradient), gradient)


def test_no_curvature_leaves_the_gradient_as_it_is():
    term, hook, _ = hook_of(curvature="none")
    assert hook is None
    assert term.report() is None


def test_the_win_rate_is_the_estimator_written_by_hand():
    """b = Σ (U − mean of the others) S / M over the fresh segments, U = −label; then F w = b and Cᵀw, all dense."""
    _, hook, (policy, reward, lower, upper) = hook_of(utility="win-rate")
    fresh = upper.second
    scores = parl.linearize(policy, fresh).scores()  # (M, P)
    per_segment = scores
    gains = -upper.labels
    others = (gains.sum() - gains) / 3
    b = ((gains - others)[:, None] * per_segment).mean(0)
    linear = parl.linearize(policy, lower)
    steps = 0.9 ** lower.time.float() * lower.step_weights * TEMPERATURE
    eye = torch.eye(linear.num_params)
    fisher = torch.stack([linear.fisher_vp(steps, column) for column in eye])
    w = torch.linalg.solve(fisher + DAMPING_RATIO * TEMPERATURE * eye, b)
    along = linear.jvp(w).view(6, 5).cumsum(1)
    along = along - (along.sum(0) - along) / 5
    factors = (along * 0.9 ** torch.arange(5.0) / 6).reshape(-1)
    total = (reward(lower.observations, lower.actions) * factors).sum()
    expected = 2 * torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, list(reward.parameters()))])
    gradient = torch.randn(len(expected))
    torch.testing.assert_close(hook(gradient) - gradient, expected, rtol=1e-2, atol=1e-3 * float(expected.norm()))


def test_solves_that_do_not_converge_are_counted():
    term, hook, data = hook_of(max_iterations=1, rtol=1e-6, refresh_interval=1)
    for _ in range(3):
        hook(torch.ones(sum(p.numel() for p in data[1].parameters())))
    report = term.report()
    assert report is not None
    assert report.unconverged_solves >= 1
    assert report.solver_residual > 1e-6


def test_a_long_term_is_shortened_to_the_ratio():
    _, hook, data = hook_of(max_ratio=0.25)
    gradient = torch.randn(sum(p.numel() for p in data[1].parameters())) * 1e-3
    added = hook(gradient) - gradient
    assert float(added.norm() / gradient.norm()) == pytest.approx(0.25, rel=1e-3)
    assert float(torch.cosine_similarity(added, expected_implicit(*data), dim=0)) > 0.999


def test_it_is_refreshed_on_schedule_and_warm_started():
    term, hook, data = hook_of(refresh_interval=3)
    gradient = torch.zeros(sum(p.numel() for p in data[1].parameters())) + 1.0
    first = hook(gradient)
    with torch.no_grad():
        for parameter in data[1].parameters():
            parameter.mul_(1.5)
    assert torch.equal(hook(gradient), first)
    assert torch.equal(hook(gradient), first)
    assert not torch.equal(hook(gradient), first)
    same = ImplicitTerm(term.config, discount=0.9)
    same.load_state_dict(term.state_dict())
    same.gradient_hook(*data, TEMPERATURE)(gradient)
    report = same.report()
    assert report is not None
    assert report.solver_iterations <= 1  # the solution is already there


def test_a_session_without_steps_reports_nothing():
    assert ImplicitTerm(ImplicitConfig(), discount=0.9).report() is None


def store_of(*lengths: int) -> EpisodeStore:
    """Episodes whose steps carry their number, from 0 on, as the observation."""
    store, step = EpisodeStore(10, 1, 1), 0
    for length in lengths:
        for _ in range(length):
            store.add(np.array([step], np.float32), np.zeros(1, np.float32), 0.5 * step)
            step += 1
        store.end_episode()
    return store


def starts(segments) -> list[int]:
    """First steps, after a look that each segment is a run of steps with their true rewards."""
    runs = segments.observations[..., 0]
    assert torch.equal(runs, runs[:, :1] + torch.arange(runs.shape[1]))
    assert torch.equal(segments.true_rewards, 0.5 * runs)
    return runs[:, 0].int().tolist()


def test_latest_segments_are_cut_from_the_end_of_each_episode():
    assert starts(store_of(10, 3, 11).latest_segments(2, 4)) == [2, 6, 16, 20]
    assert starts(store_of(10, 3, 11).latest_segments(1, 4)) == [16, 20]


@pytest.mark.parametrize("num", [1, 2, 7, 40])
def test_the_two_halves_of_the_on_policy_pairs_share_no_step(num):
    store = store_of(20, 20, 20)  # with 4 steps a segment, those of the last two episodes begin at 20, 24, … 56
    queries = on_policy_queries(store, num, 4, 2, torch.Generator().manual_seed(0), win_rate=False)
    first, second = starts(queries.first), starts(queries.second)
    assert len(first) == len(second) == num
    cut = (num + 1) // 2
    halves = [{*first[:cut], *second[:cut]}, {*first[cut:], *second[cut:]}]
    assert halves[0].isdisjoint(halves[1])
    assert halves[0] | halves[1] <= set(range(20, 60, 4))
    used = [(first + second).count(start) for start in halves[0] | halves[1]]
    if num == 40:
        assert used == [8] * 10


def test_pairs_for_the_win_rate_hold_an_older_and_a_fresh_segment():
    store = store_of(20, 20, 20)
    queries = on_policy_queries(store, 10, 4, 1, torch.Generator().manual_seed(0), win_rate=True)
    assert all(start < 40 for start in starts(queries.first))
    fresh = starts(queries.second)
    assert sorted(set(fresh)) == [40, 44, 48, 52, 56]
    assert set(fresh[:5]).isdisjoint(fresh[5:])


def test_one_fresh_segment_is_enough_to_ask_about():
    queries = on_policy_queries(store_of(20, 5), 3, 4, 1, torch.Generator().manual_seed(0), win_rate=False)
    assert starts(queries.first) == starts(queries.second) == [21] * 3
