"""How kernels/triton_preference.py calls its kernels: ragged and dense, short and long segments, in every dtype."""

from tests.kernels.offline import Build


def sizes(size, block):
    return {"SIZE": size, "BLOCK": block}


LOSS_NUMBERS = ("first_steps", "first_length", "second_steps", "second_length", "label_stride", "pairs")
CASES = [
    ("fp32", True, 1 << 13, 16),
    ("fp32", True, 1 << 12, 1024),
    ("fp64", True, 1 << 13, 512),
    ("bf16", False, 1 << 12, 64),
    ("fp16", True, 1 << 13, 64),
]
BUILDS = {
    "preference_kernel": [
        Build(
            {
                **dict.fromkeys(("first", "second", "labels", "losses"), f"*{dtype}"),
                **dict.fromkeys(("first_offsets", "second_offsets") if ragged else (), "*i64"),
                **dict.fromkeys(LOSS_NUMBERS, "i64"),
                "logits": "*fp64" if dtype == "fp64" else "*fp32",
                "in_order": "*i8",
                "scale": "i32",
            },
            {**dict.fromkeys(() if ragged else ("first_offsets", "second_offsets")), **sizes(size, block)},
        )
        for dtype, ragged, size, block in CASES
    ],
    "spread_kernel": [
        Build(
            {
                "out": f"*{dtype}",
                "slopes": "*fp64" if dtype == "fp64" else "*fp32",
                **({"offsets": "*i64"} if ragged else {}),
                **dict.fromkeys(("steps", "length", "pairs"), "i64"),
                "scale": "i32",
            },
            {**({} if ragged else {"offsets": None}), **sizes(size, block)},
        )
        for dtype, ragged, size, block in CASES
    ],
}
