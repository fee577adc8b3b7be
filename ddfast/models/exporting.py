"""Teachers and students in the files of the official repositories, which load there with `strict=True`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.errors import DDFastError
from ddfast.files import write_atomically
from ddfast.models.attention import block_mask, group_levels, level_mask
from ddfast.models.checkpoint import storable
from ddfast.models.llamagen import LLAMAGEN_SIZES, LlamaGenStudent, LlamaGenTeacher
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.models.tokenizers import IMAGENET_SCALES
from ddfast.models.var import VARStudent, VARTeacher


def export_teacher(teacher: Teacher, weights: Path, tokenizer: Path) -> None:
    """Write a VAR or LlamaGen teacher and its tokenizer as two official checkpoints.

    Raises:
        DDFastError: the teacher is of another family, which has no official layout.
    """
    if isinstance(teacher, VARTeacher):
        levels = group_levels(teacher.groups)
        mask = block_mask(teacher.groups)
        assert mask is not None
        buffers = {"lvl_1L": levels[None], "attn_bias_for_masking": _bias(mask)}
        _save(weights, {**_network(teacher), **buffers, **_zero_biases(teacher)})
        _save(tokenizer, storable(teacher.tokenizer.state_dict()))
    elif isinstance(teacher, LlamaGenTeacher):
        _save(weights, {"model": _network(teacher)})
        _save(tokenizer, {"model": storable(teacher.tokenizer.state_dict())})
    else:
        raise DDFastError(f"{type(teacher).__name__} has no official layout; only VAR and LlamaGen have")


def export_student(student: Student, weights: Path, *, live: dict[str, Tensor] | None = None) -> None:
    """Write a VAR or LlamaGen student as an official checkpoint.

    Args:
        student: carries the averaged weights.
        weights: the file.
        live: the weights without averaging; None: the averaged ones stand in both places.

    Raises:
        DDFastError: the student is of another family, which has no official layout.
    """
    averaged = storable(student.state_dict())
    current = averaged if live is None else storable(live)
    if isinstance(student, VARStudent):
        groups = (1, *student.groups)
        mask = level_mask(groups)
        assert mask is not None
        buffers = {"lvl_1L": group_levels(groups)[None], "attn_bias_for_masking": _bias(mask)}
        whole = {**current, **buffers, **_zero_biases(student)}
        _save(weights, {"trainer": {"ema_parameters": averaged, "var_wo_ddp": whole}})
    elif isinstance(student, LlamaGenStudent):
        _save(weights, {"ema": averaged, "model": current})
    else:
        raise DDFastError(f"{type(student).__name__} has no official layout; only VAR's and LlamaGen's have")


def untold(teacher: Teacher) -> list[str]:
    """What official checkpoints have no place for, and what the official code must be told to run this teacher."""
    usual: dict[str, Any]
    if isinstance(teacher, VARTeacher):
        usual = {"norm_eps": 1e-6, "num_heads": teacher.sizes.depth, "quant_resi": 0.5, "using_znorm": False}
        usual |= {"patch_nums": list(IMAGENET_SCALES), "shared_aln": False, "attn_l2_norm": True}
    elif isinstance(teacher, LlamaGenTeacher):
        published = LLAMAGEN_SIZES["L"]
        names = ("block_size", "rope_base", "norm_eps", "class_dropout_prob", "num_classes")
        usual = {name: getattr(published, name) for name in names} | {"codebook_l2_norm": True}
    else:
        return []
    own = {**vars(teacher.sizes), **teacher.tokenizer.config}
    other = [f"{name}={own[name]}" for name, value in usual.items() if own[name] != value]
    if not other:
        return []
    return [f"official files do not say it, so tell the official code (and ddfast): {', '.join(other)}"]


def _network(teacher: Teacher) -> dict[str, Tensor]:
    """The transformer's tensors: all but the tokenizer's."""
    tensors = {n: value for n, value in teacher.state_dict().items() if not n.startswith("tokenizer.")}
    return storable(tensors)


def _zero_biases(network: VARTeacher | VARStudent) -> dict[str, Tensor]:
    """The official buffer that stands for the key's missing bias."""
    zeros = torch.zeros(network.sizes.embed_dim, dtype=torch.float32)
    return {f"blocks.{number}.attn.zero_k_bias": zeros.clone() for number in range(network.sizes.depth)}


def _bias(mask: Tensor) -> Tensor:
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_fill(~mask, -torch.inf)[None, None]


def _save(path: Path, content: dict[str, Any]) -> None:
    write_atomically(Path(path), lambda file: torch.save(content, file))
