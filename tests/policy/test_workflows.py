"""What the workflows must keep, besides the schema and the audits of `make lint`."""

import re
from pathlib import Path

import pytest

from ddfast.config import read_toml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = read_toml(ROOT / "pyproject.toml")
PYTHONS = [
    name.rpartition(" ")[2]
    for name in PROJECT["project"]["classifiers"]
    if name.startswith("Programming Language :: Python ::")
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_named_by_commit_with_their_version(path):
    """A tag can be moved to other code."""
    used = re.findall(r"uses: (?!\./)(.*)", path.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_is_one_commit_everywhere():
    used = {action for path in WORKFLOWS for action in re.findall(r"uses: (.+@.+)", path.read_text())}
    assert len({action.partition("@")[0] for action in used}) == len(used)


def test_every_python_is_tested_and_has_wheels():
    tested = re.findall(r'python: "([\d.]+)"', (ROOT / ".github/workflows/checks.yml").read_text())
    assert sorted(set(tested), key=lambda version: int(version[2:])) == PYTHONS
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_the_lowest_versions_are_tested_together():
    [lowest] = [requirement for requirement in PROJECT["project"]["dependencies"] if requirement.startswith("torch>=")]
    version = lowest.removeprefix("torch>=")
    assert f'python: "{PYTHONS[0]}", torch: "{version}.0"' in (ROOT / ".github/workflows/checks.yml").read_text()


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in WORKFLOWS:
        for targets in re.findall(r"run: make (.+)", path.read_text()):
            for target in targets.split():
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"


def test_only_a_release_publishes():
    holders = {path.name for path in WORKFLOWS if re.search(r"id-token: write|pypi-publish", path.read_text())}
    assert holders == {"release.yml"}


def test_the_page_builds_cuda_wheels_as_the_workflow_does():
    page, workflow = ((ROOT / name).read_text() for name in ("docs/install.md", ".github/workflows/wheels.yml"))
    commands = re.findall(r"'(cuda-toolkit\[.+?\].+?)'|(DDFAST_CUDA=1 CUDA_HOME=[\w/]+)|(ln -s lib [\w/]+)", workflow)
    assert len(commands) == 3
    for command in map("".join, commands):
        assert command in page, command


def test_what_the_build_reads_reaches_the_image():
    """.dockerignore lets in what it names alone."""
    let_in = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert {
        "pyproject.toml",
        "setup*.py",
        "CMakeLists.txt",
        "csrc",
        "kernels",
        "ddfast",
        "README.md",
        "LICENSE",
    } <= let_in
