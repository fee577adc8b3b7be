"""Images of files and folders: read as they are, and refused before the first one is decoded."""

import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image
from pixels import channels_last, pictures

from ddfast import processes
from ddfast.errors import DDFastError
from ddfast.evaluation.images import open_images

IMAGES = pictures(23, 0, size=20)


@pytest.fixture(params=["stored", "compressed", "folder"])
def path(request, tmp_path):
    if request.param == "folder":
        for number, image in enumerate(channels_last(IMAGES)):
            Image.fromarray(image).save(tmp_path / f"{number:03d}-class{number % 7}.png")
        (tmp_path / "samples.json").write_text("{}")
        return tmp_path
    save = np.savez if request.param == "stored" else np.savez_compressed
    save(tmp_path / "images.npz", channels_last(IMAGES), np.arange(23))
    return tmp_path / "images.npz"


def read(path, size):
    with processes.together("cpu", 60):
        images = open_images(path, "--images")
        batches = list(images.batches(size))
    return images.count, images.size, [(batch.pixels, batch.number) for batch in batches]


@pytest.mark.parametrize("size", [1, 5, 100])
def test_every_image_in_its_place(path, size):
    count, sides, batches = read(path, size)
    assert (count, sides) == (23, (20, 20))
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), IMAGES)
    assert torch.cat([number for _, number in batches]).tolist() == list(range(23))
    assert {len(pixels) for pixels, _ in batches[:-1]} <= {size}


def test_processes_share_the_batches(path):
    ended = launch(2, read, path, 5)
    numbers = [torch.cat([number for _, number in batches]).tolist() for _, _, batches in ended]
    assert numbers[0] == [*range(5), *range(10, 15), *range(20, 23)]
    assert sorted(numbers[0] + numbers[1]) == list(range(23))
    for _, _, batches in ended:
        for pixels, number in batches:
            assert torch.equal(pixels, IMAGES[number])


def test_grey_pictures_have_three_equal_channels(tmp_path):
    grey = IMAGES[0, 0].numpy()
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "b.PNG")
    Image.fromarray(np.stack([grey] * 3, -1)).save(tmp_path / "c.jpeg", quality=95)
    (batch,) = open_images(tmp_path, "--images").batches()
    assert torch.equal(batch.pixels[0], IMAGES[0, :1].expand(3, -1, -1))
    assert torch.equal(batch.pixels[1], batch.pixels[0])
    assert len(batch.pixels) == 3


def folder(tmp_path, **images):
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    return tmp_path


def npz(tmp_path, *arrays, **named):
    np.savez(tmp_path / "x.npz", *arrays, **named)
    return tmp_path / "x.npz"


def cut(tmp_path):
    path = npz(tmp_path, channels_last(IMAGES))
    path.write_bytes(path.read_bytes()[:-3000])
    return path


def lies(tmp_path):
    """A header of more images than there are."""
    whole = npz(tmp_path, channels_last(IMAGES))
    with zipfile.ZipFile(whole) as archive:
        data = archive.read("arr_0.npy").replace(b"(23, 20, 20, 3)", b"(29, 20, 20, 3)")
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("arr_0.npy", data)
    return tmp_path / "y.npz"


def damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return tmp_path


rgb, half = Image.new("RGB", (8, 8)), Image.new("RGBA", (8, 8), (9, 9, 9, 128))
shown = Image.new("P", (8, 8))
shown.info["transparency"] = 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda tmp: folder(tmp, a=rgb, b=half), r"b.png: has transparency \(RGBA\)"),
        (lambda tmp: folder(tmp, a=rgb, b=half.convert("LA")), "transparency"),
        (lambda tmp: folder(tmp, a=rgb, b=shown), r"transparency \(P\)"),
        (lambda tmp: folder(tmp, a=Image.new("I;16", (8, 8))), "is I;16, expected 8-bit RGB or grey"),
        (lambda tmp: folder(tmp, a=rgb, b=rgb.resize((8, 9))), r"8 x 8 \(a.png\) and 9 x 8 \(b.png\)"),
        (lambda tmp: tmp, "no PNG or JPG files there"),
        (lambda tmp: tmp / "nothing", "there is no such file or folder"),
        (damaged, "a.png is damaged or no picture"),
        (lambda tmp: npz(tmp, images=channels_last(IMAGES)), "no array arr_0 there, only images"),
        (lambda tmp: npz(tmp, IMAGES.numpy()), r"arr_0 is uint8 \[23, 3, 20, 20\], expected uint8 \[count, H, W, 3\]"),
        (lambda tmp: npz(tmp, channels_last(IMAGES) / 255), r"arr_0 is float64"),
        (lambda tmp: npz(tmp, channels_last(IMAGES)[:0]), "there are no images"),
        (lambda tmp: npz(tmp, np.asfortranarray(channels_last(IMAGES))), "no plain array"),
        (lambda tmp: npz(tmp, np.array([{}], dtype=object)), "no plain array"),
        (cut, "expected an .npz file with arr_0, or a folder"),
        (lies, "no plain array"),
    ],
)  # fmt: skip
def test_what_is_refused(make, words, tmp_path):
    with pytest.raises(DDFastError, match=words) as caught:
        open_images(make(tmp_path), "--images")
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_is_damaged_inside(tmp_path):
    path = npz(tmp_path, channels_last(IMAGES))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DDFastError, match="damaged"):
        list(open_images(path, "--images").batches())


def test_what_is_read_does_not_grow(tmp_path):
    """200 MB of zeros, compressed into one file of 200 kB, are read 50 images at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (1000, 256, 256, 3)}
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(10):
            file.write(bytes(100 * 256 * 256 * 3))
    images = open_images(path, "--images")
    tracemalloc.start()
    assert sum(len(batch.number) for batch in images.batches(50)) == 1000
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_more_images_than_their_names_have_digits_are_in_the_order_of_their_numbers(tmp_path):
    numbers = (99_998, 99_999, 100_000, 1_000_000)
    for number, image in zip(numbers, channels_last(IMAGES), strict=False):
        Image.fromarray(image).save(tmp_path / f"{number:05d}-class{number % 7}.png")
    (tmp_path / "samples.json").write_text('{"count": 4}')
    (batch,) = open_images(tmp_path, "--images").batches()
    assert torch.equal(batch.pixels, IMAGES[:4])
    assert batch.condition.tolist() == [number % 7 for number in numbers]
