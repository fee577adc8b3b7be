"""Recipes: functions that return a fresh configuration, and the teacher that goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast import seeds
from ddfast.config import (
    AdaptConfig,
    DD1Config,
    DD2Config,
    DigitsTeacherConfig,
    DigitsTokenizerConfig,
    EvaluationConfig,
    LlamaGenTeacherConfig,
    MatchConfig,
    PretrainedTeacherConfig,
    TrainConfig,
    TrajectoryConfig,
    TuneConfig,
    VARTeacherConfig,
    VQTokenizerConfig,
)
from ddfast.errors import DDFastError
from ddfast.models.captions import encode_captions, random_captions, read_captions
from ddfast.models.digits import Progress, load_or_train, untrained_digits_teacher
from ddfast.models.llamagen import LLAMAGEN_SIZES, LlamaGenSizes, LlamaGenTeacher
from ddfast.models.loading import load_teacher
from ddfast.models.protocol import SamplingDefaults, Teacher
from ddfast.models.tokenizers import LlamaGenTokenizer, VARTokenizer
from ddfast.models.var import VARSizes, VARTeacher
from ddfast.models.vqgan import ConvSizes


def digits() -> TrainConfig:
    """The embedded default: handwritten digits on a 16x16 canvas; minutes on two CPU cores, nothing downloaded."""
    return TrainConfig(recipe="digits", out=Path("runs/digits"))


def _published(
    name: str,
    teacher: PretrainedTeacherConfig,
    tokenizer: VQTokenizerConfig,
    *,
    point: int,
    split: int,
    batch: int,
    dd2: DD2Config,
) -> TrainConfig:
    """The papers' settings: DD1's 1.2 million pairs, second step's point and head's split; DD2's tables."""
    return TrainConfig(
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


def _published_dd2(
    *,
    tune: dict[str, Any],
    batch: int,
    rates: tuple[float, float],
    guidance_warmup: int,
    updates: tuple[int, int],
    **match: Any,
) -> DD2Config:
    """DD2 as its paper trains it: CSD in SiD form alone, from stage 1, on continuous prefixes.

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
            optimizer="adamw",
            form="sid",
            alpha=1.0,
            prefix="continuous",
            fake_score="velocity",
            guidance_start="stage1",
            batch_size=batch,
            guidance_learning_rate=rates[0],
            learning_rate=rates[1],
            first_learning_rate=1e-6,
            guidance_warmup=guidance_warmup,
            warmup=guidance_warmup // per_update,
            guidance_updates=per_update,
            iterations=iterations,
            start_iterations=0,
            guidance_first=0,
            score_weight=1.0,
            anchor_weight=0.0,
            lookahead_weight=0.0,
            draws=4,
            ema_decay=0.9999,
            **shared,
            **match,
        ),
    )


def _var(depth: int, point: int, dd2: DD2Config) -> TrainConfig:
    teacher = VARTeacherConfig(depth=depth)
    return _published(f"var-d{depth}", teacher, VQTokenizerConfig(), point=point, split=point, batch=512, dd2=dd2)


def _var_tuning(head_iterations: int) -> dict[str, Any]:
    """Stage 1 of the VAR recipes: the head alone, then 30k iterations of everything; no top-p."""
    return {
        "learning_rate": 2e-4, "head_iterations": head_iterations, "iterations": head_iterations + 30_000, "top_p": 1.0,
    }  # fmt: skip


def var_d16() -> TrainConfig:
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
    return _var(16, 5, dd2)


def var_d20() -> TrainConfig:
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
    return _var(20, 4, dd2)


def var_d24() -> TrainConfig:
    """VAR-d24, ImageNet 256 x 256."""
    dd2 = _published_dd2(
        tune=_var_tuning(200_000), batch=1024, rates=(4e-4, 5e-5), guidance_warmup=20_000, updates=(2, 15_000)
    )
    return _var(24, 4, dd2)


def _llamagen(name: str, size: str, split: int, **options: Any) -> TrainConfig:
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
    return _published(name, teacher, tokenizer, point=80, split=split, batch=512, dd2=dd2)


def llamagen_b() -> TrainConfig:
    """LlamaGen-B, ImageNet 256 x 256."""
    return _llamagen("llamagen-b", "B", 80)


def llamagen_l() -> TrainConfig:
    """LlamaGen-L, ImageNet 256 x 256."""
    return _llamagen("llamagen-l", "L", 130)


def llamagen_xl_t2i() -> TrainConfig:
    """LlamaGen-XL, text to image at 256 x 256."""
    text = {"model_type": "t2i", "cls_token_num": 120, "cfg_scale": 7.5, "top_k": 1000}
    return _llamagen("llamagen-xl-t2i", "XL", 130, **text)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "digits": digits,
    "var-d16": var_d16,
    "var-d20": var_d20,
    "var-d24": var_d24,
    "llamagen-b": llamagen_b,
    "llamagen-l": llamagen_l,
    "llamagen-xl-t2i": llamagen_xl_t2i,
}


def get_recipe(name: str) -> TrainConfig:
    """A fresh configuration of the recipe `name`; an unknown name raises a `DDFastError` that lists the known ones."""
    if name not in RECIPES:
        raise DDFastError(f"unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]()


def build_teacher(config: TrainConfig, progress: Progress | None = None) -> Teacher:
    """The configuration's teacher, on its device: trained on first use (digits), read from files, or random.

    Raises:
        DDFastError: a file is missing, unsafe or of other sizes than the configuration's.
    """
    teacher = config.teacher
    if isinstance(teacher, DigitsTeacherConfig):
        return load_or_train(config, progress)
    assert isinstance(teacher, PretrainedTeacherConfig)
    if teacher.random_weights:
        return untrained_teacher(config).to(config.device)
    if not teacher.weights:
        raise DDFastError(
            f"recipe {config.recipe} needs its teacher's files: --teacher.weights FILE --tokenizer.weights FILE "
            "(or --teacher.random-weights to try it out)"
        )
    assert isinstance(config.tokenizer, VQTokenizerConfig)
    sizes = _var_sizes(teacher) if isinstance(teacher, VARTeacherConfig) else _llamagen_sizes(teacher)
    unsaid = ("mlp_ratio", "norm_eps", "rope_base", "token_num")
    given = {name: value for name, value in vars(sizes).items() if name not in unsaid}
    if isinstance(teacher, VARTeacherConfig):
        given["patch_nums"] = tuple(teacher.patch_nums)
        if not teacher.attn_l2_norm:
            del given["num_heads"]
    elif given["model_type"] == "t2i":
        del given["num_classes"]
    else:
        del given["caption_dim"]
    loaded = load_teacher(
        teacher.weights,
        config.tokenizer.weights or None,
        dtype=getattr(torch, teacher.dtype),
        defaults=_defaults(teacher),
        **given,
    )
    return _with_captions(loaded, teacher).to(config.device)


def untrained_teacher(config: TrainConfig) -> Teacher:
    """The configuration's teacher with random weights drawn from its seed, for tests and profiling."""
    teacher, tokenizer = config.teacher, config.tokenizer
    seeds.seed_all(config.seed)
    if isinstance(teacher, DigitsTeacherConfig):
        assert isinstance(tokenizer, DigitsTokenizerConfig)
        return untrained_digits_teacher(tokenizer, teacher)
    assert isinstance(tokenizer, VQTokenizerConfig)
    num_codes, code_dim = tokenizer.num_codes, tokenizer.code_dim
    var = isinstance(teacher, VARTeacherConfig)
    sizes = ConvSizes(
        channels=tokenizer.channels,
        multipliers=tuple(tokenizer.multipliers),
        blocks=tokenizer.blocks,
        latent_channels=tokenizer.code_dim if var else tokenizer.latent_channels,
    )
    made: Teacher
    if isinstance(teacher, VARTeacherConfig):
        vq = VARTokenizer(patch_nums=tuple(teacher.patch_nums), sizes=sizes, num_codes=num_codes, code_dim=code_dim)
        made = VARTeacher(vq, _var_sizes(teacher), defaults=_defaults(teacher))
    else:
        assert isinstance(teacher, LlamaGenTeacherConfig)
        flat = LlamaGenTokenizer(sizes=sizes, num_codes=num_codes, code_dim=code_dim)
        made = LlamaGenTeacher(flat, _llamagen_sizes(teacher), defaults=_defaults(teacher))
    assert isinstance(teacher, PretrainedTeacherConfig)
    for name, parameter in made.named_parameters():
        if not name.startswith("tokenizer."):
            parameter.data = parameter.data.to(getattr(torch, teacher.dtype))
    return _with_captions(made, teacher).eval().requires_grad_(False)


def _defaults(teacher: PretrainedTeacherConfig) -> SamplingDefaults:
    names = [field.name for field in dataclasses.fields(SamplingDefaults)]
    return SamplingDefaults(**{name: getattr(teacher, name) for name in names})


def _var_sizes(teacher: VARTeacherConfig) -> VARSizes:
    return VARSizes(
        num_classes=teacher.num_classes,
        depth=teacher.depth,
        embed_dim=64 * teacher.depth,
        num_heads=teacher.depth,
        shared_aln=teacher.shared_aln,
        attn_l2_norm=teacher.attn_l2_norm,
    )


def _llamagen_sizes(teacher: PretrainedTeacherConfig) -> LlamaGenSizes:
    assert isinstance(teacher, LlamaGenTeacherConfig)
    return LlamaGenSizes(
        dim=teacher.dim,
        n_layer=teacher.n_layer,
        n_head=teacher.n_head,
        n_kv_head=teacher.n_kv_head or teacher.n_head,
        ffn_dim=teacher.ffn_dim or 256 * -(-int(8 * teacher.dim / 3) // 256),
        block_size=teacher.block_size,
        model_type=teacher.model_type,
        num_classes=teacher.num_classes,
        cls_token_num=teacher.cls_token_num,
        caption_dim=teacher.caption_dim,
    )


def _with_captions(made: Teacher, teacher: PretrainedTeacherConfig) -> Teacher:
    """A text teacher with the captions that its training pairs cycle through."""
    if isinstance(teacher, LlamaGenTeacherConfig) and teacher.model_type == "t2i":
        assert isinstance(made, LlamaGenTeacher)
        if teacher.captions:
            give_captions(made, Path(teacher.captions))
        elif teacher.random_weights or not teacher.weights:
            made.captions = random_captions(8, teacher.cls_token_num, teacher.caption_dim)
        else:
            raise DDFastError("a text teacher needs --teacher.captions FILE: features made by `encode_captions`")
    return made


def give_captions(teacher: Teacher, captions: Path | Sequence[str], **encoding: Any) -> None:
    """Set the captions that the samples of a text teacher cycle through; arguments and errors as of `captions_for`."""
    made = captions_for(teacher, captions, **encoding)
    assert isinstance(teacher, LlamaGenTeacher)
    teacher.captions = made


def captions_for(
    teacher: Teacher, captions: Path | Sequence[str], *, encoder: str = "", device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Features [M, C, dim] and mask [M, C] of captions for a text teacher.

    Args:
        teacher: a text-conditional one.
        captions: a file of features or of lines of text, or texts.
        encoder: name or folder of the T5 that encodes texts; empty: the one that LlamaGen was trained with.
        device: where it runs.

    Raises:
        DDFastError: the teacher takes class labels, a file cannot be read, the encoder is not there, or the features
            are not this teacher's.
    """
    if not isinstance(teacher, LlamaGenTeacher) or teacher.num_classes:
        expected = f"class labels, 0..{teacher.num_classes - 1}"
        raise DDFastError(f"captions: have no effect: this {type(teacher).__name__} is conditioned on {expected}")
    encoding: dict[str, Any] = {"length": teacher.sizes.cls_token_num, "device": device}
    if encoder:
        encoding["model"] = encoder
    if isinstance(captions, Path):
        made = read_captions(captions, **encoding)
    else:
        made = encode_captions([captions] if isinstance(captions, str) else list(captions), **encoding)
    try:
        teacher.check_condition(made)
    except (TypeError, ValueError) as error:
        source = captions if isinstance(captions, Path) else "captions"
        raise DDFastError(f"{source}: {str(error).removeprefix('condition: ')}") from error
    return made
