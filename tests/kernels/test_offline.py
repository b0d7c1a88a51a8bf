"""Every Triton kernel compiles for sm_80 and sm_90 without spilling registers; and what checks that sees what is wrong."""

import re

import pytest

pytest.importorskip("triton")
from tests.kernels import offline


@pytest.mark.parametrize("module", offline.modules())
def test_kernels_compile(module):
    done = offline.python_that_compiles("-m", "tests.kernels.offline", module)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", offline.modules())
def test_grids_are_of_one_dimension(module):
    """In the second and third a GPU takes no more than 65535 programs, which an interpreter does not tell."""
    source = (offline.ROOT / "kernels" / f"{module}.py").read_text()
    assert set(re.findall(r"\b(?:program|program_id|num_programs)\((.*?)\)", source)) <= {"", "0"}


ORDERS = """
import importlib, re
from dataclasses import replace
from tests.kernels.offline import builds_of, compiled

def along(axis, layout):
    if "blocked" in layout:
        return [re.search(name + r" = \\[(.*?)\\]", layout)[1].split(", ")[axis] for name in ("Thread", "PerWarp", "PerCTA")]
    bases = re.findall(r"(register|lane|warp) = \\[(.*?\\])?\\]", layout)
    places = [(name, [base.split(", ")[axis] for base in re.findall(r"\\[(.*?)\\]", found)]) for name, found in bases]
    return [(name, [place for place in found if place != "0"]) for name, found in places]

def order(function, build):
    text = compiled(function, build, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\\w+) = (.*)$", text, re.M))
    found = []
    for axis, operand in re.findall(r'"tt.(?:reduce|scan)".*?axis = (\\d).*?\\}\\) : \\(tensor<(.*?)>', text, re.S):
        shape, name = operand.split(", ", 1)
        *lengths, element = shape.split("x")
        if element in ("f32", "f64"):
            axis, length = int(axis), lengths[int(axis)]
            if within := re.search(r"slice<{dim = (\\d), parent = (#\\w+)", name):
                axis, name = axis + (axis >= int(within[1])), within[2]
            found.append((length, along(axis, layouts[name])))
    return found

for module in ("triton_scan", "triton_preference"):
    kernels = vars(importlib.import_module("parl_core.kernels." + module))
    for name, kernel in kernels.items():
        if type(kernel).__name__ != "Autotuner":
            continue
        for number, build in enumerate(builds_of(module)[name]):
            if build.constants.get("PHASE") or {"*fp16", "*fp64"} & set(build.types.values()):
                continue  # chunks are not tuned; single precision and bfloat16 speak for the others
            orders = [
                order(kernel.fn, replace(build, constants={**build.constants, **config.kwargs}, num_warps=config.num_warps))
                for config in kernel.configs
            ]
            print(module, name, number, len(orders), len(orders[0]), all(one == orders[0] for one in orders))
"""


def test_what_is_tuned_leaves_the_order_of_operations_alone(tmp_path):
    """Sums and scans of floats, by which threads hold which elements along their axis: bits must not depend on timing."""
    (tmp_path / "script.py").write_text(ORDERS)
    done = offline.python_that_compiles(str(tmp_path / "script.py"))
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert {line[1] for line in lines if int(line[4])} >= {"recurrence_kernel", "preference_kernel"}
    assert not [line for line in lines if line[5] != "True" or int(line[3]) < 2]


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def undeclared_kernel(x):
    tl.store(x, 0.0)

@triton.jit
def shapes_kernel(x):
    tl.store(x + tl.arange(0, 8), tl.zeros((16,), tl.float32))

@triton.jit
def spilling_kernel(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    all = tl.load(x + i)
    tl.store(y + i, all - tl.max(all, 0))

@triton.jit
def forgotten_kernel(x, count):
    tl.store(x, count)

@triton.autotune([triton.Config({"SIZE": 8}), triton.Config({"SIZE": 16})], ["x"])
@triton.jit
def good_kernel(x, y, SIZE: tl.constexpr):
    if y is None:
        tl.store(x + tl.program_id(0) * SIZE + tl.arange(0, SIZE), 1.0)

def fill(x):
    good_kernel[(3,)](x, None)
"""
SCRIPT = """
import kernels_to_check
from tests.kernels.offline import Build, check

builds = {
    "shapes_kernel": [Build({"x": "*fp32"})],
    "spilling_kernel": [Build({"x": "*fp32", "y": "*fp32"}, {"SIZE": 16384}, num_warps=1)],
    "forgotten_kernel": [Build({"x": "*fp32"}), Build({"x": "*fp32", "count": "i32", "z": "i32"})],
    "good_kernel": [Build({"x": "*fp32"}, {"y": None, "SIZE": 8})],
    "gone_kernel": [Build({})],
}
for build, error in check(kernels_to_check, builds):
    print(f"{build}: {error}".replace(chr(10), " "))
"""


@pytest.mark.parametrize("launched_under_another_name", [False, True])
def test_the_check_sees_what_is_wrong(tmp_path, monkeypatch, launched_under_another_name):
    kernels = KERNELS.replace("good_kernel", "good") if launched_under_another_name else KERNELS
    (tmp_path / "kernels_to_check.py").write_text(kernels)
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = offline.python_that_compiles(str(tmp_path / "script.py"))
    if launched_under_another_name:
        assert "kernels_to_check.good is launched, so its name must end in _kernel" in done.stderr
        return
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.pop("gone_kernel") == "is declared, but there is no such kernel", done.stderr
    assert found.pop("undeclared_kernel") == "is not declared"
    for capability in (80, 90):
        assert "ompilationError" in found.pop(f"shapes_kernel 0 sm_{capability}")
        assert "bytes of registers are spilled" in found.pop(f"spilling_kernel 0 sm_{capability}")
        assert found.pop(f"forgotten_kernel 0 sm_{capability}") == "nothing is said of its argument count"
        assert found.pop(f"forgotten_kernel 1 sm_{capability}") == "it has no argument z"
        assert found.pop(f"good_kernel 0 sm_{capability}") == "None"
    assert not found
