"""The categorical distribution given by logits, as policies over integer actions use it."""

from __future__ import annotations

from ..ops.categorical_log_prob import categorical_fisher, categorical_log_prob

__all__ = ["categorical_fisher", "categorical_log_prob"]
