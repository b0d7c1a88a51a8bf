"""Errors a user can act on: each message is one sentence that names what came and what was expected.

The command line prints the message of a `ParlError` and exits with status 1; every class also derives from the
built-in exception that library callers would catch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class ParlError(Exception):
    """Base of all errors that are meant for the user."""


class UnknownNameError(ParlError, ValueError):
    """A name that is not one of the known ones."""


class MissingExtraError(ParlError, ImportError):
    """An optional dependency is not installed."""


class NonFiniteError(ParlError, ValueError):
    """A NaN or an infinity where only finite numbers make sense."""


class RunFolderError(ParlError, OSError):
    """A run folder, or a file in it, that cannot be used."""


class RenderingError(ParlError, RuntimeError):
    """A picture or a video that cannot be made here."""


class ConfigError(ParlError, ValueError):
    """A configuration whose values contradict each other or lie outside their range."""


class Interrupted(Exception):
    """Ctrl-C during long work; the message says how to go on. No error, hence no `ParlError`."""


def unknown_name(kind: str, given: str, choices: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among `choices`, offering the nearest ones."""
    names = sorted(choices)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    offer = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}."
    return UnknownNameError(f"Unknown {kind} '{given}': {offer}")


def import_extra(module: str, extra: str, *, needed_for: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: it, or something it needs, is not installed; the message holds the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{needed_for} needs {module} ({error}); install it with: pip install 'parl-core[{extra}]'"
        ) from error
