"""Configuration of every stage: keyword-only dataclasses that validate themselves.

Recipes (`ddfast.recipes`) are functions that return a fresh `TrainConfig`; commands expose every field as an override.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ddfast.errors import DDFastError, first_line
from ddfast.files import read_text
from ddfast.seeds import check_seed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


DTYPES = ("float32", "bfloat16", "float16")

OPTIMIZERS = ("adamw", "muon")

DD1_PREFIX = "dd1:"
"""Of an `init` that names a DD1 run's folder."""

FILES = ("weights", "captions", "lpips_vgg", "lpips_linear")
"""Settings, of whichever table, that name a file."""


class SettingError(ValueError):
    """A setting that is out of range; the message names it."""


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise SettingError(f"{name}: got {value!r}, expected {expected}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(getattr(config, name) > 0, name, getattr(config, name), "a positive number")


def _require_optimizer(name: str) -> None:
    _require(name in OPTIMIZERS, "optimizer", name, " or ".join(OPTIMIZERS))


def _require_rising(patch_nums: tuple[int, ...]) -> None:
    rising = list(patch_nums) == sorted(set(patch_nums)) and patch_nums[:1] > (0,)
    _require(rising, "patch_nums", patch_nums, "rising positive sides")


def _require_lpips(config: DD1Config | EvaluationConfig) -> None:
    both = bool(config.lpips_vgg) == bool(config.lpips_linear)
    expected = "both of LPIPS's files, lpips_vgg and lpips_linear, or neither"
    _require(both, "lpips_linear", config.lpips_linear, expected)


TRACKERS = ("tensorboard", "wandb")
"""What may get a training's figures beside metrics.jsonl."""


def trackers(text: str) -> tuple[str, ...]:
    """The names in "tensorboard,wandb", each once; empty: none."""
    names = tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    _require(set(names) <= set(TRACKERS), "track", text, f"{' or '.join(TRACKERS)}, or both with a comma between")
    return names


def profiled_steps(text: str) -> range:
    """The steps of "FIRST:END", END not among them; empty: none."""
    numbers = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(numbers[1]), int(numbers[2])) if numbers else range(0)
    expected = "FIRST:END with 1 <= FIRST < END: 10:13 is steps 10, 11 and 12 (step 0 is the first)"
    _require(not text or (len(steps) > 0 and steps.start >= 1), "profile_steps", text, expected)
    return steps


@dataclass(kw_only=True)
class TokenizerConfig:
    """What every tokenizer has.

    Attributes:
        num_codes: V, codes in the codebook.
        code_dim: d, dimension of a code.
    """

    num_codes: int = 64
    code_dim: int = 4

    def __post_init__(self) -> None:
        _require(self.num_codes >= 2, "num_codes", self.num_codes, "at least 2")
        _require_positive(self, "code_dim")


@dataclass(kw_only=True)
class DigitsTokenizerConfig(TokenizerConfig):
    """VQ tokenizer of the digits recipe, trained on first use.

    Attributes:
        width: channels of its networks.
        iterations: training steps.
        warmup: steps as a plain autoencoder, before the codebook is drawn from its latents.
        batch_size: images per step.
        learning_rate: peak, of AdamW.
    """

    width: int = 48
    iterations: int = 800
    warmup: int = 100
    batch_size: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "width", "iterations", "batch_size", "learning_rate")


@dataclass(kw_only=True)
class DigitsConvTokenizerConfig(DigitsTokenizerConfig):
    """VAR's or LlamaGen's tokenizer, small and trained on the digits on first use.

    Attributes:
        levels: of its encoder and decoder, all of `width` channels; each but the last halves the canvas of 16 pixels.
        blocks: residual blocks per level.
    """

    width: int = 32
    levels: int = 3
    blocks: int = 1
    iterations: int = 1200
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "blocks")
        _require(self.width % 32 == 0, "width", self.width, "a multiple of 32, the groups of GroupNorm")
        _require(1 <= self.levels <= 5, "levels", self.levels, "in 1..5: the canvas has 16 pixels")


@dataclass(kw_only=True)
class VQTokenizerConfig(TokenizerConfig):
    """VAR's or LlamaGen's tokenizer. The sizes are those of random weights; a file brings its own.

    Attributes:
        weights: its checkpoint; empty: none (or the teacher's file holds it).
        channels: of the finest level.
        multipliers: width of every level in units of `channels`, finest first.
        blocks: residual blocks per level.
        latent_channels: between encoder and codebook.
    """

    num_codes: int = 4096
    code_dim: int = 32
    weights: str = ""
    channels: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent_channels: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "channels", "blocks", "latent_channels")
        _require(self.channels % 32 == 0, "channels", self.channels, "a multiple of 32, the groups of GroupNorm")


@dataclass(kw_only=True)
class SamplingSettings:
    """How a teacher is sampled; None: the teacher's own setting.

    Attributes:
        cfg_scale: classifier-free guidance, in the teacher's own sense (VAR: 0 is off; others: 1).
        temperature: of the softmax.
        top_k: codes kept; 0 is off.
        top_p: probability mass kept; 1 is off.
    """

    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def sampling(self) -> dict[str, Any]:
        """The settings that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingSettings)}
        return {name: value for name, value in values.items() if value is not None}


_UNSAID = {"cfg_scale": -1.0, "top_k": -1, "top_p": -1.0}
"""What stood for None in these settings before: a training that was interrupted then goes on."""


@dataclass(kw_only=True)
class TargetConfig(SamplingSettings):
    """Whose distribution a stage learns: the teacher's, with settings of its own or with others.

    As files of before hold it, a negative number is None.
    """

    def __post_init__(self) -> None:
        for name in _UNSAID:
            value = getattr(self, name)
            if value is not None and value < 0:
                setattr(self, name, None)
        positive = self.temperature is None or self.temperature >= 0
        _require(positive, "temperature", self.temperature, "at least 0")


@dataclass(kw_only=True)
class TeacherConfig(SamplingSettings):
    """What every AR teacher has: the sampling settings that distillation reproduces."""

    cfg_scale: float = 1.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(kw_only=True)
class TrainedTeacherConfig(TeacherConfig):
    """A small AR transformer that is trained on first use.

    Attributes:
        width: of the transformer.
        depth: its blocks.
        heads: attention heads.
        iterations: training steps.
        batch_size: sequences per step.
        optimizer: adamw or muon, as of `OptimisationConfig`.
        learning_rate: peak.
        weight_decay: decoupled from the gradient.
    """

    width: int = 96
    depth: int = 4
    heads: int = 4
    iterations: int = 450
    batch_size: int = 128
    optimizer: str = "muon"
    learning_rate: float = 7e-3
    weight_decay: float = 0.02

    def __post_init__(self) -> None:
        _require_positive(self, "width", "depth", "heads", "iterations", "batch_size", "learning_rate")
        _require(self.width % self.heads == 0, "width", self.width, f"a multiple of heads={self.heads}")
        _require_optimizer(self.optimizer)


@dataclass(kw_only=True)
class DigitsTeacherConfig(TrainedTeacherConfig):
    """AR transformer of the digits recipe.

    Attributes:
        class_dropout: share of training sequences without their label, for guidance.
        training_images: rendered digits that it is trained on.
    """

    class_dropout: float = 0.1
    training_images: int = 60_000

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "training_images")


@dataclass(kw_only=True)
class DigitsLlamaGenTeacherConfig(DigitsTeacherConfig):
    """A small LlamaGen, trained on the digits on first use; one token per latent of its tokenizer."""

    training_images: int = 30_000
    iterations: int = 1200
    optimizer: str = "adamw"
    learning_rate: float = 2e-3


@dataclass(kw_only=True)
class DigitsVARTeacherConfig(DigitsTeacherConfig):
    """A small VAR, trained on the digits on first use.

    Attributes:
        patch_nums: side of every scale, the last one that of the tokenizer's latents.
    """

    cfg_scale: float = 0.75
    training_images: int = 30_000
    iterations: int = 1200
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    patch_nums: tuple[int, ...] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_rising(self.patch_nums)


@dataclass(kw_only=True)
class TextTokenizerConfig(TokenizerConfig):
    """Characters: the codebook of the text recipe, which learns with its teacher.

    `num_codes` is 96: what ASCII can print, and the end of a line.
    """

    num_codes: int = 96
    code_dim: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.num_codes == 96, "num_codes", self.num_codes, "96, the characters of ASCII that can be printed")


@dataclass(kw_only=True)
class TextTeacherConfig(TrainedTeacherConfig):
    """AR transformer of the text recipe.

    Attributes:
        num_tokens: n, characters of a sample.
    """

    cfg_scale: float = 1.0
    num_tokens: int = 32
    iterations: int = 1000
    batch_size: int = 64
    learning_rate: float = 1.2e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.cfg_scale == 1.0, "cfg_scale", self.cfg_scale, "1: text has no condition to guide it by")
        _require(self.num_tokens >= 2, "num_tokens", self.num_tokens, "at least 2")


@dataclass(kw_only=True)
class PretrainedTeacherConfig(TeacherConfig):
    """A teacher from a checkpoint, or of random weights.

    Attributes:
        weights: its official checkpoint, or a folder or file that `ddfast convert` wrote.
        random_weights: draw the weights instead, to test or to profile.
        dtype: of the transformer's weights: float32, bfloat16 or float16.
    """

    weights: str = ""
    random_weights: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")


@dataclass(kw_only=True)
class VARTeacherConfig(PretrainedTeacherConfig):
    """A VAR teacher; a checkpoint of other sizes is refused.

    Attributes:
        num_classes: of labels.
        depth: blocks; width is 64 and heads are 1 per block.
        patch_nums: side of every scale.
        shared_aln: one modulation layer for all blocks.
        attn_l2_norm: attention on normalised queries and keys.
    """

    cfg_scale: float = 2.0
    top_k: int = 900
    top_p: float = 0.95
    num_classes: int = 1000
    depth: int = 16
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    shared_aln: bool = False
    attn_l2_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "num_classes", "depth")
        _require_rising(self.patch_nums)


@dataclass(kw_only=True)
class LlamaGenTeacherConfig(PretrainedTeacherConfig):
    """A LlamaGen teacher; a checkpoint of other sizes is refused.

    Attributes:
        dim: width.
        n_layer: blocks.
        n_head: query heads.
        n_kv_head: key and value heads; 0: as many as query heads.
        ffn_dim: width of the feed-forward layers; 0: the official rule.
        block_size: image tokens: 256 for 256 pixels, 576 for 384, 1024 for 512.
        model_type: c2i (class labels) or t2i (captions).
        num_classes: of labels.
        cls_token_num: condition tokens.
        caption_dim: of caption features.
        captions: safetensors file with the features that training pairs cycle through (t2i; docs/teachers.md).
    """

    cfg_scale: float = 2.0
    top_k: int = 8000
    dim: int = 1024
    n_layer: int = 24
    n_head: int = 16
    n_kv_head: int = 0
    ffn_dim: int = 0
    block_size: int = 256
    model_type: str = "c2i"
    num_classes: int = 1000
    cls_token_num: int = 1
    caption_dim: int = 2048
    captions: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self, "dim", "n_layer", "n_head", "block_size", "num_classes", "cls_token_num", "caption_dim")
        _require(self.model_type in ("c2i", "t2i"), "model_type", self.model_type, "c2i or t2i")
        fitting = not self.captions or self.model_type == "t2i"
        _require(fitting, "captions", self.captions, "none: model_type c2i is conditioned on class labels")


@dataclass(kw_only=True)
class TrajectoryConfig:
    """DD1 pairs: how many, how they are integrated, how they are stored.

    Attributes:
        count: pairs.
        shard_size: pairs per file.
        batch_size: pairs decoded at a time, at most a file's; 0: as many as free memory holds.
        steps: intervals of the flow's grid.
        solver: dpm3m, dpm2m, heun or euler.
        store_noise: store the noise too, which is otherwise regenerated.
    """

    count: int = 20_000
    shard_size: int = 1000
    batch_size: int = 0
    steps: int = 20
    solver: str = "dpm3m"
    store_noise: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, "count", "shard_size", "steps")
        _require(self.batch_size >= 0, "batch_size", self.batch_size, "a positive number, or 0 for what memory holds")


@dataclass(kw_only=True)
class ParallelConfig:
    """How the work is shared: what is learnt does not depend on it.

    Attributes:
        strategy: replicate (every process holds all of the networks), shard (the processes of a node hold a part each
            of networks, optimizers and averages), or auto: replicate where memory suffices.
        micro_batch: samples of a process that go through a network at a time; 0: what memory holds.
        recompute: blocks (keep a block's input alone, and compute the rest again in the backward pass), none, or auto:
            blocks where memory holds too few samples without.
        timeout: seconds without a sign of life after which the others give a process up. It prints where it stands and
            ends at 1.1 times as many and 2 s; the others a second after that, at most 6, and say which it was.
    """

    strategy: str = "auto"
    micro_batch: int = 0
    recompute: str = "auto"
    timeout: float = 600.0

    def __post_init__(self) -> None:
        strategies, ways = ("auto", "replicate", "shard"), ("auto", "none", "blocks")
        _require(self.strategy in strategies, "strategy", self.strategy, "auto, replicate or shard")
        _require(self.recompute in ways, "recompute", self.recompute, "auto, none or blocks")
        expected = "a positive number, or 0 for what memory holds"
        _require(self.micro_batch >= 0, "micro_batch", self.micro_batch, expected)
        _require_positive(self, "timeout")


@dataclass(kw_only=True)
class OptimisationConfig:
    """What every training stage has.

    Attributes:
        iterations: training steps.
        batch_size: sequences per step.
        optimizer: adamw; or muon, which orthogonalises the updates of the linear layers' weights and leaves the rest to
            AdamW.
        learning_rate: peak.
        warmup: steps of linear warm-up.
        decay: let the rate fall to 0 by a cosine after the warm-up; without: it stays.
        weight_decay: decoupled from the gradient.
        precision: of the forward and backward pass: float32, or bfloat16 by autocast.
        gradient_clip: largest norm of the gradient.
        log_every: steps between lines of metrics.jsonl.
        checkpoint_every: steps between checkpoints.
    """

    iterations: int = 3000
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 100
    decay: bool = True
    weight_decay: float = 0.01
    precision: str = "float32"
    gradient_clip: float = 1.0
    log_every: int = 50
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        _require_positive(
            self, "iterations", "batch_size", "learning_rate", "gradient_clip", "log_every", "checkpoint_every"
        )
        _require_optimizer(self.optimizer)
        _require(self.precision in DTYPES[:2], "precision", self.precision, f"one of {', '.join(DTYPES[:2])}")


class MethodConfig:
    """Settings of one method: of a `TrainConfig`, those of the others have no effect."""


@dataclass(kw_only=True)
class DD1Config(OptimisationConfig, MethodConfig):
    """DD1 distillation.

    Attributes:
        point: t1, the trajectory point beside 0 that is trained, and where the second step starts; None: behind the
            first quarter of the teacher's groups (docs/notes/points.md).
        later_points: further points, rising, from which a third step and others start.
        point_probability: share of sequences that start from one of these points, each as likely as the others.
        recycles: how often the student's network is run again within a pass, reading the codes it made before.
        own_share: of the iterations, the last ones, in which a token's target is the code that the teacher's flow,
            given the student's own earlier codes, takes its noise to: from fresh noise. In those before it is that of a
            stored trajectory; with 1 there are none.
        lookahead_weight: in these last ones, of the cross-entropy between the teacher's distribution of the next token
            and what a layer that is left behind reads off the student's features; teachers of one token per group.
        ema_decay: of the averaged weights that are sampled from.
        embedding_weight: weight of the continuous head's distance beside the cross-entropy: LPIPS of the decoded images
            where its weights are given, else L1 of the embeddings.
        split: group from which the student's samples are the continuous head's, not the most likely code's; -1: none.
        lpips_vgg: torchvision's VGG16 weights, for LPIPS; empty: no LPIPS.
        lpips_linear: the lpips package's vgg.pth.
    """

    point: int | None = None
    later_points: tuple[int, ...] = ()
    point_probability: float = 0.3
    recycles: int = 0
    own_share: float = 0.0
    lookahead_weight: float = 0.0
    ema_decay: float = 0.999
    embedding_weight: float = 1.0
    split: int = -1
    lpips_vgg: str = ""
    lpips_linear: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.point is None or self.point > 0, "point", self.point, "a positive number")
        points = (self.point or 0, *self.later_points)
        rising = list(points) == sorted(set(points))
        _require(rising, "later_points", self.later_points, f"rising trajectory points after point={self.point}")
        _require(0.0 <= self.point_probability <= 1.0, "point_probability", self.point_probability, "in [0, 1]")
        _require(self.recycles >= 0, "recycles", self.recycles, "0 or more runs after the first")
        _require(0.0 <= self.own_share <= 1.0, "own_share", self.own_share, "in [0, 1]")
        fits = self.lookahead_weight == 0.0 or (self.lookahead_weight > 0.0 and self.own_share > 0.0)
        _require(fits, "lookahead_weight", self.lookahead_weight, "0 or more, and 0 with own_share 0")
        _require(self.split >= -1, "split", self.split, "a group, or -1 for none")
        _require_lpips(self)

    @property
    def pair_iterations(self) -> int:
        """The first of the iterations, which learn from stored trajectories."""
        return self.iterations - round(self.own_share * self.iterations)


@dataclass(kw_only=True)
class AdaptConfig(OptimisationConfig):
    """DD2's stage 0, for teachers that look their tokens up (LlamaGen): an MLP on R^d in the table's place.

    Attributes:
        fit_iterations: the first of the iterations, which fit the table alone; the others train everything by the
            teacher's loss on its own samples.
    """

    fit_iterations: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = 0 < self.fit_iterations <= self.iterations
        _require(inside, "fit_iterations", self.fit_iterations, f"in 1..{self.iterations}, the stage's iterations")


@dataclass(kw_only=True)
class TuneConfig(OptimisationConfig, TargetConfig):
    """DD2's stage 1: the teacher's backbone learns the velocity of its next token's flow.

    Attributes:
        head_iterations: the first of the iterations, which train the velocity head alone.
        draws: noisy versions of every token per step (m).
        loss: gts (the teacher's closed-form velocity) or monte_carlo (noise minus token).
        source: teacher (sequences sampled on the fly) or store (those of the run's trajectories).
    """

    iterations: int = 400
    learning_rate: float = 1.5e-3
    head_iterations: int = 0
    draws: int = 2
    loss: str = "gts"
    source: str = "store"

    def __post_init__(self) -> None:
        OptimisationConfig.__post_init__(self)
        TargetConfig.__post_init__(self)
        _require_positive(self, "draws")
        _require(self.loss in ("gts", "monte_carlo"), "loss", self.loss, "gts or monte_carlo")
        _require(self.source in ("teacher", "store"), "source", self.source, "teacher or store")


@dataclass(kw_only=True)
class MatchConfig(OptimisationConfig, TargetConfig):
    """DD2's stage 2: the generator learns to have the teacher's conditional scores (docs/dd2.md).

    `iterations` counts the generator's updates that alternate with the guidance network's.

    Attributes:
        start_iterations: updates of the generator by anchor and look-ahead alone, before the guidance network joins.
        start_learning_rate: their peak; `learning_rate` and `warmup` are those of the updates that follow.
        guidance_first: updates of the guidance network alone, after them.
        guidance_updates: K, updates of the guidance network before each of the generator.
        guidance_learning_rate: peak, of the guidance network.
        guidance_warmup: updates of its linear warm-up (`warmup` counts the generator's).
        first_learning_rate: of both networks, where their warm-up begins.
        form: of the score distance: sid or kl.
        alpha: of the SiD form.
        draws: noisy versions of every token per step (m).
        score_weight: of the score distance; 0 leaves the guidance network out.
        anchor_weight: of the distance to the code that the teacher's flow, given the generator's own earlier tokens,
            takes each token's noise to.
        lookahead_weight: of the cross-entropy between the teacher's next-token distribution, given the generator's
            own tokens, and the one that the teacher's head reads off the generator's features.
        prefix: what teacher and guidance network see of a generated sequence: codes or continuous (then the
            teacher still reads codes where it looks them up).
        fake_score: how the guidance network tells the generator's score: codes (by its distribution over codes, and
            the closed form that gives the teacher's) or velocity (by its head, as the paper).
        guidance_start: stage1, teacher or scratch.
        ema_decay: of the averaged weights that are sampled from.
        align_iterations: performance alignment: after `iterations`, the averaged weights go into the generator and the
            guidance network trains alone for so many updates.
        later_iterations: updates of the generator after the alignment.
        later_guidance_updates: K after the alignment.
        watch_every: steps between looks at the samples: likelihood, diversity, distance of averaged and live weights.
    """

    optimizer: str = "muon"
    iterations: int = 800
    learning_rate: float = 1e-3
    warmup: int = 50
    start_iterations: int = 1200
    start_learning_rate: float = 8e-3
    guidance_first: int = 100
    guidance_updates: int = 2
    guidance_learning_rate: float = 4e-3
    guidance_warmup: int = 100
    first_learning_rate: float = 0.0
    form: str = "kl"
    alpha: float = 1.0
    draws: int = 2
    score_weight: float = 10.0
    anchor_weight: float = 1.0
    lookahead_weight: float = 1.0
    prefix: str = "codes"
    fake_score: str = "codes"
    guidance_start: str = "teacher"
    ema_decay: float = 0.999
    align_iterations: int = 0
    later_iterations: int = 0
    later_guidance_updates: int = 2
    watch_every: int = 500

    def __post_init__(self) -> None:
        OptimisationConfig.__post_init__(self)
        TargetConfig.__post_init__(self)
        _require_positive(self, "guidance_updates", "later_guidance_updates", "draws", "watch_every")
        _require_positive(self, "start_learning_rate", "guidance_learning_rate")
        _require(self.form in ("sid", "kl"), "form", self.form, "sid or kl")
        _require(self.prefix in ("codes", "continuous"), "prefix", self.prefix, "codes or continuous")
        _require(self.fake_score in ("codes", "velocity"), "fake_score", self.fake_score, "codes or velocity")
        starts = ("stage1", "teacher", "scratch")
        _require(self.guidance_start in starts, "guidance_start", self.guidance_start, "stage1, teacher or scratch")
        weights = (self.score_weight, self.anchor_weight, self.lookahead_weight)
        _require(min(weights) >= 0 < max(weights), "score_weight", self.score_weight, "one weight that is not 0")
        anchored = self.start_iterations == 0 or max(weights[1:]) > 0
        _require(anchored, "start_iterations", self.start_iterations, "0 without anchor and look-ahead")


@dataclass(kw_only=True)
class DD2Config(MethodConfig):
    """DD2 distillation.

    Attributes:
        head_width: of the velocity head.
        head_depth: its blocks.
        time: flow time at which the generator's head takes the noise.
        recycles: how often the generator is run again within a pass, reading the codes it made before.
        split: group from which the student's samples are its continuous values, not their nearest codes; -1: none.
        adapt: stage 0, for LlamaGen.
        tune: stage 1, AR-diffusion tuning.
        match: stage 2, score matching.
    """

    head_width: int = 96
    head_depth: int = 2
    time: float = 1.0
    recycles: int = 0
    split: int = -1
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    match: MatchConfig = field(default_factory=MatchConfig)

    def __post_init__(self) -> None:
        _require_positive(self, "head_width", "head_depth")
        _require(0.0 < self.time <= 1.0, "time", self.time, "in (0, 1]")
        _require(self.recycles >= 0, "recycles", self.recycles, "0 or more runs after the first")
        _require(self.split >= -1, "split", self.split, "a group, or -1 for none")


@dataclass(kw_only=True)
class EvaluationConfig:
    """What the figures rest on.

    Attributes:
        samples: per source.
        batch_size: samples made and measured at a time.
        batch_sizes: that are timed.
        paths: paths in noise whose lengths are measured, where there is a distance of images; 0: none.
        lpips_vgg: torchvision's VGG16 weights, for LPIPS as that distance; empty: the features of the family's own
            network, where it has one (digits).
        lpips_linear: the lpips package's vgg.pth.
    """

    samples: int = 5000
    batch_size: int = 1000
    batch_sizes: tuple[int, ...] = (1, 64)
    paths: int = 1000
    lpips_vgg: str = ""
    lpips_linear: str = ""

    def __post_init__(self) -> None:
        # A covariance of 48 features needs more samples than features to mean anything.
        _require(self.samples >= 100, "samples", self.samples, "at least 100")
        _require_positive(self, "batch_size")
        usable = len(self.batch_sizes) > 0 and min(self.batch_sizes) >= 1
        _require(usable, "batch_sizes", self.batch_sizes, "one or more positive numbers")
        _require(self.paths == 0 or self.paths >= 2, "paths", self.paths, "at least 2, or 0 for none")
        _require_lpips(self)


@dataclass(kw_only=True)
class TrainConfig:
    """Everything `ddfast.train` needs, from the teacher to the report.

    Attributes:
        recipe: where the defaults come from.
        preset: ddfast (what was found to be best on digits), long (of digits and text, four times as many updates of
            that) or paper (the papers' settings, literally); default: the recipe's.
        method: dd1 or dd2.
        init: where DD2's generator starts: teacher, stage1, scratch, or dd1:PATH (a DD1 run's folder).
        out: folder of the run; the default gets -dd2 for that method.
        seed: of everything that is random, 0 to 2^64 - 1.
        device: cpu or cuda.
        resume: insist that there is a run to continue in `out`.
        tokenizer: image tokenizer.
        teacher: AR teacher.
        trajectories: training pairs.
        dd1: distillation by DD1.
        dd2: distillation by DD2.
        evaluation: figures.
        parallel: how the processes share the work.
        track: where the figures of metrics.jsonl go too: tensorboard (OUT/tensorboard), wandb, or both with a comma
            between.
        profile_steps: FIRST:END, steps of every training stage that PyTorch's profiler records, END not among them; 0
            is the first that this call makes. Chrome traces go to OUT/profile.
    """

    recipe: str = "digits"
    preset: str = ""
    method: str = "dd1"
    init: str = "teacher"
    out: Path = Path("runs/digits")
    seed: int = 0
    device: str = "cpu"
    resume: bool = False
    tokenizer: TokenizerConfig = field(default_factory=DigitsTokenizerConfig)
    teacher: TeacherConfig = field(default_factory=DigitsTeacherConfig)
    trajectories: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    dd1: DD1Config = field(default_factory=DD1Config)
    dd2: DD2Config = field(default_factory=DD2Config)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: str = ""
    profile_steps: str = ""

    def __post_init__(self) -> None:
        require_seed(self.seed)
        trackers(self.track)
        profiled_steps(self.profile_steps)


@dataclass(kw_only=True)
class TokenizerFiles:
    """Where a student's tokenizer is on this machine.

    Attributes:
        weights: its checkpoint, where it is not where the run found it.
    """

    weights: Path | None = None


@dataclass(kw_only=True)
class TeacherFiles:
    """Where a student's teacher is on this machine.

    Attributes:
        weights: its checkpoint, where it is not where the run found it.
        captions: the file that its training pairs cycled through (text), where it is not where the run found it.
    """

    weights: Path | None = None
    captions: Path | None = None


def require_seed(seed: int) -> None:
    """Raise `SettingError` unless a seed is one."""
    try:
        check_seed(seed)
    except ValueError as error:
        raise SettingError(str(error)) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; a `DDFastError` where it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # of the TOML, or of one of its numbers
        raise DDFastError(f"{path} is not TOML: {first_line(error)}") from error


def read_settings(path: Path) -> dict[str, Any]:
    """A run's settings; what files of before do not say is as it was then.

    Raises:
        DDFastError: as of `read_toml`.
    """
    return as_then(read_toml(path))


def as_then(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, with what files of before do not say as it was then."""
    teacher = values.get("teacher")
    if isinstance(teacher, dict) and "training_images" in teacher:  # the digits', which AdamW trained
        teacher.setdefault("optimizer", "adamw")
    for method, before in (("dd1", {"recycles": 0, "later_points": []}), ("dd2", {"recycles": 0})):
        if isinstance(values.get(method), dict):
            values[method] = before | values[method]
    return values


def plain(config: Any) -> dict[str, Any]:
    """A configuration as TOML and JSON hold it: tuples as lists, paths as texts, nothing for None."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def update(target: Any, values: dict[str, Any], prefix: str = "") -> None:
    """Set a configuration's fields from nested tables and validate it.

    Raises:
        DDFastError: a key is unknown, or a value is out of range or not of the type of the one it replaces.
    """
    names = {field.name for field in dataclasses.fields(target)}
    for name, value in values.items():
        if name not in names:
            raise DDFastError(f"configuration: unknown key {prefix}{name}; known: {', '.join(sorted(names))}")
        current = getattr(target, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise DDFastError(f"configuration: {prefix}{name}: got {value!r}, expected a table")
            update(current, value, f"{prefix}{name}.")
            continue
        kind = _kind(target, name) if current is None else type(current)
        if not (_all_fit(value, _hint(target, name)) if kind is tuple else _fits(value, kind)):
            expected = f"a value such as {current!r}" if current is not None else f"a value of type {kind.__name__}"
            expected = f"a list such as {list(current) or [8, 12]}" if kind is tuple else expected
            raise DDFastError(f"configuration: {prefix}{name}: got {value!r}, expected {expected}")
        setattr(target, name, kind(value) if issubclass(kind, (Path, tuple)) else value)
    check = getattr(target, "__post_init__", None)
    try:
        if check:
            check()
    except SettingError as error:
        raise DDFastError(f"configuration: {prefix}{error}") from error


def _hint(target: Any, name: str) -> Any:
    """What a field is declared as; object where names are there for a type checker alone."""
    try:
        return get_type_hints(type(target))[name]
    except NameError:
        return object


def _kind(target: Any, name: str) -> type:
    """The type of a field that may also be None."""
    hint = _hint(target, name)
    kind = next((kind for kind in get_args(hint) if kind is not type(None)), hint)
    kind = get_origin(kind) or kind
    return kind if isinstance(kind, type) else object


def _fits(value: object, kind: type) -> bool:
    """Whether a TOML value can stand for a field of this type."""
    if kind is object:
        return True
    if isinstance(value, bool):
        return kind is bool
    if issubclass(kind, Path):
        return isinstance(value, str)
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def _all_fit(value: object, hint: Any) -> bool:
    """Whether a TOML value can stand for a tuple[KIND, ...]."""
    kind = next(iter(get_args(hint)), object)
    return isinstance(value, list) and all(_fits(one, kind if isinstance(kind, type) else object) for one in value)


def config_hash(*parts: Any) -> str:
    """Twelve hex digits that identify a stage's settings, and so whether its artefact still matches."""
    plain = [_hashed(part) for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _hashed(part: Any) -> Any:
    """A part as JSON holds it."""
    if isinstance(part, dict):
        values = dict(part)
    elif dataclasses.is_dataclass(part):
        values = {field.name: _hashed(getattr(part, field.name)) for field in dataclasses.fields(part)}
    else:
        return part
    if isinstance(part, TargetConfig):
        values = _UNSAID | {name: value for name, value in values.items() if value is not None}
    if isinstance(part, DigitsTeacherConfig) and part.optimizer == "adamw":
        del values["optimizer"]  # as when there was no other
    for name, nothing in (("recycles", 0), ("later_points", ())):
        if values.get(name) == nothing:
            del values[name]  # as when there were none
    return values
