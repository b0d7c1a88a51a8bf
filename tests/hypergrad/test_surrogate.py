"""Hypergradient.surrogate() as a term of somebody else's loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parl_core as parl

F64 = torch.float64
NAN = float("nan")


def result_for(parameters, implicit=None, direct=100.0):
    """A result whose direct term would be noticed if it were used."""
    parameters = list(parameters)
    size = sum(p.numel() for p in parameters)
    if implicit is None:
        implicit = torch.arange(1.0, size + 1).to(parameters[0].dtype)
    solution = parl.CG()(lambda v: v, torch.ones(2))
    direct = torch.full_like(implicit, direct)
    return parl.Hypergradient(direct, implicit, torch.full_like(implicit, 7.0), solution, parameters)


def flat_grads(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


def test_value_zero_and_gradient_implicit_alone():
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=F64)
    result = result_for(model.parameters())
    value = result.surrogate()
    assert value.shape == ()
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(flat_grads(model.parameters()), result.implicit)


def test_a_loss_and_the_surrogate_give_the_total():
    torch.manual_seed(0)
    up = {"x": torch.randn(3, dtype=F64, requires_grad=True)}
    target = torch.randn(3, dtype=F64)

    def upper(u, v):
        return ((u["x"] * v["y"] - target) ** 2).sum()

    low = {"y": torch.randn(3, dtype=F64)}
    result = parl.implicit_gradient(upper, lambda u, v: ((v["y"] - u["x"] ** 2) ** 2).sum(), up, low)
    loss = upper(up, low)
    with_term = loss + result.surrogate()
    assert with_term.item() == loss.item()
    with_term.backward()
    torch.testing.assert_close(up["x"].grad, result.total)
    assert result.implicit.norm() > 0.1


def test_scaled_and_accumulated():
    p = torch.ones(3, requires_grad=True)
    result = result_for([p])
    for _ in range(4):
        (2.0**16 * (p.sum() + result.surrogate()) / 4).backward()
    assert torch.equal(p.grad, 2.0**16 * (1 + result.implicit))


@pytest.mark.parametrize("implicit", [torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN])], ids=["finite", "NaN"])
def test_a_gradient_scaler_unscales_it_and_skips_a_nan(implicit):
    p = torch.zeros(2, requires_grad=True)
    optimizer, scaler = torch.optim.SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale((p**2).sum() + result_for([p], implicit).surrogate()).backward()
    scaler.step(optimizer)
    scaler.update()
    finite = bool(implicit.isfinite().all())
    assert torch.equal(p.detach(), -implicit if finite else torch.zeros(2))
    assert scaler.get_scale() == (2.0**10 if finite else 2.0**9)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_so(bad):
    p, q = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    value = result_for([p, q], torch.tensor([1.0, bad, 3.0])).surrogate()
    assert value.isnan()
    value.backward()
    assert torch.equal(torch.isfinite(p.grad), torch.tensor([True, False]))
    assert torch.equal(torch.cat((p.grad[:1], q.grad)), torch.tensor([1.0, 3.0]))


def test_frozen_parameters_take_no_part():
    p, frozen, q = torch.ones(2, requires_grad=True), torch.ones(3), torch.ones((), requires_grad=True)
    result = result_for([p, frozen, q], torch.tensor([1.0, 2.0, NAN, NAN, NAN, 6.0]))
    value = result.surrogate()
    value.backward()
    assert value.item() == 0.0
    assert frozen.grad is None
    assert p.grad.tolist() == [1, 2]
    assert q.grad.item() == 6
    none = result_for([frozen]).surrogate()
    assert none.item() == 0.0
    assert not none.requires_grad


def test_each_call_is_a_graph_of_its_own_and_outlives_a_step():
    p = torch.ones(2, requires_grad=True)
    result = result_for([p])
    first = result.surrogate()
    first.backward()
    second = result.surrogate()
    with torch.no_grad():
        p.add_(5.0)  # an optimiser's step between the call and its backward pass
    second.backward()
    assert torch.equal(p.grad, 2 * result.implicit)
    assert result.surrogate().item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype):
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=dtype)
    result = result_for(model.parameters(), torch.randn(8, dtype=dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(1, 3, dtype=dtype))
        value = result.surrogate()
    value.backward()
    assert value.item() == 0.0
    assert value.dtype == dtype
    assert torch.equal(flat_grads(model.parameters()), result.implicit)


def test_it_goes_on_to_what_the_parameters_were_computed_from():
    z = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum(),
        lambda up, low: ((low["y"] - up["x"]) ** 2).sum(),
        {"x": z**2},
        {"y": (z**2).detach()},
    )
    result.surrogate().backward()
    torch.testing.assert_close(z.grad, 4 * z.detach() ** 3)


def test_any_layout():
    p = torch.ones(2, 3).T.requires_grad_()
    result = result_for([p])
    result.surrogate().backward()
    assert torch.equal(p.grad.flatten(), result.implicit)


def test_under_no_grad_it_is_a_plain_zero():
    p = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        value = result_for([p]).surrogate()
    assert value.item() == 0.0
    assert not value.requires_grad
