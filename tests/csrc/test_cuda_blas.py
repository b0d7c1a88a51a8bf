"""The calls of cuBLAS, against a stand-in for it: which library is taken, and what it is asked for."""

import ctypes
import importlib.util
import os
from pathlib import Path

import pytest
import torch

CASES = [("", False), ("", True), ("right", False), ("left", False), ("left", True)]
"""Which factor is transposed, and whether the product is added to what is there."""


@pytest.fixture(scope="module")
def libraries():
    """Two versions of the stand-in, as two versions of cuBLAS may be in one process."""
    if (path := os.environ.get("PARL_CUDA_EMULATED")) is None:
        pytest.skip("the CUDA kernels are not built for the CPU; do that with: make emulated")
    return {version: ctypes.CDLL(str(Path(path).parent / f"libcublas.so.{version}")) for version in (998, 999)}


@pytest.fixture(scope="module")
def blas(libraries):
    path = next(Path(os.environ["PARL_CUDA_EMULATED"]).parent.glob("_blas*.so"))
    spec = importlib.util.spec_from_file_location("_blas", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="load_blas comes first"):
        multiply(module, "", torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(RuntimeError, match=r"cuBLAS was not found: libcublas\.so\.997"):
        module.load_blas("997.3")
    module.load_blas("998.1")
    return module


def multiply(blas, transposed, left, right, out, accumulate=False, allow_tf32=False):
    """out = left · right; those called `transposed` are stored so. Strides are the rows' own."""
    rows, inner = left.shape[::-1] if transposed == "left" else left.shape
    name = "multiply_float32" if out.dtype == torch.float32 else "multiply_float64"
    places = [(matrix.data_ptr(), matrix.stride(0)) for matrix in (left, right, out)]
    getattr(blas, name)(transposed, rows, out.shape[1], inner, *places, accumulate, allow_tf32)


def padded(generator, rows, columns, dtype):
    """Rows of a wider matrix."""
    return torch.randn(rows, columns + 3, generator=generator, dtype=dtype)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("transposed", "accumulate"), CASES)
def test_products_are_those_of_row_major_matrices(blas, transposed, accumulate, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, columns, inner = 3, 5, 4
    left = padded(generator, *((inner, rows) if transposed == "left" else (rows, inner)), dtype)
    right = padded(generator, *((columns, inner) if transposed == "right" else (inner, columns)), dtype)
    whole = torch.full((rows, columns + 2), torch.nan, dtype=dtype)
    out = whole[:, :columns]
    if accumulate:
        out.copy_(padded(generator, rows, columns, dtype))
    expected = (left.mT if transposed == "left" else left) @ (right.mT if transposed == "right" else right)
    expected = out + expected if accumulate else expected
    multiply(blas, transposed, left, right, out, accumulate)
    torch.testing.assert_close(out, expected)
    assert whole[:, columns:].isnan().all()


@pytest.mark.parametrize("allow_tf32", [False, True])
def test_tf32_is_used_where_it_is_allowed(blas, libraries, allow_tf32):
    multiply(blas, "", torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), allow_tf32=allow_tf32)
    assert libraries[998].parl_math_mode() == (3 if allow_tf32 else 0)


def test_the_library_is_that_of_torchs_cuda(blas, libraries):
    """And of no other version that is in the process too; what was loaded stays."""
    blas.load_blas("999.0")
    multiply(blas, "", torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    assert libraries[998].parl_products() > 0
    assert libraries[999].parl_products() == 0
