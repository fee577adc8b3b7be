"""Quality and speed of samples."""

from ddfast.evaluation.quality import Evaluator, frechet_distance, pair_table_distance
from ddfast.evaluation.speed import measure_speed

__all__ = ["Evaluator", "frechet_distance", "measure_speed", "pair_table_distance"]
