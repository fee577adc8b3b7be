"""Pictures: 8 bits as the field's protocols have them, resizing before that, batch by batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddfast.evaluation.sources import stream
from ddfast.models.toy import ToyTeacher
from ddfast.pictures import QUANTISERS, decoded, pixels, resized, stream_pictures


class Raw(ToyTeacher):
    """Decodes every sample to one raw image, with values beyond [-1, 1]."""

    def __init__(self, side: int = 6) -> None:
        super().__init__()
        self.image = 1.4 * torch.randn(3, side, side, generator=torch.Generator().manual_seed(0))

    def decode(self, codes, *, clamp=True):
        images = self.image.expand(len(codes), -1, -1, -1)
        return (images.clamp(-1, 1) + 1) / 2 if clamp else images


def some(count: int, **settings: int):
    return stream("teacher", Raw(), count=count, seed=0, **settings)


FORMULAS = {
    "nearest": lambda x: np.rint((np.clip(x, -1, 1) + 1) / 2 * 255),
    "var": lambda x: np.clip((np.clip(x, -1, 1) + 1) / 2 * 255 + np.float32(0.5), 0, 255),
    "llamagen": lambda x: np.clip(np.float32(127.5) * x + np.float32(128.0), 0, 255),
    "dd1": lambda x: np.clip((np.clip(x, -1, 1) + 1) / 2 * 255 + np.float32(0.5), 0, 255),
}


def values() -> np.ndarray:
    """Float32 values about [-1, 1]: every level, what lies half-way between two, their neighbours, and others."""
    levels = np.arange(-2, 258, dtype=np.float64)[:, None] + np.array([0, 0.5, 0.25])
    marks = (levels.reshape(-1) / 127.5 - 1).astype(np.float32)
    near = [marks, np.nextafter(marks, np.float32(2)), np.nextafter(marks, np.float32(-2))]
    rest = np.random.default_rng(0).uniform(-1.1, 1.1, 24 * 1000 - 3 * len(marks)).astype(np.float32)
    return np.concatenate([*near, rest])


@pytest.mark.parametrize("name", sorted(QUANTISERS))
def test_8_bits_are_the_protocols_formula(name):
    x = values()
    expected = FORMULAS[name](x)
    assert expected.dtype == np.float32
    got = pixels(torch.from_numpy(x).view(1, 3, 80, -1), name).numpy().reshape(-1)
    assert got.dtype == np.uint8
    assert np.array_equal(got, expected.astype(np.uint8))  # cut off


def test_protocols_differ_by_a_rounding_alone():
    x = values()
    levels = 255 * (np.clip(x.astype(np.float64), -1, 1) + 1) / 2
    tie = np.abs(levels - np.floor(levels) - 0.5) < 1e-4
    made = {name: pixels(torch.from_numpy(x).view(1, 3, 80, -1), name).numpy().reshape(-1) for name in QUANTISERS}
    assert np.array_equal(made["var"], made["dd1"])
    for name in ("var", "llamagen"):
        other = made[name].astype(int) - made["nearest"]
        assert np.abs(other).max() == 1
        assert not other[~tie].any()
        assert (other[tie] != 0).any()  # so ties are among the values


def test_grey_images_become_rgb_and_halves_are_read_as_float32():
    x = torch.linspace(-1, 1, 49).view(1, 1, 7, 7)
    assert pixels(x).shape == (1, 3, 7, 7)
    assert torch.equal(pixels(x.half()), pixels(x.half().float()))


def test_images_are_resized_before_they_are_clamped():
    raw = Raw()
    batch = next(iter(some(3)))
    got = decoded(batch, raw, quantise="llamagen", size=4)
    whole = F.interpolate(raw.image[None], size=(4, 4), mode="bicubic")
    assert torch.equal(got, pixels(whole, "llamagen").expand(3, -1, -1, -1))
    clamped = F.interpolate(raw.image[None].clamp(-1, 1), size=(4, 4), mode="bicubic")
    assert not torch.equal(got[:1], pixels(clamped, "llamagen"))
    assert resized(raw.image[None], 6) is not None
    assert torch.equal(decoded(batch, raw, size=6), decoded(batch, raw))
    assert decoded(batch, raw, size=9).shape == (3, 3, 9, 9)


def test_a_stream_is_decoded_batch_by_batch():
    batches = list(stream_pictures(some(20, batch_size=8), Raw()))
    assert [len(batch.pixels) for batch in batches] == [7, 7, 6]
    assert torch.cat([batch.number for batch in batches]).tolist() == list(range(20))
    assert torch.cat([batch.condition for batch in batches]).tolist() == [0] * 20
    assert all(batch.pixels.dtype == torch.uint8 for batch in batches)

    def endless():
        yield from some(3)
        raise AssertionError("asked for more than it was told to")

    assert len(next(stream_pictures(endless(), Raw())).pixels) == 3


@pytest.mark.parametrize(("words", "settings"), [("quantise: got 'adm'", {"quantise": "adm"}), ("size", {"size": -1})])
def test_unknown_settings_are_refused_before_anything_is_made(words, settings):
    with pytest.raises(ValueError, match=words):
        stream_pictures(some(3), Raw(), **settings)
