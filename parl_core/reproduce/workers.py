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
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, cast

from ..errors import ParlError
from .csv_files import plain_rows
from .study import Rows, Study

Task = Mapping[str, Any]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NUMBA_NUM_THREADS")


class Finished(NamedTuple):
    """A task that is done."""

    task: Task
    rows: Rows
    seconds: float
    """Wall time of the task alone."""


class TaskError(ParlError, RuntimeError):
    """A task that raised an exception, or whose process died; `details` is the traceback, if there is one."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def run_tasks(study: Study, tasks: Sequence[Task], jobs: int) -> Generator[Finished, None, None]:
    """Do the tasks in `jobs` processes (in this one if it is 1) and give each back as it is finished.

    Closing the iterator, or an exception in it, ends all processes before it returns.

    Raises:
        TaskError: a task raised an exception or its process died.
    """
    if jobs == 1:
        with one_thread():
            for task in tasks:
                yield _checked(_do(study, task), task)
        return
    waiting = deque(tasks)
    busy: dict[Connection, Task] = {}
    with _processes(study, min(jobs, len(tasks))) as processes:
        for channel in processes:
            _hand_out(waiting, busy, channel)
        while busy:
            for channel in cast("list[Connection]", wait(busy)):
                task = busy.pop(channel)
                try:
                    reply = channel.recv()
                except (EOFError, OSError) as error:
                    process = processes[channel]
                    process.join()
                    raise TaskError(f"the process of {named(task)} died ({_cause(process.exitcode)})") from error
                _hand_out(waiting, busy, channel)
                yield _checked(reply, task)


def named(task: Task) -> str:
    """A task in words."""
    return "task " + ", ".join(f"{key}={value}" for key, value in task.items())


def _hand_out(waiting: deque[Task], busy: dict[Connection, Task], channel: Connection) -> None:
    if waiting:
        busy[channel] = waiting.popleft()
        with suppress(OSError):  # the process is dead: reading from it will say so
            channel.send(busy[channel])


def _checked(reply: Finished | TaskError, task: Task) -> Finished:
    if isinstance(reply, TaskError):
        raise reply
    return reply._replace(task=task)


def _do(study: Study, task: Task) -> Finished | TaskError:
    start = time.perf_counter()
    try:
        rows = plain_rows(study.run(task))
    except ParlError as error:
        return TaskError(f"{named(task)} failed: {error}", traceback.format_exc())
    except Exception as error:
        message = f"{named(task)} failed with {type(error).__name__}: {error}"
        return TaskError(message, traceback.format_exc())
    return Finished(task, rows, time.perf_counter() - start)


def _work(study: Study, channel: Connection) -> None:
    """The life of a worker process: until its parent closes the pipe or is no more."""
    try:
        while True:
            channel.send(_do(study, channel.recv()))
    except (EOFError, OSError):
        return


@contextmanager
def _processes(study: Study, number: int) -> Iterator[dict[Connection, Any]]:
    """Worker processes by the pipe to each; all have ended when the block is left, however it is."""
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, Any] = {}
    try:
        with _environment(_THREADS), _ctrl_c_held_back():
            for _ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(study, theirs), daemon=True)
                process.start()
                theirs.close()  # so that the pipe ends with the process
                processes[ours] = process
        yield processes
    finally:
        with _ctrl_c_held_back():
            for channel, process in processes.items():
                process.terminate()
                channel.close()
            for process in processes.values():
                process.join()


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
