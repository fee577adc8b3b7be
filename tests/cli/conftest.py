"""Commands run in this process (`run`, `here`), or in processes of their own (`process`); all with one cache."""

import os
import subprocess
from pathlib import Path

import pytest
from commands import command, in_this_process, prepare
from official import llamagen_teacher_like, var_teacher_like

from ddfast.cli import main
from ddfast.hub import Generator
from ddfast.models.llamagen.captions import random_captions, save_captions
from ddfast.models.loading import start_student, student_class, untrained_teacher
from ddfast.recipes import get_recipe


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    prepare(folder)
    return folder


@pytest.fixture(scope="session")
def environment(cache) -> dict[str, str]:
    return {**os.environ, "DDFAST_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(cache, capsys):
    """A command in this process; fails unless it ends with the code."""

    def call(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        done = subprocess.CompletedProcess(arguments, in_this_process(cache, *arguments), *capsys.readouterr())
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def process(environment):
    """As `run`, in a process of its own: `python -m ddfast.COMMAND`."""

    def call(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def here(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def generators(tmp_path_factory) -> Path:
    """Untrained generators, a folder each: var, llamagen, text, digits (DD1), dd2 (of VAR); and captions of text."""
    root = tmp_path_factory.mktemp("generators")
    config = get_recipe("digits")
    config.teacher.width, config.teacher.depth = 32, 1
    teachers = {
        "var": var_teacher_like(),
        "llamagen": llamagen_teacher_like(),
        "text": llamagen_teacher_like(model_type="t2i", cls_token_num=4),
        "digits": untrained_teacher(config),
    }
    for name, teacher in teachers.items():
        Generator(teacher, start_student(teacher).eval(), point=2).save_pretrained(root / name)
    network = student_class(teachers["var"], "dd2").from_teacher(teachers["var"], head_width=16, head_depth=1)
    Generator(teachers["var"], network.eval(), point=2).save_pretrained(root / "dd2")
    save_captions(root / "captions.safetensors", *random_captions(3, 4, 12))
    return root
