"""Several environments behind one interface, in this process or spread over worker processes.

The numbers are the same bit for bit wherever an environment runs, since each has its own seed and its own state.
"""

from __future__ import annotations

import multiprocessing
import operator
import pickle
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ParlError
from .interface import Environment
from .own import MakeEnvironment
from .registry import make_env


class Steps(NamedTuple):
    """What one step of each of n environments gives back; see `Step`."""

    observations: npt.NDArray[np.float32]  # (n, do)
    rewards: npt.NDArray[np.float64]  # (n,)
    terminated: npt.NDArray[np.bool_]  # (n,)
    truncated: npt.NDArray[np.bool_]  # (n,)
    success: npt.NDArray[np.bool_]  # (n,)


class WorkerDiedError(ParlError, RuntimeError):
    """A worker process ended that should not have."""


class Environments(ABC):
    """n instances of one task that take their steps together. An instance belongs to one thread.

    After an exception of `reset` or `step`, some environments may have done what was asked and others not: go on with
    `set_state` or not at all.

    Attributes:
        name, obs_dim, act_dim, horizon, reports_success, restores_state: as of each `Environment`.
        num: n.
    """

    def __init__(self, sizes: _Sizes, num: int) -> None:
        self.name = sizes.name
        self.obs_dim = sizes.obs_dim
        self.act_dim = sizes.act_dim
        self.horizon = sizes.horizon
        self.reports_success = sizes.reports_success
        self.restores_state = sizes.restores_state
        self.num = num

    def reset(self, indices: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Begin an episode in each of these k environments, by default in all.

        Args:
            indices: each at most once, 0 ≤ index < n.

        Returns:
            (k, do) the first observations, in the order of `indices`.
        """
        chosen = range(self.num) if indices is None else [operator.index(index) for index in indices]
        if len(set(chosen)) != len(chosen) or any(not 0 <= index < self.num for index in chosen):
            raise ValueError(f"indices must be different ones of 0 to {self.num - 1}, got {list(chosen)}")
        return self._reset(chosen)

    def step(self, actions: npt.ArrayLike) -> Steps:
        """Take one step in each environment. One whose episode has ended must be `reset` before.

        Args:
            actions: (n, da) in [−1, 1], as `Environment.step` takes them.

        Raises:
            RuntimeError, ValueError, NonFiniteError: as of `Environment.step`.
        """
        checked = np.asarray(actions, dtype=np.float64)
        if checked.shape != (self.num, self.act_dim):
            raise ValueError(f"{self.name}: actions must have shape ({self.num}, {self.act_dim}), got {checked.shape}")
        return self._step(checked)

    def set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `state` returned; see `Environment.set_state`."""
        if len(states) != self.num:
            raise ValueError(f"states must hold one of each of the {self.num} environments, got {len(states)}")
        self._set_state(states)

    @abstractmethod
    def state(self) -> list[dict[str, Any]]:
        """The state of each environment; see `Environment.state`."""

    @abstractmethod
    def close(self) -> None:
        """Release the simulators, and end the processes if there are any."""

    @abstractmethod
    def _reset(self, indices: Sequence[int]) -> npt.NDArray[np.float32]: ...

    @abstractmethod
    def _step(self, actions: npt.NDArray[np.float64]) -> Steps: ...

    @abstractmethod
    def _set_state(self, states: Sequence[Mapping[str, Any]]) -> None: ...


def make_environments(name: str | MakeEnvironment, seeds: Sequence[int], workers: int = 0) -> Environments:
    """Make one environment for each seed.

    Worker processes are spawned: a script that asks for them needs the guard `if __name__ == "__main__":`.

    Args:
        name: as `make_env` takes it.
        seeds: of the environments, n ≥ 1 of them.
        workers: processes to spread them over, at most n; 0 keeps them in this one.

    Raises:
        ValueError: no seeds, fewer than 0 workers, a callable that cannot be handed to a process, or environments whose
            sizes differ.
        ParlError: what `make_env` raises, from a worker too.
    """
    if not seeds:
        raise ValueError("seeds must hold at least one seed, got none")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if workers == 0:
        return SerialEnvironments([make_env(name, seed) for seed in seeds])
    return ProcessEnvironments(name, seeds, workers)


class SerialEnvironments(Environments):
    """Environments of one task in this process, one after the other."""

    def __init__(self, environments: Sequence[Environment]) -> None:
        self._environments = list(environments)
        super().__init__(_common([_sizes(environment) for environment in self._environments]), len(self._environments))

    def state(self) -> list[dict[str, Any]]:
        return [environment.state() for environment in self._environments]

    def close(self) -> None:
        for environment in self._environments:
            environment.close()

    def _reset(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        observations = np.empty((len(indices), self.obs_dim), np.float32)
        for row, index in enumerate(indices):
            observations[row] = self._environments[index].reset()
        return observations

    def _step(self, actions: npt.NDArray[np.float64]) -> Steps:
        steps = [environment.step(action) for environment, action in zip(self._environments, actions, strict=True)]
        observations, rewards, terminated, truncated, success = zip(*steps, strict=True)
        return Steps(
            np.stack(observations), np.array(rewards), np.array(terminated), np.array(truncated), np.array(success)
        )

    def _set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        for environment, state in zip(self._environments, states, strict=True):
            environment.set_state(state)


class ProcessEnvironments(Environments):
    """Environments of one task in worker processes, each with a contiguous share of them.

    The workers end with this process, however it ends, and never hear of Ctrl-C. An exception in one is raised here.
    """

    def __init__(self, name: str | MakeEnvironment, seeds: Sequence[int], workers: int) -> None:
        if not isinstance(name, str):
            try:
                pickle.dumps(name)
            except Exception as error:
                raise ValueError(
                    f"with workers, the environment's callable must be a function of a module, got {name!r}: {error}"
                ) from error
        bounds = np.linspace(0, len(seeds), min(workers, len(seeds)) + 1).astype(int).tolist()
        self._shares = [slice(start, stop) for start, stop in pairwise(bounds)]
        self._channels: list[Connection] = []
        self._processes: list[Any] = []
        self._unfinished = False
        context = multiprocessing.get_context("spawn")
        try:
            with _ctrl_c_blocked():
                for share in self._shares:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_work, args=(name, list(seeds[share]), theirs), daemon=True)
                    process.start()
                    theirs.close()  # so that the pipe ends with the process
                    self._channels.append(ours)
                    self._processes.append(process)
            sizes = _common(self._answers(range(len(self._channels))))
        except BaseException:
            self.close()
            raise
        super().__init__(sizes, len(seeds))

    def state(self) -> list[dict[str, Any]]:
        return [state for states in self._ask("state", [None] * len(self._channels)) for state in states]

    def close(self) -> None:
        for channel in self._channels:
            channel.close()  # ends a worker that waits for what to do
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.terminate()
                process.join()
        self._channels, self._processes = [], []

    def _reset(self, indices: Sequence[int]) -> npt.NDArray[np.float32]:
        observations = np.empty((len(indices), self.obs_dim), np.float32)
        rows = [
            [row for row, index in enumerate(indices) if share.start <= index < share.stop] for share in self._shares
        ]
        asked = [
            [indices[row] - share.start for row in of_share] if of_share else _NOTHING
            for of_share, share in zip(rows, self._shares, strict=True)
        ]
        busy = [of_share for of_share in rows if of_share]
        for of_share, answer in zip(busy, self._ask("reset", asked), strict=True):
            observations[of_share] = answer
        return observations

    def _step(self, actions: npt.NDArray[np.float64]) -> Steps:
        answers = self._ask("step", [actions[share] for share in self._shares])
        return Steps(*(np.concatenate(parts) for parts in zip(*answers, strict=True)))

    def _set_state(self, states: Sequence[Mapping[str, Any]]) -> None:
        self._ask("set_state", [states[share] for share in self._shares])

    def _ask(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Have every worker call the method with its argument, all at the same time, and give back what they return."""
        if self._unfinished:
            raise RuntimeError(f"{self.name}: an earlier call was not finished, so only close() is left")
        if not self._channels:
            raise RuntimeError(f"{self.name}: the environments are closed")
        self._unfinished = True  # an answer that nobody reads would be taken for the next one
        asked = [worker for worker, argument in enumerate(arguments) if argument is not _NOTHING]
        for worker in asked:
            with suppress(OSError):  # it is dead: reading from it will say so
                self._channels[worker].send((method, arguments[worker]))
        return self._answers(asked)

    def _answers(self, asked: Sequence[int]) -> list[Any]:
        answers = [self._answer(worker) for worker in asked]
        self._unfinished = any(isinstance(answer, WorkerDiedError) for answer in answers)
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer.error from _RemoteTraceback(answer.details)
            if isinstance(answer, WorkerDiedError):
                raise answer
        return answers

    def _answer(self, worker: int) -> Any:
        try:
            return self._channels[worker].recv()
        except (EOFError, OSError):
            process, share = self._processes[worker], self._shares[worker]
            process.join()
            return WorkerDiedError(
                f"the process of the environments {share.start} to {share.stop - 1} died (exit status {process.exitcode})"
            )


class _Sizes(NamedTuple):
    """What a worker says of its environments once they are made."""

    name: str
    obs_dim: int
    act_dim: int
    horizon: int
    reports_success: bool
    restores_state: bool


class _Failure(NamedTuple):
    """An exception in a worker."""

    error: BaseException
    details: str


class _RemoteTraceback(Exception):
    """Where in the worker an exception came from, for the chained traceback."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


_NOTHING = object()


def _sizes(environment: Environment | Environments) -> _Sizes:
    return _Sizes(*(getattr(environment, field) for field in _Sizes._fields))


def _common(sizes: Sequence[_Sizes]) -> _Sizes:
    """What all environments of a task have alike.

    Raises:
        ValueError: they differ.
    """
    first = sizes[0]
    for other in sizes[1:]:
        differing = [field for field, one, two in zip(_Sizes._fields, first, other, strict=True) if one != two]
        if differing:
            field = differing[0]
            raise ValueError(
                f"{first.name}: environments of all seeds must have the same {field}, "
                f"got {getattr(first, field)} and {getattr(other, field)}"
            )
    return first


def _work(name: str | MakeEnvironment, seeds: Sequence[int], channel: Connection) -> None:
    """The life of a worker process: until its parent closes the pipe or is no more."""
    environments: SerialEnvironments | None = None
    with suppress(EOFError, OSError):
        try:
            environments = SerialEnvironments([make_env(name, seed) for seed in seeds])
            channel.send(_sizes(environments))
        except Exception as error:
            channel.send(_failure(error))
            return
        while True:
            method, argument = channel.recv()
            outcome = _outcome(environments, method, argument)
            try:
                channel.send(outcome)
            except OSError:
                raise  # the parent is no more
            except Exception as error:  # nothing has been sent of what cannot be pickled
                channel.send(_failure(error))
    if environments is not None:
        environments.close()


def _outcome(environments: SerialEnvironments, method: str, argument: Any) -> Any:
    try:
        return environments.state() if method == "state" else getattr(environments, method)(argument)
    except Exception as error:
        return _failure(error)


def _failure(error: Exception) -> _Failure:
    details = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return _Failure(ParlError(f"{type(error).__name__}: {error}"), details)
    return _Failure(error, details)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started in it never hear of Ctrl-C, which a terminal sends to them all; it reaches this one afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started by the first process otherwise, it would unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
