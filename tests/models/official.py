"""Small networks in the official layouts, for options that tests/golden has no case of."""

import torch
from torch import Tensor

from ddfast.config import DigitsTeacherConfig, DigitsTokenizerConfig
from ddfast.models.digits.network import DigitsTeacher
from ddfast.models.llamagen.network import LlamaGenSizes, LlamaGenTeacher
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.loading import untrained_teacher
from ddfast.models.var.network import VARSizes, VARStudent, VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer
from ddfast.models.vqgan import ConvSizes
from ddfast.recipes import get_recipe


def randomised(module: torch.nn.Module, std: float = 0.15) -> torch.nn.Module:
    """The module with weights large enough that outputs depend visibly on every input."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    getattr(module, "derive_buffers", lambda: None)()
    return module.eval().requires_grad_(False)


def var_teacher_like(*, depth: int = 2, **options: bool) -> VARTeacher:
    """VAR of three scales (14 tokens), 16 codes."""
    torch.manual_seed(0)
    sizes = ConvSizes(channels=32, multipliers=(1, 1), blocks=1, latent_channels=4)
    tokenizer = VARTokenizer(patch_nums=(1, 2, 3), num_codes=16, code_dim=4, sizes=sizes)
    network = VARSizes(num_classes=5, depth=depth, embed_dim=128, num_heads=2, **options)
    return randomised(VARTeacher(tokenizer, network))


def var_student_tensors(teacher: VARTeacher, *, layerwise: bool) -> dict[str, Tensor]:
    """Random tensors of a student, by their official names."""
    torch.manual_seed(0)
    return dict(randomised(VARStudent(teacher, layerwise_n_d_embed=layerwise), 0.1).state_dict())


def llamagen_teacher_like(**options: object) -> LlamaGenTeacher:
    """LlamaGen with 9 image tokens, 16 codes."""
    torch.manual_seed(0)
    sizes = ConvSizes(channels=32, multipliers=(1, 1), blocks=1, latent_channels=32)
    tokenizer = LlamaGenTokenizer(num_codes=16, code_dim=4, sizes=sizes, usage_slots=8)
    settings = {"dim": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "ffn_dim": 96, "block_size": 9, "num_classes": 5}
    network = LlamaGenSizes(**{**settings, "caption_dim": 12, **options})
    return randomised(LlamaGenTeacher(tokenizer, network))


def digits_like() -> DigitsTeacher:
    """A digits teacher of one small layer, with random weights."""
    torch.manual_seed(0)
    config = get_recipe("digits")
    assert isinstance(config.teacher, DigitsTeacherConfig) and isinstance(config.tokenizer, DigitsTokenizerConfig)
    config.teacher.width, config.teacher.depth = 32, 1
    return untrained_teacher(config)
