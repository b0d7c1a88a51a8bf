"""Compiles Triton's kernels for GPUs that need not be there, and tells what went wrong.

The interpreter, in which the other tests run, forgives what the compiler refuses; so every kernel of kernels/triton_*.py is
compiled here, in a process of its own, since where kernels are interpreted they cannot be compiled. What with is
declared in tests/kernels/signatures, a file for each module, of the same name, with

    BUILDS = {"some_kernel": [Build({"x": "*fp32", "count": "i64"}, {"BLOCK": 1024}, num_warps=4), …]}

Every `@triton.jit` function whose name ends in `_kernel` must be there, with every dtype that it is called with. Register
spills are errors: they would go to memory at every use.

    python -m tests.kernels.offline [module …]      # prints a line for each build
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Build:
    """One way a kernel is called."""

    types: Mapping[str, str]
    """Of each argument: "*fp32", "*bf16", "*i64", … of a tensor, assumed aligned to 16 bytes as torch's are; "i64",
    "fp64", … of a number."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Of each tl.constexpr, and None for each tensor that is left out."""
    num_warps: int = 4


def modules() -> list[str]:
    """The modules that hold kernels: kernels/triton_*.py."""
    return sorted(path.stem for path in (ROOT / "kernels").glob("triton_*.py"))


def check(module: ModuleType, builds: Mapping[str, list[Build]]) -> Iterator[tuple[str, str | None]]:
    """Each build of the kernels in `module` with what is wrong with it, or None."""
    kernels = kernels_of(module)
    for missing in sorted(builds.keys() - kernels.keys()):
        yield missing, "is declared, but there is no such kernel"
    for name, function in kernels.items():
        if not builds.get(name):
            yield name, "is not declared"
        for number, build in enumerate(builds.get(name, ())):
            for capability in CAPABILITIES:
                yield f"{name} {number} sm_{capability}", compile_error(function, build, capability)


def builds_of(name: str) -> Mapping[str, list[Build]]:
    """What is declared for the kernels of module `name`."""
    if not (ROOT / "tests/kernels/signatures" / f"{name}.py").exists():
        return {}
    return importlib.import_module(f"tests.kernels.signatures.{name}").BUILDS


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """The kernels that are defined in `module`, without what chooses their configurations.

    Raises:
        ValueError: a function is launched, but not named as a kernel.
    """
    kernels = {}
    launched = set(re.findall(r"\b(\w+)\[", inspect.getsource(module)))
    for name, function in vars(module).items():
        while type(function).__name__ in ("Autotuner", "Heuristics"):
            function = function.fn
        if type(function).__name__ != "JITFunction" or function.__module__ != module.__name__:
            continue
        if name.endswith("_kernel"):
            kernels[name] = function
        elif name in launched:
            raise ValueError(f"{module.__name__}.{name} is launched, so its name must end in _kernel")
    return kernels


def compile_error(function: Any, build: Build, capability: int) -> str | None:
    """What the compiler says against `build` of a kernel, or None."""
    names = function.arg_names
    if unknown := [name for name in (*build.types, *build.constants) if name not in names]:
        return f"it has no argument {', '.join(unknown)}"
    if missing := [name for name in names if name not in build.types and name not in build.constants]:
        return f"nothing is said of its argument {', '.join(missing)}"
    try:
        cubin = compiled(function, build, capability).asm["cubin"]
    except Exception as error:  # whatever a compiler may raise
        causes = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        return " because of ".join(f"{type(cause).__name__}: {cause}" for cause in causes)
    return spills(cubin)


def compiled(function: Any, build: Build, capability: int) -> Any:
    """What the compiler makes of `build` of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in build.constants else build.types[name] for name in names}
    pointers = [number for number, name in enumerate(names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs=dict(build.constants),
        attrs={(number,): [["tt.divisibility", 16]] for number in pointers},
    )
    options = {"num_warps": build.num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(cubin: bytes) -> str | None:
    """How many bytes a thread needs on its stack, where registers were not enough; None if they were."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if used is None:
        return f"cuobjdump does not tell its registers: {usage!r}"
    registers, stack, local = map(int, used.groups())
    return f"{stack + local} bytes of registers are spilled, {registers} registers are used" if stack + local else None


def python_that_compiles(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python …` where kernels are compiled, not interpreted, with a cache that goes when it ends."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def main(names: list[str]) -> int:
    """Check the modules `names`, all by default; 1 if anything is wrong."""
    wrong = 0
    for name in names or modules():
        for build, error in check(importlib.import_module(f"parl_core.kernels.{name}"), builds_of(name)):
            print(f"{name}.{build}: {error or 'ok'}", flush=True)
            wrong += error is not None
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
