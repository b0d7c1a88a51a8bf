"""What holds for every test.

One thread: the problems are tiny, and threads of several processes only wait for each other. Ctrl-C is heard: a shell starts
what runs in the background with that signal ignored, and so would every process be that a test starts.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
