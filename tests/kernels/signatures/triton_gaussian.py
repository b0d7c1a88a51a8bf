"""What the kernels of kernels/triton_gaussian.py are called with."""

from tests.kernels.offline import Build

_TENSORS = ("actions", "mean", "log_std", "of_mean", "of_log_std", "weights", "value", "by_mean", "by_log_std")
_STRIDES = ("actions_stride", "mean_stride", "log_std_stride", "of_mean_stride", "of_log_std_stride")
_LEFT_OUT = {
    "value": ("of_mean", "of_log_std", "weights", "by_mean", "by_log_std"),
    "gradient": ("of_mean", "of_log_std", "value"),
    "along": ("weights", "by_mean", "by_log_std"),
    "second order": (),
    "second order without actions": ("actions",),
}


def _build(element, left_out, squash, rows, block):
    types = {name: f"*{element}" for name in _TENSORS if name not in left_out}
    sizes = {**dict.fromkeys(_STRIDES, "i64"), "num_steps": "i32", "size": "i32", "edge": "fp64"}
    constants = {**dict.fromkeys(left_out), "SQUASH": squash, "ROWS": rows, "BLOCK": block}
    return Build(types | sizes, constants, num_warps=4)


BUILDS = {
    "_gaussian_kernel": [
        _build(element, left_out, squash and "actions" not in left_out, rows, block)
        for element in ("fp32", "fp64", "bf16")
        for left_out in _LEFT_OUT.values()
        for squash, rows, block in (
            (True, 64 if element == "fp64" else 128, 8),
            (False, 1 if element == "fp64" else 2, 512),
        )
    ]
    + [_build("fp16", (), True, 128, 8)]
}
