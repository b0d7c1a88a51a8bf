"""Learning a reward from preferences: who labels, which pairs are asked about, how the reward is fitted."""
