"""A film of a run's policy, with the true and the learned reward traced under the picture.

The episodes are played twice, in two environments of the same seed: first for the rewards, whose scale and traces every
frame shows, then with the actions of the first time for the pictures, of which one at a time is held in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track

from ..envs import Environment, make_env
from ..errors import ConfigError, RenderingError, RunFolderError, import_extra
from ..models.rewards import RewardEnsemble
from ..pictures import pyplot
from ..rl.sac import SAC
from .config import TrainConfig
from .run_folder import RunFolder

HEIGHT, WIDTH, PANEL_HEIGHT = 480, 640, 200  # pixels, all even: the encoder halves the resolution of colours
FRAMES_PER_SECOND = 30
_TRUE, _LEARNED, _CURSOR = "#1f77b4", "#d62728", (0x33, 0x33, 0x33)

Picture = npt.NDArray[np.uint8]
Act = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Episode:
    """One episode as it was played, T steps."""

    observations: npt.NDArray[np.float32]
    """(T, do), each before its action."""
    actions: npt.NDArray[np.float32]
    """(T, da)"""
    true_rewards: npt.NDArray[np.float64]
    """(T,)"""
    success: bool | None
    """Whether success was reported at any step; None where the environment reports none."""


@dataclass(frozen=True)
class Player:
    """What a checkpoint holds that a film is made of."""

    config: TrainConfig
    step: int
    """Environment steps that the policy was trained for."""
    act: Act
    """The policy's mean action, (do,) -> (da,)."""
    reward: RewardEnsemble | None
    """The learned reward; None for the oracle, and before the first query session."""


def make_video(
    run: Path, output: Path, *, episodes: int, seed: int, every: int, camera: str | None, console: Console
) -> Path:
    """Film the policy of a run's last checkpoint into the mp4 file `output`, and return that.

    Args:
        run: the run folder.
        output: the file; it is replaced if it exists.
        episodes: how many episodes are shown, one after the other.
        seed: of the environment.
        every: environment steps between two frames.
        camera: a name that the environment has for a view; its usual one unless given.
        console: for the progress display.

    Raises:
        ParlError: one sentence on what is wrong with the run, the options, or what is installed here.
    """
    for name, value in (("episodes", episodes), ("every", every)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    import_extra("av", "video", needed_for="parl video")
    folder, config = RunFolder.open(run)
    with closing(make_env(config.env, seed)) as stage, closing(make_env(config.env, seed)) as rehearsal:
        stage.reset()
        stage.render(HEIGHT, WIDTH, camera)  # what cannot be drawn is known before anything is played
        player = load_player(folder, config, stage)
        played = [play(rehearsal, player.act) for _ in range(episodes)]
        frames = _frames(stage, played, _panels(player, played), every, camera)
        total = sum(1 + -(-len(episode.actions) // every) for episode in played)
        write_mp4(output, track(frames, f"{total} frames", total, console=console, transient=True))
    return output


def load_player(folder: RunFolder, config: TrainConfig, env: Environment) -> Player:
    """The policy and the reward of a run's last checkpoint.

    Raises:
        RunFolderError: there is no checkpoint, or it cannot be used.
    """
    trainer = folder.load()["trainer"]
    upper = trainer["upper"]
    agent = SAC(env.obs_dim, env.act_dim, config.sac, torch.Generator())
    agent.load_state_dict(trainer["agent"])
    reward = None
    if config.learns_reward and upper["last_session"] is not None:
        reward = RewardEnsemble(env.obs_dim, env.act_dim, config.reward.hidden, config.reward.members)
        reward.load_state_dict(upper["learner"]["ensemble"])
    return Player(config, trainer["step"], lambda observation: agent.act(observation, deterministic=True), reward)


def play(env: Environment, act: Act) -> Episode:
    """Play one episode."""
    observations, actions, rewards, success, done = [env.reset()], [], [], False, False
    while not done:
        actions.append(act(observations[-1]))
        step = env.step(actions[-1])
        observations.append(step.observation)
        rewards.append(step.reward)
        success |= step.success
        done = step.terminated or step.truncated
    return Episode(
        np.array(observations[:-1]), np.array(actions), np.array(rewards), success if env.reports_success else None
    )


def learned_rewards(reward: RewardEnsemble, episode: Episode) -> npt.NDArray[np.float64]:
    """The ensemble's mean reward of every step of an episode, (T,)."""
    with torch.inference_mode():
        rewards = reward(torch.from_numpy(episode.observations), torch.from_numpy(episode.actions))
    return rewards.double().numpy()


def to_the_scale_of(true: npt.NDArray[np.float64], learned: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`learned` shifted and scaled to the mean and the standard deviation of `true`, both (n,).

    A preference determines a reward up to such a map only. The factor is positive, so that a learned reward which runs
    against the true one is seen to; a least-squares fit would turn it over. A constant one is shifted only, and so is one
    that is held against a constant.
    """
    spread, own = true.std(), learned.std()
    factor = spread / own if spread > 0 and own > 1e-12 * np.abs(learned).max() else 1.0
    return true.mean() + factor * (learned - learned.mean())


@dataclass(frozen=True)
class Panel:
    """The traces of one episode as a picture, with where its cursor goes."""

    picture: Picture
    """(PANEL_HEIGHT, WIDTH, 3)"""
    columns: npt.NDArray[np.int64]
    """(T + 1,) the column of the cursor after t steps."""
    rows: slice
    """The rows that the cursor crosses."""

    def at(self, step: int) -> Picture:
        """The panel with its cursor after `step` steps."""
        picture = self.picture.copy()
        picture[self.rows, self.columns[step] : self.columns[step] + 2] = _CURSOR
        return picture


def draw_panel(true: npt.NDArray[np.float64], learned: npt.NDArray[np.float64] | None, label: str, title: str) -> Panel:
    """Draw the reward of every step, (T,) each; the learned one, if there is one, under the name of `label`."""
    dpi = 100
    figure, axis = pyplot().subplots(figsize=(WIDTH / dpi, PANEL_HEIGHT / dpi), dpi=dpi, layout="constrained")
    try:
        steps = np.arange(1, len(true) + 1)
        axis.plot(steps, true, color=_TRUE, linewidth=1.2, label="true reward")
        if learned is not None:
            axis.plot(steps, learned, color=_LEARNED, linewidth=1.2, alpha=0.8, label=label)
        axis.set_xlim(0, len(true))
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("step of the episode", fontsize=7)
        axis.set_ylabel("reward", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=2, fontsize=7, frameon=False)
        figure.canvas.draw()
        picture = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        corners = [(step, 0.0) for step in range(len(true) + 1)]
        columns = np.clip(np.rint(axis.transData.transform(corners)[:, 0]).astype(int), 0, WIDTH - 2)
        bottom, top = axis.bbox.y0, axis.bbox.y1  # from below, as matplotlib counts
        return Panel(picture, columns, slice(round(PANEL_HEIGHT - top), round(PANEL_HEIGHT - bottom)))
    finally:
        pyplot().close(figure)


def write_mp4(path: Path, frames: Iterable[Picture]) -> None:
    """Encode frames of one size as H.264; what was there before stays until the film is complete.

    Raises:
        MissingExtraError: PyAV is not installed.
        RunFolderError: it could not be written.
    """
    av = import_extra("av", "video", needed_for="parl video")
    temporary = path.with_name(path.name + ".partial")
    try:
        with av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "20"})
            stream.pix_fmt = "yuv420p"  # what every player knows
            for number, frame in enumerate(frames):
                if number == 0:
                    stream.height, stream.width = frame.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise RunFolderError(f"Cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _panels(player: Player, played: Sequence[Episode]) -> list[Panel]:
    """The panels of all episodes; the learned reward is on one scale in all of them."""
    learned: list[npt.NDArray[np.float64]] | list[None] = [None] * len(played)
    label = ""
    if player.reward is not None:
        all_true = np.concatenate([episode.true_rewards for episode in played])
        raw = np.concatenate([learned_rewards(player.reward, episode) for episode in played])
        lengths = [len(episode.true_rewards) for episode in played]
        learned = np.split(to_the_scale_of(all_true, raw), np.cumsum(lengths)[:-1])
        label = "learned reward, on the true one's mean and spread"
        if all_true.std() > 0 and raw.std() > 0:
            label += f" (correlation {np.corrcoef(all_true, raw)[0, 1]:.2f})"
    panels = []
    for number, (episode, trace) in enumerate(zip(played, learned, strict=True), start=1):
        title = f"{player.config.algorithm} on {player.config.env} after {player.step} steps, "
        title += f"episode {number} of {len(played)}: true return {episode.true_rewards.sum():.1f}"
        title += {None: "", True: ", success", False: ", no success"}[episode.success]
        panels.append(draw_panel(episode.true_rewards, trace, label, title))
    return panels


def _frames(
    env: Environment, played: Sequence[Episode], panels: Sequence[Panel], every: int, camera: str | None
) -> Iterator[Picture]:
    """Take the actions of the episodes again, in an environment that has just been reset, and look at it."""
    for number, (episode, panel) in enumerate(zip(played, panels, strict=True)):
        if number > 0:
            env.reset()
        yield np.concatenate([env.render(HEIGHT, WIDTH, camera), panel.at(0)])
        for taken, action in enumerate(episode.actions, start=1):
            if env.step(action).reward != episode.true_rewards[taken - 1]:
                raise RenderingError(f"{env.name} does not repeat an episode from the same seed and actions")
            if taken % every == 0 or taken == len(episode.actions):
                yield np.concatenate([env.render(HEIGHT, WIDTH, camera), panel.at(taken)])
