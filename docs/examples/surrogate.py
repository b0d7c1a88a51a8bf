"""An existing reward-learning loop, and the one line that makes it see how the reward moves the policy.

The loop is the classical one: Bradley–Terry cross-entropy on fresh pairs from the current policy. Its gradient leaves out
that the reward decides which pairs there will be; `surrogate()` is 0 and has exactly the missing gradient.

Replace `Policy` with what your policy optimisation returns, `draw` with your rollouts and the labels with yours.
"""

import torch
import torch.nn.functional as F

import parl_core as parl

NUM_ACTIONS, TEMPERATURE = 6, 0.5
UTILITY = torch.linspace(-2, 2, NUM_ACTIONS)  # what the labeller has in mind


class Policy(torch.nn.Module):
    def __init__(self, reward):  # the best one for this reward and an entropy bonus, here in closed form
        super().__init__()
        self.logits = torch.nn.Parameter(reward.table.detach() / TEMPERATURE)

    def log_prob(self, observations, actions):
        return self.logits.log_softmax(-1)[actions]


class Reward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(NUM_ACTIONS))

    def forward(self, observations, actions):
        return self.table[actions]


def draw(policy, number):  # trajectories of one step, with nothing to observe
    actions = torch.distributions.Categorical(logits=policy.logits.detach()).sample((number,))
    return parl.Trajectories(torch.zeros(number, 1), actions, torch.arange(number + 1))


def expected_loss(table):
    """The cross-entropy over all pairs, weighted by how often the best policy for this reward draws them."""
    probabilities = (table / TEMPERATURE).softmax(-1)
    margin, truth = (values[None, :] - values[:, None] for values in (table, UTILITY))
    return probabilities @ F.binary_cross_entropy_with_logits(margin, truth.sigmoid(), reduction="none") @ probabilities


def main(steps: int = 150, implicit: bool = True) -> float:
    torch.manual_seed(0)
    reward = Reward()
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.05)
    options = dict(loss=parl.PreferenceLoss(), discount=1.0, curvature=parl.Fisher(TEMPERATURE, damping=0.001))
    for _ in range(steps):
        policy = Policy(reward)
        first, second = draw(policy, 256), draw(policy, 256)
        labels = torch.bernoulli(torch.sigmoid(UTILITY[second.actions] - UTILITY[first.actions]))
        margin = reward(second.observations, second.actions) - reward(first.observations, first.actions)
        loss = F.binary_cross_entropy_with_logits(margin, labels)
        if implicit:
            pairs = parl.PreferencePairs(first, second, labels)
            loss = loss + parl.hypergradient(policy, reward, draw(policy, 1024), pairs, **options).surrogate()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(expected_loss(reward.table.detach()))


if __name__ == "__main__":
    print(f"expected cross-entropy with the line: {main():.3f}, without: {main(implicit=False):.3f}")
