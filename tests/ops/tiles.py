"""One configuration for all Triton kernels that are otherwise tuned."""

import pytest


def use_tile(monkeypatch: pytest.MonkeyPatch, rows: int, codes: int) -> None:
    """With one configuration there is nothing to time."""
    triton = pytest.importorskip("triton")
    from ddfast_kernels import codebook_posterior, flow_sample, nearest_code

    tile = triton.Config({"ROWS": rows, "CODES": codes}, num_warps=4, num_stages=2)
    kernels = [nearest_code.nearest_code_kernel, flow_sample.flow_sample_kernel]
    kernels += [codebook_posterior.codebook_posterior_kernel, codebook_posterior.codebook_posterior_backward_kernel]
    for kernel in kernels:
        monkeypatch.setattr(kernel, "configs", [tile])
