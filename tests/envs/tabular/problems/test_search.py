"""Searches against functions whose maxima are known."""

import numpy as np
import pytest

from parl_core.envs.tabular import audit_game, grid_search, pattern_search


class Counted:
    """A function of points (N, D) that counts what it is asked."""

    def __init__(self, function):
        self.function, self.evaluations = function, 0

    def __call__(self, points):
        assert points.ndim == 2
        self.evaluations += len(points)
        return self.function(points)


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_a_grid_finds_the_top_of_a_slanted_quadratic(dimension):
    low, high = np.full(dimension, -2.0), np.full(dimension, 3.0)
    top = np.array([0.137, 1.91, -0.733])[:dimension]
    slant = np.eye(dimension) + 0.8 / dimension  # axes of the level sets are not those of the grid

    function = Counted(lambda points: 7.0 - np.einsum("nd,de,ne->n", points - top, slant, points - top))
    best = grid_search(function, low, high, points=11, tolerance=1e-6)
    assert best.point == pytest.approx(top, abs=1e-5)
    assert best.value == pytest.approx(7.0, abs=1e-9) and best.value <= 7.0
    assert best.evaluations == function.evaluations and best.resolution <= 1e-6
    assert best.value == function(best.point[None])[0]


def test_finer_grids_follow_a_ridge():
    """A ridge ten times longer than wide, askew: the best point of a grid may be two cells from the top."""
    for seed in range(20):
        top = np.random.default_rng(seed).uniform(-0.9, 0.9, size=2)

        def function(points, top=top):
            along, across = ((points - top) @ np.array([[1.0, 2.0], [2.0, -1.0]])).T
            return -(along**2) - 100.0 * across**2

        best = grid_search(function, [-1.0, -1.0], [1.0, 1.0], points=11)
        assert best.point == pytest.approx(top, abs=1e-4)


def test_a_grid_finds_maxima_on_faces_and_corners():
    best = grid_search(lambda p: p[:, 0] - (p[:, 1] - 0.3) ** 2, [0.0, 0.0], [1.0, 1.0], points=5)
    assert best.point == pytest.approx([1.0, 0.3], abs=1e-5) and best.point[0] == 1.0
    best = grid_search(lambda p: p.sum(axis=1), [0.0, -1.0], [2.0, 5.0], points=5)
    np.testing.assert_array_equal(best.point, [2.0, 5.0])


def test_several_peaks_are_refined_since_the_best_on_the_grid_may_not_be_the_best():
    """A broad peak of 1 on a grid point, and a narrow one of 1.5 between two, where the grid sees .9."""

    def function(points):
        x = points[:, 0]
        return np.maximum(1.0 - 10.0 * (x - 0.25) ** 2, 1.5 - 0.6 * np.abs(x - 0.875) / 0.125)

    assert grid_search(function, [0.0], [1.0], points=5, kept=1).value == pytest.approx(1.0)
    best = grid_search(function, [0.0], [1.0], points=5, kept=2)
    assert best.value == pytest.approx(1.5, abs=1e-5) and best.point == pytest.approx([0.875], abs=1e-5)


def test_neighbours_on_the_diagonal_count_as_neighbours():
    """A ridge along the diagonal is one peak: kept=2 leaves room for the second peak, which is the higher one."""

    def function(points):
        x, y = points.T
        ridge = 1.0 + 0.1 * x - 4.0 * np.abs(x - y)
        return np.maximum(ridge, 2.0 - 16.0 * np.hypot(x - 0.95, y - 0.05))

    best = grid_search(function, [0.0, 0.0], [1.0, 1.0], points=5, kept=2)
    assert best.value == pytest.approx(2.0, abs=1e-4)


def test_a_pattern_search_finds_a_curved_ridge_and_a_corner():
    def valley(points):  # Rosenbrock's, in pairs
        x, y = points[:, ::2], points[:, 1::2]
        return -(10.0 * (y - x**2) ** 2 + (1.0 - x) ** 2).sum(axis=1)

    function = Counted(valley)
    best = pattern_search(function, np.full(4, -2.0), np.full(4, 2.0), starts=3, tolerance=1e-6)
    assert best.point == pytest.approx(np.ones(4), abs=1e-3) and best.value > -1e-6
    assert best.evaluations == function.evaluations
    best = pattern_search(lambda p: p.sum(axis=1), np.zeros(5), np.arange(1.0, 6.0), starts=1)
    np.testing.assert_array_equal(best.point, np.arange(1.0, 6.0))


def test_starts_find_the_highest_of_several_peaks():
    """Tops at the corners of a cube; the one at (1, 1, 1, 1) is the highest. One coordinate at a time cannot change over."""

    def function(points):
        near = np.abs(points - np.round(points)).sum(axis=1)
        return (np.round(points).prod(axis=1)) - 3.0 * near

    assert pattern_search(function, np.zeros(4), np.ones(4), block=1, starts=80, points=3, seed=1).value == 1.0
    found = {
        pattern_search(function, np.zeros(4), np.ones(4), block=1, starts=1, points=3, seed=s).value for s in range(8)
    }
    assert found <= {0.0, 1.0} and 0.0 in found


def test_both_searches_agree_where_both_apply():
    game = audit_game(temperature=0.2)
    by_grid = grid_search(game.objectives, game.low, game.high)
    by_pattern = pattern_search(game.objectives, game.low, game.high, starts=5)
    assert by_pattern.value == pytest.approx(by_grid.value, abs=1e-8)
    assert by_pattern.point == pytest.approx(by_grid.point, abs=1e-3)


def test_the_reach_is_halved_down_to_the_tolerance():
    """Where nothing improves: the start, and five points at reaches of a half, a quarter, an eighth and a sixteenth."""
    best = pattern_search(lambda points: np.zeros(len(points)), [0.0], [2.0], starts=1, tolerance=0.1)
    assert best.evaluations == 1 + 4 * 5 and best.resolution == 1 / 32


def test_the_same_seed_finds_the_same():
    game = audit_game()
    first, second = (pattern_search(game.objectives, game.low, game.high, starts=2, seed=3) for _ in range(2))
    assert first.value == second.value and first.evaluations == second.evaluations
    np.testing.assert_array_equal(first.point, second.point)


def test_arguments_out_of_range_are_refused():
    def flat(points):
        return np.zeros(len(points))

    with pytest.raises(ValueError, match="low must have at most 3 entries for an exhaustive grid, got 4"):
        grid_search(flat, np.zeros(4), np.ones(4))
    with pytest.raises(ValueError, match="points must be at least 3 and make a grid of at most 1000000, got 1001"):
        grid_search(flat, np.zeros(3), np.ones(3), points=1001)
    with pytest.raises(ValueError, match="kept must be at least 1, got 0"):
        grid_search(flat, [0.0], [1.0], kept=0)
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1, got 0"):
        grid_search(flat, [0.0], [1.0], tolerance=0.0)
    with pytest.raises(ValueError, match=r"low must be below high and both finite, got \[1.0\] and \[1.0\]"):
        grid_search(flat, [1.0], [1.0])
    with pytest.raises(ValueError, match=r"low and high must have one shape \(D,\), got \(2,\) and \(1,\)"):
        pattern_search(flat, [0.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="points must be odd and at least 3, got 4"):
        pattern_search(flat, [0.0], [1.0], points=4)
    for name in ("starts", "block"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            pattern_search(flat, [0.0], [1.0], **{name: 0})
