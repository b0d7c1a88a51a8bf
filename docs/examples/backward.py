"""A point should go to 1 on a line; someone prefers one trajectory to another, and a policy maximises a learned reward.
The loss, the share of trajectories worse than the first policy's, does not contain the reward: its gradient goes through
the policy alone. Replace everything but the call with your own."""

import torch

import parl_core as parl

STEPS, DISCOUNT, CURVATURE = 5, 0.9, parl.Fisher(temperature=0.1, damping=0.02)


class Policy(torch.nn.Linear):
    def forward(self, observations):
        mean, log_std = super().forward(observations).chunk(2, dim=-1)
        return torch.distributions.Normal(mean.tanh(), log_std.tanh().exp())

    def log_prob(self, observations, actions):  # (T, do), (T, da) -> (T,): all that is asked of a policy
        return self(observations).log_prob(actions).sum(-1)


class Reward(torch.nn.Sequential):
    def forward(self, observations, actions):  # (T, do), (T, da) -> (T,): all that is asked of a reward
        return super().forward(torch.cat((observations, actions), dim=-1)).squeeze(-1)


def rollouts(policy, number):
    position, visited = torch.randn(number, 1), []
    for _ in range(STEPS):
        action = policy(position).sample()
        visited.append(torch.cat((position, action), dim=1))
        position = (position + action).clamp(-2, 2)
    observations, actions = torch.stack(visited, dim=1).flatten(0, 1).split(1, dim=1)
    return parl.Trajectories(observations, actions, offsets=torch.arange(0, number * STEPS + 1, STEPS))


def utility(data):  # what the labeller has in mind and the program does not know
    return -(data.observations - 1).square().view(-1, STEPS).mean(1)


def main(seed: int = 0, steps: int = 40, reward_lr: float = 0.01) -> float:
    torch.manual_seed(seed)
    policy = Policy(1, 2)
    reward = Reward(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1), torch.nn.Tanh())
    for parameter in (*policy.parameters(), *reward[2].parameters()):  # a random walk, and a reward of 0
        torch.nn.init.zeros_(parameter)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=0.03, weight_decay=CURVATURE.damping)
    reward_optimizer = torch.optim.Adam(reward.parameters(), lr=reward_lr)
    first = utility(rollouts(policy, 256))
    loss = parl.TrajectoryLoss(lambda reward, data: (utility(data) < first).float())
    for step in range(steps):
        for _ in range(5):  # REINFORCE on the reward and an entropy bonus; weight_decay is the L2 penalty
            data = rollouts(policy, 128)
            log_prob = policy.log_prob(data.observations, data.actions).view(-1, STEPS)
            soft = reward(data.observations, data.actions).view(-1, STEPS) - CURVATURE.temperature * log_prob
            to_go = (DISCOUNT ** torch.arange(STEPS) * soft).detach().flip(1).cumsum(1).flip(1)
            policy_optimizer.zero_grad()
            ((to_go.mean(0) - to_go) * log_prob).sum(1).mean().backward()
            policy_optimizer.step()
        lower, upper = rollouts(policy, 256), rollouts(policy, 256)
        reward_optimizer.zero_grad()
        parl.hypergradient(policy, reward, lower, upper, loss=loss, discount=DISCOUNT, curvature=CURVATURE).backward()
        reward_optimizer.step()
        share = float(loss.per_sample(reward, upper).mean())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:2d}   worse than the first policy: {share:.0%}")
    return share


if __name__ == "__main__":
    main()
