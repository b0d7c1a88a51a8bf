"""The command line: `parl train | plot | reproduce | bench | doctor`.

A user's mistake is one sentence on stderr and a non-zero status.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from . import __version__
from .errors import ConfigError, Interrupted, ParlError, import_extra, unknown_name

USAGE = """usage: parl <command> [options]

commands:
  train      train a policy and its reward, or go on with a run (--resume)
  plot       draw the curves of several runs into one picture
  reproduce  compute published results again, and write the page that shows them
  bench      race the kernels against their peers, or compare two results (--compare)
  doctor     what is installed here, and which backend each op can use

`parl <command> --help` lists a command's options."""

REPRODUCE_USAGE = """usage: parl reproduce <study> [options]
       parl reproduce page [folders] [--output FILE]

studies:
{studies}

The first computes a study's published numbers again and prints them side by side; it can be interrupted, and the same
command goes on. The second writes docs/results.md from result folders. `--help` after either lists its options."""

USER_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sign that the terminal's encoding lacks is no reason to fail
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else USER_ERROR
    if arguments == ["--version"]:
        print(f"parl-core {__version__}")
        return 0
    try:
        return _command(arguments[0])(arguments[1:])
    except ParlError as error:
        print(f"parl: {error}", file=sys.stderr)
        return USER_ERROR
    except Interrupted as stop:
        print(f"parl: {stop}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("parl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return USER_ERROR


def _command(name: str) -> Callable[[list[str]], int]:
    commands = {"train": _train, "plot": _plot, "reproduce": _reproduce, "bench": _bench, "doctor": _doctor}
    if name not in commands:
        raise unknown_name("command", name, commands)
    return commands[name]


def _train(arguments: list[str]) -> int:
    tyro = import_extra("tyro", "train", needed_for="parl train")
    rich_console = import_extra("rich.console", "train", needed_for="parl train")

    @dataclass
    class Train:
        """Train a policy, and the reward it is trained on.

        Every number of the preset can be set as well, for example --sac.batch-size 256, --reward.label-budget 500,
        --implicit.damping-ratio 10, --eval-interval 5000; config.json in a run folder lists them all.
        """

        env: str | None = None
        """dm_control/<domain>-<task>, metaworld/<task> or tabular/<task>; dm_control/walker-walk unless given."""
        algorithm: str | None = None
        """oracle, pebble or a-parl; a-parl unless given."""
        preset: str | None = None
        """cpu or paper; cpu unless given."""
        seed: int | None = None
        """Of everything random; 0 unless given."""
        steps: int | None = None
        """Environment steps; the preset's unless given."""
        run_dir: Path | None = None
        """A new folder for the run; one is made under runs/ unless given."""
        resume: Path | None = None
        """Go on with the run in this folder; of the other options only --steps may come along."""

    given, others = tyro.cli(Train, args=arguments, prog="parl train", return_unknown_args=True)

    from .training.config import TrainConfig
    from .training.presets import preset
    from .training.run_folder import free_run_path
    from .training.train import resume, train

    console = rich_console.Console()
    if given.resume is not None:
        _only_steps_with_resume(vars(given), others)
        resume(given.resume, given.steps, console)
        return 0
    config = preset(
        given.env or TrainConfig.env,
        given.algorithm or TrainConfig.algorithm,
        given.preset or TrainConfig.preset,
    )
    chosen = {name: getattr(given, name) for name in ("seed", "steps") if getattr(given, name) is not None}
    config = replace(config, **chosen)
    if others:
        config = tyro.cli(TrainConfig, args=others, default=config, prog="parl train")
    train(config, given.run_dir or free_run_path(Path("runs"), config), console)
    return 0


def _only_steps_with_resume(given: dict[str, object], others: list[str]) -> None:
    extra = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    extra = [name for name in extra if name not in ("--resume", "--steps")] + others
    if extra:
        raise ConfigError(f"--resume takes the run's own settings; only --steps may come along, got {', '.join(extra)}")


def _plot(arguments: list[str]) -> int:
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
    from .training.plots import draw_runs

    print(draw_runs(given.runs, given.output))
    return 0


def _reproduce(arguments: list[str]) -> int:
    from .reproduce.registry import study_class, study_names, summaries

    if not arguments or arguments[0] in ("-h", "--help"):
        print(REPRODUCE_USAGE.format(studies=summaries()))
        return 0 if arguments else USER_ERROR
    name, *options = arguments
    if name == "page":
        return _page(options)
    if name.startswith("-"):
        raise ConfigError(f"the study comes first: parl reproduce <study> [options], got {name}")
    if name not in study_names():
        raise unknown_name("study", name, (*study_names(), "page"))
    tyro = import_extra("tyro", "train", needed_for="parl reproduce")
    rich_console = import_extra("rich.console", "train", needed_for="parl reproduce")

    from .reproduce.workers import one_thread

    with one_thread():  # around the import of the study, and of NumPy with it
        study = study_class(name)

        from .reproduce.environment import available_cores
        from .reproduce.folder import DEFAULT_OUTPUT
        from .reproduce.runner import reproduce

        output, jobs = DEFAULT_OUTPUT / name, available_cores()
        jobs_help = "Processes; all cores unless given; a container's CPU quota is not seen."
        fields: list[tuple[str, Any, Any]] = [
            ("settings", Annotated[study, tyro.conf.arg(name="")], field(default_factory=study)),
            (
                "output",
                Annotated[Path, tyro.conf.arg(help="The result folder; one that is begun is gone on with.")],
                output,
            ),
            ("jobs", Annotated[int, tyro.conf.arg(help=jobs_help)], jobs),
        ]
        options_class = make_dataclass("Reproduce", fields)
        given = tyro.cli(options_class, args=options, prog=f"parl reproduce {name}", description=study.__doc__)
        if given.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1, got {given.jobs}")
        reproduce(
            given.settings,
            given.output,
            jobs=given.jobs,
            command=shlex.join(["parl", "reproduce", *arguments]),
            console=rich_console.Console(),
        )
    return 0


def _page(arguments: list[str]) -> int:
    tyro = import_extra("tyro", "train", needed_for="parl reproduce page")

    @dataclass
    class Page:
        """Write the page that shows the results of `parl reproduce`, from its folders alone."""

        folders: tuple[Path, ...]
        """Result folders; unless given all under docs/results, or under runs/reproduce if there are none."""
        output: Path = Path("docs", "results.md")
        """The page."""

    given = tyro.cli(Page, args=arguments, prog="parl reproduce page", config=(tyro.conf.PositionalRequiredArgs,))
    from .reproduce.page import default_folders, write_page

    folders = given.folders
    if not folders:
        root, folders = default_folders()
        print(f"Result folders: all under {root}")
    print(write_page(folders, given.output))
    return 0


def _bench(arguments: list[str]) -> int:
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
        from .bench.compare import comparison
        from .bench.results import read_results

        for part in comparison(*map(read_results, given.compare)):
            console.print(part, markup=False)
        return 0
    from .bench.run import benchmark_names, checkout, run_benchmarks

    if given.list:
        print("\n".join(benchmark_names()))
        return 0
    if given.table:
        from .bench.page import write_table

        print(write_table(checkout()))
        return 0
    return run_benchmarks(given.filters, given.output, given.seconds)


def _doctor(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: parl doctor\n\nWhat is installed here, and which backend each op can use.")
        return 0
    if arguments:
        raise ConfigError(f"parl doctor takes no options, got {' '.join(arguments)}")
    from .doctor import report

    print(report())
    return 0
