import numpy as np
import pytest
import torch

from ddfast.evaluation.resizing import clean_resize, clip_resize

SIZES = [(256, 256), (299, 299), (64, 64), (512, 512), (1, 1), (480, 640), (301, 37)]


def pictures(count, height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_has_clean_fids_bits(size):
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    pixels = pictures(3, *size)
    made = clean_resize(pixels)
    assert (made.shape, made.dtype) == ((3, 3, 299, 299), torch.float32)
    for image, one in zip(pixels, made, strict=True):
        theirs = resizer(image.permute(1, 2, 0).numpy())
        assert torch.equal(one.permute(1, 2, 0), torch.from_numpy(theirs))


def weights(before, after):
    """Bicubic interpolation (a = -1/2) by its definition, widened where an image shrinks: float64 [after, before]."""
    scale = max(before / after, 1)
    centre = (np.arange(after)[:, None] + 0.5) * before / after
    x = np.abs(np.arange(before) + 0.5 - centre) / scale
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return w / w.sum(1, keepdims=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_bicubic_interpolation(size):
    pixels = pictures(2, *size, seed=1)
    vertical, horizontal = weights(size[0], 299), weights(size[1], 299)
    expected = np.einsum("ih,jw,bchw->bcij", vertical, horizontal, pixels.double().numpy(), optimize=True)
    made = clean_resize(pixels)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected.clip(0, 255)), rtol=0, atol=1e-3)
    assert 0 <= made.min() <= made.max() <= 255


def test_an_image_alone_has_the_same_bits():
    pixels = pictures(3, 40, 50)
    assert torch.equal(clean_resize(pixels)[1:2], clean_resize(pixels[1:2]))
    assert clean_resize(pixels[:0]).shape == (0, 3, 299, 299)
    assert torch.equal(clean_resize(pixels[:, :, ::2, ::2]), clean_resize(pixels[:, :, ::2, ::2].contiguous()))


@pytest.mark.parametrize(
    ("pixels", "got"),
    [
        (torch.zeros(1, 3, 4, 4), r"\[1, 3, 4, 4\] of torch\.float32"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), r"\[1, 1, 4, 4\] of torch\.uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"\[3, 4, 4\]"),
        (torch.zeros(1, 3, 0, 4, dtype=torch.uint8), r"\[1, 3, 0, 4\]"),
    ],
)
def test_what_is_no_picture_is_refused(pixels, got):
    with pytest.raises(ValueError, match=rf"pixels: got {got}"):
        clean_resize(pixels)
    with pytest.raises(ValueError, match=rf"pixels: got {got}"):
        clip_resize(pixels, 224)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_clip_reads_the_middle_of_a_picture(size):
    pixels = pictures(2, *size, seed=2)
    made = clip_resize(pixels, 32)
    assert (made.shape, made.dtype) == ((2, 3, 32, 32), torch.uint8)
    shorter = min(size)
    height, width = 32 * size[0] // shorter, 32 * size[1] // shorter
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    # Rounded to 8 bit twice, after rows and after columns, of which Pillow takes first what leaves less to do.
    across, along = ("jw,bchw->bchj", weights(size[1], width)), ("ih,bchw->bciw", weights(size[0], height))
    apart = []
    for passes in ((across, along), (along, across)):
        whole = pixels.double().numpy()
        for indices, weight in passes:
            whole = np.einsum(indices, weight, whole).round().clip(0, 255)
        apart.append(np.abs(made.numpy() - whole[:, :, top : top + 32, left : left + 32]))
    assert min(one.max() for one in apart) <= 1
    assert min((one > 0).mean() for one in apart) < 0.01


def test_a_picture_of_clips_size_stays_as_it_is():
    pixels = pictures(2, 32, 32)
    assert torch.equal(clip_resize(pixels, 32), pixels)
