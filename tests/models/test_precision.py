"""What must not change a result: autocast around inference, memory layouts, and PyTorch's default dtype."""

import pytest
import torch
from golden import Case
from official import digits_like, llamagen_teacher_like, randomised, var_teacher_like

from ddfast.models.loading import load_teacher, save_teacher, start_student, student_class
from ddfast.models.toy import ToyTeacher

TEACHERS = {
    "digits": digits_like,
    "var": var_teacher_like,
    "llamagen": llamagen_teacher_like,
    "captions": lambda: llamagen_teacher_like(model_type="t2i", cls_token_num=4),
    "toy": ToyTeacher,
}
PICTURES = ("digits", "var", "llamagen", "captions")


def condition_for(teacher):
    if type(teacher).__name__ == "LlamaGenTeacher" and teacher.sizes.model_type == "t2i":
        generator = torch.Generator().manual_seed(2)
        return torch.randn(2, 4, 12, generator=generator, dtype=torch.float32), torch.tensor(
            [[0, 1, 1, 1], [1, 1, 1, 1]]
        )
    return torch.tensor([0, teacher.num_classes - 1])


def noise_for(teacher):
    shape = (2, teacher.num_tokens, teacher.code_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def images_for(teacher):
    shape = teacher.decode(torch.zeros(2, teacher.num_tokens, dtype=torch.int64)).shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)


def inference(teacher):
    """Everything that is no training, by name."""
    condition, noise = condition_for(teacher), noise_for(teacher)
    codes = teacher.generate(condition, sampler="flow", noise=noise)
    draws = torch.Generator().manual_seed(5)
    made = {"flow": codes, "greedy": teacher.generate(condition, sampler="greedy")}
    made["drawn"] = teacher.generate(condition, generator=draws)
    if isinstance(teacher, ToyTeacher):
        return made
    made["decoded"], made["encoded"] = teacher.decode(codes), teacher.encode(images_for(teacher))
    made["tokenizer"] = teacher.tokenizer.encode(images_for(teacher))
    student = randomised(start_student(teacher))
    made["one step"], made["two steps"] = (
        student.sample(condition, noise),
        student.sample(condition, noise, steps=(0, 1)),
    )
    made["helped"] = student.sample(condition, noise, teacher_range=(1, 2), sampler="greedy")
    network = randomised(student_class(teacher, "dd2").from_teacher(teacher, head_width=16, head_depth=1))
    made["dd2"], made["ar"] = network.sample(condition, noise), network.sample_ar(condition, noise, steps=2)
    return made


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_for_training(name, grad):
    torch.manual_seed(0)
    teacher = TEACHERS[name]()
    expected = inference(teacher)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        found = inference(TEACHERS[name]())
    assert_equal(found, expected)


@pytest.mark.parametrize("name", PICTURES)
def test_a_gradient_follows_autocast(name):
    teacher = TEACHERS[name]()
    embeddings = noise_for(teacher).requires_grad_()
    exact = teacher.decode(embeddings, clamp=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.decode(embeddings, clamp=False)
    assert not torch.equal(rounded, exact)
    rounded.float().sum().backward()
    assert embeddings.grad.isfinite().all()


@pytest.mark.parametrize("name", PICTURES)
def test_layouts(name):
    """The same bits for images and models in channels-last memory, views and strides."""
    teacher = TEACHERS[name]()
    images, codes = images_for(teacher), torch.zeros(2, teacher.num_tokens, dtype=torch.int64)
    codes[1] = 3
    expected, decoded = teacher.encode(images), teacher.decode(codes)
    raw = teacher.tokenizer.decode(teacher.embed(codes))
    wide = torch.zeros(2, *images.shape[1:-1], 2 * images.shape[-1])
    wide[..., ::2] = images
    for same in (
        images.to(memory_format=torch.channels_last),
        images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        wide[..., ::2],
        images.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(teacher.encode(same), expected)
    embeddings = teacher.embed(codes)
    turned = embeddings.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(teacher.tokenizer.decode(turned), raw)
    teacher.to(memory_format=torch.channels_last)
    assert torch.equal(teacher.encode(images.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(teacher.decode(codes), decoded)


def test_decoding_in_channels_last_memory_is_as_exact():
    for case, files in (
        (Case("var_teacher"), ("var.pth", "vae.pth")),
        (Case("llamagen_c2i"), ("gpt.pt", "vq.pt")),
    ):
        given = {} if files[0] == "var.pth" else {"n_head": 4, "block_size": 16, "num_classes": 10}
        teacher = load_teacher(*map(case.file, files), **given).to(memory_format=torch.channels_last)
        if files[0] == "gpt.pt":
            case.check(dec_img=teacher.decode(case["dec_idx"], clamp=False))
            case.check(vq_idx=teacher.tokenizer.codes_of(teacher.tokenizer.latents(case["vq_img"])))


@pytest.fixture
def default_dtype(request):
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default_dtype", [torch.float64, torch.bfloat16, torch.float16], indirect=True)
@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("when", ["before", "between"])
def test_the_default_dtype_does_not_matter(tmp_path, name, when, default_dtype):
    """Building, saving, loading, decoding, encoding and sampling give the same bits."""
    torch.manual_seed(0)
    teacher = TEACHERS[name]()
    expected = inference(teacher)
    torch.set_default_dtype(default_dtype if when == "before" else torch.float32)
    torch.manual_seed(0)
    again = TEACHERS[name]()
    torch.set_default_dtype(default_dtype)
    assert {p.dtype for p in (*again.parameters(), *again.buffers()) if p.is_floating_point()} == {torch.float32}
    assert_equal(inference(again), expected)
    if name != "toy":
        save_teacher(tmp_path / "teacher.safetensors", again)
        loaded = load_teacher(tmp_path / "teacher.safetensors")
        found = {"flow": loaded.generate(condition_for(loaded), sampler="flow", noise=noise_for(loaded))}
        found["decoded"] = loaded.decode(found["flow"])
        assert all(torch.equal(value, expected[key]) for key, value in found.items())
