"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, capsys):
    torch.manual_seed(0)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    assert "CONVERGED" in capsys.readouterr().out


def test_there_are_examples():
    assert BLOCKS
