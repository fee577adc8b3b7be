"""Every Triton kernel becomes machine code for GPUs that this machine need not have."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, "90", "80", "100", "120"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(kernels):
    names = {"noise", "filter_logits", "nearest_code", "codebook_posterior", "codebook_posterior_backward"}
    names |= {"flow_sample", "sample_codes", "draw_codes", "decode_attention", "decode_attention_merge"}
    names |= {"add_norm", "append_normed", "activate", "norm_linear"}
    for architecture in (80, 90):
        assert {kernel["name"] for kernel in kernels if kernel["sm"] == architecture} == names


def test_hot_kernels_do_not_spill(kernels):
    """Every line of the table of tiles, on every generation of GPU, and what else is launched at the papers' sizes."""
    assert [kernel for kernel in kernels if kernel["hot"] and kernel["STACK"]] == []


def test_shared_memory_is_there(kernels):
    assert max(kernel["shared"] for kernel in kernels) <= 99 * 1024  # of sm_86 and sm_89, the smallest


DEPENDENT = {
    "activate", "add_norm", "append_normed", "decode_attention", "decode_attention_merge", "draw_codes", "norm_linear"
}  # fmt: skip


def test_what_begins_early_waits_before_it_reads_or_writes(kernels):
    """A step's kernels, where GPUs can; no other, and none elsewhere."""
    for kernel in kernels:
        assert kernel["waits"] == (True if kernel["sm"] == 90 and kernel["name"] in DEPENDENT else None), kernel


def test_a_row_of_norm_linear_is_summed_alike_whatever_others_there_are(kernels):
    """Elements of a sum are shared out among threads in the same way, so the codes of a step know no batch."""
    orders: dict[str, list] = {}
    for kernel in kernels:
        if kernel["name"] == "norm_linear":
            layer = {name: kernel[name] for name in ("sm", "NORM", "ACTIVATION", "width", "OUTPUTS", "type")}
            orders.setdefault(str(layer), []).append(kernel["order"])
    assert sum(len(found) == 3 for found in orders.values()) > 10
    assert all(found == found[:1] * len(found) for found in orders.values())


def test_noise_is_not_fused(kernels):
    """Products and sums in float64 round twice, as on the host: the same bits everywhere."""
    assert not any(kernel["fma_f64"] for kernel in kernels if kernel["name"] == "noise")
