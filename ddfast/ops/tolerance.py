"""How far a kernel may be from the reference: what tests ask, and what a GPU is verified by before a kernel runs."""

from __future__ import annotations

import torch

TOLERANCE: dict[tuple[str, torch.dtype], float] = {
    # (op, dtype): absolute tolerance for inputs of order one.
    ("filter_logits", torch.float32): 2e-5,
    ("filter_logits", torch.bfloat16): 2e-5,
    ("filter_logits", torch.float16): 2e-5,
    ("codebook_posterior", torch.float32): 1e-4,
    ("codebook_posterior", torch.bfloat16): 2e-2,
    ("codebook_posterior", torch.float16): 2e-3,
    ("decode_attention", torch.float32): 5e-6,
    ("decode_attention", torch.bfloat16): 2e-2,  # twice its rounding: Triton's interpreter truncates
    ("decode_attention", torch.float16): 2e-3,
    ("add_norm", torch.float32): 2e-6,
    ("add_norm", torch.bfloat16): 4e-2,
    ("add_norm", torch.float16): 5e-3,
    ("add_norm on a GPU", torch.float32): 1e-5,  # whose reciprocal roots and quotients are approximate
    ("add_norm on a GPU", torch.bfloat16): 4e-2,
    ("add_norm on a GPU", torch.float16): 5e-3,
    ("norm_linear", torch.float32): 2e-6,
    ("norm_linear", torch.bfloat16): 4e-2,  # twice what it is: Triton's interpreter truncates
    ("norm_linear", torch.float16): 3e-3,
    ("norm_linear on a GPU", torch.float32): 2e-5,
    ("norm_linear on a GPU", torch.bfloat16): 4e-2,
    ("norm_linear on a GPU", torch.float16): 5e-3,
    ("append_normed", torch.float32): 1e-6,
    ("append_normed", torch.bfloat16): 8e-3,
    ("append_normed", torch.float16): 1e-3,
    ("activate", torch.float32): 1e-6,
    ("activate", torch.bfloat16): 8e-3,
    ("activate", torch.float16): 1e-3,
    ("activate on a GPU", torch.float32): 2e-6,  # 1 + tanh, PyTorch's float32, is at 1.1e-6 on a CPU already
    ("activate on a GPU", torch.bfloat16): 8e-3,
    ("activate on a GPU", torch.float16): 1e-3,
}
