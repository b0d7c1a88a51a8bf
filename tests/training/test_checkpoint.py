"""Checkpoints round-trip exactly and fail in one sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parl_core import RunFolderError
from parl_core.training.checkpoint import load_checkpoint, save_checkpoint


def test_round_trip_of_every_kind(tmp_path):
    tensor = torch.randn(3, 2)
    state = {
        "tensor": tensor,
        "view": tensor.T,
        "same": tensor,
        "scalar": torch.tensor(2),
        "empty": torch.zeros(0, 4),
        "array": np.arange(5, dtype=np.uint8),
        "numbers": [1, 2.5, float("inf"), True, None, 2**127],
        "tuple": (1, "text", {"nested": torch.ones(1)}),
        3: {"key is an integer": -1},
    }
    save_checkpoint(tmp_path / "c", state)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.keys() == state.keys()
    for name in ("tensor", "view", "same", "scalar", "empty"):
        assert torch.equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype
    assert loaded["array"].dtype == np.uint8
    assert (loaded["array"] == state["array"]).all()
    assert loaded["numbers"] == state["numbers"]
    assert loaded["tuple"][:2] == (1, "text")
    assert torch.equal(loaded["tuple"][2]["nested"], torch.ones(1))
    assert loaded[3] == state[3]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(TypeError, match="state/a/1 must be a tensor"):
        save_checkpoint(tmp_path / "c", {"a": [1, object()]})


def test_missing_foreign_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(RunFolderError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "c")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(RunFolderError, match="cannot be read"):
        load_checkpoint(tmp_path / "text")
    save_checkpoint(tmp_path / "c", {"a": torch.ones(100)})
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[:-8])
    with pytest.raises(RunFolderError, match="cannot be read"):
        load_checkpoint(tmp_path / "c")
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(RunFolderError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "foreign")
