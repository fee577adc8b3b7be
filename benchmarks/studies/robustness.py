"""Noise and conditions that a student never saw, against its teacher on digits: the tables of docs/notes/robustness.md.

RUN is the folder of a digits run; a DD1 and a DD2 run of one seed share their teacher. The judging noise is of a seed
of its own (777), not that of the training pairs.

python benchmarks/studies/robustness.py noise --dd1 RUN --dd2 RUN --out noise-0.json      # scaled, shifted, ... noise
python benchmarks/studies/robustness.py noise --few --dd1 RUN --dd2 RUN --out noise-1.json          # eight of them
python benchmarks/studies/robustness.py token --dd1 RUN --dd2 RUN --out token-0.json      # one token's noise replaced
python benchmarks/studies/robustness.py classes --dd1 RUN --dd2 RUN --out classes-0.json  # mixed and unseen classes
python benchmarks/studies/robustness.py picture --dd1 RUN --dd2 RUN --out robustness.png
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.evaluation.quality import Evaluator
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.ops import nearest_code, noise
from ddfast.pictures import grid, pixels, write_png
from ddfast.progress import silent
from ddfast.report import machine
from ddfast.runs import open_student
from ddfast.sampling import Samples

JUDGING_SEED = 777
SCALES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
PAIRS = ((3, 8), (4, 9), (1, 7), (0, 6), (5, 2))
"""Classes that are mixed; no class is in two pairs."""
NULL = "null label"


def disturbances() -> dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]]:
    """Of the noise [B, N, D], a second one and a generator, by name; all but the scales keep the variance at 1 or say
    so."""

    def laplace(eps: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(eps.shape, generator=generator, dtype=torch.float64) - 0.5
        return (-u.sign() * torch.log1p(-2 * u.abs()) / math.sqrt(2)).float()

    def student_t(eps: Tensor, _: Tensor, generator: torch.Generator, degrees: int = 3) -> Tensor:
        drawn = torch.randn((degrees, *eps.shape), generator=generator, dtype=torch.float32)
        return eps / (drawn.square().sum(0) / degrees).sqrt() / math.sqrt(degrees / (degrees - 2))

    def uniform(eps: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        return (torch.rand(eps.shape, generator=generator, dtype=torch.float32) - 0.5) * math.sqrt(12)

    found: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {"N(0, I)": lambda eps, *_: eps}
    found |= {f"scale {s}": lambda eps, *_, s=s: s * eps for s in SCALES}
    found |= {
        "half-way, line": lambda eps, other, _: (eps + other) / 2,
        "half-way, arc": lambda eps, other, _: (eps + other) / math.sqrt(2),
        "shift 0.25": lambda eps, *_: eps + 0.25,
        "shift 0.5": lambda eps, *_: eps + 0.5,
        "shift 1": lambda eps, *_: eps + 1.0,
        "uniform": uniform,
        "Laplace": laplace,
        "Student-t, 3": student_t,
        "one vector for all tokens": lambda eps, *_: eps[:, :1].expand_as(eps).contiguous(),
    }
    return found


@dataclass
class Subject:
    """What turns a label and noise into codes."""

    teacher: Teacher
    dd1: Student
    dd2: Student

    def embeddings(self, who: str, labels: Tensor, eps: Tensor) -> Tensor:
        if who == "teacher's flow":
            return self.teacher.embed(self.teacher.generate(labels, sampler="flow", noise=eps))
        if who == "DD1, 2 steps":
            return self.dd1.sample(labels, eps, **self.dd1.settings(2))
        return {"DD1, 1 step": self.dd1, "DD2, 1 step": self.dd2}[who].sample(labels, eps)

    def with_rows(self, rows: Callable[[Tensor], Tensor]) -> Subject:
        """The same with other rows in the class embeddings [classes + 1, W] of all three."""
        made = Subject(copy.deepcopy(self.teacher), copy.deepcopy(self.dd1), copy.deepcopy(self.dd2))
        for network in (made.teacher, made.dd1, made.dd2):
            with torch.no_grad():
                weight = network.class_embedding.weight
                weight.copy_(rows(weight.clone()))
        return made


WHO = ("teacher's flow", "DD1, 1 step", "DD1, 2 steps", "DD2, 1 step")


class Study:
    """A seed's networks and what judges them."""

    def __init__(self, options: argparse.Namespace) -> None:
        config, teacher, dd1 = open_student(options.dd1, "cpu", silent)
        other, _, dd2 = open_student(options.dd2, "cpu", silent)
        if config.seed != other.seed:
            raise SystemExit(f"--dd2 {options.dd2}: is of seed {other.seed}, --dd1 of {config.seed}")
        config.evaluation.samples = options.samples
        self.config, self.samples, self.subject = config, options.samples, Subject(teacher, dd1, dd2)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.config, self.subject.teacher)

    def noise(self, seed: int = JUDGING_SEED) -> Tensor:
        teacher = self.subject.teacher
        return noise(seed, torch.arange(self.samples, dtype=torch.int64), (teacher.num_tokens, teacher.code_dim), "cpu")

    def labels(self, among: int | tuple[int, ...] = 10) -> Tensor:
        values = torch.arange(among) if isinstance(among, int) else torch.tensor(among)
        return values[torch.arange(self.samples) % len(values)]

    @torch.no_grad()
    def judged(self, subject: Subject, labels: Tensor, eps: Tensor) -> dict[str, dict[str, Any]]:
        """Figures of every maker; the likelihood is under the subject's own teacher."""
        rows, flow = {}, None
        for who in WHO:
            made = subject.embeddings(who, labels, eps)
            codes = nearest_code(made, subject.teacher.codebook)
            flow = codes if flow is None else flow
            rows[who] = self._figures(subject.teacher, Samples.numbered(codes, made, labels), flow)
        return rows

    def _figures(self, teacher: Teacher, samples: Samples, flow: Tensor) -> dict[str, Any]:
        evaluator = self.evaluator
        evaluator.teacher = teacher  # of a copy with other classes, the likelihood
        found = evaluator.measure(samples)
        kept = ("frechet", "precision", "recall", "class_accuracy", "teacher_nll", "pair_tv")
        figures = {name: found[name] for name in kept}
        assert evaluator.classifier is not None
        images = teacher.decode(samples.embeddings)
        chances = evaluator.classifier.logits(evaluator.classifier.features(images)).softmax(-1).double()
        guesses = chances.argmax(-1)
        figures["agreement"] = float((samples.codes == flow).double().mean())
        figures["classifier_entropy"] = float(torch.special.entr(chances).sum(-1).mean())
        counts = torch.bincount(guesses, minlength=10).double() / len(guesses)
        figures["guessed"] = [round(value, 4) for value in counts.tolist()]
        figures["code_entropy"] = _code_entropy(samples.codes, samples.condition, teacher.num_codes)
        figures["partner"] = float((guesses == _partners(samples.condition)).double().mean())
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def _partners(labels: Tensor) -> Tensor:
    """The class that a class is mixed with; -1: none."""
    table = torch.full((11,), -1)
    for one, other in PAIRS:
        table[one] = other
    return table[labels]


def _code_entropy(codes: Tensor, labels: Tensor, num_codes: int) -> float:
    """Mean entropy of a token's code given the class, in nats: how many codes a class uses at a place."""
    found = []
    for label in labels.unique():
        for own in codes[labels == label].T:
            share = torch.bincount(own, minlength=num_codes).double() / len(own)
            found.append(torch.special.entr(share).sum())
    return float(torch.stack(found).mean())


FEW = (
    "N(0, I)", "scale 0.5", "scale 0.8", "scale 1.25", "scale 2.0", "shift 1", "Student-t, 3",
    "one vector for all tokens",
)  # fmt: skip


def noises(study: Study, few: bool) -> dict[str, Any]:
    eps, other, labels = study.noise(), study.noise(JUDGING_SEED + 1), study.labels()
    found: dict[str, Any] = {}
    for name, disturb in disturbances().items():
        if few and name not in FEW:
            continue
        made = disturb(eps, other, torch.Generator().manual_seed(JUDGING_SEED))
        found[name] = study.judged(study.subject, labels, made)
        print(name, {who: (row["agreement"], row["teacher_nll"], row["frechet"]) for who, row in found[name].items()})
    return found


@torch.no_grad()
def one_token(study: Study) -> dict[str, Any]:
    """Share of codes that change, before, at and after the token whose noise is another, and whose changes agree."""
    eps, other, labels, found = study.noise(), study.noise(JUDGING_SEED + 1), study.labels(), {}
    codebook = study.subject.teacher.codebook

    def changed(who: str, made: Tensor) -> Tensor:
        first, second = (nearest_code(study.subject.embeddings(who, labels, x), codebook) for x in (eps, made))
        return first != second

    for token in (0, 4, 8, 12):
        made = eps.clone()
        made[:, token] = other[:, token]
        truth = changed("teacher's flow", made)
        found[str(token)] = {}
        for who in WHO:
            own = changed(who, made)
            after, theirs = own[:, token + 1 :], truth[:, token + 1 :]
            both, either = (after & theirs).sum(), (after | theirs).sum()
            found[str(token)][who] = {
                "before": round(float(own[:, :token].double().mean()) if token else 0.0, 4),
                "at": round(float(own[:, token].double().mean()), 4),
                "after": round(float(after.double().mean()), 4),
                "overlap_after": round(float(both / either), 4),
            }
        print(token, found[str(token)])
    return found


def mixed(share: float) -> Callable[[Tensor], Tensor]:
    """Rows of the first classes of `PAIRS` on the line to the second ones'."""

    def rows(weight: Tensor) -> Tensor:
        made = weight.clone()
        for one, other in PAIRS:
            made[one] = torch.lerp(weight[one], weight[other], share)
        return made

    return rows


def unseen(what: str) -> Callable[[Tensor], Tensor]:
    """Every class's row is the unconditional one, or the mean of all classes."""

    def rows(weight: Tensor) -> Tensor:
        new = weight[-1] if what == NULL else weight[:-1].mean(0)
        return torch.cat((new.expand(len(weight) - 1, -1), weight[-1:]))

    return rows


def classes(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = {}
    firsts = tuple(one for one, _ in PAIRS)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        subject = study.subject.with_rows(mixed(share))
        found[f"mix {share}"] = study.judged(subject, study.labels(firsts), study.noise())
    for what in (NULL, "mean of the classes"):
        found[what] = study.judged(study.subject.with_rows(unseen(what)), study.labels(), study.noise())
    for name, rows in found.items():
        print(name, {who: (row["agreement"], row["teacher_nll"], row["class_accuracy"]) for who, row in rows.items()})
    networks = {"DD1": study.subject.dd1, "DD2": study.subject.dd2}
    theirs = study.subject.teacher.class_embedding.weight.detach()
    found["embeddings"] = {
        name: {
            "distance_of_null_row": float((network.class_embedding.weight[-1] - theirs[-1]).norm() / theirs[-1].norm()),
            "distance_of_class_rows": float(
                (network.class_embedding.weight[:-1] - theirs[:-1]).norm() / theirs[:-1].norm()
            ),
        }
        for name, network in networks.items()
    }
    print(found["embeddings"])
    return found


@torch.no_grad()
def picture(study: Study, path: Path) -> None:
    """Rows: teacher's flow, DD1 and DD2 in one step; columns: scales of the noise for four digits, then class mixes."""
    strips = []
    eps, digits = study.noise()[:4], torch.tensor([2, 3, 5, 8])
    columns = [(study.subject, digits, s * eps) for s in (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)]
    firsts = torch.tensor([one for one, _ in PAIRS[:4]])
    columns += [(study.subject.with_rows(mixed(share)), firsts, eps) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for subject, labels, made in columns:
        who = ("teacher's flow", "DD1, 1 step", "DD2, 1 step")
        images = [subject.teacher.decode(subject.embeddings(name, labels, made), clamp=False) for name in who]
        strips.append(pixels(torch.stack(images, dim=1).flatten(0, 1)))  # every digit: teacher, DD1, DD2
    large = torch.cat(strips).repeat_interleave(3, -1).repeat_interleave(3, -2)
    write_png(path, grid(large, len(strips[0])))


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["noise", "token", "classes", "picture"])
    parser.add_argument("--dd1", type=Path, required=True)
    parser.add_argument("--dd2", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--few", action="store_true", help="of noise: those of the page's table of three seeds")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    study = Study(options)
    if options.study == "picture":
        picture(study, options.out)
        return
    if options.study == "noise":
        found = noises(study, options.few)
    else:
        found = {"token": one_token, "classes": classes}[options.study](study)
    told = {"study": options.study, "seed": study.config.seed, "samples": options.samples, "machine": machine()}
    options.out.write_text(json.dumps(told | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
