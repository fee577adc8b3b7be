"""Which trajectory points should DD1 train? The experiments of docs/notes/points.md.

python benchmarks/studies/points.py profile --task digits             # what the teacher itself says of its places
python benchmarks/studies/points.py places --task digits --seed 0     # one point beside 0, every place
python benchmarks/studies/points.py schedules --task digits --seed 0  # one to three points by rules, and learnt
python benchmarks/studies/points.py probability --task digits --seed 0
python benchmarks/studies/points.py places --task digits --points 2 5 11 --updates 2000   # what more time leaves of it
python benchmarks/studies/points.py tables                            # the page's tables, of all rows there are

Tasks: toy (enumerable, 4 tokens), digits, digits-llamagen (16 tokens), digits-var (4 scales). Rows are kept in --out as
they come; what is there is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import accumulate, combinations, pairwise
from typing import Any

import torch
from common import Rows, Task, parser, task
from torch import Tensor

from ddfast.models.student import DD1Student
from ddfast.ops import nearest_code, noise

UPDATES = {"toy": 1000, "digits": 500, "digits-llamagen": 500, "digits-var": 500}
"""Of a student, where the experiment is not about their number: enough to tell places apart."""

EXPLORED = 0.4
"""Share of the updates in which a learnt point is looked for."""

CHOICE = 2000
"""Added to a teacher's seed for the noise by which a point is chosen: neither that of the pairs nor the judge's."""

Settings = dict[str, Any]


def entropies(done: Task, samples: int = 5000) -> tuple[Tensor, Tensor]:
    """Mean entropy float64 [N] of every token given those before it, and given its class alone, in nats."""
    teacher, labels = done.teacher, done.condition[:samples]
    codes = teacher.generate(labels, generator=torch.Generator().manual_seed(done.config.seed))
    log_probs = teacher.log_probs(labels, codes).double()
    given_all = -(log_probs.exp() * log_probs.clamp(min=-100)).sum(-1).mean(0)
    given_class = torch.stack([marginal_entropy(log_probs[labels == label]) for label in labels.unique()]).mean(0)
    return given_all, given_class


def marginal_entropy(log_probs: Tensor) -> Tensor:
    """Entropy float64 [N] of the mean of some samples' distributions [B, N, V]."""
    probs = log_probs.exp().mean(0)
    return -(probs * probs.clamp(min=1e-30).log()).sum(-1)


def groups_of(done: Task, by_token: Tensor) -> list[float]:
    """Sums over the tokens of each group: what a point counts."""
    return [float(part.sum()) for part in by_token.split(list(done.teacher.groups))]


def rules(done: Task) -> dict[str, Callable[[int], tuple[int, ...]]]:
    """Schedules by name: k points of the groups 1 .. n - 1."""
    given_all, given_class = (groups_of(done, values) for values in entropies(done))
    count = len(done.teacher.groups)
    falls = [before - after for before, after in pairwise(given_all)]
    steepest = sorted(range(1, count), key=lambda point: -falls[point - 1])
    told = [free - bound for free, bound in zip(given_class, given_all, strict=True)]
    return {
        "uniform": lambda k: rising([count * j / (k + 1) for j in range(1, k + 1)], count),
        "geometric": lambda k: rising([count ** (j / (k + 1)) for j in range(1, k + 1)], count),
        "entropy": lambda k: rising([shared(given_all, j / (k + 1)) for j in range(1, k + 1)], count),
        "entropy's fall": lambda k: tuple(sorted(steepest[:k])),
        "information": lambda k: rising([shared(told, j / (k + 1)) for j in range(1, k + 1)], count),
    }


def shared(values: list[float], share: float) -> float:
    """Where the running sum of values reaches a share of the whole, a fraction of a group."""
    sums = [0.0, *accumulate(values)]
    goal = share * sums[-1]
    at = next(i for i, total in enumerate(sums) if total >= goal)
    return at - (sums[at] - goal) / max(sums[at] - sums[at - 1], 1e-12)


def rising(values: list[float], count: int) -> tuple[int, ...]:
    """Rounded to different points of 1 .. count - 1."""
    points: list[int] = []
    for left, value in zip(range(len(values) - 1, -1, -1), values, strict=True):
        least = points[-1] + 1 if points else 1
        points.append(min(max(round(value), least), count - 1 - left))
    return tuple(points)


def trained(done: Task, points: tuple[int, ...], updates: int, **dd1: Any) -> DD1Student:
    """A student of these points."""
    return done.train({"point": points[0], "later_points": list(points[1:]), "iterations": updates, **dd1})


def judged(done: Task, student: DD1Student, points: tuple[int, ...]) -> dict[str, Any]:
    """Figures of one step, two, and as many as there are points and one more."""
    steps = {len(points[:k]) + 1: (0, *points[:k]) for k in range(len(points) + 1)}
    return {f"{count} steps": done.figures(done.codes(student, passes)) for count, passes in steps.items()}


def learnt(done: Task, updates: int) -> tuple[DD1Student, int]:
    """A student that trains all points first, then the one from which its two steps were likeliest to the teacher."""
    first, last = round(EXPLORED * updates), len(done.teacher.groups) - 1
    student = trained(done, tuple(range(1, last + 1)), first)
    likelihoods = {point: likelihood(done, student, point) for point in range(1, last + 1)}
    chosen = max(likelihoods, key=lambda point: likelihoods[point])
    settings = {"point": chosen, "later_points": [], "iterations": updates - first}
    return done.train(settings, student=student.train().requires_grad_(True)), chosen


def likelihood(done: Task, student: DD1Student, point: int, samples: int = 1000) -> float:
    """Of a student's two steps, under the teacher, in nats per token; from noise for choosing."""
    teacher, number = done.teacher, torch.arange(samples, dtype=torch.int64)
    eps = noise(done.config.seed + CHOICE, number, (teacher.num_tokens, teacher.code_dim), "cpu")
    labels = number % teacher.num_conditions
    codes = nearest_code(student.sample(labels, eps, steps=(0, point)), student.codebook)
    return float(teacher.log_probs(labels, codes, filtered=False).gather(-1, codes[..., None]).mean())


class Study:
    """Experiments of one task and seed."""

    def __init__(self, options: argparse.Namespace, rows: Rows) -> None:
        self.done, self.rows = task(options.task, options.seed), rows
        self.updates, self.points = options.updates or UPDATES[options.task], options.points
        self.about = {"task": options.task, "seed": options.seed}

    def row(self, experiment: str, points: tuple[int, ...], **settings: Any) -> None:
        """Train and judge a student of these points, unless its row is there."""

        def figures() -> dict[str, Any]:
            dd1 = {"point_probability": settings["probability"]} if "probability" in settings else {}
            return judged(self.done, trained(self.done, points, self.updates, **dd1), points)

        about = {"experiment": experiment, **self.about, "points": points, "updates": self.updates, **settings}
        self.rows.measure(about, figures)

    def profile(self) -> None:
        """Entropies by group, the rules' points, and what the teacher and independent tokens reach."""
        given_all, given_class = (groups_of(self.done, values) for values in entropies(self.done))
        found = {
            "entropy given those before": [round(v, 3) for v in given_all],
            "entropy given the class": [round(v, 3) for v in given_class],
            **{name: [rule(k) for k in self.counts()] for name, rule in rules(self.done).items()},
            "flow": self.done.figures(self.done.flow),
        }
        self.rows.measure({"experiment": "profile", **self.about}, lambda: found)

    def places(self) -> None:
        """One point beside 0."""
        for point in self.points or range(1, len(self.done.teacher.groups)):
            self.row("places", (point,))

    def counts(self) -> list[int]:
        """How many points there may be."""
        return [k for k in (1, 2, 3) if k < len(self.done.teacher.groups)]

    def schedules(self) -> None:
        """Two and three points by every rule; of few groups, all subsets; all points at once; the learnt one."""
        count = len(self.done.teacher.groups)
        if count <= 4:
            chosen = {points for k in self.counts()[1:] for points in combinations(range(1, count), k)}
        else:
            different = ("uniform", "geometric", "entropy's fall", "information")
            chosen = {rules(self.done)[name](k) for name in different for k in (2, 3)}
        for points in sorted(chosen, key=lambda points: (len(points), points)):
            self.row("schedules", points)
        self.learnt()

    def learnt(self) -> None:
        """The point that a training found best on its way."""

        def figures() -> dict[str, Any]:
            student, point = learnt(self.done, self.updates)
            return {"chosen": point, **judged(self.done, student, (point,))}

        self.rows.measure({"experiment": "learnt", **self.about, "updates": self.updates}, figures)

    def probability(self) -> None:
        """How often the point is trained, and not 0."""
        point = rules(self.done)["geometric"](1)
        for share in (0.1, 0.2, 0.5, 0.7, 0.9):
            self.row("probability", point, probability=share)


def by_seeds(rows: Rows, task_name: str, experiment: str) -> dict[Any, list[Settings]]:
    """Rows of one task and experiment, by all settings but the seed."""
    found: dict[Any, list[Settings]] = {}
    for row in rows.rows:
        if row["task"] == task_name and row["experiment"] == experiment:
            key = (tuple(row.get("points", ())), row.get("updates"), row.get("probability"))
            found.setdefault(key, []).append(row)
    return found


DIGITS = {"tv": 3, "teacher_nll": 3, "frechet": 2, "agree": 3}
"""Behind the point."""


def tables(rows: Rows) -> None:
    """Every experiment as a Markdown table: of one step and of the most steps, a figure for each seed."""
    for name in UPDATES:
        figure = ("tv",) if name == "toy" else ("teacher_nll", "frechet")
        for experiment in ("places", "schedules", "learnt", "probability"):
            found = by_seeds(rows, name, experiment)
            if not found:
                continue
            figures = (*figure, "agree")
            heads = [f"{steps}: {one}" for steps in ("1 step", "all steps") for one in figures]
            print(f"\n{name}, {experiment}\n\n| points | updates | share | seeds | {' | '.join(heads)} |")
            print("|" + "---|" * (4 + len(heads)))
            for (points, updates, share), own in sorted(found.items(), key=lambda item: _order(item[0])):
                cells = [
                    " / ".join(f"{row[steps(row)][one]:.{DIGITS[one]}f}" for row in own)
                    for steps in (lambda _: "1 steps", last)
                    for one in figures
                ]
                told = points or [row["chosen"] for row in own]
                print(f"| {told} | {updates} | {share or ''} | {len(own)} | {' | '.join(cells)} |")


def _order(settings: tuple[tuple[int, ...], int | None, float | None]) -> list[float]:
    """Updates, probability, number of points, points."""
    points, updates, share = settings
    return [updates or 0, share or 0, len(points), *points]


def last(row: Settings) -> str:
    """Key of a row's most steps."""
    return max(key for key in row if key.endswith(" steps"))


def main() -> None:
    """See the module's text."""
    kinds = ["profile", "places", "schedules", "learnt", "probability", "tables"]
    given = parser(__doc__, kinds, list(UPDATES), "points.json")
    given.set_defaults(task="digits")
    given.add_argument("--points", type=int, nargs="*", help="of places; default: all")
    given.add_argument("--updates", type=int, default=0, help="of a student; default: the task's")
    options = given.parse_args()
    rows = Rows(options.out)
    if options.experiment == "tables":
        tables(rows)
        return
    getattr(Study(options, rows), options.experiment)()


if __name__ == "__main__":
    main()
