"""What a reproduction study is: settings, independent tasks, and what is made of their rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..results.csv_files import Rows
from ..results.tables import Table


class Study(ABC):
    """A published result that `parl reproduce <name>` computes again.

    Subclasses are dataclasses of their settings, with a docstring under each field: what the command line offers. They
    travel to worker processes by pickle.
    """

    name: ClassVar[str]
    """On the command line, of the result folder."""
    title: ClassVar[str]
    """Heading on the results page."""
    source: ClassVar[str]
    """Where the published numbers come from."""
    needs_numba: ClassVar[bool] = True
    """Whether its tasks call kernels that numba compiles."""

    @abstractmethod
    def tasks(self) -> Sequence[Mapping[str, Any]]:
        """Independent pieces of work, each a dict of JSON scalars that names it; seconds to a minute of work each."""

    @abstractmethod
    def run(self, task: Mapping[str, Any]) -> Rows:
        """Do one task, in a worker process on one thread. The same task gives the same rows, bit for bit."""

    @abstractmethod
    def tables(self, rows: Rows) -> list[Table]:
        """Published numbers beside ours, from all tasks' rows (as read back from the CSVs: numbers are numbers again)."""

    @abstractmethod
    def figures(self, rows: Rows, directory: Path) -> list[Path]:
        """Draw into `directory`; the files, in the order in which the page shows them."""
