"""Several environments: the same numbers wherever they run, and processes that end when they should."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from parl_core.envs import make_env, make_environments
from parl_core.envs.vector import ProcessEnvironments, WorkerDiedError
from parl_core.errors import UnknownNameError
from tests.envs.own_tasks import Drift

SEEDS = [4, 7, 1, 9, 2]


@pytest.fixture
def made():
    """`make_environments`, closed afterwards."""
    opened = []

    def make(*arguments):
        opened.append(make_environments(*arguments))
        return opened[-1]

    yield make
    for environments in opened:
        environments.close()


def _roll(environments, count, seed=0):
    """Everything that `count` steps give, where ended episodes begin anew, in the order 'last one first'."""
    random = np.random.default_rng(seed)
    given = []
    for _ in range(count):
        steps = environments.step(random.uniform(-1, 1, (environments.num, environments.act_dim)))
        given += [(part.dtype, part.tolist()) for part in steps]
        ended = np.flatnonzero(steps.terminated | steps.truncated).tolist()[::-1]
        given.append(environments.reset(ended).tolist())
    return given


@pytest.mark.parametrize("workers", [0, 2, 7])
def test_the_numbers_are_those_of_each_environment_alone(made, workers):
    environments = made("tests.envs.own_tasks:SavedDrift", SEEDS, workers)
    assert (environments.num, environments.obs_dim, environments.act_dim, environments.horizon) == (5, 2, 1, 4)
    assert environments.restores_state and not environments.reports_success
    alone = [make_env("tests.envs.own_tasks:SavedDrift", seed) for seed in SEEDS]
    np.testing.assert_array_equal(environments.reset(), [env.reset() for env in alone])
    np.testing.assert_array_equal(environments.reset([3, 0]), [alone[3].reset(), alone[0].reset()])
    random = np.random.default_rng(0)
    for _ in range(4):
        actions = random.uniform(-1, 1, (5, 1))
        steps, expected = (
            environments.step(actions),
            [env.step(action) for env, action in zip(alone, actions, strict=True)],
        )
        for part, of_each in zip(steps, zip(*expected, strict=True), strict=True):
            np.testing.assert_array_equal(part, of_each)
        assert [part.dtype for part in steps] == [np.float32, np.float64, bool, bool, bool]
    assert steps.truncated.all()


def test_states_move_between_workers_and_serial_ones(made):
    serial, spread = (
        made("tests.envs.own_tasks:SavedDrift", SEEDS, 0),
        made("tests.envs.own_tasks:SavedDrift", SEEDS[::-1], 2),
    )
    serial.reset()
    _roll(serial, 3)
    states = serial.state()
    spread.set_state(states)
    expected = _roll(serial, 6)
    assert _roll(spread, 6) == expected
    spread.set_state(states)
    serial.set_state(spread.state())
    assert _roll(serial, 6) == expected
    with pytest.raises(ValueError, match="states must hold one of each of the 5 environments, got 4"):
        serial.set_state(states[:4])


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_caller_with_their_message(made, workers):
    environments = made(Drift, SEEDS, workers)
    environments.reset()
    states = environments.state()
    with pytest.raises(ValueError, match=r"actions must have shape \(5, 1\), got \(5,\)"):
        environments.step(np.zeros(5))
    for indices in ([5], [-1], [0, 0]):
        with pytest.raises(ValueError, match="indices must be different ones of 0 to 4"):
            environments.reset(indices)
    with pytest.raises(ValueError, match=r"tests.envs.own_tasks:Drift: action must lie in \[-1, 1\], got \[3.0\]"):
        environments.step(np.full((5, 1), 3.0))
    environments.set_state(states)
    with pytest.raises(RuntimeError, match="call reset first"):
        environments.step(np.zeros((5, 1)))
    assert environments.reset().shape == (5, 2)  # every answer has been read: no call gets another's


def test_an_error_of_the_task_itself_names_its_line(made):
    environments = made("tests.envs.own_tasks:Drift", [0, 1], 2)
    environments.reset()
    with pytest.raises(RuntimeError, match="call reset first") as raised:
        for _ in range(5):
            environments.step(np.zeros((2, 1)))
    assert "interface.py" in str(raised.value.__cause__)


def test_an_answer_that_cannot_be_sent_says_why_and_the_worker_lives(made):
    environments = made("tests.envs.own_tasks:SecretiveDrift", [0, 1], 1)
    environments.reset()
    with pytest.raises(Exception, match="lambda"):
        environments.state()
    assert environments.reset().shape == (2, 2)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_environments_that_differ_are_refused(workers):
    with pytest.raises(ValueError, match="Longer: environments of all seeds must have the same horizon, got 3 and 5"):
        make_environments("tests.envs.own_tasks:Longer", [3, 5], workers)


def test_a_worker_that_dies_is_named(made):
    environments = made("tests.envs.own_tasks:Dies", SEEDS, 2)
    environments.reset()
    with pytest.raises(WorkerDiedError, match=r"the environments 0 to 1 died \(exit status 7\)"):
        environments.step(np.zeros((5, 1)))
    with pytest.raises(RuntimeError, match=r"only close\(\) is left"):
        environments.reset()


def test_what_cannot_be_made_says_so():
    for workers in (0, 1):
        with pytest.raises(ValueError, match="no environment for 3"):
            make_environments("tests.envs.own_tasks:fails_to_start", [3], workers)
        with pytest.raises(UnknownNameError, match="did you mean tabular/four-rooms"):
            make_environments("tabular/for-rooms", [3], workers)
    with pytest.raises(ValueError, match="must be a function of a module"):
        make_environments(lambda seed: Drift(seed), [0], 1)
    with pytest.raises(ValueError, match="seeds must hold at least one seed"):
        make_environments("tests.envs.own_tasks:Drift", [])
    with pytest.raises(ValueError, match="workers must be at least 0, got -1"):
        make_environments("tests.envs.own_tasks:Drift", [0], -1)


def test_closing_ends_the_processes(made):
    environments = made("tests.envs.own_tasks:Drift", SEEDS, 2)
    assert isinstance(environments, ProcessEnvironments)
    processes = list(environments._processes)
    environments.close()
    environments.close()
    assert [process.exitcode for process in processes] == [0, 0]
    with pytest.raises(RuntimeError, match="the environments are closed"):
        environments.reset()


_PARENT = """
import sys, time
from parl_core.envs import make_environments
if __name__ == "__main__":
    environments = make_environments("tests.envs.own_tasks:Drift", [0, 1], 2)
    environments.reset()
    print(*(process.pid for process in environments._processes), flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print(environments.reset().shape, flush=True)
        sys.exit(3)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_outlive_ctrl_c_but_not_their_parent(tmp_path, number):
    """Ctrl-C goes to the whole process group, as a terminal sends it; SIGKILL to the parent alone."""
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    path = os.pathsep.join([os.getcwd(), *(entry for entry in sys.path if entry)])
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)
            assert parent.stdout.readline() == "(2, 2)\n" and parent.wait() == 3
        else:
            parent.kill()
    for _ in range(200):
        if not any(_is_alive(worker) for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"of {workers} one is still alive")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # a zombie that nobody has waited for is dead
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
