"""Films: what is traced, what is read from a checkpoint, and, with an encoder, the frames of the file themselves."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console

from parl_core import cli
from parl_core.errors import MissingExtraError, ParlError, RenderingError, RunFolderError
from parl_core.training import video
from parl_core.training.run_folder import RunFolder
from parl_core.training.train import train
from parl_core.training.video import (
    Episode,
    draw_panel,
    learned_rewards,
    load_player,
    make_video,
    play,
    to_the_scale_of,
)
from tests.training.point_mass import PointMass, tiny_config


class Filmed(PointMass):
    """The picture is as bright as the point is far to the right."""

    def render(self, height=480, width=640, camera=None):
        return np.full((height, width, 3), round(127.5 + 100 * self.where[0]), dtype=np.uint8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by algorithm, and one that was stopped before its first query session."""
    root = tmp_path_factory.mktemp("runs")
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parl_core.training.train.make_env", Filmed)
        patch.setattr("parl_core.training.train.make_environments", _one_environment)
        for name, config in {
            "pebble": tiny_config("pebble"),
            "oracle": tiny_config("oracle"),
            "early": tiny_config("pebble", steps=60, eval_interval=60),
        }.items():
            train(config, root / name, Console(quiet=True))
            made[name] = root / name
    return made


def _one_environment(name, seeds, workers):
    from parl_core.envs.vector import SerialEnvironments

    return SerialEnvironments([Filmed(name, seed) for seed in seeds])


@pytest.fixture(autouse=True)
def filmed(monkeypatch):
    monkeypatch.setattr("parl_core.training.video.make_env", Filmed)


@pytest.fixture
def no_encoder(monkeypatch):
    """An `av` that is there and is not reached."""
    monkeypatch.setitem(sys.modules, "av", ModuleType("av"))


def test_the_learned_reward_is_put_on_the_true_ones_scale():
    true, learned = np.array([0.0, 1.0, 2.0, 5.0]), np.array([10.0, 30.0, -10.0, 10.0])
    scaled = to_the_scale_of(true, learned)
    assert scaled.mean() == pytest.approx(2.0) and scaled.std() == pytest.approx(true.std())
    np.testing.assert_allclose(np.argsort(scaled), np.argsort(learned))
    np.testing.assert_allclose(to_the_scale_of(true, -3 * true + 7), 4 - true)  # against it, and not turned over
    np.testing.assert_allclose(to_the_scale_of(true, 0.1 * np.array([1, 1 + 3e-16, 1, 1])), np.full(4, 2.0))
    np.testing.assert_allclose(to_the_scale_of(np.full(4, 3.0), learned), learned - 7)


def test_the_panel_and_its_cursor():
    true = np.array([0.0, 1.0] * 10)
    panel = draw_panel(true, true[::-1], "learned", "a title")
    alone = draw_panel(true, None, "", "a title")
    assert panel.picture.shape == alone.picture.shape == (video.PANEL_HEIGHT, video.WIDTH, 3)

    def drawn(picture, colour):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return np.abs(picture.astype(int) - wanted).max(-1) < 60

    for colour in (video._TRUE, video._LEARNED):
        assert drawn(panel.picture, colour).sum() > 200
    assert not drawn(alone.picture, video._LEARNED).any()
    assert len(panel.columns) == 21
    assert set(np.diff(panel.columns)) <= {27, 28, 29, 30, 31}  # even, from one side to the other
    changed = np.nonzero((panel.at(7) != panel.picture).any(-1))
    assert set(changed[1]) == {panel.columns[7], panel.columns[7] + 1}
    assert changed[0].min() >= panel.rows.start and changed[0].max() < panel.rows.stop
    # It goes from the upper edge of the axes to the lower one, the first dark lines in a column without writing.
    dark = np.nonzero(panel.picture[:, panel.columns[20] - 4].max(-1) < 128)[0]
    assert dark[0] == pytest.approx(panel.rows.start, abs=2)
    assert any(row == pytest.approx(panel.rows.stop, abs=2) for row in dark)
    # The cursor stands where the trace is: the first blue pixel is at step 1, where the trace begins.
    inside = drawn(alone.picture, video._TRUE)[alone.rows]
    assert np.nonzero(inside.any(0))[0][0] == pytest.approx(alone.columns[1], abs=3)


def test_a_player_is_the_policy_and_the_reward_of_the_checkpoint(runs):
    env = Filmed("point-mass", 0)
    for name, has_reward in (("pebble", True), ("oracle", False), ("early", False)):
        folder, config = RunFolder.open(runs[name])
        player = load_player(folder, config, env)
        assert (player.step, player.reward is not None) == (config.steps, has_reward)
        trainer = folder.load()["trainer"]
        observation = np.array([0.3, -0.2], dtype=np.float32)
        # The mean action by hand: the actor's two hidden layers, the mean's row of the last one, tanh.
        layer, weights = torch.from_numpy(observation), list(trainer["agent"]["actor"].values())
        for index in (0, 2):
            layer = torch.relu(weights[index] @ layer + weights[index + 1])
        mean = torch.tanh((weights[4] @ layer + weights[5])[:1])
        np.testing.assert_allclose(player.act(observation), mean.numpy(), atol=1e-6)
        if has_reward:
            for key, value in player.reward.state_dict().items():
                assert torch.equal(value, trainer["upper"]["learner"]["ensemble"][key])


def test_an_episode_is_played_and_judged_step_by_step(runs):
    folder, config = RunFolder.open(runs["pebble"])
    env, again = Filmed("point-mass", 5), Filmed("point-mass", 5)
    player = load_player(folder, config, env)
    episode = play(env, player.act)
    observation, rewards, found = again.reset(), [], []
    for _ in range(25):
        action = player.act(observation)
        with torch.no_grad():
            rewards.append(player.reward(torch.from_numpy(observation)[None], torch.from_numpy(action)[None]).item())
        step = again.step(action)
        found.append(step)
        observation = step.observation
    np.testing.assert_array_equal(episode.true_rewards, [step.reward for step in found])
    np.testing.assert_allclose(learned_rewards(player.reward, episode), rewards, rtol=1e-6)
    assert episode.success == any(step.success for step in found)


def test_every_frame_shows_its_own_step_in_one_scale_for_all_episodes(runs):
    folder, config = RunFolder.open(runs["pebble"])
    stage, rehearsal = Filmed("point-mass", 1), Filmed("point-mass", 1)
    player = load_player(folder, config, stage)
    played = [play(rehearsal, player.act) for _ in range(2)]
    panels = video._panels(player, played)
    stage.reset()
    frames = list(video._frames(stage, played, panels, 10, None))
    assert len(frames) == 2 * 4  # after 0, 10, 20 and 25 steps
    for frame, (episode, taken) in zip(frames, [(e, t) for e in (0, 1) for t in (0, 10, 20, 25)], strict=True):
        assert frame.shape == (video.HEIGHT + video.PANEL_HEIGHT, video.WIDTH, 3)
        np.testing.assert_array_equal(frame[video.HEIGHT :], panels[episode].at(taken))
        if taken < 25:
            position = played[episode].observations[taken, 0]
            assert abs(int(frame[0, 0, 0]) - (127.5 + 100 * position)) <= 0.51
    wrong = [Episode(e.observations, -e.actions, e.true_rewards, e.success) for e in played]
    stage = Filmed("point-mass", 1)
    stage.reset()
    with pytest.raises(RenderingError, match="point-mass does not repeat an episode"):
        list(video._frames(stage, wrong, panels, 10, None))


def _make(run, output, **options):
    given = {"episodes": 1, "seed": 0, "every": 2, "camera": None, "console": Console(quiet=True), **options}
    return make_video(run, output, **given)


def test_the_film_itself(runs, tmp_path, capsys):
    av = pytest.importorskip("av")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"an older one")
    assert _make(runs["pebble"], film, episodes=2, every=10, seed=1) == film
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == "h264"
    assert len(frames) == 8 and frames[0].shape == (680, 640, 3)
    env = Filmed("point-mass", 1)
    env.reset()
    np.testing.assert_allclose(frames[0][:480].mean(), env.render().mean(), atol=4)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    assert cli.main(["video", str(runs["oracle"]), "--every", "25"]) == 0
    assert (runs["oracle"] / "video.mp4").stat().st_size > 1000
    assert capsys.readouterr().out.strip().endswith("video.mp4")


def test_a_film_that_fails_leaves_the_older_one(tmp_path):
    pytest.importorskip("av")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"an older one")

    def frames():
        yield np.zeros((64, 64, 3), dtype=np.uint8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        video.write_mp4(film, frames())
    assert film.read_bytes() == b"an older one" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RunFolderError, match=r"Cannot write .*nowhere.*: No such file"):
        video.write_mp4(tmp_path / "nowhere" / "film.mp4", iter([np.zeros((64, 64, 3), dtype=np.uint8)]))


def test_what_cannot_be_filmed_is_told_in_one_sentence(runs, tmp_path, monkeypatch, no_encoder):
    with pytest.raises(ParlError, match="--every must be at least 1, got 0"):
        _make(runs["pebble"], tmp_path / "film.mp4", every=0)
    with pytest.raises(RunFolderError, match="not a run folder"):
        _make(tmp_path, tmp_path / "film.mp4")
    monkeypatch.setattr("parl_core.training.video.make_env", PointMass)
    with pytest.raises(RenderingError, match="point-mass has no pictures"):
        _make(runs["pebble"], tmp_path / "film.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"parl video needs av .*parl-core\[video\]"):
        _make(runs["pebble"], tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())
