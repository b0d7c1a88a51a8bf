"""What `preflight` returns: findings, each with the place, the hazard and the form to use instead."""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass


class Severity(enum.Enum):
    """How a finding bears on second derivatives."""

    ERROR = "error"
    """Second-order products raise, or are silently wrong."""
    WARNING = "warning"
    """They may be wrong, or are right but not what one may take them for."""
    NOTE = "note"
    """Harmless to the engine; good to know."""


@dataclass(frozen=True)
class Finding:
    """One hazard at one place."""

    severity: Severity
    kind: str
    """A short stable name of the hazard, such as "attention", "dropout" or "canary"."""
    where: str
    """The submodule's path as in `named_modules`, "" for the module itself; or a parameter's name."""
    what: str
    """One sentence: what breaks."""
    instead: str
    """One sentence: what to use."""


@dataclass(frozen=True)
class Preflight:
    """The result of `preflight`; printing it gives a table."""

    findings: tuple[Finding, ...]
    """Errors first."""
    subject: str
    """What was examined, such as "GaussianPolicy.log_prob"."""
    called: bool
    """Whether the module was called, so that the checks of what it computes have run."""

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return not any(finding.severity is Severity.ERROR for finding in self.findings)

    def __str__(self) -> str:
        counts = ", ".join(
            f"{number} {severity.value}{'s' * (number != 1)}"
            for severity in Severity
            if (number := sum(f.severity is severity for f in self.findings))
        )
        lines = [f"preflight of {self.subject}: {counts or 'nothing found'}"]
        if not self.called:
            lines.append("(not called: pass example inputs to check what it computes against finite differences)")
        places: dict[tuple[Severity, str, str, str], list[str]] = {}
        for f in self.findings:
            places.setdefault((f.severity, f.kind, f.what, f.instead), []).append(f.where or "(module itself)")
        for (severity, kind, what, instead), where in places.items():
            shown = ", ".join(where[:4]) + (f" and {len(where) - 4} more" if len(where) > 4 else "")
            lines.append(f"{severity.value:<9}{kind:<20}{shown}")
            lines += textwrap.wrap(what, 110, initial_indent=" " * 9, subsequent_indent=" " * 9)
            lines += textwrap.wrap(f"→ {instead}", 110, initial_indent=" " * 9, subsequent_indent=" " * 11)
        return "\n".join(lines)
