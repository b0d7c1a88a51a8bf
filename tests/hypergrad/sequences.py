"""Policies that see the history: a GRU, a transformer and a language model, small enough for dense derivatives."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import parl_core as parl

F64 = torch.float64


def padded(observations: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, L, do), and the trajectory and time of each step; a loop over trajectories, to be obvious."""
    lengths = offsets.diff().tolist()
    trajectory = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)], dtype=torch.int64)
    time = torch.tensor([t for length in lengths for t in range(length)], dtype=torch.int64)
    batch = observations.new_zeros(len(lengths), max(lengths), observations.shape[1])
    batch[trajectory, time] = observations
    return batch, trajectory, time


class GRUPolicy(nn.Module):
    """Gaussian of standard deviation 1 around a read-out of a GRU; offers log_prob alone."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(2, 3, batch_first=True)
        self.readout = nn.Linear(3, 1)

    def log_prob(self, observations, actions, offsets):
        batch, trajectory, time = padded(observations, offsets)
        mean = self.readout(self.recurrent(batch)[0])[trajectory, time]
        return torch.distributions.Normal(mean, 1.0).log_prob(actions).sum(-1)


class Attention(nn.Module):
    """One head of causal self-attention by plain matrix products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, inputs):
        query, key, value = self.project(inputs).chunk(3, dim=-1)
        length = inputs.shape[1]
        scores = query @ key.transpose(1, 2) / inputs.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        return inputs + scores.masked_fill(future, float("-inf")).softmax(-1) @ value


class TransformerPolicy(nn.Module):
    """Categorical over three actions, with the analytic Fisher matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.readout = nn.Linear(2, 4), Attention(4), nn.Linear(4, 3)

    def distribution_params(self, observations, offsets):
        batch, trajectory, time = padded(observations, offsets)
        return self.readout(torch.tanh(self.attend(torch.tanh(self.embed(batch)))))[trajectory, time]

    def params_fisher(self, params, tangent):
        probs = params.softmax(-1)
        return probs * tangent - probs * (probs * tangent).sum(-1, keepdim=True)

    def log_prob(self, observations, actions, offsets):
        logits = self.distribution_params(observations, offsets)
        return F.log_softmax(logits, -1).gather(1, actions[:, None]).squeeze(1)


class LanguageModel(nn.Module):
    """A causal transformer of two layers with learned positions; returns an object with `.logits` if asked to."""

    def __init__(self, vocabulary: int = 7, width: int = 3, longest: int = 12, as_object: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.as_object = as_object

    def forward(self, tokens):
        hidden = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        logits = self.head(hidden)
        return Output(logits) if self.as_object else logits


class Output:
    """What model libraries return."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class HistoryReward(nn.Module):
    """A reward that sees the trajectory so far: a GRU's read-out, or tokens looked up and summed over time."""

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 2) if vocabulary else None
        self.recurrent = nn.GRU(2, 2, batch_first=True)

    def forward(self, observations, actions, offsets):
        inputs = observations if self.table is None else self.table(actions)
        batch, trajectory, time = padded(inputs, offsets)
        return torch.tanh(self.recurrent(batch)[0][trajectory, time].sum(-1))


POLICIES = {
    "gru": GRUPolicy,
    "transformer": TransformerPolicy,
    "tokens": lambda: parl.policies.TokenPolicy(LanguageModel()),
    "tokens as object": lambda: parl.policies.TokenPolicy(LanguageModel(as_object=True)),
}


def sequence_policy(name: str) -> nn.Module:
    torch.manual_seed(0)
    return POLICIES[name]().to(F64)


def data(name: str, lengths, seed: int = 1, weights: Tensor | None = None) -> parl.Trajectories:
    """Random trajectories of these lengths in steps, of the kind that the policy takes."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    offsets = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    if name.startswith("tokens"):
        tokens = torch.randint(7, (total, 1), generator=generator)
        written = torch.randint(2, (total, 1), generator=generator)
        observations = torch.cat((tokens, written), dim=1)
        actions = torch.randint(7, (total,), generator=generator)
    else:
        observations = torch.randn(total, 2, generator=generator, dtype=F64)
        actions = (
            torch.randn(total, 1, generator=generator, dtype=F64)
            if name == "gru"
            else torch.randint(3, (total,), generator=generator)
        )
    return parl.Trajectories(observations, actions, offsets, weights=weights)


def as_function(module: nn.Module, trajectories: parl.Trajectories, method: str = "log_prob"):
    """A method of the module on these trajectories as a function of its flat parameters, and the parameters."""

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self):
            takes_offsets = "offsets" in inspect.signature(getattr(module, method)).parameters
            given = {"offsets": trajectories.offsets} if takes_offsets else {}
            if method != "distribution_params":
                given["actions"] = trajectories.actions
            return getattr(self.inner, method)(trajectories.observations, **given)

    named = dict(module.named_parameters())

    def call(theta):
        pieces = theta.split([p.numel() for p in named.values()])
        state = {f"inner.{n}": piece.view(p.shape) for (n, p), piece in zip(named.items(), pieces, strict=True)}
        return functional_call(Call(), state, ())

    return call, nn.utils.parameters_to_vector(named.values()).detach()
