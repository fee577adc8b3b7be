"""Checkpoints as people have them: wrapped, renamed, damaged, of another kind, and with what they say of themselves."""

import argparse
import json
import shutil

import pytest
import torch
from golden import Case
from official import digits_like, llamagen_teacher_like, randomised, var_teacher_like
from safetensors.torch import save_file

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import storable
from ddfast.models.converting import export_teacher
from ddfast.models.flow_network import TransformerFlowNetwork
from ddfast.models.llamagen.network import rope_table
from ddfast.models.loading import load_student, load_teacher, load_tokenizer, save_student, save_teacher, start_student

VAR, GPT, VAR_DD, GPT_DD = Case("var_teacher"), Case("llamagen_c2i"), Case("dd_var"), Case("dd_llamagen")
SIZES = {"n_head": 4, "block_size": 16, "num_classes": 10}


def read(path):
    return torch.load(path, weights_only=True)


def gpt_tensors():
    return {name: value.clone() for name, value in read(GPT.file("gpt.pt"))["model"].items()}


def check_gpt(teacher):
    GPT.check(tf_logits=teacher.logits(GPT["tf_label"], GPT["tf_idx"]))


def named(prefix):
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def under(*keys):
    def wrap(content):
        for key in reversed(keys):
            content = {key: content}
        return content

    return wrap


def inside(part):
    """A wrapper's part in the middle of every block's names, as FSDP and checkpointing put it."""
    return lambda tensors: {
        name.replace("layers.", f"layers.{part}.")
        .replace("blocks.", f"blocks.{part}.")
        .replace(".0.", f".0.{part}.", 1)
        if name.startswith(("layers.", "blocks."))
        else name: value
        for name, value in tensors.items()
    }


WRAPS = {
    "flat": [],
    "module.": [named("module.")],
    "_orig_mod.": [named("_orig_mod.")],
    "_orig_mod.module.": [named("_orig_mod.module.")],
    "module._orig_mod.": [named("module._orig_mod.")],
    "_fsdp_wrapped_module.": [inside("_fsdp_wrapped_module"), named("_fsdp_wrapped_module.")],
    "_checkpoint_wrapped_module.": [inside("_checkpoint_wrapped_module")],
    "compiled blocks": [inside("_orig_mod")],
    "lightning": [named("model."), under("state_dict")],
    "lightning, compiled, distributed": [named("model.module._orig_mod."), under("state_dict")],
    "net.": [named("net."), under("net")],
    "model_state_dict": [under("model_state_dict")],
    "state_dict in model": [under("model", "state_dict")],
    "deep": [named("module."), under("trainer", "a", "b", "module")],
    "ema": [under("ema")],
    "model_ema": [named("module."), under("model_ema")],
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappings(tmp_path, wrap):
    """Teacher, tokenizer and students of both families, in every wrapping."""

    def wrapped(tensors, name):
        for step in WRAPS[wrap]:
            tensors = step(tensors)
        torch.save({**tensors, "epoch": 3} if wrap != "flat" else tensors, tmp_path / name)
        return tmp_path / name

    vq = wrapped(read(GPT.file("vq.pt"))["model"], "vq.pt")
    check_gpt(load_teacher(wrapped(gpt_tensors(), "gpt.pt"), vq, **SIZES))
    GPT.check(dec_img=load_tokenizer(vq).decode(GPT["dec_idx"]))
    var = load_teacher(wrapped(read(VAR.file("var.pth")), "var.pth"), wrapped(read(VAR.file("vae.pth")), "vae.pth"))
    VAR.check(tf_logits=var.logits(VAR["tf_label"], VAR["tf_idx"]))
    student = wrapped(read(VAR_DD.file("student.pth"))["trainer"]["ema_parameters"], "student.pth")
    VAR_DD.check(fwd_t0_logits=load_student(student, var).predict(VAR_DD["label"], VAR_DD["noise"], 0)[0])
    gpt = load_teacher(GPT.file("gpt.pt"), GPT.file("vq.pt"), **SIZES)
    student = wrapped(read(GPT_DD.file("student.pt"))["ema"], "student.pt")
    GPT_DD.check(fwd_t0_logits=load_student(student, gpt).predict(GPT_DD["label"], GPT_DD["noise"], 0)[0])


def test_one_file_of_a_whole_training(tmp_path):
    """Lightning keeps transformer, tokenizer and average beside each other in one dict."""
    tensors = named("model.")(gpt_tensors()) | named("vq_model.")(read(GPT.file("vq.pt"))["model"])
    tensors |= named("ema.module.")({name: value + 1 for name, value in gpt_tensors().items()})
    tensors |= named("loss.net.")({"weight": torch.ones(3), "a.b": torch.ones(2), "c": torch.ones(1)})
    torch.save(
        {"state_dict": tensors, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(9)}}}]}, tmp_path / "x"
    )
    check_gpt(load_teacher(tmp_path / "x", **SIZES))
    averaged = load_teacher(tmp_path / "x", ema=True, **SIZES)
    assert torch.equal(averaged.output.weight, gpt_tensors()["output.weight"] + 1)
    GPT.check(dec_img=load_tokenizer(tmp_path / "x").decode(GPT["dec_idx"]))


def test_several_sets_of_weights_are_said(tmp_path, capsys):
    live, averaged = gpt_tensors(), {name: value + 1 for name, value in gpt_tensors().items()}
    for content in ({"ema": averaged, "model": live}, {"model_ema": averaged, "module": live}):
        torch.save(content, tmp_path / "gpt.pt")
        key = next(name for name in content if "ema" not in name)
        check_gpt(load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), **SIZES))
        said = capsys.readouterr().out
        assert f": {key} is read; ema=True reads the averaged ones" in said
    torch.save({"ema": averaged}, tmp_path / "gpt.pt")
    load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), **SIZES)
    assert "one set of weights (ema), not live ones" in capsys.readouterr().out
    torch.save({"model": live}, tmp_path / "gpt.pt")
    with pytest.raises(DDFastError, match="holds live weights alone; ema=True asks for the averaged ones"):
        load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), ema=True, **SIZES)


@pytest.mark.parametrize("family", ["digits", "var", "llamagen"])
@pytest.mark.parametrize("wrap", ["flat", "fsdp", "live"])
def test_a_saved_state_dict_is_a_student(tmp_path, family, wrap):
    teacher = {"digits": digits_like, "var": var_teacher_like, "llamagen": llamagen_teacher_like}[family]()
    student = randomised(start_student(teacher))
    tensors = student.state_dict()
    if wrap == "fsdp":
        tensors = named("_fsdp_wrapped_module.")(inside("_fsdp_wrapped_module")(tensors))
    torch.save({"trainer": {"var_wo_ddp": tensors}} if wrap == "live" else tensors, tmp_path / "s.pt")
    label, noise = torch.tensor([0, 3]), torch.randn(2, teacher.num_tokens, teacher.code_dim)
    for ema in (True, False):
        loaded = load_student(tmp_path / "s.pt", teacher, ema=ema)
        torch.testing.assert_close(loaded.predict(label, noise, 1), student.predict(label, noise, 1))


def test_a_saved_state_dict_is_a_network_of_dd2(tmp_path, capsys):
    teacher = digits_like()
    network = randomised(TransformerFlowNetwork.from_teacher(teacher, head_width=24, head_depth=2))
    torch.save(network.state_dict(), tmp_path / "s.pt")
    label, noise = torch.tensor([0, 3]), torch.randn(2, teacher.num_tokens, teacher.code_dim)
    loaded = load_student(tmp_path / "s.pt", teacher)
    torch.testing.assert_close(loaded.sample(label, noise), network.sample(label, noise))
    assert "nothing says at which flow time" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpt.PTH", "gpt.pth.tar", "gpt", "gpt.safetensors", "gpt.bin", "gpt.pt.old"])
@pytest.mark.parametrize("kind", ["pytorch", "safetensors"])
def test_content_decides_not_the_suffix(tmp_path, name, kind):
    path, tensors = tmp_path / name, gpt_tensors()
    if kind == "pytorch":
        torch.save({"model": tensors}, path)
    else:
        save_file(storable(tensors), path)
    check_gpt(load_teacher(path, GPT.file("vq.pt"), **SIZES))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n  <html lang='en'>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"", "is empty"),
        (b'{"error": "Repository not found"}', "is a JSON file"),
        (b"Entry not found: who knows", "is a text file, not a checkpoint: it begins 'Entry not found"),
        (b"\x1f\x8b" + bytes(50), "is a gzip archive"),
        (b"PK\x03\x04" + bytes(50), "is damaged, most likely cut short"),
        (bytes(range(256)), "is damaged or no checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    teacher = load_teacher(GPT.file("gpt.pt"), GPT.file("vq.pt"), **SIZES)
    for load in (
        lambda path: load_teacher(path, GPT.file("vq.pt")),
        lambda path: load_teacher(GPT.file("gpt.pt"), path),
        load_tokenizer,
        lambda path: load_student(path, teacher),
    ):
        with pytest.raises(DDFastError, match=words) as refused:
            load(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_files_that_are_something_else_say_what(tmp_path):
    gpt, vq, dd, var = GPT.file("gpt.pt"), GPT.file("vq.pt"), GPT_DD.file("student.pt"), VAR.file("var.pth")
    teacher = load_teacher(gpt, vq, **SIZES)
    with pytest.raises(DDFastError, match=r"vq\.pt is not a teacher's checkpoint: it is a LlamaGen tokenizer; the"):
        load_teacher(vq, gpt)
    with pytest.raises(DDFastError, match=r"gpt\.pt is not a tokenizer of VAR or LlamaGen: it is a LlamaGen teacher"):
        load_teacher(gpt, gpt)
    with pytest.raises(DDFastError, match=r"it is a DD1 student of a LlamaGen teacher; load_student"):
        load_teacher(dd, vq)
    with pytest.raises(DDFastError, match=r"gpt\.pt is not a student's file: it is a LlamaGen teacher; load_teacher"):
        load_student(gpt, teacher)
    with pytest.raises(DDFastError, match=r"vq\.pt is not a student's file: it is a LlamaGen tokenizer"):
        load_student(vq, teacher)
    with pytest.raises(DDFastError, match=r"vae\.pth is a VAR tokenizer, but .*gpt\.pt is a LlamaGen teacher"):
        load_teacher(gpt, VAR.file("vae.pth"))
    with pytest.raises(DDFastError, match=r"var\.pth is not a teacher's checkpoint: it is a VAR teacher; another"):
        load_teacher(var, vq, family="llamagen")
    torch.save({"features.0.weight": torch.ones(2), "classifier.1.bias": torch.ones(2)}, tmp_path / "vgg.pth")
    with pytest.raises(DDFastError, match=r"no model that ddfast knows has its 2 tensors, such as features\.0\.weight"):
        load_teacher(tmp_path / "vgg.pth", vq)
    torch.save({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, tmp_path / "shard.pth")
    with pytest.raises(DDFastError, match="one part of a model that FSDP has split"):
        load_teacher(tmp_path / "shard.pth", vq)
    wide = gpt_tensors()
    wide["output.weight"], wide["tok_embeddings.weight"] = torch.ones(130, 64), torch.ones(130, 64)
    torch.save(wide, tmp_path / "wide.pt")
    with pytest.raises(DDFastError, match=r"vq\.pt has 128 codes, but .*wide\.pt models 130"):
        load_teacher(tmp_path / "wide.pt", vq, **SIZES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokenizers_are_float32_whatever_their_file_holds(tmp_path, dtype):
    for case, file in ((GPT, "vq.pt"), (VAR, "vae.pth")):
        content = read(case.file(file))
        tensors = {n: v.to(dtype) if v.is_floating_point() else v for n, v in content.get("model", content).items()}
        torch.save(tensors, tmp_path / file)
        tokenizer = load_tokenizer(tmp_path / file, **({} if case is GPT else {"patch_nums": (1, 2, 3, 4)}))
        assert {p.dtype for p in tokenizer.parameters()} == {torch.float32}
    teacher = load_teacher(GPT.file("gpt.pt"), tmp_path / "vq.pt", **SIZES)
    images = teacher.decode(teacher.encode(torch.rand(1, 3, 64, 64)))
    assert images.dtype == torch.float32
    if dtype == torch.float64:
        GPT.check(dec_img=teacher.decode(GPT["dec_idx"], clamp=False))


def test_weights_of_several_types_become_one(tmp_path, capsys):
    tensors = {n: v if "norm" in n else v.bfloat16() for n, v in gpt_tensors().items()}
    torch.save(tensors, tmp_path / "gpt.pt")
    teacher = load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), **SIZES)
    assert "weights of several types (bfloat16, float32): all are made float32" in capsys.readouterr().out
    assert teacher.generate(torch.tensor([1]), sampler="greedy").shape == (1, 16)
    torch.save({n: v.to(torch.float8_e4m3fn) for n, v in gpt_tensors().items()}, tmp_path / "gpt.pt")
    with pytest.raises(DDFastError, match="holds float8_e4m3fn weights: convert them"):
        load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), **SIZES)


# What a file says about itself ---------------------------------------------------------------------------------------


def load(tmp_path, name="gpt.pt", stored=None, extra=None, **given):
    """The golden LlamaGen, with options of a training script stored beside it."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    content = {"model": gpt_tensors() | (extra or {}), "steps": 7}
    torch.save(content if stored is None else {**content, "args": stored}, tmp_path / name)
    return load_teacher(tmp_path / name, GPT.file("vq.pt"), **{"n_head": 4, **given})


@pytest.mark.parametrize("kind", [dict, argparse.Namespace])
def test_stored_options_are_read(tmp_path, capsys, kind):
    options = {"image_size": 384, "downsample_size": 16, "num_classes": 10, "cls_token_num": 1, "vocab_size": 128}
    teacher = load(tmp_path, stored=kind(**options, gpt_type="c2i", lr=1e-4, code_path="/x", ema=False))
    assert teacher.num_tokens == 576
    assert teacher.num_classes == 10
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("stored", "settings", "name", "words"),
    [
        ({"image_size": 384}, {"image_size": 256}, "gpt.pt", "block_size: .*args of .* says 576, but .* given as 256"),
        ({"image_size": 256}, {}, "c2i_L_384.pt", "name of .*c2i_L_384.pt says 384 pixels, 576 .* says 256"),
        ({"num_classes": 7}, {}, "gpt.pt", "num_classes: got 7, but .* 11 rows of labels"),
        ({"downsample_size": 8, "image_size": 256}, {}, "gpt.pt", "downsample_size: .* says 8, but the tensors .* 16"),
        ({"gpt_type": "t2i"}, {}, "gpt.pt", "gpt_type: .* says 't2i', but the tensors .* 'c2i'"),
        ({"vocab_size": 16384}, {}, "gpt.pt", "vocab_size: .* says 16384, but the tensors of .* say 128"),
        ({"gpt_model": "GPT-L"}, {}, "gpt.pt", "dim: .* says 1024, but the tensors of .* say 64"),
        ({}, {"image_size": 256}, "c2i_L_384.pt", "name of .* says 384 pixels"),
        ({}, {"image_size": 250}, "gpt.pt", "image_size: got 250, expected .* a multiple of the tokenizer's 16"),
        ({}, {"image_size": 256, "block_size": 16}, "gpt.pt", "block_size: got 16, but image_size 256 means 256"),
        ({}, {}, "run_256_or_384.pt", "name of .* says 256 and 384 pixels; give image_size"),
        ({}, {"num_classes": 3}, "gpt.pt", "num_classes: got 3, but .* 11 rows"),
        ({}, {"num_classes": 10, "class_dropout_prob": 0}, "gpt.pt", "class_dropout_prob: got 0, but .* 11 rows"),
    ],
)
def test_contradictions_are_errors(tmp_path, stored, settings, name, words):
    with pytest.raises(DDFastError, match=words):
        load(tmp_path, name, stored, **settings)


def test_a_number_in_a_name_is_a_hint_where_it_is_no_models_name(tmp_path):
    assert load(tmp_path, "run-384.pt", {"image_size": 256}).num_tokens == 256
    assert load(tmp_path, "run-384.pt").num_tokens == 576
    save_teacher(tmp_path / "digits-384" / "model.safetensors", load(tmp_path, block_size=16))
    assert load_teacher(tmp_path / "digits-384").num_tokens == 16


def test_what_nothing_backs_is_said(tmp_path, capsys):
    assert load(tmp_path).num_tokens == 256
    said = capsys.readouterr().out
    assert "nothing says its image size; 256 pixels, 256 tokens, are assumed" in said
    assert "nothing says which of its 11 labels are classes" in said
    assert load(tmp_path, image_size=256, num_classes=10).num_tokens == 256
    assert not capsys.readouterr().out


@pytest.mark.parametrize("base", [10000, 500])
def test_stored_angles_tell_tokens_heads_and_base(tmp_path, capsys, base):
    sizes = llamagen_teacher_like().sizes
    table = rope_table(type(sizes)(**{**vars(sizes), "dim": 64, "n_head": 4, "block_size": 36, "rope_base": base}))
    teacher = load(tmp_path, extra={"freqs_cis": table}, n_head=None, num_classes=10)
    assert (teacher.num_tokens, teacher.sizes.n_head, teacher.sizes.rope_base) == (36, 4, base)
    assert not capsys.readouterr().out
    with pytest.raises(DDFastError, match=r"n_head: got 2, but the tensors of .* say 4"):
        load(tmp_path, extra={"freqs_cis": table}, n_head=2)
    with pytest.raises(DDFastError, match="rope_base: got 7000, but the tensors"):
        load(tmp_path, extra={"freqs_cis": table}, rope_base=7000)
    with pytest.raises(DDFastError, match=r"freqs_cis of .* is not the table of base"):
        load(tmp_path, extra={"freqs_cis": table.flip(1)})


@pytest.mark.parametrize("rows", [10, 11])
def test_the_label_for_no_condition(tmp_path, capsys, rows):
    """Without label dropout there is none, and no class is lost for it."""
    tensors = gpt_tensors()
    tensors["cls_embedding.embedding_table.weight"] = torch.randn(rows, 64)
    torch.save(tensors, tmp_path / "gpt.pt")
    given = {"n_head": 4, "block_size": 16}
    for settings in ({"class_dropout_prob": 0 if rows == 10 else 0.1}, {"num_classes": 10}):
        teacher = load_teacher(tmp_path / "gpt.pt", GPT.file("vq.pt"), **given, **settings)
        assert teacher.num_classes == 10
        assert (teacher.sizes.class_dropout_prob == 0) == (rows == 10)
        assert teacher.generate(torch.tensor([9]), sampler="greedy", top_k=1).shape == (1, 16)  # by its own defaults
        save_teacher(tmp_path / "ours.safetensors", teacher)
        assert load_teacher(tmp_path / "ours.safetensors").num_classes == 10
    assert not capsys.readouterr().out


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_hugging_face_folders(tmp_path, capsys, nested, form):
    config = {"dim": 64, "n_layer": 2, "n_head": 4, "block_size": 16, "num_classes": 10, "model_type": "c2i"}
    config |= {"rope_base": 10000, "norm_eps": 1e-5, "vocab_size": 128, "cls_token_num": 1, "n_kv_head": None}
    (tmp_path / "config.json").write_text(json.dumps({"config": config} if nested else config))
    tensors = storable(gpt_tensors())
    if form == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    elif form == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
        for file in set(where.values()):
            save_file({name: tensors[name] for name in names if where[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    check_gpt(load_teacher(tmp_path, GPT.file("vq.pt")))
    assert not capsys.readouterr().out
    with pytest.raises(DDFastError, match=r"n_head: config\.json of .* says 4, but n_head was given as 2"):
        load_teacher(tmp_path, GPT.file("vq.pt"), n_head=2)
    if form == "sharded":
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(DDFastError, match=r"names model-00002-of-00002.safetensors, which is not there"):
            load_teacher(tmp_path, GPT.file("vq.pt"))


def test_an_architectures_name_is_no_setting(tmp_path):
    config = {"model_type": "llamagen", "architectures": ["X"], "n_head": 4, "block_size": 16, "num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(storable(gpt_tensors()), tmp_path / "model.safetensors")
    check_gpt(load_teacher(tmp_path, GPT.file("vq.pt")))


def test_an_unfinished_run_is_no_student(tmp_path):
    teacher = digits_like()
    save_student(tmp_path / "checkpoint.safetensors", start_student(teacher), {})
    with pytest.raises(DDFastError, match=r"no checkpoint at .*: a folder, and expected"):
        load_student(tmp_path, teacher)


def test_folders(tmp_path):
    with pytest.raises(DDFastError, match=r"no checkpoint at .*: a folder, and expected model\.safetensors"):
        load_teacher(tmp_path, GPT.file("vq.pt"))
    shutil.copy(GPT.file("gpt.pt"), tmp_path / "0300000.pt")
    check_gpt(load_teacher(tmp_path, GPT.file("vq.pt"), **SIZES))
    shutil.copy(GPT.file("gpt.pt"), tmp_path / "0400000.pt")
    with pytest.raises(DDFastError, match=r"it holds 0300000\.pt, 0400000\.pt: name one"):
        load_teacher(tmp_path, GPT.file("vq.pt"), **SIZES)
    (tmp_path / "config.json").write_text("{")
    save_file(storable(gpt_tensors()), tmp_path / "model.safetensors")
    with pytest.raises(DDFastError, match=r"config\.json is damaged"):
        load_teacher(tmp_path, GPT.file("vq.pt"), **SIZES)


def test_heads_of_a_var_that_cannot_be_known(tmp_path, capsys):
    made = var_teacher_like(attn_l2_norm=False)  # depth 2, width 128, 2 heads: the official rule
    export_teacher(made, tmp_path / "var.pth", tmp_path / "vae.pth")
    assert load_teacher(tmp_path / "var.pth", tmp_path / "vae.pth").sizes.num_heads == 2
    made = var_teacher_like(depth=3, attn_l2_norm=False)
    export_teacher(made, tmp_path / "var.pth", tmp_path / "vae.pth")
    with pytest.raises(DDFastError, match=r"num_heads: .*width 128, depth 3.*give num_heads=\.\.\. \(--num-heads\)"):
        load_teacher(tmp_path / "var.pth", tmp_path / "vae.pth")
    loaded = load_teacher(tmp_path / "var.pth", tmp_path / "vae.pth", num_heads=2)
    codes = torch.randint(16, (1, 14))
    assert torch.equal(loaded.logits(torch.tensor([1]), codes), made.logits(torch.tensor([1]), codes))
    with pytest.raises((DDFastError, ValueError), match="num_heads: got 3, expected a divisor of embed_dim 128"):
        load_teacher(tmp_path / "var.pth", tmp_path / "vae.pth", num_heads=3)
    torch.save({"model": read(tmp_path / "var.pth"), "config": {"num_heads": 2, "depth": 3}}, tmp_path / "told.pth")
    assert load_teacher(tmp_path / "told.pth", tmp_path / "vae.pth").sizes.num_heads == 2
    save_teacher(tmp_path / "ours.safetensors", loaded)
    assert load_teacher(tmp_path / "ours.safetensors").sizes.num_heads == 2
    assert not capsys.readouterr().out


def test_options_of_vars_training_script(tmp_path):
    vae = read(VAR.file("vae.pth"))
    tensors = {name: value for name, value in read(VAR.file("var.pth")).items() if name != "lvl_1L"}
    trainer = {"var_wo_ddp": tensors, "vae_local": vae, "config": {"patch_nums": (1, 2, 3, 4), "label_smooth": 0.0}}
    args = {"depth": 2, "saln": False, "anorm": True, "patch_nums": (1, 2, 3, 4), "pn": "1_2_3_4", "data_path": "x"}
    torch.save({"epoch": 1, "trainer": trainer, "args": args}, tmp_path / "ar-ckpt-last.pth")
    teacher = load_teacher(tmp_path / "ar-ckpt-last.pth")
    VAR.check(tf_logits=teacher.logits(VAR["tf_label"], VAR["tf_idx"]))
    tokenizer = load_tokenizer(tmp_path / "ar-ckpt-last.pth")
    assert tokenizer.patch_nums == (1, 2, 3, 4)
    torch.save({"trainer": trainer, "args": args | {"saln": True}}, tmp_path / "ar-ckpt-last.pth")
    with pytest.raises(DDFastError, match=r"shared_aln: args of .* says True, but the tensors of .* say False"):
        load_teacher(tmp_path / "ar-ckpt-last.pth")


def test_a_var_of_hugging_face_tells_its_tokenizer(tmp_path):
    config = {"vae_kwargs": {"vocab_size": 64, "z_channels": 8, "ch": 32, "quant_resi": 0.25, "test_mode": True},
              "num_classes": 10, "depth": 2, "patch_nums": [1, 2, 3, 4], "norm_eps": 1e-5}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(storable(read(VAR.file("var.pth"))), tmp_path / "model.safetensors")
    teacher = load_teacher(tmp_path, VAR.file("vae.pth"))
    assert (teacher.tokenizer.quant_resi, teacher.sizes.norm_eps) == (0.25, 1e-5)


def test_load_tokenizer_takes_what_holds_one(tmp_path):
    vq = read(GPT.file("vq.pt"))["model"]
    ours, hub = tmp_path / "ours", tmp_path / "hub"
    save_teacher(ours / "model.safetensors", load_teacher(GPT.file("gpt.pt"), GPT.file("vq.pt"), **SIZES))
    hub.mkdir()
    save_file(storable(vq), hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"codebook_size": 128, "codebook_embed_dim": 8}))
    torch.save(
        {"model": vq, "ema": vq, "optimizer": {}, "args": argparse.Namespace(codebook_size=128)}, tmp_path / "t.pt"
    )
    for source in (ours, ours / "model.safetensors", hub, tmp_path / "t.pt"):
        GPT.check(dec_img=load_tokenizer(source).decode(GPT["dec_idx"]))
    (hub / "config.json").write_text(json.dumps({"codebook_size": 16384}))
    with pytest.raises(DDFastError, match=r"codebook_size: config\.json of .* says 16384, but the tensors"):
        load_tokenizer(hub)
    (hub / "config.json").write_text(json.dumps({"codebook_l2_norm": False}))
    assert not load_tokenizer(hub).codebook_l2_norm
    teacher = digits_like()
    save_teacher(tmp_path / "digits.safetensors", teacher)
    tokenizer = load_tokenizer(tmp_path / "digits.safetensors")
    assert torch.equal(tokenizer.codebook, teacher.codebook)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["official", "ours"])
def test_a_file_that_changes_does_not_change_a_model(tmp_path, form):
    teacher = var_teacher_like()
    student = start_student(teacher)
    if form == "official":
        export_teacher(teacher, tmp_path / "t", tmp_path / "v")
        loaded = load_teacher(tmp_path / "t", tmp_path / "v")
    else:
        save_teacher(tmp_path / "t", teacher)
        loaded = load_teacher(tmp_path / "t")
    save_student(tmp_path / "s", student, {})
    again = load_student(tmp_path / "s", loaded)
    codes = torch.randint(16, (1, 14))
    before = loaded.logits(torch.tensor([1]), codes), loaded.decode(codes), again.head.weight.clone()
    for path in tmp_path.iterdir():
        with path.open("r+b") as file:  # in place: the same file, other bytes
            file.write(b"\x77" * path.stat().st_size)
    after = loaded.logits(torch.tensor([1]), codes), loaded.decode(codes), again.head.weight
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")  # cut short: a mapped page would end the process
    assert torch.equal(loaded.logits(torch.tensor([1]), codes), before[0])


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    from ddfast.models.checkpoint import read_checkpoint

    torch.save({"a": torch.arange(1000.0)}, tmp_path / "x.pt")
    stored = read_checkpoint(tmp_path / "x.pt")[0]["a"]
    assert torch.equal(stored.read(), torch.arange(1000.0))
    (tmp_path / "new").write_bytes((tmp_path / "x.pt").read_bytes())
    (tmp_path / "new").replace(tmp_path / "x.pt")  # as a careful program does: what was opened stays readable
    assert torch.equal(stored.read(), torch.arange(1000.0))
    stored = read_checkpoint(tmp_path / "x.pt")[0]["a"]
    with (tmp_path / "x.pt").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(DDFastError, match="was changed while it was read; load it again"):
        stored.read()


# Captions ------------------------------------------------------------------------------------------------------------


def test_fewer_condition_tokens_than_the_stored_caption_has_rows(tmp_path):
    """Officially uncond_embedding has 120 rows whatever cls_token_num is; the first ones stand for no caption."""
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=5)
    export_teacher(teacher, tmp_path / "t.pt", tmp_path / "v.pt")
    content = read(tmp_path / "t.pt")
    rows = content["model"]["cls_embedding.uncond_embedding"]
    content["model"]["cls_embedding.uncond_embedding"] = torch.cat((rows, torch.randn(7, 12)))
    features, mask = torch.randn(2, 5, 12), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = teacher.generate((features, mask), sampler="greedy", cfg_scale=3.0)
    given = {"n_head": 4, "block_size": 9}
    torch.save(content, tmp_path / "t.pt")
    loaded = load_teacher(tmp_path / "t.pt", tmp_path / "v.pt", cls_token_num=5, **given)
    assert torch.equal(loaded.generate((features, mask), sampler="greedy", cfg_scale=3.0), expected)
    torch.save({**content, "args": {"cls_token_num": 5, "num_classes": 1000}}, tmp_path / "t.pt")
    loaded = load_teacher(tmp_path / "t.pt", tmp_path / "v.pt", **given)
    assert torch.equal(loaded.generate((features, mask), sampler="greedy", cfg_scale=3.0), expected)
    save_teacher(tmp_path / "ours.safetensors", loaded)
    loaded = load_teacher(tmp_path / "ours.safetensors")
    assert loaded.state_dict()["cls_embedding.uncond_embedding"].shape == (12, 12)
    assert torch.equal(loaded.generate((features, mask), sampler="greedy", cfg_scale=3.0), expected)
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(DDFastError, match=r"cls_token_num: got 13, but uncond_embedding of .* has 12 rows"):
        load_teacher(tmp_path / "t.pt", tmp_path / "v.pt", cls_token_num=13, **given)
