"""The official repositories' own code, from a checkout that the user points at; nothing of it is kept here."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ddfast.models.llamagen import LlamaGenTeacher
from ddfast.models.var import VARTeacher


@contextlib.contextmanager
def _importing(path: Path) -> Iterator[None]:
    """Import from `path` first, and forget its modules afterwards: both repositories have a `models` or `utils`."""
    known = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the constructors print
            yield
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - known:
            if getattr(sys.modules[name], "__file__", None) and str(path) in str(sys.modules[name].__file__):
                del sys.modules[name]


def official_var(path: Path, teacher: VARTeacher) -> Callable[[Tensor, Tensor], Tensor]:
    """(labels, codes) -> logits by FoundationVision/VAR at `path`, with the teacher's weights."""
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
    network.eval()
    sides = [side**2 for side in tokenizer.patch_nums]

    def logits(labels: Tensor, codes: Tensor) -> Tensor:
        return network(labels, vae.quantize.idxBl_to_var_input(list(codes.split(sides, dim=1))))

    return logits


def official_llamagen(path: Path, teacher: LlamaGenTeacher) -> Callable[[Tensor, Tensor], Tensor]:
    """(labels, codes) -> logits by FoundationVision/LlamaGen at `path`, with the teacher's weights."""
    sizes = teacher.sizes
    with _importing(path):
        gpt = importlib.import_module("autoregressive.models.gpt")
        network = gpt.Transformer(
            gpt.ModelArgs(
                dim=sizes.dim, n_layer=sizes.n_layer, n_head=sizes.n_head, vocab_size=teacher.num_codes,
                block_size=sizes.block_size, num_classes=sizes.num_classes,
            )
        )  # fmt: skip
    network.load_state_dict({name: teacher.state_dict()[name] for name in network.state_dict()})
    network.eval()
    positions = torch.arange(sizes.block_size)

    def logits(labels: Tensor, codes: Tensor) -> Tensor:
        return network(codes[:, :-1], labels, input_pos=positions)[0]

    return logits
