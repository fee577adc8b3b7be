"""What users hand to models: the right result or an error that names the argument, in every family."""

import numpy as np
import pytest
import torch
from golden import Case
from official import digits_like, llamagen_teacher_like, randomised, var_teacher_like

from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.loading import load_tokenizer, start_student, student_class
from ddfast.models.toy import ToyTeacher

TEACHERS = {"digits": digits_like, "var": var_teacher_like, "llamagen": llamagen_teacher_like, "toy": ToyTeacher}
PICTURES = ("digits", "var", "llamagen")


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request):
    return TEACHERS[request.param]()


@pytest.fixture(scope="module", params=PICTURES)
def painter(request):
    return TEACHERS[request.param]()


def student_of(teacher, kind):
    make = start_student if kind == "dd1" else student_class(teacher, "dd2").from_teacher
    if isinstance(teacher, ToyTeacher):
        return None
    return randomised(make(teacher))


def noise_for(teacher, batch):
    return torch.randn(batch, teacher.num_tokens, teacher.code_dim, generator=torch.Generator().manual_seed(1))


def side_of(teacher):
    return teacher.decode(torch.zeros(1, teacher.num_tokens, dtype=torch.int64)).shape[-1]


def bad_labels(teacher):
    count = teacher.num_classes
    return [
        ([0, 0], TypeError, "condition: got list, expected int64 labels"),
        (0, TypeError, "condition: got int, expected int64 labels"),
        (torch.tensor([0.0]), TypeError, "condition: got torch.float32"),
        (torch.tensor([0], dtype=torch.int32), TypeError, "condition: got torch.int32"),
        (torch.tensor([[0]]), TypeError, r"condition: got torch.int64 \[1, 1\]"),
        (torch.tensor([True]), TypeError, "condition: got torch.bool"),
        (torch.tensor([count]), ValueError, f"condition: got labels {count}, expected 0..{count - 1}"),
        (torch.tensor([count + 1]), ValueError, f"condition: got labels {count + 1}, expected 0"),
        (torch.tensor([0, -1]), ValueError, r"condition: got labels -1\.\.0, expected 0"),
        (torch.tensor([0, -2]), ValueError, r"condition: got labels -2\.\.0, expected 0"),
    ]


def test_labels(teacher):
    """The null label is for training and guidance: a student or a teacher-forced pass that gets it has a mistake."""
    codes = torch.zeros(1, teacher.num_tokens, dtype=torch.int64)
    official_null = {-1, teacher.num_classes} if type(teacher).__name__ == "VARTeacher" else set()
    calls = {"generate": teacher.generate, "logits": lambda c: teacher.logits(c, codes)}
    calls["log_probs"] = lambda c: teacher.log_probs(c, codes, defaults=SamplingDefaults())
    for kind in ("dd1", "dd2"):
        student = student_of(teacher, kind)
        if student is not None:
            calls[f"{kind} sample"] = lambda c, student=student: student.sample(
                c, noise_for(teacher, len(c) if isinstance(c, (list, torch.Tensor)) else 1)
            )
            calls[f"{kind} predict"] = lambda c, student=student: student.predict(c, noise_for(teacher, 1), 0)
    for name, call in calls.items():
        for condition, error, words in bad_labels(teacher):
            values = set(condition.flatten().tolist()) if isinstance(condition, torch.Tensor) else set()
            if name == "generate" and error is ValueError and values <= official_null | {0}:
                continue
            with pytest.raises(error, match=words if name != "generate" or not official_null else "condition: got"):
                call(condition)


def test_vars_labels_for_no_condition():
    teacher = var_teacher_like()
    made = [teacher.generate(torch.tensor([label]), sampler="greedy", cfg_scale=0.0) for label in (-1, 5)]
    assert torch.equal(*made)
    null = teacher.logits(torch.tensor([0]), made[0], unconditional=True)
    assert torch.equal(made[0][:, 0], null[:, 0].argmax(-1))


def test_codes(painter):
    n, count = painter.num_tokens, painter.num_codes
    codes = torch.randint(count, (2, n))
    expected, label = painter.decode(codes), torch.tensor([0, 1])
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.uint16):
        assert torch.equal(painter.decode(codes.to(dtype)), expected)
        assert torch.equal(painter.logits(label, codes.to(dtype)), painter.logits(label, codes))
        made = painter.generate(label, prefix=codes[:, :1].to(dtype), sampler="greedy")
        assert torch.equal(made, painter.generate(label, prefix=codes[:, :1], sampler="greedy"))
    assert torch.equal(painter.decode(codes.numpy()), expected)
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(painter.decode(painter.embed(codes).to(dtype)), expected)
    for bad, error, words in (
        (codes - 1 - codes, ValueError, r"codes: got codes -1\.\.-1, expected 0"),
        (codes * 0 + count, ValueError, f"codes: got codes {count}..{count}, expected 0..{count - 1}"),
        (codes.float(), TypeError, r"codes: got torch.float32 \[2, \d+\], expected integer codes"),
        (codes.bool(), TypeError, "codes: got torch.bool, expected integer codes"),
        (codes[:, 1:], ValueError, rf"codes: got shape \[2, {n - 1}\], expected \[B, {n}\]"),
        (codes[0], ValueError, "codes: got shape"),
        (codes.tolist(), TypeError, "codes: got list"),
        (painter.embed(codes)[..., 1:], ValueError, "codes: got shape .* expected embeddings"),
    ):
        with pytest.raises(error, match=words):
            painter.decode(bad)
    for call in (lambda c: painter.logits(label, c), lambda c: painter.generate(label, prefix=c)):
        for bad in (codes - 1 - codes, codes * 0 + count, codes.bool()):
            with pytest.raises((ValueError, TypeError), match=r"(codes|prefix): got"):
                call(bad)
    with pytest.raises(TypeError, match=r"prefix: got torch.float32, expected integer codes"):
        painter.generate(label, prefix=codes[:, :1].float())
    with pytest.raises(ValueError, match="codes: got shape"):
        painter.logits(label[:1], codes)
    with pytest.raises(ValueError, match=r"codes: got codes -1\.\.-1"):
        painter.embed(codes * 0 - 1)


def test_images(painter):
    side, channels = side_of(painter), painter.decode(torch.zeros(1, painter.num_tokens, dtype=torch.int64)).shape[1]
    bytes_ = torch.randint(256, (2, channels, side, side), dtype=torch.uint8)
    floats = bytes_.float() / 255
    expected = painter.encode(floats)
    image = pytest.importorskip("PIL.Image")
    arrays = [each.permute(1, 2, 0).squeeze(-1).numpy() for each in bytes_]
    pictures = [image.fromarray(array) for array in arrays]
    for same in (
        bytes_,
        floats.double(),
        bytes_.numpy(),
        floats.numpy(),
        np.stack([each.permute(1, 2, 0).numpy() for each in bytes_]),
        pictures,
        floats.to(memory_format=torch.channels_last),
    ):
        assert torch.equal(painter.encode(same), expected)
    assert torch.equal(painter.encode(pictures[1]), expected[1:])
    if channels == 3:
        assert torch.equal(painter.encode(pictures[0].convert("RGBA")), expected[:1])
    assert painter.encode(floats.half()).shape == expected.shape
    wide = floats.repeat(1, 1, 1, 2)
    for bad, error, words in (
        (floats * 255, ValueError, "images: got values from .* expected 0 to 1; 0..255 is for uint8"),
        (2 * floats - 1, ValueError, "images: got values from -.* expected 0 to 1"),
        (floats.where(floats < 0.5, torch.nan), ValueError, "images: got values from nan"),
        (floats.where(floats < 0.5, torch.inf), ValueError, "images: got values from .* to inf"),
        (bytes_.long(), TypeError, "images: got torch.int64, expected floating-point values .* or uint8"),
        (floats[0], ValueError, "images: got shape"),
        (floats.permute(0, 2, 3, 1), ValueError, rf"images: got shape .* expected \[B, {channels}, H, W\]"),
        (wide, ValueError, "images: got"),
        (floats[..., 1:], ValueError, "images: got"),
        (floats.repeat(1, 1, 2, 2), ValueError, "images: got"),
        ([[0.5]], TypeError, "images: got list"),
        ("a.png", TypeError, "images: got str"),
        (image.fromarray(np.zeros((side, side), np.int32)), TypeError, "images: got a PIL image of mode I"),
    ):
        with pytest.raises(error, match=words):
            painter.encode(bad)


def test_images_of_a_tokenizer_alone():
    """Its images are in [-1, 1], and LlamaGen's must be square, since its codes do not tell another shape."""
    case = Case("llamagen_c2i")
    tokenizer = load_tokenizer(case.file("vq.pt"))
    image = (case["vq_img"]).clamp(-1, 1)
    as_bytes = ((image + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(tokenizer.encode(as_bytes), tokenizer.encode(2 * (as_bytes.float() / 255) - 1))
    with pytest.raises(ValueError, match="images: got 32 x 128 pixels, expected square ones"):
        tokenizer.encode(torch.zeros(1, 3, 32, 128))
    with pytest.raises(ValueError, match="images: got values from -2 to -2, expected -1 to 1"):
        tokenizer.encode(torch.full((1, 3, 64, 64), -2.0))
    with pytest.raises(ValueError, match="codes: got 15 a row, expected those of a square image"):
        tokenizer.decode(torch.zeros(1, 15, 8))
    assert torch.equal(tokenizer.decode(case["dec_idx"]), tokenizer.decode(tokenizer.codebook()[case["dec_idx"]]))


@pytest.mark.parametrize("kind", ["dd1", "dd2"])
def test_noise(painter, kind):
    student, label, noise = student_of(painter, kind), torch.tensor([0, 1]), noise_for(painter, 2)
    expected = student.sample(label, noise)
    assert torch.equal(student.sample(label, noise.double()), expected)
    assert student.sample(label, noise.half()).dtype == torch.float32
    for bad, error, words in (
        (noise.where(noise < 1, torch.nan), ValueError, "noise: got NaN or infinite values"),
        (noise.where(noise < 1, torch.inf), ValueError, "noise: got NaN or infinite values"),
        (noise.long(), TypeError, "noise: got torch.int64, expected a floating-point tensor"),
        (noise[:1], ValueError, r"noise: got shape \[1, .*expected \[2, "),
        (noise[:, 1:], ValueError, "noise: got shape"),
        (noise.tolist(), TypeError, "noise: got list"),
    ):
        with pytest.raises(error, match=words):
            student.sample(label, bad)
        with pytest.raises(error, match=words):
            painter.generate(label, sampler="flow", noise=bad)
        with pytest.raises(error, match=words.replace("noise", "x")):
            student.predict(label, bad, 0)


def test_points(painter):
    student, label, noise = student_of(painter, "dd1"), torch.tensor([0, 1]), noise_for(painter, 2)
    for bad in (0.5, True, torch.tensor([0.0, 1.0]), torch.tensor(1), torch.tensor([0, 1, 2]), "0"):
        with pytest.raises(TypeError, match="t: got"):
            student.predict(label, noise, bad)
    for steps in (2, (), (1,), (0, 0), (0, 2, 1), (0, len(painter.groups) + 1), (0.0, 1.0), "01", None):
        with pytest.raises(ValueError, match=r"steps: got .* expected rising trajectory points"):
            student.sample(label, noise, steps=steps)
    assert torch.equal(student.sample(label, noise, steps=[0, 1]), student.sample(label, noise, steps=(0, 1)))


def test_empty_batches(painter):
    label, codes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, painter.num_tokens, dtype=torch.int64)
    noise = noise_for(painter, 0)
    assert painter.generate(label).shape == codes.shape
    assert painter.generate(label, sampler="greedy").shape == codes.shape
    assert painter.generate(label, sampler="flow", noise=noise).shape == codes.shape
    assert painter.logits(label, codes).shape == (*codes.shape, painter.num_codes)
    images = painter.decode(codes)
    assert images.shape[0] == 0 and images.ndim == 4
    assert torch.equal(painter.encode(images), codes)
    for kind in ("dd1", "dd2"):
        student = student_of(painter, kind)
        assert student.sample(label, noise).shape == noise.shape
        assert student.predict(label, noise, 0)[1].shape == noise.shape
    assert student_of(painter, "dd1").sample(label, noise, teacher_range=(1, 2)).shape == noise.shape


def test_arguments_without_effect(painter):
    student, label, noise = student_of(painter, "dd1"), torch.tensor([0, 1]), noise_for(painter, 2)
    for name, value in {"cfg_scale": 2.0, "top_k": 3, "top_p": 0.5, "temperature": 2.0, "sampler": "greedy"}.items():
        with pytest.raises(ValueError, match=f"{name}: has no effect without teacher_range"):
            student.sample(label, noise, **{name: value})


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("cfg", "cfg_scale"),
        ("g_seed", "generator=torch.Generator"),
        ("more_smooth", "not here; officially it draws by Gumbel softmax"),
        ("label_B", "condition"),
        ("max_new_tokens", "stop"),
        ("sample_logits", "sampler="),
        ("colour", "no argument of this model; known: .*cfg_scale"),
    ],
)
def test_official_names_are_answered_with_ours(teacher, name, here):
    label = torch.tensor([0])
    with pytest.raises(TypeError, match=f"{name}: .*{here}"):
        teacher.generate(label, **{name: 1})
    student = student_of(teacher, "dd1")
    if student is not None:
        with pytest.raises(TypeError, match=f"{name}: .*{here}"):
            student.sample(label, noise_for(teacher, 1), **{name: 1})


def test_zeros_that_the_official_code_gives_a_meaning():
    label = torch.arange(4)
    var = var_teacher_like()

    def drawn(teacher, **settings):
        return teacher.generate(label, generator=torch.Generator().manual_seed(3), **settings)

    assert torch.equal(drawn(var, top_p=0), drawn(var, top_p=1.0))
    var.defaults = SamplingDefaults(top_p=0.0)
    codes = drawn(var)
    assert torch.equal(var.log_probs(label, codes), var.log_probs(label, codes, defaults=SamplingDefaults()))
    gpt = llamagen_teacher_like()
    greedy = gpt.generate(label, sampler="greedy")
    assert torch.equal(drawn(gpt, temperature=0), greedy)
    assert torch.equal(drawn(gpt, top_p=0), greedy)
    assert torch.equal(gpt.generate(label, sampler="flow", noise=noise_for(gpt, 4), temperature=0.0), greedy)
    log_probs = gpt.log_probs(label, greedy, defaults=SamplingDefaults(temperature=0.0, cfg_scale=2.0))
    assert torch.equal(log_probs.argmax(-1), greedy)
    with pytest.raises(ValueError, match="temperature: got -1"):
        drawn(gpt, temperature=-1.0)
    with pytest.raises(ValueError, match="temperature: got 0"):
        drawn(var, temperature=0)


def test_captions():
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=6)
    features, mask = torch.randn(2, 6, 12), torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    student, noise = randomised(start_student(teacher)), noise_for(teacher, 2)
    whole, short = (features, mask), (features[:, 2:], mask[:, 2:])
    assert torch.equal(teacher.generate(short, sampler="greedy"), teacher.generate(whole, sampler="greedy"))
    torch.testing.assert_close(student.sample(short, noise), student.sample(whole, noise))
    for dtype in (torch.bool, torch.float32, torch.int32):
        same = (features, mask.to(dtype))
        assert torch.equal(teacher.generate(same, sampler="greedy"), teacher.generate(whole, sampler="greedy"))
    hidden = features.masked_fill(mask[..., None] == 0, torch.nan)  # what stands at padding counts for nothing
    assert torch.equal(teacher.generate((hidden, mask), sampler="greedy"), teacher.generate(whole, sampler="greedy"))
    bad = features.clone()
    bad[0, 5, 0] = torch.nan
    for condition, error, words in (
        (torch.tensor([0, 1]), TypeError, "condition: got Tensor, expected a pair of features"),
        ([features, mask], TypeError, "condition: got list"),
        ((features,), TypeError, "condition: got tuple"),
        ((features.long(), mask), TypeError, "condition: got features of torch.int64"),
        ((features, mask.flip(1)), ValueError, "expected padding on the left"),
        ((features, mask[:1]), ValueError, r"condition: got \[2, 6, 12\] and \[1, 6\]"),
        ((features[..., 1:], mask), ValueError, "condition: got"),
        ((bad, mask), ValueError, "condition: got NaN or infinite features"),
    ):
        with pytest.raises(error, match=words):
            teacher.generate(condition)
        with pytest.raises(error, match=words):
            student.sample(condition, noise)
