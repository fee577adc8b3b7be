"""Presets: the settings of published tables, for the teachers that they are for."""

import numpy as np
import pytest
from commands import refused_here
from official import digits_like, llamagen_teacher_like, var_teacher_like

from ddfast.errors import DDFastError
from ddfast.models.llamagen.network import LLAMAGEN_SIZES
from ddfast.models.toy import ToyTeacher
from ddfast.presets import PRESETS, get_preset
from ddfast.sampling import Guidance


def settings(guidance: Guidance) -> tuple:
    return guidance.cfg_scale, guidance.top_k, guidance.top_p


@pytest.mark.parametrize(("name", "scale"), [("var-readme", 1.5), ("var-paper", 2.0)])
def test_var(name, scale):
    preset = PRESETS[name]
    assert (preset.instrument, preset.count, preset.labels, preset.quantise, preset.size) == (
        "adm", 50_000, "uniform", "var", 0,
    )  # fmt: skip
    guidance = preset.guidance(var_teacher_like())
    assert settings(guidance) == (scale, 900, 0.96)
    assert (guidance.temperature, guidance.cfg_interval) == (1.0, None)


@pytest.mark.parametrize(("size", "scale"), [("B", 2.0), ("L", 2.0), ("XL", 1.75), ("XXL", 1.75), ("3B", 1.65)])
def test_llamagen_by_size(size, scale):
    preset, teacher = PRESETS["llamagen"], llamagen_teacher_like()
    teacher.sizes = LLAMAGEN_SIZES[size]
    assert settings(preset.guidance(teacher)) == (scale, 0, 1.0)
    assert (preset.instrument, preset.count, preset.labels, preset.quantise, preset.size) == (
        "adm", 50_000, "random", "llamagen", 256,
    )  # fmt: skip


def test_llamagen_of_a_size_without_a_table_needs_its_scale():
    preset, teacher = PRESETS["llamagen"], llamagen_teacher_like()
    with pytest.raises(DDFastError, match=r"no scale of guidance is published .* give --guidance.cfg-scale"):
        preset.guidance(teacher)
    assert settings(preset.guidance(teacher, Guidance(cfg_scale=3.0))) == (3.0, 0, 1.0)


@pytest.mark.parametrize("teacher", [var_teacher_like, llamagen_teacher_like])
def test_dd1_leaves_the_teacher_its_own(teacher):
    preset = PRESETS["dd1"]
    assert preset.guidance(teacher()) == Guidance()
    assert (preset.instrument, preset.labels, preset.quantise, preset.size) == ("dd1", "random", "dd1", 0)


def test_what_is_given_is_taken():
    given = Guidance(top_k=5, cfg_interval=2)
    assert settings(PRESETS["var-paper"].guidance(var_teacher_like(), given)) == (2.0, 5, 0.96)
    assert PRESETS["var-paper"].guidance(var_teacher_like(), given).cfg_interval == 2


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_other_teachers_are_refused(name):
    others = {"var": var_teacher_like, "llamagen": llamagen_teacher_like, "digits": digits_like, "none": ToyTeacher}
    for family, teacher in others.items():
        if family not in PRESETS[name].families:
            with pytest.raises(DDFastError, match=rf"--preset {name}: is for .* teachers, and this is one of"):
                PRESETS[name].check(teacher())
        else:
            PRESETS[name].check(teacher())
    if "llamagen" in PRESETS[name].families:
        with pytest.raises(DDFastError, match="this one takes captions"):
            PRESETS[name].check(llamagen_teacher_like(model_type="t2i", cls_token_num=4))


def test_a_name_that_is_none():
    with pytest.raises(DDFastError, match=r"--preset: got 'var', expected one of var-readme, var-paper, llamagen, dd1"):
        get_preset("var")


# `ddfast sample --preset` --------------------------------------------------------------------------------------------


def arrays(path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


CASES = {
    "var-readme": ("var", ["--labels=uniform", "--quantise=var"], ["1.5", "900", "0.96"]),
    "var-paper": ("var", ["--labels=uniform", "--quantise=var"], ["2.0", "900", "0.96"]),
    "dd1": ("llamagen", ["--labels=random", "--quantise=dd1"], None),
}


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", sorted(CASES))
def test_it_is_its_settings(here, generators, tmp_path, name, steps):
    family, flags, guidance = CASES[name]
    common = ("sample", "--student", generators / family, "--steps", steps, "--count=20", "--batch-size=20")
    if guidance and steps == 0:  # a student's own step knows none
        names = ("cfg-scale", "top-k", "top-p")
        flags = [*flags, *(f"--guidance.{name}={value}" for name, value in zip(names, guidance, strict=True))]
    code, out, _ = here(*common, "--preset", name, "--to", tmp_path / "preset")
    assert code == 0
    assert f"--count 20 is taken; the preset {name} has 50000" in out
    assert here(*common, *flags, "--format=npz", "--to", tmp_path / "flags")[0] == 0
    preset, by_flags = arrays(tmp_path / "preset.npz"), arrays(tmp_path / "flags.npz")
    assert all(np.array_equal(preset[key], by_flags[key]) for key in ("arr_0", "arr_1"))


def test_a_flag_beside_it_wins_and_is_said(here, generators, tmp_path):
    common = ("sample", "--student", generators / "llamagen", "--steps=0", "--count=6", "--to", tmp_path / "x")
    refused_here(here, "--preset llamagen: no scale of guidance is published", *common, "--preset=llamagen")
    given = ("--preset=llamagen", "--guidance.cfg-scale=3", "--guidance.top-k=4", "--resize=12", "--labels=uniform")
    code, out, _ = here(*common, *given)
    assert code == 0
    for words in (
        "--count 6 is taken; the preset llamagen has 50000",
        "--labels uniform is taken; the preset llamagen has random",
        "--resize 12 is taken; the preset llamagen has 256",
        "--guidance.top-k 4 is taken; the preset llamagen has 0",
        "--guidance.cfg-scale 3.0 is taken; the preset llamagen has none",
    ):
        assert words in out
    made = arrays(tmp_path / "x.npz")
    assert made["arr_0"].shape == (6, 12, 12, 3)
    assert made["arr_1"].tolist() == [0, 1, 2, 3, 4, 0]


def test_llamagens_images_have_256_pixels(here, generators, tmp_path):
    student = ("--student", generators / "llamagen", "--count=2", "--to", tmp_path / "x")
    assert here("sample", *student, "--preset=llamagen")[0] == 0  # the student alone: no guidance is asked for
    assert arrays(tmp_path / "x.npz")["arr_0"].shape == (2, 256, 256, 3)


@pytest.mark.parametrize(
    ("words", "family", "flags"),
    [
        ("--preset var-readme: is for VAR teachers, and this is one of the family digits", "digits", ["var-readme"]),
        ("--preset llamagen: is for LlamaGen teachers", "var", ["llamagen"]),
        ("--preset: got 'adm', expected one of", "var", ["adm"]),
        ("guidance.cfg_scale: has no effect with steps=1", "var", ["var-readme", "--guidance.cfg-scale=3"]),
    ],
)
def test_what_does_not_fit_is_refused(here, generators, tmp_path, words, family, flags):
    call = ("sample", "--student", generators / family, "--count=2", "--to", tmp_path / "x", "--preset", *flags)
    refused_here(here, words, *call)
    assert not list(tmp_path.iterdir())
