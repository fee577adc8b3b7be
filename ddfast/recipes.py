"""Recipes: functions that return a fresh configuration, and the teacher that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ddfast.config import TrainConfig
from ddfast.errors import DDFastError
from ddfast.models.digits import Progress, load_or_train, untrained_digits_teacher
from ddfast.models.protocol import Teacher


def digits() -> TrainConfig:
    """The embedded default: handwritten digits on a 16x16 canvas; minutes on two CPU cores, nothing downloaded."""
    return TrainConfig(recipe="digits", out=Path("runs/digits"))


RECIPES: dict[str, Callable[[], TrainConfig]] = {"digits": digits}


def get_recipe(name: str) -> TrainConfig:
    """A fresh configuration of the recipe `name`; an unknown name raises a `DDFastError` that lists the known ones."""
    if name not in RECIPES:
        raise DDFastError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


def build_teacher(config: TrainConfig, progress: Progress | None = None) -> Teacher:
    """The recipe's teacher: cached, or trained on first use."""
    get_recipe(config.recipe)
    return load_or_train(config, progress)


def untrained_teacher(config: TrainConfig) -> Teacher:
    """The recipe's teacher with random weights, for profiling."""
    get_recipe(config.recipe)
    return untrained_digits_teacher(config.tokenizer, config.teacher)
