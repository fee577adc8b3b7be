"""Families of the user's own: what their files are recognised as, what is refused, and what a file may not do."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from official import var_teacher_like

import ddfast
from ddfast.cli import main
from ddfast.config import PretrainedTeacherConfig, TokenizerConfig, TrainConfig
from ddfast.errors import DDFastError
from ddfast.models import families
from ddfast.models.autoregressive import SamplingDefaults
from ddfast.models.loading import build_teacher, check_student, untrained_teacher
from ddfast.models.student import TransformerStudent
from ddfast.models.transformer import TransformerTeacher
from ddfast.models.var.files import VARFamily
from ddfast.models.var.network import VARTeacher
from ddfast.recipes import get_recipe

SIZES = {"width": 16, "depth": 1, "heads": 2}


@dataclass(kw_only=True)
class OwnConfig(PretrainedTeacherConfig):
    cfg_scale: float = 1.0
    groups: tuple[int, ...] = (1, 4)
    heads: int = 2


class OwnTeacher(TransformerTeacher):
    """Its tensors have the names of the digits teacher's."""

    def __init__(self, tokenizer, config):
        codebook = torch.randn(tokenizer.num_codes, tokenizer.code_dim)
        super().__init__(codebook=codebook, groups=config.groups, num_classes=2, **SIZES | {"heads": config.heads})
        self.config = config
        self.defaults = SamplingDefaults(**config.sampling())


class OwnStudent(TransformerStudent):
    """One of the user's own, under names that are another's too."""


class OwnFamily(ddfast.Family):
    name, teacher, config = "own", OwnTeacher, OwnConfig
    students: ClassVar = {"dd1": OwnStudent}

    def untrained(self, config):
        return OwnTeacher(config.tokenizer, config.teacher)


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    ddfast.register_family(OwnFamily())
    return untrained_teacher(config())


def config(**teacher):
    return TrainConfig(tokenizer=TokenizerConfig(num_codes=8, code_dim=3), teacher=OwnConfig(**teacher))


def greedy(teacher):
    return teacher.generate(torch.tensor([0, 1]), sampler="greedy")


def test_a_file_is_its_own_familys(own, tmp_path):
    own.defaults = SamplingDefaults(cfg_scale=1.5, top_k=3)
    ddfast.save_teacher(tmp_path / "own.safetensors", own)
    again = ddfast.load_teacher(tmp_path / "own.safetensors")
    assert type(again) is OwnTeacher
    assert again.config == own.config
    assert again.defaults == own.defaults
    assert torch.equal(greedy(again), greedy(own))
    with pytest.raises(DDFastError, match="ema=True asks for the averaged ones"):
        ddfast.load_teacher(tmp_path / "own.safetensors", ema=True)
    families._FAMILIES.pop("own")
    with pytest.raises(DDFastError, match=r"family 'own' is not known; .*--import"):
        ddfast.load_teacher(tmp_path / "own.safetensors")


def test_a_file_keeps_its_type_and_tells_no_folder(own, tmp_path):
    ddfast.save_teacher(tmp_path / "own.safetensors", own)
    kept = build_teacher(config(weights=str(tmp_path / "own.safetensors"), dtype="bfloat16"))
    ddfast.save_teacher(tmp_path / "half.safetensors", kept)
    assert ddfast.load_teacher(tmp_path / "half.safetensors").head.weight.dtype == torch.bfloat16
    assert tmp_path.name.encode() not in (tmp_path / "half.safetensors").read_bytes()


def test_a_file_of_other_settings_is_refused(own, tmp_path):
    """Heads are in no shape."""
    ddfast.save_teacher(tmp_path / "own.safetensors", own)
    with pytest.raises(DDFastError, match=r"made with heads 2, the recipe has 4 \(--teacher\.heads\)"):
        build_teacher(config(weights=str(tmp_path / "own.safetensors"), heads=4))


def test_a_bare_state_is_weights_of_a_recipe(own, tmp_path):
    torch.save(own.state_dict(), tmp_path / "bare.pt")
    assert torch.equal(greedy(build_teacher(config(weights=str(tmp_path / "bare.pt")))), greedy(own))
    with pytest.raises(DDFastError, match=r"how its own teacher was made .*--teacher\.weights"):
        ddfast.load_teacher(tmp_path / "bare.pt", family="own")


@pytest.mark.parametrize("ema", [True, False])
def test_a_student_of_ones_own_is_found_again(own, tmp_path, ema):
    student = OwnStudent.from_teacher(own).eval()
    student.point = 1
    live = {name: value + 1 for name, value in student.state_dict().items()}
    ddfast.save_student(tmp_path / "s.safetensors", student, {}, live=live)
    again = ddfast.load_student(tmp_path / "s.safetensors", own, ema=ema)
    assert type(again) is OwnStudent
    assert again.point == 1
    expected = student.state_dict() if ema else live
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_a_method_without_students_is_refused_before_work(own):
    check_student(own, "dd1")
    with pytest.raises(DDFastError, match="family own has no students of the method 'dd2'; known: dd1"):
        check_student(own, "dd2")


def test_a_family_of_published_files(own, tmp_path):
    class MyVAR(VARTeacher):
        pass

    class MyFamily(VARFamily):
        name, teacher = "my-var", MyVAR

        def read(self, parts):
            made = super().read(parts)
            made.__class__ = MyVAR
            return made

    ddfast.register_family(MyFamily())
    teacher = var_teacher_like()
    ddfast.save_teacher(tmp_path / "var.safetensors", teacher)
    assert type(ddfast.load_teacher(tmp_path / "var.safetensors")) is VARTeacher
    assert type(ddfast.load_teacher(tmp_path / "var.safetensors", family="var")) is VARTeacher
    teacher.__class__ = MyVAR
    ddfast.save_teacher(tmp_path / "my.safetensors", teacher)
    assert type(ddfast.load_teacher(tmp_path / "my.safetensors")) is MyVAR


@pytest.mark.parametrize("recipe", ["os:getcwd", "builtins:input", "torch:compile"])
def test_a_file_starts_no_code(tmp_path, capsys, recipe):
    """Whatever happens to be imported already."""
    (tmp_path / "student.safetensors").write_bytes(b"")
    (tmp_path / "config.toml").write_text(f'recipe = "{recipe}"\n')
    for arguments in (["sample", "--student", str(tmp_path)], ["train", "--config", str(tmp_path / "config.toml")]):
        assert main(arguments) == 1
        assert "whose code a file does not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:recipe", "cannot import no_such_module: ModuleNotFoundError"),
        ("os:nothing", "recipe 'os:nothing': AttributeError"),
        ("os:name", "recipe 'os:name': TypeError"),
        ("os:getcwd", "returns a str, expected a ddfast.config.TrainConfig"),
        (3, "recipe: got 3, expected a name"),
    ],
)
def test_recipes_that_are_none(name, words):
    with pytest.raises(DDFastError, match=words):
        get_recipe(name)


@pytest.mark.parametrize(("attribute", "value"), [("name", "a/b"), ("signs", {"teacher": ("one",)}), ("name", "var")])
def test_families_that_are_none(own, attribute, value):
    with pytest.raises(ValueError, match="family: "):
        ddfast.register_family(type("Other", (OwnFamily,), {attribute: value})())
    with pytest.raises(TypeError, match=r"expected an instance of a subclass of ddfast\.Family"):
        ddfast.register_family(OwnFamily)
