"""`parl plot`: the curves of several runs in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, import_extra


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl plot")

    @dataclass
    class Plot:
        """Draw the true return of several runs, a panel per environment, a colour per algorithm."""

        runs: tuple[Path, ...]
        """Run folders."""
        output: Path = Path("curves.png")
        """The picture."""

    given = tyro.cli(Plot, args=arguments, prog="parl plot", config=(tyro.conf.PositionalRequiredArgs,))
    if not given.runs:
        raise ConfigError("parl plot needs at least one run folder")
    from ..comparison.curves import draw_runs

    print(draw_runs(given.runs, given.output))
    return 0
