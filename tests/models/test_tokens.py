"""TokenPolicy against all completions written out: probabilities, scores, Fisher matrices, samples."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import parl_core as parl
from parl_core.models.policies import TokenPolicy
from tests.hypergrad.sequences import F64, HistoryReward, LanguageModel, as_function

PROMPT = torch.tensor([2, 0])


def policy_of(vocabulary=3, **options) -> TokenPolicy:
    torch.manual_seed(0)
    return TokenPolicy(LanguageModel(vocabulary, **options)).to(F64)


def all_completions(vocabulary=3, length=3) -> list[torch.Tensor]:
    return [torch.tensor(tokens) for tokens in itertools.product(range(vocabulary), repeat=length)]


def probability(policy: TokenPolicy, prompt: torch.Tensor, completion: torch.Tensor) -> float:
    """Token by token, one call of the model each."""
    tokens, product = prompt, 1.0
    for token in completion:
        product *= float(policy.model(tokens[None])[0, -1].softmax(-1)[token].detach())
        tokens = torch.cat((tokens, token[None]))
    return product


def test_steps_by_hand():
    prompts = [torch.tensor([5, 6]), torch.tensor([4]), torch.tensor([3])]
    completions = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64), torch.tensor([0])]
    trajectories = TokenPolicy.trajectories(prompts, completions)
    assert trajectories.observations.tolist() == [[5, 0], [6, 1], [1, 1], [3, 1]]
    assert trajectories.actions.tolist() == [6, 1, 2, 0]
    assert trajectories.offsets.tolist() == [0, 3, 3, 4]
    assert trajectories.is_sample
    weighted = TokenPolicy.trajectories(prompts, completions, torch.tensor([0.5, 0.2, 0.3], dtype=F64))
    assert weighted.weights.tolist() == [0.5, 0.2, 0.3]
    assert TokenPolicy.trajectories([], []).num_trajectories == 0


def test_log_probabilities_of_ragged_sequences():
    policy = policy_of(7)
    prompts = [torch.tensor([5, 6]), torch.tensor([4]), torch.tensor([3]), torch.tensor([1, 1, 1])]
    completions = [
        torch.tensor([1, 2, 6, 6]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([2]),
    ]
    trajectories = TokenPolicy.trajectories(prompts, completions)
    log_prob = policy.log_prob(trajectories.observations, trajectories.actions, trajectories.offsets)
    expected = [probability(policy, *pair) for pair in zip(prompts, completions, strict=True)]
    torch.testing.assert_close(trajectories.sum_steps(log_prob).exp(), torch.tensor(expected, dtype=F64))
    assert not log_prob[trajectories.observations[:, 1] == 0].any()


def test_completions_written_out():
    """Σ p = 1, E[score] = 0, and at each time the analytic Fisher matrix is E[score scoreᵀ] of the step."""
    policy = policy_of()
    completions = all_completions()
    trajectories = TokenPolicy.trajectories([PROMPT] * len(completions), completions)
    log_prob, theta = as_function(policy, trajectories)
    probabilities = trajectories.sum_steps(log_prob(theta)).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    trajectories = trajectories.with_weights(probabilities.detach())
    linear = parl.linearize(policy, trajectories)
    assert linear.trajectories.step_weights.dtype == F64
    zero = linear.vjp(trajectories.step_weights)
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-14)
    assert linear.scores().norm() > 1

    scores = jacobian(log_prob, theta)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(theta), generator=generator, dtype=F64)
    for h in range(4):
        weights = trajectories.step_weights * (trajectories.time == h)
        expected = scores.T @ (weights * (scores @ v))
        torch.testing.assert_close(linear.fisher_vp(weights, v), expected)
        assert (h == 0) == (not expected.any())  # the first step belongs to the prompt


def test_only_one_copy_of_the_written_steps_logits_is_kept_for_backward():
    policy, vocabulary = policy_of(11), 11
    prompts, completions = [torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.tensor([5, 6]), torch.arange(8)]
    trajectories = TokenPolicy.trajectories(prompts, completions)
    saved: set[tuple[int, int]] = set()  # address and size

    def note(tensor):
        saved.add((tensor.data_ptr(), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        log_prob = policy.log_prob(trajectories.observations, trajectories.actions, trajectories.offsets)
    assert log_prob.requires_grad
    sizes = [size for _, size in saved]
    assert sizes.count(10 * vocabulary) == 1  # the written steps
    assert 2 * 8 * vocabulary not in sizes and 12 * vocabulary not in sizes  # with padding; with prompts


def test_models_may_return_an_object_with_logits():
    plain, wrapped = policy_of(), policy_of(as_object=True)
    trajectories = TokenPolicy.trajectories([PROMPT], [torch.tensor([1, 2])])
    arguments = trajectories.observations, trajectories.actions, trajectories.offsets
    torch.testing.assert_close(plain.log_prob(*arguments), wrapped.log_prob(*arguments))


def test_sampling_frequencies():
    """Chi-square over the 27 completions of each prompt of a ragged batch: 26 degrees of freedom, of which 75 is exceeded
    with probability 1.2e-6 by a right sampler; the smallest expected count is above 20."""
    policy = policy_of()
    number = 6000
    other = torch.tensor([1, 2, 1, 0])
    drawn = policy.sample([PROMPT, other] * number, 3, torch.Generator().manual_seed(0))
    for prompt, samples in ((PROMPT, drawn[::2]), (other, drawn[1::2])):
        counts = torch.bincount(torch.stack(samples) @ torch.tensor([9, 3, 1]), minlength=27)
        expected = torch.tensor([probability(policy, prompt, c) for c in all_completions()]) * number
        assert float(expected.min()) > 20
        assert float(((counts - expected) ** 2 / expected).sum()) < 75


def test_a_sampled_completion_ends_with_the_first_eos():
    class Counting(nn.Module):
        """The next token is this one plus 1."""

        def __init__(self):
            super().__init__()
            self.widths = []

        def forward(self, tokens):
            self.widths.append(tuple(tokens.shape))
            return torch.nn.functional.one_hot((tokens + 1) % 9, 9) * 1e4

    policy = TokenPolicy(Counting())
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([5]), torch.tensor([0])]
    drawn = policy.sample(prompts, 4, eos=6)
    assert [c.tolist() for c in drawn] == [[4, 5, 6], [6], [1, 2, 3, 4]]
    assert policy.model.widths == [(3, 3), (2, 4), (2, 5), (1, 4)]  # what has ended is not read again
    assert [c.tolist() for c in policy.sample(prompts, 2)] == [[4, 5], [6, 7], [1, 2]]
    assert [c.tolist() for c in policy.sample(prompts, 0)] == [[], [], []]
    assert policy.sample([], 3) == []
    data = TokenPolicy.trajectories(prompts, drawn)
    assert data.num_trajectories == 3


def test_float64_products_of_integer_observations():
    """The default weights are float32 then; products, scans and the solve are in the policy's dtype."""
    policy = policy_of()
    completions = all_completions(length=2)
    trajectories = TokenPolicy.trajectories([PROMPT] * 9, completions)
    assert trajectories.weights.dtype == torch.float32
    linear = parl.linearize(policy, trajectories)
    assert linear.trajectories.weights.dtype == F64 and linear.trajectories.is_sample
    assert linear.trajectories.weights.tolist() == [1 / 9] * 9
    torch.manual_seed(0)
    v, rewards = torch.randn(linear.num_params, dtype=F64), torch.randn(trajectories.num_steps, dtype=F64)
    operator = parl.ScoreHessian(temperature=0.1, baseline="mean").operator(linear, rewards, 0.9)
    exact = trajectories.with_weights(torch.full((9,), 1 / 9, dtype=F64))
    expected = parl.ScoreHessian(temperature=0.1, baseline="mean").operator(parl.linearize(policy, exact), rewards, 0.9)
    assert operator(v).dtype == F64
    torch.testing.assert_close(operator(v), expected(v), rtol=1e-13, atol=1e-13)


def test_a_float32_policy_and_reward_take_float64_weights_and_labels():
    policy = policy_of().float()
    prompts, completions = [PROMPT, PROMPT], [torch.tensor([1, 2]), torch.tensor([0])]
    trajectories = TokenPolicy.trajectories(prompts, completions, torch.tensor([0.3, 0.7], dtype=F64))
    linear = parl.linearize(policy, trajectories)
    assert linear.trajectories.weights.dtype == torch.float32
    w, v = trajectories.step_weights, torch.ones(linear.num_params)
    for product in (linear.vjp(w), linear.hvp(w, v), linear.fisher_vp(w, v), linear.scores(w)):
        assert product.dtype == torch.float32
    pairs = parl.PreferencePairs(trajectories, trajectories, torch.tensor([0.3, 1.0], dtype=F64))
    assert parl.PreferenceLoss().per_sample(HistoryReward(3), pairs).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.trajectories([PROMPT], []), ValueError, "completions must be as many as prompts, 1, got 0"),
        (lambda p: p.trajectories([PROMPT.float()], [PROMPT]), ValueError, r"prompts\[0\] must be an int64 tensor"),
        (lambda p: p.trajectories([PROMPT], [PROMPT[None]]), ValueError, r"completions\[0\] .* of \(1, 2\)"),
        (lambda p: p.trajectories([PROMPT], [[1]]), TypeError, r"completions\[0\] must be a torch.Tensor, got list"),
        (lambda p: p.trajectories([PROMPT[:0]], [PROMPT]), ValueError, r"prompts\[0\] must hold at least one token"),
        (lambda p: p.sample([PROMPT[:0]], 2), ValueError, r"prompts\[0\] must hold at least one token"),
        (lambda p: p.sample([PROMPT], -1), ValueError, "max_new_tokens must be at least 0, got -1"),
        (
            lambda p: p.log_prob(torch.zeros(2, 2), PROMPT, torch.tensor([0, 2])),
            ValueError,
            r"observations must be integers of shape \(T, 2\), .* got torch.float32",
        ),
    ],
)
def test_wrong_inputs_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(policy_of())


def test_a_model_of_the_wrong_shape_is_named():
    class Pooled(nn.Module):
        def forward(self, tokens):
            return torch.zeros(len(tokens), 3)

    with pytest.raises(ValueError, match=r"model\(tokens\) must return logits of shape \(B, L, V\) = .* got \(1, 3\)"):
        TokenPolicy(Pooled()).log_prob(torch.tensor([[1, 1]]), torch.tensor([0]), torch.tensor([0, 1]))


@pytest.mark.parametrize("prompts", [[], [torch.tensor([1])]])
def test_no_steps_have_no_log_probabilities(prompts):
    policy = policy_of()
    none = policy.trajectories(prompts, [torch.zeros(0, dtype=torch.int64) for _ in prompts])
    log_prob = policy.log_prob(none.observations, none.actions, none.offsets)
    assert log_prob.shape == (0,) and log_prob.dtype == F64
    assert parl.linearize(policy, none).scores().shape[0] == len(prompts)
    with pytest.raises(ValueError, match=r"observations must be integers of shape \(T, 2\)"):
        policy.log_prob(none.observations.double(), none.actions, none.offsets)
