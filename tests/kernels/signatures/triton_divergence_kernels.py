"""Of the f-divergences: every summand, and the sums of a small and a large one, with all that they can write and less."""

import itertools

import triton.language as tl

from tests.kernels.offline import Build

FUNCTIONS = (
    "kl",
    "kl_k2",
    "kl_k3",
    "reverse_kl",
    "reverse_kl_k2",
    "reverse_kl_k3",
    "jensen_shannon",
    "jeffreys",
    "chi_squared",
    "neyman",
    "squared_hellinger",
    "total_variation",
    "alpha_low",
    "alpha_high",
)
STEPS = ("log_ratio", "weights", "vector", "cotangent", "gradient", "product", "out")
OTHERS = {
    "offsets": "*i64",
    "values": "*fp64",
    "slopes": "*fp64",
    "count": "i64",
    "trajectories": "i64",
    "scale": "fp64",
    "alpha": "fp64",
}
OF_ELEMENTS = (
    "log_ratio",
    "weights",
    "vector",
    "cotangent",
    "gradient",
    "product",
    "values",
    "slopes",
    "count",
    "scale",
    "alpha",
)
OF_TRAJECTORIES = (*OF_ELEMENTS, "offsets", "trajectories")


def build(names, element, left_out=(), num_warps=8, **constants):
    """Steps of dtype `element`, computed in single precision or in double."""
    precision = tl.float64 if element == "fp64" else tl.float32
    types = {name: f"*{element}" if name in STEPS else OTHERS[name] for name in names if name not in left_out}
    constants |= dict.fromkeys(left_out) | {"dtype": precision}
    return Build(types, constants, num_warps)


def term(function, over_ratio, flipped=False):
    return {"function": function, "over_ratio": over_ratio, "flipped": flipped}


KL, JENSEN_SHANNON = term("kl", True), term("jensen_shannon", False, flipped=True)
FIRST_ORDER = ("vector", "cotangent", "product", "slopes")
BUILDS = {
    "terms_kernel": [
        build(("log_ratio", "out", "count", "alpha"), element, **term(function, over_ratio), order=2, block=block)
        for function, over_ratio, (element, block) in zip(
            FUNCTIONS,
            itertools.cycle((False, True, True, False)),
            itertools.cycle((("fp32", 2048), ("fp64", 1024), ("bf16", 2048))),
            strict=False,
        )
    ],
    "sum_kernel": [
        build(OF_ELEMENTS, "fp32", (), **JENSEN_SHANNON, block=2048, chunk=256),
        build(OF_ELEMENTS, "bf16", FIRST_ORDER, **KL, block=2048, chunk=256),
        build(OF_ELEMENTS, "fp64", ("gradient",), **term("alpha_low", True), block=1024, chunk=256),
    ],
    "trajectory_sum_kernel": [
        build(OF_TRAJECTORIES, "fp32", (), **JENSEN_SHANNON, rows=32, columns=16, num_warps=4),
        build(OF_TRAJECTORIES, "fp16", FIRST_ORDER, **KL, rows=1, columns=512, num_warps=4),
        build(OF_TRAJECTORIES, "fp64", ("gradient",), **JENSEN_SHANNON, rows=8, columns=64, num_warps=4),
    ],
    "total_kernel": [
        Build({"parts": "*fp64", "out": f"*{element}", "count": "i64", "scale": "fp64"}, {"width": 4096}, num_warps=8)
        for element in ("fp64", "fp32", "bf16", "fp16")
    ],
    "chunk_sums_kernel": [
        Build(
            {"steps": f"*{element}", "offsets": "*i64", "sums": "*fp64", "count": "i64", "chunks": "i32"},
            {"block": block},
            num_warps=8,
        )
        for element, block in (("fp64", 1024), ("fp32", 2048), ("bf16", 2048))
    ],
    "fill_chunks_kernel": [
        Build(
            {"out": f"*{element}", "values": f"*{element}", "offsets": "*i64", "count": "i64", "chunks": "i32"},
            {"block": block},
            num_warps=8,
        )
        for element, block in (("fp64", 1024), ("fp32", 2048), ("bf16", 2048))
    ],
    "scale_kernel": [
        Build({"steps": f"*{element}", "factor": f"*{element}", "count": "i64"}, {"block": block}, num_warps=8)
        for element, block in (("fp64", 1024), ("fp32", 2048), ("bf16", 2048))
    ],
}
