"""VAR in files: what loads, what is written, and teachers of a configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ddfast.config import TeacherConfig, TokenizerConfig, TrainConfig, VARTeacherConfig, VQTokenizerConfig
from ddfast.errors import DDFastError
from ddfast.messages import say
from ddfast.models.attention import block_mask, group_levels, level_mask
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.checkpoint import AnyTensor, build_around, read_tensor, storable
from ddfast.models.family import Family, Parts, network_state
from ddfast.models.official import Said, count, only, part, settle
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.models.var.network import VARFlowNetwork, VARSizes, VARStudent, VARTeacher
from ddfast.models.var.tokenizer import IMAGENET_SCALES, VARTokenizer
from ddfast.models.vqgan import VAR_NAMING, ConvSizes

_SCALES = {
    sum(side**2 for side in scales): scales
    for scales in (
        IMAGENET_SCALES,
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    )
}
"""Official scales by their number of positions: for 256, 512 and 1024 pixels."""

_OPTIONS = {"saln": "shared_aln", "anorm": "attn_l2_norm"}
"""Settings of VAR by the names of its training script's options."""

_TOKENIZER_ALIASES = {
    "v_patch_nums": "patch_nums", "V": "num_codes", "vocab_size": "num_codes", "Cvae": "code_dim",
    "z_channels": "code_dim", "ch": "channels",
}  # fmt: skip
_TOKENIZER_SETTINGS = {
    "V", "vocab_size", "Cvae", "z_channels", "ch", "share_quant_resi", "default_qresi_counts", "quant_conv_ks",
    "quant_resi", "using_znorm", "ch_mult", "num_res_blocks",
}  # fmt: skip


class VARFamily(Family):
    """VAR and its students."""

    name, title = "var", "VAR"
    teacher: ClassVar[type[VARTeacher]] = VARTeacher
    config: ClassVar[type[TeacherConfig]] = VARTeacherConfig
    tokenizer_config: ClassVar[type[TokenizerConfig]] = VQTokenizerConfig
    students: ClassVar[Mapping[str, type[Student]]] = {"dd1": VARStudent, "dd2": VARFlowNetwork}
    signs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "tokenizer": (
            "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight",
            "encoder.mid.block_1.conv1.weight", "quantize.embedding.weight", "quant_conv.weight",
        ),
        "teacher": (
            "word_embed.weight", "pos_1LC", "pos_start", "lvl_embed.weight", "class_emb.weight",
            "head_nm.ada_lin.1.weight", "blocks.0.ffn.fc1.weight",
        ),
    }  # fmt: skip
    derived = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
    tokenizer_file = "vae_ch160v4096z32.pth"

    def untrained(self, config: TrainConfig) -> VARTeacher:
        teacher, tokenizer = config.teacher, config.tokenizer
        assert isinstance(teacher, VARTeacherConfig)
        assert isinstance(tokenizer, VQTokenizerConfig)
        vq = VARTokenizer(
            patch_nums=tuple(teacher.patch_nums),
            sizes=ConvSizes.configured(tokenizer, tokenizer.code_dim),
            num_codes=tokenizer.num_codes,
            code_dim=tokenizer.code_dim,
        )
        return VARTeacher(vq, _sizes(teacher), defaults=SamplingDefaults(**teacher.sampling()))

    def said(self, config: TeacherConfig) -> dict[str, Any]:
        assert isinstance(config, VARTeacherConfig)
        said = {**vars(_sizes(config)), "patch_nums": tuple(config.patch_nums)}
        unsaid = ("mlp_ratio", "norm_eps", *(() if config.attn_l2_norm else ("num_heads",)))
        return {name: value for name, value in said.items() if name not in unsaid}

    def read(self, parts: Parts) -> VARTeacher:
        return _teacher(parts, self.teacher)

    def read_tokenizer(self, parts: Parts) -> VARTokenizer:
        return _tokenizer(parts.tensors, parts.source, parts.config, parts.stored)

    def describe(self, teacher: VARTeacher) -> dict[str, Any]:
        known = vars(teacher.sizes)
        config = {name: known[name] for name in ("norm_eps", "num_heads")} | teacher.tokenizer.config
        return {"config": config, "defaults": dataclasses.asdict(teacher.defaults)}

    def student_config(self, tensors: Mapping[str, AnyTensor], method: str, teacher: Teacher) -> dict[str, Any]:
        own = {"layerwise_n_d_embed": "layerwise_n_d_embed.0.weight" in tensors} if method == "dd1" else {}
        return own | _sizes_in(tensors)

    def official_teacher(self, teacher: VARTeacher) -> tuple[dict[str, Any], dict[str, Any]]:
        levels, mask = group_levels(teacher.groups), block_mask(teacher.groups)
        assert mask is not None
        buffers = {"lvl_1L": levels[None], "attn_bias_for_masking": _bias(mask)}
        return {**network_state(teacher), **buffers, **_zero_biases(teacher)}, storable(teacher.tokenizer.state_dict())

    def official_student(self, student: Any, averaged: dict[str, Tensor], live: dict[str, Tensor]) -> dict[str, Any]:
        if not isinstance(student, VARStudent):
            return super().official_student(student, averaged, live)
        groups = (1, *student.groups)
        mask = level_mask(groups)
        assert mask is not None
        buffers = {"lvl_1L": group_levels(groups)[None], "attn_bias_for_masking": _bias(mask)}
        whole = {**live, **buffers, **_zero_biases(student)}
        return {"trainer": {"ema_parameters": averaged, "var_wo_ddp": whole}}

    def usual(self, teacher: VARTeacher) -> dict[str, Any]:
        usual: dict[str, Any] = {"norm_eps": 1e-6, "num_heads": teacher.sizes.depth, "shared_aln": False}
        return usual | {
            "attn_l2_norm": True, "patch_nums": list(IMAGENET_SCALES), "quant_resi": 0.5, "using_znorm": False,
        }  # fmt: skip


def _sizes(teacher: VARTeacherConfig) -> VARSizes:
    return VARSizes(
        num_classes=teacher.num_classes,
        depth=teacher.depth,
        embed_dim=64 * teacher.depth,
        num_heads=teacher.depth,
        shared_aln=teacher.shared_aln,
        attn_l2_norm=teacher.attn_l2_norm,
    )


def _tokenizer(
    tensors: Mapping[str, AnyTensor], source: object, config: dict[str, Any], stored: list[Said]
) -> VARTokenizer:
    """Build the tokenizer; `config` may hold every official argument of a VQVAE."""
    try:
        sizes = ConvSizes.read(tensors, VAR_NAMING)
        num_codes, code_dim = tensors["quantize.embedding.weight"].shape
        kernel = tensors["quant_conv.weight"].shape[-1]
    except (KeyError, ValueError, IndexError) as error:
        raise DDFastError(f"{source} is no complete VAR tokenizer: {error} is missing") from error
    partly = count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    own = count(tensors, r"quantize\.quant_resi\.(\d+)\.")
    has_phi = partly or own or "quantize.quant_resi.qresi.weight" in tensors
    shared = partly or (0 if own else 1)
    found = {
        "patch_nums": None, "num_codes": num_codes, "code_dim": code_dim, "channels": sizes.channels,
        "share_quant_resi": shared if has_phi else None, "default_qresi_counts": None, "quant_conv_ks": kernel,
        "quant_resi": None if has_phi else 0.0, "using_znorm": None, "ch_mult": sizes.multipliers,
        "num_res_blocks": sizes.blocks,
    }  # fmt: skip
    settled = settle(found, config, stored, source, aliases=_TOKENIZER_ALIASES)
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    if hits is None:
        tensors = {**tensors, "quantize.ema_vocab_hit_SV": torch.zeros(0, num_codes, dtype=torch.float32)}
    return build_around(
        lambda: VARTokenizer(
            patch_nums=tuple(settled["patch_nums"] or IMAGENET_SCALES),
            num_codes=num_codes,
            code_dim=code_dim,
            sizes=sizes,
            share_quant_resi=shared,
            default_qresi_counts=own,
            quant_resi=0.5 if settled["quant_resi"] is None else settled["quant_resi"],
            quant_conv_ks=kernel,
            using_znorm=bool(settled["using_znorm"]),
            hit_scales=0 if hits is None else hits.shape[0],
        ),
        tensors,
        source,
        dtype=torch.float32,
    )


def _sizes_in(tensors: Mapping[str, AnyTensor]) -> dict[str, Any]:
    """What a VAR network's tensors tell of its sizes, by their official names; None: nothing."""
    embed_dim, scales = tensors["word_embed.weight"].shape[0], tensors.get("blocks.0.attn.scale_mul_1H11")
    return {
        "num_classes": tensors["class_emb.weight"].shape[0] - 1, "depth": count(tensors, r"blocks\.(\d+)\."),
        "embed_dim": embed_dim, "num_heads": None if scales is None else scales.shape[1],
        "mlp_ratio": tensors["blocks.0.ffn.fc1.weight"].shape[0] / embed_dim,
        "shared_aln": "shared_ada_lin.1.weight" in tensors, "attn_l2_norm": scales is not None,
    }  # fmt: skip


def _teacher(parts: Parts, kind: type[VARTeacher]) -> VARTeacher:
    """The teacher of a file, of a class for VAR's."""
    for_tokenizer, rest = part(parts.config, _TOKENIZER_SETTINGS)
    tensors, source = parts.tensors, parts.source
    try:
        known = _sizes_in(tensors)
        positions = tensors["pos_1LC"].shape[1]
    except (KeyError, IndexError) as error:
        raise DDFastError(f"{source} is no complete VAR checkpoint: {error} is missing") from error
    found = {**known, "norm_eps": None, "patch_nums": _patch_nums(tensors.get("lvl_1L"), source)}
    stored = [
        Said(where, {_OPTIONS.get(name, name): value for name, value in values.items()})
        for where, values in parts.stored
    ]
    settled = settle(found, rest, stored, source, aliases={"v_patch_nums": "patch_nums"})
    patch_nums = settled.pop("patch_nums")
    if patch_nums is None:
        if positions not in _SCALES:
            raise DDFastError(
                f"patch_nums: {source} has {positions} positions and no lvl_1L; give patch_nums=... (--patch-nums)"
            )
        patch_nums = _SCALES[positions]
        say(f"{source}: nothing says its scales; the official ones of {positions} positions are assumed: {patch_nums}")
    width, depth = settled["embed_dim"], settled["depth"]
    if settled["num_heads"] is None:  # officially a head per block, each of width 64; nothing else tells
        if width != 64 * depth:
            raise DDFastError(
                f"num_heads: {source} (width {width}, depth {depth}, attention without l2 norm) does not tell its "
                "number of heads; give num_heads=... (--num-heads)"
            )
        settled["num_heads"] = depth
    sizes = VARSizes(**{name: value for name, value in settled.items() if value is not None})
    # Not the scales: a tokenizer serves teachers of several.
    of_tokenizer = [only(said, _TOKENIZER_SETTINGS) for said in (*parts.tokenizer_stored, *parts.stored)]
    given = {**for_tokenizer, "patch_nums": tuple(patch_nums)}
    tokenizer = _tokenizer(parts.tokenizer, parts.tokenizer_source, given, of_tokenizer)

    def make() -> VARTeacher:
        return kind(tokenizer, sizes, defaults=parts.defaults)

    return parts.around(tokenizer, make, head="head.weight", derived=VARFamily.derived)


def _patch_nums(level: AnyTensor | None, source: object) -> tuple[int, ...] | None:
    """The scales' sides from the buffer with every position's level, int [1, N]."""
    if level is None or not level.shape.numel():
        return None
    counts = torch.bincount(read_tensor(level).flatten().long()).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if [side**2 for side in sides] != counts:
        raise DDFastError(f"{source}: lvl_1L has levels of {counts} positions, expected squares")
    return sides


def _zero_biases(network: VARTeacher | VARStudent) -> dict[str, Tensor]:
    """The official buffer that stands for the key's missing bias."""
    zeros = torch.zeros(network.sizes.embed_dim, dtype=torch.float32)
    return {f"blocks.{number}.attn.zero_k_bias": zeros.clone() for number in range(network.sizes.depth)}


def _bias(mask: Tensor) -> Tensor:
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill(~mask, -torch.inf)[None, None]
