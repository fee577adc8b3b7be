"""The official repositories' own code, from a checkout that the user points at; nothing of it is kept here."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddfast.models.llamagen.network import LlamaGenTeacher
from ddfast.models.protocol import Teacher
from ddfast.models.var.network import VARTeacher


def _quietly() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())


@contextlib.contextmanager
def _importing(path: Path) -> Iterator[None]:
    """Import from `path` first, and forget its modules afterwards: both repositories have a `models` or `utils`."""
    known = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        with _quietly():  # the constructors print
            yield
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - known:
            if getattr(sys.modules[name], "__file__", None) and str(path) in str(sys.modules[name].__file__):
                del sys.modules[name]


@dataclass(frozen=True)
class Official:
    """A teacher's weights in the code of its authors.

    Attributes:
        logits: (labels [B], codes [B, N]) -> [B, N, V], teacher-forced.
        generate: (labels [B], *, sampler="multinomial" | "greedy", stop=None) -> codes [B, N], by the teacher's
            defaults, images left undecoded; VAR's decodes all tokens whatever `stop` says.
    """

    logits: Callable[[Tensor, Tensor], Tensor]
    generate: Callable[..., Tensor]


def official_var(path: Path, teacher: VARTeacher) -> Official:
    """FoundationVision/VAR at `path`. On a GPU under autocast and with weights in float32, as its script has it."""
    sizes, tokenizer = teacher.sizes, teacher.tokenizer
    with _importing(path):
        models = importlib.import_module("models")
        vae = models.VQVAE(
            vocab_size=teacher.num_codes, z_channels=teacher.code_dim, ch=tokenizer.sizes.channels,
            v_patch_nums=tokenizer.patch_nums,
        )  # fmt: skip
        network = models.VAR(
            vae_local=vae, num_classes=sizes.num_classes, depth=sizes.depth, embed_dim=sizes.embed_dim,
            num_heads=sizes.num_heads, attn_l2_norm=sizes.attn_l2_norm, cond_drop_rate=0.0,
            patch_nums=tokenizer.patch_nums,
        )  # fmt: skip
    vae.load_state_dict(tokenizer.state_dict())
    state = network.state_dict()
    network.load_state_dict({name: teacher.state_dict().get(name, value) for name, value in state.items()})
    device = teacher.codebook.device
    network.to(device).eval()
    vae.to(device)
    sides = [side**2 for side in tokenizer.patch_nums]
    vae.fhat_to_img = lambda f_hat: f_hat  # image decoding is timed on its own
    drawn: list[Tensor] = []
    vae.quantize.embedding.register_forward_pre_hook(lambda _, arguments: drawn.append(arguments[0]))

    def logits(labels: Tensor, codes: Tensor) -> Tensor:
        return network(labels, vae.quantize.idxBl_to_var_input(list(codes.split(sides, dim=1))))

    def generate(labels: Tensor, *, sampler: str = "multinomial", stop: int | None = None) -> Tensor:
        drawn.clear()
        reduced = teacher.head.weight.dtype
        with torch.autocast(device.type, reduced, enabled=reduced != torch.float32), _quietly():
            network.autoregressive_infer_cfg(
                len(labels), labels, cfg=teacher.defaults.cfg_scale, **_filters(teacher, sampler)
            )
        return torch.cat(drawn, dim=1)

    return Official(logits, generate)


def official_llamagen(path: Path, teacher: LlamaGenTeacher) -> Official:
    """FoundationVision/LlamaGen at `path`, weights in the teacher's precision, as its script has it."""
    sizes = teacher.sizes
    with _importing(path):
        gpt = importlib.import_module("autoregressive.models.gpt")
        script = importlib.import_module("autoregressive.models.generate")
        network = gpt.Transformer(
            gpt.ModelArgs(
                dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, vocab_size=teacher.num_codes,
                block_size=sizes.block_size, num_classes=sizes.num_classes,
            )
        )  # fmt: skip
    network.load_state_dict({name: teacher.state_dict()[name] for name in network.state_dict()})
    device = teacher.codebook.device
    network.to(device, teacher.output.weight.dtype).eval()
    positions = torch.arange(sizes.block_size)

    def logits(labels: Tensor, codes: Tensor) -> Tensor:
        return network(codes[:, :-1], labels, input_pos=positions)[0]

    def generate(labels: Tensor, *, sampler: str = "multinomial", stop: int | None = None) -> Tensor:
        settings = {"cfg_scale": teacher.defaults.cfg_scale, "temperature": teacher.defaults.temperature}
        return script.generate(
            network, labels, stop or teacher.num_tokens, **settings, **_filters(teacher, sampler)
        ).long()

    return Official(logits, generate)


def _filters(teacher: Teacher, sampler: str) -> dict[str, Any]:
    """Greedy decoding is the first of one."""
    return {"top_k": 1 if sampler == "greedy" else teacher.defaults.top_k, "top_p": teacher.defaults.top_p}


PEERS = {"var": official_var, "llamagen": official_llamagen}
"""Official code by a recipe's family: its name up to the first dash."""
