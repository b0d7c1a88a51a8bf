"""Tasks on several cores, a single-threaded process each.

concurrent.futures would do, but for three things: it does not say which task a process died of, it cannot be told to
stop at once, and it does not promise that its processes end with a parent that is killed. Here every process has a pipe
of its own: the end of the pipe tells the parent of the process's death and the process of its parent's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

from .errors import ParlError

Task = Mapping[str, Any]
Report = Callable[[Any], None]
Work = Callable[[Task, Report], Any]
"""What does a task: `work(task, report)`; it, its result and whatever it reports of its progress travel by pickle."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")


class Finished(NamedTuple):
    """A task that is done."""

    task: Task
    result: Any
    seconds: float
    """Wall time of the task alone."""


class Failed(NamedTuple):
    """A task that is not."""

    task: Task
    error: TaskError


class TaskError(ParlError, RuntimeError):
    """A task that raised an exception, or whose process died; `details` is the traceback, if there is one."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def do_tasks(
    work: Work, tasks: Sequence[Task], heard: Callable[[Task, Any], None]
) -> Generator[Finished | Failed, None, None]:
    """Do the tasks one after the other in this process; the rest is as `run_tasks` has it."""
    with one_thread():
        for task in tasks:
            yield _outcome(_do(work, task, partial(heard, task)), task)


def run_tasks(
    work: Work, tasks: Sequence[Task], jobs: int, heard: Callable[[Task, Any], None]
) -> Generator[Finished | Failed, None, None]:
    """Do the tasks in `jobs` processes and give each back as it is finished, or has failed.

    A failure leaves the other tasks alone; a process that died is replaced. Closing the iterator, or an exception in it,
    ends all processes before it returns.

    Args:
        work: does a task.
        tasks: begun in this order.
        jobs: processes, at least 1.
        heard: called here with a task and whatever it reports.
    """
    waiting, busy = deque(tasks), dict[Connection, Task]()
    with _Processes(work) as processes:
        for _ in range(min(jobs, len(tasks))):
            _hand_out(waiting, busy, processes.start())
        while busy:
            for channel in cast("list[Connection]", wait(busy)):
                task = busy[channel]
                try:
                    reply = channel.recv()
                except (EOFError, OSError):
                    del busy[channel]
                    cause = processes.bury(channel)
                    if waiting:
                        _hand_out(waiting, busy, processes.start())
                    yield Failed(task, TaskError(f"the process of {named(task)} died ({cause})"))
                    continue
                if isinstance(reply, _Message):
                    heard(task, reply.content)
                    continue
                del busy[channel]
                _hand_out(waiting, busy, channel)
                yield _outcome(reply, task)


def named(task: Task) -> str:
    """A task in words."""
    return "task " + ", ".join(f"{key}={value}" for key, value in task.items())


class _Message(NamedTuple):
    content: Any


def _hand_out(waiting: deque[Task], busy: dict[Connection, Task], channel: Connection) -> None:
    if waiting:
        busy[channel] = waiting.popleft()
        with suppress(OSError):  # the process is dead: reading from it will say so
            channel.send(busy[channel])


def _outcome(reply: Finished | TaskError, task: Task) -> Finished | Failed:
    return Failed(task, reply) if isinstance(reply, TaskError) else reply._replace(task=task)


def _do(work: Work, task: Task, report: Report) -> Finished | TaskError:
    start = time.perf_counter()
    try:
        result = work(task, report)
    except _ParentGone:
        raise
    except ParlError as error:
        return TaskError(f"{named(task)} failed: {error}", traceback.format_exc())
    except Exception as error:
        message = f"{named(task)} failed with {type(error).__name__}: {error}"
        return TaskError(message, traceback.format_exc())
    return Finished(task, result, time.perf_counter() - start)


class _ParentGone(Exception):
    """Nobody is left to report to."""


def _life(work: Work, channel: Connection) -> None:
    """Of a worker process: until its parent closes the pipe or is no more."""

    def report(content: Any) -> None:
        try:
            channel.send(_Message(content))
        except OSError as error:
            raise _ParentGone from error

    try:
        while True:
            channel.send(_do(work, channel.recv(), report))
    except (EOFError, OSError, _ParentGone):
        return


class _Processes:
    """Worker processes by the pipe to each; all have ended when the block is left, however it is."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        with _ctrl_c_held_back():
            for channel, process in self._processes.items():
                process.terminate()
                channel.close()
            for process in self._processes.values():
                process.join()

    def start(self) -> Connection:
        """Start one more; returns the pipe to it."""
        with _environment(_THREADS), _ctrl_c_held_back():
            ours, theirs = self._context.Pipe()
            # No daemon, which could have no processes of its own, as environments in worker processes are.
            process = self._context.Process(target=_life, args=(self._work, theirs))
            process.start()
            theirs.close()  # so that the pipe ends with the process
            self._processes[ours] = process
        return ours

    def bury(self, channel: Connection) -> str:
        """Take note of a process's death; returns what it died of."""
        process = self._processes.pop(channel)
        channel.close()
        process.join()
        return _cause(process.exitcode)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block is left. Processes started in it never hear of one: a terminal sends it to them all."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    resource_tracker.ensure_running()  # started by the first process otherwise, it would unblock the signal
    pressed: list[int] = []
    # The handler is for this process, where another thread may be the one that gets the signal; the mask is inherited.
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if pressed and callable(handler):
            handler(signal.SIGINT, None)


@contextmanager
def one_thread() -> Iterator[None]:
    """What is computed in this process meanwhile is computed on one thread.

    Most libraries look at their environment variable when they are loaded: enter this before.
    """
    # numba looks whenever it compiles, and refuses another number once its threads are there.
    names = [name for name in _THREADS if not (name.startswith("NUMBA") and "numba" in sys.modules)]
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else None
    with _environment(names):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)


@contextmanager
def _environment(names: Sequence[str]) -> Iterator[None]:
    """These environment variables are 1, here and for good in processes started meanwhile."""
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit status {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"killed by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")
