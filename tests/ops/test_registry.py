"""Who computes an op: argument before context before the device's best; refusals give their reason."""

import asyncio
import importlib.util
import math
import subprocess
import sys
import threading

import pytest
import torch

from parl_core.errors import UnknownNameError
from parl_core.ops import BackendError, available_backends, backend, prefix_sum, recurrence, registry, support_table
from parl_core.ops.ensemble_rewards import ensemble_rewards
from parl_core.ops.registry import backend_names

VALUES = torch.zeros(3)


@pytest.fixture
def op(monkeypatch):
    """An op of its own with all three backends, which are made available here whatever the machine has."""
    monkeypatch.setattr(registry, "_OPS", {})
    for name in ("numba", "cpp"):
        monkeypatch.setitem(registry._WHY_UNAVAILABLE, name, lambda: None)
    op = registry.Op("toy", lambda x: x)
    cpu, single = frozenset({"cpu"}), frozenset({torch.float32})
    op.register("numba", lambda: lambda x: x + 1, device_types=cpu, dtypes=single)
    op.register("cpp", lambda: lambda x: x + 2, device_types=cpu, dtypes=single)
    return op


def take_away(monkeypatch, name):
    monkeypatch.setitem(registry._WHY_UNAVAILABLE, name, lambda: "it was taken away")


def test_best_of_the_cpu(op, monkeypatch):
    assert op.select(VALUES, None) == "cpp"
    take_away(monkeypatch, "cpp")
    assert op.select(VALUES, None) == "numba"
    take_away(monkeypatch, "numba")
    assert op.select(VALUES, None) == "reference"


def test_automatic_choice_moves_past_what_is_unsupported(op):
    assert op.select(VALUES.double(), None) == "reference"
    assert op.select(VALUES.to("meta"), None) == "reference"


def test_argument_before_context_before_automatic(op):
    with backend("numba"):
        assert op.select(VALUES, None) == "numba"
        assert op.select(VALUES, "reference") == "reference"
        with backend("reference"):
            assert op.select(VALUES, None) == "reference"
        assert op.select(VALUES, None) == "numba"
    assert op.select(VALUES, None) == "cpp"


def test_context_ends_with_an_exception(op):
    with pytest.raises(ZeroDivisionError), backend("reference"):
        _ = 1 / 0
    assert op.select(VALUES, None) == "cpp"


def test_unavailable_by_name_raises_with_the_reason(op, monkeypatch):
    take_away(monkeypatch, "cpp")
    with pytest.raises(BackendError, match="toy: backend 'cpp' cannot be used: it was taken away"):
        op.select(VALUES, "cpp")
    with pytest.raises(BackendError, match="backend 'cpp' is unavailable: it was taken away"), backend("cpp"):
        pass
    assert "cpp" not in available_backends()


def test_real_op_with_a_backend_taken_away(monkeypatch):
    take_away(monkeypatch, "cpp")
    with pytest.raises(BackendError, match="it was taken away"):
        prefix_sum(VALUES, backend="cpp")
    assert prefix_sum(torch.ones(3)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("choose", [lambda op: op.select(VALUES, None), lambda op: op.select(VALUES, "cpp")])
def test_unsupported_by_context_or_argument_raises(op, choose):
    halves = VALUES.half()
    with pytest.raises(BackendError, match=r"it computes in torch.float32, not in torch.float16"):
        op.select(halves, "cpp")
    with backend("cpp"), pytest.raises(BackendError, match="it runs on cpu, not on meta"):
        op.select(VALUES.to("meta"), None)


def test_not_implemented_is_a_reason(monkeypatch):
    monkeypatch.setattr(registry, "_OPS", {})
    monkeypatch.setitem(registry._WHY_UNAVAILABLE, "cpp", lambda: None)
    op = registry.Op("toy", lambda x: x)
    with pytest.raises(BackendError, match="it does not implement toy"):
        op.select(VALUES, "cpp")


def test_a_context_leaves_alone_what_its_backend_does_not_implement(op):
    del op._implementations["numba"]
    with backend("numba"):
        assert op.select(VALUES, None) == "cpp"
        assert op.select(VALUES.double(), None) == "reference"
        assert op.requested(None) is None
        with pytest.raises(BackendError, match="it does not implement toy"):
            op.select(VALUES, "numba")
        with backend("reference"):
            assert op.select(VALUES, None) == "reference"
    with backend("cpp"), pytest.raises(BackendError, match=r"it computes in torch\.float32"):
        op.select(VALUES.double(), None)


def test_a_numba_context_around_ops_without_numba():
    pytest.importorskip("numba")
    inputs, weight, bias = torch.ones(4, 3), torch.ones(2, 3, 1), torch.zeros(2, 1, 1)
    expected = torch.full((2, 4), math.tanh(3.0))
    with backend("numba"):
        torch.testing.assert_close(ensemble_rewards(inputs, [weight], [bias]), expected)
        assert ensemble_rewards(inputs[:0], [weight], [bias]).shape == (2, 0)


def test_kernel_that_does_not_load_is_a_reason(op):
    def broken():
        raise ImportError("libgomp.so.1: cannot open shared object file")

    op.register("cpp", broken)
    assert op.select(VALUES, None) == "numba"
    with pytest.raises(BackendError, match=r"its kernel cannot be loaded \(ImportError: libgomp"):
        op.select(VALUES, "cpp")


def test_kernel_is_loaded_once(op):
    loads = []

    def load():
        loads.append(1)
        return lambda x: x

    op.register("cpp", load)
    for _ in range(3):
        op.kernel(op.select(VALUES, None))
    assert loads == [1]


def test_unknown_names_offer_near_misses(op):
    with pytest.raises(UnknownNameError, match="Unknown backend 'nunba': did you mean numba"):
        op.select(VALUES, "nunba")
    with pytest.raises(UnknownNameError, match="Unknown backend 'c'"), backend("c"):
        pass


def test_context_is_of_its_thread(op):
    seen = []
    with backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(op.select(VALUES, None)))
        thread.start()
        thread.join()
    assert seen == ["cpp"]


def test_context_is_of_its_task(op):
    async def choose(name):
        with backend(name):
            await asyncio.sleep(0)
            return op.select(VALUES, None)

    async def both():
        return await asyncio.gather(choose("numba"), choose("reference"))

    assert asyncio.run(both()) == ["numba", "reference"]


def record_kernels(monkeypatch):
    """The list that will hold the backends of the scans from now on."""
    used = []
    kernel = recurrence._DISCOUNTED.kernel

    def recording(name):
        used.append(name)
        return kernel(name)

    monkeypatch.setattr(recurrence._DISCOUNTED, "kernel", recording)
    return used


def test_context_holds_for_the_backward_pass(monkeypatch):
    used = record_kernels(monkeypatch)
    values = torch.ones(3, requires_grad=True)
    with backend("reference"):
        out = prefix_sum(values)
    used.clear()
    out.sum().backward()
    assert used == ["reference"]


def test_compiled_code_honours_the_context(monkeypatch):
    torch._dynamo.reset()
    used = record_kernels(monkeypatch)
    compiled = torch.compile(prefix_sum, fullgraph=True, backend="aot_eager")
    with backend("reference"):
        assert compiled(torch.ones(3)).tolist() == [1, 2, 3]
    assert used[-1] == "reference"


def test_support_table(op, monkeypatch):
    take_away(monkeypatch, "numba")
    reasons = support_table()["toy"]
    assert list(reasons) == list(backend_names())
    assert {name for name, reason in reasons.items() if reason is None} == {"reference", "cpp"}
    assert reasons["numba"] == "it was taken away"


def test_reasons_for_this_machine(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'parl-core[numba]'" in (registry._why_no_numba() or "")

    def fail(error):
        def import_module(name):
            raise error

        return import_module

    monkeypatch.setattr(importlib, "import_module", fail(ModuleNotFoundError("no")))
    assert "C++17 compiler" in (registry._why_no_cpp.__wrapped__() or "")
    monkeypatch.setattr(importlib, "import_module", fail(ImportError("undefined symbol")))
    assert "undefined symbol" in (registry._why_no_cpp.__wrapped__() or "")


def test_importing_the_ops_imports_no_numba():
    code = "import sys, parl_core.ops as ops; ops.available_backends(); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
