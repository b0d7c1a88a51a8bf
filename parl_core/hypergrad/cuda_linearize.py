"""The linearization of the package's own policies in CUDA C++: what `NativeChunk` is on the CPU.

The kernels (csrc/cuda/mlp_linearization.h) only launch: memory comes from torch's allocator here, and nothing that is on
the GPU is read by the host. So a product can be captured in a CUDA graph, once one of its kind has been taken before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.accelerators import cuda_library, cuda_stream
from .chunk_graphs import is_unchanged
from .native_linearize import NativeChunk


class CudaChunk(NativeChunk):
    """`NativeChunk` on a GPU, computing on the stream that is current at each product.

    All products of one linearization compute in the same memory, so they belong on one stream, or on streams that wait for
    each other. An operator is kept for weights as `ChunkGraphs` keeps a graph on a GPU: their place in memory and its
    version tell whether they are the same.

    Memory: as on the CPU, with the tangents of the activations beside them and 32 MiB for cuBLAS.
    """

    max_layers = 16

    def _linearize(self, *arguments: Any) -> Any:
        allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return cuda_library().linearize_mlp(*arguments, allow_tf32, self._like.new_empty, self._where())

    def _log_prob(self, out: Tensor) -> None:
        self._native.log_prob(out, self._where())

    def _curvature(self, *arguments: Any) -> Any:
        return self._native.curvature(*arguments, self._like.new_empty, self._where())

    def _where(self) -> int:
        return cuda_stream(self._like)

    def _remember(self, weights: Tensor | None) -> tuple[Tensor, int] | None:
        return None if weights is None or weights.is_inference() else (weights, weights._version)

    def _is_remembered(self, kept: Any, weights: Tensor | None) -> bool:
        if weights is None or kept is None:
            return weights is None
        tensor, version = kept
        return is_unchanged(tensor, version, weights)


def cuda_chunk() -> type[CudaChunk]:
    """`CudaChunk`, if the kernels and cuBLAS are there.

    Raises:
        ImportError, RuntimeError: one of them is not; the message says which.
    """
    cuda_library().load_blas(torch.version.cuda or "")
    return CudaChunk
