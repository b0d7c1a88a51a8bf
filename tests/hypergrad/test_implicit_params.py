"""What implicit_gradient accepts as parameters: modules, dtypes, memory layouts, shared tensors, modes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

import parl_core as parl

F64 = torch.float64
EXACT, EXACT_32 = parl.CG(rtol=1e-12), parl.CG(rtol=1e-5)


def modules(dtype=F64):
    """A weighting of samples (upper) for a ridge-regularised linear model (lower): the same numbers in every dtype."""
    torch.manual_seed(0)
    weighting, model = nn.Linear(3, 1).to(dtype), nn.Linear(3, 2).to(dtype)
    inputs, held_out = torch.randn(2, 12, 3).to(dtype)
    targets, wanted = torch.randn(2, 12, 2).to(dtype)

    def lower(up, low):
        weights = torch.sigmoid(functional_call(weighting, up, (inputs,)))
        error = functional_call(model, low, (inputs,)) - targets
        return (weights * error**2).mean() + 0.1 * sum((p**2).sum() for p in low.values())

    def upper(up, low):
        return ((functional_call(model, low, (held_out,)) - wanted) ** 2).mean() + 0.01 * (up["weight"] ** 2).sum()

    return weighting, model, upper, lower


def test_modules_are_their_dicts():
    weighting, model, upper, lower = modules()
    expected = parl.implicit_gradient(
        upper, lower, dict(weighting.named_parameters()), dict(model.named_parameters()), solver=EXACT
    )
    for up in (weighting, dict(weighting.named_parameters())):
        for low in (model, {name: p.detach() for name, p in model.named_parameters()}):
            result = parl.implicit_gradient(upper, lower, up, low, solver=EXACT)
            torch.testing.assert_close(result.total, expected.total, rtol=0, atol=0)
    assert expected.implicit.norm() > 1e-3
    expected.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in weighting.parameters()]), expected.total)
    assert all(p.grad is None for p in model.parameters())  # the lower level's own training is the caller's


def test_a_parameter_dict_is_a_module():
    y = nn.ParameterDict({"y": torch.ones(2, dtype=F64)})
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum(),
        lambda up, low: ((low["y"] - up["x"]) ** 2).sum(),
        {"x": torch.ones(2, dtype=F64)},
        y,
    )
    assert result.total.tolist() == [2, 2]


def test_a_frozen_parameter_of_a_module_is_a_constant():
    weighting, model, upper, lower = modules()
    weighting.bias.requires_grad_(False)
    model.bias.requires_grad_(False)

    def lower_rest(up, low):
        assert list(up) == ["weight"]
        assert list(low) == ["weight"]
        return lower(up, low)

    result = parl.implicit_gradient(upper, lower_rest, weighting, model, solver=EXACT)
    expected = parl.implicit_gradient(
        upper, lower, {"weight": weighting.weight}, {"weight": model.weight}, solver=EXACT
    )
    torch.testing.assert_close(result.total, expected.total)
    result.backward()
    assert weighting.bias.grad is None
    assert result.total.shape == (3,)
    with pytest.raises(ValueError, match=r"lower_params \(Linear\) has no parameter that requires a gradient"):
        parl.implicit_gradient(upper, lower, weighting, model.requires_grad_(False))


def test_a_frozen_entry_of_a_dict_is_an_unknown_that_backward_leaves_alone():
    frozen, free = torch.ones(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum(),
        lambda up, low: ((low["y"] - up["frozen"] - up["free"]) ** 2).sum(),
        {"frozen": frozen, "free": free},
        {"y": torch.full((2,), 2.0, dtype=F64)},
    )
    assert result.total.tolist() == [4, 4, 4, 4]
    result.backward()
    assert frozen.grad is None
    assert free.grad.tolist() == [4, 4]


class Tied(nn.Module):
    """y ↦ W W x, the same W in both layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False, dtype=F64)
        self.second = nn.Linear(2, 2, bias=False, dtype=F64)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_tied_weights_are_one_unknown():
    """F = ‖(W W) t‖², W* = X: dF/dX = the gradient of F at W = X, whichever way the tie is told."""
    torch.manual_seed(0)
    module, t = Tied(), torch.randn(2, dtype=F64)
    x = module.first.weight.detach().clone().requires_grad_()
    expected = torch.autograd.grad(((x @ (x @ t)) ** 2).sum(), x)[0].flatten()

    def lower(up, low):
        return ((low["first.weight"] - up["x"]) ** 2).sum()

    def upper(up, low):
        return (functional_call(module, low, (t,)) ** 2).sum()

    both = dict(module.named_parameters(remove_duplicate=False))
    assert len(both) == 2
    for params in (module, both):
        result = parl.implicit_gradient(upper, lower, {"x": x.detach()}, params, solver=EXACT)
        torch.testing.assert_close(result.total, expected)
        assert result.solution.value.shape == (4,)


def test_the_same_upper_tensor_under_two_names_is_one_unknown():
    x = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    result = parl.implicit_gradient(
        lambda up, low: (low["y"] ** 2).sum() + (up["a"] * up["b"]).sum(),
        lambda up, low: ((low["y"] - up["a"] - up["b"]) ** 2).sum(),
        {"a": x, "b": x},
        {"y": (2 * x).detach()},
    )
    torch.testing.assert_close(result.total, 2 * x.detach() + 8 * x.detach())
    result.backward()
    torch.testing.assert_close(x.grad, result.total)


def test_a_tensor_on_both_levels_is_refused():
    shared = nn.Linear(2, 2)
    upper = nn.ModuleDict({"encoder": shared, "head": nn.Linear(2, 1)})
    message = r"upper_params\['encoder.weight'\] and lower_params\['weight'\] are the same tensor"
    with pytest.raises(ValueError, match=message):
        parl.implicit_gradient(lambda u, v: v["weight"].sum(), lambda u, v: v["weight"].sum(), upper, shared)


def layouts():
    values = torch.arange(1.0, 7.0, dtype=F64)
    wide = torch.zeros(3, 8, dtype=F64)
    wide[:, ::4] = values.view(3, 2)
    interleaved = torch.zeros(30, dtype=F64).as_strided((3, 2), (2, 3))
    return {
        "transposed": values.view(2, 3).T,
        "strided": wide[:, ::4],
        "channels last": values.view(1, 1, 3, 2).repeat(1, 2, 1, 1).to(memory_format=torch.channels_last),
        "interleaved": interleaved.copy_(values.view(3, 2)),
        "scalar": torch.tensor(3.0, dtype=F64),
        "expanded ones": torch.ones(1, 1, dtype=F64).expand(1, 1),
    }


@pytest.mark.parametrize("name", layouts())
def test_any_memory_layout(name):
    """F = Σ k y², y* = x³: dF/dx = 6 k x⁵, in the order of the elements."""
    x = layouts()[name].requires_grad_()
    k = torch.arange(1.0, x.numel() + 1, dtype=F64).view(x.shape)
    result = parl.implicit_gradient(
        lambda up, low: (k * low["y"] ** 2).sum(),
        lambda up, low: ((low["y"] - up["x"] ** 3) ** 2).sum(),
        {"x": x},
        {"y": (x**3).detach()},
        solver=EXACT,
    )
    expected = 6 * k * x.detach() ** 5
    torch.testing.assert_close(result.total, expected.flatten())
    result.backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    "view",
    [torch.ones(3).expand(2, 3), torch.ones(2, 1).expand(2, 3), torch.ones(8).unfold(0, 3, 2)],
    ids=["expanded", "expanded columns", "sliding window"],
)
def test_elements_that_share_memory_are_refused(view):
    def loss(up, low):
        return (low["y"] ** 2).sum() + (up["x"] ** 2).sum()

    with pytest.raises(ValueError, match=r"lower_params\['y'\] must hold each element in memory of its own"):
        parl.implicit_gradient(loss, loss, {"x": torch.ones(1)}, {"y": view})
    with pytest.raises(ValueError, match=r"upper_params\['x'\] must hold each element in memory of its own"):
        parl.implicit_gradient(loss, loss, {"x": view}, {"y": torch.ones(1)})


@pytest.mark.parametrize("upper_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_level_keeps_its_dtype(upper_dtype, lower_dtype):
    weighting, model, upper, lower = modules()
    expected = parl.implicit_gradient(upper, lower, weighting, model, solver=EXACT)

    def widened(loss):
        return lambda u, v: loss({k: t.double() for k, t in u.items()}, {k: t.double() for k, t in v.items()})

    short = torch.bfloat16 in (upper_dtype, lower_dtype)
    solver = parl.CG(rtol=1e-2 if lower_dtype == torch.bfloat16 else 1e-5)
    up = {name: p.detach().to(upper_dtype).requires_grad_() for name, p in weighting.named_parameters()}
    low = {name: p.detach().to(lower_dtype) for name, p in model.named_parameters()}
    result = parl.implicit_gradient(widened(upper), widened(lower), up, low, solver=solver)
    assert result.solution.status is parl.Status.CONVERGED
    assert result.total.dtype == upper_dtype
    assert result.solution.value.dtype == torch.promote_types(lower_dtype, torch.float32)
    error = (result.implicit.double() - expected.implicit).norm() / expected.implicit.norm()
    assert error < (0.03 if short else 1e-4)
    result.backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in up.values()]), result.total)


@pytest.mark.parametrize(
    "solver",
    [
        parl.CG(rtol=0.02),
        parl.MINRES(rtol=0.02),
        parl.Neumann(rtol=0.02),
        parl.NystromPCG(3, rtol=0.02),
        parl.Dense(rtol=0.02),
    ],
    ids=["CG", "MINRES", "Neumann", "NystromPCG", "Dense"],
)
def test_every_solver_takes_bfloat16_modules(solver):
    weighting, model, upper, lower = modules()
    expected = parl.implicit_gradient(upper, lower, weighting, model, solver=EXACT)
    weighting, model, upper, lower = modules(torch.bfloat16)
    result = parl.implicit_gradient(upper, lower, weighting, model, solver=solver)
    again = parl.implicit_gradient(upper, lower, weighting, model, solver=solver, x0=result.solution.value)
    assert result.solution.status is again.solution.status is parl.Status.CONVERGED
    assert (result.implicit.double() - expected.implicit).norm() < 0.1 * expected.implicit.norm()


def test_autocast_costs_no_more_than_its_digits():
    weighting, model, upper, lower = modules(torch.float32)
    seen = []

    def primed(loss):
        def with_casts_made_under_no_grad(up, low):
            assert not torch.is_autocast_cache_enabled()  # newer torch would be right with it, older not
            with torch.no_grad():
                seen.append(functional_call(model, low, (torch.ones(1, 3),)).dtype)
                functional_call(weighting, up, (torch.ones(1, 3),))
            return loss(up, low)

        return with_casts_made_under_no_grad

    def solver(operator, rhs, x0=None):
        seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return parl.CG(rtol=1e-2)(operator, rhs, x0)

    expected = parl.implicit_gradient(upper, lower, weighting, model, solver=EXACT_32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = parl.implicit_gradient(primed(upper), primed(lower), weighting, model, solver=solver)
        assert torch.is_autocast_cache_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert result.solution.status is parl.Status.CONVERGED
    for term in ("direct", "implicit"):
        wanted = getattr(expected, term)
        assert (getattr(result, term) - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_modes_change_nothing(mode):
    weighting, model, upper, lower = modules()
    expected = parl.implicit_gradient(upper, lower, weighting, model)
    with mode():
        made_inside = {name: p.clone() for name, p in model.named_parameters()}
        for low in (model, made_inside):
            result = parl.implicit_gradient(upper, lower, weighting, low)
            torch.testing.assert_close(result.total, expected.total, rtol=0, atol=0)
            result.backward()
        warm = parl.implicit_gradient(upper, lower, weighting, model, x0=result.solution.value)
    assert warm.solution.iterations == 0
    torch.testing.assert_close(weighting.weight.grad.flatten(), 2 * expected.total[:3])


def test_a_good_problem_is_silent():
    weighting, model, upper, lower = modules()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parl.implicit_gradient(upper, lower, weighting, model)
