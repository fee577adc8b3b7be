"""Hypothesis repeats its examples: a failure means a change. `--hypothesis-profile=explore` draws new ones."""

import os
import signal
from collections.abc import Iterator

# Where pytest runs in several processes, each takes its share of the cores, and so do the commands that it starts.
# Before torch is imported: idle threads of one would slow down another.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, share))

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # tests/gpu does without
    settings = None

# Without a GPU, Triton's kernels run in its interpreter. Before anything imports them: it is decided there.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from ddfast import interruption

if settings is not None:
    settings.register_profile("repeatable", derandomize=True, deadline=None)
    settings.register_profile("explore", derandomize=False, deadline=None)
    settings.load_profile("repeatable")

LONGEST = (
    "tests/test_toy_quality.py",
    "tests/test_toy_quality_dd2.py",
    "tests/kernels/test_compile.py",
    "tests/distill/test_parallel.py",
    "tests/cli/test_faults.py",
    "tests/kernels/test_launches.py",
    "tests/policy/test_examples.py",
    "tests/cli/test_commands.py",
    "tests/ops/test_flow_sample.py",
    "tests/distill/test_dd2.py",
    "tests/cli/test_recipes.py",
    "tests/cli/test_dd2_commands.py",
    "tests/cuda/test_flow_sample.py",
    "tests/evaluation/test_quality.py",
)
"""Half a minute and more each, in this order: where several processes share the files, these must not come last."""

LEFT_OUT = {
    "full": "minutes by nature; make test-all runs them",
    "slow": "more seeds and cases; pytest -m 'slow or not slow' runs them",
}
"""Markers that a run may deselect, and what its last lines say of that."""

left_out = dict.fromkeys(LEFT_OUT, 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A command that fails as one of several processes ignores signals from then on; here the process does not end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return (yield)
    finally:
        interruption._ends = False
        for number, handler in before.items():
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_deselected(items: list) -> None:
    for item in items:
        for marker in LEFT_OUT:  # under one of them; `slow` are left out by `make test-all` too
            if item.get_closest_marker(marker) and not (marker == "full" and item.get_closest_marker("slow")):
                left_out[marker] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of pytest-xdist's processes each has collected everything: what one of them says is what there is to say."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.option.keyword:  # what a name leaves out is no news
        return
    for marker, reason in LEFT_OUT.items():
        if left_out[marker]:
            terminalreporter.write_line(f"left out: {left_out[marker]} tests marked {marker} ({reason})")
