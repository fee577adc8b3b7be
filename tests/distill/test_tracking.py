"""What a training tells: the sinks of its figures over an interruption, its pace, and the traces of its steps."""

import gzip
import json
import sys
import types

import pytest
import torch

from ddfast import processes, runs
from ddfast.config import TRACKERS, EvaluationConfig, SettingError, TrainConfig, profiled_steps, trackers
from ddfast.distill import tracking
from ddfast.distill.tracking import Pace, check_trackers, stage_log
from ddfast.errors import DDFastError
from ddfast.private_api import is_profiled
from ddfast.tracing import ProfileWindow, span

CPU = torch.device("cpu")


def train(out, stage, steps, config=None):
    """A stage that logs each of its steps: 8 sequences, loss -step; what its progress said."""
    said = []
    with stage_log(out, stage, steps.start, CPU, config) as log:
        for step in steps:
            with span("forward and backward"):
                torch.ones(2, 3) @ torch.ones(3, 2)
            log.step(8)
            log.figures(step + 1, {"loss": -(step + 1.0)})
            said.append(log.text("loss 1"))
    return said


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
    train(tmp_path, "tuning", range(0, 3))
    train(tmp_path, "matching", range(0, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "matching", "st')  # killed while it wrote
    (said, *_) = train(tmp_path, "matching", range(2, 4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("tuning", step) for step in (1, 2, 3)),
        *(("matching", step) for step in (1, 2, 3, 4)),
    ]
    assert lines[-1].keys() == {"stage", "step", "loss", "steps_per_second", "sequences_per_second"}
    assert lines[-1]["loss"] == -4.0
    assert said.startswith("loss 1, ") and said.endswith(" sequences/s")


def test_tensorboard_drops_a_stages_later_steps_and_no_others(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(track="tensorboard")
    train(tmp_path, "tuning", range(0, 5), config)
    train(tmp_path, "matching", range(0, 4), config)
    train(tmp_path, "matching", range(2, 3), config)
    told = {}
    for stage in ("tuning", "matching"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
        events.Reload()
        assert f"{stage}/sequences_per_second" in events.Tags()["scalars"]
        told[stage] = [(event.step, event.value) for event in events.Scalars(f"{stage}/loss")]
    assert told["tuning"] == [(step, -float(step)) for step in range(1, 6)]
    assert told["matching"] == [(step, -float(step)) for step in range(1, 4)]


class StandIn(types.ModuleType):
    """Weights & Biases, as far as it is used here: runs by id that are resumed with their summary."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.axes, self.ended = {}, {}, []

    def init(self, *, id, resume, dir, config, allow_val_change, settings):
        assert resume == "allow"
        self.config = config
        history, stand_in = self.runs.setdefault(id, []), self

        class Run:
            def __init__(self):
                self.log, self.summary = history.append, {}
                for line in history:
                    self.summary |= line

            def define_metric(self, name, step_metric):
                stand_in.axes[name] = step_metric

            def __enter__(self):
                return self

            def __exit__(self, kind, *_):
                stand_in.ended.append(kind)

        return Run()


def test_wandb_goes_on_with_its_run_and_gets_no_step_twice(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = TrainConfig(track="wandb", out=tmp_path / "run")
    check_trackers(config.track)
    train(tmp_path, "tuning", range(0, 2), config)
    with pytest.raises(RuntimeError), stage_log(tmp_path, "matching", 0, CPU, config) as log:
        log.figures(1, {"loss": -1.0})
        log.figures(2, {"loss": -2.0})
        raise RuntimeError
    train(tmp_path, "matching", range(1, 3), config)
    (run,) = wandb.runs.values()
    assert [line.get("matching/step") for line in run] == [None, None, 1, 2, 3]
    assert [line.get("matching/loss") for line in run] == [None, None, -1, -2, -3]
    assert wandb.axes == {"tuning/*": "tuning/step", "matching/*": "matching/step"}
    assert wandb.ended == [None, RuntimeError, None]
    assert wandb.config["out"] == "run" and str(tmp_path) not in str(wandb.config)  # it goes to others

    def no_key(**_):
        raise OSError("no key\nmore")

    monkeypatch.setattr(wandb, "init", no_key)
    with pytest.raises(DDFastError, match=r"^--track wandb: no key; `wandb login`"):
        train(tmp_path, "matching", range(3, 4), config)


def test_the_client_of_wandb_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(0, 3), range(2, 4)):
        train(tmp_path, "tuning", steps, TrainConfig(track="wandb"))
    identity = (tmp_path / "wandb-id").read_text().strip()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))) == 2


@pytest.mark.parametrize("there", [None, types.ModuleType("wandb")], ids=["nothing", "a folder of that name"])
def test_a_missing_tracker_is_named(there, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", there)
    with pytest.raises(DDFastError, match=r"^--track wandb: not installed; pip install 'ddfast\[wandb\]'$"):
        check_trackers("wandb")


def test_a_process_but_the_first_writes_its_trace_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    train(tmp_path, "tuning", range(7, 11), TrainConfig(track="tensorboard", profile_steps="1:3"))
    assert [path.name for path in tmp_path.rglob("*")] == ["profile", "tuning-rank1.json.gz"]


def recorded(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event["name"] == "aten::mm" and event["args"].get("Input Dims") for event in events)
    return sorted(event["name"] for event in events if event["name"].startswith("step "))


DAMAGED = (
    b'{"step": 1, "loss": 1.0}', b'{"stage": "matching"}', b'{"stage": 1, "step": 1}',
    b'{"stage": "matching", "step": "1"}', b'{"stage": "matching", "step": 1, "loss": [1]}', b"[]", b"null}", b"\xff}",
    b"[" * 100_000 + b"}", b'{"step": ' + b"9" * 5000 + b"}",
)  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:40]))
def test_a_damaged_line_is_left_out(tmp_path, line):
    train(tmp_path, "matching", range(0, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes() + line + b"\n")
    assert [one["step"] for one in tracking.read_log(path)["matching"]] == [1, 2]
    train(tmp_path, "matching", range(2, 3))
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(one["stage"], one["step"]) for one in lines] == [("matching", step) for step in (1, 2, 3)]


@pytest.mark.parametrize(("made", "names"), [(6, ["step 2", "step 3"]), (3, ["step 2"]), (2, None), (1, None)])
def test_the_steps_of_the_window_are_recorded(made, names, tmp_path, capsys):
    path = tmp_path / "profile" / "trace.json.gz"
    with ProfileWindow(range(2, 4), path, CPU) as window:
        for step in range(made):
            with span(f"step {step}"):
                torch.ones(2, 3) @ torch.ones(3, 2)
            window.step()
    assert (recorded(path) if path.exists() else None) == names
    missing = f"no trace.json.gz: {made} steps were made, and 2 come before the window"
    assert (str(path) if names else missing) in capsys.readouterr().err


def test_what_fails_in_the_window_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt), ProfileWindow(range(1, 4), tmp_path / "trace.json.gz", CPU) as window:
        window.step()
        window.step()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert not is_profiled()


def test_the_pace_is_that_of_the_last_steps():
    now = 0.0
    pace = Pace(CPU, clock=lambda: now)

    def steps(count, seconds):
        nonlocal now
        for _ in range(count):
            now += seconds
            pace.step(8)
        return pace.figures()

    assert steps(1, 40.0) == {"steps_per_second": 0.025, "sequences_per_second": 0.2}
    assert steps(1, 2.0) == {"steps_per_second": 0.5, "sequences_per_second": 4.0}  # the first counts no more
    assert steps(100, 0.5) == {"steps_per_second": 2.0, "sequences_per_second": 16.0}
    assert pace.text() == "16.0 sequences/s"


def test_a_gpus_figures_are_asked_for_once_a_second(monkeypatch):
    now, asked = 0.0, []

    def utilization(device):
        asked.append(now)
        if now > 2:
            raise ModuleNotFoundError("nvidia-ml-py")
        return 93

    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    pace = Pace(torch.device("cuda"), clock=lambda: now)
    for second in (0.25, 0.5, 1.0, 1.75):
        now = second
        pace.step(1)
        assert pace.text().endswith("sequences/s, GPU 93%, 1.5 GiB")
    assert asked == [0.25, 1.75]
    assert pace.figures().items() >= {"gpu_utilisation": 0.93, "peak_memory_gib": 1.5}.items()
    now = 9.0  # without NVML the figure is left out, and not asked for again
    assert pace.text().endswith("sequences/s, 1.5 GiB")
    now = 19.0
    assert "gpu_utilisation" not in pace.figures()
    assert asked == [0.25, 1.75, 1.75, 9.0]


def test_settings_of_what_is_told():
    assert trackers("") == () and trackers("wandb, tensorboard,wandb") == ("wandb", "tensorboard")
    assert tuple(tracking.SINKS) == TRACKERS
    assert profiled_steps("") == range(0) and profiled_steps("10:13") == range(10, 13)
    for wrong in ("10", "0:3", "13:10", "3:3", "-1:2", "1:2:3", "a:b"):
        with pytest.raises(SettingError, match="profile_steps"):
            TrainConfig(profile_steps=wrong)


def test_what_is_told_may_change_between_interruptions(tmp_path):
    (tmp_path / "trajectories").mkdir()
    runs.claim_folder(TrainConfig(out=tmp_path))
    runs.claim_folder(TrainConfig(out=tmp_path, track="wandb", profile_steps="1:2"))
    smaller = EvaluationConfig(batch_size=4, batch_sizes=(1, 4))  # as the error advises whose evaluation did not fit
    runs.claim_folder(TrainConfig(out=tmp_path, evaluation=smaller))
    with pytest.raises(DDFastError, match="seed is 0, not 1"):
        runs.claim_folder(TrainConfig(out=tmp_path, seed=1))
