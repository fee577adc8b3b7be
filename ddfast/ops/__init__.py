"""Public ops: a reference in plain PyTorch each, and kernels behind one dispatch (`ddfast doctor` explains it)."""

from ddfast.ops.codebook_posterior import codebook_posterior, score, velocity
from ddfast.ops.filter_logits import filter_logits
from ddfast.ops.flow_sample import flow_sample
from ddfast.ops.nearest_code import nearest_code
from ddfast.ops.noise import noise
from ddfast.ops.sample_codes import sample_codes

__all__ = [
    "codebook_posterior",
    "filter_logits",
    "flow_sample",
    "nearest_code",
    "noise",
    "sample_codes",
    "score",
    "velocity",
]
