"""The batched reward ensemble against separate networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parl_core.models.rewards import RewardEnsemble


def separate(ensemble: RewardEnsemble, member: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for batched in ensemble.layers:
        linear = nn.Linear(batched.weight.shape[1], batched.weight.shape[2])
        linear.weight.data, linear.bias.data = batched.weight[member].T, batched.bias[member, 0]
        layers += [linear, nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers[:-1], nn.Tanh())


def test_members_are_independent_networks_and_the_reward_is_their_mean():
    torch.manual_seed(0)
    ensemble = RewardEnsemble(3, 2, (7, 5), members=4)
    observations, actions = torch.randn(9, 3), torch.randn(9, 2)
    inputs = torch.cat((observations, actions), -1)
    expected = torch.stack([separate(ensemble, m)(inputs).squeeze(-1) for m in range(4)])
    torch.testing.assert_close(ensemble.member_rewards(observations, actions), expected)
    torch.testing.assert_close(ensemble(observations, actions), expected.mean(0))
    own = torch.randn(4, 9, 3)  # each member with inputs of its own
    mine = ensemble.member_rewards(own, actions.expand(4, -1, -1))
    for member in range(4):
        alone = separate(ensemble, member)(torch.cat((own[member], actions), -1)).squeeze(-1)
        torch.testing.assert_close(mine[member], alone)


def test_initial_weights_have_the_scale_of_nn_linear():
    torch.manual_seed(0)
    weight = RewardEnsemble(100, 20, (50,), members=3).layers[0].weight
    bound = 120**-0.5
    assert float(weight.detach().abs().max()) <= bound
    assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(weight[0], weight[1])


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="members must be at least 1, got 0"):
        RewardEnsemble(3, 2, members=0)
    with pytest.raises(ValueError, match="actions must have 2 columns"):
        RewardEnsemble(3, 2)(torch.zeros(4, 3), torch.zeros(4, 1))


def test_every_change_of_a_layer_is_felt():
    torch.manual_seed(0)
    ensemble = RewardEnsemble(3, 2, (7, 5))
    observations, actions = torch.randn(9, 3), torch.randn(9, 2)
    before = ensemble(observations, actions).detach()

    def half(module, args, output):
        return 0.5 * output

    handle = nn.modules.module.register_module_forward_hook(half)
    try:
        hooked = ensemble.member_rewards(observations, actions).detach()
    finally:
        handle.remove()
    assert not torch.allclose(hooked.mean(0), before, atol=1e-3)
    layer = ensemble.layers[0]
    original = layer.forward
    layer.forward = lambda inputs: 0.5 * original(inputs)
    assert not torch.allclose(ensemble(observations, actions), before, atol=1e-3)
    del layer.forward
    assert torch.equal(ensemble(observations, actions), before)
