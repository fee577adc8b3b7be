"""AR decoding and one step, random weights of the published sizes: ours, plain PyTorch, torch.compile, official code.

pytest benchmarks/test_decode.py --benchmark-only -s [-m ""] [--peer-path llamagen=CHECKOUT] [--peer-path var=CHECKOUT]

Whole images (on a CPU the first tokens of the large models) with the recipes' guidance and filters, image decoding
excluded; bf16 on a GPU, float32 on a CPU. `-m ""` adds batches 16 and 128, and VAR's ten graphs, minutes to compile.

- "ddfast", "ddfast, flow": `Teacher.generate`, drawing or following the flow from noise (DD1's pairs);
- "plain loop", "plain loop, eager flow": `plain_decoder`, the KV-cached decoder as the official scripts write it, and
  the reference of the flow in its place of drawing;
- "plain loop, torch.compile": its step as one CUDA graph (gpt-fast's recipe);
- "1 step": DD1's student;
- "official code": with `--peer-path`.

`extra_info`: milliseconds per image, what the flow adds in percent, one step against every AR decoder, peak memory
beyond the weights (GPU), bytes, and on a GPU gigabytes per second and the floor with the fraction of it reached.

The floor, at the rates of floors.py, is the larger of two.

- Bytes: every step reads the weights of all blocks and of the head, and for every row (two per image with guidance)
  the keys and values of all positions so far. LlamaGen-L at batch 64 in bf16: 256 steps of 0.65 GB, and 96 KiB for
  each of 128 rows and of 1 + ... + 256 positions, 167 + 414 GB, 135 ms. VAR's layers from the class to the
  modulations are read once.
- Operations: two per weight and token, of every row in the blocks and of one row per image in the head, and four per
  token, position that it sees, layer and element of the width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import side_by_side, waited
from floors import floors
from peers import PEERS
from torch import Tensor

import ddfast
from ddfast import ops
from ddfast.config import update
from ddfast.evaluation.plain_decoding import plain_decoder
from ddfast.models.llamagen.network import LlamaGenTeacher
from ddfast.models.loading import start_student, untrained_teacher
from ddfast.models.protocol import Teacher
from ddfast.models.var.network import VARTeacher
from ddfast.recipes import get_recipe

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)

ALIKE = {torch.float32: 0.99, torch.bfloat16: 0.75}
"""The least share of a decoder's codes that the teacher-forced pass over them would have chosen.

With random weights many calls are close ones: on a CPU 0.85 to 1 in bf16, 1 in float32. A wrong mask leaves under 0.05.
"""


def case(recipe: str, batch: int, *, rounds: int, stop: int | None = None, compiled: bool = False, slow: bool = False):
    name = f"{recipe}-{batch}" + ("-compiled" if compiled else "")
    return pytest.param(recipe, batch, rounds, stop, compiled, id=name, marks=[pytest.mark.slow] if slow else [])


if GPU:
    CASES = [
        *(case("var-d16", batch, rounds=10) for batch in (1, 64)),
        case("var-d24", 1, rounds=10),
        *(case("llamagen-l", batch, rounds=3, compiled=True) for batch in (1, 64)),
        *(case("llamagen-l", batch, rounds=3, compiled=True, slow=True) for batch in (16, 128)),
        *(case("var-d16", batch, rounds=10, slow=True) for batch in (16, 128)),
        *(case("var-d24", batch, rounds=10, slow=True) for batch in (16, 64, 128)),
        *(case("var-d16", batch, rounds=10, compiled=True, slow=True) for batch in (1, 64)),
    ]
else:
    CASES = [
        *(case("digits", batch, rounds=15) for batch in (1, 64)),
        *(case("digits", batch, rounds=15, compiled=True, slow=True) for batch in (1, 64)),
        case("llamagen-b", 1, rounds=3, stop=8),
        case("var-d16", 1, rounds=3, stop=30),
    ]


@pytest.mark.parametrize(("recipe", "batch", "rounds", "stop", "compiled"), CASES)
@torch.no_grad()
def test_decode(benchmark, peer_paths, recipe: str, batch: int, rounds: int, stop: int | None, compiled: bool):
    torch.compiler.reset()  # graphs of the case before, and what they hold
    config, family = get_recipe(recipe), recipe.split("-")[0]
    if recipe != "digits":
        update(config, {"teacher": {"random_weights": True, "dtype": str(DTYPE).removeprefix("torch.")}})
    teacher = untrained_teacher(config).to(DEVICE)
    labels = torch.arange(batch, device=DEVICE) % teacher.num_classes
    noise = ddfast.noise(0, torch.arange(batch), (teacher.num_tokens, teacher.code_dim), DEVICE)

    decoders: dict[str, Callable[..., Tensor]] = {
        "ddfast": teacher.generate,
        "plain loop": plain_decoder(teacher).generate,
    }
    if compiled:
        decoders["plain loop, torch.compile"] = plain_decoder(teacher, compile=True).generate
    if family in peer_paths and not (stop and isinstance(teacher, VARTeacher)):
        decoders["official code"] = PEERS[family](peer_paths[family], teacher).generate  # type: ignore[operator]
    decoders = {name: partial(decode, labels, stop=stop) for name, decode in decoders.items()}
    flows = {
        name: partial(decode, labels, sampler="flow", noise=noise, stop=stop)
        for name, decode in {
            "ddfast, flow": teacher.generate,
            "plain loop, eager flow": plain_decoder(teacher).generate,
        }.items()
    }

    peaks, first = {}, {}
    for name, decode in {**decoders, **flows}.items():
        greedy = name in decoders
        codes, peaks[name] = with_peak(partial(decode, sampler="greedy") if greedy else decode)
        same = torch.equal(codes, first.setdefault(greedy, codes))
        assert same or not greedy or GPU, f"{name}: other codes than ddfast's"
        if not same or name.startswith("ddfast"):
            alike = share_of_choices(teacher, labels, codes, None if greedy else noise)
            assert alike > ALIKE[DTYPE], f"{name}: {alike}"
    providers: dict[str, Callable[[], Any]] = {**decoders, **flows}
    if stop is None:
        student = start_student(teacher).to(DEVICE).eval()
        for parameter in student.parameters():
            parameter.data = parameter.data.to(DTYPE)
        providers["1 step"] = partial(student.sample, labels, noise)
        made, peaks["1 step"] = with_peak(providers["1 step"])
        assert made.shape == noise.shape and made.isfinite().all()
    side_by_side(benchmark, providers, rounds=rounds, warm_up=1, recipe=recipe, batch=batch, stop=stop)
    add_facts(benchmark, work(teacher, batch, stop), peaks)


def share_of_choices(teacher: Teacher, labels: Tensor, codes: Tensor, noise: Tensor | None) -> float:
    """The share of codes [B, m] that are what the teacher chooses after those before: the likeliest, or the flow's.

    By one teacher-forced pass over the codes themselves, so a decoder that rounds otherwise and once goes another way
    is judged by its own way. Of 16 images at most.
    """
    labels, codes = labels[:16], codes[:16]
    whole = torch.nn.functional.pad(codes, (0, teacher.num_tokens - codes.shape[1]))
    log_probs = teacher.log_probs(labels, whole)[:, : codes.shape[1]]
    if noise is None:
        chosen = log_probs.argmax(-1)
    else:
        chosen, _ = ops.flow_sample(log_probs, noise[:16, : codes.shape[1]], teacher.codebook)
    return float((chosen == codes).double().mean())


def with_peak(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a first call makes, and the bytes that it takes on a GPU beyond those held before."""
    if not GPU:
        return call(), 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = waited(call)()
    return made, torch.cuda.max_memory_allocated() - before


def work(teacher: Teacher, batch: int, stop: int | None) -> dict[str, float]:
    """What `floors` counts of the AR decoding of `batch` images up to `stop`, as the head of this file explains."""
    if isinstance(teacher, LlamaGenTeacher):
        depth, width = teacher.sizes.n_layer, teacher.sizes.dim
    elif isinstance(teacher, VARTeacher):
        depth, width = teacher.sizes.depth, teacher.sizes.embed_dim
    else:
        depth, width = teacher.body.depth, teacher.body.width
    weights = {"body": 0, "head": 0, "once": 0}
    for name, parameter in teacher.named_parameters():
        if "ada_lin" in name:
            weights["once"] += parameter.numel()
        elif name.startswith(("layers.", "blocks.", "body.")):
            weights["body"] += parameter.numel()
        elif name.startswith(("output.", "head.")):
            weights["head"] += parameter.numel()
    starts = teacher.group_starts()
    groups = teacher.groups[: starts.index(stop)] if stop else teacher.groups
    seen = starts[1 : len(groups) + 1]  # a class token stands for LlamaGen's last code, which is not read
    scale = teacher.defaults.cfg_scale
    rows = batch * (1 + any(teacher.group_cfg_scale(scale, group) != 1.0 for group in range(len(groups))))
    values = len(groups) * (weights["body"] + weights["head"]) + weights["once"] + 2 * rows * depth * width * sum(seen)
    flop = 2 * sum(groups) * (rows * weights["body"] + batch * weights["head"]) + 2 * rows * weights["once"]
    flop += 4 * rows * depth * width * sum(size * positions for size, positions in zip(groups, seen, strict=True))
    return {"num_bytes": values * DTYPE.itemsize, "bf16" if GPU else "flop": flop}


def add_facts(benchmark: Any, amounts: dict[str, float], peaks: dict[str, int]) -> None:
    """Add to `extra_info` what follows from the medians, and print it."""
    facts = benchmark.extra_info
    table = facts["providers"]
    median = {name: row["median_ms"] for name, row in table.items()}
    for name, row in table.items():
        row["ms_per_image"] = median[name] / facts["batch"]
        if GPU:
            row["peak_bytes"] = peaks[name]
    facts["flow_adds_percent"] = {
        name: 100 * (median[flow] / median[name] - 1)
        for name, flow in {"ddfast": "ddfast, flow", "plain loop": "plain loop, eager flow"}.items()
    }
    if "1 step" in median:
        facts["one_step_is_faster_by"] = {name: value / median["1 step"] for name, value in median.items()}
        del facts["one_step_is_faster_by"]["1 step"]
    facts.update(amounts)
    if GPU:
        limits = floors(**amounts)
        facts["floors_ms"] = {name: 1e3 * value for name, value in limits.items()}
        for name, row in table.items():
            if name != "1 step":
                row["of_floor"] = 1e3 * max(limits.values()) / median[name]
                row["gigabytes_per_second"] = amounts["num_bytes"] / median[name] / 1e6
    for name in ("flow_adds_percent", "one_step_is_faster_by", "floors_ms"):
        if name in facts:
            print(f"  {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in facts[name].items()))
    for name, row in table.items():
        if GPU:
            reached = f", {100 * row['of_floor']:.1f} % of the floor" if "of_floor" in row else ""
            print(f"  {name}: {row['ms_per_image']:.3f} ms per image, {row['peak_bytes'] / 2**20:.0f} MiB{reached}")
