"""What `ddfast plan` says of memory against what real steps take, and of every recipe: the tables of docs/scale.md.

    python benchmarks/plan_memory.py measure    # steps on the CPU: the process's memory at its peak, against the plan's
    python benchmarks/plan_memory.py large      # the same at 512 pixels: a table of docs/notes/resolution.md
    python benchmarks/plan_memory.py recipes    # every recipe by both methods on 8 x 80 GiB

A measured step is what the trainer does: micro-batches forward and backward with gradients that accumulate, clipping,
AdamW and the moving average. Its peak is the kernel's own high-water mark of the process's resident memory (VmHWM, set
back by writing 5 to /proc/self/clear_refs), less what was resident before the networks were made.
"""

import ctypes
import functools
import gc
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from ddfast import seeds
from ddfast.config import update
from ddfast.distill.batch import Part
from ddfast.distill.dd1 import DD1
from ddfast.distill.dd2 import Matching, Tuning
from ddfast.distill.memory_model import Size, state_bytes
from ddfast.distill.method import ExponentialMovingAverage, Roles
from ddfast.distill.rehearsal import Rehearsal, forward_pass
from ddfast.distill.stages import new_network
from ddfast.models.loading import start_student, untrained_teacher
from ddfast.planning import GPUS, Machine, as_json, plan
from ddfast.recipes import RECIPES, get_recipe

BATCH = 4
TOKENIZER = {"num_codes": 1024, "channels": 32, "multipliers": [1, 1], "blocks": 1}
SETTINGS = {
    "digits": {"teacher": {"width": 384, "depth": 6, "heads": 6}},
    "var-d16": {"teacher": {"depth": 5}, "tokenizer": TOKENIZER, "dd2": {"head_width": 320}},
    "llamagen-b": {
        "teacher": {"dim": 384, "n_layer": 6, "n_head": 6, "num_classes": 100}, "tokenizer": TOKENIZER,
        "dd2": {"head_width": 384},
    },
}  # fmt: skip
LARGE_IMAGES = {
    "var-d16 at 512": {
        "teacher": {"depth": 3, "patch_nums": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]}, "tokenizer": TOKENIZER,
        "dd2": {"head_width": 192},
    },
    "llamagen-b at 512": {
        "teacher": {"dim": 192, "n_layer": 3, "n_head": 3, "num_classes": 100, "block_size": 1024},
        "tokenizer": TOKENIZER, "dd2": {"head_width": 192},
    },
}  # fmt: skip
"""Of docs/notes/resolution.md."""
SMALL = {"digits": {"width": 48}, "var-d16": {"depth": 1}, "llamagen-b": {"dim": 96, "n_head": 3}}
SAMPLES = {"digits": 64, "var-d16": 1, "llamagen-b": 2, "var-d16 at 512": 1, "llamagen-b at 512": 1}
"""Samples in the place of one, so that activations are a good part of the memory."""
PHASES = {"student": "dd1", "full": "dd2", "guidance": "dd2", "matching": "dd2"}
PUBLISHED_HOURS = {
    "var-d16": (297, 116), "var-d20": (484, 174), "var-d24": (604, 96), "llamagen-l": (648, 53),
}  # fmt: skip
"""Of the papers, on 8 A800: DD1 and DD2."""


def resident(what: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def settle() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def networks(config, teacher, phase: str) -> dict[str, nn.Module]:
    if config.method == "dd1":
        return {"student": start_student(teacher)}
    names = ("student",) if phase == "full" else ("student", "guidance")
    return {name: new_network(config, teacher) for name in names}


def method_of(config, teacher, found, phase: str):
    if config.method == "dd1":
        return DD1(Roles(student=found["student"], teacher=teacher), config.dd1)
    if phase == "full":
        return Tuning(Roles(student=found["student"], teacher=teacher), config.dd2.tune)
    return Matching(Roles(student=found["student"], teacher=teacher, guidance=found["guidance"]), config.dd2.match)


def configured(recipe: str, phase: str):
    config = get_recipe(recipe.split()[0])
    update(config, {"method": PHASES[phase], **(SETTINGS | LARGE_IMAGES)[recipe]})
    return config


def trainee(config, phase: str, precision: str):
    """The teacher, and a function that makes one step of a phase: (samples in all, samples at a time, recompute)."""
    teacher = untrained_teacher(config)
    found = {name: network.train().requires_grad_(True) for name, network in networks(config, teacher, phase).items()}
    method = method_of(config, teacher, found, phase)
    trained = {id(network): network for network in method.networks.values()}.values()
    optimizers = {id(network): torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95)) for network in trained}
    average = ExponentialMovingAverage(method.roles.student, 0.999)
    for network in trained:  # as after a step of each phase
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter).add_(1e-6)
        optimizers[id(network)].step()
    own = {"matching": "student"}.get(phase, phase)
    updated = method.networks[own]

    def step(size: int, micro: int, recompute: bool) -> None:
        updated.zero_grad(set_to_none=True)
        for first in range(0, size, micro):
            part = Part(size=size, first=first, last=first + micro, generator=seeds.generator(0))
            loss, beside = forward_pass(method, own, part, precision=precision, recompute=recompute)
            loss.backward()
            del loss, beside
        nn.utils.clip_grad_norm_(updated.parameters(), 1.0)
        optimizers[id(updated)].step()
        average.update(method.roles.student, 0)

    return teacher, step


def measure(recipe: str, phase: str, precision: str) -> None:
    """Lines of one network and phase: what steps take, with and without recomputation, and what the plan says."""
    torch.set_num_threads(1)
    config, own, scale = configured(recipe, phase), {"matching": "student"}.get(phase, phase), SAMPLES[recipe]
    batch_size = BATCH * scale
    warm = configured(recipe, phase)  # reads the libraries' code, which is in the resident memory too
    update(warm, {"teacher": SMALL[recipe.split()[0]]})
    for recompute in (False, True):
        trainee(warm, phase, precision)[1](2, 1, recompute)
    settle()
    before = resident("VmRSS")
    teacher, step = trainee(config, phase, precision)
    taken = {}
    for micro in (scale, 2 * scale, 4 * scale):
        for recompute in (False, True):
            step(batch_size, micro, recompute)
            settle()
            Path("/proc/self/clear_refs").write_text("5")
            step(batch_size, micro, recompute)
            taken[micro, recompute] = resident("VmHWM") - before

    config.device = "meta"
    made = Rehearsal(config, lambda teacher: networks(config, teacher, phase), "cpu")
    with made.pretending():
        method = method_of(config, made.teacher, made.networks, phase)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*teacher.parameters(), *teacher.buffers()))
    for name, network in made.networks.items():
        held += state_bytes(Size.of(network), "adamw", averaged=name == "student").total
    for (micro, recompute), measured in taken.items():
        cost = made.cost(method, own, precision=precision, recompute=recompute)
        said = held + cost.peak(micro)
        name = f"{recipe}, {PHASES[phase]}, {phase}, {precision}"
        way = "blocks" if recompute else "none"
        cells = (name, str(micro), way, f"{measured / 2**20:.0f}", f"{said / 2**20:.0f}", f"{said / measured - 1:+.1%}")
        print("| " + " | ".join(cells) + " |", flush=True)


def measure_all(settings: dict = SETTINGS, phases: tuple[str, ...] = tuple(PHASES)) -> None:
    print("| network, method, phase, precision | micro-batch | recompute | measured, MiB | plan, MiB | difference |")
    print("|---|---|---|---|---|---|")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for recipe in settings:
        for phase in phases:
            precisions = ("float32", "bfloat16") if (recipe, phase) == ("llamagen-b", "student") else ("float32",)
            for precision in precisions:
                command = [sys.executable, __file__, "one", recipe, phase, precision]
                subprocess.run(command, env=environment, check=True)


def recipes() -> None:
    columns = (
        "recipe", "method", "strategy", "micro-batch", "recompute", "peak, GiB", "fits", "disk, GiB", "decoding, h",
        "training, h", "paper, h",
    )  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    machine = Machine(devices=8, nodes=1, memory=80 * 2**30, gpu=GPUS["a100"], mfu=0.4)
    for name in RECIPES:
        if name.startswith("digits"):
            continue
        for number, method in enumerate(("dd1", "dd2")):
            config = get_recipe(name)
            config.method = method
            found = as_json(plan(config, machine))
            phases = [phase for stage in found["stages"] for phase in stage["phases"] if phase["phase"]]
            stages = [stage for stage in found["stages"] if stage["stage"] != "trajectories"]
            training = sum(phase["hours"] for phase in phases)
            largest = max(found["stages"], key=lambda stage: stage["peak"])
            paper = str(PUBLISHED_HOURS[name][number]) if name in PUBLISHED_HOURS else "-"
            cells = (
                name, method, ", ".join(dict.fromkeys(stage["strategy"] for stage in stages)),
                " to ".join(dict.fromkeys(str(f([phase["micro_batch"] for phase in phases])) for f in (min, max))),
                ", ".join(dict.fromkeys(phase["recompute"] for phase in phases)), f"{largest['peak'] / 2**30:.0f}",
                "yes" if found["fits"] else "no", f"{sum(found['disk'].values()) / 2**30:.0f}",
                f"{found['hours'] - training:.0f}", f"{training:.0f}", paper,
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    large = functools.partial(measure_all, LARGE_IMAGES, ("student", "matching"))
    {"one": measure, "measure": measure_all, "large": large, "recipes": recipes}[what](*rest)
