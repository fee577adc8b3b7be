"""Recipes: functions that return a fresh configuration; ours by name, a user's own as MODULE:FUNCTION."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ddfast.config import (
    AdaptConfig,
    DD1Config,
    DD2Config,
    DigitsConvTokenizerConfig,
    DigitsLlamaGenTeacherConfig,
    DigitsVARTeacherConfig,
    EvaluationConfig,
    LlamaGenTeacherConfig,
    MatchConfig,
    PretrainedTeacherConfig,
    TextTeacherConfig,
    TextTokenizerConfig,
    TrainConfig,
    TrajectoryConfig,
    TuneConfig,
    VARTeacherConfig,
    VQTokenizerConfig,
)
from ddfast.errors import DDFastError
from ddfast.models import families
from ddfast.models.llamagen.network import LLAMAGEN_SIZES
from ddfast.models.student import second_step

PRESETS = ("ddfast", "long", "paper")
"""Whose settings a recipe distils with: the best that digits gave, within minutes or (of teachers that are trained on
first use) with more time; or the papers', literally."""


_OUR_DD1: dict[str, Any] = {"optimizer": "muon"}
"""DD1 as digits found it best: by pairs, as its paper, with Muon and small batches (docs/notes/dd1.md)."""

_PAPERS_MATCH: dict[str, Any] = {
    "optimizer": "adamw", "form": "sid", "alpha": 1.0, "prefix": "continuous", "fake_score": "velocity",
    "guidance_start": "stage1", "start_iterations": 0, "guidance_first": 0, "score_weight": 1.0, "anchor_weight": 0.0,
    "lookahead_weight": 0.0,
}  # fmt: skip
"""DD2 as its paper trains it: CSD in SiD form alone, from stage 1, on continuous prefixes."""


def digits(preset: str) -> TrainConfig:
    """The embedded default: handwritten digits on a 16x16 canvas; minutes on two CPU cores, nothing downloaded."""
    return _in_minutes(
        TrainConfig(recipe="digits", out=Path("runs/digits"), dd1=DD1Config(point=second_step(16))), preset
    )


def digits_llamagen(preset: str) -> TrainConfig:
    """The same digits by a small LlamaGen, trained on first use: its own networks, one token after the other."""
    config = TrainConfig(
        recipe="digits-llamagen",
        out=Path("runs/digits-llamagen"),
        tokenizer=DigitsConvTokenizerConfig(),
        teacher=DigitsLlamaGenTeacherConfig(),
        dd1=DD1Config(point=second_step(16)),
        dd2=DD2Config(adapt=AdaptConfig(iterations=1000, fit_iterations=500)),
    )
    return _in_minutes(config, preset)


def digits_var(preset: str) -> TrainConfig:
    """The same digits by a small VAR, trained on first use: its own networks, scale after scale."""
    config = TrainConfig(
        recipe="digits-var",
        out=Path("runs/digits-var"),
        tokenizer=DigitsConvTokenizerConfig(),
        teacher=DigitsVARTeacherConfig(),
        dd1=DD1Config(point=second_step(4)),
    )
    return _in_minutes(config, preset)


def text(preset: str) -> TrainConfig:
    """Python's language reference, character by character: a small language model, trained on first use."""
    config = TrainConfig(
        recipe="text",
        out=Path("runs/text"),
        tokenizer=TextTokenizerConfig(),
        teacher=TextTeacherConfig(),
        trajectories=TrajectoryConfig(count=40_000),
    )
    return _in_minutes(config, preset, updates=1200)


def _in_minutes(config: TrainConfig, preset: str, *, updates: int = 1900) -> TrainConfig:
    """A recipe whose teacher is trained on first use, with a preset's distillation; updates of DD1's student."""
    if preset == "paper":
        config.init = "stage1"
        match = dataclasses.replace(config.dd2.match, **_PAPERS_MATCH, guidance_updates=5)
        config.dd2 = dataclasses.replace(config.dd2, match=match)
        return config
    config.dd1 = dataclasses.replace(config.dd1, **_OUR_DD1, learning_rate=5e-3, iterations=updates, batch_size=64)
    config.dd2.match = dataclasses.replace(
        config.dd2.match,
        batch_size=64,
        start_iterations=1600,
        guidance_first=130,
        iterations=1050,
        start_learning_rate=6e-3,
        learning_rate=7e-4,
        guidance_learning_rate=3e-3,
    )
    if preset == "long":
        _lengthen(config)
    return config


def _lengthen(config: TrainConfig) -> None:
    """Students that recycle, more updates of them and of what learns with them, and more pairs."""
    dd1, dd2, match = config.dd1, config.dd2, config.dd2.match
    config.trajectories.count *= 4
    dd1.recycles, dd1.iterations = 2, 4 * dd1.iterations
    dd2.recycles = 1
    match.start_iterations *= 2
    match.guidance_first *= 2
    match.iterations *= 2


def _published(
    name: str,
    teacher: PretrainedTeacherConfig,
    tokenizer: VQTokenizerConfig,
    preset: str,
    *,
    point: int,
    split: int,
    batch: int,
    dd2: DD2Config,
) -> TrainConfig:
    """The papers' settings: DD1's 1.2 million pairs, second step's point and head's split; DD2's tables."""
    config = TrainConfig(
        recipe=name,
        init="stage1",
        out=Path("runs") / name,
        tokenizer=tokenizer,
        teacher=teacher,
        trajectories=TrajectoryConfig(count=1_200_000),
        dd1=DD1Config(
            point=point,
            split=split,
            iterations=300_000,
            batch_size=batch,
            learning_rate=2e-4,
            warmup=2000,
            ema_decay=0.9999,
            log_every=100,
            checkpoint_every=5000,
            precision="bfloat16",
        ),
        dd2=dd2,
        evaluation=EvaluationConfig(samples=5000, batch_size=64, batch_sizes=(1, 64)),
    )
    if preset == "ddfast":
        _take_ours(config)
    return config


def _take_ours(config: TrainConfig) -> None:
    """The digits' settings in place of the papers': as many updates of the student, and the papers' rate for 1e-3.

    Nobody has tried them on a teacher of this size (docs/dd2.md says what is known).
    """
    dd1, match, ours = config.dd1, config.dd2.match, MatchConfig()
    rate, updates = dd1.learning_rate / 1e-3, match.iterations + match.later_iterations
    start = round(updates * ours.start_iterations / (ours.start_iterations + ours.iterations))
    config.init = "teacher"
    config.dd1 = dataclasses.replace(dd1, **_OUR_DD1)
    config.dd2.match = dataclasses.replace(
        ours,
        **{name: getattr(match, name) for name in _KEPT},
        **match.sampling(),
        start_iterations=start,
        iterations=updates - start,
        guidance_first=start // 12,
        start_learning_rate=rate * ours.start_learning_rate,
        learning_rate=rate * ours.learning_rate,
        guidance_learning_rate=rate * ours.guidance_learning_rate,
        warmup=1000,
        guidance_warmup=1000,
    )


_KEPT = ("batch_size", "precision", "ema_decay", "log_every", "checkpoint_every", "weight_decay")
"""Of the papers' settings of the score matching, those that ours have too."""


def _published_dd2(
    *,
    tune: dict[str, Any],
    batch: int,
    rates: tuple[float, float],
    guidance_warmup: int,
    updates: tuple[int, int],
    **match: Any,
) -> DD2Config:
    """DD2 as its paper trains it.

    Source: docs/method.md section 14 (DD2: schedule and published settings).

    Args:
        tune: settings of stage 1.
        batch: of stage 2.
        rates: peaks of the guidance network's and the generator's learning rates.
        guidance_warmup: in its updates.
        updates: K, and the generator's updates before the alignment.
        match: other settings of stage 2.
    """
    per_update, iterations = updates
    shared: dict[str, Any] = {"decay": False, "weight_decay": 0.0, "log_every": 100, "checkpoint_every": 5000}
    shared["precision"] = "bfloat16"
    return DD2Config(
        head_width=1024,
        head_depth=3,
        adapt=AdaptConfig(iterations=200_000, fit_iterations=5000, batch_size=512, learning_rate=1e-4, **shared),
        tune=TuneConfig(batch_size=512, warmup=1000, draws=4, source="teacher", **{**shared, **tune}),
        match=MatchConfig(
            **_PAPERS_MATCH,
            batch_size=batch,
            guidance_learning_rate=rates[0],
            learning_rate=rates[1],
            first_learning_rate=1e-6,
            guidance_warmup=guidance_warmup,
            warmup=guidance_warmup // per_update,
            guidance_updates=per_update,
            iterations=iterations,
            draws=4,
            ema_decay=0.9999,
            **shared,
            **match,
        ),
    )


def _var(depth: int, preset: str, point: int, dd2: DD2Config) -> TrainConfig:
    teacher, tokenizer = VARTeacherConfig(depth=depth), VQTokenizerConfig()
    return _published(f"var-d{depth}", teacher, tokenizer, preset, point=point, split=point, batch=512, dd2=dd2)


def _var_tuning(head_iterations: int) -> dict[str, Any]:
    """Stage 1 of the VAR recipes: the head alone, then 30k iterations of everything; no top-p."""
    return {
        "learning_rate": 2e-4, "head_iterations": head_iterations, "iterations": head_iterations + 30_000, "top_p": 1.0,
    }  # fmt: skip


def var_d16(preset: str) -> TrainConfig:
    """VAR-d16, ImageNet 256 x 256."""
    dd2 = _published_dd2(
        tune=_var_tuning(300_000),
        batch=512,
        rates=(2e-4, 2e-4),
        guidance_warmup=40_000,
        updates=(5, 8000),
        align_iterations=8000,
        later_iterations=7500,
    )
    return _var(16, preset, 5, dd2)


def var_d20(preset: str) -> TrainConfig:
    """VAR-d20, ImageNet 256 x 256."""
    dd2 = _published_dd2(
        tune=_var_tuning(300_000),
        batch=512,
        rates=(2e-4, 2e-4),
        guidance_warmup=40_000,
        updates=(5, 16_000),
        align_iterations=8000,
        later_iterations=18_000,
    )
    return _var(20, preset, 4, dd2)


def var_d24(preset: str) -> TrainConfig:
    """VAR-d24, ImageNet 256 x 256."""
    dd2 = _published_dd2(
        tune=_var_tuning(200_000), batch=1024, rates=(4e-4, 5e-5), guidance_warmup=20_000, updates=(2, 15_000)
    )
    return _var(24, preset, 4, dd2)


def _llamagen(name: str, size: str, preset: str, split: int, **options: Any) -> TrainConfig:
    sizes = LLAMAGEN_SIZES[size]
    teacher = LlamaGenTeacherConfig(dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, **options)
    tokenizer = VQTokenizerConfig(num_codes=16384, code_dim=8, channels=128, latent_channels=256)
    dd2 = _published_dd2(
        tune={"learning_rate": 1e-4, "iterations": 100_000},
        batch=1024,
        rates=(2e-4, 1e-4),
        guidance_warmup=40_000,
        updates=(5, 12_000),
        top_k=900,
    )
    return _published(name, teacher, tokenizer, preset, point=80, split=split, batch=512, dd2=dd2)


def llamagen_b(preset: str) -> TrainConfig:
    """LlamaGen-B, ImageNet 256 x 256."""
    return _llamagen("llamagen-b", "B", preset, 80)


def llamagen_l(preset: str) -> TrainConfig:
    """LlamaGen-L, ImageNet 256 x 256."""
    return _llamagen("llamagen-l", "L", preset, 130)


def llamagen_xl_t2i(preset: str) -> TrainConfig:
    """LlamaGen-XL, text to image at 256 x 256."""
    text = {"model_type": "t2i", "cls_token_num": 120, "cfg_scale": 7.5, "top_k": 1000}
    return _llamagen("llamagen-xl-t2i", "XL", preset, 130, **text)


_ON_FIRST_USE: dict[str, Callable[[str], TrainConfig]] = {
    "digits": digits,
    "digits-llamagen": digits_llamagen,
    "digits-var": digits_var,
    "text": text,
}
"""Recipes whose teacher is trained on first use."""

RECIPES = _ON_FIRST_USE | {
    "var-d16": var_d16,
    "var-d20": var_d20,
    "var-d24": var_d24,
    "llamagen-b": llamagen_b,
    "llamagen-l": llamagen_l,
    "llamagen-xl-t2i": llamagen_xl_t2i,
}


def get_recipe(name: str, *, preset: str = "", told: Path | None = None) -> TrainConfig:
    """A fresh configuration of the recipe `name`, or of a user's own, "MODULE:FUNCTION", whose module is imported.

    Args:
        name: of the recipe.
        preset: one of `PRESETS`; empty: ddfast where that was measured (teachers that are trained on first use), else
            paper. A user's own has none.
        told: the file that names it, if it is not the user: a file does not decide what is imported.

    Raises:
        DDFastError: there is no such recipe or preset; or its module is not to be imported, cannot be, or does not hold
            it.
    """
    if not isinstance(name, str):
        raise DDFastError(f"recipe: got {name!r}, expected a name")
    if preset not in ("", *PRESETS):
        raise DDFastError(f"--preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
    if ":" in name:
        if preset:
            raise DDFastError(f"--preset {preset}: has no effect on a recipe of your own, {name}")
        module = name.partition(":")[0]
        if told is not None and module not in _trusted():
            why = f"it was made with a recipe of the module {module}, whose code a file does not start"
            raise DDFastError(f"{told}: {why}; if you trust it, give --import {module}")
        return _users_own(name)
    if name not in RECIPES:
        own = "or one of your own, MODULE:FUNCTION"
        raise DDFastError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}, {own}")
    in_minutes = name in _ON_FIRST_USE
    if preset == "long" and not in_minutes:
        raise DDFastError(f"--preset long: is one of {', '.join(_ON_FIRST_USE)}; of {name}, ddfast or paper")
    preset = preset or ("ddfast" if in_minutes else "paper")
    config = RECIPES[name](preset)
    config.preset = preset
    return config


_IMPORTED: set[str] = set()
"""Modules that the user asked for."""


def _trusted() -> set[str]:
    """Modules whose functions a file may name: those that the user imported, by option or to register a family."""
    return _IMPORTED | {type(family).__module__ for family in families.registered()}


def _users_own(name: str) -> TrainConfig:
    module, _, function = name.partition(":")
    recipe = import_users(module)
    try:
        made = getattr(recipe, function)()
    except Exception as error:  # whatever the user's function raises
        raise DDFastError(f"recipe {name!r}: {type(error).__name__}: {error}") from error
    if not isinstance(made, TrainConfig):
        raise DDFastError(f"recipe {name!r} returns a {type(made).__name__}, expected a ddfast.config.TrainConfig")
    made.recipe = name
    return made


def import_users(module: str) -> ModuleType:
    """Import a module of the user's, found as `python -m` finds it: in the current folder too.

    Raises:
        DDFastError: there is none, or it fails.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = importlib.import_module(module)
        _IMPORTED.add(module)
        return made
    except Exception as error:  # whatever the user's module raises
        raise DDFastError(f"cannot import {module}: {type(error).__name__}: {error}") from error
