"""The two parts that the approximation is exact on, and its inverse. What they are is said in `__init__.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .network import Head, Layers, with_ones

RANK = 28  # directions of each layer's activations
HEARD = 12  # directions of hidden units that the outputs hear, at most
_SAMPLE = 12  # steps for each direction to be found
_CLOSEST = 0.95  # how near to the damping a unit's coupling may come


class Basis(NamedTuple):
    """Orthonormal directions, and what they make of each step."""

    inputs: Tensor  # (i, p) of the layer before the output
    hidden: Tensor  # (h + 1, q) of the output layer
    heard: Tensor  # (h, d) of hidden units
    inputs_of: Tensor  # (T, p)
    hidden_of: Tensor  # (T, q)

    @staticmethod
    def of(layers: Layers) -> Basis:
        """The main directions of both layers' activations, and those in which the outputs hear the hidden units."""
        hidden = with_ones(layers.hidden)
        p, q = _main_directions(layers.inputs, RANK), _main_directions(hidden, RANK)
        heard = layers.slope.mean(0) * layers.weight  # (k, h)
        if len(heard) > HEARD:
            heard = torch.linalg.svd(heard, full_matrices=False)[2][:HEARD]
        return Basis(p, q, torch.linalg.qr(heard.T)[0], layers.inputs @ p, hidden @ q)


def _main_directions(rows: Tensor, rank: int) -> Tensor:
    """(T, n) -> (n, at most rank): an orthonormal basis, by two steps of subspace iteration (Halko et al., 2011).

    On a part of the rows: where they lie shows in a few, and the basis need not be exact.
    """
    size = rows.shape[1]
    if size <= rank:
        return torch.eye(size, dtype=rows.dtype, device=rows.device)
    rows = rows[:: -(-len(rows) // (_SAMPLE * rank))].contiguous()
    generator = torch.Generator(device=rows.device).manual_seed(0)
    basis = torch.randn(size, rank, generator=generator, dtype=rows.dtype, device=rows.device)
    for _ in range(2):
        basis = torch.linalg.qr(rows.T @ (rows @ basis))[0]
    return basis


class Units(NamedTuple):
    """D: damping·I and the coupling of each hidden unit's incoming weights, in the basis of the inputs, to its outgoing."""

    coupling: Tensor  # (h, k, p)
    inverse: Tensor  # (h, k + p, k + p) [[damping, coupling], [couplingᵀ, damping]]⁻¹
    damping: float

    @staticmethod
    def of(layers: Layers, basis: Basis, head: Head, damping: float) -> Units:
        """Σ_t φ'_t ⊗ c_t ⊗ α_t, shortened where D would not be positive definite."""
        steps, k = head.gradient.shape
        pairs = (head.gradient[:, :, None] * basis.inputs_of[:, None, :]).view(steps, -1)
        coupling = (layers.slope.T @ pairs).view(layers.slope.shape[1], k, -1)
        squares = coupling @ coupling.mT
        # ‖·‖₈ of the squares is their largest eigenvalue or up to k^(1/8) times that.
        scale = squares.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
        power = squares / torch.where(scale > 0, scale, 1.0)
        for _ in range(3):
            power = power @ power
        bound = scale * power.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None] ** 0.125
        shorter = ((_CLOSEST * damping) ** 2 / torch.where(bound > 0, bound, 1.0)).clamp_max(1.0)
        coupling = shorter.sqrt() * coupling
        eye = torch.eye(k, dtype=coupling.dtype, device=coupling.device)
        schur = torch.linalg.inv(damping * eye - shorter * squares / damping)
        across = -(schur @ coupling) / damping
        inner = torch.eye(coupling.shape[2], dtype=coupling.dtype, device=coupling.device) / damping
        inner = inner - coupling.mT @ across / damping
        inverse = torch.cat((torch.cat((schur, across), 2), torch.cat((across.mT, inner), 2)), 1)
        return Units(coupling, inverse, damping)


def correction(layers: Layers, basis: Basis, head: Head, units: Units) -> Tensor:
    """(n, n) S, symmetric, with Â⁻¹ = D⁻¹ + D⁻¹ E S Eᵀ D⁻¹ for the basis E of free, output and hidden directions.

    With Δ = EᵀAE − EᵀDE and G = EᵀD⁻¹E that is S = (G + G Δ G)⁻¹ − G⁻¹.
    """
    difference = _restricted(layers, basis, head, units)
    gram = _inverse_restricted(basis, units, len(difference))
    factor = torch.linalg.cholesky(gram)
    whole, failed = torch.linalg.cholesky_ex(gram + gram @ difference @ gram)
    if not failed:
        return torch.cholesky_inverse(whole) - torch.cholesky_inverse(factor)
    # A is indefinite there, or Â is: the same with the sizes of the eigenvalues, so that the inverse is definite.
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    values, vectors = torch.linalg.eigh(eye + factor.T @ difference @ factor)
    left = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    return (left * (1.0 / values.abs().clamp_min(1e-2) - 1.0)) @ left.T


def _restricted(layers: Layers, basis: Basis, head: Head, units: Units) -> Tensor:
    """EᵀAE − EᵀDE, (n, n), without the damping, which both hold."""
    steps, k = head.gradient.shape
    free = head.curvature.shape[1] - k
    (p, q, d) = (basis.inputs.shape[1], basis.hidden.shape[1], basis.heard.shape[1])
    alpha, beta = basis.inputs_of, basis.hidden_of
    # How the outputs move with the hidden units' inputs, how the hidden directions do, and how that changes:
    psi = (layers.slope @ _products(layers.weight.T, basis.heard)).view(steps, k, d)
    slopes = layers.slope @ _products(basis.hidden[:-1], basis.heard)  # (T, q·d)
    bends = ((head.gradient @ layers.weight) * layers.bend) @ _products(basis.heard, basis.heard)  # (T, d·d)

    own, mixed = head.curvature[:, :k, :k], head.curvature[:, k:, :k]
    pushed = own @ psi  # (T, k, d)
    alpha_alpha, beta_beta = _products(alpha, alpha), _products(beta, beta)
    out_out = (own.reshape(steps, -1).T @ beta_beta).view(k, k, q, q).transpose(1, 2).reshape(k * q, k * q)
    out_hid = (pushed.reshape(steps, -1).T @ _products(beta, alpha)).view(k, d, q, p).transpose(1, 2)
    bent = slopes.T @ _products(head.gradient, alpha)  # (q·d, k·p)
    out_hid = out_hid + bent.view(q, d, k, p).permute(2, 0, 1, 3)
    hid_hid = (psi.mT @ pushed).reshape(steps, -1) + bends
    hid_hid = (hid_hid.T @ alpha_alpha).view(d, d, p, p).transpose(1, 2).reshape(d * p, d * p)
    of_units = units.coupling.reshape(len(units.coupling), -1).T @ _products(
        basis.hidden[:-1], basis.heard
    )  # (k·p, q·d)
    out_hid = out_hid - of_units.view(k, p, q, d).permute(0, 2, 3, 1)
    out_hid = out_hid.reshape(k * q, d * p)
    if not free:
        return _symmetric(out_out, out_hid, hid_hid)
    free_out = (mixed.reshape(steps, -1).T @ beta).view(free, k * q)
    free_hid = ((mixed @ psi).reshape(steps, -1).T @ alpha).view(free, d * p)
    rest = _symmetric(out_out, out_hid, hid_hid)
    return _symmetric(head.curvature[:, k:, k:].sum(0), torch.cat((free_out, free_hid), 1), rest)


def _inverse_restricted(basis: Basis, units: Units, size: int) -> Tensor:
    """(n, n) EᵀD⁻¹E."""
    (p, q, d), damping = (basis.inputs.shape[1], basis.hidden.shape[1], basis.heard.shape[1]), units.damping
    k = units.coupling.shape[1]
    on_hidden, on_bias = basis.hidden[:-1], basis.hidden[-1]
    schur, across, inner = units.inverse[:, :k, :k], units.inverse[:, :k, k:], units.inverse[:, k:, k:]
    out_out = _over_units(schur, on_hidden, on_hidden).transpose(1, 2)
    eye = torch.eye(k, dtype=out_out.dtype, device=out_out.device) / damping
    out_out = out_out + eye[:, None, :, None] * torch.outer(on_bias, on_bias)[None, :, None, :]
    out_hid = _over_units(across, on_hidden, basis.heard).permute(0, 2, 3, 1)
    hid_hid = _over_units(inner, basis.heard, basis.heard).permute(2, 0, 3, 1)
    rest = _symmetric(out_out.reshape(k * q, k * q), out_hid.reshape(k * q, d * p), hid_hid.reshape(d * p, d * p))
    free = torch.eye(size - len(rest), dtype=rest.dtype, device=rest.device) / damping
    return torch.block_diag(free, rest) if len(free) else rest


def _over_units(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(h, a, b), (h, m), (h, n) -> (a, b, m, n): Σ_j blocks_j ⊗ left_j ⊗ right_j."""
    sums = blocks.reshape(len(blocks), -1).T @ _products(left, right)
    return sums.view(*blocks.shape[1:], left.shape[1], right.shape[1])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """(T, a), (T, b) -> (T, a·b): the outer product of each pair of rows."""
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def _symmetric(corner: Tensor, side: Tensor, rest: Tensor) -> Tensor:
    """[[corner, side], [sideᵀ, rest]]."""
    return torch.cat((torch.cat((corner, side), 1), torch.cat((side.T, rest), 1)), 0)


def inverse(layers: Layers, basis: Basis, units: Units, matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Â⁻¹ on (…, P), for the `matrix` of `correction`."""
    before, last = layers.names
    k, h = layers.weight.shape
    places = [layers.places[f"{name}.{kind}"] for name in (before, last) for kind in ("weight", "bias")]
    incoming, incoming_bias, outgoing, outgoing_bias = places
    free = layers.places[layers.free] if layers.free else slice(0, 0)
    q, p, d = basis.hidden.shape[1], basis.inputs.shape[1], basis.heard.shape[1]
    sizes = (free.stop - free.start, k * q, d * p)
    damping = units.damping

    def one(residual: Tensor) -> Tensor:
        result = residual / damping
        rows = torch.cat((residual[incoming].view(h, -1), residual[incoming_bias][:, None]), 1) @ basis.inputs
        first = torch.cat((residual[outgoing].view(k, h).T, rows), 1)  # (h, k + p)
        image = (units.inverse @ first[:, :, None]).squeeze(-1)
        bias = torch.cat((image[:, :k].T, result[outgoing_bias][:, None]), 1)
        along = torch.cat((result[free], (bias @ basis.hidden).reshape(-1), (basis.heard.T @ image[:, k:]).reshape(-1)))
        on_free, on_out, on_hid = (matrix @ along).split(sizes)
        spread = on_out.view(k, q) @ basis.hidden.T  # (k, h + 1)
        second = torch.cat((spread[:, :h].T, basis.heard @ on_hid.view(d, p)), 1)
        image = image + (units.inverse @ second[:, :, None]).squeeze(-1)
        result[free] += on_free / damping
        result[outgoing_bias] += spread[:, h] / damping
        result[outgoing] = image[:, :k].T.reshape(-1)
        change = (image[:, k:] - rows / damping) @ basis.inputs.T
        result[incoming] += change[:, :-1].reshape(-1)
        result[incoming_bias] += change[:, -1]
        return result

    return lambda residual: one(residual) if residual.dim() == 1 else torch.stack([one(row) for row in residual])
