"""The native ensemble against its torch reference: rewards, gradients, second order, and when it steps aside."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from parl_core.models.rewards import RewardEnsemble
from parl_core.ops import backend
from parl_core.ops.ensemble_rewards import ensemble_rewards, reference
from parl_core.ops.registry import BackendError

native = pytest.importorskip("parl_core._native")


def random_case(
    members: int, sizes: list[int], rows: int, own: bool, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Inputs, weights and biases that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=dtype)).requires_grad_()

    weights = [normal(members, a, b, scale=a**-0.5) for a, b in itertools.pairwise(sizes)]
    biases = [normal(members, 1, b, scale=0.3) for b in sizes[1:]]
    inputs = normal(members, rows, sizes[0]) if own else normal(rows, sizes[0])
    return inputs, weights, biases


def rewards_and_gradients(case: tuple[Tensor, list[Tensor], list[Tensor]], name: str) -> list[Tensor]:
    inputs, weights, biases = case
    rewards = ensemble_rewards(inputs, weights, biases, backend=name)
    cotangents = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(9), dtype=rewards.dtype)
    return [rewards, *torch.autograd.grad(rewards, [inputs, *weights, *biases], cotangents)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within `tolerance` of each tensor's largest entry."""
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


# float32: sums of some thousand products.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("hidden", [(), (7,), (64, 64, 64), (33, 20)], ids=str)
def test_rewards_and_gradients_in_every_instruction_set(isa, threads, hidden, dtype, tolerance):
    for rows, own in [(1, False), (4, True), (5, False), (63, True), (1000, False), (700, True)]:
        case = random_case(3, [8, *hidden, 1], rows, own, dtype)
        found = rewards_and_gradients(case, "cpp")
        assert_all_close(found, rewards_and_gradients(case, "reference"), tolerance)
        with torch.no_grad():  # without a graph, the kernel without autograd
            assert_all_close([ensemble_rewards(*case, backend="cpp")], found[:1], 0.0)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    members=st.integers(1, 4),
    rows=st.integers(1, 300),
    own=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(sizes, members, rows, own, seed):
    case = random_case(members, [*sizes, 1], rows, own, torch.float64, seed)
    assert_all_close(rewards_and_gradients(case, "cpp"), rewards_and_gradients(case, "reference"), 1e-12)


def test_gradcheck_twice():
    inputs, weights, biases = random_case(2, [3, 4, 1], 5, False, torch.float64)

    def rewards(inputs, *params):
        return ensemble_rewards(inputs, params[:2], params[2:], backend="cpp")

    assert gradcheck(rewards, (inputs, *weights, *biases), check_forward_ad=True)
    assert gradgradcheck(rewards, (inputs, *weights, *biases))


def test_second_order_by_hand():
    """Canary: one member without a hidden layer is r = tanh(w·x + b), and r'' = −2 r (1 − r²) x xᵀ in w."""
    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    weight = torch.tensor([[[0.3], [0.2]]], dtype=torch.float64)
    bias = torch.tensor([[[0.1]]], dtype=torch.float64)
    r = torch.tanh(torch.tensor(0.5 * 0.3 - 0.2 + 0.1, dtype=torch.float64))
    expected = -2 * r * (1 - r * r) * torch.outer(x[0], x[0])
    hessian = torch.autograd.functional.hessian(lambda w: ensemble_rewards(x, [w], [bias]).sum(), weight)
    torch.testing.assert_close(hessian.reshape(2, 2), expected, rtol=1e-12, atol=1e-14)


def test_func_transforms_and_compile_agree_with_autograd():
    inputs, weights, biases = random_case(2, [3, 4, 1], 6, False, torch.float64)
    params = tuple(p.detach() for p in (*weights, *biases))

    def total(*params):
        return ensemble_rewards(inputs.detach(), params[:2], params[2:]).square().sum()

    expected = torch.autograd.grad(total(*weights, *biases), [*weights, *biases])
    for found in (
        torch.func.grad(total, argnums=(0, 1, 2, 3))(*params),
        torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2, 3)), (0, None, None, None))(
            params[0][None], *params[1:]
        ),
    ):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ensemble_rewards(x, weights, biases), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), reference(inputs, weights, biases), rtol=1e-12, atol=1e-12)


def test_bit_identical_for_a_thread_count_and_after_another_shape(threads):
    case = random_case(3, [8, 64, 64, 1], 3000, False, torch.float32)
    first = rewards_and_gradients(case, "cpp")
    rewards_and_gradients(random_case(2, [30, 17, 1], 50, True, torch.float32), "cpp")
    second = rewards_and_gradients(case, "cpp")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_nan_stays_in_its_row():
    inputs, weights, biases = random_case(2, [3, 20, 1], 40, False, torch.float32)
    with torch.no_grad():
        inputs[7, 1] = torch.nan
        rewards = ensemble_rewards(inputs, weights, biases, backend="cpp")
    assert rewards.isnan().nonzero().tolist() == [[0, 7], [1, 7]]


class TestModule:
    def test_the_backend_context_decides(self, monkeypatch):
        ensemble = RewardEnsemble(3, 2, (8,), 2)
        observations, actions = torch.randn(9, 3), torch.randn(9, 2)
        calls = []
        kernel = native.ensemble_forward
        monkeypatch.setattr(native, "ensemble_forward", lambda *arguments: (calls.append(1), kernel(*arguments))[1])
        ensemble(observations, actions)
        assert len(calls) == 1
        with backend("reference"):
            ensemble(observations, actions)
        assert len(calls) == 1

    def test_hooks_and_replaced_layers_are_honoured(self):
        ensemble = RewardEnsemble(3, 2, (8,), 2)
        observations, actions = torch.randn(9, 3), torch.randn(9, 2)
        plain = ensemble(observations, actions)
        handle = ensemble.layers[1].register_forward_hook(lambda module, inputs, output: output + 1)
        assert not torch.allclose(ensemble(observations, actions), plain)
        handle.remove()
        assert torch.equal(ensemble(observations, actions), plain)

        ensemble.layers[1] = torch.nn.Identity()  # a module of another kind: all eight values of the first layer
        assert ensemble.member_rewards(observations, actions).shape == (2, 9, 8)

    def test_no_rows_many_layers_and_half_precision_are_left_to_torch(self):
        assert RewardEnsemble(3, 2, (8,), 2)(torch.zeros(0, 3), torch.zeros(0, 2)).shape == (0,)
        deep = RewardEnsemble(3, 2, (4,) * 20, 2)
        assert deep(torch.zeros(5, 3), torch.zeros(5, 2)).shape == (5,)
        halves = RewardEnsemble(3, 2, (8,), 2).to(torch.bfloat16)
        rows = torch.zeros(5, 3).bfloat16(), torch.zeros(5, 2).bfloat16()
        assert halves(*rows).dtype == torch.bfloat16
        with backend("cpp"), pytest.raises(BackendError, match=r"not in torch\.bfloat16"):
            halves(*rows)

    def test_frozen_parameters_get_no_gradient(self):
        ensemble = RewardEnsemble(3, 2, (8,), 2)
        ensemble.layers[0].weight.requires_grad_(False)
        ensemble(torch.randn(9, 3), torch.randn(9, 2)).sum().backward()
        assert [p.grad is None for p in ensemble.parameters()] == [True, False, False, False]


def test_native_module_checks_its_tensors():
    _, weights, biases = random_case(2, [3, 4, 1], 5, False, torch.float32)

    def forward(**changes):
        good = {
            "members": 2, "weights": weights, "biases": biases, "widths": [3, 4, 1], "inputs": torch.zeros(5, 3),
            "rewards": torch.zeros(2, 5), "num_threads": 1,
        }  # fmt: skip
        native.ensemble_forward(**(good | changes))

    forward()
    for changes, error, message in [
        ({"members": 3}, ValueError, r"weights must be of shape \(3, 3, 4\), got"),
        ({"weights": [weights[0].mT.contiguous(), weights[1]]}, ValueError, r"weights must be of shape \(2, 3, 4\)"),
        ({"biases": [b[0] for b in biases]}, ValueError, r"biases must be of shape \(2, 1, 4\)"),
        ({"num_threads": 0}, ValueError, "num_threads must be 1 to 1024, got 0"),
        ({"members": 0}, ValueError, "members must be at least 1"),
        ({"biases": biases[:1]}, ValueError, "biases must be as many as weights"),
        ({"widths": [3, 4]}, ValueError, "widths must be one more than weights"),
        ({"widths": [3, 4, 2]}, ValueError, "widths must end in one output"),
        ({"weights": [w.double() for w in weights], "inputs": torch.zeros(5, 3)}, TypeError, "biases must be of dtype"),
        ({"inputs": torch.zeros(5, 4)}, ValueError, "inputs must have 30 elements, got 20"),
        ({"inputs": torch.zeros(5, 6)[:, ::2]}, ValueError, "inputs must be contiguous"),
        ({"inputs": torch.zeros(5, 3, dtype=torch.float64)}, TypeError, "inputs must be of dtype float32"),
        ({"rewards": torch.zeros(2, 5).long()}, TypeError, "rewards must be of dtype float32, got int64"),
    ]:
        with pytest.raises(error, match=message):
            forward(**changes)


def negated(tensor: Tensor) -> Tensor:
    """The same numbers in a tensor whose memory holds their negatives."""
    return torch._neg_view(-tensor)


def test_negative_views_are_resolved():
    case = random_case(2, [3, 4, 1], 6, False, torch.float64)
    inputs, weights, biases = case
    cotangents = torch.randn(2, 6, dtype=torch.float64)
    expected = reference(*case)
    by_all = torch.autograd.grad(expected, [inputs, *weights, *biases], cotangents)
    some = negated(inputs), [negated(w) for w in weights], [negated(b) for b in biases]
    assert_all_close([ensemble_rewards(*some, backend="cpp")], [expected], 1e-12)
    with torch.no_grad():
        assert_all_close([ensemble_rewards(*some, backend="cpp")], [expected], 1e-12)
    found = torch.autograd.grad(
        ensemble_rewards(*case, backend="cpp"), [inputs, *weights, *biases], negated(cotangents)
    )
    assert_all_close(list(found), list(by_all), 1e-12)


def test_batched_cotangents():
    case = random_case(2, [3, 4, 1], 6, False, torch.float64)
    inputs, weights, biases = case
    cotangents = torch.randn(5, 2, 6, dtype=torch.float64)
    wanted = [inputs, *weights, *biases]
    rewards = ensemble_rewards(*case, backend="cpp")
    found = torch.autograd.grad(rewards, wanted, cotangents, is_grads_batched=True, retain_graph=True)
    for number, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(rewards, wanted, cotangent, retain_graph=True)
        assert_all_close([part[number] for part in found], list(alone), 1e-12)


@pytest.mark.parametrize("name", [None, "reference"])
def test_arguments_that_do_not_fit_are_named(name):
    inputs, weights, biases = torch.zeros(4, 2), [torch.zeros(3, 2, 5), torch.zeros(3, 5, 1)], [torch.zeros(3, 1, 5)]
    biases.append(torch.zeros(3, 1, 1))
    for arguments, error, message in [
        ((inputs[0], weights, biases), ValueError, r"inputs must be of shape \(T, 2\) or \(3, T, 2\), .* got \(2,\)"),
        ((inputs.expand(1, 4, 2), weights, biases), ValueError, r"inputs must be .* got \(1, 4, 2\)"),
        ((inputs.long(), weights, biases), TypeError, "inputs must be of a floating-point dtype, got torch.int64"),
        ((inputs, [], []), ValueError, "at least one, got 0 and 0"),
        ((inputs, weights, biases[:1]), ValueError, "got 2 and 1"),
        ((inputs, [weights[0][0], weights[1]], biases), ValueError, r"weights\[0\] must be of shape \(members"),
        ((inputs, [weights[0], weights[0]], biases), ValueError, r"weights\[1\] must be of shape \(3, 5, 1\)"),
        ((inputs, weights, [b.squeeze(1) for b in biases]), ValueError, r"biases\[0\] must be of shape \(3, 1, 5\)"),
    ]:
        with pytest.raises(error, match=message):
            ensemble_rewards(*arguments, backend=name)
