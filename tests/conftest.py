"""Hypothesis repeats its examples: a failure means a change. `--hypothesis-profile=explore` draws new ones."""

import os

# Where pytest runs in several processes, each takes its share of the cores, and so do the commands that it starts.
# Before torch is imported: idle threads of one would slow down another.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, share))

import torch
from hypothesis import settings

# Without a GPU, Triton's kernels run in its interpreter. Before anything imports them: it is decided there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")

LONGEST = ("tests/test_toy_quality.py", "tests/ops/test_flow_sample.py")
"""Minutes each: where several processes share the files, these must not come last."""


def pytest_collection_modifyitems(items: list) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
