"""Policies that draw at random, or that write into their buffers: refused, or the same function at every call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import parl_core as parl
from parl_core.hypergrad.captured import CapturedPolicy
from parl_core.hypergrad.modules import chunks
from tests.hypergrad.sequences import LanguageModel

F64 = torch.float64


class Net(nn.Module):
    """Categorical over two actions by a network with something between its layers."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 8), between or nn.Identity(), nn.Tanh(), nn.Linear(8, 2))

    def log_prob(self, observations, actions):
        return self.network(observations).log_softmax(-1).gather(1, actions[:, None]).squeeze(1)


class RunningMean(nn.Module):
    """Subtracts a mean that each call in train mode moves, in place or by putting another tensor in its buffer."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs):
        if self.training and self.in_place:
            self.mean.add_(0.1)
        elif self.training:
            self.mean = self.mean + 0.1
        return inputs - self.mean


def spectral(old: bool) -> nn.Module:
    register = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    return register(nn.Linear(8, 8))


DRIFTING = {
    "in place": lambda: RunningMean(True),
    "assigned": lambda: RunningMean(False),
    "spectral norm": lambda: spectral(False),
    "spectral norm, by hooks": lambda: spectral(True),
}


def data(lengths=(5, 0, 9, 2, 4)):
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    return parl.Trajectories(
        torch.randn(total, 3, dtype=F64, generator=generator),
        torch.randint(2, (total,), generator=generator),
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]),
    )


def built(between):
    torch.manual_seed(0)
    return Net(between).to(F64).train()


@pytest.mark.parametrize("chunk_steps", [None, 1, 6])
@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_dropout_in_train_mode_is_refused(rate, chunk_steps):
    """At .02 each pair of calls agrees on all 20 × 8 units with probability (.02² + .98²)^160 = .002; the seed is fixed."""
    policy = built(nn.Dropout(rate))
    with pytest.raises(ValueError, match=r"policy\.log_prob must give the same numbers .*call policy\.eval\(\)"):
        parl.linearize(policy, data(), chunk_steps=chunk_steps)
    parl.linearize(policy.eval(), data(), chunk_steps=chunk_steps)


def test_state_outside_buffers_is_refused():
    class Counting(Net):
        calls = 0

        def log_prob(self, observations, actions):
            self.calls += 1
            return super().log_prob(observations, actions) / self.calls

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="keeps state that each call changes"):
        parl.linearize(Counting().to(F64), data())


def test_a_long_prompt_does_not_hide_dropout():
    """Prompts have probability 1, whatever the model draws; the written tokens come last, in the second sequence."""

    class Dropped(LanguageModel):
        def forward(self, tokens):
            return nn.functional.dropout(super().forward(tokens), 0.3, self.training)

    torch.manual_seed(0)
    policy = parl.policies.TokenPolicy(Dropped(longest=120)).to(F64)
    tokens = torch.randint(7, (101,))
    nothing = tokens[:0]
    trajectories = policy.trajectories([tokens[:100], tokens[:90], tokens[:90]], [nothing, tokens[90:], nothing])
    with pytest.raises(ValueError, match="must give the same numbers"):
        parl.linearize(policy, trajectories)
    parl.linearize(policy.eval(), trajectories)


def test_the_check_looks_at_few_steps():
    seen = []

    class Watched(Net):
        def log_prob(self, observations, actions):
            seen.append((len(observations), torch.is_grad_enabled()))
            return super().log_prob(observations, actions) - observations[:, 0]

    torch.manual_seed(0)
    policy, trajectories = Watched().to(F64), data((400, 100))
    trajectories.observations[-1, 0] = 100.0  # the least probable step is the last
    parl.linearize(policy, trajectories)
    assert seen == [(500, True), (64, False), (64, False), (64, True)]
    seen.clear()
    parl.linearize(policy, trajectories, chunk_steps=50)
    assert seen == [(50, False)] * 12 + [(50, True)] + [(14, False)] * 2 + [(14, True)]


@pytest.mark.parametrize("chunk_steps", [None, 1, 6])
@pytest.mark.parametrize("kind", DRIFTING)
def test_every_call_sees_the_buffers_as_they_were(kind, chunk_steps):
    """Products against dense derivatives of the function that one call computes, in any order and number."""
    policy, trajectories = built(DRIFTING[kind]()), data()
    captured = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    params = {name: p.detach().clone() for name, p in policy.named_parameters()}
    theta = nn.utils.parameters_to_vector(params.values())

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy = policy

        def forward(self):
            return self.policy.log_prob(trajectories.observations, trajectories.actions)

    def log_prob(theta):
        pieces = theta.split([p.numel() for p in params.values()])
        state = {name: piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        state |= {name: buffer.clone() for name, buffer in captured.items()}
        return functional_call(Call(), {f"policy.{name}": t for name, t in state.items()}, ())

    dense = jacobian(log_prob, theta)
    w, v = torch.randn(len(dense), dtype=F64), torch.randn(len(theta), dtype=F64)
    second = hessian(lambda t: log_prob(t) @ w, theta)
    linear = parl.linearize(policy, trajectories, chunk_steps=chunk_steps)
    rows = (w[:, None] * dense).split(trajectories.lengths.tolist())
    for _ in range(2):
        torch.testing.assert_close(linear.jvp(v), dense @ v)
        torch.testing.assert_close(linear.vjp(w), dense.T @ w)
        torch.testing.assert_close(linear.hvp(w, v), second @ v)
        torch.testing.assert_close(linear.fisher_vp(w, v), dense.T @ (w * (dense @ v)))
        torch.testing.assert_close(linear.scores(w), torch.stack([piece.sum(0) for piece in rows]))
    for name, buffer in policy.named_buffers():
        assert torch.equal(buffer, captured[name])


def test_params_fisher_sees_the_buffers_as_they_were():
    class Annealed(parl.policies.CategoricalPolicy):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("scale", torch.ones(()))

        def params_fisher(self, params, tangent):
            self.scale.mul_(2)
            return super().params_fisher(params, tangent) * self.scale

    torch.manual_seed(0)
    linear = parl.linearize(Annealed().to(F64), data(), chunk_steps=6)
    w, v = torch.rand(20, dtype=F64), torch.randn(linear.num_params, dtype=F64)
    torch.testing.assert_close(linear.fisher_vp(w, v), linear.fisher_vp(w, v), rtol=0, atol=0)


def test_a_moved_policy_has_the_captured_buffers():
    policy, trajectories = CapturedPolicy(built(RunningMean(True))), data()
    chunk = next(chunks(trajectories, None, whole=False))
    moved = policy.at([p.detach() * 2 for p in policy.params])
    assert torch.equal(moved.log_prob(chunk), moved.log_prob(chunk))
    assert not torch.equal(moved.log_prob(chunk), policy.log_prob(chunk))
