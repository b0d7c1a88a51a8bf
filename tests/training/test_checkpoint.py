"""Checkpoints round-trip exactly, survive a kill or an error at every call to the disk, and are refused in a sentence."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parl_core import RunFolderError
from parl_core.training import checkpoint
from parl_core.training.checkpoint import load_checkpoint, save_checkpoint


def same(one, other) -> bool:
    """Equal in value, kind, dtype and nesting; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_round_trip_of_every_kind(tmp_path):
    tensor = torch.randn(3, 2)
    rows = torch.randn(10, 4)
    state = {
        "tensor": tensor,
        "view": tensor.T,
        "same": tensor,
        "part": rows[:6],
        "overlapping": rows[3:],
        "scalar": torch.tensor(2),
        "empty": [torch.zeros(0, 4), torch.zeros(0)],
        "array": np.arange(5, dtype=np.uint8),
        "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
        "array of no axes": np.array(1.5),
        "read-only": np.broadcast_to(np.float32(2), (3,)),
        "NumPy's numbers": [np.float32(0.1), np.int64(-(2**62)), np.bool_(True)],
        "numbers": [1, 2.5, float("inf"), float("nan"), -0.0, True, None, 2**127],
        "tuple": (1, "text", {"nested": torch.ones(1)}),
        3: {"key is an integer": -1},
        "3": torch.zeros(1),
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    save_checkpoint(tmp_path / "c", state, step=7)
    loaded = load_checkpoint(tmp_path / "c")
    contiguous = {"view": tensor.T.contiguous(), "strided": np.ascontiguousarray(state["strided"])}
    assert same({**state, **contiguous, "read-only": np.full(3, 2, np.float32)}, loaded)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert (manifest["step"], manifest["torch"]) == (7, torch.__version__)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"manifest.json", *manifest["files"]}


KEYS = st.text(max_size=4) | st.integers(-5, 5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.floats(width=32), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.float32))
    | st.lists(st.integers(0, 255), max_size=4).map(lambda values: np.array(values, dtype=np.uint8))
)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda kind: st.lists(kind, max_size=3) | st.tuples(kind, kind) | st.dictionaries(KEYS, kind, max_size=3),
    ),
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(STATES, STATES)
def test_the_last_state_comes_back_whatever_it_is(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("any") / "c"
    save_checkpoint(folder, first)
    save_checkpoint(folder, second)
    assert same(load_checkpoint(folder), second)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "state/a/1 must be a tensor"),
        (np.array([None]), "state/a/1 must be an array of numbers"),
        ({(1, 2): 3}, "state/a/1 must have strings or numbers as keys"),
    ],
)
def test_what_cannot_be_stored_is_named_and_the_previous_checkpoint_stays(tmp_path, value, message):
    save_checkpoint(tmp_path / "c", {"a": 1})
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "c", {"a": [1, value]})
    assert load_checkpoint(tmp_path / "c") == {"a": 1}


def test_files_are_as_readable_as_others_and_foreign_ones_are_left_alone(tmp_path):
    save_checkpoint(tmp_path / "c", {"a": torch.ones(3)})
    (tmp_path / "c" / "notes.txt").write_text("mine")
    (tmp_path / "plain").write_text("")
    save_checkpoint(tmp_path / "c", {"a": torch.ones(3)})
    assert (tmp_path / "c" / "notes.txt").read_text() == "mine"
    modes = {path.stat().st_mode for path in (tmp_path / "c").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


OLD, NEW = {"weights": torch.zeros(100), "step": 1}, {"weights": torch.ones(100), "step": 2}


class Calls:
    """Every call to the file system that a checkpoint makes, numbered; `strike` is called at one, before or after it."""

    def __init__(self, at, after, strike):
        self.at, self.after, self.strike, self.names = at, after, strike, []

    def install(self, monkeypatch):
        import safetensors.torch

        for module, name in (
            (builtins, "open"),
            (io, "open"),
            (os, "open"),
            (os, "mkdir"),
            (os, "fsync"),
            (os, "replace"),
            (os, "unlink"),
            (os, "chmod"),
            (os, "listdir"),
            (checkpoint, "sha256"),
            (safetensors.torch, "save_file"),
        ):
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name, real):
        def call(*arguments, **options):
            self.names.append(name)
            here = len(self.names) - 1 == self.at
            if here and name == "save_file":  # in the midst of it
                (arguments[1].parent / ".tmpXYZ").write_bytes(b"half")
                arguments[1].write_bytes(b"half")
            if here and not self.after:
                self.strike()
            try:
                return real(*arguments, **options)
            finally:
                if here and self.after:
                    self.strike()

        return call


def count_calls(folder, monkeypatch) -> int:
    save_checkpoint(folder, OLD)
    calls = Calls(None, False, None)
    with monkeypatch.context() as context:
        calls.install(context)
        save_checkpoint(folder, NEW)
    for name in ("save_file", "fsync", "replace", "unlink", "sha256", "open"):  # the wrappers are where the calls go
        assert name in calls.names
    return len(calls.names)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("first", [True, False])
def test_a_kill_at_any_call_leaves_one_of_the_two_checkpoints(tmp_path, monkeypatch, first):
    """`first`: there was none before."""
    seen = set()
    number = count_calls(tmp_path / "counted", monkeypatch)
    for at in range(number):
        for after in (False, True):
            folder = tmp_path / f"{at}{after}"
            if not first:
                save_checkpoint(folder, OLD)
            child = os.fork()
            if child == 0:
                try:
                    Calls(at, after, lambda: os.kill(os.getpid(), signal.SIGKILL)).install(monkeypatch)
                    save_checkpoint(folder, NEW)
                finally:
                    os._exit(0)
            _, status = os.waitpid(child, 0)
            # The first one has nothing to remove, so it makes one or two calls fewer; no other survives.
            assert os.WIFSIGNALED(status) or (first and at >= number - 3)
            if first and not (folder / "manifest.json").exists():
                seen.add("none")
            else:
                state = load_checkpoint(folder)
                assert same(state, OLD) or same(state, NEW)
                seen.add(state["step"])
            save_checkpoint(folder, NEW)  # goes on in what was left, and leaves nothing of it
            assert same(load_checkpoint(folder), NEW)
            assert len(list(folder.iterdir())) == 3
    assert seen == ({"none", 2} if first else {1, 2})


def test_an_error_at_any_call_is_one_sentence_and_leaves_one_of_the_two_checkpoints(tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    seen = set()
    for at in range(1, count_calls(tmp_path / "counted", monkeypatch)):  # 0 is mkdir, of a folder that is there
        folder = tmp_path / str(at)
        save_checkpoint(folder, OLD)
        with monkeypatch.context() as context:
            Calls(at, False, full).install(context)
            with pytest.raises(RunFolderError, match=r"No space left on device$"):
                save_checkpoint(folder, NEW)
        state = load_checkpoint(folder)
        assert same(state, OLD) or same(state, NEW)
        seen.add(state["step"])
        if (
            state["step"] == 1
        ):  # room was made for others; only what safetensors itself left is there until the next one
            assert {path.name for path in folder.iterdir()} - {".tmpXYZ"} == {
                "manifest.json",
                "tensors-1.safetensors",
                "tree-1.json",
            }
    assert seen == {1, 2}


def test_every_bit_of_every_file_counts(tmp_path):
    folder = tmp_path / "c"
    save_checkpoint(folder, {"weights": torch.arange(4.0), "name": "é"}, step=12)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(RunFolderError):
                load_checkpoint(folder)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(RunFolderError, match="is damaged"):
                load_checkpoint(folder)
        path.write_bytes(whole + b"\0")
        with pytest.raises(RunFolderError, match="is damaged"):
            load_checkpoint(folder)
        path.write_bytes(whole)
    assert load_checkpoint(folder)["name"] == "é"


def test_what_is_no_checkpoint_of_this_version_is_refused_with_the_reason(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    with pytest.raises(RunFolderError, match="There is no checkpoint"):
        load_checkpoint(folder)
    save_checkpoint(folder, {"a": torch.ones(100)})
    with monkeypatch.context() as context:
        context.setattr(checkpoint, "__version__", "99.0")
        with pytest.raises(RunFolderError, match=r"written by parl-core .*, and this is 99\.0"):
            load_checkpoint(folder)
        context.setattr(checkpoint, "FORMAT_VERSION", 3)
        with pytest.raises(RunFolderError, match="has version 2 of the format, expected 3"):
            load_checkpoint(folder)
        context.setattr(checkpoint, "FORMAT", "another project")
        with pytest.raises(RunFolderError, match="format must be 'another project', got 'parl-core checkpoint'"):
            load_checkpoint(folder)
    (folder / "tree-1.json").rename(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match=r"not complete: tree-1\.json is missing"):
        load_checkpoint(folder)
    for text, message in (("{", "not JSON"), ("[1]", "must be 'parl-core checkpoint', got"), ("{}", "got None")):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(RunFolderError, match=message):
            load_checkpoint(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(RunFolderError, match="There is no checkpoint"):
        load_checkpoint(folder)
    save_checkpoint(folder, {"a": 2})  # beside what an interrupted first one would have left
    assert load_checkpoint(folder) == {"a": 2}
