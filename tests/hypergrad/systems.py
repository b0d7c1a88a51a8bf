"""Linear systems with a known spectrum, and the best that any method can do on them."""

from __future__ import annotations

import torch
from torch import Tensor

import parl_core as parl
from parl_core.hypergrad.solvers.system import System
from tests.host_reads import no_host_reads

F64 = torch.float64


def symmetric(eigenvalues: Tensor, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """A matrix (P, P) with these eigenvalues (P,) in a random basis, and a random right-hand side (P,)."""
    size = eigenvalues.shape[0]
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64))
    matrix = basis @ torch.diag(eigenvalues.to(F64)) @ basis.T
    return (0.5 * (matrix + matrix.T)).to(dtype), torch.randn(size, generator=generator, dtype=F64).to(dtype)


def spd(size: int = 20, condition: float = 100.0, seed: int = 0, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Eigenvalues from 1 to `condition`, evenly spaced in their logarithms."""
    top = torch.tensor(condition).log10().item()
    return symmetric(torch.logspace(0, top, size, dtype=F64), seed, dtype)


def solved_unseen(solver, operator, rhs: Tensor, x0: Tensor | None = None) -> parl.Solution:
    """By an iterative solver; the host reads nothing from the first product of the iterations to the last."""
    system = System(operator, rhs, x0)
    launch = solver.prepare(system)
    with no_host_reads():
        read = launch(system)
    return read()


def krylov_basis(matrix: Tensor, rhs: Tensor, steps: int) -> Tensor:
    """(P, steps) orthonormal basis of span{b, Ab, …, A^{steps−1} b}."""
    basis = (rhs / rhs.norm())[:, None]
    for _ in range(steps - 1):
        image = matrix @ basis[:, -1]
        for _ in range(2):  # orthogonalise twice: once is not enough in floating point
            image = image - basis @ (basis.T @ image)
        basis = torch.cat([basis, (image / image.norm())[:, None]], dim=1)
    return basis


class Counted:
    """v ↦ A v + damping·v, counting its products and remembering each vector it got.

    Its outer products are those of its eigenvectors, those of the eigenvalue 0 left out.
    """

    def __init__(self, matrix: Tensor, damping: float = 0.0) -> None:
        self.matrix, self.damping = matrix, damping
        self.vectors: list[Tensor] = []

    def __call__(self, vector: Tensor) -> Tensor:
        self.vectors.append(vector.clone())
        return self.matrix @ vector + self.damping * vector

    def outer_products(self) -> parl.OuterProducts:
        if not bool(torch.isfinite(self.matrix).all()):
            return parl.OuterProducts(self.matrix, torch.ones_like(self.matrix[0]), cost=0.0)
        values, vectors = torch.linalg.eigh(self.matrix.to(F64))
        kept = values.abs() > 1e-6 * values.abs().max() if values.numel() else values > 0
        dtype = self.matrix.dtype
        return parl.OuterProducts(vectors[:, kept].T.to(dtype), values[kept].to(dtype), cost=0.0)

    @property
    def products(self) -> int:
        return len(self.vectors)


class CountedBlocks(Counted):
    """The same with `block`; remembers the shape of each call's argument."""

    def __init__(self, matrix: Tensor, damping: float = 0.0) -> None:
        super().__init__(matrix, damping)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, vector: Tensor) -> Tensor:
        self.shapes.append(tuple(vector.shape))
        return super().__call__(vector)

    def block(self, vectors: Tensor) -> Tensor:
        self.shapes.append(tuple(vectors.shape))
        self.vectors.extend(vectors.clone())
        return vectors @ self.matrix + self.damping * vectors
