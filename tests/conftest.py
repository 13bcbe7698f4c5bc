"""Settings of every test process."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers with as many threads each would wait for one another.
    torch.set_num_threads(1)
