"""The Triton kernels of categorical log-probabilities against float64, on each of their ways through a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from parl_core.kernels import triton_categorical as kernels

# As multiples of the largest element of the exact result; half precision rounds results to 8 bits, or 11.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INF = float("inf")
# NumPy, by which kernels are interpreted, tells of rows that hold no number.
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(params=["short", "long", "parts"])
def way(request, monkeypatch):
    """Rows within registers, one program to a row, or several to a row."""
    use(request.param, monkeypatch)
    return request.param


def use(way, monkeypatch):
    if way != "short":
        monkeypatch.setattr(kernels, "_SHORT_ROW", 0)
    monkeypatch.setattr(kernels, "_PROGRAMS", 1 if way == "long" else 10**6)
    monkeypatch.setattr(kernels, "_SHORTEST_PART", 256)


def example(rows, columns, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, tangent = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    weights = torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)
    actions = torch.randint(columns, (rows,), generator=generator)
    return logits.to(device), actions.to(device), tangent.to(device), weights.to(device)


def exact(logits, actions, tangent, weights):
    """In float64, from the definitions: value, log Σ eˣ, what is along the tangent, gradient, Fisher product."""
    logits, tangent, weights = logits.double().cpu(), tangent.double().cpu(), weights.double().cpu()
    row = torch.arange(len(logits))
    logsumexp = torch.logsumexp(logits, -1)
    p = torch.exp(logits - logsumexp[:, None])
    one = torch.zeros_like(p)
    one[row, actions.cpu()] = 1.0
    mean = (p * tangent).sum(-1)
    return (
        logits[row, actions.cpu()] - logsumexp,
        logsumexp,
        tangent[row, actions.cpu()] - mean,
        weights[:, None] * (one - p),
        weights[:, None] * p * (tangent - mean[:, None]),
    )


def computed(logits, actions, tangent, weights):
    """The same by the kernels."""
    value, logsumexp = kernels.log_prob(logits, actions)
    along, image = kernels.fisher(logits, actions, tangent, weights)
    close(kernels.along(logits, actions, tangent), along.double().cpu(), logits.dtype)
    return value, logsumexp, along, kernels.gradient(logits, logsumexp, actions, weights), image


def close(ours, expected, dtype):
    assert ours.shape == expected.shape
    tolerance = TOLERANCE[dtype] * max(1.0, float(expected.abs().nan_to_num(0.0).max())) if expected.numel() else 0.0
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=0.0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_all_are_what_they_are_defined_to_be(way, dtype, device):
    for rows, columns in ((0, 7), (3, 1), (5, 63), (2, 1000), (1, 4099)):
        arguments = example(rows, columns, dtype, device)
        ours = computed(*arguments)
        assert [out.dtype for out in ours] == [dtype, torch.promote_types(dtype, torch.float32), *[dtype] * 3]
        for out, expected in zip(ours, exact(*arguments), strict=True):
            close(out, expected, dtype)


@pytest.mark.parametrize("columns", [255, 256, 257, 511, 513, 2047, 2049])
def test_boundaries_of_blocks_and_parts(way, columns, device):
    arguments = example(2, columns, torch.float32, device)
    for out, expected in zip(computed(*arguments), exact(*arguments), strict=True):
        close(out, expected, torch.float32)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 70), columns=st.integers(1, 700), seed=st.integers(0, 99), where=st.sampled_from("slp"))
def test_any_shape(device, rows, columns, seed, where):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use({"s": "short", "l": "long", "p": "parts"}[where], monkeypatch)
        arguments = example(min(rows, 4) if where != "s" else rows, columns, torch.float64, device, seed)
        for out, expected in zip(computed(*arguments), exact(*arguments), strict=True):
            close(out, expected, torch.float64)


def test_masked_tokens_have_no_probability_and_make_no_nan(way, device):
    logits, actions, tangent, weights = example(3, 700, torch.float32, device)
    logits[:, 5:600] = -INF  # whole blocks and parts, but for row 1
    logits[1, 300] = 1.0
    logits[2, 0] = 3000.0  # all others' probabilities underflow
    actions[:] = torch.tensor([2, 400, 0])
    ours = computed(logits, actions, tangent, weights)
    expected = exact(logits, actions, tangent, weights)
    assert ours[0][1] == -INF
    for number, (out, value) in enumerate(zip(ours, expected, strict=True)):
        kept = [0, 2] if number == 0 else [0, 1, 2]
        close(out[kept], value[kept], torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_nan_and_infinity_stay_in_their_row(way, bad, device):
    arguments = example(3, 600, torch.float32, device)
    expected = exact(*arguments)
    arguments[0][1, 599] = bad
    for out, value in zip(computed(*arguments), expected, strict=True):
        if out.dim() == 2 or bad != INF or out.dtype != torch.float32:
            assert out[1].isnan().all()
        close(out[[0, 2]], value[[0, 2]], torch.float32)


def test_a_row_of_masked_tokens_is_nan(way, device):
    logits, actions, tangent, weights = example(2, 300, torch.float32, device)
    logits[1] = -INF
    value, logsumexp, along, gradient, image = computed(logits, actions, tangent, weights)
    assert logsumexp[1] == -INF
    for out in (value, along, gradient, image):
        assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("action", [-1, 300, 2**40])
def test_an_action_out_of_range_is_nan_in_its_row(way, action, device):
    logits, actions, tangent, weights = example(3, 300, torch.float32, device)
    expected = exact(logits, actions, tangent, weights)
    actions[1] = action
    ours = computed(logits, actions, tangent, weights)
    for number, (out, value) in enumerate(zip(ours, expected, strict=True)):
        assert bool(out[1].isnan().all()) == (number in (0, 2, 3))
        close(out[[0, 2]], value[[0, 2]], torch.float32)


def test_without_actions_and_without_a_scale(way, device):
    logits, _, tangent, weights = example(3, 300, torch.float64, device)
    value, logsumexp = kernels.log_prob(logits, None)
    torch.testing.assert_close(value, -torch.logsumexp(logits, -1))
    p = logits.softmax(-1)
    mean = (p * tangent).sum(-1)
    along, image = kernels.fisher(logits, None, tangent, None)
    torch.testing.assert_close(along, -mean)
    torch.testing.assert_close(image, p * (tangent - mean[:, None]))
    torch.testing.assert_close(kernels.gradient(logits, logsumexp, None, weights), -weights[:, None] * p)


def test_rows_may_be_apart_and_columns_too(way, device):
    logits, actions, tangent, weights = example(3, 300, torch.float64, device)
    expected = computed(logits, actions, tangent, weights)
    wide = logits.new_full((3, 800), float("nan"))
    wide[:, 17:317] = logits
    expanded = tangent[:1].expand(3, 300)
    for x, t in ((wide[:, 17:317], tangent), (logits.T.contiguous().T, tangent.T.contiguous().T)):
        for out, value in zip(computed(x, actions, t, weights), expected, strict=True):
            close(out, value.cpu(), torch.float64)
            assert out.is_contiguous()
    of_expanded = kernels.fisher(logits, actions, expanded, weights)
    for out, value in zip(of_expanded, kernels.fisher(logits, actions, expanded.contiguous(), weights), strict=True):
        close(out, value.cpu(), torch.float64)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    logits = torch.zeros(9000, 262_144, dtype=torch.bfloat16, device=device)
    assert logits.numel() > 2**31
    actions = torch.full((9000,), 262_143, device=device)
    logits[-1, -1] = 20.0
    value, logsumexp = kernels.log_prob(logits, actions)
    last = torch.tensor([0.0, 20.0]).double() - torch.tensor([262_144.0, 262_143.0 + 4.851651954e8]).double().log()
    torch.testing.assert_close(value[[0, -1]].double().cpu(), last, rtol=1e-2, atol=1e-2)
    gradient = kernels.gradient(logits, logsumexp, actions, torch.ones(9000, dtype=torch.bfloat16, device=device))
    torch.testing.assert_close(gradient[-1, -1].double().cpu(), 1.0 - last[1].exp(), rtol=2e-2, atol=1e-6)
