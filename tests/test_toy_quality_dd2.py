"""DD2, whole, on a teacher whose joint distribution is enumerable.

docs/method.md section 17 (The enumerable teacher).

pytest tests/test_toy_quality_dd2.py -m "slow or not slow" -s     # three seeds instead of one, and four tokens
"""

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch

from ddfast.config import TrainConfig, update
from ddfast.distill.stages import match, tune
from ddfast.evaluation.sources import sample
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.toy import ToyTeacher

pytestmark = pytest.mark.full

SAMPLES = 200_000

seeds = pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
slow_seeds = pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(3)])


def network(teacher: ToyTeacher, seed: int) -> TransformerFlowNetwork:
    torch.manual_seed(seed)
    return TransformerFlowNetwork(teacher, width=64, depth=3, heads=4, head_width=64, head_depth=2)


SCORES = {
    "codes": {"iterations": 1000, "optimizer": "muon", "guidance_learning_rate": 4e-3, "guidance_updates": 2},
    "velocity": {"iterations": 2000, "optimizer": "adamw", "guidance_learning_rate": 3e-3, "guidance_updates": 4},
}


@functools.cache
def stage_1_of_one_token(seed: int) -> tuple[ToyTeacher, TransformerFlowNetwork]:
    """The teacher of one token and its AR-diffusion model, from which every form of the score distance starts."""
    teacher, config = ToyTeacher(seed=seed, num_tokens=1), TrainConfig(seed=seed)
    update(config.dd2.tune, {"iterations": 400, "batch_size": 256, "learning_rate": 2e-3})
    tuned = network(teacher, seed)
    with tempfile.TemporaryDirectory() as folder:
        tune(config, teacher, tuned, None, Path(folder))
    return teacher, tuned


@pytest.mark.parametrize("fake_score", ["codes", pytest.param("velocity", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("form", "bound"), [("kl", 0.07), ("sid", 0.05)])
@seeds
def test_dd2_of_one_token(tmp_path, seed, form, bound, fake_score):
    """The score distance alone, from stage 1, where nothing can go wrong with prefixes."""
    teacher, tuned = stage_1_of_one_token(seed)
    config = TrainConfig(seed=seed)
    alone = {"form": form, "fake_score": fake_score, "score_weight": 1.0, "start_iterations": 0}
    alone |= {"anchor_weight": 0.0, "lookahead_weight": 0.0}
    rates = {"batch_size": 256, "learning_rate": 1e-3, "weight_decay": 0.0, "ema_decay": 0.99, **SCORES[fake_score]}
    update(config.dd2.match, {**alone, **rates})
    student, guide = copy.deepcopy(tuned), copy.deepcopy(tuned)
    match(config, teacher, student, guide, tmp_path)
    codes = sample("student_1step", teacher, student, count=SAMPLES, seed=seed + 1000, batch_size=50_000).codes
    distance = teacher.total_variation(codes)
    print(f"\nseed {seed}: one token, {form}, fake score by {fake_score}: {distance:.4f}")
    assert distance <= bound


@slow_seeds
def test_stage_1_of_dd2(tmp_path, seed):
    """GTS against Monte-Carlo after as many steps."""
    distance = {}
    for loss in ("gts", "monte_carlo"):
        teacher, config = ToyTeacher(seed=seed), TrainConfig(seed=seed)
        update(config.dd2.tune, {"loss": loss, "iterations": 1500, "batch_size": 256})
        update(config.dd2.tune, {"optimizer": "muon", "learning_rate": 6e-3})
        tuned = network(teacher, seed)
        tune(config, teacher, tuned, None, tmp_path / loss)
        samples = sample("ar_diffusion", teacher, tuned, count=50_000, seed=seed + 1000, batch_size=10_000)
        distance[loss] = teacher.total_variation(samples.codes)
    print(f"\nseed {seed}:", ", ".join(f"{loss} {value:.4f}" for loss, value in distance.items()))
    assert distance["gts"] <= 0.10
    assert distance["gts"] < distance["monte_carlo"]


@slow_seeds
def test_dd2_of_four_tokens(tmp_path, seed):
    """The default recipe from scratch, and its control: as many of the generator's updates, no score distance."""
    distance = {}
    for score_weight in (10.0, 0.0):
        teacher, config = ToyTeacher(seed=seed), TrainConfig(seed=seed)
        shared = {"batch_size": 256, "start_learning_rate": 1e-2, "score_weight": score_weight}
        update(config.dd2.match, {"start_iterations": 2000, "iterations": 1000, "guidance_first": 200, **shared})
        student, guide = network(teacher, seed), network(teacher, seed + 1)
        match(config, teacher, student, guide if score_weight else None, tmp_path / str(score_weight))
        made = sample("student_1step", teacher, student, count=SAMPLES, seed=seed + 1000, batch_size=50_000)
        distance[score_weight] = teacher.total_variation(made.codes)
    print(f"\nseed {seed}: 1 step {distance[10.0]:.4f}, without the score distance {distance[0.0]:.4f}")
    assert distance[10.0] <= 0.09
