"""V-trace against the sum of products in its paper, in every kernel, and its special cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from parl_core.ops import VTrace, gae, td_lambda, vtrace
from tests.ops.ragged import LENGTHS, cpu_backends, doubles, offsets_of, pieces, random_values

SHORT = [4, 0, 1, 6]
NUMBERS = {"trace_lambda": 0.95, "rho_clip": 1.3, "c_clip": 1.1}


def paper(inputs, discount, lengths, *, trace_lambda, rho_clip, c_clip):
    """Equation 1 term by term, and section 4.2's advantage, in Python floats."""
    *steps, bootstrap = inputs
    targets, advantages = [], []
    for (log_ratios, r, v), last in zip(pieces(lengths, *steps), bootstrap.tolist(), strict=True):
        rho = [min(rho_clip, math.exp(x)) for x in log_ratios]
        c = [trace_lambda * min(c_clip, math.exp(x)) for x in log_ratios]
        value = [*v, last]
        errors = [rho[h] * (r[h] + discount * value[h + 1] - v[h]) for h in range(len(r))]
        fitted = [
            v[s] + sum(discount ** (t - s) * math.prod(c[s:t]) * errors[t] for t in range(s, len(r)))
            for s in range(len(r))
        ]
        after = [*fitted[1:], last]
        targets += fitted
        advantages += [rho[h] * (r[h] + discount * after[h] - v[h]) for h in range(len(r))]
    return doubles(targets), doubles(advantages)


def inputs(lengths, dtype=torch.float64, seed=0):
    """log_ratios, rewards, values (T,), bootstrap (N,)."""
    log_ratios, rewards, values = random_values(3, sum(lengths), dtype=dtype, seed=seed).unbind(0)
    return 0.5 * log_ratios, rewards, values, random_values(len(lengths), dtype=dtype, seed=seed + 1)


def run(tensors, discount, lengths, backend, **numbers):
    *steps, bootstrap = tensors
    return vtrace(*steps, discount, offsets_of(lengths), bootstrap=bootstrap, backend=backend, **numbers)


def assert_close(out, expected, tolerance=1e-12):
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_by_hand(kernel):
    """Ratios 2 and ½, clipped at 1: δ = (1·(1 + ½·4 − 2), ½·(3 + ½·2 − 4)) = (1, 0); c = (1, ½)."""
    log_ratios = torch.tensor([2.0, 0.5]).double().log()
    rewards, values = torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, 4.0]).double()
    out = vtrace(log_ratios, rewards, values, 0.5, bootstrap=torch.tensor([2.0]).double(), backend=kernel)
    assert isinstance(out, VTrace)
    assert_close(out, (doubles([3.0, 4.0]), doubles([1.0, 0.0])))


# float32: a hundred steps, whose products of ratios have relative errors of 1e-5.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize(
    "lengths", [x for k, x in LENGTHS.items() if k != "odd"] + [[63, 200, 1]], ids=lambda x: str(len(x))
)
def test_every_kernel_is_the_paper(kernel, lengths, dtype, tolerance):
    tensors = inputs(lengths, dtype)
    out = run(tensors, 0.9, lengths, kernel, **NUMBERS)
    assert out.targets.dtype == out.advantages.dtype == dtype
    assert_close(out, paper(tensors, 0.9, lengths, **NUMBERS), tolerance)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(
    lengths=st.lists(st.integers(0, 30), max_size=5),
    discount=st.floats(0, 1),
    trace_lambda=st.floats(0, 1),
    rho_clip=st.floats(0.1, 2),
    c_clip=st.one_of(st.floats(0.1, 2), st.just(math.inf)),
    seed=st.integers(0, 2**30),
)
def test_any_lengths_and_numbers(lengths, discount, seed, **numbers):
    tensors = inputs(lengths, seed=seed)
    expected = paper(tensors, discount, lengths, **numbers)
    scale = max([1.0, *(x.abs().max().item() for x in expected if len(x))])
    for name in cpu_backends():
        assert_close(run(tensors, discount, lengths, name, **numbers), expected, 1e-12 * scale)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (5, 3), (2, 70), (70,)])
def test_rows_are_trajectories(kernel, shape):
    steps = random_values(3, *shape).unbind(0)
    rows = shape[0] if len(shape) == 2 else 1
    bootstrap = random_values(rows)
    out = vtrace(*steps, 0.9, bootstrap=bootstrap, backend=kernel, **NUMBERS)
    flat = [x.reshape(-1) for x in steps]
    expected = paper((*flat, bootstrap), 0.9, [shape[-1]] * rows, **NUMBERS)
    assert out.targets.shape == out.advantages.shape == shape
    assert_close([x.reshape(-1) for x in out], expected)


def test_many_trajectories_on_threads(kernel):
    lengths = [0, 7, 9] * (40 if kernel == "triton" else 4200)  # the interpreter is slow
    tensors = inputs(lengths)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = run(tensors, 0.9, lengths, kernel, **NUMBERS)
    finally:
        torch.set_num_threads(threads)
    assert_close(out, paper(tensors, 0.9, lengths, **NUMBERS))


@pytest.mark.parametrize("trace_lambda", [1.0, 0.7])
def test_on_policy_the_targets_are_those_of_td_lambda(backend, trace_lambda):
    _, rewards, values, bootstrap = inputs(SHORT)
    on_policy = (torch.zeros_like(rewards), rewards, values, bootstrap)
    out = run(on_policy, 0.9, SHORT, backend, trace_lambda=trace_lambda)
    expected = td_lambda(rewards, values, 0.9, trace_lambda, offsets_of(SHORT), bootstrap=bootstrap)
    torch.testing.assert_close(out.targets, expected, rtol=1e-12, atol=1e-12)


def test_lambda_one_on_policy_advantages_are_target_minus_value(backend):
    _, rewards, values, bootstrap = inputs(SHORT)
    out = run((torch.zeros_like(rewards), rewards, values, bootstrap), 0.9, SHORT, backend)
    torch.testing.assert_close(out.advantages, out.targets - values, rtol=1e-12, atol=1e-12)


def test_actions_the_policy_never_takes_change_nothing(backend):
    _, rewards, values, bootstrap = inputs(SHORT)
    never = torch.full_like(rewards, -math.inf)
    out = run((never, rewards, values, bootstrap), 0.9, SHORT, backend)
    assert_close(out, (values, torch.zeros_like(values)), 0.0)


def test_without_clips_the_ratios_are_importance_weights(backend):
    """Targets of a whole return: V(s_0) + Σ_t γ^t (Π_{i<t} w_i) w_t δ_t, large ratios and all."""
    tensors = inputs([20])
    tensors = (8 * tensors[0], *tensors[1:])
    numbers = {"trace_lambda": 1.0, "rho_clip": math.inf, "c_clip": math.inf}
    out = run(tensors, 0.9, [20], backend, **numbers)
    for ours, theirs in zip(out, paper(tensors, 0.9, [20], **numbers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_in_its_trajectory(kernel, which):
    steps = [torch.zeros(110), torch.ones(110), torch.ones(110)]
    steps[which][60] = float("nan")
    out = vtrace(*steps, 0.9, torch.tensor([0, 40, 75, 110]), backend=kernel)
    step = torch.arange(110)
    reached = (step >= 40) & (step <= 60)
    assert torch.equal(out.targets.isnan(), reached)
    assert torch.equal(out.advantages.isnan(), reached)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    tensors = [x.to(dtype) for x in inputs([30])]
    exact = run([x.float() for x in tensors], 0.99, [30], None, **NUMBERS)
    tensors[0].requires_grad_()
    for out in (
        run([x.detach() for x in tensors], 0.99, [30], None, **NUMBERS),
        run(tensors, 0.99, [30], None, **NUMBERS),
    ):
        for found, expected in zip(out, exact, strict=True):
            torch.testing.assert_close(found.detach(), expected.to(dtype), rtol=0, atol=0)


class TestDerivatives:
    def test_gradcheck_twice(self, backend):
        # No ratio within 0.01 of a clip, where the derivative jumps.
        tensors = inputs(SHORT)
        for clip in (1.3, 1.1):
            assert (tensors[0].exp() - clip).abs().min() > 0.01
        tensors = [x.requires_grad_() for x in tensors]

        def correct(*tensors):
            return tuple(run(tensors, 0.9, SHORT, backend, **NUMBERS))

        assert gradcheck(correct, tensors, check_forward_ad=True)
        assert gradgradcheck(correct, tensors)

    @pytest.mark.parametrize("given", [True, False], ids=["offsets", "rows"])
    def test_followed_or_not_the_result_is_one(self, backend, given):
        """The fused kernel and the operations that autograd follows."""
        shape, offsets, number = ((11,), offsets_of(SHORT), 4) if given else ((3, 4), None, 3)
        log_ratios, rewards, values = random_values(3, *shape).unbind(0)
        bootstrap = random_values(number, seed=1)
        arguments = {"bootstrap": bootstrap, "backend": backend, **NUMBERS}
        fused = vtrace(log_ratios, rewards, values, 0.9, offsets, **arguments)
        followed = vtrace(log_ratios.clone().requires_grad_(), rewards, values, 0.9, offsets, **arguments)
        assert followed.targets.requires_grad and not fused.targets.requires_grad
        assert_close([x.detach() for x in followed], fused)

    def test_vmap(self, backend):
        log_ratios, rewards, values = random_values(3, 2, 11).unbind(0)
        bootstrap = random_values(2, 4, seed=1)

        def correct(*tensors):
            return tuple(run(tensors, 0.9, SHORT, backend, **NUMBERS))

        mapped = torch.func.vmap(correct)(log_ratios, rewards, values, bootstrap)
        for k in range(2):
            single = correct(log_ratios[k], rewards[k], values[k], bootstrap[k])
            assert_close([x[k] for x in mapped], single)

    def test_compiled(self):
        torch._dynamo.reset()
        tensors = inputs(SHORT)
        tensors[0].requires_grad_()

        def correct(*tensors):
            targets, advantages = run(tensors, 0.9, SHORT, None, **NUMBERS)
            return targets.sin() + advantages

        out = torch.compile(correct, fullgraph=True, backend="aot_eager")(*tensors)
        expected = correct(*tensors)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        ours, theirs = (torch.autograd.grad(x.sum(), tensors[0])[0] for x in (out, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


FOUR = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_ratios": 0.0}, TypeError, "log_ratios must be a Tensor, got float"),
        ({"log_ratios": FOUR[:3]}, ValueError, r"log_ratios must have the shape of rewards, \(4,\), got \(3,\)"),
        ({"values": FOUR.double()}, TypeError, "values must have the dtype of rewards"),
        ({"discount": -1}, ValueError, "discount must lie in"),
        ({"trace_lambda": 1.5}, ValueError, r"trace_lambda must lie in \[0, 1\], got 1.5"),
        ({"rho_clip": 0.0}, ValueError, "rho_clip must be positive, got 0.0"),
        ({"c_clip": math.nan}, ValueError, "c_clip must be positive, got nan"),
        ({"c_clip": torch.tensor(1.0)}, TypeError, "c_clip must be a number, got a Tensor"),
        ({"bootstrap": torch.zeros(3)}, ValueError, r"bootstrap must be of shape \(N,\) = \(1,\)"),
        ({"offsets": torch.tensor([0, 5])}, ValueError, "offsets must end at the number of steps, 4, got 5"),
    ],
)
@pytest.mark.parametrize("followed", [False, True])
def test_bad_arguments(arguments, error, message, followed):
    rewards = FOUR.clone().requires_grad_(followed)
    arguments = {"log_ratios": FOUR, "rewards": rewards, "values": FOUR, "discount": 0.9, **arguments}
    with pytest.raises(error, match=message):
        vtrace(**arguments)


def test_native_kernel_checks_its_tensors():
    native = pytest.importorskip("parl_core._native")

    def correct(log_ratios=FOUR, targets=None, advantages=None):
        outs = (torch.empty(4) if out is None else out for out in (targets, advantages))
        native.vtrace(log_ratios, FOUR, FOUR, None, None, *outs, 0.9, 1.0, 1.0, 1.0, 1)

    with pytest.raises(TypeError, match="log_ratios must have the dtype of rewards"):
        correct(log_ratios=FOUR.double())
    with pytest.raises(ValueError, match="targets must have as many elements as rewards, 4, got 3"):
        correct(targets=torch.empty(3))
    with pytest.raises(ValueError, match="advantages must have as many elements as rewards, 4, got 3"):
        correct(advantages=torch.empty(3))
    both = torch.empty(4)
    with pytest.raises(ValueError, match="advantages must not share memory with targets"):
        correct(targets=both, advantages=both)
    with pytest.raises(ValueError, match="targets must not share memory with rewards"):
        correct(targets=FOUR)
    with pytest.raises(TypeError, match="advantages must be on the CPU"):
        correct(advantages=torch.empty(4, device="meta"))


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 0, 2, 7])], ids=["one", "ragged"])
def test_batched_cotangents(offsets):
    steps = [torch.randn(7, dtype=torch.float64).requires_grad_() for _ in range(3)]
    for output in (*vtrace(*steps, 0.9, offsets), gae(*steps[1:], 0.9, 0.8, offsets)):
        wanted = steps[1:]
        found = torch.autograd.grad(output, wanted, torch.eye(7).double(), is_grads_batched=True, retain_graph=True)
        for number, cotangent in enumerate(torch.eye(7).double()):
            alone = torch.autograd.grad(output, wanted, cotangent, retain_graph=True)
            for part, other in zip(found, alone, strict=True):
                torch.testing.assert_close(part[number], other)
