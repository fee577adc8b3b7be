"""codebook_posterior, forward and backward, at the papers' shapes.

Floor per token: forward 4 K d FLOP and K exponentials, backward 6 K d FLOP and K exponentials, K the codes kept, after
one pass over V log-probabilities each.
"""

import pytest
import torch
from compare import side_by_side
from shapes import SHAPES, Shape

from ddfast.ops import codebook_posterior, filter_logits
from ddfast.ops.codebook_posterior import codebook_posterior_reference


@pytest.mark.parametrize("filtered", [True, False], ids=["filtered", "all-codes"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_forward_and_backward(benchmark, shape: Shape, filtered: bool):
    codebook, noise = shape.codebook(), shape.noise()
    log_probs = filter_logits(shape.logits(codebook), **(shape.filters if filtered else {}))
    t = torch.linspace(0.02, 1.0, shape.tokens)
    x = ((1 - t[:, None]) * codebook[: shape.tokens] + t[:, None] * noise).requires_grad_()
    upstream = torch.randn_like(x)

    def with_gradient(posterior):
        return torch.autograd.grad(posterior(x, t, log_probs, codebook), x, upstream)[0]

    def reference(*arguments):
        return codebook_posterior_reference(*arguments)[0]

    compiled = torch.compile(reference)
    ours, eagers = with_gradient(codebook_posterior), with_gradient(reference)
    assert torch.nn.functional.cosine_similarity(ours, eagers, dim=-1).median() > 0.9999
    side_by_side(
        benchmark,
        {
            "ddfast": lambda: with_gradient(codebook_posterior),
            "eager": lambda: with_gradient(reference),
            "torch.compile": lambda: with_gradient(compiled),
        },
        kept_codes=float((log_probs > -torch.inf).sum(-1).double().mean()),
    )
