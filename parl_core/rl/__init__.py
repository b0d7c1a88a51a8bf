"""Reinforcement learning: soft actor-critic, its replay buffer, and what collects and judges episodes."""
