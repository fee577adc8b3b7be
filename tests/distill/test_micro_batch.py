"""The micro-batch by trial, on simulated devices: every trial has a memory model, and a limit that none may exceed."""

import itertools
import json

import pytest
import torch

from ddfast import processes
from ddfast.distill.micro_batch import (
    MicroBatch,
    Use,
    choose,
    missing_bytes,
    needs_recompute,
    next_trial,
    peak_bytes,
    predicted,
)
from ddfast.errors import DDFastError
from ddfast.optimizers import Muon

CPU = torch.device("cpu")


class Device:
    """Counts trials; `shared` and `each` bytes per trial and sample, a fraction of `each` where blocks are repeated.

    Above `limit` a trial is one too many, above `memory` it fails.
    """

    def __init__(self, limit: float, shared: float, each: float, *, memory: float = float("inf"), jump: float = 0.0):
        self.limit, self.shared, self.each, self.memory, self.jump = limit, shared, each, memory, jump
        self.trials: list[tuple[int, bool]] = []

    def bytes(self, size: int, recompute: bool = False) -> float:
        return self.shared + size * self.each / (5 if recompute else 1) + (self.jump if size >= 8 else 0.0)

    def attempt(self, size: int, recompute: bool) -> None:
        self.trials.append((size, recompute))
        if self.bytes(size, recompute) > self.memory:
            raise torch.OutOfMemoryError("too much")

    def measure(self, run) -> Use:
        run()
        return Use(int(self.bytes(*self.trials[-1])), int(self.limit))

    def choose(self, most: int, **settings) -> MicroBatch:
        return choose(self.attempt, most, CPU, measure=self.measure, **settings)

    def best(self, most: int, recompute: bool = False) -> int:
        return max(n for n in range(most + 1) if self.bytes(n, recompute) <= self.limit)


LIMITS, SHARED, MOST = (1e9, 3.3e9, 1e10, 7.7e10), (0.0, 1e8, 5e8), (1, 7, 64, 1000)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_no_trial_exceeds_the_limit_and_the_choice_is_close_to_the_best(recompute):
    for limit, shared, most, each in itertools.product(LIMITS, SHARED, MOST, (1e6, 3.1e7, 4.7e8)):
        device = Device(limit, shared, each)
        chosen = device.choose(most, recompute=recompute)
        assert all(device.bytes(*trial) <= limit for trial in device.trials if trial[0] != 2)
        assert all(device.bytes(*trial) <= 2 * limit for trial in device.trials)  # 2 samples where 1 takes nearly all
        assert device.bytes(chosen.size, chosen.recompute) <= limit
        assert 0.85 * device.best(most, chosen.recompute) <= chosen.size <= most
        assert chosen.recompute == (recompute == "blocks")
        assert sum(size for size, _ in device.trials) <= 4 * chosen.size


def test_a_batch_that_fits_beyond_doubt_costs_one_trial_of_one_sample():
    device = Device(1e10, 1e6, 1e7)
    assert device.choose(128) == MicroBatch(size=128, recompute=False)
    assert device.trials == [(1, False)]


def test_memory_that_jumps_is_found_by_backing_off():
    """An algorithm that takes memory of its own from 8 samples on: no line foresees it."""
    for memory in (1.05e9, float("inf")):  # fails, or is measured
        device = Device(1e9, 0.0, 9e7, memory=memory, jump=4e8)
        assert device.choose(64, recompute="none").size == device.best(64) == 7


def test_blocks_are_repeated_where_too_few_samples_fit_without():
    assert needs_recompute(7, 64) and not needs_recompute(8, 64)
    assert needs_recompute(3, 4) and not needs_recompute(4, 4)  # all of a small batch are enough
    assert needs_recompute(15, 64, size=16) and not needs_recompute(16, 64, size=16)
    for limit, expected in ((1e9, True), (8.2e9, False)):
        device = Device(limit, 0.0, 1e9)
        chosen = device.choose(512)
        assert chosen.recompute is expected
        assert 0.85 * device.best(512, expected) <= chosen.size <= device.best(512, expected)
    assert Device(1e9, 0.0, 3e9, memory=2e9).choose(512) == MicroBatch(size=1, recompute=True)


def test_what_is_asked_for_is_not_tried():
    device = Device(1e9, 0.0, 1e8)
    for ways, expected in (("none", False), ("blocks", True)):
        assert device.choose(64, size=16, recompute=ways) == MicroBatch(size=16, recompute=expected)
        assert device.choose(4, size=16, recompute=ways) == MicroBatch(size=4, recompute=expected)
    assert not device.trials
    assert device.choose(64, size=16) == MicroBatch(size=16, recompute=True)
    assert device.choose(64, size=8) == MicroBatch(size=8, recompute=False)
    assert all(size <= 10 and not recompute for size, recompute in device.trials)


def test_what_will_be_taken_is_left_free():
    device = Device(1e9, 0.0, 1e7)
    assert device.choose(1000, recompute="none", reserved=int(5e8)).size in range(43, 51)
    network = torch.nn.Linear(3, 5)
    optimizers = [torch.optim.AdamW([network.bias]), Muon([network.weight], weight_decay=0.0)]
    assert missing_bytes([network], optimizers) == 4 * (5 + 15) + 4 * (2 * 5 + 15)
    network(torch.ones(2, 3)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert missing_bytes([network, network], optimizers) == 0


def test_too_little_memory_is_one_line():
    for recompute, words in (("none", "--parallel.recompute blocks"), ("auto", "--parallel.strategy shard")):
        with pytest.raises(DDFastError, match=words):
            Device(1e6, 0.0, 1e9, memory=1e8).choose(8, recompute=recompute)


def test_the_process_with_the_least_memory_decides(monkeypatch):
    other = Device(5e8, 0.0, 1e7)
    device = Device(1e9, 0.0, 1e7)

    def gather(use: Use) -> list[Use]:
        return [use, Use(int(other.bytes(*device.trials[-1])), int(other.limit))]

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gather", gather)
    assert device.choose(1000, recompute="none").size in range(43, 51)
    assert all(other.bytes(*trial) <= other.limit for trial in device.trials)
    device.memory = 1e6
    with pytest.raises(DDFastError, match=r"--parallel.micro-batch 1, and --parallel.recompute blocks"):
        device.choose(1000)


def test_an_error_of_the_step_is_its_own():
    with pytest.raises(RuntimeError, match="mistake"):
        choose(lambda size, recompute: _fail(), 4, CPU)


def _fail() -> None:
    raise RuntimeError("a mistake")


def test_the_model_by_hand():
    assert predicted([(2, 10)], 6) == 30
    assert predicted([(1, 7), (2, 10), (4, 20)], 6) == 30
    assert predicted([(2, 10), (4, 8)], 6) == 8
    assert next_trial([[(1, 10), (2, 20)]], [100], 64) == 4
    assert next_trial([[(4, 40), (8, 80)]], [100], 64) == 10
    assert next_trial([[(4, 40), (8, 80)]], [95], 64) == 8  # one more is not worth a trial
    assert next_trial([[(4, 40), (8, 80)]], [95], 9) == 9  # but all are
    assert next_trial([[(4, 40), (8, 80)], [(4, 50), (8, 100)]], [200, 125], 64) == 10


def test_bytes_of_tensors_are_those_of_the_allocator(tmp_path):
    """Views, results in place and what was there before count for nothing; what is dropped is free again."""
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def run() -> None:
        x = torch.ones(16, 64)
        for weight in weights:
            x = (x @ weight).view(64, 16).T.reshape(16, 64).relu_()
        x.sum().backward()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    assert peak_bytes(run) == pytest.approx(peak, rel=0.01)
