"""Public ops: a reference in plain PyTorch each, and kernels behind one dispatch (`ddfast doctor` explains it)."""

from ddfast.ops.activate import activate
from ddfast.ops.add_norm import add_norm
from ddfast.ops.append_normed import append_normed
from ddfast.ops.codebook_posterior import codebook_posterior, score, velocity
from ddfast.ops.decode_attention import decode_attention
from ddfast.ops.draw_codes import draw_codes
from ddfast.ops.filter_logits import filter_logits
from ddfast.ops.flow_sample import flow_sample
from ddfast.ops.nearest_code import nearest_code
from ddfast.ops.noise import noise
from ddfast.ops.norm_linear import norm_linear
from ddfast.ops.sample_codes import sample_codes

__all__ = [
    "activate",
    "add_norm",
    "append_normed",
    "codebook_posterior",
    "decode_attention",
    "draw_codes",
    "filter_logits",
    "flow_sample",
    "nearest_code",
    "noise",
    "norm_linear",
    "sample_codes",
    "score",
    "velocity",
]
