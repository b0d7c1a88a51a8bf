"""preflight: every hazard is named where it sits, and clean modules come out clean."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import parl_core as parl
from parl_core.hypergrad import Severity, preflight

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
ACTIONS = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))


def kinds(report, severity: Severity | None = None) -> set[tuple[str, str]]:
    return {(f.kind, f.where) for f in report.findings if severity in (None, f.severity)}


def errors(report) -> set[tuple[str, str]]:
    return kinds(report, Severity.ERROR)


class Head(nn.Module):
    """tanh MLP with something after it: the smallest module with a hazard that only its code or a call shows."""

    def __init__(self, after=None):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x)).sum(-1)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OnceSquare(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class FusedNll(torch.autograd.Function):
    """Negative log-likelihood of class 0, with its gradient computed in forward, as fused kernels do."""

    @staticmethod
    def forward(ctx, logits):
        gradient = logits.softmax(-1)
        gradient[..., 0] -= 1
        ctx.save_for_backward(gradient)
        return -logits.log_softmax(-1)[..., :1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class DetachedBackward(Square):
    """A backward through NumPy, of which autograd knows nothing."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.detach().numpy())


class SmallTransformer(nn.Module):
    def __init__(self, math: bool):
        super().__init__()
        torch.manual_seed(4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.math = math

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        if self.math:
            with sdpa_kernel(SDPBackend.MATH):
                hidden = self.encoder(observations)
        else:
            hidden = self.encoder(observations)
        log_probs = self.head(hidden).log_softmax(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).sum((-1, -2))


# Clean modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy, actions",
    [
        (parl.policies.GaussianPolicy(4, 2, hidden=(8, 8)), ACTIONS),
        (parl.policies.GaussianPolicy(4, 2, hidden=(8,), log_std="global"), ACTIONS),
        (parl.policies.GaussianPolicy(4, 2, hidden=(8,), log_std=-1.0, activation="silu"), ACTIONS),
        (parl.policies.GaussianPolicy(4, 2, hidden=(8,), squash=True), ACTIONS.tanh()),
        (parl.policies.CategoricalPolicy(4, 3, hidden=(8,)), torch.tensor([0, 2, 1, 0, 1, 2])),
        (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1)), None),
        (nn.Linear(4, 2), None),
    ],
)
def test_clean_modules_have_no_finding(policy, actions):
    inputs = (X,) if actions is None else (X, actions)
    assert preflight(policy).findings == ()
    report = preflight(policy, *inputs)
    assert report.findings == () and report.called and report.ok, str(report)
    assert "nothing found" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reward_ensemble_is_ok_and_its_kinks_are_only_a_note(dtype):
    reward = parl.rewards.RewardEnsemble(4, 2, hidden=(16, 16)).to(dtype)
    assert preflight(reward).findings == ()
    report = preflight(reward, X.to(dtype), ACTIONS.to(dtype))
    assert report.ok and [(f.kind, f.severity) for f in report.findings] == [("non-smooth", Severity.NOTE)]


def test_math_attention_is_ok():
    tokens = torch.tensor([[0, 1, 2, 0, 1]] * 3)
    assert preflight(SmallTransformer(math=True), SEQUENCE, tokens).findings == ()
    assert preflight(SmallTransformer(math=True)).ok  # its own code restricts the kernel: only a warning
    with sdpa_kernel(SDPBackend.MATH):
        assert preflight(SmallTransformer(math=False)).findings == ()
        assert preflight(SmallTransformer(math=False), SEQUENCE, tokens).findings == ()


def test_a_differentiable_custom_function_passes_the_canary():
    module = Head(Square.apply)
    assert ("custom function", "") in kinds(preflight(module), Severity.WARNING)
    assert kinds(preflight(module, X)) == {("forward mode", "")}  # it has no jvp, which is only a note
    assert preflight(module, X).ok


def test_recurrent_policy_on_the_cpu_is_ok():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 4)

        def forward(self, x):
            return self.lstm(x)[0].sum((1, 2))

    report = preflight(Recurrent(), SEQUENCE)
    assert report.ok and kinds(report) == {("recurrent", "lstm")} | {
        k for k in kinds(report, Severity.NOTE) if k[0] == "forward mode"
    }


def test_non_checkpointed_and_non_reentrant_are_ok():
    assert preflight(Head(lambda y: checkpoint(torch.tanh, y, use_reentrant=False)), X).ok


# Hazards that the modules show -----------------------------------------------------------------------------------------


def module_with(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 1))


def frozen() -> nn.Module:
    return nn.Linear(4, 1).requires_grad_(False)


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    module = nn.Linear(4, 1)
    module.extra = parameter
    return module


@pytest.mark.parametrize(
    "module, kind, where",
    [
        (module_with(nn.Dropout(0.5)), "dropout", "1"),
        (module_with(nn.RReLU()), "dropout", "1"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), "dropout", ""),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "dropout", ""),
        (module_with(nn.BatchNorm1d(4)), "batch norm", "1"),
        (module_with(nn.BatchNorm1d(4, track_running_stats=False)).eval(), "batch norm", "1"),
        (nn.TransformerEncoderLayer(8, 2, 16).eval(), "attention", ""),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), "attention", "layers.1"),
        (module_with(nn.Hardsigmoid()), "no double backward", "1"),
        (nn.DataParallel(nn.Linear(4, 1)), "sharding", ""),
        (torch.compile(nn.Linear(4, 1)), "compiled", ""),
        (module_with(torch.compile(nn.Linear(4, 4))), "compiled", "1"),
        (torch.jit.trace(nn.Linear(4, 1), X), "scripted", ""),
        (module_with(torch.ao.quantization.FakeQuantize()), "quantised", "1"),
        (nn.Embedding(5, 4, sparse=True), "embedding", ""),
        (nn.Embedding(5, 4, max_norm=1.0), "embedding", ""),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), "parametrization", "parametrizations.weight.0"),
        (module_with(nn.utils.spectral_norm(nn.Linear(4, 4))), "parametrization", "1"),
        (frozen(), "frozen", ""),
        (with_parameter(nn.Parameter(torch.zeros(3, dtype=torch.complex64))), "parameters", "extra"),
        (with_parameter(nn.Parameter(torch.zeros(3, dtype=torch.float64))), "parameters", ""),
        (nn.Linear(4, 1, device="meta"), "parameters", "weight"),
        (nn.LazyLinear(1), "parameters", "weight"),
        (Head(OnceSquare.apply), "once-differentiable", ""),
    ],
)  # fmt: skip
def test_an_error_that_the_modules_show(module, kind, where):
    report = preflight(module)
    assert (kind, where) in errors(report), str(report)
    assert not report.ok and not report.called
    assert kind in str(report) and "error" in str(report)


@pytest.mark.parametrize(
    "module, kind, where",
    [
        (module_with(nn.ReLU(inplace=True)), "in-place", "1"),
        (with_parameter(nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)), "parameters", "extra"),
        (nn.Linear(4, 1, dtype=torch.bfloat16), "precision", "weight"),
        (nn.MultiheadAttention(8, 2), "attention", ""),
    ],
)
def test_a_warning_that_the_modules_show(module, kind, where):
    report = preflight(module)
    assert (kind, where) in kinds(report, Severity.WARNING), str(report)
    assert report.ok


def test_notes():
    module = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert kinds(preflight(module, X)) == {("parametrization", "")} and preflight(module, X).ok
    partly = nn.Sequential(nn.Linear(4, 4), frozen())
    assert kinds(preflight(partly, X)) == {("frozen", "")} and preflight(partly, X).ok


@pytest.mark.parametrize("layer", [nn.ReLU, nn.LeakyReLU, nn.SELU, nn.Hardtanh, nn.Hardswish, nn.Softshrink, nn.PReLU])
def test_kinks_are_named_and_matter_only_to_a_policy(layer):
    module = module_with(layer())
    assert kinds(preflight(module)) == {("non-smooth", "1")}
    assert kinds(preflight(module, X), Severity.NOTE) >= {("non-smooth", "1")}
    assert preflight(module, X).ok

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = module

        def log_prob(self, observations, actions):
            return self.network(observations).squeeze(-1)

    report = preflight(Policy(), X, ACTIONS)
    assert kinds(report, Severity.WARNING) == {("non-smooth", "network.1")} and report.ok
    assert "harmless with Fisher" in str(report)


@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("dim, fused", [(0, True), (1, True), (None, False)])
def test_fused_weight_norm_is_wrong_at_second_order(weight_norm, dim, fused):
    module = weight_norm(nn.Linear(4, 4), dim=dim)
    assert (("parametrization", "") in errors(preflight(module))) == fused
    if weight_norm is nn.utils.parametrizations.weight_norm:
        assert (("canary", "") in errors(preflight(module, X))) == fused


def test_kinks_within_a_step_do_not_alarm_the_canary():
    for seed in range(3):
        torch.manual_seed(seed)
        policy = parl.policies.GaussianPolicy(24, 6, hidden=(256, 256), activation="relu")
        assert preflight(policy, torch.randn(400, 24), torch.randn(400, 6)).ok


def test_eval_clears_dropout_and_batch_norm():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    assert errors(preflight(module, X)) == {("dropout", "1"), ("batch norm", "2"), ("random", "")}
    assert preflight(module.eval(), X).findings == ()


@pytest.fixture
def one_rank():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_wrappers(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    report = preflight(nn.parallel.DistributedDataParallel(nn.Linear(4, 1)), X)
    assert errors(report) == {("sharding", "")} and "gradients of gradients" in str(report) and not report.called
    sharded = module_with(nn.Linear(4, 4))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    report = preflight(sharded, X)
    assert {("sharding", ""), ("sharding", "0.weight")} <= errors(report) and "FSDP2" in str(report)
    assert not report.called


# Hazards that the code or a call shows ---------------------------------------------------------------------------------


class Attends(Head):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)[None, None]
        return F.scaled_dot_product_attention(y, y, y).sum((0, 1, 3))


def test_functional_attention_is_named_with_and_without_a_call():
    assert errors(preflight(Attends())) == {("attention", "")}
    assert {kind for kind, _ in errors(preflight(Attends(), X))} == {"attention", "no double backward"}


def test_a_transformer_layer_is_named_once():
    report = preflight(nn.TransformerEncoderLayer(8, 2, 16))
    assert [f.where for f in report.findings if f.kind == "attention"] == [""]


def test_a_call_with_dropout_does_not_clear_attention_for_eval_mode():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for module in (layer, copy.deepcopy(layer).eval()):
        assert "attention" in {kind for kind, _ in errors(preflight(module, SEQUENCE))}


def test_fused_attention_is_seen_where_it_ran():
    report = preflight(SmallTransformer(math=False), SEQUENCE, torch.zeros(3, 5, dtype=torch.int64))
    assert ("attention", "encoder.layers.0") in {(k, w.removesuffix(".self_attn")) for k, w in errors(report)}
    assert "sdpa_kernel(SDPBackend.MATH)" in str(report)


def fused(x):
    """Only reached through a plain function, as in most libraries."""
    return FusedNll.apply(x)


class Calls(Head):
    def forward(self, x: Tensor) -> Tensor:
        return fused(self.body(x)).sum(-1)


def test_a_fused_loss_is_caught_by_the_canary_and_suspected_without_one():
    assert ("custom function", "") in kinds(preflight(Calls()), Severity.WARNING)
    report = preflight(Calls(), X)
    assert errors(report) == {("canary", "")}, str(report)
    assert "finite differences of the gradient" in str(report) and "FusedNll" in str(report)


def test_the_canary_tells_a_plain_loss_from_a_fused_one():
    assert preflight(Head(lambda y: -y.log_softmax(-1)[..., :1]), X).findings == ()


def test_once_differentiable_is_named_by_a_call_too():
    report = preflight(Head(lambda y: OnceSquare.apply(y)), X)
    assert errors(report) == {("once-differentiable", "")} and "OnceSquare" in str(report)


def test_reentrant_checkpointing():
    class Reentrant(Head):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda y: torch.tanh(y) ** 2, self.body(x), use_reentrant=True).sum(-1)

    assert ("once-differentiable", "") in errors(preflight(Reentrant(), X))


@pytest.mark.parametrize(
    "after, words",
    [
        (lambda y: y + (y.round() - y).detach(), "not the derivative"),
        (lambda y: y * y.detach(), "not the derivative"),
        (DetachedBackward.apply, "J v by double backward is wrong"),
    ],
)
def test_gradients_that_are_not_what_they_seem(after, words):
    report = preflight(Head(after), X)
    assert {kind for kind, _ in errors(report)} == {"canary"} and words in str(report), str(report)


@pytest.mark.parametrize(
    "after, order, culprit",
    [
        (lambda y: (0 * y).norm(dim=-1, keepdim=True), "second", "Norm"),
        (lambda y: (y * 0).square().sum(-1, True).sqrt(), "first", "Sqrt"),
    ],
)
def test_nan_in_the_derivatives(after, order, culprit):
    report = preflight(Head(after), X)
    assert {kind for kind, _ in errors(report)} == {"non-finite"}, str(report)
    assert f"The {order} derivatives" in str(report) and culprit in str(report)


def test_double_backward_that_raises():
    assert {kind for kind, _ in errors(preflight(Head(F.hardsigmoid), X))} == {"no double backward"}


def test_randomness_and_state():
    assert errors(preflight(Head(lambda y: y + torch.randn_like(y)), X)) == {("random", "")}

    class Counts(Head):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return self.calls * self.body(x).sum(-1)

    report = preflight(Counts(), X)
    assert errors(report) == {("random", "")} and "state between calls" in str(report)


def test_functional_kinks_are_seen_in_the_module_that_makes_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return F.relu(self.linear(x))

    report = preflight(nn.Sequential(Block(), nn.Tanh(), nn.Linear(4, 1)), X)
    assert kinds(report) == {("non-smooth", "0")}


def test_a_call_that_fails_or_gives_nothing_to_differentiate():
    assert errors(preflight(Head(torch.tanh), X[:, :2])) == {("call", "")}
    assert errors(preflight(Head(torch.detach), X)) == {("no gradient", "")}
    assert errors(preflight(Head(lambda y: y / 0), X)) == {("non-finite", "")}


def test_a_module_that_computes_in_float32_inside_is_judged_by_that_precision():
    class Inside(Head):
        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.after(y.float()).to(y.dtype).sum(-1)

    assert preflight(Inside(torch.tanh).double(), X.double()).findings == ()
    assert ("canary", "") in errors(preflight(Inside(FusedNll.apply).double(), X.double()))
    half = preflight(Inside(lambda y: y.bfloat16().tanh()), X)
    assert half.ok and ("not checked", "") in kinds(half, Severity.WARNING)
    unjudged = preflight(Inside(lambda y: FusedNll.apply(y.bfloat16())), X)
    assert {("not checked", ""), ("custom function", "")} <= kinds(unjudged, Severity.WARNING)


def test_nothing_of_the_users_is_changed():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before, x = copy.deepcopy(module.state_dict()), X.clone()
    state = torch.get_rng_state()
    with torch.no_grad():
        report = preflight(module, x)
    assert report.called and torch.equal(torch.get_rng_state(), state) and torch.equal(x, X)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_module_that_cannot_be_copied_is_not_called():
    module = Head(torch.tanh)
    module.last = module(X)  # not a leaf: deepcopy refuses it
    report = preflight(module, X)
    assert kinds(report) == {("not checked", "")} and report.ok and not report.called
    assert "not called" in str(report)


def test_inside_inference_mode():
    with torch.inference_mode():
        assert preflight(Head(torch.tanh), X * 1.0).called


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got function"):
        preflight(lambda x: x)
    with pytest.raises(TypeError, match="no method 'log_probability'"):
        preflight(nn.Linear(2, 2), method="log_probability")
    policy = parl.policies.GaussianPolicy(4, 2, hidden=(8,))
    assert preflight(policy, X, method="distribution_params").findings == ()


def test_the_table_groups_equal_findings_and_puts_errors_first():
    layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(6)]
    text = str(preflight(nn.Sequential(*layers, nn.Dropout(0.1))))
    assert "0.1, 1.1, 2.1, 3.1 and 2 more" in text
    assert text.index("dropout") < text.index("non-smooth")
    mixed = preflight(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).requires_grad_(False))
    assert [f.severity for f in mixed.findings] == [Severity.ERROR, Severity.WARNING, Severity.NOTE]
    assert "1 error, 6 notes" in text and max(map(len, text.splitlines())) <= 120
