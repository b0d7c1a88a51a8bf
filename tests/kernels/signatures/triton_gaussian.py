"""What the kernels of kernels/triton_gaussian.py are called with."""

from tests.kernels.offline import Build

_TENSORS = (
    "actions",
    "mean",
    "log_std",
    "of_mean",
    "of_log_std",
    "weights",
    "fisher",
    "value",
    "by_mean",
    "by_log_std",
)
_STRIDED = ("actions", "mean", "log_std", "of_mean", "of_log_std", "by_mean", "by_log_std")
_FIRST_ORDER = ("of_mean", "of_log_std", "fisher")
_LEFT_OUT = {
    "value": (*_FIRST_ORDER, "weights", "by_mean", "by_log_std"),
    "gradient": (*_FIRST_ORDER, "value"),
    "along": ("fisher", "weights", "by_mean", "by_log_std"),
    "second order": ("fisher",),
    "second order without actions": ("actions", "fisher"),
    "Hessian and Fisher": (),
    "Fisher, fixed deviations": ("weights", "of_log_std", "by_log_std"),
}


def _build(element, left_out, squash, bounded, rows, block):
    types = {name: f"*{element}" for name in _TENSORS if name not in left_out}
    sizes = dict.fromkeys((f"{name}_stride" for name in _STRIDED), "i32") | {"num_steps": "i32", "size": "i32"}
    numbers = dict.fromkeys(("edge", "low", "high"), "fp64")
    constants = {"SQUASH": squash, "BOUNDED": bounded, "ROWS": rows, "BLOCK": block}
    return Build(types | sizes | numbers, dict.fromkeys(left_out) | constants, num_warps=8)


BUILDS = {
    "_gaussian_kernel": [
        _build(
            element,
            left_out,
            "fisher" in left_out and "actions" not in left_out,
            bounded,
            (32 if element == "fp64" else 64),
            8,
        )
        for element in ("fp32", "fp64", "bf16")
        for left_out in _LEFT_OUT.values()
        for bounded in ((False,) if element == "bf16" or "of_log_std" in left_out[3:] else (False, True))
    ]
    + [_build("fp32", (), False, True, 2, 256), _build("fp64", (), False, True, 1, 256)]
    + [_build("fp16", ("fisher",), True, False, 64, 8)]
}

# Triton compiles sizes and strides of 1 in as constants.
_ones = _build("fp32", (), False, True, 512, 1)
_constants = {"num_steps": 1, "size": 1, "mean_stride": 1, "by_mean_stride": 1}
_types = {name: kind for name, kind in _ones.types.items() if name not in _constants}
BUILDS["_gaussian_kernel"].append(Build(_types, {**_ones.constants, **_constants}, num_warps=8))
