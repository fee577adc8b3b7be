"""What limits DD1's students, and where their errors come from. The experiments of docs/notes/limits.md.

python benchmarks/studies/limits.py strength --seed 0               # the toy's dependence, against factorised samplers
python benchmarks/studies/limits.py tokens --seed 0                 # the toy's number of tokens
python benchmarks/studies/limits.py sizes --task toy --seed 0       # depth, width, recycling
python benchmarks/studies/limits.py pairs --task digits --seed 0
python benchmarks/studies/limits.py updates --task digits --seed 0
python benchmarks/studies/limits.py sources --task digits --seed 0  # steps; errors given the truth; the flow's jumps
python benchmarks/studies/limits.py charts                          # docs/notes/limits.png, of all rows there are

Tasks: toy (enumerable) and digits. Rows are kept in --out as they come; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import Rows, Task, parser, task, toy
from torch import Tensor

from ddfast.models.student import DD1Student
from ddfast.models.toy import ToyTeacher
from ddfast.ops import flow_sample, noise

UPDATES = {"toy": 1000, "digits": 600}

TOY_SAMPLES = 50_000

CHANGES = (0.01, 0.03, 0.1, 0.3)
"""How far a noise is turned towards a fresh one: sqrt(1 - c^2) eps + c xi, which is as normal as eps."""

OTHER = 3000
"""Added to a teacher's seed for that fresh noise."""


def factorised(teacher: ToyTeacher, points: tuple[int, ...]) -> dict[str, float]:
    """The best sampler that draws the tokens between two points independently given those before, exactly.

    Its divergence KL(teacher || sampler) is the sum of the blocks' conditional total correlations.
    """
    count, codes = teacher.num_tokens, teacher.num_codes
    joint = teacher.joint().view([codes] * count)
    made = torch.ones_like(joint)
    for first, last in pairwise((*points, count)):
        prefix = _summed(joint, set(range(first)))
        for token in range(first, last):
            made = made * _summed(joint, {*range(first), token}) / prefix
    divergence = torch.special.xlogy(joint, joint / made).sum()
    return {"tv": round(0.5 * float((joint - made).abs().sum()), 4), "kl": round(float(divergence), 4)}


def _summed(table: Tensor, kept: set[int]) -> Tensor:
    """A table summed over all dimensions but some, which it keeps the place of."""
    others = [dim for dim in range(table.ndim) if dim not in kept]
    return table.sum(others, keepdim=True) if others else table


def all_points(done: Task) -> dict[str, Any]:
    """Settings of a student that starts from anywhere."""
    count = len(done.teacher.groups)
    return {"point": 1, "later_points": list(range(2, count)), "point_probability": 0.5}


def evenly(count: int, steps: int) -> tuple[int, ...]:
    """Starts of so many steps over `count` groups."""
    return tuple(sorted({count * step // steps for step in range(steps)}))


def by_steps(done: Task, student: DD1Student) -> dict[str, Any]:
    """Figures of 1, 2, 3, 4, 8 and n steps."""
    count = len(done.teacher.groups)
    return {
        f"{steps} steps": done.figures(done.codes(student, evenly(count, steps)))
        for steps in sorted({1, 2, 3, 4, 8, count})
        if steps <= count
    }


@torch.no_grad()
def given_truth(done: Task, student: DD1Student) -> list[list[float]]:
    """Share of right codes of tokens t.. given the right codes before t, for every t: what is left is regression."""
    teacher, found = done.teacher, []
    for point in range(len(teacher.groups)):
        first = teacher.group_starts()[point]
        x = torch.cat((teacher.embed(done.flow[:, :first]), done.noise[:, first:]), dim=1)
        codes = torch.cat([student.predict(label, part, point)[0].argmax(-1) for label, part in done.parts(x)])
        found.append([round(v, 4) for v in (codes == done.flow).double().mean(0)[first:].tolist()])
    return found


def of_their_prefix(done: Task, codes: Tensor, eps: Tensor) -> Tensor:
    """Codes that the flow makes of a noise, every token given the codes before it: teacher-forced."""
    teacher, found = done.teacher, []
    for label, own, part in done.parts(codes, eps):
        found.append(flow_sample(teacher.log_probs(label, own), part, teacher.codebook)[0])
    return torch.cat(found)


def jumps(done: Task, student: DD1Student) -> list[dict[str, Any]]:
    """Per change of the noise: share of codes, by position, that become others.

    "own": the flow's, the codes before it held; "flow": the flow's, with all that follows; "student": in one step.
    """
    teacher, rows = done.teacher, []
    number = torch.arange(done.samples, dtype=torch.int64)
    fresh = noise(done.config.seed + OTHER, number, (teacher.num_tokens, teacher.code_dim), "cpu")
    before = done.codes(student, (0,))
    for change in CHANGES:
        eps = math.sqrt(1 - change**2) * done.noise + change * fresh
        made = {
            "own": (of_their_prefix(done, done.flow, eps), done.flow),
            "flow": (done.flow_from(eps), done.flow),
            "student": (done.codes(student, (0,), eps), before),
        }
        shares = {name: (new != old).double().mean(0).tolist() for name, (new, old) in made.items()}
        rows.append({"change": change, **{name: [round(v, 4) for v in by] for name, by in shares.items()}})
    return rows


class Study:
    """Experiments of one task and seed."""

    def __init__(self, options: argparse.Namespace, rows: Rows) -> None:
        self.options, self.rows = options, rows
        self.about = {"task": options.task, "seed": options.seed}

    def task(self) -> Task:
        """The task that the user asks for."""
        about = {"samples": TOY_SAMPLES} if self.options.task == "toy" else {}
        return task(self.options.task, self.options.seed, **about)

    def dependent(self, experiment: str, **teacher: Any) -> None:
        """A toy of other sizes: its students by steps, and the best factorised samplers, exactly."""
        done = toy(self.options.seed, samples=TOY_SAMPLES, **teacher)
        assert isinstance(done.teacher, ToyTeacher)
        count = done.teacher.num_tokens

        def figures() -> dict[str, Any]:
            student = done.train({**all_points(done), "iterations": UPDATES["toy"]})
            bounds = {f"{k} steps": factorised(done.teacher, evenly(count, k)) for k in range(1, count)}
            entropy = -float(torch.special.xlogy(joint := done.teacher.joint(), joint).sum())
            floor = {"flow": done.teacher.total_variation(done.flow), "entropy": entropy}
            return {"students": by_steps(done, student), "factorised": bounds, **floor}

        self.rows.measure({"experiment": experiment, **self.about, **teacher}, figures)

    def strength(self) -> None:
        """How strongly tokens depend on each other."""
        for strength in (0.4, 0.8, 1.5, 2.5, 4.0):
            self.dependent("strength", strength=strength)

    def tokens(self) -> None:
        """How many tokens there are; four codes, so that all can be counted."""
        for count in (2, 3, 4, 5, 6):
            self.dependent("tokens", num_codes=4, num_tokens=count)

    def one_step(self, done: Task, about: dict[str, Any], pairs: int = 0, sizes: Any = None, updates: int = 0) -> None:
        """A student of the paper's points, judged in one step."""

        def figures() -> dict[str, Any]:
            data = done.some_pairs(pairs) if pairs else done.pairs
            settings = {"point": evenly(len(done.teacher.groups), 3)[1]}
            settings["iterations"] = updates or UPDATES[self.options.task]
            student = done.train(settings, student=done.student(**(sizes or {})), pairs=data)
            weights = sum(parameter.numel() for parameter in student.parameters())
            return {"weights": weights, **done.figures(done.codes(student, (0,)))}

        self.rows.measure({**self.about, **about}, figures)

    def sizes(self) -> None:
        """Depth, width and recycling; of the digits, students of another width start from nothing."""
        done = self.task()
        widths, depths = ((16, 32, 128), (1, 2, 3, 6)) if done.name == "toy" else ((48, 192), (1, 2, 4, 6))
        middle, heads = 64 if done.name == "toy" else 96, 4
        for recycles in (1, 2):
            self.one_step(done, {"experiment": "recycling", "recycles": recycles}, sizes={"recycles": recycles})
        for depth in depths:
            sizes = {"width": middle, "depth": depth, "heads": heads}
            self.one_step(done, {"experiment": "depth", "depth": depth}, sizes=sizes)
        for width in widths:
            depth = 3 if done.name == "toy" else 4
            sizes = {"width": width, "depth": depth, "heads": heads}
            self.one_step(done, {"experiment": "width", "width": width}, sizes=sizes)

    def pairs(self) -> None:
        """Training pairs; the number of updates is the same."""
        done = self.task()
        for count in (500, 2000, 8000, 20_000, 80_000):
            self.one_step(done, {"experiment": "pairs", "pairs": count}, pairs=count)

    def updates(self) -> None:
        """Updates."""
        done = self.task()
        for count in (250, 500, 1000, 2000, 4000):
            self.one_step(done, {"experiment": "updates", "updates": count}, updates=count)

    def sources(self) -> None:
        """One student that starts from anywhere: where it is wrong."""
        done = self.task()

        def figures() -> dict[str, Any]:
            student = done.train({**all_points(done), "iterations": 2 * UPDATES[self.options.task]})
            one = done.codes(student, (0,))
            right = (one == of_their_prefix(done, one, done.noise)).double().mean(0)
            return {
                "by steps": by_steps(done, student),
                "given the truth": given_truth(done, student),
                "right for its own prefix": [round(v, 4) for v in right.tolist()],
                "jumps": jumps(done, student),
            }

        self.rows.measure({"experiment": "sources", **self.about}, figures)


def charts(rows: Rows, to: Path = Path("docs/notes/limits.png")) -> None:
    """Steps, and where errors come from, as a picture."""
    from matplotlib.figure import Figure  # not needed to measure

    drawing = Figure(figsize=(11, 7.5), layout="constrained")
    by_steps, factor, places, changes = drawing.subplots(2, 2).flatten()
    strengths = [row for row in rows.rows if row["experiment"] == "strength" and row["seed"] == 0]
    for colour, row in enumerate(strengths):
        for axes, name, dashes in ((by_steps, "students", "-"), (by_steps, "factorised", "--")):
            found = {int(key.split()[0]): own["tv"] for key, own in row[name].items()}
            label = f"strength {row['strength']:g}" if name == "students" else None
            axes.plot(list(found), list(found.values()), dashes, marker="o", color=f"C{colour}", label=label)
        factor.plot(row["factorised"]["1 steps"]["kl"], row["students"]["1 steps"]["tv"], "o", color=f"C{colour}")
        factor.plot(row["factorised"]["1 steps"]["kl"], row["factorised"]["1 steps"]["tv"], "s", color=f"C{colour}")
        factor.plot(row["factorised"]["1 steps"]["kl"], row["flow"], "_", color=f"C{colour}", markersize=14)
    by_steps.set(xlabel="steps", ylabel="total variation", title="Toy: DD1 (solid), best factorised sampler (dashed)")
    by_steps.set_xticks([1, 2, 3, 4])
    by_steps.legend()
    title = "Toy, one step: DD1 (dots), factorised (squares), floor (lines)"
    factor.set(xlabel="total correlation, nats", ylabel="total variation", title=title)
    row = next(row for row in rows.rows if row["experiment"] == "sources" and row["task"] == "digits")
    tokens = range(1, len(row["given the truth"]) + 1)
    lines = {
        "from noise alone, as the flow": row["given the truth"][0],
        "right for the codes the student made before": row["right for its own prefix"],
        "given the right codes before": [found[0] for found in row["given the truth"]],
    }
    for name, values in lines.items():
        places.plot(tokens, values, marker="o", label=name)
    places.set(xlabel="token", ylabel="share of right codes", title="Digits: the student's codes", ylim=(0, 1))
    places.legend()
    for name, label in (("own", "the flow, codes before held"), ("flow", "the flow"), ("student", "the student")):
        values = [sum(jump[name]) / len(jump[name]) for jump in row["jumps"]]
        changes.loglog([jump["change"] for jump in row["jumps"]], values, marker="o", label=label)
    changes.set(xlabel="change of the noise", ylabel="share of codes that change", title="Digits: jumps of the map")
    changes.legend()
    drawing.savefig(to, dpi=80)


def main() -> None:
    """See the module's text."""
    kinds = ["strength", "tokens", "sizes", "pairs", "updates", "sources", "charts"]
    options = parser(__doc__, kinds, list(UPDATES), "limits.json").parse_args()
    rows = Rows(options.out)
    if options.experiment == "charts":
        charts(rows)
        return
    getattr(Study(options, rows), options.experiment)()


if __name__ == "__main__":
    main()
