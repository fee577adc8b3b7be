"""draw_codes on the emulator."""

import math

import numpy as np
import pytest
import torch
from emulation import guided_rows

from ddfast.ops.draw_codes import draw_codes_reference
from ddfast.ops.filter_logits import filter_logits_reference

NEARLY_ONE = 1 - 2.0**-24


def assert_drawn(emulator, logits, uniform, cluster=0, **settings):
    """The codes of the reference, or a neighbour in its running sum where a number is within rounding of a boundary."""
    codes = emulator.draw_codes(logits, uniform, cluster, **settings)
    log_probs = filter_logits_reference(logits, **settings)
    assert ((codes >= 0) & (codes < logits.shape[1])).all()
    mass = log_probs.double().exp().cumsum(-1)
    goal = uniform.double() * mass[:, -1]
    before = mass.gather(1, (codes[:, None] - 1).clamp(min=0))[:, 0].masked_fill(codes == 0, 0)
    passed = mass.gather(1, codes[:, None])[:, 0]
    assert (log_probs.gather(1, codes[:, None]) > -math.inf).all()
    assert ((before <= goal + 5e-7) & (passed >= goal - 5e-7)).all()
    exact = draw_codes_reference(log_probs, uniform)
    clear = (mass - goal[:, None]).abs().amin(1) > 5e-7
    clear |= uniform == 0
    assert torch.equal(codes[clear], exact[clear])
    return codes


def numbers(rows: int) -> torch.Tensor:
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    uniform[: min(rows, 3)] = torch.tensor([0.0, NEARLY_ONE, 2.0**-24])[:rows]
    return uniform


@pytest.mark.parametrize("cluster", [0, 1, 2, 4])
@pytest.mark.parametrize("num_codes", [1, 2, 33, 700, 4095, 4100])
@pytest.mark.parametrize(
    ("dtype", "ties"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_against_the_reference(emulator, cluster, num_codes, dtype, ties):
    logits = 3 * torch.randn(5, num_codes, generator=torch.Generator().manual_seed(num_codes))
    logits = ((logits * 2).round() / 2 if ties else logits).to(dtype)
    emulator.configure(seed=num_codes)
    for top_k, top_p, temperature in [(0, 1.0, 1.0), (1, 1.0, 0.3), (5, 0.5, 1.0), (300, 0.9, 2.5), (0, 0.02, 1.0)]:
        assert_drawn(emulator, logits, numbers(5), cluster, top_k=top_k, top_p=top_p, temperature=temperature)
