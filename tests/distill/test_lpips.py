import pytest
import torch
import torch.nn.functional as F
from lpips_files import LAYERS, random_lpips, write_lpips

from ddfast.distill.losses import perceptual_distance
from ddfast.distill.lpips import LPIPS
from ddfast.errors import DDFastError

ENDS = {2: 0, 7: 1, 14: 2, 21: 3, 28: 4}


@pytest.fixture(scope="module")
def tensors():
    return random_lpips()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_lpips(tmp_path_factory.mktemp("lpips"))


def by_hand(tensors, x, y):
    """The formula, in float64 and call by call."""
    vgg, linear = ({name: value.double() for name, value in part.items()} for part in tensors)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]).double(), torch.tensor([0.458, 0.448, 0.450]).double()
    maps = [(image.double() - shift[:, None, None]) / scale[:, None, None] for image in (x, y)]
    total = torch.zeros(len(x)).double()
    for layer in LAYERS:
        if layer in (5, 10, 17, 24):
            maps = [F.max_pool2d(m, 2) for m in maps]
        weight, bias = vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"]
        maps = [F.conv2d(m, weight, bias, padding=1).clamp_min(0) for m in maps]
        if layer in ENDS:
            a, b = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in maps)
            total += ((a - b).square() * linear[f"lin{ENDS[layer]}.model.1.weight"]).sum(1).mean((1, 2))
    return total


def images(seed, batch=2):
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_formula(tensors, files):
    distance = LPIPS.load(*files)
    x, y = images(1), images(2)
    value = distance(x, y)
    assert value.shape == (2,)
    assert torch.allclose(value.double(), by_hand(tensors, x, y), rtol=1e-4)
    assert torch.allclose(value, distance(y, x))
    assert (distance(x, x) == 0).all()


def test_one_channel_counts_three_times(files):
    distance = LPIPS.load(*files)
    x, y = images(1)[:, :1], images(2)[:, :1]
    assert torch.equal(distance(x, y), distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("dead", [False, True])
def test_gradients_are_finite_even_where_features_vanish(tensors, tmp_path, dead):
    vgg, linear = tensors
    if dead:
        vgg = {**vgg, "features.0.weight": vgg["features.0.weight"] * 0, "features.0.bias": -torch.ones(64)}
    torch.save(vgg, tmp_path / "vgg16.pth")
    torch.save(linear, tmp_path / "vgg.pth")
    distance = LPIPS.load(tmp_path / "vgg16.pth", tmp_path / "vgg.pth")
    x = images(1).requires_grad_(True)
    distance(x, images(2)).sum().backward()
    assert x.grad.isfinite().all()
    assert bool(x.grad.abs().sum() > 0) != dead


def test_images_too_small_and_autocast(files):
    distance = LPIPS.load(*files)
    with pytest.raises(ValueError, match=r"images: got \[15, 32\] pixels, expected at least 16 x 16"):
        distance(torch.zeros(1, 3, 15, 32), torch.zeros(1, 3, 15, 32))
    x, y = images(1), images(2)
    plain = distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), plain)


def test_files_that_do_not_fit(tensors, files, tmp_path):
    vgg = {name: value for name, value in tensors[0].items() if name != "features.7.bias"}
    torch.save(vgg, tmp_path / "vgg16.pth")
    with pytest.raises(DDFastError, match=r"missing features\.7\.bias \[128\]"):
        LPIPS.load(tmp_path / "vgg16.pth", files[1])
    torch.save({"x": pytest.raises}, tmp_path / "vgg16.pth")
    with pytest.raises(DDFastError, match="refused, nothing of it was run"):
        LPIPS.load(tmp_path / "vgg16.pth", files[1])


def test_given_tokens_have_no_part_in_the_loss(files):
    distance = LPIPS.load(*files)

    def decode(embeddings):
        return F.interpolate(embeddings.transpose(1, 2).reshape(-1, 3, 4, 4), scale_factor=8).tanh()

    target = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(0))
    embeddings = (target + torch.arange(16)[:, None] % 2).requires_grad_(True)
    open_tokens = torch.arange(16).expand(2, -1) >= 5
    loss = perceptual_distance(embeddings, target, open_tokens, decode, distance)
    loss.backward()
    assert loss > 0
    assert (embeddings.grad[:, :5] == 0).all()
    assert (embeddings.grad[:, 5:] != 0).any()
    assert perceptual_distance(target, target, open_tokens, decode, distance) == 0
