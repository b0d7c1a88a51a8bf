"""Games of commitment: rewards by hand, derivatives by differences, optima by linear programs and closed forms."""

import numpy as np
import pytest
from scipy.optimize import linprog

from parl_core.envs.tabular import (
    StackelbergGame,
    audit_game,
    grid_search,
    matrix_game,
    random_game,
    simultaneous_play,
    strong_stackelberg,
)
from parl_core.errors import NonFiniteError
from tests.envs.tabular_problems import central_difference

FOLLOWER, LEADER = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 4.0], [1.0, 3.0]])


def test_rewards_are_payoffs_under_the_mixed_strategy():
    game = random_game(num_states=2, num_leader_actions=3, num_follower_actions=4)
    logits = np.log([0.2, 0.3, 0.5, 0.6, 0.3, 0.1]) + 5.0
    np.testing.assert_allclose(game.strategy(logits), [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    for reward, payoffs in ((game.lower(logits), game.follower_payoffs), (game.upper(logits), game.leader_payoffs)):
        by_hand = 0.2 * payoffs[0, 0] + 0.3 * payoffs[0, 1] + 0.5 * payoffs[0, 2]
        np.testing.assert_allclose(reward.value[0], by_hand)


def test_derivatives_are_those_of_differences():
    game = random_game(temperature=0.3)
    params = np.random.default_rng(0).normal(size=game.num_params)
    for reward in (game.lower, game.upper):
        jacobian = reward(params).jacobian
        for state, reply in np.ndindex(jacobian.shape[:2]):
            expected = central_difference(lambda x, at=(state, reply), of=reward: of(x).value[at], params)
            np.testing.assert_allclose(jacobian[state, reply], expected, atol=1e-9)
    for problem in (game, audit_game(temperature=0.3), matrix_game(temperature=0.3)):
        x = params[: problem.num_params]
        result = problem.hypergradient(x)
        np.testing.assert_allclose(result.total, central_difference(problem.objective, x, 1e-4), atol=1e-6)
        assert result.objective == pytest.approx(problem.objective(x), abs=1e-12)


def test_choices_are_conditional_probabilities():
    game = random_game(num_states=2, num_leader_actions=3)
    logits = np.log([0.2, 0.3, 0.5, 0.6, 0.3, 0.1])
    choice = game.choice(logits)
    np.testing.assert_allclose(choice, [0.2, 0.3 / 0.8, 0.6, 0.3 / 0.4])
    np.testing.assert_allclose(game.strategies(choice[None])[0], [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    extreme = game.choice(np.array([800.0, 0.0, -800.0, -800.0, 0.0, 800.0]))
    np.testing.assert_allclose(extreme, [1.0, 1.0, 0.0, 0.0], atol=1e-15)
    corners = game.strategies(np.array([[1.0, 0.7, 0.0, 0.0]]))[0]  # the first has it all, then the last
    np.testing.assert_array_equal(corners, [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def test_the_textbook_game():
    """3.5 at ½–½ with commitment; at τ the follower is a logit, so that the leader earns 1 + p + 2σ((1 − 2p)/τ)."""
    value, strategy = strong_stackelberg(FOLLOWER, LEADER)
    assert value == pytest.approx(3.5) and strategy == pytest.approx([0.5, 0.5])
    first = np.linspace(0.0, 1.0, 11)
    optima = []
    for temperature in (0.1, 0.01, 0.001):
        game = matrix_game(temperature=temperature)
        logits = (1.0 - 2.0 * first) / temperature
        np.testing.assert_allclose(
            game.objectives(first[:, None]), 1.0 + first + np.exp(-np.logaddexp(0.0, -logits)) * 2.0, rtol=1e-12
        )
        # stationary where σ'(z) = τ/4, of the two such z = ± the one at which p < ½
        share = 0.5 + 0.5 * np.sqrt(1.0 - temperature)
        z = np.log(share / (1.0 - share))
        best = grid_search(game.objectives, game.low, game.high, points=2001)
        assert best.point == pytest.approx([0.5 - 0.5 * temperature * z], abs=1e-4)
        assert best.value == pytest.approx(1.5 - 0.5 * temperature * z + 2.0 * share, abs=1e-7)
        optima.append(best.value)
    assert optima[0] < optima[1] < optima[2] < 3.5 and optima[2] > 3.49


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (3, 3), (4, 3), (1, 3)])
def test_strong_stackelberg_is_the_best_of_the_linear_programs(shape):
    """One program for each reply: her payoff over the strategies to which it is a best response."""
    for seed in range(10):
        follower, leader = np.random.default_rng(seed).normal(size=(2, *shape))
        best = -np.inf
        for reply in range(shape[1]):
            program = linprog(
                -leader[:, reply],
                A_ub=(follower - follower[:, [reply]]).T,
                b_ub=np.zeros(shape[1]),
                A_eq=np.ones((1, shape[0])),
                b_eq=[1.0],
            )
            best = max(best, -program.fun) if program.status == 0 else best
        value, strategy = strong_stackelberg(follower, leader)
        assert value == pytest.approx(best, abs=1e-9)
        assert strategy.sum() == pytest.approx(1.0) and strategy.min() >= 0.0
        replies = strategy @ follower
        ties = replies >= replies.max() - 1e-9
        assert (strategy @ leader)[ties].max() == pytest.approx(value, abs=1e-8)


def test_without_commitment():
    """The first row dominates in the matrix game; in the audit game an audit pays for itself where 60% cheat, −.6 a step."""
    play = simultaneous_play(matrix_game())
    assert play.value == pytest.approx(2.0, abs=1e-3) and play.gap < 1e-3
    assert play.strategy == pytest.approx(np.array([[1.0, 0.0]]), abs=1e-3)
    game = audit_game()
    play = simultaneous_play(game)
    assert play.value == pytest.approx(-6.0, abs=0.01) and play.gap < 2e-3
    assert game.response(np.log(play.strategy).reshape(-1))[:, 1] == pytest.approx([0.6, 0.6], abs=0.02)


def test_the_gap_is_what_a_deviation_gains():
    """After one round no equilibrium is near; the best answer to the same follower is found among all pure ones."""
    game = random_game(num_states=2)
    play = simultaneous_play(game, rounds=1)
    response = game.response(np.log(play.strategy).reshape(-1))

    def earned(strategy):
        upper = np.einsum("sa,sab->sb", strategy, game.leader_payoffs)
        moves = np.einsum("sb,sbt->st", response, game.mdp.transitions)
        values = np.linalg.solve(np.eye(2) - game.mdp.discount * moves, (response * upper).sum(1))
        return game.mdp.initial @ values

    pure = np.eye(3)
    best = max(earned(pure[[first, second]]) for first in range(3) for second in range(3))
    assert play.value == pytest.approx(earned(play.strategy))
    assert play.gap == pytest.approx(best - earned(play.strategy)) and play.gap > 0.1


def test_commitment_never_hurts():
    for game in (matrix_game(), audit_game(), random_game(num_states=1)):
        best = grid_search(game.objectives, game.low, game.high)
        assert best.value > simultaneous_play(game, rounds=500).value - 1e-9


def test_watched_firms_are_audited_more():
    game = audit_game()
    best = grid_search(game.objectives, game.low, game.high)
    assert best.point[1] > best.point[0] + 0.05
    cheats = game.response(np.log(game.strategies(best.point[None])[0]).reshape(-1))[:, 1]
    assert (cheats < 0.2).all() and best.value > -3.0


def test_games_that_are_none_are_refused():
    mdp = matrix_game().mdp
    with pytest.raises(
        ValueError, match=r"follower_payoffs must have shape \(1, A, 2\), A at least 2, got \(1, 2, 3\)"
    ):
        StackelbergGame(mdp, np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), 0.1)
    with pytest.raises(ValueError, match=r"leader_payoffs must have shape \(1, 3, 2\), got \(1, 2, 2\)"):
        StackelbergGame(mdp, np.zeros((1, 3, 2)), np.zeros((1, 2, 2)), 0.1)
    with pytest.raises(NonFiniteError, match="leader_payoffs must be finite, got inf"):
        matrix_game(leader_payoffs=[[0.0, np.inf], [0.0, 0.0]])
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        matrix_game(temperature=0.0)
    with pytest.raises(ValueError, match=r"params must have shape \(2,\), got \(3,\)"):
        matrix_game().objective(np.zeros(3))
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        simultaneous_play(matrix_game(), rounds=0)
    with pytest.raises(ValueError, match=r"must have one shape \(A, B\), got \(2, 2\) and \(2, 3\)"):
        strong_stackelberg(np.zeros((2, 2)), np.zeros((2, 3)))
