import math

import pytest
import torch
from scipy.stats import kstest

import ddfast
from ddfast.ops import dispatch
from ddfast.ops.noise import _philox


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """Published test vectors of Philox 4x32-10."""
    assert [int(word) for word in _philox([torch.tensor(c) for c in counter], key)] == words


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (257,)])
def test_backends_agree_bit_for_bit(seed, shape):
    index = torch.tensor([[0, 1, 2**31], [2**33 + 7, 5, 2**62]])
    reference = ddfast.noise(seed, index, shape, backend="reference")
    for name in dispatch.available():
        assert torch.equal(ddfast.noise(seed, index, shape, backend=name), reference)


def test_a_sample_depends_on_seed_and_index_alone(backend):
    batch = ddfast.noise(3, torch.arange(100), (7, 3), backend=backend)
    assert torch.equal(batch[41], ddfast.noise(3, 41, (7, 3), backend=backend))
    assert torch.equal(batch.flatten(1)[:, :9], ddfast.noise(3, torch.arange(100), (9,), backend=backend))
    assert not torch.equal(batch[41], ddfast.noise(4, 41, (7, 3), backend=backend))


def test_is_standard_normal(backend, interpreted):
    if interpreted:  # slow; the same bits have the same distribution
        some = ddfast.noise(5, torch.arange(100), (101,), backend=backend)
        assert torch.equal(some, ddfast.noise(5, torch.arange(100), (101,), backend="reference"))
        return
    values = ddfast.noise(5, torch.arange(2000), (101,), backend=backend)
    assert values.isfinite().all()
    assert kstest(values.flatten().double().numpy(), "norm").pvalue > 1e-3
    columns = torch.corrcoef(values.T) - torch.eye(101)
    assert columns.abs().max() < 6 / math.sqrt(2000)


def test_errors():
    with pytest.raises(ValueError, match="seed: got -1"):
        ddfast.noise(-1, 0, (2,))
    with pytest.raises(ValueError, match="shape: got"):
        ddfast.noise(0, 0, (-2,))
    with pytest.raises(TypeError, match="index: got dtype"):
        ddfast.noise(0, torch.ones(2), (2,))
    with pytest.raises(TypeError, match="index: got str"):
        ddfast.noise(0, "a", (2,))
