"""One thread for every test: the problems are tiny, and threads of several processes only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
