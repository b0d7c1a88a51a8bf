"""Language models as policies: a step is a token position, and the action taken there is the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trajectories import Trajectories
from .categorical import categorical_fisher, categorical_log_prob


class TokenPolicy(nn.Module):
    """Any causal language model, for hypergradients of RLHF on text.

    A sequence of L tokens, a prompt and its completion, is a trajectory of L − 1 steps. Its observations are integers
    (T, 2): the token at the position, and 1 if the policy wrote the *next* token, 0 if that belongs to the prompt. Its
    actions (T,) are the next tokens. The environment wrote the prompt, so those steps have probability 1 under the
    policy: log-probability 0, no score, no Fisher information. `TokenPolicy.trajectories` makes such data. Time counts
    from the first token of the prompt, which matters only below a discount of 1.

    Sequences are padded at their end, where a causal model does not look. Fused attention has no second derivative: see
    `parl_core.preflight`.

    Args:
        model: model(tokens (B, L) int64) -> logits (B, L, V), or an object that holds them as `.logits`; the logits at
            a position are for the token after it, and depend on the tokens up to it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @staticmethod
    def trajectories(
        prompts: Sequence[Tensor], completions: Sequence[Tensor], weights: Tensor | None = None
    ) -> Trajectories:
        """The data of N prompts (l,) int64, not empty, and their completions (m,) int64; `weights` as in `Trajectories`.

        Raises:
            TypeError, ValueError: as many prompts as completions, all of them one-dimensional int64; an empty prompt.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"completions must be as many as prompts, {len(prompts)}, got {len(completions)}: one for each"
            )
        _check_prompts(prompts)
        for number, completion in enumerate(completions):
            _check_tokens(f"completions[{number}]", completion)
        if not prompts:
            none = torch.zeros(0, dtype=torch.int64)
            return Trajectories(none.reshape(0, 2), none, torch.zeros(1, dtype=torch.int64), weights=weights)
        observations, actions = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.cat((prompt, completion))
            written = torch.arange(1, len(tokens), device=tokens.device) >= len(prompt)
            observations.append(torch.stack((tokens[:-1], written.long()), dim=1))
            actions.append(tokens[1:])
        lengths = torch.tensor([0, *(len(a) for a in actions)], device=prompts[0].device)
        return Trajectories(torch.cat(observations), torch.cat(actions), lengths.cumsum(0), weights=weights)

    def log_prob(self, observations: Tensor, actions: Tensor, offsets: Tensor) -> Tensor:
        """(T, 2), (T,), (N+1,) -> (T,), natural logarithm of the probability; 0 where the prompt goes on."""
        _check_observations(observations)
        written = observations[:, 1].nonzero().squeeze(1)
        if not len(observations):  # nor perhaps a sequence to call the model on
            dtype = next((p.dtype for p in self.model.parameters()), torch.get_default_dtype())
            return torch.zeros(0, dtype=dtype, device=observations.device)
        # Rows are taken before the softmax, whose output is what autograd keeps: none for padding and prompts.
        chosen = categorical_log_prob(self._logits(observations, offsets, written), actions[written])
        return chosen.new_zeros(len(observations)).index_copy(0, written, chosen)

    def distribution_params(self, observations: Tensor, offsets: Tensor) -> Tensor:
        """(T, 2), (N+1,) -> (T, V): the logits, constant where the prompt goes on."""
        _check_observations(observations)
        every = torch.arange(len(observations), device=observations.device)
        return self._logits(observations, offsets, every).masked_fill(observations[:, 1:] == 0, 0.0)

    def params_fisher(self, params: Tensor, tangent: Tensor) -> Tensor:
        """The Fisher matrix of the logits, diag(p) − p pᵀ, times `tangent`; a tangent of the prompt's steps is zero."""
        return categorical_fisher(params, tangent)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        generator: torch.Generator | None = None,
        eos: int | None = None,
    ) -> list[Tensor]:
        """A completion (m,) int64 of each prompt (l,) int64, m ≤ `max_new_tokens`.

        One that draws the token `eos` ends with it. The model reads each sequence anew for every token.

        Raises:
            TypeError, ValueError: a prompt that is not one-dimensional int64, or is empty; `max_new_tokens` below 0.
        """
        _check_prompts(prompts)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if not prompts:
            return []
        starts = [len(prompt) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        tokens = F.pad(tokens, (0, max_new_tokens))  # (N, longest prompt + max_new_tokens)
        ends = torch.tensor(starts, device=tokens.device)
        active = torch.arange(len(prompts), device=tokens.device)
        for _ in range(max_new_tokens):
            here = ends[active]
            logits = self._call_model(tokens[active, : int(here.max())])
            last = logits[torch.arange(len(active), device=tokens.device), here - 1]
            drawn = torch.multinomial(F.softmax(last, dim=-1), 1, generator=generator).squeeze(1)
            tokens[active, here] = drawn
            ends[active] += 1
            if eos is not None:
                active = active[drawn != eos]
                if not len(active):
                    break
        return [row[start:end].clone() for row, start, end in zip(tokens, starts, ends.tolist(), strict=True)]

    def _logits(self, observations: Tensor, offsets: Tensor, steps: Tensor) -> Tensor:
        """(T, 2), (N+1,), (n,) -> (n, V): the logits at n of the steps, from one call on the padded sequences."""
        lengths = offsets.diff()
        count, longest = len(lengths), int(lengths.max())
        sequence = torch.repeat_interleave(lengths, output_size=len(observations))  # (T,)
        places = sequence * longest + torch.arange(len(observations), device=offsets.device) - offsets[sequence]
        tokens = observations.new_zeros(count * longest).index_copy(0, places, observations[:, 0])
        return self._call_model(tokens.reshape(count, longest)).flatten(0, 1)[places[steps]]

    def _call_model(self, tokens: Tensor) -> Tensor:
        output: Any = self.model(tokens)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model(tokens) must return logits of shape (B, L, V) = {(*tokens.shape, 'V')}, got {came}"
            )
        return logits


def _check_observations(observations: Tensor) -> None:
    if observations.dim() != 2 or observations.shape[1] != 2 or observations.is_floating_point():
        raise ValueError(
            "observations must be integers of shape (T, 2), the token and whether the policy wrote the next one, "
            f"got {observations.dtype} of shape {tuple(observations.shape)}"
        )


def _check_prompts(prompts: Sequence[Tensor]) -> None:
    for number, prompt in enumerate(prompts):
        _check_tokens(f"prompts[{number}]", prompt)
        if not len(prompt):
            raise ValueError(f"prompts[{number}] must hold at least one token (such as the one that begins a text)")


def _check_tokens(name: str, tokens: object) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tokens).__name__}")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 tensor of shape (l,), got {tokens.dtype} of {tuple(tokens.shape)}")
