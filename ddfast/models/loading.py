"""Teachers, tokenizers and students from files: official checkpoints as they are, and ddfast's own.

Family and sizes are read off the tensors; what they cannot tell (`n_head`, the image size) comes from the user, by its
official name, from what the file says about itself, or from its name. Two of these that disagree are an error; what
none of them tells is assumed only where there is a usual case, and said. Our own files hold the same tensors under the
same names, with the settings in the header.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ddfast.errors import DDFastError
from ddfast.messages import say
from ddfast.models.checkpoint import AnyTensor, build_around, read_checkpoint, read_tensor, save_tensors
from ddfast.models.digits import DigitsTeacher, Tokenizer, load_digits_teacher
from ddfast.models.digits import save_teacher as save_digits_teacher
from ddfast.models.flow_network import FlowNetwork, TransformerFlowNetwork
from ddfast.models.llamagen import (
    LLAMAGEN_SIZES,
    LlamaGenFlowNetwork,
    LlamaGenSizes,
    LlamaGenStudent,
    LlamaGenTeacher,
    rope_table,
)
from ddfast.models.official import (
    AVERAGE,
    STUDENT_FILE,
    TOKENIZER,
    Kind,
    Said,
    Weights,
    checkpoint_file,
    choose,
    count,
    find_weights,
    part,
    settle,
    stored_settings,
)
from ddfast.models.protocol import SamplingDefaults, Teacher
from ddfast.models.student import DD1Student, Student, TransformerStudent
from ddfast.models.tokenizers import IMAGENET_SCALES, ImageTokenizer, LlamaGenTokenizer, VARTokenizer
from ddfast.models.var import VARFlowNetwork, VARSizes, VARStudent, VARTeacher
from ddfast.models.vqgan import LLAMAGEN_NAMING, VAR_NAMING, ConvSizes

FAMILIES = ("digits", "var", "llamagen")

_VAR_DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
_LLAMAGEN_DERIVED = ("freqs_cis", "causal_mask", "k_cache", "v_cache")
"""Buffers of official files that follow from the sizes: recomputed, not read."""

_LLAMAGEN_HEADS = {(sizes.dim, sizes.n_layer): sizes.n_head for sizes in LLAMAGEN_SIZES.values()}
"""n_head of the published models by (dim, n_layer): no tensor tells it."""

_VAR_SCALES = {
    sum(side**2 for side in scales): scales
    for scales in (
        IMAGENET_SCALES,
        (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
        (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    )
}
"""Official scales by their number of positions: for 256, 512 and 1024 pixels."""

_IMAGE_SIZES = "256|384|448|512|1024"
"""Pixels that names of LlamaGen's files speak of."""

_GENERIC_STEMS = {"consolidated", "model", "pytorch_model", "checkpoint", "ckpt", "last", "best", "final"}
"""File names that say nothing of the model: the folder's may."""


def load_teacher(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
    ema: bool = False,
    **config: Any,
) -> Teacher:
    """A teacher from its official files, or from one file or folder of ours.

    Args:
        weights: official checkpoint (`var_d16.pth`, `c2i_L_256.pt`, ...) in any wrapping, a Hugging Face folder with
            its config.json, or what ddfast wrote.
        tokenizer: the tokenizer's checkpoint (`vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, ...); a file that holds both
            (ours, and those of VAR's trainer) needs none.
        family: "var", "llamagen" or "digits"; None: recognised from the tensors.
        dtype: of the transformer's weights, such as `torch.bfloat16`; None: as stored. Codebook and tokenizer are
            float32 whatever their file holds.
        defaults: sampling settings; None: the published ones.
        ema: the averaged weights, where the file has live ones too; the official scripts take the live ones.
        config: by official names, what the file does not tell: `n_head` where the size is not a published one,
            `block_size` or `image_size`, `rope_base`, `norm_eps`, `num_classes`, `num_heads` where attention is not
            normalised, `patch_nums` where there is no `lvl_1L`, `quant_resi`, `using_znorm`, `codebook_l2_norm`.

    Raises:
        DDFastError: a file is missing, damaged, unsafe or something else than a teacher; a size cannot be told; tensors
            are missing, unexpected or of another shape (each listed); a setting is unknown, or two sources (user,
            tensors, stored settings, file name) disagree.
    """
    path = checkpoint_file(weights)
    content, header = read_checkpoint(path)
    if family not in (None, *FAMILIES):
        raise DDFastError(f"{path}: family {family!r} is not known; known: {', '.join(FAMILIES)}")
    found = find_weights(content)
    network = _named_family(found, family) or choose(found, "teacher", path, family=family, averaged=ema, strict=ema)
    assert network.kind is not None
    if network.kind.family == "digits":
        if config or tokenizer is not None:
            named = ", ".join(sorted(config)) or f"tokenizer {tokenizer}"
            raise DDFastError(f"{named}: a digits teacher's file holds its tokenizer and all of its settings")
        return load_digits_teacher(path)
    stored = stored_settings(content, header, path)
    if "defaults" in header and defaults is None:
        defaults = SamplingDefaults(**header["defaults"])
    if tokenizer is not None:
        tokens_path = checkpoint_file(tokenizer)
        tokens_content, tokens_header = read_checkpoint(tokens_path)
        of_tokens = stored_settings(tokens_content, tokens_header, tokens_path)
        tokens = choose(find_weights(tokens_content), "tokenizer", tokens_path)
    elif any(one.kind and one.kind.role == "tokenizer" for one in found):
        tokens, tokens_path, of_tokens = choose(found, "tokenizer", path), path, []
    else:
        example = "vae_ch160v4096z32.pth" if network.kind.family == "var" else "vq_ds16_c2i.pt"
        needed = f"a {network.kind.family} teacher needs its tokenizer's file as the second argument"
        raise DDFastError(f"{path}: {needed} ({example}; --tokenizer)")
    assert tokens.kind is not None
    if tokens.kind.family != network.kind.family:
        raise DDFastError(f"{tokens_path} is {tokens.kind}, but {path} is {network.kind}: give this family's tokenizer")
    parts = _Parts(
        tensors=network.tensors,
        source=path,
        tokenizer=tokens.tensors,
        tokenizer_source=tokens_path,
        config=config,
        stored=stored,
        tokenizer_stored=of_tokens,
        dtype=dtype,
        defaults=defaults,
    )
    return _var_teacher(parts) if network.kind.family == "var" else _llamagen_teacher(parts)


def _named_family(found: list[Weights], family: str | None) -> Weights | None:
    """The largest set of weights where the user names the family of tensors that tell none."""
    if family is None or not found or any(one.kind for one in found):
        return None
    largest = max(found, key=lambda one: len(one.tensors))
    return dataclasses.replace(largest, kind=Kind(family, "teacher"))


def load_tokenizer(path: str | Path, *, ema: bool = False, **config: Any) -> ImageTokenizer | Tokenizer:
    """A tokenizer alone, from any file or folder that holds one.

    Args:
        path: `vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt`, `vq_ds8_c2i.pt`, a trainer's checkpoint, a
            Hugging Face folder with its config.json, a teacher's file or folder of ours, ...
        ema: the averaged weights, where the file has live ones too.
        config: `patch_nums` (VAR; default: 256 pixels' ten scales), `quant_resi`, `using_znorm`, `codebook_l2_norm`.

    Raises:
        DDFastError: as in `load_teacher`.
    """
    path = checkpoint_file(path)
    content, header = read_checkpoint(path)
    if header.get("family") == "digits":
        return load_digits_teacher(path).tokenizer
    weights = find_weights(content)
    found = choose(weights, "tokenizer", path, averaged=ema, strict=ema)
    stored = stored_settings(content, header, path)
    build = _var_tokenizer if found.kind and found.kind.family == "var" else _llamagen_tokenizer
    return build(found.tensors, path, config, stored)


def student_class(teacher: Teacher) -> type[DD1Student]:
    """The kind of DD1 student that learns from a teacher."""
    if isinstance(teacher, VARTeacher):
        return VARStudent
    return LlamaGenStudent if isinstance(teacher, LlamaGenTeacher) else TransformerStudent


def flow_network_class(teacher: Teacher) -> type[FlowNetwork]:
    """The kind of DD2 network that learns from a teacher."""
    if isinstance(teacher, VARTeacher):
        return VARFlowNetwork
    return LlamaGenFlowNetwork if isinstance(teacher, LlamaGenTeacher) else TransformerFlowNetwork


def start_student(teacher: Teacher) -> DD1Student:
    """A new DD1 student that starts from its teacher's weights."""
    return student_class(teacher).from_teacher(teacher)


def save_student(
    path: str | Path, student: Student, config: dict[str, Any], *, live: dict[str, Any] | None = None
) -> None:
    """Write a student's averaged weights, and optionally the live ones, to one safetensors file.

    Args:
        path: the file.
        student: carries the averaged weights.
        config: stored in the header: how the student was made.
        live: tensors of the weights without averaging, by the same names.
    """
    tensors = {AVERAGE + name: value for name, value in student.state_dict().items()}
    tensors |= live or {}
    method = "dd2" if isinstance(student, FlowNetwork) else "dd1"
    save_tensors(Path(path), tensors, {"method": method, "student": student.config, "split": student.split, **config})


def load_student(
    weights: str | Path, teacher: Teacher, *, ema: bool = True, dtype: torch.dtype | None = None
) -> Student:
    """A student from DD1's official file, from a file of ours (DD1 or DD2), or from the folder that holds one.

    Args:
        weights: `var-d16.pth`, `LlamaGen-DD-L.pt`, ..., in any wrapping, or `student.safetensors`, a folder with that
            file, or `torch.save(student.state_dict())`.
        teacher: from which it learnt.
        ema: the averaged weights; False: the live ones. A file with one set of weights gives these, and where that is
            not what was asked for, it is said.
        dtype: of the weights; None: as stored.

    Raises:
        DDFastError: the file is missing, damaged, unsafe or something else, or its tensors do not fit the teacher (each
            named).
    """
    path, found, header = read_students(weights)
    chosen = choose(found, "student", path, averaged=ema, strict=not ema, silent=bool(header))
    return student_from(chosen, path, header, teacher, dtype=dtype)


def read_students(weights: str | Path) -> tuple[Path, list[Weights], dict[str, Any]]:
    """A student's file, the sets of weights in it, and its header (empty where ddfast did not write it)."""
    path = Path(weights)
    path = path / STUDENT_FILE if (path / STUDENT_FILE).is_file() else checkpoint_file(path)
    content, header = read_checkpoint(path)
    return path, find_weights(content), header


def student_from(
    chosen: Weights, path: Path, header: dict[str, Any], teacher: Teacher, *, dtype: torch.dtype | None = None
) -> Student:
    """The student of one set of the weights that `read_students` found; errors as of `load_student`."""
    assert chosen.kind is not None
    if chosen.kind.family != _family_of(teacher):
        raise DDFastError(f"{path} is {chosen.kind}, but the teacher is a {type(teacher).__name__}")
    kind: type[Student] = flow_network_class(teacher) if chosen.kind.role == "network" else student_class(teacher)
    config = header["student"] if "student" in header else _student_config(chosen, teacher, path)

    def make() -> Student:
        try:
            return kind(teacher, **config)
        except (TypeError, ValueError) as error:
            raise DDFastError(f"{path} does not fit {kind.__name__}: {error}") from error

    student = build_around(
        make,
        chosen.tensors,
        path,
        derived=_VAR_DERIVED + _LLAMAGEN_DERIVED,
        dtype=dtype or _one_dtype(chosen.tensors, path),
    )
    student.split = header.get("split")
    return student.to(teacher.codebook.device)


def _family_of(teacher: Teacher) -> str:
    """The family whose students learn from a teacher; a user's own teachers have those of digits."""
    if isinstance(teacher, VARTeacher):
        return "var"
    return "llamagen" if isinstance(teacher, LlamaGenTeacher) else "digits"


def _student_config(chosen: Weights, teacher: Teacher, path: Path) -> dict[str, Any]:
    """What rebuilds a student of which there are tensors alone; what they do not tell is the teacher's."""
    tensors, kind = chosen.tensors, chosen.kind
    assert kind is not None
    try:
        return _config_in(tensors, kind, teacher, path)
    except (KeyError, IndexError) as error:
        raise DDFastError(f"{path} is not complete, {kind} though it is: {error} is missing") from error


def _config_in(tensors: Mapping[str, AnyTensor], kind: Kind, teacher: Teacher, path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if kind.role == "network":
        say(f"{path}: nothing says at which flow time its head takes the noise; 1 is assumed")
        config["head_width"] = tensors["velocity_head.input.weight"].shape[0]
        config["head_depth"] = count(tensors, r"velocity_head\.blocks\.(\d+)\.")
    if kind.family == "var":
        known = _var_sizes_in(tensors)
        if kind.role == "student":
            config["layerwise_n_d_embed"] = "layerwise_n_d_embed.0.weight" in tensors
    elif kind.family == "llamagen":
        known = _llamagen_sizes_in(tensors)
        if isinstance(teacher, LlamaGenTeacher) and known["dim"] != teacher.sizes.dim:
            heads = _LLAMAGEN_HEADS.get((known["dim"], known["n_layer"]))
            known |= {"n_head": heads, "n_kv_head": heads}
    else:
        known = {
            "width": tensors["class_embedding.weight"].shape[1],
            "depth": count(tensors, r"body\.blocks\.(\d+)\."),
        }
    return config | {name: value for name, value in known.items() if value is not None}


def _one_dtype(tensors: Mapping[str, AnyTensor], source: object) -> torch.dtype | None:
    """The widest floating-point type of a network's tensors where they have several; None where they have one.

    Raises:
        DDFastError: there is a type in which nothing is computed, such as float8.
    """
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point}
    strange = dtypes - {torch.float64, torch.float32, torch.bfloat16, torch.float16}
    if strange:
        name = str(strange.pop()).removeprefix("torch.")
        raise DDFastError(f"{source} holds {name} weights: convert them to float32, bfloat16 or float16 first")
    if len(dtypes) < 2:
        return None
    widest = functools.reduce(torch.promote_types, dtypes)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    say(f"{source} holds weights of several types ({names}): all are made {str(widest).removeprefix('torch.')}")
    return widest


_VAR_OPTIONS = {"saln": "shared_aln", "anorm": "attn_l2_norm"}
"""Settings of VAR by the names of its training script's options."""

_VAR_TOKENIZER_ALIASES = {
    "v_patch_nums": "patch_nums", "V": "num_codes", "vocab_size": "num_codes", "Cvae": "code_dim",
    "z_channels": "code_dim", "ch": "channels",
}  # fmt: skip
_VAR_TOKENIZER_SETTINGS = {
    "V", "vocab_size", "Cvae", "z_channels", "ch", "share_quant_resi", "default_qresi_counts", "quant_conv_ks",
    "quant_resi", "using_znorm", "ch_mult", "num_res_blocks",
}  # fmt: skip


def _var_tokenizer(
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
    settled = settle(found, config, stored, source, aliases=_VAR_TOKENIZER_ALIASES)
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


_LLAMAGEN_TOKENIZER_ALIASES = {
    "codebook_size": "num_codes", "codebook_embed_dim": "code_dim", "ch": "channels", "vq_ch": "channels",
}  # fmt: skip
_LLAMAGEN_TOKENIZER_SETTINGS = {
    "codebook_size", "codebook_embed_dim", "z_channels", "ch", "vq_ch", "encoder_ch_mult", "decoder_ch_mult",
    "codebook_l2_norm", "num_res_blocks",
}  # fmt: skip


def _llamagen_tokenizer(
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
    settled = settle(found, config, stored, source, aliases=_LLAMAGEN_TOKENIZER_ALIASES)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a teacher is built of.

    Attributes:
        tensors, source: the transformer's, and their file.
        tokenizer, tokenizer_source: the same of the tokenizer.
        config: what the user says.
        stored, tokenizer_stored: what the files say about themselves.
        dtype, defaults: as in `load_teacher`.
    """

    tensors: Mapping[str, AnyTensor]
    source: Path
    tokenizer: Mapping[str, AnyTensor]
    tokenizer_source: Path
    config: dict[str, Any]
    stored: list[Said]
    tokenizer_stored: list[Said]
    dtype: torch.dtype | None
    defaults: SamplingDefaults | None


def _var_sizes_in(tensors: Mapping[str, AnyTensor]) -> dict[str, Any]:
    """What a VAR network's tensors tell of its sizes, by their official names; None: nothing."""
    embed_dim, scales = tensors["word_embed.weight"].shape[0], tensors.get("blocks.0.attn.scale_mul_1H11")
    return {
        "num_classes": tensors["class_emb.weight"].shape[0] - 1, "depth": count(tensors, r"blocks\.(\d+)\."),
        "embed_dim": embed_dim, "num_heads": None if scales is None else scales.shape[1],
        "mlp_ratio": tensors["blocks.0.ffn.fc1.weight"].shape[0] / embed_dim,
        "shared_aln": "shared_ada_lin.1.weight" in tensors, "attn_l2_norm": scales is not None,
    }  # fmt: skip


def _var_teacher(parts: _Parts) -> VARTeacher:
    for_tokenizer, rest = part(parts.config, _VAR_TOKENIZER_SETTINGS)
    tensors, source = parts.tensors, parts.source
    try:
        known = _var_sizes_in(tensors)
        positions = tensors["pos_1LC"].shape[1]
    except (KeyError, IndexError) as error:
        raise DDFastError(f"{source} is no complete VAR checkpoint: {error} is missing") from error
    found = {**known, "norm_eps": None, "patch_nums": _patch_nums(tensors.get("lvl_1L"), source)}
    stored = [
        Said(where, {_VAR_OPTIONS.get(name, name): value for name, value in values.items()})
        for where, values in parts.stored
    ]
    settled = settle(found, rest, stored, source, aliases={"v_patch_nums": "patch_nums"})
    patch_nums = settled.pop("patch_nums")
    if patch_nums is None:
        if positions not in _VAR_SCALES:
            raise DDFastError(
                f"patch_nums: {source} has {positions} positions and no lvl_1L; give patch_nums=... (--patch-nums)"
            )
        patch_nums = _VAR_SCALES[positions]
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
    of_tokenizer = [_only(said, _VAR_TOKENIZER_SETTINGS) for said in (*parts.tokenizer_stored, *parts.stored)]
    given = {**for_tokenizer, "patch_nums": tuple(patch_nums)}
    tokenizer = _var_tokenizer(parts.tokenizer, parts.tokenizer_source, given, of_tokenizer)
    return _teacher(VARTeacher, tokenizer, sizes, parts, tensors["head.weight"], _VAR_DERIVED)


def _only(said: Said, names: set[str]) -> Said:
    return Said(said.where, {name: value for name, value in said.values.items() if name in names})


def _patch_nums(level: AnyTensor | None, source: object) -> tuple[int, ...] | None:
    """The scales' sides from the buffer with every position's level, int [1, N]."""
    if level is None or not level.shape.numel():
        return None
    counts = torch.bincount(read_tensor(level).flatten().long()).tolist()
    sides = tuple(math.isqrt(count) for count in counts)
    if [side**2 for side in sides] != counts:
        raise DDFastError(f"{source}: lvl_1L has levels of {counts} positions, expected squares")
    return sides


def _llamagen_sizes_in(tensors: Mapping[str, AnyTensor]) -> dict[str, Any]:
    """What a LlamaGen network's tensors tell of its sizes, by their official names."""
    return {
        "dim": tensors["output.weight"].shape[1], "n_layer": count(tensors, r"layers\.(\d+)\."),
        "ffn_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
    }  # fmt: skip


def _llamagen_teacher(parts: _Parts) -> LlamaGenTeacher:
    for_tokenizer, rest = part(parts.config, _LLAMAGEN_TOKENIZER_SETTINGS)
    tensors, source, stored = parts.tensors, parts.source, [_with_derived(said) for said in parts.stored]
    of_tokenizer = [*parts.tokenizer_stored, *(_only(said, {"codebook_l2_norm"}) for said in parts.stored)]
    tokenizer = _llamagen_tokenizer(parts.tokenizer, parts.tokenizer_source, for_tokenizer, of_tokenizer)
    rest.pop("ffn_hidden_dim_resulting", None)
    text = "cls_embedding.uncond_embedding" in tensors
    try:
        known = _llamagen_sizes_in(tensors)
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
    heads = settled["n_head"] or _LLAMAGEN_HEADS.get((dim, depth))
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
    return _teacher(LlamaGenTeacher, tokenizer, sizes, parts, tensors["output.weight"], _LLAMAGEN_DERIVED)


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


def _teacher(
    kind: Callable[..., Any],
    tokenizer: ImageTokenizer,
    sizes: VARSizes | LlamaGenSizes,
    parts: _Parts,
    head: AnyTensor,
    derived: tuple[str, ...],
) -> Any:
    """A teacher around its tensors and its finished tokenizer."""
    codes = tokenizer.codebook()
    if head.shape[0] != len(codes):
        raise DDFastError(
            f"{parts.tokenizer_source} has {len(codes)} codes, but {parts.source} models {head.shape[0]}: they do not "
            "belong together"
        )
    dtype = parts.dtype or _one_dtype(parts.tensors, parts.source)
    own = {name: value for name, value in parts.tensors.items() if not name.startswith(TOKENIZER)}
    of_tokenizer = {TOKENIZER + name: value for name, value in tokenizer.state_dict().items()}
    return build_around(
        lambda: kind(tokenizer, sizes, defaults=parts.defaults),
        own,
        parts.source,
        derived=derived,
        dtype=dtype,
        beside=of_tokenizer,
    )


def teacher_config(teacher: Teacher) -> dict[str, Any]:
    """What a teacher's file says beside its tensors, as `load_teacher` takes it: family, settings and defaults."""
    if isinstance(teacher, VARTeacher):
        family, names = "var", ["norm_eps", "num_heads"]
    elif isinstance(teacher, LlamaGenTeacher):
        family, names = "llamagen", ["n_head", "block_size", "rope_base", "norm_eps", "class_dropout_prob"]
        names.append("cls_token_num" if teacher.sizes.model_type == "t2i" else "num_classes")
    else:
        raise TypeError(f"teacher: got {type(teacher).__name__}, expected a VAR or LlamaGen teacher")
    known = vars(teacher.sizes)
    config = {**{name: known[name] for name in names}, **teacher.tokenizer.config}
    return {"family": family, "config": config, "defaults": dataclasses.asdict(teacher.defaults)}


def save_teacher(path: str | Path, teacher: Teacher) -> None:
    """Write a teacher with its tokenizer to one safetensors file that `load_teacher` reads."""
    if isinstance(teacher, DigitsTeacher):
        save_digits_teacher(teacher, Path(path))
        return
    save_tensors(Path(path), teacher.state_dict(), teacher_config(teacher))
