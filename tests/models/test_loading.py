"""Files as users bring them: recognised, refused with every reason named, never run, never copied without need."""

import argparse
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import Case
from official import llamagen_teacher_like, var_teacher_like

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import read_checkpoint, save_tensors
from ddfast.models.converting import export_student, export_teacher
from ddfast.models.llamagen.network import LlamaGenTeacher
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.loading import (
    load_student,
    load_teacher,
    load_tokenizer,
    save_student,
    save_teacher,
    start_student,
    student_class,
)
from ddfast.models.toy import ToyTeacher
from ddfast.models.var.network import VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer

VAR, GPT, VAR_DD, GPT_DD = Case("var_teacher"), Case("llamagen_c2i"), Case("dd_var"), Case("dd_llamagen")
SIZES = {"n_head": 4, "block_size": 16}


def var_tensors():
    return torch.load(VAR.file("var.pth"), weights_only=True)


def gpt_tensors():
    return torch.load(GPT.file("gpt.pt"), weights_only=True)["model"]


def load_var(path, **settings):
    return load_teacher(path, VAR.file("vae.pth"), **settings)


def load_gpt(path, **settings):
    return load_teacher(path, GPT.file("vq.pt"), **{**SIZES, **settings})


def test_families_are_recognised():
    assert isinstance(load_var(VAR.file("var.pth")), VARTeacher)
    assert isinstance(load_gpt(GPT.file("gpt.pt")), LlamaGenTeacher)
    assert isinstance(load_tokenizer(VAR.file("vae.pth"), patch_nums=(1, 2, 3, 4)), VARTokenizer)
    assert isinstance(load_tokenizer(GPT.file("vq.pt")), LlamaGenTokenizer)


@pytest.mark.parametrize("wrap", ["plain", "model", "module", "state_dict", "prefixed", "with options"])
def test_wrappings_of_training_scripts(tmp_path, wrap):
    tensors = gpt_tensors()
    options = argparse.Namespace(gpt_type="c2i", image_size=64, downsample_size=16, num_classes=10, cls_token_num=1)
    content = {
        "plain": tensors,
        "prefixed": {f"module.{name}": value for name, value in tensors.items()},
        "with options": {"model": tensors, "steps": 3, "args": options, "optimizer": {"state": {}}},
    }.get(wrap, {wrap: tensors})
    torch.save(content, tmp_path / "gpt.pt")
    teacher = load_gpt(tmp_path / "gpt.pt")
    GPT.check(tf_logits=teacher.logits(GPT["tf_label"], GPT["tf_idx"]))


def test_vars_training_checkpoint_holds_its_tokenizer(tmp_path):
    vae = torch.load(VAR.file("vae.pth"), weights_only=True)
    torch.save({"trainer": {"var_wo_ddp": var_tensors(), "vae_local": vae}}, tmp_path / "ar-ckpt.pth")
    teacher = load_teacher(tmp_path / "ar-ckpt.pth")
    VAR.check(tf_logits=teacher.logits(VAR["tf_label"], VAR["tf_idx"]))


def test_the_format_before_zip_files(tmp_path):
    torch.save({"model": gpt_tensors()}, tmp_path / "gpt.pt", _use_new_zipfile_serialization=False)
    GPT.check(tf_logits=load_gpt(tmp_path / "gpt.pt").logits(GPT["tf_label"], GPT["tf_idx"]))


class Hostile:
    """Creates a file if anything unpickles it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", ["in a checkpoint", "alone", "plain pickle"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, content):
    trap, path = tmp_path / "run", tmp_path / "var.pth"
    if content == "plain pickle":
        path.write_bytes(pickle.dumps(Hostile(trap)))
    else:
        torch.save({**var_tensors(), "x": Hostile(trap)} if content == "in a checkpoint" else Hostile(trap), path)
    with pytest.raises(
        DDFastError, match=r"var\.pth (holds something else than tensors.*refused|is damaged or)"
    ) as refused:
        load_var(path)
    assert "\n" not in str(refused.value)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Hostile(trap)))
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(tmp_path, kept, suffix):
    path = tmp_path / f"var{suffix}"
    if suffix == ".pth":
        data = VAR.file("var.pth").read_bytes()
    else:
        save_teacher(path, var_teacher_like())
        data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DDFastError, match=rf"var\{suffix} (is damaged|is not a readable)") as refused:
        load_var(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), {"a": 1}])
def test_other_content(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(DDFastError, match=r"x\.pt holds (a list|a Tensor|no tensors)"):
        load_var(tmp_path / "x.pt")


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    tensors = var_tensors()
    del tensors["blocks.1.ffn.fc2.bias"]
    tensors["blocks.0.attn.proj.weight"] = torch.zeros(128, 127)
    tensors["blocks.0.attn.gate"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "var.pth")
    with pytest.raises(DDFastError) as refused:
        load_var(tmp_path / "var.pth")
    for words in (
        "missing blocks.1.ffn.fc2.bias [128]",
        "unexpected blocks.0.attn.gate [3]",
        "blocks.0.attn.proj.weight is [128, 127] instead of [128, 128]",
    ):
        assert words in str(refused.value)
    students = torch.load(GPT_DD.file("student.pt"), weights_only=True)
    del students["ema"]["n_d_embed.weight"]
    torch.save(students, tmp_path / "student.pt")
    with pytest.raises(DDFastError, match=r"missing n_d_embed\.weight \[2, 64\]"):
        load_student(tmp_path / "student.pt", load_gpt(GPT.file("gpt.pt")))


@pytest.mark.parametrize("name", ["word_embed.weight", "pos_1LC", "class_emb.weight", "blocks.0.ffn.fc1.weight"])
def test_a_file_without_what_tells_its_size(tmp_path, name):
    tensors = var_tensors()
    del tensors[name]
    torch.save(tensors, tmp_path / "var.pth")
    with pytest.raises(DDFastError, match=r"no complete VAR checkpoint|family None is not known"):
        load_var(tmp_path / "var.pth")
    with pytest.raises(DDFastError, match=rf"'{name}' is missing"):
        load_var(tmp_path / "var.pth", family="var")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 3}, "depth: got 3, but the tensors of .* say 2"),
        ({"shared_aln": True}, "shared_aln: got True, but the tensors of .* say False"),
        ({"patch_nums": (1, 2, 3, 5)}, r"patch_nums: got \(1, 2, 3, 5\), but .* say \(1, 2, 3, 4\)"),
        ({"Cvae": 9}, "Cvae: got 9, but the tensors of .* say 8"),
        ({"deepness": 2}, "deepness: not a setting of .*; known: attn_l2_norm"),
        ({"family": "llama"}, "family 'llama' is not known; known: digits, var, llamagen"),
    ],
)
def test_settings_that_contradict_the_tensors(settings, words):
    with pytest.raises(DDFastError, match=words):
        load_var(VAR.file("var.pth"), **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_head": None}, r"n_head: .*gpt\.pt \(dim 64, 2 layers\) is no published size; give n_head=\.\.\."),
        ({"n_head": 5}, "n_head"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head: 4 heads of 16 do not fit"),
        ({"block_size": 15}, "block_size: got 15, expected a square"),
        ({"model_type": "t2i"}, "model_type: got 't2i', but the tensors of .* say 'c2i'"),
    ],
)
def test_sizes_that_cannot_be(settings, words):
    with pytest.raises((DDFastError, ValueError), match=words):
        load_gpt(GPT.file("gpt.pt"), **settings)


@pytest.mark.parametrize(
    ("name", "settings", "tokens"),
    [
        ("c2i_L_256.pt", {}, 256), ("c2i_L_384.pt", {}, 576), ("t2i_XL_stage2_512.pt", {}, 1024), ("mine.pt", {}, 256),
        ("mine.pt", {"image_size": 384}, 576), ("c2i-L-384.pt", {}, 576), ("run_256_c2i_L_384.pt", {}, 576),
        ("c2i_L_384/consolidated.pth", {}, 576), ("GPT-L-448.pth.tar", {}, 784), ("gpt_1024", {}, 4096),
    ],
)  # fmt: skip
def test_the_image_size_is_in_the_name_or_given(tmp_path, name, settings, tokens):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(GPT.file("gpt.pt").read_bytes())
    teacher = load_teacher(tmp_path / name, GPT.file("vq.pt"), n_head=4, **settings)
    assert teacher.num_tokens == tokens


def test_a_tokenizer_is_needed_and_is_one():
    with pytest.raises(DDFastError, match=r"a var teacher needs its tokenizer's file .*vae_ch160v4096z32\.pth"):
        load_teacher(VAR.file("var.pth"))
    with pytest.raises(DDFastError, match=r"gpt\.pt is not a tokenizer of VAR or LlamaGen"):
        load_teacher(VAR.file("var.pth"), GPT.file("gpt.pt"))
    with pytest.raises(DDFastError, match=r"vq\.pt is a LlamaGen tokenizer, but .*var\.pth is a VAR teacher"):
        load_teacher(VAR.file("var.pth"), GPT.file("vq.pt"))
    with pytest.raises(DDFastError, match="no checkpoint at"):
        load_teacher("nowhere.pth", VAR.file("vae.pth"))


def test_students_go_with_their_teacher(tmp_path):
    teacher = load_gpt(GPT.file("gpt.pt"))
    with pytest.raises(DDFastError, match=r"is a DD1 student of a VAR teacher, but the teacher is a LlamaGenTeacher"):
        load_student(VAR_DD.file("student.pth"), teacher)
    with pytest.raises(DDFastError, match=r"gpt\.pt is not a student's file"):
        load_student(GPT.file("gpt.pt"), teacher)
    with pytest.raises(DDFastError, match=r"is a DD1 student of a LlamaGen teacher, but the teacher is a ToyTeacher"):
        load_student(GPT_DD.file("student.pt"), ToyTeacher())
    with pytest.raises(DDFastError, match=r"is not a teacher's checkpoint: it is a DD1 student of a LlamaGen teacher"):
        load_var(GPT_DD.file("student.pt"))


def test_windows_of_one_storage_are_separated(tmp_path):
    base = torch.arange(10.0)
    tensors = {"a": base[:6], "b": base[4:], "c": torch.zeros(2), "d": base[6:8], "e": base.view(2, 5).T}
    torch.save(tensors, tmp_path / "x.pt")
    save_tensors(tmp_path / "x.safetensors", tensors, {})
    for name in ("x.pt", "x.safetensors"):
        read = {name: value.read() for name, value in read_checkpoint(tmp_path / name)[0].items()}
        assert all(torch.equal(read[name], value) for name, value in tensors.items())
        read["b"].zero_()
        assert torch.equal(read["a"], torch.arange(6.0))
        assert torch.equal(read["d"], torch.tensor([6.0, 7.0]))


def test_training_one_layer_leaves_the_others_alone():
    """The golden files share storage between tensors; a loaded student must not."""
    student = load_student(VAR_DD.file("student.pth"), load_var(VAR.file("var.pth")))
    before = {name: value.clone() for name, value in student.named_parameters()}
    with torch.no_grad():
        student.blocks[0].ffn.fc1.weight.zero_()
    for name, value in student.named_parameters():
        assert name == "blocks.0.ffn.fc1.weight" or torch.equal(value, before[name]), name


@pytest.mark.parametrize("make", [var_teacher_like, llamagen_teacher_like], ids=["var", "llamagen"])
def test_own_and_official_files_say_the_same(tmp_path, make):
    teacher = make()
    student = start_student(teacher).eval()
    student.split = 2
    live = {name: value + 1 for name, value in student.state_dict().items()}
    save_teacher(tmp_path / "model.safetensors", teacher)
    export_teacher(teacher, tmp_path / "t.pth", tmp_path / "v.pth")
    save_student(tmp_path / "student.safetensors", student, {}, live=live)
    export_student(student, tmp_path / "s.pth", live=live)
    sizes = {"n_head": 4, "block_size": 9} if make is llamagen_teacher_like else {}
    label = torch.tensor([0, 3])
    codes = torch.randint(16, (2, teacher.num_tokens))
    noise = torch.randn(2, teacher.num_tokens, 4)
    for loaded in (load_teacher(tmp_path), load_teacher(tmp_path / "t.pth", tmp_path / "v.pth", **sizes)):
        assert torch.equal(loaded.logits(label, codes), teacher.logits(label, codes))
        assert torch.equal(loaded.decode(codes), teacher.decode(codes))
        for path in (tmp_path, tmp_path / "s.pth"):
            again = load_student(path, loaded)
            assert type(again) is student_class(teacher, "dd1")
            assert torch.allclose(again.predict(label, noise, 1)[1], student.predict(label, noise, 1)[1], atol=1e-5)
            name, value = next(iter(live.items()))
            assert torch.equal(load_student(path, loaded, ema=False).state_dict()[name], value)
    assert load_student(tmp_path, teacher).split == 2
    assert load_teacher(tmp_path).defaults == teacher.defaults


def test_exported_files_have_exactly_the_official_tensors(tmp_path):
    teacher = load_var(VAR.file("var.pth"))
    export_teacher(teacher, tmp_path / "var.pth", tmp_path / "vae.pth")
    export_student(load_student(VAR_DD.file("student.pth"), teacher), tmp_path / "student.pth")
    gpt = load_gpt(GPT.file("gpt.pt"))
    export_teacher(gpt, tmp_path / "gpt.pt", tmp_path / "vq.pt")
    export_student(load_student(GPT_DD.file("student.pt"), gpt), tmp_path / "student.pt")
    pairs = {
        "var.pth": VAR, "vae.pth": VAR, "student.pth": VAR_DD, "gpt.pt": GPT, "vq.pt": GPT, "student.pt": GPT_DD,
    }  # fmt: skip
    for name, case in pairs.items():
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path, case.folder))
        for path in ((), ("trainer", "ema_parameters"), ("trainer", "var_wo_ddp"), ("ema",), ("model",)):
            mine, official = ours, theirs
            for key in path:
                mine, official = mine.get(key, {}), official.get(key, {})
            assert mine.keys() == official.keys(), (name, path)
            for key, value in official.items():
                if isinstance(value, torch.Tensor) and path != ("trainer", "var_wo_ddp") and path != ("model",):
                    assert torch.equal(mine[key].to(value.dtype), value), (name, key)
                elif isinstance(value, torch.Tensor):
                    assert mine[key].shape == value.shape


SCRIPT = """
import resource, sys, time
import torch, ddfast
from ddfast.models.loading import load_teacher
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
teacher = load_teacher(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
sum(float(p.sum()) for p in teacher.parameters())  # every page is read
print(seconds, peak() - before)
"""


@pytest.mark.slow
def test_loading_343_million_parameters(tmp_path):
    """LlamaGen-L: under 3 s, and under 1.2 times its size in memory."""
    from ddfast.models.loading import untrained_teacher
    from ddfast.recipes import get_recipe

    export_teacher(untrained_teacher(get_recipe("llamagen-l")), tmp_path / "c2i_L_256.pt", tmp_path / "vq.pt")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    call = [sys.executable, "-c", SCRIPT, str(tmp_path / "c2i_L_256.pt"), str(tmp_path / "vq.pt")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    seconds, grown = map(float, done.stdout.split())
    assert seconds < 3
    assert grown < 1.2 * size


def test_loading_draws_nothing(tmp_path, monkeypatch):
    teacher = llamagen_teacher_like()
    export_teacher(teacher, tmp_path / "t.pth", tmp_path / "v.pth")
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, **_: pytest.fail() if not tensor.is_meta else tensor)
    load_teacher(tmp_path / "t.pth", tmp_path / "v.pth", n_head=4, block_size=9)


def test_a_pytorch_that_tells_places_of_fake_tensors_only(monkeypatch):
    """Before it did so on the meta device too."""
    load, asked = torch.load, []

    def older(file, *, map_location, **settings):
        asked.append(map_location)
        content = load(file, map_location=map_location, **settings)
        for tensor in content["model"].values() if map_location == "meta" else ():
            storage = tensor.untyped_storage()
            vars(storage).pop("_checkpoint_offset", None)
        return content

    expected = {name: value.read() for name, value in read_checkpoint(GPT.file("gpt.pt"))[0]["model"].items()}
    monkeypatch.setattr(torch, "load", older)
    found = {name: value.read() for name, value in read_checkpoint(GPT.file("gpt.pt"))[0]["model"].items()}
    assert asked == ["meta", "cpu"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
