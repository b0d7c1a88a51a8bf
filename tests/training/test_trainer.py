"""The bilevel loop on a tiny problem: its schedule, its determinism, and an exact continuation from a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from parl_core.envs.tabular import TabularMDP
from parl_core.envs.tabular.environment import TabularEnvironment, TabularTask
from parl_core.envs.vector import SerialEnvironments
from parl_core.errors import ConfigError
from parl_core.preference.samplers import SAMPLERS
from parl_core.preference.semi_supervised import SurfConfig
from parl_core.training.checkpoint import load_checkpoint as load
from parl_core.training.checkpoint import save_checkpoint as save
from parl_core.training.config import ImplicitConfig
from parl_core.training.trainer import EpisodeEnded, Evaluated, Ticked, Trainer, env_seeds, seeds
from parl_core.training.upper_level import SessionEnded
from tests.training.point_mass import PointMass, tiny_config

PATIENT = replace(tiny_config().reward, label_budget=60, pool_episodes=12)


def make(algorithm: str = "a-parl", **changes) -> Trainer:
    return trainer_of(tiny_config(algorithm, **changes), lambda seed: PointMass("point-mass", seed))


def trainer_of(config, make_environment, source=None) -> Trainer:
    envs = SerialEnvironments([make_environment(seed) for seed in env_seeds(config.seed, config.num_envs)])
    return Trainer(config, envs, make_environment(seeds(config.seed)["eval_env"]), source)


def corridor(seed: int) -> TabularEnvironment:
    """Three states in a ring, where a third of the steps from the last one end the episode: 1 to 25 steps, 8 on average."""
    transitions = np.zeros((3, 2, 3))
    for state in range(3):
        for action in range(2):
            transitions[state, action, (state + 1 + action) % 3] = 2 / 3 if state == 2 else 1.0
    mdp = TabularMDP(transitions, np.full(3, 1 / 3), 0.9)
    task = TabularTask(mdp, np.array([[0.0, 0.1], [0.0, 0.2], [1.0, 1.0]]), np.eye(3, dtype=np.float32))
    return TabularEnvironment("corridor", [task], horizon=25, ends_in_success=True, seed=seed)


def make_in_corridor(algorithm: str = "a-parl", **changes) -> Trainer:
    """Episodes that end by themselves, some of them too short for a segment of five steps."""
    config = tiny_config(algorithm, **{"steps": 400, "reward": PATIENT, **changes})
    return trainer_of(config, corridor)


def as_plain(state):
    """Nested tensors and arrays as lists, so that == compares them."""
    if isinstance(state, torch.Tensor | np.ndarray):
        return state.tolist()
    if isinstance(state, dict):
        return {key: as_plain(value) for key, value in state.items()}
    return [as_plain(item) for item in state] if isinstance(state, list | tuple) else state


def rows(events):
    return [event.row for event in events if isinstance(event, Evaluated)]


def test_the_schedule_of_sessions_evaluations_and_episodes():
    events = list(make().run())
    sessions = [event for event in events if isinstance(event, SessionEnded)]
    # The first at random_steps + pretrain_steps, then every 60 steps while labels last: 8 + 8 + 2.
    assert [(s.step, s.labels) for s in sessions] == [(80, 8), (140, 16), (200, 18)]
    assert all(s.implicit is not None and s.implicit.implicit_to_direct > 0 for s in sessions)
    assert [row["step"] for row in rows(events)] == [100, 200, 300]
    assert [row["labels"] for row in rows(events)] == [8, 18, 18]
    assert [e.step for e in events if isinstance(e, EpisodeEnded)] == list(range(25, 301, 25))
    assert [e.step for e in events if isinstance(e, Ticked)] == list(range(20, 301, 20))


def test_the_oracle_sees_the_true_reward_and_the_others_do_not():
    oracle = make("oracle")
    assert not [e for e in oracle.run() if isinstance(e, SessionEnded)]
    batch = oracle.replay.sample(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.rewards, 1 - batch.observations[:, 0].abs().clamp_max(1), atol=1e-6, rtol=0)
    learner = make("pebble")
    list(learner.run())
    batch = learner.replay.sample(200, torch.Generator().manual_seed(0))
    expected = learner.upper.reward(batch.observations, batch.actions).detach()
    torch.testing.assert_close(batch.rewards, expected, atol=1e-6, rtol=1e-5)


def test_pebble_has_no_implicit_term_and_a_zero_share_is_pebble():
    pebble = list(make("pebble").run())
    assert all(e.implicit is None for e in pebble if isinstance(e, SessionEnded))
    null = list(make("a-parl", implicit=ImplicitConfig(share=0.0, on_policy_share=0.0)).run())
    full = list(make("a-parl", implicit=ImplicitConfig(on_policy_share=0.0)).run())
    returns = [[row["true_return"] for row in rows(events)] for events in (pebble, null, full)]
    assert returns[0] == returns[1]
    assert returns[0] != returns[2]


def test_upper_and_lower_data_are_recent_and_come_from_different_episodes(monkeypatch):
    trainer, seen = make(), []
    real = trainer.upper.implicit.gradient_hook

    def spy(policy, reward, lower, upper, temperature):
        finished = [set(map(tuple, episode[:, :2].tolist())) for episode in trainer.upper.episodes._finished]
        seen.append((lower, upper, finished))
        return real(policy, reward, lower, upper, temperature)

    monkeypatch.setattr(trainer.upper.implicit, "gradient_hook", spy)
    sessions = [event for event in trainer.run() if isinstance(event, SessionEnded)]
    assert len(seen) == len(sessions) == 3
    for (lower, upper, finished), labels in zip(seen, (8, 8, 2), strict=True):
        recent = len(finished) // 2  # a thousand steps are more than all episodes: half of them for either side
        latest, earlier = set.union(*finished[-recent:]), set.union(*finished[:-recent])
        assert upper.num_pairs == labels // 2
        for part in (upper.first, upper.second):
            assert set(map(tuple, part.observations.tolist())) <= latest
        assert set(map(tuple, lower.observations.tolist())) <= earlier


def test_exploration_rewards_state_entropy_and_the_first_session_resets_the_critic_once(monkeypatch):
    trainer, rewards, resets = make("pebble"), [], []
    update, reset = trainer.agent.update, trainer.agent.reset_critic
    monkeypatch.setattr(trainer.agent, "update", lambda batch: rewards.append((trainer.step, batch)) or update(batch))
    monkeypatch.setattr(trainer.agent, "reset_critic", lambda: resets.append(trainer.step) or reset())
    list(trainer.run())
    before = [batch.rewards for step, batch in rewards if step < 80]
    assert len(before) == 39  # one update a step after the random ones
    assert all((reward > 0).any() for reward in before)  # what is stored before the first session is zero
    assert all(
        not reward.equal(batch.rewards.new_zeros(16)) for reward, (_, batch) in zip(before, rewards, strict=False)
    )
    assert resets == [80]
    assert sum(step == 80 for step, _ in rewards) == 1 + 3  # the exploring one, then those after the reset


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_first_session_is_uniform_and_the_others_as_configured(monkeypatch, sampler):
    calls = []
    real = SAMPLERS[sampler]
    monkeypatch.setitem(SAMPLERS, sampler, lambda *args, **kw: calls.append(args[1]) or real(*args, **kw))
    config = tiny_config("pebble")
    trainer = make("pebble", reward=replace(config.reward, sampler=sampler))
    list(trainer.run())
    assert calls == [8, 2]


def test_evaluation_takes_the_mean_action_and_a_time_limit_is_not_terminal(monkeypatch):
    trainer, modes = make("oracle"), []
    act = trainer.agent.act

    def spy(observation, *, deterministic=False):
        modes.append(deterministic)
        return act(observation, deterministic=deterministic)

    monkeypatch.setattr(trainer.agent, "act", spy)
    list(trainer.run())
    assert sum(modes) == 3 * 2 * 25  # three evaluations of two episodes
    assert modes.count(False) == 300 - 40
    generator = torch.Generator().manual_seed(0)
    assert not trainer.replay.sample(1000, generator).terminated.any()

    class Falls(PointMass):
        def _step(self, action):
            step = super()._step(action)
            return step._replace(terminated=step.truncated, truncated=False)

    falling = trainer_of(tiny_config("oracle", steps=100), lambda seed: Falls("point-mass", seed))
    list(falling.run())
    assert float(falling.replay.sample(10_000, generator).terminated.mean()) == pytest.approx(1 / 25, abs=0.01)


def test_an_episode_that_ends_by_itself_is_terminal_in_the_replay_and_one_that_is_cut_is_not():
    trainer = make_in_corridor("oracle", replay_capacity=10_000, steps=800)
    ended = [event.step for event in trainer.run() if isinstance(event, EpisodeEnded)]
    lengths = np.diff([0, *ended])
    stored = trainer.replay.state_dict()["transitions"]
    terminal = stored[:, trainer.replay.obs_dim + trainer.replay.act_dim + 1].nonzero().squeeze(1) + 1
    assert lengths.min() < 5 < 24 < lengths.max() == 25
    assert set(terminal.tolist()) <= set(ended)
    cut = {step for step, length in zip(ended, lengths, strict=True) if length == 25}
    assert set(ended) - set(terminal.tolist()) <= cut | {800}
    assert len(terminal) > 40 and cut


def test_upper_and_lower_data_share_no_episode_also_where_some_are_too_short(monkeypatch):
    """Actions are real numbers drawn at random, so they tell where a step comes from."""
    trainer, seen = make_in_corridor(implicit=ImplicitConfig(recent_steps=20, refresh_interval=3)), []
    real = trainer.upper.implicit.gradient_hook

    def spy(policy, reward, lower, upper, temperature):
        seen.append((lower, upper, list(trainer.upper.episodes._finished)))
        return real(policy, reward, lower, upper, temperature)

    monkeypatch.setattr(trainer.upper.implicit, "gradient_hook", spy)
    list(trainer.run())
    shorts = 0
    for lower, upper, finished in seen:
        long_enough = [episode for episode in finished if len(episode) >= 5]
        recent = next(n for n in range(1, 99) if sum(map(len, long_enough[-n:])) >= 20 or n == len(long_enough) // 2)
        latest, earlier = (
            {tuple(step) for episode in part for step in episode[:, 3:5].tolist()}
            for part in (long_enough[-recent:], long_enough[:-recent])
        )
        assert {tuple(a) for part in (upper.first, upper.second) for a in part.actions.tolist()} <= latest
        assert {tuple(a) for a in lower.actions.tolist()} <= earlier
        shorts += sum(len(episode) < 5 for episode in finished[-recent:])
    assert len(seen) >= 4 and shorts > 0  # else this shows nothing


def test_ties_alone_leave_the_accuracy_empty():
    trainer = make("pebble")
    trainer.upper.source.label = lambda first, second: torch.full((len(first.true_rewards),), 0.5)
    shown = rows(trainer.run())
    assert [row["labels"] for row in shown] == [8, 18, 18]
    assert all(row["reward_accuracy"] is None and row["reward_loss"] > 0 for row in shown)


def test_a_segment_longer_than_an_episode_is_refused():
    config = tiny_config()
    with pytest.raises(ConfigError, match=r"reward.segment_length must be at most an episode of point-mass, 25 steps"):
        make(reward=replace(config.reward, segment_length=26))
    make("oracle", reward=replace(config.reward, segment_length=26))


def test_segments_longer_than_the_episodes_turn_out_to_be_are_refused_at_the_first_session():
    """Else the run would wait for its first label to the end, on rewards of zero."""
    too_long = replace(PATIENT, segment_length=24, pool_episodes=5)
    with pytest.raises(ConfigError, match=r"reward.segment_length .* latest 5 episodes .* got 24, which [01] of them"):
        list(make_in_corridor(reward=too_long).run())
    list(make_in_corridor(reward=replace(too_long, pool_episodes=100), steps=150).run())  # there it still waits


@pytest.mark.parametrize("algorithm", ["oracle", "pebble", "a-parl"])
def test_the_same_seed_gives_the_same_rows_and_another_does_not(algorithm):
    first, again = rows(make(algorithm).run()), rows(make(algorithm).run())
    assert first == again
    assert rows(make(algorithm, seed=1).run()) != first


@pytest.mark.parametrize("algorithm", ["oracle", "surf", "a-parl"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(("maker", "stop"), [(make, 40), (make, 70), (make, 210), (make_in_corridor, 130)])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, maker, stop, num_envs, algorithm):
    """Also in the midst of episodes: while the policy is random, while it explores, and after sessions."""
    changes = {"num_envs": num_envs}
    whole = maker(algorithm, **changes)
    expected = rows(whole.run())
    interrupted, seen, saved = maker(algorithm, **changes), [], None
    for event in interrupted.run():
        seen.append(event)
        if isinstance(event, Ticked) and event.step >= stop and saved is None:
            save(tmp_path, interrupted.state_dict())
            saved = event.step
        elif isinstance(event, Ticked) and saved is not None and event.step > saved + 20:
            break  # some steps after the checkpoint are lost, as by a kill
    assert saved % 25
    resumed = maker(algorithm, **changes)
    resumed.load_state_dict(load(tmp_path))
    assert resumed.step == saved < whole.step
    kept = [row for row in rows(seen) if row["step"] <= saved]
    assert kept + rows(resumed.run()) == expected
    assert as_plain(whole.state_dict()) == as_plain(resumed.state_dict())


def test_a_run_can_be_prolonged_as_if_it_had_been_longer_from_the_start():
    trainer, longer, whole = make(steps=90), make(steps=200), make(steps=200)
    list(trainer.run())
    longer.load_state_dict(trainer.state_dict())
    prolonged = rows(longer.run())
    assert [row["step"] for row in prolonged] == [100, 200]
    assert len(longer.replay) == 200  # nothing was overwritten: the ring holds 250
    # But for the evaluation at the old end, whose random numbers are its own environment's.
    list(whole.run())
    for one, other in zip(whole.agent.actor.parameters(), longer.agent.actor.parameters(), strict=True):
        assert torch.equal(one, other)


def test_several_environments_make_the_same_number_of_updates_and_fill_one_replay():
    trainer = make("oracle", num_envs=3, replay_capacity=1000)
    events = list(trainer.run())
    assert trainer.step == 300 == len(trainer.replay)
    # The first multiple of 3 beyond the 40 random steps is 42.
    assert trainer.agent.num_updates == 260
    ended = [event for event in events if isinstance(event, EpisodeEnded)]
    assert [event.step for event in ended] == [step for step in range(75, 301, 75) for _ in range(3)]
    assert [row["step"] for row in rows(events)] == [102, 201, 300]
    assert len({event.true_return for event in ended}) == 12


def test_answers_that_are_missing_use_up_the_budget_and_are_not_learned_from():
    class Skips:
        """Skips whatever begins on the left."""

        def label(self, first, second):
            labels = (second.true_rewards.sum(1) > first.true_rewards.sum(1)).float()
            labels[first.observations[:, 0, 0] < 0] = float("nan")
            return labels

        def episode_ended(self, true_return, length):
            pass

    trainer = trainer_of(tiny_config("a-parl"), lambda seed: PointMass("point-mass", seed), Skips())
    shown = rows(trainer.run())
    assert [row["queries"] for row in shown] == [8, 18, 18]
    assert all(0 < row["labels"] < row["queries"] for row in shown)
    assert (trainer.upper.dataset.segments[:, 0, 0, 0] >= 0).all()


@pytest.mark.parametrize("compat", [False, True])
def test_a_first_session_without_an_answer_is_followed_by_another(compat):
    class SkipsAtFirst:
        asked = 0

        def label(self, first, second):
            self.asked += 1
            return torch.full((len(first.true_rewards),), float("nan") if self.asked == 1 else 1.0)

        def episode_ended(self, true_return, length):
            pass

    config = tiny_config("pebble", bpref_compat=compat)
    trainer = trainer_of(config, lambda seed: PointMass("point-mass", seed), SkipsAtFirst())
    if compat:
        with pytest.raises(ConfigError, match="skipped all queries of the first session"):
            list(trainer.run())
        return
    sessions = [event for event in trainer.run() if isinstance(event, SessionEnded)]
    assert [(s.step, s.queries, s.labels) for s in sessions] == [(140, 16, 8), (200, 18, 10)]
    assert sessions[0].fresh_accuracy is None and sessions[1].fresh_accuracy is not None


def test_surf_keeps_wider_windows_than_the_teacher_sees():
    trainer, seen = make("surf"), []
    label = trainer.upper.source.label

    def spy(first, second):
        seen.append((first, second))
        return label(first, second)

    trainer.upper.source.label = spy
    list(trainer.run())
    stored = trainer.upper.dataset.segments
    assert stored.shape[1:] == (2, 9, 3)
    judged = torch.cat([torch.stack((a.observations, b.observations), 1) for a, b in seen])
    assert torch.equal(judged, stored[:, :, 2:-2, :2])
    assert len(trainer.upper.pool) == 3 * len(stored)


def test_a_session_that_draws_more_unlabelled_pairs_than_are_kept_fills_the_pool():
    trainer = make("surf", surf=SurfConfig(crop=2, inv_label_ratio=3, pool_capacity=20))
    list(trainer.run())
    assert len(trainer.upper.pool) == 20


def test_a_reward_that_is_the_same_everywhere_has_foretold_nothing():
    class PrefersTheFirst:
        def label(self, first, second):
            return torch.zeros(len(first.true_rewards))

        def episode_ended(self, true_return, length):
            pass

    trainer = trainer_of(tiny_config("pebble"), lambda seed: PointMass("point-mass", seed), PrefersTheFirst())
    fit = trainer.upper.learner.fit

    def fit_and_forget(*arguments):
        result = fit(*arguments)
        with torch.no_grad():
            for param in trainer.upper.reward.parameters():
                param.zero_()
        return result

    trainer.upper.learner.fit = fit_and_forget
    sessions = [event for event in trainer.run() if isinstance(event, SessionEnded)]
    assert [session.fresh_accuracy for session in sessions] == [None, 0.0, 0.0]


def test_seeds_are_distinct_and_valid():
    values = list(seeds(0).values())
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**32 for value in values)
    assert seeds(0) != seeds(1)
