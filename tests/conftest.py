"""Hypothesis repeats its examples: a failure means a change. `--hypothesis-profile=explore` draws new ones."""

import os

import torch
from hypothesis import settings

# Without a GPU, Triton's kernels run in its interpreter. Before anything imports them: it is decided there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")
