"""`parl reproduce`: published results computed again, and the page that shows them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from ..errors import ConfigError, import_extra, unknown_name

USAGE = """usage: parl reproduce <study> [options]
       parl reproduce page [folders] [--output FILE]

studies:
{studies}

The first computes a study's published numbers again and prints them side by side; it can be interrupted, and the same
command goes on. The second writes docs/results.md from result folders. `--help` after either lists its options."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    from ..reproduce.registry import study_class, study_names, summaries

    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(studies=summaries()))
        return 0 if arguments else 1
    name, *options = arguments
    if name == "page":
        return _page(options)
    if name.startswith("-"):
        raise ConfigError(f"the study comes first: parl reproduce <study> [options], got {name}")
    if name not in study_names():
        raise unknown_name("study", name, (*study_names(), "page"))
    tyro = import_extra("tyro", "train", needed_for="parl reproduce")
    rich_console = import_extra("rich.console", "train", needed_for="parl reproduce")

    from ..workers import one_thread

    with one_thread():  # around the import of the study, and of NumPy with it
        study = study_class(name)

        from ..provenance import available_cores
        from ..reproduce.folder import DEFAULT_OUTPUT
        from ..reproduce.runner import reproduce

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
    from ..reproduce.page import default_folders, write_page

    folders = given.folders
    if not folders:
        root, folders = default_folders()
        print(f"Result folders: all under {root}")
    print(write_page(folders, given.output))
    return 0
