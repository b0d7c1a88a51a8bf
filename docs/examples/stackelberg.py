"""A customs office sets how likely it opens a parcel; a smuggler answers with what pays him best.

What he does depends on the inspections, so the office's gradient has two parts: what inspecting pays at his present
behaviour, and what it pays to change that behaviour. Only with the second one does it pay to commit to inspections.

Replace the payoffs with your own; `StackelbergGame` takes several states, with transitions by the follower's action.
"""

import numpy as np

from parl_core.envs.tabular import grid_search, matrix_game, simultaneous_play

# rows: open the parcel, let it pass; columns: smuggle, or not
SMUGGLER = [[-2.0, 0.0], [1.0, 0.0]]
CUSTOMS = [[-0.7, -0.2], [-1.0, 0.0]]


def main(steps: int = 1000, learning_rate: float = 1.0) -> dict[str, float]:
    game = matrix_game(SMUGGLER, CUSTOMS, temperature=0.2)
    best = grid_search(game.objectives, game.low, game.high)
    found = {"search": best.value, "no commitment": simultaneous_play(game).value}
    for name in ("total", "direct"):
        params = np.zeros(game.num_params)
        for _ in range(steps):
            params += learning_rate * getattr(game.hypergradient(params), name)
        found[name] = game.objective(params)
        print(f"ascent with the {name} gradient   earns {found[name]:.4f}, opens {game.choice(params)[0]:.1%}")
    print(
        f"best by search: {best.value:.4f}, opens {best.point[0]:.1%}; without commitment: {found['no commitment']:.4f}"
    )
    return found


if __name__ == "__main__":
    main()
