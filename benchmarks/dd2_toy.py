"""The experiments of docs/notes/dd2.md on the enumerable teacher, where the truth is known.

python benchmarks/dd2_toy.py directions --tokens 2 --start 0       # from stage 1: where each term's gradient leads
python benchmarks/dd2_toy.py directions --tokens 2 --start 1200    # after anchor and look-ahead
python benchmarks/dd2_toy.py tokens --tokens 3 --start 250         # whose term moves whose divergence
python benchmarks/dd2_toy.py recipe match.form=sid tune.loss=gts   # any settings, trained and judged
python benchmarks/dd2_toy.py recipe --oracle --tokens 2               # the generator's score counted, not learnt
python benchmarks/dd2_toy.py recipe --curriculum 1500              # token after token instead of all at once
python benchmarks/dd2_toy.py recipe --recycles 2                   # a generator that reads what it has made
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ddfast.config import MatchConfig, TrainConfig, update
from ddfast.distill.batch import Part
from ddfast.distill.dd2 import Matching
from ddfast.distill.losses import anchor_distance
from ddfast.distill.method import Roles
from ddfast.distill.stages import match, tune
from ddfast.distill.trainer import from_noise
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.toy import ToyTeacher
from ddfast.ops import flow_sample, nearest_code
from ddfast.pipeline import needs_tuning

TERMS = {
    "score, KL": {"form": "kl", "anchor_weight": 0.0, "lookahead_weight": 0.0},
    "score, SiD": {"form": "sid", "anchor_weight": 0.0, "lookahead_weight": 0.0},
    "anchor": {"score_weight": 0.0, "anchor_weight": 1.0, "lookahead_weight": 0.0},
    "look-ahead": {"score_weight": 0.0, "anchor_weight": 0.0, "lookahead_weight": 1.0},
}


class Judge:
    """Divergence of a generator's codes from the exact joint, from the same noise every time."""

    def __init__(self, teacher: ToyTeacher, samples: int = 200_000) -> None:
        self.teacher, self.noise = teacher, torch.randn(samples, teacher.num_tokens, 2)
        self.joint = teacher.joint().view([teacher.num_codes] * teacher.num_tokens)

    @torch.no_grad()
    def table(self, student: TransformerFlowNetwork, *, second_pass: bool = False) -> Tensor:
        """Empirical joint of the codes, float64 [V] * n; of a second pass, the teacher's flow given the first one's."""
        label = torch.zeros(20_000, dtype=torch.int64)
        counts = torch.zeros(self.joint.shape, dtype=torch.float64)
        for eps in self.noise.split(20_000):
            codes = nearest_code(student.generate(label, eps)[0], student.codebook)
            if second_pass:
                codes = flow_sample(self.teacher.log_probs(label, codes), eps, student.codebook)[0]
            counts += code_counts(codes, self.joint.shape)
        return counts / len(self.noise)

    def total_variation(self, student: TransformerFlowNetwork, *, second_pass: bool = False) -> list[float]:
        """Of the first 1..n tokens."""
        ours = self.table(student, second_pass=second_pass)
        return [0.5 * float((_first(ours, k) - _first(self.joint, k)).abs().sum()) for k in self._counts()]

    def divergences(self, student: TransformerFlowNetwork) -> Tensor:
        """KL(generator || teacher) of every token given those before it, in nats, [n]."""
        ours = self.table(student)
        whole = []
        for count in self._counts():
            p, q = _first(ours, count), _first(self.joint, count)
            whole.append(float(torch.special.xlogy(p, p / q).sum()))
        return torch.tensor([whole[0], *(later - before for before, later in pairwise(whole))])

    def _counts(self) -> range:
        return range(1, self.teacher.num_tokens + 1)


def code_counts(codes: Tensor, shape: torch.Size) -> Tensor:
    """How often every sequence stands in codes [B, n], float64 [V] * n."""
    weights = shape[0] ** torch.arange(len(shape) - 1, -1, -1)
    return torch.bincount((codes * weights).sum(-1), minlength=shape.numel()).double().view(shape)


class CountedGuidance(nn.Module):
    """A guidance network of codes that needs no training: the generator's own conditionals, counted.

    Every call counts fresh samples; older ones fade by `decay`, which keeps decay / (1 - decay) times as many in sight.
    """

    def __init__(self, student: TransformerFlowNetwork, *, samples: int = 8192, decay: float = 0.9) -> None:
        super().__init__()
        self.generate, self.codebook = student.generate, student.codebook
        self.samples, self.decay = samples, decay
        self.counts = torch.zeros([len(self.codebook)] * student.teacher.num_tokens, dtype=torch.float64)
        self.nothing = nn.Parameter(torch.zeros(()))  # an optimizer wants a parameter

    @torch.no_grad()
    def features(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of every next token given tokens [B, n, 2]: [B, n, V]."""
        noise = torch.randn(self.samples, *tokens.shape[1:])
        made, _ = self.generate(condition.new_zeros(self.samples), noise)
        self.counts = self.decay * self.counts + code_counts(nearest_code(made, self.codebook), self.counts.shape)
        codes, found = nearest_code(tokens, self.codebook), []
        for token in range(tokens.shape[1]):
            table = _first(self.counts, token + 1) + 0.1
            log_probs = (table / table.sum(-1, keepdim=True)).log()
            found.append(log_probs[tuple(codes[:, :token].unbind(1))].expand(len(codes), -1))
        return torch.stack(found, dim=1).float()

    def code_logits(self, features: Tensor) -> Tensor:
        """They are that already."""
        return features + 0 * self.nothing


def token_after_token(student: TransformerFlowNetwork, updates: int) -> None:
    """Let a generator's token i learn only after i/n of so many of its passes."""
    runs, passes, tokens = student.runs, 0, len(student.groups)

    def taught(condition: Tensor, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        nonlocal passes
        found = runs(condition, noise)
        if torch.is_grad_enabled():
            learns = (torch.arange(tokens) <= tokens * passes / updates)[:, None]
            passes += 1
            found = [tuple(torch.where(learns, part, part.detach()) for part in run) for run in found]
        return found

    student.runs = taught


def _first(table: Tensor, tokens: int) -> Tensor:
    later = tuple(range(tokens, table.ndim))
    return table.sum(later) if later else table


def network(teacher: ToyTeacher, seed: int, recycles: int = 0) -> TransformerFlowNetwork:
    """The size of tests/test_toy_quality.py."""
    torch.manual_seed(seed)
    sizes = {"width": 64, "depth": 3, "heads": 4, "head_width": 64, "head_depth": 2}
    return TransformerFlowNetwork(teacher, **sizes, recycles=recycles)


def prepared(tokens: int, start: int, seed: int) -> tuple[Matching, Judge]:
    """A generator after `start` updates of anchor and look-ahead (0: stage 1's), a guidance network fitted to it."""
    teacher, config = ToyTeacher(seed=seed, num_tokens=tokens), TrainConfig(seed=seed)
    update(config.dd2.tune, {"iterations": 500, "batch_size": 256, "learning_rate": 3e-3, "draws": 4})
    guidance = network(teacher, seed)
    tune(config, teacher, guidance, None, Path(tempfile.mkdtemp()))
    student = copy.deepcopy(guidance)
    if start:
        student = network(teacher, seed)
        rates = {"batch_size": 256, "start_learning_rate": 4e-3, "watch_every": 10**6}
        update(config.dd2.match, {"score_weight": 0.0, "start_iterations": start, "iterations": 1, **rates})
        match(config, teacher, student, None, Path(tempfile.mkdtemp()))
    for trained in (student, guidance):
        trained.train().requires_grad_(True)
    roles = Roles(student=student, teacher=teacher, guidance=guidance)
    method = Matching(roles, MatchConfig(start_iterations=0, batch_size=256, draws=4, fake_score="velocity"))
    optimizer = torch.optim.AdamW(guidance.parameters(), lr=2e-3, betas=(0.9, 0.95))
    draw = from_noise(teacher)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 500)
        part = Part.whole(256, torch.Generator().manual_seed(10_000 + step))
        optimizer.zero_grad()
        method.step("guidance", draw(part), part)[0].backward()
        optimizer.step()
    return method, Judge(teacher)


def gradients(method: Matching, loss: Callable[[int], Tensor], batches: int) -> list[list[Tensor]]:
    """The generator's gradients, batch by batch."""
    parameters = list(method.student.parameters())
    found = [torch.autograd.grad(loss(batch), parameters, allow_unused=True) for batch in range(batches)]
    return [[torch.zeros_like(p) if g is None else g for p, g in zip(parameters, own, strict=True)] for own in found]


def moved(student: TransformerFlowNetwork, direction: list[Tensor], step: float) -> TransformerFlowNetwork:
    """A copy that went `step` against the direction, which is scaled to length 1."""
    length = math.sqrt(sum(float(part.square().sum()) for part in direction))
    there = copy.deepcopy(student)
    with torch.no_grad():
        for parameter, part in zip(there.parameters(), direction, strict=True):
            parameter -= step / length * part
    return there


def directions(tokens: int, start: int, seed: int) -> None:
    """Per term: its gradient's signal to noise in the backbone, and the divergences a step along it leads to."""
    method, judge = prepared(tokens, start, seed)
    student, draw = method.student, from_noise(method.roles.teacher)
    kl, tv = float(judge.divergences(student).sum()), judge.total_variation(student)[-1]
    print(f"{tokens} tokens, start {start}: KL {kl:.4f}, TV {tv:.4f}")
    backbone = [i for i, (name, _) in enumerate(student.named_parameters()) if not name.startswith("velocity_head")]
    for term, settings in TERMS.items():
        method.config = dataclasses.replace(MatchConfig(start_iterations=0, draws=4, fake_score="velocity"), **settings)

        def loss(batch: int) -> Tensor:
            part = Part.whole(256, torch.Generator().manual_seed(batch))
            return method.step("student", draw(part), part)[0]

        found = gradients(method, loss, 60)
        mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
        noise = sum(float(torch.stack([own[i] for own in found]).var(0).sum()) for i in backbone)
        signal = sum(float(mean[i].square().sum()) for i in backbone) - noise / len(found)
        steps = []
        for step in (0.01, 0.05, 0.2):
            there = moved(student, mean, step)
            d_kl = float(judge.divergences(there).sum()) - kl
            steps.append(f"{step:g}: KL {d_kl:+.4f}, TV {judge.total_variation(there)[-1] - tv:+.4f}")
        print(f"  {term:12s} signal/noise {signal / noise:8.4f}; a step of {'; '.join(steps)}", flush=True)


def tokens_matrix(tokens: int, start: int, seed: int) -> None:
    """The slope of every token's conditional divergence along every token's term (central difference)."""
    method, judge = prepared(tokens, start, seed)
    student, teacher = method.student, method.roles.teacher
    draw = from_noise(teacher)
    print(f"{tokens} tokens, start {start}: KL by token {[round(v, 4) for v in judge.divergences(student).tolist()]}")
    for term in ("score", "anchor"):
        for token in range(tokens):

            def loss(number: int, term: str = term, token: int = token) -> Tensor:
                generator = torch.Generator().manual_seed(number)
                batch = draw(Part.whole(2048, generator))
                x, _ = student.generate(batch.condition, batch.noise)
                prefix = method._prefix(x)
                x = torch.where(torch.arange(tokens)[:, None] == token, x, x.detach())
                log_probs = teacher.log_probs(batch.condition, prefix)
                if term == "score":
                    return method._score_distance(x, prefix, log_probs, batch.condition, generator)[0]
                target = flow_sample(log_probs, batch.noise, student.codebook)[1]
                return anchor_distance(x, target, method.anchor_width)

            found = gradients(method, loss, 12)
            mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
            there, back = (judge.divergences(moved(student, mean, step)) for step in (0.01, -0.01))
            slopes = [round(1000 * value, 1) for value in ((there - back) / 2).tolist()]
            print(
                f"  {term} of token {token + 1}: change of every token's KL per step of 0.01, x1000: {slopes}",
                flush=True,
            )


def recipe(options: argparse.Namespace, settings: dict[str, object]) -> None:
    """Train by `settings` ("tune.FIELD" and "match.FIELD") and print the total variation of the first 1..n tokens."""
    seed, init = options.seed, options.init
    teacher, config = ToyTeacher(seed=seed, num_tokens=options.tokens), TrainConfig(seed=seed, init=init)
    parts: dict[str, dict[str, object]] = {"tune": {"batch_size": 256}, "match": {"batch_size": 256}}
    for name, value in settings.items():
        part, field = name.split(".")
        parts[part][field.replace("-", "_")] = value
    update(config.dd2, parts)
    judge, folder = Judge(teacher), Path(tempfile.mkdtemp())
    student, guidance = network(teacher, seed, options.recycles), network(teacher, seed + 1)
    started = time.perf_counter()
    if needs_tuning(config):
        tuned = network(teacher, seed)
        tune(config, teacher, tuned, None, folder)
        if init == "stage1":
            student.share(tuned)
        guidance = tuned if config.dd2.match.guidance_start == "stage1" else guidance
    if options.oracle:
        guidance = CountedGuidance(student)
    if options.curriculum:
        token_after_token(student, options.curriculum)
    ready = time.perf_counter()
    match(config, teacher, student, guidance if config.dd2.match.score_weight else None, folder)
    seconds = f"{ready - started:.0f} + {time.perf_counter() - ready:.0f} s"
    one, two = judge.total_variation(student), judge.total_variation(student, second_pass=True)
    print(f"{vars(options)}: TV {_rounded(one)}, {seconds}; after a second pass, the teacher's: {_rounded(two)}")


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _value(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=["directions", "tokens", "recipe"])
    parser.add_argument("settings", nargs="*", help="of a recipe: match.form=sid tune.iterations=1000 ...")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", default="scratch", choices=["stage1", "scratch"])
    parser.add_argument("--oracle", action="store_true", help="of a recipe: count the generator's law")
    parser.add_argument("--recycles", type=int, default=0, help="of a recipe: runs of the generator after the first")
    parser.add_argument("--curriculum", type=int, default=0, help="of a recipe: updates until all tokens learn")
    options = parser.parse_intermixed_args()
    if options.experiment == "recipe":
        pairs = (setting.split("=") for setting in options.settings)
        recipe(options, {name: _value(value) for name, value in pairs})
    else:
        run = directions if options.experiment == "directions" else tokens_matrix
        run(options.tokens, options.start, options.seed)


if __name__ == "__main__":
    main()
