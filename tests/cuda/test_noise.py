"""noise on the emulator: bit for bit the CPU's."""

import ctypes

import pytest
import torch
from emulation import NoiseArguments

from ddfast.ops import native
from ddfast.ops.noise import noise_reference


@pytest.fixture(params=["reference", "cpu"])
def expected(request):
    """(seed, index, per_sample) -> the noise that every backend gives."""
    if request.param == "reference":
        return lambda seed, index, per_sample: noise_reference(seed, index, [per_sample])
    if native.cpu is None:
        pytest.skip(native.cpu_reason)

    def run(seed, index, per_sample):
        out = torch.empty(len(index), per_sample)
        native.cpu.noise(seed, index.data_ptr(), len(index), per_sample, out.data_ptr(), 1)
        return out

    return run


# Samples of 1 to 4 and 5 elements, a block's last thread, one more than a block, and several samples to a block.
@pytest.mark.parametrize("per_sample", [1, 2, 3, 4, 5, 7, 257, 1024, 1025, 4099])
@pytest.mark.parametrize("count", [1, 3, 67])
def test_bit_for_bit(emulator, expected, count, per_sample):
    index = torch.arange(count) * 7919
    assert torch.equal(emulator.noise(11, index, per_sample), expected(11, index, per_sample))


@pytest.mark.parametrize("seed", [0, 2**63 + 12345, 2**64 - 1])
def test_seeds_and_samples_of_64_bits(emulator, expected, seed):
    index = torch.tensor([0, 2**31, 2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1, -1, -(2**63)])
    ours = emulator.noise(seed, index, 9)
    assert torch.equal(ours, expected(seed, index, 9))
    assert len(ours.unique(dim=0)) == len(index)


def test_any_order_and_any_batch(emulator):
    index = torch.tensor([5, 2**33, 0, 12, 5])
    together = emulator.noise(3, index, 1031)
    for seed in (1, 2):
        emulator.configure(seed=seed)
        assert torch.equal(emulator.noise(3, index, 1031), together)
    for one, row in zip(index, together, strict=True):
        assert torch.equal(emulator.noise(3, one[None], 1031)[0], row)


def test_empty_and_refused(emulator):
    assert emulator.noise(0, torch.empty(0, dtype=torch.int64), 5).shape == (0, 5)
    assert emulator.noise(0, torch.arange(3), 0).shape == (3, 0)
    too_many = NoiseArguments(None, None, 0, 2**31, 1024)  # 2^31 blocks
    with pytest.raises(RuntimeError, match="status 1"):
        emulator.check(emulator.library.noise_emulated(ctypes.byref(too_many)))
