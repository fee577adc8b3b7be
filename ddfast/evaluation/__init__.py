"""Quality and speed of samples."""

from ddfast.evaluation.quality import Evaluator, pair_table_distance
from ddfast.evaluation.speed import measure_speed
from ddfast.frechet import frechet_distance

__all__ = ["Evaluator", "frechet_distance", "measure_speed", "pair_table_distance"]
