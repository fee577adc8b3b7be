"""VAR, its tokenizer and its student against the official code's recorded outputs, and against themselves."""

import pytest
import torch
from golden import Case
from official import var_student_tensors, var_teacher_like

from ddfast.errors import DDFastError
from ddfast.models import attention
from ddfast.models.loading import load_student, load_teacher, load_tokenizer, start_student
from ddfast.models.var.network import VARSizes, VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer, phi_index
from ddfast.models.vqgan import ConvSizes
from ddfast.ops import filter_logits

CASE, SCALES, STUDENT = Case("var_teacher"), Case("var_quant_10scales"), Case("dd_var")
POINTS = {"t0": 0, "tmid": STUDENT.config["t_mid"], "tmix": torch.tensor(STUDENT.config["t_mix"])}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(CASE.file("var.pth"), CASE.file("vae.pth"))


@pytest.fixture(scope="module")
def student(teacher):
    return load_student(STUDENT.file("student.pth"), teacher)


def test_sizes_are_read_off_the_tensors(teacher):
    wanted = CASE.config["VAR"]
    for name in ("num_classes", "depth", "embed_dim", "num_heads", "mlp_ratio", "norm_eps", "attn_l2_norm"):
        assert getattr(teacher.sizes, name) == wanted[name], name
    assert list(teacher.tokenizer.patch_nums) == wanted["patch_nums"]
    assert teacher.groups == (1, 4, 9, 16)


def test_the_models_own_configuration_is_accepted():
    config = {**CASE.config["build_vae_var"], **CASE.config["VAR"]}
    load_teacher(CASE.file("var.pth"), CASE.file("vae.pth"), **config)


def test_teacher_forcing(teacher):
    label, codes = CASE["tf_label"], CASE["tf_idx"]
    CASE.check(
        tf_var_input=teacher.tokenizer.teacher_forcing_input(teacher.embed(codes)),
        tf_logits=teacher.logits(label, codes),
        tf_logits_uncond=teacher.logits(label, codes, unconditional=True),
    )
    assert torch.equal(teacher.logits(label, teacher.embed(codes)), teacher.logits(label, codes))


def test_generation(teacher):
    settings, label = CASE.config["inference"], CASE["gen_label"]
    codes = teacher.generate(
        label, sampler="greedy", cfg_scale=settings["cfg"], top_k=settings["top_k"], top_p=settings["top_p"]
    )
    conditional, unconditional = (teacher.logits(label, codes, unconditional=flag) for flag in (False, True))
    scale = [teacher.group_cfg_scale(settings["cfg"], group) for group in range(4)]
    scale = torch.tensor(scale).repeat_interleave(torch.tensor(teacher.groups))[:, None]
    CASE.check(
        gen_idx=codes,
        gen_logits_raw=torch.cat((conditional, unconditional)),
        gen_logits_cfg=unconditional + scale * (conditional - unconditional),
        gen_f_hat=teacher.tokenizer.embed_to_fhat(teacher.embed(codes))[-1],
        gen_img=teacher.decode(codes),
    )


def test_tokenizer(teacher):
    tokenizer, image = teacher.tokenizer, CASE["vq_img"]
    latents = tokenizer.latents(image)
    _, f_hats = tokenizer.quantise(latents)
    of_codes = tokenizer.embed_to_fhat(teacher.embed(CASE["dec_idx"]))
    CASE.check(
        vq_f=latents,
        vq_idx=teacher.encode((image + 1) / 2),
        vq_fhat_scales=torch.stack(f_hats),
        vq_rec_img=tokenizer.decode_latents(f_hats[-1]).clamp(-1, 1),
        dec_img=teacher.decode(CASE["dec_idx"], clamp=False).clamp(-1, 1),
        dec_img_first_scale=tokenizer.decode_latents(of_codes[0]).clamp(-1, 1),
        dec_fhat_scales=torch.stack(of_codes),
    )


def test_the_ten_scales_of_imagenet():
    tokenizer = load_tokenizer(CASE.file("vae.pth"), **SCALES.config["VQVAE"])
    embeddings = tokenizer.codebook()[SCALES["idx"]]
    codes, f_hats = tokenizer.quantise(SCALES["f"])
    after = tokenizer.embed_to_fhat(embeddings)
    given = [tokenizer.next_input(scale + 1, f_hat) for scale, f_hat in enumerate(after[:-1])]
    SCALES.check(
        var_input=tokenizer.teacher_forcing_input(embeddings),
        fhat_scales=torch.stack(after),
        next_inputs=torch.cat(given, dim=1),
        fhat_final=after[-1],
        f_idx=codes,
        f_fhat_final=f_hats[-1],
    )
    indices = [phi_index(scale, 10, 4) for scale in range(10)]
    assert indices == SCALES.config["phi_index_per_scale"]


@pytest.mark.parametrize("point", POINTS)
def test_student_predictions(student, point):
    logits, embeddings = student.predict(STUDENT["label"], STUDENT[f"fwd_{point}_x"], POINTS[point])
    STUDENT.check(**{f"fwd_{point}_logits": logits, f"fwd_{point}_tokens": embeddings})


def test_live_weights_of_the_student(teacher):
    live = load_student(STUDENT.file("student.pth"), teacher, ema=False)
    STUDENT.check(fwd_t0_logits_var_wo_ddp=live.predict(STUDENT["label"], STUDENT["noise"], 0)[0])


@pytest.mark.parametrize("number", range(len(STUDENT.config["chains"])))
def test_student_sampling(teacher, student, number):
    chain = STUDENT.config["chains"][number]
    steps = tuple(chain["t_list"])
    made = student.sample(STUDENT["label"], STUDENT["noise"], steps=steps, split=chain["loss_split_t"])
    names = {f"chain{number}_seq{len(steps) - 1}": made, f"chain{number}_img": teacher.decode(made)}
    STUDENT.check(**names)


@pytest.mark.parametrize("number", range(len(STUDENT.config["combine"])))
def test_teacher_involved_sampling(teacher, student, number):
    settings, label, noise = STUDENT.config["combine"][number], STUDENT["label"], STUDENT["noise"]
    first, last = settings["t_teacher_start"], min(settings["t_list"][1], len(teacher.groups))
    guidance = {"cfg_scale": settings["cfg"], "top_k": settings["teacher_top_k"], "top_p": settings["teacher_top_p"]}
    made = student.sample(label, noise, teacher_range=(first, last), split=settings["loss_split_t"], **guidance)
    STUDENT.check(**{f"comb{number}_img": teacher.decode(made)})
    if f"comb{number}_final_seq" in STUDENT.io:
        STUDENT.check(**{f"comb{number}_final_seq": made})
    # The teacher's own part, by both samplers: with top_k = 1 the flow has one code to go to.
    starts = teacher.group_starts()
    prefix = STUDENT.io.get(f"comb{number}_prefix_quant")
    prefix = None if prefix is None else torch.cdist(prefix[:, : starts[first]], teacher.codebook).argmin(-1)
    for sampler in ({"sampler": "greedy"}, {"sampler": "flow", "noise": noise}):
        settings = {**guidance, **sampler, "masked_prefix": False}
        codes = teacher.generate(label, prefix=prefix, stop=starts[last], **settings)
        STUDENT.check(
            **{
                f"comb{number}_teacher_idx": codes[:, starts[first] :],
                f"comb{number}_teacher_seq": teacher.embed(codes),
            }
        )


VARIANTS = {
    "shared modulation": {"shared_aln": True},
    "plain attention": {"attn_l2_norm": False},
    "both": {"shared_aln": True, "attn_l2_norm": False, "depth": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_teacher_forcing(variant):
    teacher = var_teacher_like(**VARIANTS[variant])
    label = torch.tensor([1, 4])
    codes = teacher.generate(label, sampler="greedy", cfg_scale=1.5, top_k=0, top_p=1.0)
    scale = torch.tensor([1 + 1.5 * group / 2 for group in range(3)]).repeat_interleave(torch.tensor(teacher.groups))
    guided = filter_logits(
        teacher.logits(label, codes), uncond=teacher.logits(label, codes, unconditional=True), cfg_scale=scale
    )
    assert torch.equal(codes, guided.argmax(-1))
    prefix = codes[:, :5]
    assert torch.equal(
        codes, teacher.generate(label, sampler="greedy", cfg_scale=1.5, top_k=0, top_p=1.0, prefix=prefix)
    )
    teacher.defaults = type(teacher.defaults)(cfg_scale=1.5)
    assert torch.allclose(teacher.log_probs(label, codes), guided, atol=1e-5)


def test_an_unmasked_prefix_is_another_distribution():
    teacher = var_teacher_like()
    label, codes = torch.tensor([1, 4]), torch.randint(16, (2, 14))
    outputs = [
        teacher.read_out(teacher.advance(teacher.begin(label, guided=False, masked_prefix=masked), codes[:, :5]))
        for masked in (True, False)
    ]
    assert torch.allclose(outputs[0], teacher.logits(label, codes)[:, 5:], atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [0, 1, 3, 4])
def test_ways_to_share_phi(tmp_path, shared):
    tokenizer = VARTokenizer(
        patch_nums=(1, 2, 4), num_codes=8, code_dim=4, sizes=ConvSizes(channels=32, latent_channels=4),
        share_quant_resi=shared,
    )  # fmt: skip
    torch.save(tokenizer.state_dict(), tmp_path / "vae.pth")
    loaded = load_tokenizer(tmp_path / "vae.pth", v_patch_nums=[1, 2, 4])
    latents = torch.randn(1, 4, 4, 4)
    for ours, theirs in zip(tokenizer.quantise(latents)[1], loaded.quantise(latents)[1], strict=True):
        assert torch.equal(ours, theirs)
    assert loaded.phi_count == (shared or 3)


def test_large_images_are_decoded_in_parts(teacher, monkeypatch):
    """As many pixels at a time as 64 images of 256: a decoder's activations grow with them."""
    codes = torch.randint(teacher.num_codes, (5, teacher.num_tokens), generator=torch.Generator().manual_seed(0))
    whole = teacher.decode(codes)
    parts, decoder = [], teacher.tokenizer.decoder
    monkeypatch.setattr("ddfast.models.tokenizers._PIXELS", 2 * whole[0, 0].numel())
    handle = decoder.register_forward_pre_hook(lambda _, inputs: parts.append(len(inputs[0])))
    made = teacher.decode(codes)
    handle.remove()
    assert parts == [2, 2, 1]
    torch.testing.assert_close(made, whole, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_refused(teacher):
    with pytest.raises(ValueError, match=r"images: got \[2, 2\] latents, expected 4 x 4"):
        teacher.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"images: got shape \[1, 3, 30, 32\]"):
        teacher.encode(torch.rand(1, 3, 30, 32))


def test_a_new_student_starts_as_its_teacher(teacher):
    student = start_student(teacher)
    for name, value in teacher.state_dict().items():
        if not name.startswith(("tokenizer.", "lvl_embed", "pos_1LC")):
            assert torch.equal(student.state_dict()[name], value), name
    for own, theirs in (
        (student.lvl_embed.weight, teacher.lvl_embed.weight),
        (student.pos_1LC[0], teacher.pos_1LC[0]),
    ):
        assert torch.equal(own[0], theirs[0])
        assert torch.equal(own[2:], theirs[1:])
        assert not torch.equal(own[1], theirs[1])
    student.requires_grad_(True)
    logits, embeddings = student.predict(STUDENT["label"], STUDENT["noise"], 0)
    (logits.sum() + embeddings.sum()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_student_without_layerwise_embeddings(tmp_path, teacher):
    torch.save({"trainer": {"ema_parameters": var_student_tensors(teacher, layerwise=False)}}, tmp_path / "s.pth")
    student = load_student(tmp_path / "s.pth", teacher)
    assert not hasattr(student, "layerwise_n_d_embed")
    x = STUDENT["noise"]
    assert not torch.allclose(student.predict(STUDENT["label"], x, 0)[0], student.predict(STUDENT["label"], x, 2)[0])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.015), (torch.float16, 0.002)])
def test_reduced_precision_stays_close(teacher, dtype, bound):
    """Mean error of the logits over their standard deviation."""
    reduced = load_teacher(CASE.file("var.pth"), CASE.file("vae.pth"), dtype=dtype)
    assert reduced.codebook.dtype == torch.float32
    logits = reduced.logits(CASE["tf_label"], CASE["tf_idx"])
    assert logits.dtype == torch.float32
    error = (logits - CASE["tf_logits"]).abs().mean() / CASE["tf_logits"].std()
    assert error < bound
    student = load_student(STUDENT.file("student.pth"), reduced, dtype=dtype)
    predicted, embeddings = student.predict(STUDENT["label"], STUDENT["noise"], 0)
    assert (predicted - STUDENT["fwd_t0_logits"]).abs().mean() / STUDENT["fwd_t0_logits"].std() < bound
    assert (embeddings - STUDENT["fwd_t0_tokens"]).abs().mean() / STUDENT["fwd_t0_tokens"].std() < bound


def test_no_square_mask_per_head(monkeypatch):
    """Teacher forcing calls attention without any mask; the student's is one [S, S] for all heads."""
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **settings):
        seen.append(settings.get("attn_mask"))
        return original(*arguments, **settings)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    teacher = load_teacher(CASE.file("var.pth"), CASE.file("vae.pth"))
    teacher.logits(CASE["tf_label"], CASE["tf_idx"])
    assert all(mask is None for mask in seen)
    load_student(STUDENT.file("student.pth"), teacher).predict(STUDENT["label"], STUDENT["noise"], 0)
    assert max(mask.numel() for mask in seen if mask is not None) == 31 * 31


def test_scales_may_be_given_where_a_file_lacks_the_buffers(tmp_path):
    tensors = torch.load(CASE.file("var.pth"), weights_only=True)
    del tensors["lvl_1L"]
    torch.save(tensors, tmp_path / "var.pth")
    with pytest.raises(DDFastError, match=r"patch_nums: .* has 30 positions and no lvl_1L"):
        load_teacher(tmp_path / "var.pth", CASE.file("vae.pth"))
    teacher = load_teacher(tmp_path / "var.pth", CASE.file("vae.pth"), patch_nums=[1, 2, 3, 4])
    CASE.check(tf_logits=teacher.logits(CASE["tf_label"], CASE["tf_idx"]))


def test_published_sizes_have_the_published_parameters():
    """VAR-d16, d20, d24, d30: 310 M, 600 M, 1.0 B, 2.0 B (README of the official repository)."""
    counts = []
    for depth in (16, 20, 24, 30):
        with torch.device("meta"):
            sizes = VARSizes(depth=depth, embed_dim=64 * depth, num_heads=depth)
            teacher = VARTeacher(VARTokenizer(), sizes)
        network = sum(p.numel() for name, p in teacher.named_parameters() if not name.startswith("tokenizer."))
        counts.append(f"{network:.2g}")
    assert counts == ["3.1e+08", "6e+08", "1e+09", "2e+09"]
