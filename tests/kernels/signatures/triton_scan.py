"""How kernels/triton_scan.py calls its kernels: whole trajectories and in chunks, ragged and rows, in every dtype."""

from tests.kernels.offline import Build

SHAPE = {"steps": "i64", "horizon": "i64", "count": "i64"}
WHOLE, SUMMARY, REST = 0, 1, 2


def builds(tensors, optional, numbers, constants, reverse=True):
    """Of one kernel, whose tensors `optional` may be left out."""
    numbers = dict.fromkeys(numbers, "fp64") | SHAPE | {"scale": "i32"}

    def build(dtype, phase, *, ragged, size=1 << 13, block=512, numbers_of=256):
        present = (*tensors, *optional) if ragged else tensors
        accumulated = "*fp64" if dtype == "fp64" else "*fp32"
        workspace = {WHOLE: (), SUMMARY: ("sums", "products"), REST: ("carries",)}[phase]
        types = dict.fromkeys(present, f"*{dtype}") | dict.fromkeys(workspace, accumulated) | numbers
        if ragged:
            types["offsets"] = "*i64"
        absent = {*optional, "sums", "products", "carries", "offsets"} - types.keys()
        sizes = {"BLOCK": block, "SIZE": size, "CHUNK": 1 << 13, "NUMBERS": numbers_of}
        return Build(types, {**dict.fromkeys(absent), **sizes, "PHASE": phase, "REVERSE": reverse, **constants})

    return [
        build("fp32", WHOLE, ragged=True, block=16),
        build("fp32", WHOLE, ragged=False, size=1 << 12),
        build("fp64", WHOLE, ragged=True, size=1 << 12),
        build("bf16", WHOLE, ragged=True, size=1 << 12),
        build("fp16", WHOLE, ragged=False),
        build("fp32", SUMMARY, ragged=True),
        build("fp32", REST, ragged=False, numbers_of=1),
        build("fp64", REST, ragged=True, size=1 << 12),
    ]


ESTIMATE = ("discount", "decay")
BUILDS = {
    "recurrence_kernel": [
        build
        for reverse in (False, True)
        for build in builds(("values", "out"), ("coefficients",), ("discount",), {}, reverse)
    ],
    "lambda_returns_kernel": builds(("rewards", "values", "out"), ("bootstrap",), ESTIMATE, {"ADD_VALUES": True}),
    "vtrace_kernel": builds(
        ("log_ratios", "rewards", "values", "targets", "advantages"),
        ("bootstrap",),
        (*ESTIMATE, "rho_clip", "c_clip"),
        {},
    ),
    "carries_kernel": [
        Build(
            {**dict.fromkeys(("sums", "products", "carries"), f"*{dtype}"), "offsets": "*i64", **SHAPE},
            {"REVERSE": reverse, "BLOCK": block, "CHUNK": 1 << 13, "NUMBERS": numbers_of},
        )
        for dtype, reverse, block, numbers_of in (
            ("fp32", False, 1024, 1),
            ("fp32", True, 8, 1),
            ("fp64", True, 512, 256),
        )
    ],
}
