"""What happens around the worker processes; what they do for a run is tested with the runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from parl_core import workers


def test_ctrl_c_while_processes_are_started_comes_afterwards_and_never_to_them():
    before, code = (
        signal.getsignal(signal.SIGINT),
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('lives')",
    )
    done = None
    with pytest.raises(KeyboardInterrupt), workers._ctrl_c_held_back():
        os.kill(os.getpid(), signal.SIGINT)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done is not None
    assert done.stdout == "lives\n"
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    with workers._ctrl_c_held_back():
        pass  # and nothing of it is left for the next time


def test_one_thread_is_for_the_time_being(monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers.one_thread():
            assert torch.get_num_threads() == 1
            assert os.environ["MKL_NUM_THREADS"] == os.environ["OPENBLAS_NUM_THREADS"] == "1"
        assert torch.get_num_threads() == 2
        assert os.environ["MKL_NUM_THREADS"] == "7"
        assert "OPENBLAS_NUM_THREADS" not in os.environ
    finally:
        torch.set_num_threads(before)
