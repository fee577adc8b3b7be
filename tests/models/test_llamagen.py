"""LlamaGen, its tokenizer and its student against the official code's recorded outputs, and against themselves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden import Case, as_latents
from official import llamagen_teacher_like, randomised

from ddfast.models.converting import export_teacher
from ddfast.models.llamagen.network import (
    LLAMAGEN_SIZES,
    LlamaGenSizes,
    LlamaGenStudent,
    LlamaGenTeacher,
    padded_mask,
    rope_table,
)
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.loading import load_student, load_teacher, load_tokenizer, start_student
from ddfast.models.vqgan import ConvSizes
from ddfast.ops import filter_logits
from ddfast.ops.decode_attention import rotated

CASE, TEXT, STUDENT = Case("llamagen_c2i"), Case("llamagen_t2i"), Case("dd_llamagen")
POINTS = {"t0": 0, "tmid": STUDENT.config["t_mid"], "tmix": torch.tensor(STUDENT.config["t_mix"])}
SIZES = {"n_head": 4, "block_size": 16}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(CASE.file("gpt.pt"), CASE.file("vq.pt"), **SIZES)


@pytest.fixture(scope="module")
def text_teacher():
    return load_teacher(TEXT.file("gpt.pt"), CASE.file("vq.pt"), **SIZES)


@pytest.fixture(scope="module")
def student(teacher):
    return load_student(STUDENT.file("student.pt"), teacher)


@pytest.mark.parametrize("case", [CASE, TEXT], ids=["class", "text"])
def test_the_models_own_configuration_is_accepted(case):
    wanted = {name: value for name, value in case.config["gpt_ModelArgs"].items() if name != "ffn_hidden_dim_resulting"}
    loaded = load_teacher(case.file("gpt.pt"), CASE.file("vq.pt"), **wanted, **CASE.config["vq_ModelArgs"], vq_ch=32)
    for name in ("dim", "n_layer", "n_head", "block_size", "cls_token_num", "model_type", "rope_base", "norm_eps"):
        assert getattr(loaded.sizes, name) == wanted[name], name


def test_teacher_forcing(teacher):
    label, codes = CASE["tf_label"], CASE["tf_idx"]
    logits = teacher.logits(label, codes)
    CASE.check(
        tf_logits=logits,
        tf_logits_uncond=teacher.logits(label, codes, unconditional=True),
        tf_loss=F.cross_entropy(logits.flatten(0, 1), codes.flatten()),
    )
    assert torch.equal(teacher.logits(label, teacher.embed(codes)), logits)


def generated(teacher, condition, settings):
    codes = teacher.generate(condition, sampler="greedy", **settings)
    scale = settings["cfg_scale"]
    logits = teacher.logits(condition, codes)
    if scale > 1:
        guided = torch.lerp(teacher.logits(condition, codes, unconditional=True), logits, scale)
        last = teacher.num_tokens if settings["cfg_interval"] < 0 else settings["cfg_interval"] + 2
        logits = torch.cat((guided[:, :last], logits[:, last:]), dim=1)
    return codes, logits


@pytest.mark.parametrize("number", range(len(CASE.config["gen"])))
def test_generation(teacher, number):
    codes, logits = generated(teacher, CASE["gen_label"], CASE.config["gen"][number])
    CASE.check(**{f"gen{number}_idx": codes, f"gen{number}_logits_cfg": logits})


def test_tokenizer(teacher):
    tokenizer, image = teacher.tokenizer, CASE["vq_img"]
    latents = tokenizer.latents(image)
    codes = teacher.encode((image + 1) / 2)
    found, quantised = tokenizer.quantise(CASE["rand_z"].flatten(2).transpose(1, 2))
    CASE.check(
        vq_f=latents,
        vq_idx=codes,
        vq_quant=as_latents(teacher.embed(codes), CASE["vq_quant"]),
        vq_rec_img=teacher.decode(codes, clamp=False),
        gen0_img=teacher.decode(CASE["gen0_idx"], clamp=False),
        dec_img=teacher.decode(CASE["dec_idx"], clamp=False),
        dec_codes=teacher.embed(CASE["dec_idx"]),
        rand_idx=found,
        rand_zq=as_latents(quantised, CASE["rand_zq"]),
    )


def test_text_condition(text_teacher):
    condition, codes = (TEXT["caption"], TEXT["emb_masks"]), TEXT["tf_idx"]
    logits = text_teacher.logits(condition, codes)
    # Without a mask, the official call sees padding, whose features are zeros.
    unmasked = (TEXT["caption"] * TEXT["emb_masks"][..., None], torch.ones_like(TEXT["emb_masks"]))
    TEXT.check(
        tf_logits=logits,
        tf_loss=F.cross_entropy(logits.flatten(0, 1), codes.flatten()),
        tf_logits_uncond=text_teacher.logits(condition, codes, unconditional=True),
        tf_logits_nomask=text_teacher.logits(unmasked, codes),
    )


@pytest.mark.parametrize("number", range(len(TEXT.config["gen"])))
def test_text_generation(text_teacher, number):
    codes, logits = generated(text_teacher, (TEXT["caption"], TEXT["emb_masks"]), TEXT.config["gen"][number])
    TEXT.check(**{f"gen{number}_idx": codes, f"gen{number}_logits_cfg": logits})


def test_padding_mask():
    valid = TEXT["emb_masks"].bool()
    recorded = TEXT["gen0_prefill_mask"].bool()[:2, :10, :10]
    assert torch.equal(padded_mask(valid, 10)[:, 0], recorded)


@pytest.mark.parametrize("point", POINTS)
def test_student_predictions(student, point):
    logits, embeddings = student.predict(STUDENT["label"], STUDENT[f"fwd_{point}_x"], POINTS[point])
    STUDENT.check(**{f"fwd_{point}_logits": logits, f"fwd_{point}_tokens": embeddings})


def test_live_weights_of_the_student(teacher):
    live = load_student(STUDENT.file("student.pt"), teacher, ema=False)
    STUDENT.check(codebook=teacher.codebook, fwd_t0_logits_model=live.predict(STUDENT["label"], STUDENT["noise"], 0)[0])


def picture(teacher, embeddings):
    return (teacher.decode(embeddings, clamp=False) + 1) / 2


@pytest.mark.parametrize("number", range(len(STUDENT.config["chains"])))
def test_student_sampling(teacher, student, number):
    chain = STUDENT.config["chains"][number]
    steps = tuple(chain["t_list"])
    made = student.sample(STUDENT["label"], STUDENT["noise"], steps=steps, split=chain["split_t"])
    STUDENT.check(**{f"chain{number}_seq{len(steps) - 1}": made, f"chain{number}_img": picture(teacher, made)})


@pytest.mark.parametrize("number", range(len(STUDENT.config["combine"])))
def test_teacher_involved_sampling(teacher, student, number):
    settings, label, noise = STUDENT.config["combine"][number], STUDENT["label"], STUDENT["noise"]
    first, last = settings["teacher_start_t"], settings["t_list"][1]
    guidance = {name: settings[name] for name in ("cfg_scale", "cfg_interval", "top_k", "top_p", "temperature")}
    made = student.sample(label, noise, teacher_range=(first, last), split=settings["split_t"], **guidance)
    STUDENT.check(**{f"comb{number}_img": picture(teacher, made)})
    if f"comb{number}_final_seq" in STUDENT.io:
        STUDENT.check(**{f"comb{number}_final_seq": made})
    prefix = STUDENT.io.get(f"comb{number}_prefix_idx")
    codes = teacher.generate(label, sampler="greedy", prefix=prefix, stop=last, **guidance)
    STUDENT.check(**{f"comb{number}_tokens": codes})
    # Both as the official script calls it: twice the same point given, and the teacher drawing its tokens.
    again = student.sample(
        label, noise, steps=(0, last), teacher_range=(first, last), split=settings["split_t"], sampler="multinomial",
        **guidance,
    )  # fmt: skip
    assert torch.equal(again, made)


VARIANTS = {
    "grouped queries": {"n_kv_head": 2},
    "one key head": {"n_kv_head": 1},
    "captions": {"model_type": "t2i", "cls_token_num": 6},
    "captions, grouped queries": {"model_type": "t2i", "cls_token_num": 3, "n_kv_head": 2},
    "another base": {"rope_base": 100.0},
}


def condition_for(teacher):
    if teacher.sizes.model_type == "c2i":
        return torch.tensor([1, 4])
    tokens = teacher.sizes.cls_token_num
    valid = torch.arange(tokens) >= torch.tensor([[0], [2]])  # the second caption is padded
    return torch.randn(2, tokens, 12), valid.long()


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_teacher_forcing(variant):
    teacher = llamagen_teacher_like(**VARIANTS[variant])
    condition = condition_for(teacher)
    codes = teacher.generate(condition, sampler="greedy", cfg_scale=3.0, top_k=0)
    guided = filter_logits(
        teacher.logits(condition, codes), uncond=teacher.logits(condition, codes, unconditional=True), cfg_scale=3.0
    )
    assert torch.equal(codes, guided.argmax(-1))
    settings = {"sampler": "greedy", "cfg_scale": 3.0, "top_k": 0}
    assert torch.equal(codes, teacher.generate(condition, prefix=codes[:, :4], **settings))
    assert torch.equal(codes[:, :1], teacher.generate(condition, stop=1, **settings))
    unguided = teacher.generate(condition, sampler="greedy", cfg_scale=1.0, prefix=codes[:, :4])
    assert torch.equal(unguided[:, 4:], teacher.logits(condition, unguided).argmax(-1)[:, 4:])


def test_a_teacher_trained_without_guidance(tmp_path):
    teacher = llamagen_teacher_like(class_dropout_prob=0.0)
    export_teacher(teacher, tmp_path / "gpt.pt", tmp_path / "vq.pt")
    sizes = {"n_head": 4, "block_size": 9, "class_dropout_prob": 0.0}
    loaded = load_teacher(tmp_path / "gpt.pt", tmp_path / "vq.pt", **sizes)
    assert loaded.num_classes == 5
    label = torch.tensor([0, 4])
    greedy = {"sampler": "greedy", "top_k": 0}
    codes = loaded.generate(label, cfg_scale=1.0, **greedy)
    assert torch.equal(codes, teacher.logits(label, codes).argmax(-1))
    with pytest.raises(ValueError, match="cfg_scale: this teacher has no embedding for 'no condition'"):
        loaded.generate(label, cfg_scale=2.0, **greedy)
    student = start_student(loaded)
    assert torch.equal(student.cls_embedding.embedding_table.weight[:5], teacher.cls_embedding.embedding_table.weight)


def test_padding_changes_nothing():
    """Features of padding, and how much of it there is, are invisible: positions of captions are not rotated."""
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=6)
    features, valid = condition_for(teacher)
    codes = torch.randint(16, (2, 9))
    before = teacher.logits((features, valid), codes)
    changed = features + 7 * (1 - valid)[..., None]
    assert torch.equal(teacher.logits((changed, valid), codes), before)
    assert before.isfinite().all()


def test_rotation_of_known_angles():
    """Token j of a g x g grid is rotated by row j // g in the first half of the pairs, column j % g in the rest."""
    sizes = LlamaGenSizes(dim=16, n_head=2, n_kv_head=2, n_layer=1, block_size=9, cls_token_num=2, rope_base=100.0)
    table = rope_table(sizes)
    assert table.shape == (11, 4, 2)
    assert (table[:2] == 0).all()
    for token in range(9):
        row, column = divmod(token, 3)
        angles = torch.tensor([row, row * 0.1, column, column * 0.1])
        assert torch.allclose(table[2 + token], torch.stack((angles.cos(), angles.sin()), -1), atol=1e-6)
    x = torch.randn(1, 11, 2, 8)
    turned = rotated(x, table[:, None])
    assert (turned[:, :2] == 0).all()
    a, b = x[0, 7, 1, 4:6]
    cosine, sine = table[7, 2]
    assert torch.allclose(turned[0, 7, 1, 4:6], torch.stack((a * cosine - b * sine, b * cosine + a * sine)), atol=1e-6)


@pytest.mark.parametrize(
    ("condition", "error", "words"),
    [
        (torch.tensor([0, 1]), TypeError, "expected a pair of features"),
        (
            (torch.randn(2, 7, 12), torch.ones(2, 7)),
            ValueError,
            r"got \[2, 7, 12\] and \[2, 7\], expected features \[B, up to 6, 12\]",
        ),
        ((torch.randn(2, 6, 12), torch.ones(2, 5)), ValueError, r"got \[2, 6, 12\] and \[2, 5\]"),
    ],
)
def test_wrong_text_conditions(condition, error, words):
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=6)
    with pytest.raises(error, match=words):
        teacher.generate(condition)


def test_captions_are_padded_on_the_left():
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=6)
    features, valid = condition_for(teacher)
    with pytest.raises(ValueError, match="padding behind a token, expected padding on the left"):
        teacher.generate((features, valid.flip(1)))
    with pytest.raises(ValueError, match="padding behind a token, expected padding on the left"):
        teacher.logits((features, valid.flip(1)), torch.zeros(2, 9, dtype=torch.int64))


def test_a_text_student():
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=6)
    student = randomised(LlamaGenStudent(teacher))
    features, valid = condition_for(teacher)
    noise = torch.randn(2, 9, 4)
    logits, embeddings = student.predict((features, valid), noise, 0)
    assert logits.shape == (2, 9, 16)
    changed = features + 7 * (1 - valid)[..., None]
    again = student.predict((changed, valid), noise, 0)
    assert torch.equal(logits, again[0])
    assert torch.equal(embeddings, again[1])
    other = student.predict((features.flip(0), valid.flip(0)), noise, 0)
    assert not torch.allclose(embeddings, other[1])
    involved = student.sample((features, valid), noise, teacher_range=(2, 5), cfg_scale=2.0)
    assert involved.shape == (2, 9, 4)


def test_a_new_student_starts_as_its_teacher(teacher):
    student = start_student(teacher)
    for name, value in teacher.state_dict().items():
        if not name.startswith(("tokenizer.", "tok_embeddings")):
            assert torch.equal(student.state_dict()[name], value), name
    student.requires_grad_(True)
    logits, embeddings = student.predict(STUDENT["label"], STUDENT["noise"], 0)
    (logits.sum() + embeddings.sum()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2, 4), (1, 2, 2, 4)], ids=["VQ-16", "VQ-8"])
@pytest.mark.parametrize("pixels", [256, 384, 512])
def test_tokenizers_at_every_size(tmp_path, multipliers, pixels):
    tokenizer = LlamaGenTokenizer(
        num_codes=64, sizes=ConvSizes(channels=32, multipliers=multipliers, blocks=1, latent_channels=32)
    )
    torch.save({"model": tokenizer.state_dict()}, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    side = pixels // loaded.downsampling
    assert loaded.downsampling == 2 ** (len(multipliers) - 1)
    images = torch.rand(1, 3, pixels, pixels) * 2 - 1
    with torch.no_grad():
        codes = loaded.encode(images)
        assert codes.shape == (1, side * side)
        if pixels == 256:
            assert torch.equal(codes, tokenizer.encode(images))
            assert loaded.decode(loaded.codebook()[codes]).shape == images.shape


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
def test_reduced_precision_stays_close(teacher, dtype, bound):
    """Mean error of the logits over their standard deviation."""
    reduced = load_teacher(CASE.file("gpt.pt"), CASE.file("vq.pt"), dtype=dtype, **SIZES)
    assert torch.equal(reduced.codebook, teacher.codebook)
    logits = reduced.logits(CASE["tf_label"], CASE["tf_idx"])
    assert logits.dtype == torch.float32
    assert (logits - CASE["tf_logits"]).abs().mean() / CASE["tf_logits"].std() < bound
    student = load_student(STUDENT.file("student.pt"), reduced, dtype=dtype)
    predicted, embeddings = student.predict(STUDENT["label"], STUDENT["noise"], 0)
    assert (predicted - STUDENT["fwd_t0_logits"]).abs().mean() / STUDENT["fwd_t0_logits"].std() < bound
    assert (embeddings - STUDENT["fwd_t0_tokens"]).abs().mean() / STUDENT["fwd_t0_tokens"].std() < bound


def test_published_sizes_have_the_published_parameters():
    """LlamaGen's README: B 111 M, L 343 M, XL 775 M, XXL 1.4 B, 3B 3.1 B."""
    counts = {}
    for name, sizes in LLAMAGEN_SIZES.items():
        with torch.device("meta"):
            teacher = LlamaGenTeacher(LlamaGenTokenizer(), sizes)
        network = sum(p.numel() for key, p in teacher.named_parameters() if not key.startswith("tokenizer."))
        counts[name] = f"{network:.3g}" if network < 1e9 else f"{network:.2g}"
    published = {"B": "1.11e+08", "L": "3.43e+08", "XL": "7.75e+08", "XXL": "1.4e+09", "3B": "3.1e+09"}
    assert {name: counts[name] for name in published} == published


def test_w1_and_w3_are_one_matrix_and_two_in_every_state():
    """In the order of the official layers, and nowhere else in memory."""
    teacher = llamagen_teacher_like()
    layer, state = teacher.layers[1].feed_forward, teacher.state_dict()
    names = [name for name in state if name.startswith("layers.1.feed_forward.")]
    assert [name.rsplit(".", 2)[1] for name in names] == ["w1", "w3", "w2"]
    w1, w3 = (state[name] for name in names[:2])
    assert torch.equal(torch.cat((w1, w3)), layer.w13.weight)
    assert w1.data_ptr() == layer.w13.weight.data_ptr()
    x, branch = torch.randn(2, 2, 3, 64)
    norm = teacher.layers[1].ffn_norm
    total, following = layer(x, branch, norm)
    normed = norm(x + branch)
    assert torch.equal(total, x + branch)
    assert torch.allclose(following, layer.w2(F.silu(normed @ w1.T) * (normed @ w3.T)), atol=1e-6)

    other = copy.deepcopy(randomised(llamagen_teacher_like(), 0.3))
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    del state[names[1]]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"layers.1.feed_forward.w13.weight\""):
        other.load_state_dict(state)
