"""What the kernels of kernels/triton_categorical.py are called with."""

from tests.kernels.offline import Build

BUILDS: dict[str, list[Build]] = {}
_SIZES = dict.fromkeys(("num_rows", "num_columns", "parts", "part_length", "blocks"), "i32")
_VALUE = dict.fromkeys(("tangent", "scale", "image")) | {"tangent_stride": 0}
_ALONG = dict.fromkeys(("scale", "image", "logsumexp"))
_FISHER = {"logsumexp": None}
_FISHER_ALONE = dict.fromkeys(("scale", "logsumexp", "actions"))


def _add(kernel, arguments, element, constants, num_warps):
    """A build with these tensors, strides and sizes, but for what `constants` leave out."""
    sums = "*fp64" if element == "fp64" else "*fp32"
    types = _SIZES | {
        "actions": "*i64",
        "logsumexp": sums,
        "sums": sums,
        "logits_stride": "i32",
        "tangent_stride": "i32",
    }
    given = {name: types.get(name, f"*{element}") for name in arguments.split() if name not in constants}
    names = arguments.split()
    kept = {name: value for name, value in constants.items() if name in names or name.isupper()}
    BUILDS.setdefault(kernel, []).append(Build(given, kept, num_warps))


_ROWS = "logits logits_stride tangent tangent_stride actions scale value logsumexp image"
_PARTS = "logits logits_stride tangent tangent_stride sums parts part_length num_columns"
_GRADIENT = "logits logits_stride logsumexp actions weights out num_rows num_columns"
_ALL = (_VALUE, _ALONG, _FISHER, _FISHER_ALONE)
for _element, _group, _every in (
    ("bf16", 8, _ALL),
    ("fp32", 4, _ALL),
    ("fp16", 8, (_FISHER,)),
    ("fp64", 2, (_VALUE, _FISHER)),
):
    for _asked in _every:
        for _rows, _block, _warps in ((1, 8192, 32), (32 if _element == "fp64" else 64, 64, 8)):
            _constants = {**_asked, "ROWS": _rows, "BLOCK": _block}
            _add("_short_rows_kernel", f"{_ROWS} num_rows num_columns", _element, _constants, _warps)
        _constants = {**_asked, "GROUP": _group, "LANES": 512}
        _add("_long_row_kernel", f"{_ROWS} num_columns", _element, _constants, 8)
        if _asked in (_VALUE, _FISHER):
            _constants = {name: value for name, value in _constants.items() if name.isupper() or "tangent" in name}
            _add("_part_kernel", _PARTS, _element, _constants, 8)
        _constants = {**_asked, "PARTS": 64, "BLOCK": 4096}
        _add("_merge_kernel", f"{_ROWS} sums parts num_columns blocks", _element, _constants, 8)
    for _left_out, _rows, _block in (({}, 1, 4096), ({"actions": None}, 64, 64)):
        _add("_gradient_kernel", _GRADIENT, _element, {**_left_out, "ROWS": _rows, "BLOCK": _block}, 8)

# Triton compiles sizes and strides of 1 in as constants.
_ONES = {"num_rows": 1, "num_columns": 1, "logits_stride": 1}
_add("_short_rows_kernel", f"{_ROWS} num_rows num_columns", "fp32", {**_FISHER, **_ONES, "ROWS": 4096, "BLOCK": 1}, 8)
_add("_gradient_kernel", _GRADIENT, "fp32", {**_ONES, "ROWS": 4096, "BLOCK": 1}, 8)
_add(
    "_merge_kernel",
    f"{_ROWS} sums parts num_columns blocks",
    "fp32",
    {**_VALUE, "blocks": 1, "PARTS": 2, "BLOCK": 4096},
    8,
)
