"""Small trainings of every stage and family, for tests that share them over processes in one way or another."""

import contextlib
import json
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from official import llamagen_teacher_like, randomised, var_teacher_like

from ddfast import env, processes
from ddfast.config import DD1Config, TrainConfig, TrajectoryConfig, update
from ddfast.distill import trainer
from ddfast.distill.checkpoints import FOLDER
from ddfast.distill.micro_batch import MicroBatch
from ddfast.distill.stages import adapt, distill, match, new_network, tune
from ddfast.distill.tracking import METRICS
from ddfast.errors import DDFastError
from ddfast.models import checkpoint
from ddfast.models.checkpoint import AnyTensor, read_tensor, save_tensors
from ddfast.models.loading import save_student, start_student
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.models.transformer import TransformerTeacher
from ddfast.pipeline import save_network
from ddfast.trajectories.generate import store_settings
from ddfast.trajectories.store import Trajectories

STUDENT, GUIDANCE = "student.safetensors", "guidance.safetensors"
TIMEOUT = 60.0
SHORT = {"batch_size": 16, "warmup": 2, "log_every": 1, "checkpoint_every": 1000}


def small_teacher() -> TransformerTeacher:
    """The digits' transformer."""
    torch.manual_seed(0)
    codebook = torch.randn(11, 3)
    teacher = TransformerTeacher(codebook=codebook, groups=(1, 3, 5), num_classes=3, width=32, depth=2, heads=4)
    randomised(teacher)
    teacher.codebook.copy_(codebook)
    return teacher


TEACHERS: dict[str, Callable[[], Teacher]] = {
    "digits": small_teacher,
    "var": var_teacher_like,
    "llamagen": llamagen_teacher_like,
}


@dataclass(frozen=True)
class Case:
    """What is trained: a family's stage.

    Attributes:
        family: of `TEACHERS`.
        stage: distill, adapt, tune or match.
        settings: of the stage.
    """

    family: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """How the work is shared.

    Attributes:
        strategy, micro_batch, recompute: as in `ParallelConfig`.
        nodes: on which the processes are, equally many on each.
        teacher_too: the teacher is spread as well.
    """

    strategy: str = "replicate"
    micro_batch: int = 1000
    recompute: str = "none"
    nodes: int = 1
    teacher_too: bool = False


@contextlib.contextmanager
def shared(way: Way) -> Iterator[None]:
    """Within, processes are on so many nodes, and memory is as short as the way says."""
    local = env.local_rank_and_world_size()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(local // way.nodes))
        if way.teacher_too:
            patch.setattr(trainer, "shards_teacher", lambda *_: True)
        yield


def config_of(case: Case, way: Way) -> TrainConfig:
    config = TrainConfig(dd1=DD1Config(point=1, point_probability=0.4))
    stage = {"distill": config.dd1, "adapt": config.dd2.adapt, "tune": config.dd2.tune, "match": config.dd2.match}
    update(config.dd2, {"head_width": 16, "head_depth": 1})
    update(stage[case.stage], {**SHORT, **case.settings})
    parallel = {"strategy": way.strategy, "micro_batch": way.micro_batch, "recompute": way.recompute}
    update(config.parallel, {**parallel, "timeout": TIMEOUT})
    return config


def random_pairs(teacher: Teacher, count: int = 40) -> Trajectories:
    """A store's pairs, in memory."""
    generator = torch.Generator().manual_seed(5)
    return Trajectories(
        codes=torch.randint(teacher.num_codes, (count, teacher.num_tokens), generator=generator).to(torch.uint8),
        condition=torch.arange(count) % teacher.num_conditions,
        index=torch.arange(count),
        settings=store_settings(teacher, TrajectoryConfig(count=count), 0),
    )


def shaken(network: Student, seed: int) -> Student:
    """The network with weights from which every gradient is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def train(case: Case, way: Way, out: Path, *, stop_at: int = 0, seed: int = 0) -> None:
    """Train a case: networks' files, and the log, go to `out`.

    Args:
        case: what.
        way: how.
        out: folder.
        stop_at: step after which Ctrl-C comes to the last process, or to none.
        seed: of the run.
    """
    teacher, config = TEACHERS[case.family](), config_of(case, way)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config.seed = seed

    def progress(done: int, total: int, text: str) -> None:
        if done == stop_at and processes.rank() == processes.count() - 1:
            signal.raise_signal(signal.SIGINT)

    with shared(way):
        if case.stage == "distill":
            start, pairs = shaken(start_student(teacher), 1), random_pairs(teacher)
            student, live = distill(config, teacher, pairs, out, student=start, progress=progress)
            save_student(out / STUDENT, student, {"config": {}}, live=live)
        else:
            network = shaken(new_network(config, teacher), 1)
            if case.stage == "adapt":
                adapt(config, teacher, network, out, progress=progress)
            elif case.stage == "tune":
                pairs = random_pairs(teacher) if config.dd2.tune.source == "store" else None
                tune(config, teacher, network, pairs, out, progress=progress)
            if case.stage == "match":
                guidance = shaken(new_network(config, teacher), 2)
                live = match(config, teacher, network, guidance, out, progress=progress)
                save_network(out / GUIDANCE, guidance)
                save_student(out / STUDENT, network, {"config": {}}, live=live)
            else:
                save_network(out / STUDENT, network)
    processes.wait()
    after = teacher.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    codes = teacher.generate(teacher.condition_of(torch.tensor([0, 1])), sampler="greedy")
    assert codes.shape == (2, teacher.num_tokens)


Plan = list[tuple[Case, Way, Path]]


def train_all(plan: Plan) -> None:
    """Train cases one after the other; every process has its part of each."""
    with processes.together("cpu", TIMEOUT):
        for case, way, out in plan:
            train(case, way, out)


def figures(out: Path) -> list[dict[str, Any]]:
    """The log's lines, without the pace."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]


# Interrupted and resumed ---------------------------------------------------------------------------------------------

RESUMED = Case(
    "digits",
    "match",
    {
        "form": "kl", "fake_score": "codes", "optimizer": "muon", "checkpoint_every": 3, "ema_decay": 0.9,
        "start_iterations": 2, "guidance_first": 1, "guidance_updates": 1, "iterations": 3, "align_iterations": 1,
        "later_iterations": 1, "later_guidance_updates": 1, "watch_every": 4,
    },
)  # fmt: skip
"""12 steps; after the first 5, every phase has had its turn."""
STOP_AT = 8
FOUND = Way("shard", micro_batch=0, recompute="auto")


@contextlib.contextmanager
def memory_holds(found: MicroBatch | None) -> Iterator[None]:
    """Within, this is what trials find; None: there is none to be made."""

    def choose(*_: object, **__: object) -> MicroBatch:
        assert found is not None
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "choose", choose)
        yield


def interrupt(way: Way, out: Path) -> None:
    """Train until Ctrl-C comes to one process."""
    with memory_holds(MicroBatch(size=3, recompute=True)), pytest.raises(KeyboardInterrupt):
        train(RESUMED, way, out, stop_at=STOP_AT)


def copied(source: Path, target: Path) -> Path:
    """A folder's copy, by one process for all."""
    return processes.first_does(lambda: Path(shutil.copytree(source, target)))


def newest(out: Path) -> Path:
    """The last checkpoint."""
    return max((out / FOLDER).glob("[!.]*"))


def flip(out: Path) -> None:
    """Damage the tensors of the last checkpoint."""
    file = min(newest(out).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(place: Path) -> None:
    """Damage a checkpoint's state."""
    state = place / "state.json"
    state.write_bytes(state.read_bytes()[:100])


def refused(case: Case, way: Way, out: Path, **options: Any) -> str:
    """What a training says that is not begun."""
    with pytest.raises(DDFastError) as said:
        train(case, way, out, **options)
    return str(said.value)


def resumptions(folder: Path) -> dict[str, Any]:
    """Of two processes: what they interrupt, resume, and refuse, in `folder`; what was said."""
    said: dict[str, Any] = {}
    with memory_holds(MicroBatch(size=3, recompute=True)):
        train(RESUMED, FOUND, folder / "undisturbed")
    interrupt(FOUND, folder / "interrupted")
    said["kept"] = sorted(path.name for path in (folder / "interrupted" / FOLDER).iterdir())
    leftover = copied(folder / "interrupted", folder / "resumed") / FOLDER / ".matching-00000009.tmp"
    flipped = copied(folder / "interrupted", folder / "flipped")
    hopeless = copied(folder / "interrupted", folder / "hopeless")

    def damage() -> None:
        leftover.mkdir()
        flip(flipped)
        for place in (hopeless / FOLDER).iterdir():
            cut(place)

    processes.first_does(damage)
    with memory_holds(None):
        train(RESUMED, FOUND, folder / "resumed")
        train(RESUMED, FOUND, flipped)
    said["left"] = leftover.exists()
    said["hopeless"] = refused(RESUMED, FOUND, hopeless)
    said["other settings"] = refused(RESUMED, FOUND, folder / "interrupted", seed=1)
    train(RESUMED, Way("replicate", 2, "blocks"), copied(folder / "by one", folder / "by one, then two"))
    return said


def writing(folder: Path) -> dict[str, int]:
    """Of several processes that write a spread network: how many tensors they gather, and have at a time at most."""
    case, way = Case("llamagen", "tune", {"iterations": 1, "source": "store"}), Way("shard")
    teacher, config = TEACHERS[case.family](), config_of(case, way)
    network = new_network(config, teacher)
    tune(config, teacher, network, random_pairs(teacher), folder / "written")
    gathered: list[weakref.ref] = []
    most = 0

    def read(tensor: AnyTensor) -> torch.Tensor:
        nonlocal most
        found = read_tensor(tensor)
        gathered.append(weakref.ref(found.untyped_storage()))
        most = max(most, sum(storage() is not None for storage in gathered))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_tensor", read)
        save_tensors(folder / "written" / STUDENT, dict(network.named_parameters()), {})
    return {"gathered": len(gathered), "most": most}
