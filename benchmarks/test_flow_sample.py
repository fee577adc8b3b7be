"""filter + flow at the papers' shapes: `sample_codes`, and `flow_sample` on filtered log-probabilities.

Floor per token: evaluations x (4 K d FLOP + K exponentials), K the codes kept, after one pass over V logits.
The eager and compiled providers run the shipped reference: the same solver and number of steps, on all V codes.
"""

import pytest
import torch
from compare import side_by_side
from shapes import SHAPES, Shape

from ddfast.ops import filter_logits, flow_sample, sample_codes
from ddfast.ops.filter_logits import filter_logits_reference
from ddfast.ops.flow_sample import DEFAULT_SOLVER, DEFAULT_STEPS, flow_sample_reference


def eager(logits, noise, codebook, top_k=0, top_p=1.0):
    log_probs = filter_logits_reference(logits, top_k=top_k, top_p=top_p)
    return flow_sample_reference(log_probs, noise, codebook, DEFAULT_STEPS, DEFAULT_SOLVER)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_sample_codes(benchmark, shape: Shape):
    codebook, noise = shape.codebook(), shape.noise()
    logits = shape.logits(codebook)
    compiled = torch.compile(eager)
    ours, _ = sample_codes(logits, noise, codebook, **shape.filters)
    for other in (eager, compiled):
        assert (other(logits, noise, codebook, **shape.filters) == ours).double().mean() > 0.97
    side_by_side(
        benchmark,
        {
            "ddfast": lambda: sample_codes(logits, noise, codebook, **shape.filters),
            "eager": lambda: eager(logits, noise, codebook, **shape.filters),
            "torch.compile": lambda: compiled(logits, noise, codebook, **shape.filters),
        },
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_flow_sample(benchmark, shape: Shape):
    codebook, noise = shape.codebook(), shape.noise()
    log_probs = filter_logits(shape.logits(codebook), **shape.filters)
    side_by_side(
        benchmark,
        {
            "ddfast": lambda: flow_sample(log_probs, noise, codebook),
            "eager": lambda: flow_sample_reference(log_probs, noise, codebook, DEFAULT_STEPS, DEFAULT_SOLVER),
        },
        kept_codes=float((log_probs > -torch.inf).sum(-1).double().mean()),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_filter_logits(benchmark, shape: Shape):
    logits = shape.logits(shape.codebook())
    side_by_side(
        benchmark,
        {
            "ddfast": lambda: filter_logits(logits, **shape.filters),
            "eager": lambda: filter_logits_reference(logits, **shape.filters),
        },
    )
