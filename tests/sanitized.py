"""A pytest plugin that tests another build of the extension than the one in parl_core/.

    PARL_NATIVE=build/sanitized/_native….so python -m pytest -p tests.sanitized tests/ops

`make sanitize` uses it.
"""

from __future__ import annotations

import importlib.util
import os
import sys


def _load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("parl_core._native", path)
    assert spec is not None and spec.loader is not None
    import torch  # noqa: F401  its OpenMP library must be the process's before the extension asks for one

    module = importlib.util.module_from_spec(spec)
    sys.modules["parl_core._native"] = module
    spec.loader.exec_module(module)


_load(os.environ["PARL_NATIVE"])
