"""LlamaGen in files: what loads, what is written, and teachers of a configuration."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.config import LlamaGenTeacherConfig, TeacherConfig, TokenizerConfig, TrainConfig, VQTokenizerConfig
from ddfast.errors import DDFastError
from ddfast.messages import say
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.checkpoint import AnyTensor, build_around, read_tensor, storable
from ddfast.models.family import Family, Parts, network_state
from ddfast.models.llamagen.captions import give_captions, random_captions
from ddfast.models.llamagen.network import (
    LLAMAGEN_SIZES,
    LlamaGenFlowNetwork,
    LlamaGenSizes,
    LlamaGenStudent,
    LlamaGenTeacher,
    rope_table,
)
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.official import Said, count, only, part, settle
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.models.vqgan import LLAMAGEN_NAMING, ConvSizes

_HEADS = {(sizes.dim, sizes.n_layer): sizes.n_head for sizes in LLAMAGEN_SIZES.values()}
"""n_head of the published models by (dim, n_layer): no tensor tells it."""

_IMAGE_SIZES = "256|384|448|512|1024"
"""Pixels that names of LlamaGen's files speak of."""

_GENERIC_STEMS = {"consolidated", "model", "pytorch_model", "checkpoint", "ckpt", "last", "best", "final"}
"""File names that say nothing of the model: the folder's may."""


class LlamaGenFamily(Family):
    """LlamaGen and its students."""

    name, title = "llamagen", "LlamaGen"
    teacher: ClassVar[type[LlamaGenTeacher]] = LlamaGenTeacher
    config: ClassVar[type[TeacherConfig]] = LlamaGenTeacherConfig
    tokenizer_config: ClassVar[type[TokenizerConfig]] = VQTokenizerConfig
    students: ClassVar[Mapping[str, type[Student]]] = {"dd1": LlamaGenStudent, "dd2": LlamaGenFlowNetwork}
    signs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": (
            "encoder.conv_blocks.0.res.0.conv1.weight", "decoder.conv_blocks.0.res.0.conv1.weight",
            "encoder.mid.0.conv1.weight", "quantize.embedding.weight", "quant_conv.weight",
        ),
        "teacher": (
            "tok_embeddings.weight", "output.weight", "norm.weight", "layers.0.attention.wqkv.weight",
            "layers.0.feed_forward.w1.weight", "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding",
        ),
    }  # fmt: skip
    derived = ("freqs_cis", "causal_mask", "k_cache", "v_cache")
    tokenizer_file = "vq_ds16_c2i.pt"

    def untrained(self, config: TrainConfig) -> LlamaGenTeacher:
        teacher, tokenizer = config.teacher, config.tokenizer
        assert isinstance(teacher, LlamaGenTeacherConfig)
        assert isinstance(tokenizer, VQTokenizerConfig)
        vq = LlamaGenTokenizer(
            sizes=ConvSizes.configured(tokenizer, tokenizer.latent_channels),
            num_codes=tokenizer.num_codes,
            code_dim=tokenizer.code_dim,
        )
        return LlamaGenTeacher(vq, _sizes(teacher), defaults=SamplingDefaults(**teacher.sampling()))

    def said(self, config: TeacherConfig) -> dict[str, Any]:
        assert isinstance(config, LlamaGenTeacherConfig)
        unsaid = ("norm_eps", "rope_base", "token_num", "num_classes" if config.model_type == "t2i" else "caption_dim")
        return {name: value for name, value in vars(_sizes(config)).items() if name not in unsaid}

    def conditioned(self, teacher: Teacher, config: TeacherConfig) -> Teacher:
        """A text teacher with the captions that its training pairs cycle through."""
        assert isinstance(teacher, LlamaGenTeacher)
        assert isinstance(config, LlamaGenTeacherConfig)
        if config.model_type == "t2i" and config.captions:
            give_captions(teacher, Path(config.captions))
        elif config.model_type == "t2i":
            if config.weights and not config.random_weights:
                raise DDFastError("a text teacher needs --teacher.captions FILE: features made by `encode_captions`")
            teacher.captions = random_captions(8, config.cls_token_num, config.caption_dim)
        return teacher

    def read(self, parts: Parts) -> LlamaGenTeacher:
        return _teacher(parts, self.teacher)

    def read_tokenizer(self, parts: Parts) -> LlamaGenTokenizer:
        return _tokenizer(parts.tensors, parts.source, parts.config, parts.stored)

    def describe(self, teacher: LlamaGenTeacher) -> dict[str, Any]:
        names = ["n_head", "block_size", "rope_base", "norm_eps", "class_dropout_prob"]
        names.append("cls_token_num" if teacher.sizes.model_type == "t2i" else "num_classes")
        known = vars(teacher.sizes)
        config = {name: known[name] for name in names} | teacher.tokenizer.config
        return {"config": config, "defaults": dataclasses.asdict(teacher.defaults)}

    def student_config(self, tensors: Mapping[str, AnyTensor], method: str, teacher: Teacher) -> dict[str, Any]:
        known = _sizes_in(tensors)
        if isinstance(teacher, LlamaGenTeacher) and known["dim"] != teacher.sizes.dim:
            heads = _HEADS.get((known["dim"], known["n_layer"]))
            known |= {"n_head": heads, "n_kv_head": heads}
        return known

    def official_teacher(self, teacher: LlamaGenTeacher) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"model": network_state(teacher)}, {"model": storable(teacher.tokenizer.state_dict())}

    def official_student(self, student: Any, averaged: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Any]:
        if not isinstance(student, LlamaGenStudent):
            return super().official_student(student, averaged, live)
        return {"ema": averaged, "model": live}

    def usual(self, teacher: LlamaGenTeacher) -> dict[str, Any]:
        names = ("block_size", "rope_base", "norm_eps", "class_dropout_prob", "num_classes")
        return {name: getattr(LLAMAGEN_SIZES["L"], name) for name in names} | {"codebook_l2_norm": True}


def swiglu_width(dim: int) -> int:
    """Width of the feed-forward layers of a transformer of width `dim`, by the official rule."""
    return 256 * -(-int(8 * dim / 3) // 256)


def _sizes(teacher: LlamaGenTeacherConfig) -> LlamaGenSizes:
    return LlamaGenSizes(
        dim=teacher.dim,
        n_layer=teacher.n_layer,
        n_head=teacher.n_head,
        n_kv_head=teacher.n_kv_head or teacher.n_head,
        ffn_dim=teacher.ffn_dim or swiglu_width(teacher.dim),
        block_size=teacher.block_size,
        model_type=teacher.model_type,
        num_classes=teacher.num_classes,
        cls_token_num=teacher.cls_token_num,
        caption_dim=teacher.caption_dim,
    )


_TOKENIZER_ALIASES = {
    "codebook_size": "num_codes", "codebook_embed_dim": "code_dim", "ch": "channels", "vq_ch": "channels",
}  # fmt: skip
_TOKENIZER_SETTINGS = {
    "codebook_size", "codebook_embed_dim", "z_channels", "ch", "vq_ch", "encoder_ch_mult", "decoder_ch_mult",
    "codebook_l2_norm", "num_res_blocks",
}  # fmt: skip


def _tokenizer(
    tensors: Mapping[str, AnyTensor], source: object, config: dict[str, Any], stored: list[Said]
) -> LlamaGenTokenizer:
    """Build the tokenizer; `config` may hold every official argument of a VQModel."""
    try:
        sizes = ConvSizes.read(tensors, LLAMAGEN_NAMING)
        num_codes, code_dim = tensors["quantize.embedding.weight"].shape
    except (KeyError, ValueError, IndexError) as error:
        raise DDFastError(f"{source} is no complete LlamaGen tokenizer: {error} is missing") from error
    used = tensors.get("quantize.codebook_used")
    found = {
        "num_codes": num_codes, "code_dim": code_dim, "z_channels": sizes.latent_channels, "channels": sizes.channels,
        "encoder_ch_mult": sizes.multipliers, "decoder_ch_mult": sizes.multipliers, "codebook_l2_norm": None,
        "num_res_blocks": sizes.blocks,
    }  # fmt: skip
    settled = settle(found, config, stored, source, aliases=_TOKENIZER_ALIASES)
    return build_around(
        lambda: LlamaGenTokenizer(
            num_codes=num_codes,
            code_dim=code_dim,
            sizes=sizes,
            codebook_l2_norm=settled["codebook_l2_norm"] is not False,
            usage_slots=0 if used is None else used.shape[0],
        ),
        tensors,
        source,
        dtype=torch.float32,
    )


def _sizes_in(tensors: Mapping[str, AnyTensor]) -> dict[str, Any]:
    """What a LlamaGen network's tensors tell of its sizes, by their official names."""
    return {
        "dim": tensors["output.weight"].shape[1], "n_layer": count(tensors, r"layers\.(\d+)\."),
        "ffn_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
    }  # fmt: skip


def _teacher(parts: Parts, kind: type[LlamaGenTeacher]) -> LlamaGenTeacher:
    """The teacher of a file, of a class for LlamaGen's."""
    for_tokenizer, rest = part(parts.config, _TOKENIZER_SETTINGS)
    tensors, source, stored = parts.tensors, parts.source, [_with_derived(said) for said in parts.stored]
    of_tokenizer = [*parts.tokenizer_stored, *(only(said, {"codebook_l2_norm"}) for said in parts.stored)]
    tokenizer = _tokenizer(parts.tokenizer, parts.tokenizer_source, for_tokenizer, of_tokenizer)
    rest.pop("ffn_hidden_dim_resulting", None)
    text = "cls_embedding.uncond_embedding" in tensors
    try:
        known = _sizes_in(tensors)
        num_codes = tensors["tok_embeddings.weight"].shape[0]
        qkv = tensors["layers.0.attention.wqkv.weight"].shape[0]
        rows, width = tensors[
            "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
        ].shape
    except (KeyError, ValueError, IndexError) as error:
        raise DDFastError(f"{source} is no complete LlamaGen checkpoint: {error} is missing") from error
    angles = _angles(tensors.get("freqs_cis"), known["dim"])
    found = {
        **known, "n_head": angles.get("n_head"), "n_kv_head": None, "vocab_size": num_codes,
        "block_size": angles.get("block_size"), "model_type": "t2i" if text else "c2i", "num_classes": None,
        "cls_token_num": angles.get("cls_token_num") if text else 1, "caption_dim": width if text else None,
        "rope_base": angles.get("rope_base"), "norm_eps": None, "class_dropout_prob": None,
        "downsample_size": tokenizer.downsampling,
    }  # fmt: skip
    settled = settle(
        found,
        _image_tokens(rest, tokenizer),
        stored,
        source,
        aliases={"ffn_hidden_dim": "ffn_dim", "gpt_type": "model_type"},
    )
    for name in ("vocab_size", "downsample_size"):
        del settled[name]
    if text:
        settled["cls_token_num"] = settled["cls_token_num"] or rows
        if settled["cls_token_num"] > rows:
            raise DDFastError(
                f"cls_token_num: got {settled['cls_token_num']}, but uncond_embedding of {source} has {rows} rows"
            )
        settled |= {"num_classes": None, "token_num": rows}
    else:
        settled |= _labels(rows, settled["num_classes"], settled["class_dropout_prob"], source)
    dim, depth = settled["dim"], settled["n_layer"]
    heads = settled["n_head"] or _HEADS.get((dim, depth))
    if heads is None or dim % heads:
        raise DDFastError(
            f"n_head: {source} (dim {dim}, {depth} layers) is no published size; give n_head=... (--n-head)"
        )
    kv_heads, odd = divmod(qkv - dim, 2 * (dim // heads))
    if odd or kv_heads < 1 or settled["n_kv_head"] not in (None, kv_heads):
        raise DDFastError(f"n_head: {heads} heads of {dim // heads} do not fit wqkv's {qkv} rows in {source}")
    settled |= {"n_head": heads, "n_kv_head": kv_heads}
    settled["block_size"] = _block_size(settled["block_size"], source, tokenizer)
    sizes = LlamaGenSizes(**{name: value for name, value in settled.items() if value is not None})
    _check_angles(tensors.get("freqs_cis"), sizes, source)

    def make() -> LlamaGenTeacher:
        return kind(tokenizer, sizes, defaults=parts.defaults)

    return parts.around(tokenizer, make, head="output.weight", derived=LlamaGenFamily.derived)


def _with_derived(said: Said) -> Said:
    """A training script's options with what follows from them: sizes of a model by its name, tokens by the pixels."""
    values = {name: value for name, value in said.values.items() if name != "num_classes" or value}
    if values.get("model_type") not in ("c2i", "t2i"):
        values.pop("model_type", None)  # Hugging Face's configurations call their architecture so
    named = LLAMAGEN_SIZES.get(str(values.get("gpt_model", "")).removeprefix("GPT-"))
    if named is not None:
        values = {"dim": named.dim, "n_layer": named.n_layer, "n_head": named.n_head} | values
    pixels, factor = values.get("image_size"), values.get("downsample_size", 16)
    if isinstance(pixels, int) and isinstance(factor, int) and pixels and factor and "block_size" not in values:
        values["block_size"] = (pixels // factor) ** 2
    if values.get("model_type", values.get("gpt_type")) == "t2i":
        values.pop("num_classes", None)  # an option that text models do not read
    return Said(said.where, values)


def _image_tokens(given: dict[str, Any], tokenizer: LlamaGenTokenizer) -> dict[str, Any]:
    """The user's settings with the number of tokens in the place of the pixels."""
    given = dict(given)
    pixels = given.pop("image_size", None)
    if pixels is not None:
        given["block_size"] = _tokens_of(pixels, tokenizer, given.get("block_size"))
    return given


def _tokens_of(pixels: Any, tokenizer: LlamaGenTokenizer, tokens: int | None = None) -> int:
    factor = tokenizer.downsampling
    if not isinstance(pixels, int) or isinstance(pixels, bool) or pixels < 1 or pixels % factor:
        raise DDFastError(
            f"image_size: got {pixels!r}, expected the pixels of a square image's side, a multiple of the tokenizer's "
            f"{factor}"
        )
    found = (pixels // factor) ** 2
    if tokens not in (None, found):
        raise DDFastError(f"block_size: got {tokens}, but image_size {pixels} means {found} tokens of {factor} pixels")
    return found


def _labels(rows: int, num_classes: int | None, dropout: float | None, source: object) -> dict[str, Any]:
    """num_classes and class_dropout_prob of an embedding of labels with so many rows.

    The last row stands for "no condition" unless the model was trained without label dropout.
    """
    if num_classes is not None and rows - num_classes not in (0, 1):
        raise DDFastError(f"num_classes: got {num_classes}, but the tensors of {source} have {rows} rows of labels")
    if num_classes is None and dropout is None:
        num_classes = 1000 if rows in (1000, 1001) else rows - 1  # 1000: the official default
        if rows != 1001:
            last = "the last one stands" if rows > num_classes else "none of them stands"
            say(
                f"{source}: nothing says which of its {rows} labels are classes; {last} for 'no condition' is assumed "
                "(num_classes=, class_dropout_prob=)"
            )
    elif num_classes is None:
        num_classes = rows - (dropout != 0)
    if dropout is None:
        return {"num_classes": num_classes, "class_dropout_prob": None if rows > num_classes else 0.0}
    if rows != num_classes + (dropout != 0):
        held = f"{rows} rows of labels, and num_classes is {num_classes}"
        raise DDFastError(f"class_dropout_prob: got {dropout}, but the tensors of {source} have {held}")
    return {"num_classes": num_classes}


def _block_size(settled: int | None, source: Path, tokenizer: LlamaGenTokenizer) -> int:
    """Image tokens of a LlamaGen: as settled, else by the file's name, else those of 256 pixels."""
    named, official = image_size_in_name(source)
    if settled is None and len(named) > 1:
        sizes = " and ".join(map(str, named))
        raise DDFastError(f"image_size: the name of {source} says {sizes} pixels; give image_size=... (--image-size)")
    if named and (settled is None or official):
        by_name = _tokens_of(named[0], tokenizer)
        if settled not in (None, by_name):
            raise DDFastError(
                f"block_size: the name of {source} says {named[0]} pixels, {by_name} tokens, but everything else says "
                f"{settled} tokens; rename the file, or give the image_size that is right (--image-size)"
            )
        return by_name
    if settled is None:
        settled = _tokens_of(256, tokenizer)
        say(f"{source}: nothing says its image size; 256 pixels, {settled} tokens, are assumed (image_size=...)")
    return settled


def image_size_in_name(path: Path) -> tuple[list[int], bool]:
    """The pixels that a LlamaGen file's name, or the folder's where the file's says nothing, speaks of.

    What follows the model's name is the image size (`c2i_L_384.pt`, `run_256_c2i-L-384.pt`): then the second value is
    True. Else any number that may be one, several where the name is not clear: a hint for where nothing else tells.
    """
    for name in (path.stem, path.parent.name) if path.stem.lower() in _GENERIC_STEMS else (path.stem,):
        official = re.search(
            rf"(?:c2i|t2i|gpt)[-_](?:B|L|XL|XXL|XXXL|1B|3B|7B)(?:[-_]stage\d)?[-_]({_IMAGE_SIZES})(?!\d)",
            name,
            re.IGNORECASE,
        )
        found = [official[1]] if official else re.findall(rf"(?<!\d)({_IMAGE_SIZES})(?!\d)", name)
        if found:
            return sorted({int(pixels) for pixels in found}), official is not None
    return [], False


def _angles(table: AnyTensor | None, dim: int) -> dict[str, Any]:
    """What a stored table of rotary angles [C + N, K / 2, 2] tells: heads, condition and image tokens, base."""
    if table is None or len(table.shape) != 3 or table.shape[2] != 2 or not table.shape[1]:
        return {}
    angles = read_tensor(table).float()
    empty = angles.abs().sum((1, 2)) == 0
    condition = int(empty.long().cumprod(0).sum())
    found: dict[str, Any] = {
        "n_head": dim // (2 * table.shape[1]), "cls_token_num": condition, "block_size": len(angles) - condition,
    }  # fmt: skip
    half, frequencies = table.shape[1], table.shape[1] // 2
    if table.dtype in (torch.float32, torch.float64) and frequencies > 1 and len(angles) > condition + 1:
        cosine, sine = angles[condition + 1, frequencies + 1].tolist()  # of the first row's second column
        angle = math.atan2(sine, cosine)
        base = angle ** (-half / 2) if angle > 0 else 0.0
        if base:
            found["rope_base"] = float(round(base)) if abs(base - round(base)) < 1e-4 * base else base
    return found


def _check_angles(table: AnyTensor | None, sizes: LlamaGenSizes, source: object) -> None:
    """Raise where a stored table of angles is another than the one that the sizes give."""
    if table is None:
        return
    ours, error = rope_table(sizes), 1e-3 if table.dtype in (torch.float32, torch.float64) else 2e-2
    if table.shape != ours.shape or bool(((read_tensor(table).float() - ours).abs() > error).any()):
        raise DDFastError(
            f"rope_base: freqs_cis of {source} {list(table.shape)} is not the table of base {sizes.rope_base}, "
            f"{sizes.block_size} tokens and {sizes.n_head} heads"
        )
