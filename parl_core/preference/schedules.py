"""How many labels a query session asks for, over the course of a run (Lee et al., B-Pref, NeurIPS Datasets 2021)."""

from __future__ import annotations

from ..errors import unknown_name

SCHEDULES = ("constant", "decreasing", "increasing")


def labels_in_session(schedule: str, labels_per_session: int, step: int, total_steps: int) -> int:
    """The labels that the session at environment step t = `step` of T = `total_steps` asks for, at least 1.

    `labels_per_session` times 1 ("constant"), (T − t)/T ("decreasing") or T/(T − t + 1) ("increasing"), rounded down. The
    factor is a double before it multiplies, as in B-Pref, so that 100 labels at t = 0.71·T are 28.

    Raises:
        UnknownNameError: no such schedule.
        ValueError: `step` outside [0, `total_steps`], or no labels to scale.
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES)
    if labels_per_session < 1:
        raise ValueError(f"labels_per_session must be at least 1, got {labels_per_session}")
    if not 0 <= step <= total_steps or total_steps < 1:
        raise ValueError(f"step must lie in [0, total_steps = {total_steps}] and total_steps above 0, got step {step}")
    left = total_steps - step
    factors = {"constant": 1.0, "decreasing": left / total_steps, "increasing": total_steps / (left + 1)}
    return max(1, int(labels_per_session * factors[schedule]))
