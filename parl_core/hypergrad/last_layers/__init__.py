"""An approximate inverse of a policy's curvature, made from the last two layers of its network.

Of A = Σ_t (hessian_t ∇² log π_t + fisher_t F(s_t)) + damping·I, for a perceptron whose output layer has the weights V and
the one before it W, biases included. Two things make it ill-conditioned on a sample of trajectories:

1. With c_t = hessian_t ∂ log π_t / ∂output and a_t the input of W, the second derivative Σ_t c_t ⊗ φ'(W a_t) ⊗ a_t couples
   each hidden unit's incoming weights to its own outgoing ones. Its mean is zero at an optimum, its noise is not: as many
   pairs of eigenvalues ±σ as V has entries.
2. Activations lie near a space of few dimensions, so the rest of A has few large eigenvalues. Their vectors lie near the
   span of the V = e ⊗ q, q the main directions of W's outputs φ, and of the W = d ⊗ p, p the main directions of a and d
   those that the outputs hear.

The approximation is exact on both, and damping·I elsewhere:

    Â = D + E (EᵀAE − EᵀDE) Eᵀ,    D = damping·I + 1.,    E an orthonormal basis of 2.

D is inverted unit by unit and Â by Woodbury's formula. All it takes are products with the activations, of about the price of
one product with A. How close Â is to A decides about iterations only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..captured import CapturedPolicy
from ..native_linearize import mlp_policy
from ..solvers import Preconditioner
from .approximation import HEARD, RANK, Basis, Units, correction, inverse
from .network import Layers, head_derivatives, read_layers


@torch.no_grad()
def last_layers_preconditioner(
    policy: CapturedPolicy,
    observations: Tensor,
    actions: Tensor,
    *,
    hessian: Tensor | None,
    fisher: Tensor | None,
    damping: float,
    max_cost: float = float("inf"),
) -> Preconditioner | None:
    """An approximate inverse of Σ_t (hessian_t ∇² log π_t + fisher_t F(s_t)) + damping·I.

    Args:
        policy: it serves `GaussianPolicy` and `CategoricalPolicy` with a hidden layer, themselves and not subclasses.
        observations, actions: of the steps.
        hessian, fisher: (T,) weights; None for none.
        damping: positive.
        max_cost: in gradients of the policy's log-probabilities.

    Returns:
        None for a policy that the compiled kernels do not serve either, no damping, no steps, or what would cost more.
    """
    try:
        mlp = mlp_policy(policy)
    except ValueError:
        return None
    if damping <= 0 or not len(observations) or len(mlp.widths) < 3:
        return None
    params = {name: p.detach() for name, p in zip(policy.names, policy.params, strict=True)}
    layers = read_layers(mlp, params, observations)
    cost = _cost(params, layers)
    if cost > max_cost:
        return None
    basis = Basis.of(layers)
    head = head_derivatives(mlp, layers, {**policy.buffers, **params}.get("log_std"), actions, hessian, fisher)
    units = Units.of(layers, basis, head, damping)
    return Preconditioner(inverse(layers, basis, units, correction(layers, basis, head, units)), cost)


def _cost(params: dict[str, Tensor], layers: Layers) -> float:
    """In gradients of the policy's log-probabilities, by the products with the activations and the n × n matrices."""
    (steps, h), i, k = layers.hidden.shape, layers.inputs.shape[1], len(layers.weight)
    p, q, d = min(i, RANK), min(h + 1, RANK), min(k, h, HEARD)
    n = k * q + d * p
    forward = sum(value.numel() for value in params.values())
    directions = 5 * (i * p + h * q)
    by_unit = h * (k * p + k * d + q * d + d * d)
    return (forward + directions + by_unit + n * n + 4 * n**3 / steps) / (3 * forward)
