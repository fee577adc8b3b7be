"""The experiments of docs/notes/text.md: one step of text, by the flow's noise and by inverse CDF.

python benchmarks/studies/text.py train --noise flow --out runs/text-flow   # and bits, cosines, gauss; --tokens 8
python benchmarks/studies/text.py map                                            # one token's map: its jumps, its ties
python benchmarks/studies/text.py judge --arms flow bits cosines --json FILE     # students of train, runs/text-ARM
python benchmarks/studies/text.py judge --students runs/text runs/text-dd2 --json FILE   # of `ddfast train`
python benchmarks/studies/text.py jacobi --student runs/text --json FILE         # passes of Jacobi decoding

A training goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.config import TextTokenizerConfig, TrainConfig, config_hash
from ddfast.distill.stages import distill
from ddfast.evaluation.quality import pair_table_distance
from ddfast.evaluation.sources import sample
from ddfast.files import write_atomically
from ddfast.models.checkpoint import load_tensors, save_tensors
from ddfast.models.loading import build_teacher, load_student, save_student
from ddfast.models.protocol import Teacher
from ddfast.models.refinement import refined
from ddfast.models.student import DD1Student, Student
from ddfast.models.text import TextTeacher, as_codes, reference
from ddfast.ops import draw_codes, flow_sample, nearest_code, noise
from ddfast.portable import portable_command
from ddfast.progress import progress_bar
from ddfast.recipes import get_recipe
from ddfast.report import machine
from ddfast.runs import open_student
from ddfast.sampling import one_line
from ddfast.trajectories.generate import store_settings
from ddfast.trajectories.store import Trajectories

ENCODINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    # The first D binary digits of u, as -1 and 1.
    "bits": lambda u, dim: (u[..., None].double() * 2 ** torch.arange(1, dim + 1)).floor().remainder(2).float() * 2 - 1,
    # cos(k pi u), k = 1..D, each of variance 1.
    "cosines": lambda u, dim: 2**0.5 * torch.cos(math.pi * torch.arange(1, dim + 1) * u[..., None]),
    # One normal coordinate, the others 0.
    "gauss": lambda u, dim: torch.cat(
        (torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))[..., None], torch.zeros(*u.shape, dim - 1)), dim=-1
    ),
}
"""How a uniform number becomes a token's D inputs; "flow" has D normal ones."""


class Chance:
    """What a student's noise is, and what the teacher makes of it."""

    def __init__(self, teacher: Teacher, kind: str) -> None:
        self.teacher, self.kind = teacher, kind

    def uniform(self, seed: int, index: Tensor) -> Tensor:
        """[B, N]."""
        return torch.special.ndtr(noise(seed, index, (self.teacher.num_tokens,)).double()).float().clamp_max(1 - 2**-24)

    def input(self, seed: int, index: Tensor) -> Tensor:
        """A student's input [B, N, D]."""
        teacher = self.teacher
        if self.kind == "flow":
            return noise(seed, index, (teacher.num_tokens, teacher.code_dim))
        return ENCODINGS[self.kind](self.uniform(seed, index), teacher.code_dim)

    def codes(self, seed: int, index: Tensor) -> Tensor:
        """The teacher's [B, N]."""
        label, made = torch.zeros(1000, dtype=torch.int64), []
        for rows in index.split(1000):
            if self.kind == "flow":
                how = {"sampler": "flow", "noise": self.input(seed, rows)}
            else:
                how = {"uniform": self.uniform(seed, rows)}
            made.append(self.teacher.generate(label[: len(rows)], **how))
        return torch.cat(made)


def pairs(chance: Chance, config: TrainConfig, folder: Path) -> Trajectories:
    """The recipe's count of them, kept in a file: those of all encodings of u are the same."""
    teacher, index = chance.teacher, torch.arange(config.trajectories.count)
    settings = store_settings(teacher, config.trajectories, config.seed)
    name = "flow" if chance.kind == "flow" else "uniform"
    path = folder / f"pairs-{name}-{config_hash(settings)}.safetensors"
    if not path.exists():
        save_tensors(path, {"codes": chance.codes(config.seed, index).to(torch.uint8)}, {})
    codes, own = load_tensors(path)[0]["codes"], chance.input(config.seed, index)
    return Trajectories(codes=codes, condition=index * 0, index=index, settings=settings, stored_noise=own)


def setup(tokens: int = 0, dim: int = 0) -> tuple[TrainConfig, TextTeacher]:
    """The recipe and its teacher (with `dim`, one of codes of that dimension); with `tokens`, of texts that long.

    These are the first characters of the same teacher's.
    """
    config = get_recipe("text")
    config.tokenizer.code_dim = dim or config.tokenizer.code_dim
    teacher = build_teacher(config, progress_bar("teacher"))
    assert isinstance(teacher, TextTeacher)
    assert isinstance(config.tokenizer, TextTokenizerConfig)
    if tokens:
        short = TextTeacher(config.tokenizer, dataclasses.replace(teacher.config, num_tokens=tokens))
        state = teacher.state_dict()
        short.load_state_dict({**state, "position_embedding": state["position_embedding"][:tokens]})
        teacher, config.dd1.point = short.eval().requires_grad_(False), tokens // 4
    return config, teacher


def train(options: argparse.Namespace) -> None:
    """A DD1 student of one kind of noise."""
    config, teacher = setup(options.tokens, options.dim)
    config.seed, config.out, config.dd1.recycles = options.seed, options.out, options.recycles
    if options.iterations:
        config.dd1.iterations = options.iterations
    known = pairs(Chance(teacher, options.noise), config, options.out.parent)
    student, live = distill(config, teacher, known, options.out, progress=progress_bar("distillation"))
    save_student(options.out / "student.safetensors", student, {}, live=live)


# What samples are worth ----------------------------------------------------------------------------------------------


def grams(codes: Tensor, size: int, base: int) -> Tensor:
    """Every run of `size` codes of [B, N], as one number each."""
    runs = codes.long().unfold(1, size, 1).flatten(0, 1)
    return (runs * base ** torch.arange(size - 1, -1, -1)).sum(-1)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Total variation of two samples of numbers."""
    names, place = torch.cat((ours, theirs)).unique(return_inverse=True)
    counts = [torch.bincount(part, minlength=len(names)).double() for part in place.split([len(ours), len(theirs)])]
    return 0.5 * float((counts[0] / len(ours) - counts[1] / len(theirs)).abs().sum())


def words(texts: list[str]) -> list[str]:
    """Those that are whole, whatever stands around them."""
    return [word for text in texts for word in text.replace("\n", " ").split(" ")[1:-1] if word.isalpha()]


class Judge:
    """Figures of samples [B, N], against others of the teacher's and against its exact probabilities."""

    def __init__(self, teacher: TextTeacher, count: int) -> None:
        self.teacher, self.count = teacher, count
        self.fresh = sample("teacher", teacher, count=count, seed=11).codes
        corpus, base = as_codes([reference("train")]), teacher.num_codes
        self.known = {size: grams(corpus, size, base).unique() for size in (3, 4, 6)}
        self.words = set(words([reference("train").replace("\n", " ")]))
        self.two = self.exact_pairs()

    @torch.no_grad()
    def exact_pairs(self) -> Tensor:
        """The teacher's probabilities of all first two characters, float64 [V^2]."""
        count = self.teacher.num_codes
        codes = torch.zeros(count, self.teacher.num_tokens, dtype=torch.int64)
        codes[:, 0] = torch.arange(count)
        log_probs = self.teacher.log_probs(torch.zeros(count, dtype=torch.int64), codes).double()
        return (log_probs[0, 0][:, None] + log_probs[:, 1]).exp().flatten()

    @torch.no_grad()
    def figures(self, codes: Tensor) -> dict[str, float]:
        """Of as many samples as the judge's own."""
        teacher, base = self.teacher, self.teacher.num_codes
        nll = [
            -teacher.log_probs(torch.zeros(len(part), dtype=torch.int64), part)
            .gather(-1, part[..., None])
            .double()
            .mean()
            for part in codes.split(1000)
        ]
        first = torch.bincount(grams(codes[:, :2], 2, base), minlength=base**2).double() / len(codes)
        found = {"nll": float(sum(nll) / len(nll)), "pair_tv": pair_table_distance(codes, self.fresh, base)}
        found["first_two_tv"] = 0.5 * float((first - self.two).abs().sum())
        found |= {f"gram{k}_tv": distance(grams(codes, k, base), grams(self.fresh, k, base)) for k in (1, 2, 3, 4)}
        for size, known in self.known.items():
            found[f"unseen_gram{size}"] = 1 - float(torch.isin(grams(codes, size, base), known).double().mean())
        told = words(teacher.texts(codes))
        found["unseen_words"] = sum(word not in self.words for word in told) / max(len(told), 1)
        return found


def held_out(teacher: TextTeacher) -> float:
    """Nats per character of text that the teacher has not seen."""
    text = reference("test")
    size = teacher.num_tokens
    codes = as_codes([text[first : first + size] for first in range(0, len(text) - size + 1, size)])
    with torch.no_grad():
        log_probs = teacher.log_probs(torch.zeros(len(codes), dtype=torch.int64), codes)
    return -float(log_probs.gather(-1, codes[..., None]).mean())


def sampled(student: Student, own: Tensor, **settings: Any) -> Tensor:
    """Codes of a student."""
    label = torch.zeros(1000, dtype=torch.int64)
    made = [student.sample(label[: len(part)], part, **settings) for part in own.split(1000)]
    return nearest_code(torch.cat(made), student.codebook)


def agreement(made: Tensor, wanted: Tensor) -> dict[str, Any]:
    """How far a student follows the teacher from the same noise: by position, and up to the first difference."""
    same = made == wanted
    return {
        "same": float(same.double().mean()),
        "same_by_position": [round(float(value), 4) for value in same.double().mean(0)],
        "right_from_the_start": float(same.long().cumprod(1).sum(1).double().mean()),
    }


def judge(options: argparse.Namespace) -> None:
    """All figures of the arms of `train`, of students of `ddfast train`, and of what they are compared with."""
    _, teacher = setup(options.tokens, options.dim)
    assessor, index = Judge(teacher, options.count), torch.arange(options.count)
    rows: dict[str, Any] = {}

    def tell(name: str, codes: Tensor, **more: Any) -> None:
        rows[name] = {**assessor.figures(codes), **more, "texts": list(map(one_line, teacher.texts(codes[:8])))}
        told = {key: round(value, 4) for key, value in rows[name].items() if isinstance(value, float)}
        print(name, json.dumps(told), flush=True)

    if options.baselines:
        for source in ("teacher", "ode_pairs", "independent_marginals"):
            tell(source, sample(source, teacher, count=options.count, seed=12).codes)
        rows["teacher"]["held_out_nll"] = held_out(teacher)
    for arm in options.arms:
        folder = options.root / f"text-{arm}"
        student, chance = load_student(folder, teacher), Chance(teacher, arm.split("-")[0])
        assert isinstance(student, DD1Student)
        own, wanted = chance.input(13, index), chance.codes(13, index)
        for steps in (1, 2):
            made = sampled(student, own, **student.settings(steps))
            tell(f"{arm}, {steps} step", made, **agreement(made, wanted))
    for folder in options.students:
        student = open_student(folder, "cpu", lambda *_: None)[2]
        own = Chance(teacher, "flow").input(13, index)
        for steps in (1, 2):
            made = sampled(student, own, **student.settings(steps))
            tell(f"{folder.name}, {steps} step", made)
    write(options.json, rows, count=options.count)


# One token's map -----------------------------------------------------------------------------------------------------


def one_token(options: argparse.Namespace) -> None:
    """Of the maps from a token's chance to its code: how often they jump, and whether they agree under other p.

    Jumps: changes of the code on the way from one chance to another (the arc between two noises; the line between two
    uniform numbers), 257 points. Agreement: the same chance under the distribution p of one context and under q of
    another, beside 1 - TV(p, q), the most that any map can reach.
    """
    _, teacher = setup()
    codes = sample("teacher", teacher, count=options.count, seed=21).codes
    with torch.no_grad():
        log_probs = teacher.log_probs(torch.zeros(len(codes), dtype=torch.int64), codes)[:, 1:]
    generator = seeds.generator(3)
    p = log_probs.flatten(0, 1)
    p = p[torch.randperm(len(p), generator=generator)[: options.count]]
    shape, points = (len(p), teacher.code_dim), torch.linspace(0, 1, 257)
    start, end = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    low, high = torch.rand(len(p), generator=generator), torch.rand(len(p), generator=generator)
    flow, inverse = [], []
    for s in points.tolist():
        angle = s * math.pi / 2
        flow.append(flow_sample(p, math.cos(angle) * start + math.sin(angle) * end, teacher.codebook)[0])
        inverse.append(draw_codes(p, low + s * (high - low)))
    rows: dict[str, Any] = {
        "contexts": len(p),
        "perplexity": float((-(p.exp() * p.clamp_min(-80)).sum(-1)).exp().mean()),
    }
    for name, path in (("flow", flow), ("inverse CDF", inverse)):
        path_codes = torch.stack(path)
        rows[f"{name}, jumps"] = float((path_codes[1:] != path_codes[:-1]).sum(0).double().mean())
        rows[f"{name}, ends differ"] = float((path_codes[0] != path_codes[-1]).double().mean())
    uniform = torch.rand(len(p), generator=generator)
    others = {"another context": p.roll(1, 0), "one character changed": None}
    changed = codes.clone()
    place = torch.randint(4, teacher.num_tokens, (len(codes), 1), generator=generator)
    back = torch.randint(2, 4, (len(codes), 1), generator=generator)
    other = torch.randint(teacher.num_codes, (len(codes), 1), generator=generator)
    changed.scatter_(1, place - back, other)
    with torch.no_grad():
        label = torch.zeros(len(codes), dtype=torch.int64)
        before, after = (teacher.log_probs(label, one) for one in (codes, changed))
    rowwise = torch.arange(len(codes))
    others["one character changed"] = after[rowwise, place[:, 0]]
    for name, q in others.items():
        p_own = before[rowwise, place[:, 0]] if name == "one character changed" else p
        rows[f"{name}, 1 - TV"] = float(torch.minimum(p_own.exp(), q.exp()).sum(-1).double().mean())
        eps = start[: len(p_own)]
        same = flow_sample(p_own, eps, teacher.codebook)[0] == flow_sample(q, eps, teacher.codebook)[0]
        rows[f"{name}, flow agrees"] = float(same.double().mean())
        same = draw_codes(p_own, uniform[: len(p_own)]) == draw_codes(q, uniform[: len(p_own)])
        rows[f"{name}, inverse CDF agrees"] = float(same.double().mean())
    print(json.dumps(rows, indent=1))
    write(options.json, rows, count=options.count)


def jacobi(options: argparse.Namespace) -> None:
    """Passes of the teacher that a sample takes: speculative, and deterministic from noise and from a student."""
    _, teacher = setup()
    count = options.count
    label, index = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    rows: dict[str, Any] = {"tokens": teacher.num_tokens}
    rows["speculative"] = float(sample("speculative_jacobi", teacher, count=count, seed=31).passes.double().mean())
    chance = Chance(teacher, "flow")
    own, wanted = chance.input(31, index), chance.codes(31, index)
    starts = {"flow, from the codes nearest to the noise": nearest_code(own, teacher.codebook)}
    if options.student:
        student = open_student(options.student, "cpu", lambda *_: None)[2]
        starts["flow, from the student's one step"] = sampled(student, own, **student.settings(1))
    for name, codes in starts.items():
        made, passes = refined(teacher, label, own, codes, "exact")
        rows[name] = float(passes.double().mean())
        rows[f"{name}: as AR decoding"] = float((made == wanted).double().mean())
    rows["inverse CDF, from draws of the first character's distribution"] = inverse_jacobi(teacher, 31, index)
    print(json.dumps(rows, indent=1))
    write(options.json, rows, count=count)


@torch.no_grad()
def inverse_jacobi(teacher: Teacher, seed: int, index: Tensor) -> float:
    """Mean passes until a sample of the inverse CDF is known to be final: a pass that changes nothing is the last."""
    uniform, label = Chance(teacher, "bits").uniform(seed, index), torch.zeros(len(index), dtype=torch.int64)
    nothing = torch.zeros(len(index), teacher.num_tokens, dtype=torch.int64)
    first = teacher.log_probs(label, nothing)[:, :1].expand(-1, teacher.num_tokens, -1).contiguous()
    codes, passes = draw_codes(first, uniform), torch.zeros(len(index))
    going = torch.ones(len(index), dtype=torch.bool)
    while bool(going.any()):
        made = draw_codes(teacher.log_probs(label, codes), uniform)
        passes += going
        going &= (made != codes).any(1)
        codes = made
    return float(passes.mean())


def write(path: Path | None, rows: dict[str, Any], **more: Any) -> None:
    """What was found, with what it was found by."""
    if path is None:
        return
    found = {"machine": machine(), "command": portable_command(shlex.join(["python", *sys.argv])), **more, "rows": rows}
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, name in ((train, "train"), (one_token, "map"), (judge, "judge"), (jacobi, "jacobi")):
        command = commands.add_parser(name)
        command.set_defaults(call=function)
        if function is train:
            command.add_argument("--noise", choices=["flow", *ENCODINGS], required=True)
            command.add_argument("--out", type=Path, required=True)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--recycles", type=int, default=0)
            command.add_argument("--iterations", type=int, default=0, help="default: the recipe's")
            command.add_argument("--tokens", type=int, default=0, help="default: the recipe's")
            command.add_argument("--dim", type=int, default=0, help="default: the recipe's")
            continue
        command.add_argument("--json", type=Path)
        command.add_argument("--count", type=int, default=10_000 if function is judge else 2000)
        if function is jacobi:
            command.add_argument("--student", type=Path)
        if function is judge:
            command.add_argument("--tokens", type=int, default=0)
            command.add_argument("--dim", type=int, default=0)
            command.add_argument("--root", type=Path, default=Path("runs"))
            command.add_argument("--arms", nargs="*", default=[])
            command.add_argument("--students", nargs="*", type=Path, default=[])
            command.add_argument("--baselines", action="store_true")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
