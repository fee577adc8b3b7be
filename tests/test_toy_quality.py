"""DD1, whole, on a teacher whose joint distribution is enumerable.

docs/method.md section 17 (The enumerable teacher).

pytest tests/test_toy_quality.py -m "slow or not slow" -s     # three seeds instead of one
"""

import pytest
import torch

from ddfast.config import DD1Config, TrainConfig, TrajectoryConfig
from ddfast.distill.stages import distill
from ddfast.evaluation.sources import sample
from ddfast.models.student import TransformerStudent
from ddfast.models.toy import ToyTeacher
from ddfast.trajectories.generate import generate_trajectories, store_settings
from ddfast.trajectories.store import TrajectoryStore

pytestmark = pytest.mark.full

SAMPLES = 200_000
STUDENT_SAMPLES = 50_000
"""Fewer, for they take a minute; an empirical distribution of fewer samples lies farther from the joint, not nearer."""

seeds = pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)


@seeds
def test_total_variation_from_the_exact_joint(tmp_path, seed):
    teacher = ToyTeacher(seed=seed)
    config = TrainConfig(
        seed=seed,
        trajectories=TrajectoryConfig(count=SAMPLES, shard_size=10_000),
        dd1=DD1Config(point=2, iterations=2000, batch_size=512, learning_rate=4e-3),
    )
    store = TrajectoryStore.create(tmp_path / "pairs", store_settings(teacher, config.trajectories, seed))
    generate_trajectories(teacher, store, SAMPLES)
    torch.manual_seed(seed)
    student, _ = distill(
        config, teacher, store.load(), tmp_path, student=TransformerStudent(teacher, width=64, depth=3, heads=4)
    )
    distance = {}
    for source in ("teacher", "ode_pairs", "student_1step", "student_2step", "independent_marginals"):
        count = STUDENT_SAMPLES if "student" in source else SAMPLES
        made = sample(source, teacher, student, count=count, seed=seed + 1000, batch_size=50_000)
        distance[source] = teacher.total_variation(made.codes)
    print(f"\nseed {seed}:", ", ".join(f"{source} {value:.4f}" for source, value in distance.items()))
    assert abs(distance["ode_pairs"] - distance["teacher"]) <= 0.005
    assert distance["student_1step"] <= 0.15
    assert distance["student_2step"] <= 0.12
    assert distance["independent_marginals"] > 0.7
