"""Four-Rooms: the map by hand, derivatives by differences, and every compiled estimator against its definition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import parl_core as parl
from parl_core.envs.tabular import (
    FourRooms,
    TabularMDP,
    enumerate_trajectories,
    nudged_contrast,
    occupancy,
    policy_value,
    sobirl_shortcut,
    soft_value_iteration,
    value_penalty,
)
from parl_core.envs.tabular.problems.four_rooms import CELLS, GOALS, START, TARGET, four_rooms_mdp, state_of
from parl_core.envs.tabular.problems.four_rooms_ascent import (
    EXACT_ESTIMATORS,
    SAMPLED_ESTIMATORS,
    four_rooms_ascent,
    initial_weights,
)
from parl_core.errors import NonFiniteError, UnknownNameError

TEMPERATURE, COST = 0.005, 3.0
WEIGHTS = initial_weights(0, 1.0)
PROBLEMS = tuple(FourRooms(goal, TEMPERATURE, COST) for goal in (0, 1))
TINY = 1e-3  # a learning rate at which the follower hardly feels the step


def _probabilities(mdp, cell, action):
    row = mdp.transitions[state_of(cell), action]
    return {CELLS[k]: pytest.approx(row[k]) for k in np.flatnonzero(row)}


def test_the_map():
    assert len(CELLS) == 104 and len(set(CELLS)) == 104
    assert all(cell in CELLS for cell in (START, TARGET, *GOALS))
    up, right, down, left = range(4)
    mdp = four_rooms_mdp(0)
    slip = 0.44 / 3
    # the start stands at a wall to its left
    assert _probabilities(mdp, START, left) == {(4, 1): 0.56, (3, 1): slip, (5, 1): slip, (4, 2): slip}
    assert _probabilities(mdp, START, up) == {(4, 1): slip, (3, 1): 0.56, (5, 1): slip, (4, 2): slip}
    # a door: walls above and below
    assert _probabilities(mdp, (3, 6), right) == {(3, 6): pytest.approx(2 * slip), (3, 7): 0.56, (3, 5): slip}
    assert _probabilities(mdp, (3, 6), down) == {(3, 6): pytest.approx(0.56 + slip), (3, 7): slip, (3, 5): slip}
    for goal, cell in enumerate(GOALS):
        ends = four_rooms_mdp(goal).ends
        assert (ends[state_of(cell)] == 1.0).all() and ends.sum() == 4.0
    assert mdp.initial[state_of(START)] == 1.0 and mdp.discount == 0.99


def test_rewards_by_hand():
    weights = np.zeros(105)
    weights[-1] = np.log(2.0)  # softmax: 1/106 each, 2/106 unspent
    problem = FourRooms(1, TEMPERATURE, COST)
    lower, upper = problem.lower(weights).value, problem.upper(weights).value
    goal, target = state_of(GOALS[1]), state_of(TARGET)
    assert (lower[goal] == 1.0).all()
    np.testing.assert_allclose(np.delete(lower, goal, 0), -0.2 / 106)
    assert (upper[target] == 1.0).all()
    np.testing.assert_allclose(upper[goal], -COST * 0.2 * 104 / 106)
    assert np.count_nonzero(upper) == 8
    np.testing.assert_allclose(problem.incentives(weights), -0.2 / 106)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_derivatives_against_differences(problem):
    step = 1e-5
    hypergradient = problem.hypergradient(WEIGHTS)
    for k in (0, 17, state_of(TARGET), state_of(GOALS[0]), state_of(GOALS[1]), 104):
        moved = [WEIGHTS + sign * step * np.eye(105)[k] for sign in (1, -1)]
        for reward in (problem.lower, problem.upper):
            difference = (reward(moved[0]).value - reward(moved[1]).value) / (2 * step)
            np.testing.assert_allclose(reward(WEIGHTS).jacobian[:, :, k], difference, atol=1e-9)
        slope = (problem.objective(moved[0]) - problem.objective(moved[1])) / (2 * step)
        assert hypergradient.total[k] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_user_mistakes():
    with pytest.raises(ValueError, match="goal must be 0 or 1, got 2"):
        FourRooms(2, 0.001, 1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        FourRooms(0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"params must have shape \(105,\), got \(104,\)"):
        PROBLEMS[0].lower(np.zeros(104))
    with pytest.raises(UnknownNameError, match=r"exact estimator 'HPDG'"):
        four_rooms_ascent("HPDG", WEIGHTS, [0.005], 1.0, 0.5, 0)
    with pytest.raises(UnknownNameError, match=r"from episodes 'exact'"):
        four_rooms_ascent("exact", WEIGHTS, [0.005], 1.0, 0.5, 0, env_steps=1000)
    with pytest.raises(ValueError, match="0 or at least 200, 1 of the longest episodes, for HPGD, got 100"):
        four_rooms_ascent("HPGD", WEIGHTS, [0.005], 1.0, 0.5, 0, env_steps=100)
    with pytest.raises(ValueError, match="0 or at least 600, 3 of the longest episodes, for Fisher, got 599"):
        four_rooms_ascent("Fisher", WEIGHTS, [0.005], 1.0, 0.5, 0, env_steps=599)
    with pytest.raises(ValueError, match="positive numbers"):
        four_rooms_ascent("exact", WEIGHTS, [0.005, 0.0], 1.0, 0.5, 0)


def _steps(estimator, **options):
    """Gradients of single steps on each of the two goals, told apart by the objective the estimator saw."""
    found = {}
    for seed in range(20):
        result = four_rooms_ascent(estimator, WEIGHTS, [TEMPERATURE], COST, TINY, seed, num_points=1, **options)
        goal = np.argmin([abs(result.seen - p.objective(WEIGHTS)) for p in PROBLEMS])
        found[goal] = (result.weights - WEIGHTS) / TINY * max(1.0, result.norms[0])
        if len(found) == 2:
            break
    return found[0], found[1]


def _exact_reference(estimator, problem):
    if estimator == "exact":
        return problem.hypergradient(WEIGHTS).total
    if estimator == "SoBiRL":
        return problem.hypergradient(WEIGHTS, sobirl_shortcut).total
    if estimator == "DirectOnly":
        return problem.hypergradient(WEIGHTS).direct
    if estimator in ("NudgedContrast", "ValuePenalty"):
        form = nudged_contrast if estimator == "NudgedContrast" else value_penalty
        return problem.hypergradient(WEIGHTS, form, penalty=1 / (0.1 * TEMPERATURE)).total
    lower = problem.lower(WEIGHTS)
    solution = soft_value_iteration(problem.mdp, lower.value, TEMPERATURE)
    implicit = _curvature_reference(
        estimator, problem.mdp, solution, lower.jacobian, problem.upper(WEIGHTS).value, TEMPERATURE
    )
    return problem.hypergradient(WEIGHTS).direct + implicit


def _curvature_reference(estimator, mdp, solution, jacobian, upper, temperature):
    """−bᵀ H⁻¹ C over logits, H as the estimator has it, block by block, from the definitions."""
    policy = solution.policy
    visits = occupancy(mdp, policy).sum(1)
    q, value = policy_value(mdp, policy, upper)
    b = visits[:, None] * policy * (q - value[:, None])
    discounted = mdp.discount * np.einsum("sa,sat->st", policy, mdp.transitions)
    v_slope = np.linalg.solve(np.eye(len(policy)) - discounted, np.einsum("sa,sap->sp", policy, jacobian))
    advantage = jacobian + mdp.discount * mdp.transitions @ v_slope - v_slope[:, None]
    cross = (visits[:, None] * policy)[..., None] * advantage
    fisher = np.stack([d * (np.diag(p) - np.outer(p, p)) for d, p in zip(visits, policy, strict=True)])
    if estimator == "Identity":
        response = b
    elif estimator == "LogProbHessian":
        # ∇² log π = −F whatever the action, so each visit's is weighed by the entropy-regularised value that follows it
        curvature = (solution.value + temperature)[:, None, None] * fisher
        response = np.einsum("sab,sb->sa", np.linalg.pinv(curvature, rcond=1e-10, hermitian=True), b)
    else:
        response = np.zeros_like(b)
        for _ in range(50):
            response += 2 / (temperature * visits.max()) * (b - temperature * np.einsum("sab,sb->sa", fisher, response))
    return np.einsum("sa,sap->p", response, cross)


@pytest.mark.parametrize("estimator", [e for e in EXACT_ESTIMATORS if e not in ("AMD", "ZeroOrder")])
def test_exact_steps_are_the_definitions(estimator):
    for step, problem in zip(_steps(estimator), PROBLEMS, strict=True):
        expected = _exact_reference(estimator, problem)
        np.testing.assert_allclose(step, expected, atol=2e-6 * np.linalg.norm(expected))


def test_log_prob_curvature_is_the_engines():
    """The log-prob Hessian block by block against the engine's, by enumerating a deterministic MDP until γ^h vanishes."""
    rng = np.random.default_rng(0)
    transitions = np.zeros((2, 2, 2))
    transitions[[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]] = 1.0
    mdp, horizon, temperature = TabularMDP(transitions, np.array([0.6, 0.4]), 0.3), 13, 0.5
    rewards, upper = rng.normal(size=(2, 2, 2))
    solution = soft_value_iteration(mdp, rewards, temperature)
    data = enumerate_trajectories(mdp, solution.policy, horizon)

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.from_numpy(rewards.copy()))

        def forward(self, observations, actions):
            return self.table[observations.argmax(-1), actions.reshape(-1)]

    def per_trajectory(reward, trajectories):
        steps = torch.from_numpy(upper)[trajectories.observations.argmax(-1), trajectories.actions.reshape(-1)]
        return parl.ops.discounted_returns(steps, 0.3, trajectories.offsets)[trajectories.offsets[:-1]]

    policy = parl.policies.CategoricalPolicy(2, 2).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        weight = next(p for p in policy.parameters() if p.shape == (2, 2))
        weight.copy_(torch.from_numpy(np.log(solution.policy)).T)
    result = parl.hypergradient(
        policy,
        Table(),
        data,
        data,
        loss=parl.TrajectoryLoss(per_trajectory),
        discount=0.3,
        curvature=parl.LogProbHessian(temperature=temperature, damping=1e-9),
        solver=parl.Dense(),
    )
    jacobian = np.eye(4).reshape(2, 2, 4)
    expected = _curvature_reference("LogProbHessian", mdp, solution, jacobian, upper, temperature)
    np.testing.assert_allclose(result.implicit.numpy(), expected, atol=1e-5 * np.linalg.norm(expected))


def test_amd_sweeps_converge_to_the_exact_gradient():
    lengths = [np.linalg.norm(problem.hypergradient(WEIGHTS).total) for problem in PROBLEMS]
    result = four_rooms_ascent("AMD", WEIGHTS, np.full(3000, TEMPERATURE), COST, 0.0, 0, num_points=3000)
    nearest = [min(abs(norm / length - 1) for length in lengths) for norm in result.norms[-100:]]
    assert max(nearest) < 1e-6
    assert (result.weights == WEIGHTS).all()


def test_zero_order_steps_are_differences_along_normal_directions():
    for step, problem in zip(_steps("ZeroOrder"), PROBLEMS, strict=True):
        gradient = problem.hypergradient(WEIGHTS).total
        # the step is (g·z) z up to the curvature's O(radius), so its length and its share along g tell |z|²
        squared = (step @ step) / (step @ gradient)
        assert 50 < squared < 180  # χ² with 105 degrees of freedom: a false alarm below 1e-4 for each seed
        direction = step / np.sqrt((step @ step) / squared)
        slope = (problem.objective(WEIGHTS + 0.01 * direction) - problem.objective(WEIGHTS)) / 0.01
        np.testing.assert_allclose(abs(slope) * np.sqrt(squared), np.linalg.norm(step), rtol=0.02)


@pytest.mark.parametrize("estimator", [e for e in SAMPLED_ESTIMATORS if e != "ZeroOrder"])
def test_sampled_steps_are_near_the_exact_ones(estimator):
    """With two million environment steps: against what each estimates, the contrasts against their own exact forms.

    The bounds of the relative error are 1.2 to 3 times the largest of eight other seeds. SoBiRL's ∇r drops out here, where
    rewards are of the state alone.
    """
    weights, problem = initial_weights(0), FourRooms(1, TEMPERATURE, COST)  # its gradient is by far the larger there
    seed = next(
        seed
        for seed in range(20)
        if np.isclose(
            four_rooms_ascent("exact", weights, [TEMPERATURE], COST, TINY, seed).seen, problem.objective(weights)
        )
    )
    exact = problem.hypergradient(weights)
    if estimator in ("NudgedContrast", "ValuePenalty"):
        form = nudged_contrast if estimator == "NudgedContrast" else value_penalty
        expected = problem.hypergradient(weights, form, penalty=1 / TEMPERATURE).total
    else:
        expected = exact.direct if estimator in ("SoBiRL", "DirectOnly") else exact.total
    result = four_rooms_ascent(estimator, weights, [TEMPERATURE], COST, TINY, seed, env_steps=2_000_000, num_points=1)
    step = (result.weights - weights) / TINY * max(1.0, result.norms[0])
    most = {"CertaintyEquivalent": 0.05, "DirectOnly": 0.01, "SoBiRL": 0.1, "HPGD": 0.12, "BCHG": 0.12, "Fisher": 0.2}
    most |= {"NudgedContrast": 0.3, "ValuePenalty": 0.45}
    assert np.linalg.norm(step - expected) < most[estimator] * np.linalg.norm(expected)


def test_the_same_seed_gives_the_same_ascent_and_starts_are_not_changed():
    weights = initial_weights(0)
    runs = [
        four_rooms_ascent("HPGD", weights, np.full(50, 0.003), 1.0, 0.5, seed, env_steps=500, num_points=5)
        for seed in (0, 0, 1)
    ]
    assert (runs[0].weights == runs[1].weights).all() and (runs[0].values == runs[1].values).all()
    assert (runs[0].weights != runs[2].weights).any()
    assert (weights == initial_weights(0)).all()


def test_steps_are_clipped():
    """A cost at which the gradient is longer than 1: the step is as long as the learning rate, and along the gradient."""
    result = four_rooms_ascent("exact", WEIGHTS, [TEMPERATURE], 1000.0, 0.3, 0, num_points=1)
    step = result.weights - WEIGHTS
    assert result.norms[0] > 1.0
    assert np.linalg.norm(step) == pytest.approx(0.3, rel=1e-9)
    totals = [FourRooms(goal, TEMPERATURE, 1000.0).hypergradient(WEIGHTS).total for goal in (0, 1)]
    (drawn,) = (total for total in totals if np.isclose(np.linalg.norm(total), result.norms[0], rtol=1e-6))
    np.testing.assert_allclose(step, 0.3 * drawn / np.linalg.norm(drawn), atol=1e-6)


def test_values_are_recorded_and_averaged():
    temperatures = np.full(200, TEMPERATURE)
    result = four_rooms_ascent(
        "CertaintyEquivalent", WEIGHTS, temperatures, COST, 0.5, 0, env_steps=500, num_points=200
    )
    assert result.values[0] == pytest.approx(np.mean([p.objective(WEIGHTS) for p in PROBLEMS]), rel=1e-9)
    assert result.value == pytest.approx(result.values[-20:].mean(), rel=1e-12)


def test_an_ascent_that_went_wrong_is_no_result(monkeypatch):
    for settings in ({"cost": np.nan, "learning_rate": 0.5}, {"cost": 1.0, "learning_rate": np.inf}):
        with pytest.raises(NonFiniteError, match=r"weights must stay finite.*lower the learning rate"):
            four_rooms_ascent("exact", WEIGHTS, [TEMPERATURE] * 2, seed=0, **settings)

    from parl_core.envs.tabular.kernels import four_rooms as kernels

    residuals = []
    ascend = kernels.ascend

    def unconverged(*arguments):
        value, seen, residual = ascend(*arguments)
        residuals.append(residual)
        return value, seen, 2e-9

    monkeypatch.setattr(kernels, "ascend", unconverged)
    with pytest.raises(
        ValueError, match=r"follower's optimum be found, got a residual of 2\.0e-09.*of 0\.005: raise it"
    ):
        four_rooms_ascent("exact", WEIGHTS, [TEMPERATURE] * 2, COST, 0.5, 0)
    assert 0.0 <= residuals[0] <= 1e-11  # what Newton's method is asked for


def test_the_worst_residual_of_a_run_is_kept(monkeypatch):
    """The response as plain Python, with a solver that leaves given residuals at values of at most 4 and ½."""
    from parl_core.envs.tabular.kernels import four_rooms as kernels

    work = SimpleNamespace(residual=np.zeros(1), policy=None, factors=None)
    scene = SimpleNamespace(discount=0.9, starts=None, successors=None, probabilities=None)
    kept = []
    for residual, value in ((2e-3, [-4.0, 1.0]), (1e-3, [0.5, 0.5]), (1e-5, [0.5, 0.5])):
        monkeypatch.setattr(kernels, "soft_optimum", lambda *_, left=residual: (1000, left))
        kernels.respond.py_func(scene, work, None, 1.0, np.array(value))
        kept.append(float(work.residual[0]))
    assert kept == [5e-4, 1e-3, 1e-3]


@pytest.mark.parametrize(("temperature", "cost", "published"), [(0.001, 3.0, 0.51), (0.003, 5.0, 0.32)])
def test_published_values_of_the_exact_gradient(temperature, cost, published):
    """Cells in which AMD's standard error is .000."""
    result = four_rooms_ascent("exact", initial_weights(0), np.full(10_000, temperature), cost, 0.5, 0)
    assert abs(result.value - published) < 0.006
