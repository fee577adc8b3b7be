"""Teachers, tokenizers and students from files: official checkpoints as they are, and ddfast's own.

Family and sizes are read off the tensors; what tensors cannot tell (`n_head`, image size) is asked for by its official
name. Our own files hold the same tensors under the same names, with the settings in the header.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import (
    build_around,
    cast_floats,
    only_tensors,
    read_checkpoint,
    save_tensors,
)
from ddfast.models.digits import DigitsTeacher, load_digits_teacher
from ddfast.models.digits import save_teacher as save_digits_teacher
from ddfast.models.flow_network import FlowNetwork, TransformerFlowNetwork
from ddfast.models.llamagen import LLAMAGEN_SIZES, LlamaGenFlowNetwork, LlamaGenSizes, LlamaGenStudent, LlamaGenTeacher
from ddfast.models.protocol import SamplingDefaults, Teacher
from ddfast.models.student import DD1Student, Student, TransformerStudent
from ddfast.models.tokenizers import IMAGENET_SCALES, ImageTokenizer, LlamaGenTokenizer, VARTokenizer
from ddfast.models.var import VARFlowNetwork, VARSizes, VARStudent, VARTeacher
from ddfast.models.vqgan import LLAMAGEN_NAMING, VAR_NAMING, ConvSizes

FAMILIES = ("digits", "var", "llamagen")

STUDENT_FILE, TEACHER_FILE = "student.safetensors", "model.safetensors"

_AVERAGE = "ema."
"""Prefix of the averaged weights in a student's file, beside the live ones."""

_TOKENIZER = "tokenizer."
"""Prefix of the tokenizer's tensors in a teacher's file of ours."""

_VAR_DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")
_LLAMAGEN_DERIVED = ("freqs_cis", "causal_mask", "k_cache", "v_cache")
"""Buffers of official files that follow from the sizes: recomputed, not read."""

_LLAMAGEN_HEADS = {(sizes.dim, sizes.n_layer): sizes.n_head for sizes in LLAMAGEN_SIZES.values()}
"""n_head of the published models by (dim, n_layer): no tensor tells it."""

# Official arguments that change no output of a trained model: accepted, so that a model's own configuration can be
# passed as it is.
_WITHOUT_EFFECT = {
    "cond_drop_rate", "drop_rate", "attn_drop_rate", "drop_path_rate", "flash_if_available", "fused_if_available",
    "token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p", "initializer_range",
    "max_batch_size", "max_seq_len", "multiple_of", "ffn_dim_multiplier", "beta", "commit_loss_beta", "test_mode",
    "entropy_loss_ratio", "codebook_show_usage", "dropout", "dropout_p", "n_d_embed_enable", "in_channels",
    "double_z", "using_sa", "using_mid_sa",
}  # fmt: skip


def load_teacher(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    defaults: SamplingDefaults | None = None,
    **config: Any,
) -> Teacher:
    """A teacher from its official files, or from one file or folder of ours.

    Args:
        weights: official checkpoint (`var_d16.pth`, `c2i_L_256.pt`, ...), or what ddfast wrote.
        tokenizer: the tokenizer's checkpoint (`vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, ...); files of ours hold it.
        family: "var", "llamagen" or "digits"; None: recognised from the tensors.
        dtype: of the transformer's weights, such as `torch.bfloat16`; None: as stored. Codebook and tokenizer stay in
            float32.
        defaults: sampling settings; None: the published ones.
        config: by official names, what the tensors cannot tell: `n_head` where the size is not a published one,
            `block_size` or `image_size` (else from the file's name: c2i_L_384.pt; else 256 pixels), `rope_base`,
            `norm_eps`, `patch_nums` where the file has no `lvl_1L`, `quant_resi`, `using_znorm`. A value that
            contradicts the tensors is an error.

    Raises:
        DDFastError: a file is missing, damaged or unsafe; the family or a size cannot be told; tensors are missing,
            unexpected or of another shape (each listed); `config` has an unknown key or contradicts the tensors.
    """
    path = _teacher_file(Path(weights))
    content, header = read_checkpoint(path)
    found = family or header.get("family") or _family_of(_network_tensors(content, path))
    if found not in FAMILIES:
        raise DDFastError(f"{path}: family {found!r} is not known; known: {', '.join(FAMILIES)}")
    if found == "digits":
        if config or tokenizer is not None:
            named = ", ".join(sorted(config)) or f"tokenizer {tokenizer}"
            raise DDFastError(f"{named}: a digits teacher's file holds its tokenizer and all of its settings")
        return load_digits_teacher(path)
    config = {**header.get("config", {}), **config}
    if "defaults" in header and defaults is None:
        defaults = SamplingDefaults(**header["defaults"])
    network = _network_tensors(content, path)
    own_tokenizer = {n.removeprefix(_TOKENIZER): t for n, t in network.items() if n.startswith(_TOKENIZER)}
    if tokenizer is not None:
        tokens = tokenizer_tensors(read_checkpoint(Path(tokenizer))[0], tokenizer)
        source: object = tokenizer
    elif own_tokenizer:
        tokens, source = own_tokenizer, path
    elif isinstance(content.get("trainer"), dict) and "vae_local" in content["trainer"]:
        tokens, source = only_tensors(content["trainer"]["vae_local"]), path
    else:
        example = "vae_ch160v4096z32.pth" if found == "var" else "vq_ds16_c2i.pt"
        raise DDFastError(f"{path}: a {found} teacher needs its tokenizer's file as the second argument ({example})")
    network = {name: tensor for name, tensor in network.items() if not name.startswith(_TOKENIZER)}
    build = _var_teacher if found == "var" else _llamagen_teacher
    return build(network, path, tokens, source, config, dtype, defaults)


def load_tokenizer(path: str | Path, **config: Any) -> ImageTokenizer:
    """A tokenizer alone, from its official file.

    Args:
        path: `vae_ch160v4096z32.pth`, `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt`, `vq_ds8_c2i.pt`, ...
        config: `patch_nums` (VAR; default: 256 pixels' ten scales), `quant_resi`, `using_znorm`, `codebook_l2_norm`.

    Raises:
        DDFastError: as in `load_teacher`.
    """
    tensors = tokenizer_tensors(read_checkpoint(Path(path))[0], path)
    if "encoder.down.0.block.0.conv1.weight" in tensors:
        return _var_tokenizer(tensors, path, config)
    return _llamagen_tokenizer(tensors, path, config)


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
    tensors = {_AVERAGE + name: value for name, value in student.state_dict().items()}
    tensors |= live or {}
    method = "dd2" if isinstance(student, FlowNetwork) else "dd1"
    save_tensors(Path(path), tensors, {"method": method, "student": student.config, "split": student.split, **config})


def load_student(
    weights: str | Path, teacher: Teacher, *, ema: bool = True, dtype: torch.dtype | None = None
) -> Student:
    """A student from DD1's official file, from a file of ours (DD1 or DD2), or from the folder that holds one.

    Args:
        weights: `var-d16.pth`, `LlamaGen-DD-L.pt`, ..., or `student.safetensors`, or a folder with that file.
        teacher: from which it learnt.
        ema: the averaged weights; False: the live ones, where the file has them.
        dtype: of the weights; None: as stored.

    Raises:
        DDFastError: the file is missing, damaged or unsafe, or its tensors do not fit the teacher (each named).
    """
    path = Path(weights)
    path = path / STUDENT_FILE if path.is_dir() else path
    content, header = read_checkpoint(path)
    kind: type[Student] = student_class(teacher)
    derived: tuple[str, ...] = ()
    if "student" in header:
        config = header["student"]
        if header.get("method") == "dd2":
            kind = flow_network_class(teacher)
        tensors = {n.removeprefix(_AVERAGE): t for n, t in content.items() if n.startswith(_AVERAGE) == ema}
    else:
        tensors = student_tensors(content, ema=ema)
        if not tensors or kind is TransformerStudent:
            raise DDFastError(f"{path} is not a student's file")
        config = {}
        if kind is VARStudent:
            config = {"layerwise_n_d_embed": "layerwise_n_d_embed.0.weight" in tensors}
        derived = _VAR_DERIVED + _LLAMAGEN_DERIVED
    try:
        student = build_around(lambda: kind(teacher, **config), cast_floats(tensors, dtype), path, derived=derived)
    except TypeError as error:
        raise DDFastError(f"{path} does not fit {kind.__name__}: {error}") from error
    student.split = header.get("split")
    return student.to(teacher.codebook.device)


def student_tensors(content: dict[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """A student's tensors in an official checkpoint; empty where it holds none.

    VAR: {'trainer': {'ema_parameters', 'var_wo_ddp'}}; LlamaGen: {'ema', 'model'}.
    """
    sets = content.get("trainer", content)
    names = ("ema_parameters", "ema") if ema else ("var_wo_ddp", "model", "module", "state_dict")
    chosen: dict[str, Any] = next((sets[name] for name in names if isinstance(sets.get(name), dict)), {})
    tensors = only_tensors(chosen)
    return tensors if "final_layer_conti.linear.weight" in tensors else {}


def tokenizer_tensors(content: dict[str, Any], source: object) -> dict[str, Tensor]:
    """A tokenizer's tensors in an official checkpoint, under whichever key they are."""
    for candidate in (content, *(content.get(name) for name in ("model", "ema", "module", "state_dict"))):
        tensors = only_tensors(candidate) if isinstance(candidate, dict) else {}
        if "encoder.conv_in.weight" in tensors and "quantize.embedding.weight" in tensors:
            return tensors
    raise DDFastError(f"{source} is not a tokenizer of VAR or LlamaGen: no encoder and codebook found")


def _teacher_file(path: Path) -> Path:
    return path / TEACHER_FILE if path.is_dir() else path


def _network_tensors(content: dict[str, Any], source: object) -> dict[str, Tensor]:
    """A network's tensors in an official checkpoint, under whichever key they are."""
    trainer = content.get("trainer")
    nested = [content.get(name) for name in ("model", "module", "state_dict")]
    nested += [trainer.get("var_wo_ddp")] if isinstance(trainer, dict) else []
    for candidate in (content, *nested):
        tensors = only_tensors(candidate) if isinstance(candidate, dict) else {}
        if tensors:
            return tensors
    raise DDFastError(f"{source} holds no tensors")


def _family_of(tensors: dict[str, Tensor]) -> str | None:
    if "final_layer_conti.linear.weight" in tensors:
        return "student"
    if "pos_1LC" in tensors and "word_embed.weight" in tensors:
        return "var"
    return "llamagen" if "tok_embeddings.weight" in tensors and "output.weight" in tensors else None


def _settle(found: dict[str, Any], given: dict[str, Any], source: object, *, aliases: dict[str, str]) -> dict[str, Any]:
    """Settings from tensors and from the user: {name: value}, None where neither tells.

    Args:
        found: what the tensors say; None where they cannot.
        given: what the user says, by official names.
        source: of the tensors, for the error.
        aliases: {official name: name in `found`} where they differ.
    """
    settled = dict(found)
    for official, value in given.items():
        name = aliases.get(official, official)
        value = tuple(value) if isinstance(value, list) else value
        if name in _WITHOUT_EFFECT:
            continue
        if name not in found:
            known = ", ".join(sorted({*found, *aliases}))
            raise DDFastError(f"{official}: not a setting of {source}; known: {known}")
        if found[name] is not None and value is not None and found[name] != value:
            raise DDFastError(f"{official}: got {value!r}, but the tensors of {source} say {found[name]!r}")
        if value is not None:
            settled[name] = value
    return settled


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that `pattern` (with one group) captures among the names."""
    numbers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


_VAR_TOKENIZER_ALIASES = {
    "v_patch_nums": "patch_nums", "V": "num_codes", "vocab_size": "num_codes", "Cvae": "code_dim",
    "z_channels": "code_dim", "ch": "channels",
}  # fmt: skip


def _var_tokenizer(tensors: dict[str, Tensor], source: object, config: dict[str, Any]) -> VARTokenizer:
    """Build the tokenizer; `config` may hold every official argument of a VQVAE."""
    try:
        sizes = ConvSizes.read(tensors, VAR_NAMING)
        num_codes, code_dim = tensors["quantize.embedding.weight"].shape
        kernel = tensors["quant_conv.weight"].shape[-1]
    except (KeyError, ValueError, IndexError) as error:
        raise DDFastError(f"{source} is no complete VAR tokenizer: {error} is missing") from error
    partly = _count(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    own = _count(tensors, r"quantize\.quant_resi\.(\d+)\.")
    has_phi = partly or own or "quantize.quant_resi.qresi.weight" in tensors
    shared = partly or (0 if own else 1)
    found = {
        "patch_nums": None, "num_codes": num_codes, "code_dim": code_dim, "channels": sizes.channels,
        "share_quant_resi": shared if has_phi else None, "default_qresi_counts": None, "quant_conv_ks": kernel,
        "quant_resi": None if has_phi else 0.0, "using_znorm": None, "ch_mult": sizes.multipliers,
        "num_res_blocks": sizes.blocks,
    }  # fmt: skip
    settled = _settle(found, config, source, aliases=_VAR_TOKENIZER_ALIASES)
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
            hit_scales=0 if hits is None else len(hits),
        ),
        tensors,
        source,
    )


def _llamagen_tokenizer(tensors: dict[str, Tensor], source: object, config: dict[str, Any]) -> LlamaGenTokenizer:
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
    aliases = {"codebook_size": "num_codes", "codebook_embed_dim": "code_dim", "ch": "channels", "vq_ch": "channels"}
    settled = _settle(found, config, source, aliases=aliases)
    return build_around(
        lambda: LlamaGenTokenizer(
            num_codes=num_codes,
            code_dim=code_dim,
            sizes=sizes,
            codebook_l2_norm=settled["codebook_l2_norm"] is not False,
            usage_slots=0 if used is None else len(used),
        ),
        tensors,
        source,
    )


_VAR_TOKENIZER_SETTINGS = {
    "V", "vocab_size", "Cvae", "z_channels", "ch", "share_quant_resi", "default_qresi_counts", "quant_conv_ks",
    "quant_resi", "using_znorm", "ch_mult", "num_res_blocks",
}  # fmt: skip
_LLAMAGEN_TOKENIZER_SETTINGS = {
    "codebook_size", "codebook_embed_dim", "z_channels", "ch", "vq_ch", "encoder_ch_mult", "decoder_ch_mult",
    "codebook_l2_norm", "num_res_blocks",
}  # fmt: skip


def _part(config: dict[str, Any], names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings with one of the names, and the others."""
    mine = {name: value for name, value in config.items() if name in names}
    return mine, {name: value for name, value in config.items() if name not in names}


def _var_teacher(
    tensors: dict[str, Tensor],
    source: object,
    tokenizer_tensors: dict[str, Tensor],
    tokenizer_source: object,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    defaults: SamplingDefaults | None,
) -> VARTeacher:
    for_tokenizer, rest = _part(config, _VAR_TOKENIZER_SETTINGS)
    try:
        embed_dim = tensors["word_embed.weight"].shape[0]
        hidden = tensors["blocks.0.ffn.fc1.weight"].shape[0]
        num_classes = tensors["class_emb.weight"].shape[0] - 1
        positions = tensors["pos_1LC"].shape[1]
    except (KeyError, IndexError) as error:
        raise DDFastError(f"{source} is no complete VAR checkpoint: {error} is missing") from error
    scales = tensors.get("blocks.0.attn.scale_mul_1H11")
    found = {
        "num_classes": num_classes, "depth": _count(tensors, r"blocks\.(\d+)\."), "embed_dim": embed_dim,
        "num_heads": None if scales is None else scales.shape[1], "mlp_ratio": hidden / embed_dim, "norm_eps": None,
        "shared_aln": "shared_ada_lin.1.weight" in tensors, "attn_l2_norm": scales is not None,
        "patch_nums": _patch_nums(tensors.get("lvl_1L")),
    }  # fmt: skip
    settled = _settle(found, rest, source, aliases={"v_patch_nums": "patch_nums"})
    patch_nums = settled.pop("patch_nums")
    if patch_nums is None:
        if positions != sum(side**2 for side in IMAGENET_SCALES):
            raise DDFastError(
                f"patch_nums: {source} has {positions} positions and no lvl_1L; give patch_nums=... (--patch-nums)"
            )
        patch_nums = IMAGENET_SCALES
    if settled["num_heads"] is None:  # officially, and without normalised attention nothing else tells
        settled["num_heads"] = max(embed_dim // 64, 1)
    sizes = VARSizes(**{name: value for name, value in settled.items() if value is not None})
    tokenizer = _var_tokenizer(tokenizer_tensors, tokenizer_source, {**for_tokenizer, "patch_nums": tuple(patch_nums)})
    return _teacher(VARTeacher, tokenizer, sizes, tensors, source, _VAR_DERIVED, dtype, defaults)


def _patch_nums(level: Tensor | None) -> tuple[int, ...] | None:
    """The scales' sides from the buffer with every position's level, int [1, N]."""
    if level is None or not level.numel():
        return None
    counts = torch.bincount(level.flatten().long())
    return tuple(round(int(count) ** 0.5) for count in counts)


def _llamagen_teacher(
    tensors: dict[str, Tensor],
    source: Path,
    tokenizer_tensors: dict[str, Tensor],
    tokenizer_source: object,
    config: dict[str, Any],
    dtype: torch.dtype | None,
    defaults: SamplingDefaults | None,
) -> LlamaGenTeacher:
    for_tokenizer, rest = _part(config, _LLAMAGEN_TOKENIZER_SETTINGS)
    tokenizer = _llamagen_tokenizer(tokenizer_tensors, tokenizer_source, for_tokenizer)
    image_size = rest.pop("image_size", None)
    rest.pop("ffn_hidden_dim_resulting", None)
    text = "cls_embedding.uncond_embedding" in tensors
    try:
        num_codes, dim = tensors["tok_embeddings.weight"].shape
        qkv = tensors["layers.0.attention.wqkv.weight"].shape[0]
        ffn_dim = tensors["layers.0.feed_forward.w1.weight"].shape[0]
        condition = tensors["cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"].shape
    except (KeyError, ValueError) as error:
        raise DDFastError(f"{source} is no complete LlamaGen checkpoint: {error} is missing") from error
    depth = _count(tensors, r"layers\.(\d+)\.")
    labels = condition[0] - (rest.get("class_dropout_prob") != 0)  # the last row stands for "no condition"
    found = {
        "dim": dim, "n_layer": depth, "n_head": None, "n_kv_head": None, "ffn_dim": ffn_dim, "vocab_size": num_codes,
        "block_size": None, "model_type": "t2i" if text else "c2i", "num_classes": None if text else labels,
        "cls_token_num": condition[0] if text else 1, "caption_dim": condition[1] if text else None,
        "rope_base": None, "norm_eps": None, "class_dropout_prob": None,
    }  # fmt: skip
    settled = _settle(found, rest, source, aliases={"ffn_hidden_dim": "ffn_dim"})
    del settled["vocab_size"]
    heads = settled["n_head"] or _LLAMAGEN_HEADS.get((dim, depth))
    if heads is None or dim % heads:
        raise DDFastError(
            f"n_head: {source} (dim {dim}, {depth} layers) is no published size; give n_head=... (--n-head)"
        )
    kv_heads, odd = divmod(qkv - dim, 2 * (dim // heads))
    if odd or kv_heads < 1 or settled["n_kv_head"] not in (None, kv_heads):
        raise DDFastError(f"n_head: {heads} heads of {dim // heads} do not fit wqkv's {qkv} rows in {source}")
    if settled["block_size"] is None:
        named = re.search(r"_(256|384|512)(?!\d)", source.name)
        side = (image_size or (int(named[1]) if named else 256)) // tokenizer.downsampling
        settled["block_size"] = side * side
    settled |= {"n_head": heads, "n_kv_head": kv_heads}
    sizes = LlamaGenSizes(**{name: value for name, value in settled.items() if value is not None})
    return _teacher(LlamaGenTeacher, tokenizer, sizes, tensors, source, _LLAMAGEN_DERIVED, dtype, defaults)


def _teacher(
    kind: Callable[..., Any],
    tokenizer: ImageTokenizer,
    sizes: VARSizes | LlamaGenSizes,
    tensors: dict[str, Tensor],
    source: object,
    derived: tuple[str, ...],
    dtype: torch.dtype | None,
    defaults: SamplingDefaults | None,
) -> Any:
    """A teacher around its tensors and its finished tokenizer."""
    whole = {
        **cast_floats(tensors, dtype),
        **{_TOKENIZER + name: value for name, value in tokenizer.state_dict().items()},
    }
    return build_around(lambda: kind(tokenizer, sizes, defaults=defaults), whole, source, derived=derived)


def teacher_config(teacher: Teacher) -> dict[str, Any]:
    """What a teacher's file says beside its tensors, as `load_teacher` takes it: family, settings and defaults."""
    if isinstance(teacher, VARTeacher):
        family, known = "var", {"norm_eps": teacher.sizes.norm_eps, "num_heads": teacher.sizes.num_heads}
    elif isinstance(teacher, LlamaGenTeacher):
        family, known = "llamagen", dict(vars(teacher.sizes))
        known = {name: known[name] for name in ("n_head", "block_size", "rope_base", "norm_eps", "class_dropout_prob")}
    else:
        raise TypeError(f"teacher: got {type(teacher).__name__}, expected a VAR or LlamaGen teacher")
    config = {**known, **teacher.tokenizer.config}
    return {"family": family, "config": config, "defaults": dataclasses.asdict(teacher.defaults)}


def save_teacher(path: str | Path, teacher: Teacher) -> None:
    """Write a teacher with its tokenizer to one safetensors file that `load_teacher` reads."""
    if isinstance(teacher, DigitsTeacher):
        save_digits_teacher(teacher, Path(path))
        return
    save_tensors(Path(path), teacher.state_dict(), teacher_config(teacher))
