"""What the kernels of kernels/triton_mlp.py are called with."""

from tests.kernels.offline import Build

_NAMES = {
    "_activate_kernel": ("z", "a"),
    "_push_kernel": ("kept", "tangent", "out", "bent"),
    "_pull_kernel": ("kept", "cotangent", "moved", "bent"),
}
_LEFT_OUT = {
    "_activate_kernel": ((),),
    "_push_kernel": ((), ("bent",)),
    "_pull_kernel": ((), ("moved", "bent"), ("cotangent", "bent")),
}
BUILDS = {
    kernel: [
        Build(
            {name: f"*{element}" for name in names if name not in left_out} | {"count": "i32"},
            {**dict.fromkeys(left_out), "KIND": kind, "BLOCK": 1024},
        )
        for element in ("fp32", "fp64", "bf16")
        for kind in ("tanh", "relu", "silu")
        for left_out in _LEFT_OUT[kernel]
    ]
    for kernel, names in _NAMES.items()
}
