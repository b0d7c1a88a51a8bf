"""`parl bench`: the kernels against their peers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import import_extra


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    tyro = import_extra("tyro", "train", needed_for="parl bench")
    rich_console = import_extra("rich.console", "train", needed_for="parl bench")

    @dataclass
    class Bench:
        """Race parl-core against its peers, each answer checked before it is timed; needs a checkout.

        Without filters everything is run, and benchmarks/results is written anew.
        """

        filters: tuple[str, ...]
        """Run what has all of these in its name, for example: hvp h256."""
        output: Path | None = None
        """The folder that results are written to, a JSON file for each topic."""
        seconds: float | None = None
        """Length of each contest; 8 unless given."""
        list: bool = False
        """Name the benchmarks, and run none."""
        compare: tuple[Path, Path] | None = None
        """Two files or folders of results, the older first: compare them, and run nothing."""
        table: bool = False
        """Write README's table from benchmarks/results, and run nothing."""

    given = tyro.cli(Bench, args=arguments, prog="parl bench", config=(tyro.conf.PositionalRequiredArgs,))
    console = rich_console.Console(highlight=False, soft_wrap=True)
    if given.compare is not None:
        from ..bench.compare import comparison
        from ..bench.results import read_results

        for part in comparison(*map(read_results, given.compare)):
            console.print(part, markup=False)
        return 0
    from ..bench.run import benchmark_names, checkout, run_benchmarks

    if given.list:
        print("\n".join(benchmark_names()))
        return 0
    if given.table:
        from ..bench.page import write_table

        print(write_table(checkout()))
        return 0
    return run_benchmarks(given.filters, given.output, given.seconds)
