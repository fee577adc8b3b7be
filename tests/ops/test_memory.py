"""Peak memory of the kernels, in a fresh process each: no [tokens, V] temporary."""

import subprocess
import sys

import pytest

from ddfast.ops import dispatch

MEASURE = """
import resource, torch
from ddfast import ops
{setup}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
{small}
before = peak()
{call}
print(peak() - before)
"""

CASES = {
    "nearest_code": (
        "x, codebook = torch.randn(16384, 8), torch.randn(16384, 8)",
        "ops.nearest_code(x[:2], codebook)",
        "ops.nearest_code(x, codebook)",
        16384 * 16384 * 4,
    ),
    "codebook_posterior": (
        "x, codebook = torch.randn(2048, 8).requires_grad_(), torch.randn(16384, 8)\n"
        "log_probs = torch.randn(2048, 16384)",
        "ops.codebook_posterior(x[:2], 0.5, log_probs[:2], codebook).sum().backward()",
        "ops.codebook_posterior(x, 0.5, log_probs, codebook).sum().backward()",
        2048 * 16384 * 4,
    ),
    "sample_codes": (
        "logits, noise, codebook = torch.randn(2048, 4096), torch.randn(2048, 32), torch.randn(4096, 32)",
        "ops.sample_codes(logits[:2], noise[:2], codebook, top_k=900)",
        "ops.sample_codes(logits, noise, codebook, top_k=900)",
        2048 * 4096 * 4,
    ),
}


@pytest.mark.skipif("cpu" not in dispatch.available(), reason="the native module is not built")
@pytest.mark.parametrize("op", sorted(CASES))
def test_peak_memory(op):
    setup, small, call, matrix_bytes = CASES[op]
    script = MEASURE.format(setup=setup, small=small, call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    extra = float(done.stdout) * 2**20
    # 1 % of the matrix for the billion-byte one; at smaller sizes a megabyte of allocator noise is granted.
    assert extra < max(0.01 * matrix_bytes, 2**20)
