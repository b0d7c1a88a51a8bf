"""The command line: `parl <command>`, with the commands of `parl_core.commands`.

A user's mistake is one sentence on stderr and a non-zero status.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence

from . import __version__
from .errors import Interrupted, ParlError, unknown_name

COMMANDS = {
    "train": "train a policy and its reward, or go on with a run (--resume)",
    "compare": "train several algorithms with several seeds on several tasks, and tabulate what they reach",
    "plot": "draw the curves of several runs into one picture",
    "ablate": "a-parl with every curvature of the implicit term: return, alignment, time",
    "reproduce": "compute published results again, and write the page that shows them",
    "bench": "race the kernels against their peers, or compare two results (--compare)",
    "doctor": "what is installed here, and which backend each op can use",
}

USER_ERROR, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sign that the terminal's encoding lacks is no reason to fail
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else USER_ERROR
    if arguments == ["--version"]:
        print(f"parl-core {__version__}")
        return 0
    try:
        return _run(arguments[0], arguments[1:])
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


def _run(command: str, arguments: list[str]) -> int:
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    status: int = importlib.import_module(f".commands.{command}", __package__).run(arguments)
    return status


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: parl <command> [options]\n\ncommands:\n{lines}\n\n`parl <command> --help` lists a command's options."
    )
