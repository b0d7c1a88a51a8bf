"""`parl doctor`: what is installed here, and which backend each op can use."""

from __future__ import annotations

from ..errors import ConfigError


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: parl doctor\n\nWhat is installed here, and which backend each op can use.")
        return 0
    if arguments:
        raise ConfigError(f"parl doctor takes no options, got {' '.join(arguments)}")
    from ..doctor import report

    print(report())
    return 0
