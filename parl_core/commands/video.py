"""`parl video`: a film of a run's policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import import_extra


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl video")
    rich_console = import_extra("rich.console", "train", needed_for="parl video")

    @dataclass
    class Video:
        """Film the policy of a run's last checkpoint, with the true and the learned reward traced under the picture.

        Needs no screen: MUJOCO_GL=egl or osmesa chooses how it is drawn, and unless it is set, what is found is taken.
        """

        run: Path
        """The run folder."""
        output: Path | None = None
        """The mp4 file; video.mp4 in the run folder unless given."""
        episodes: int = 1
        """Episodes, one after the other."""
        seed: int = 0
        """Of the environment."""
        every: int = 2
        """Environment steps between two frames."""
        camera: str | None = None
        """A view that the environment has a name for; its usual one unless given."""

    given = tyro.cli(Video, args=arguments, prog="parl video", config=(tyro.conf.PositionalRequiredArgs,))
    from ..training.video import make_video

    film = make_video(
        given.run,
        given.output or given.run / "video.mp4",
        episodes=given.episodes,
        seed=given.seed,
        every=given.every,
        camera=given.camera,
        console=rich_console.Console(),
    )
    print(film)
    return 0
