"""The manual as a site: what its pages and docstrings must hold, and what its build finds; `make docs` builds it."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import ddfast
from ddfast import ops

ROOT = Path(__file__).parents[2]
REFERENCE = {path: path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")}
ENTRIES = [name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)]
PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]
NEEDS = "the extra docs is not installed: pip install 'ddfast[docs]'"


def part(name: str) -> ModuleType:
    """A module of manual/, which is no package."""
    pytest.importorskip("mkdocs", reason=NEEDS)
    pytest.importorskip("griffe", reason=NEEDS)
    spec = importlib.util.spec_from_file_location(f"manual_{name}", ROOT / "manual" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What the pages hold ---------------------------------------------------------------------------------------------


def entry_of(thing: object) -> str:
    """The name under which the reference has something: the module that defines it, its own."""
    return f"{thing.__module__}.{thing.__qualname__}"  # type: ignore[attr-defined]


def test_every_public_name_is_in_the_reference():
    public = [getattr(module, name) for module in (ddfast, ops) for name in module.__all__ if name != "__version__"]
    assert {entry_of(thing) for thing in public} <= set(ENTRIES)
    assert len(ENTRIES) == len(set(ENTRIES))


def test_what_examples_import_is_in_the_reference():
    """Of pages for users: those for who changes ddfast show what is inside."""
    inside = {ROOT / "docs" / "adding-an-op.md", ROOT / "CONTRIBUTING.md"}
    missing = set()
    for page in set(PAGES) - inside:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ddfast":
                    things = [getattr(importlib.import_module(node.module), alias.name) for alias in node.names]
                    missing |= {entry_of(thing) for thing in things if not inspect.ismodule(thing)} - set(ENTRIES)
    assert not missing


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_there_and_documented(name):
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert inspect.getdoc(thing)
        assert entry_of(thing) == name


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions and methods with a docstring."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]


@pytest.mark.parametrize("path", sorted((ROOT / "ddfast").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_of_a_docstring_are_the_functions(path):
    for node in functions(ast.parse(path.read_text())):
        section = re.search(r"^Args:\n((?:    .*\n|\n)+)", (ast.get_docstring(node) or "") + "\n", re.MULTILINE)
        told = re.findall(r"^    (\S[^:]*):", section[1], re.MULTILINE) if section else []
        taken = node.args
        names = {one.arg for one in [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]}
        names |= {one.arg for one in (taken.vararg, taken.kwarg) if one}
        unknown = {name for names_told in told for name in re.split(r",\s*", names_told)} - names
        assert not unknown, f"{path.name}:{node.lineno}: {node.name} takes no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_reads_alike_on_github_and_on_the_site(path):
    """On the site a list inside of a list, or a paragraph of an item, begins at four spaces, on GitHub at two."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    between = re.findall(r"^ {1,3}(?:[-*+]|\d+[.)]) .*|(?<=\n\n) {1,3}\S.*", text, re.MULTILINE)
    assert not between
    assert not re.findall(r"^\d+\) .*", text, re.MULTILINE), "GitHub begins a list there, the site does not"
    assert not re.findall(r"(?<=\n\n)    .*\n(?=(?:[-*+]|\d+\.) )", text), "a list goes on after an empty line"


# Links, docstrings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "written", "turned"),
    [
        ("index.md", "docs/digits.md#three-seeds", "digits.md#three-seeds"),
        ("index.md", "docs/digits-samples.png", "digits-samples.png"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("contributing.md", ".pre-commit-config.yaml", "files/pre-commit-config.yaml"),
        ("benchmarks.md", "../docs/method.md", "method.md"),
        ("method.md", "../tests/golden/README.md", "golden.md"),
        ("scale.md", "../examples/train.sbatch", "files/examples/train.sbatch"),
        ("api/index.md", "../../CHANGELOG.md", "../changes.md"),
        ("notes/dd2.md", "../dd2.md#figures", "../dd2.md#figures"),
        ("index.md", "nothing.md", "nothing.md"),
        ("index.md", "#here", "#here"),
        ("index.md", "https://example.org/README.md", "https://example.org/README.md"),
    ],
)
def test_links_are_turned(page, written, turned):
    assert part("hooks").turned(f"an [a]({written}) and", page) == f"an [a]({turned}) and"


def test_names_of_the_api_are_linked():
    text = '<autoref identifier="ddfast.hub" optional><code>ddfast.hub</code></autoref> has `Generator`'
    assert part("hooks").turned("`ddfast.hub` has `Generator`", "dd2.md") == text


def test_a_docstring_becomes_markdown():
    docstring = """A product a * b of x [B, N][..., d], 0 <= x < 1.

    Args:
        a, b: factors, "x: y".
            docs/method.md section 3 (Solving
            the flow).

    Returns:
        float32 [*shape]: the product.

    Numerics: exact, by `a * b`;
        docs/numerics.md.
    Raises:
        ValueError: never.

    >>> 1
    1
    """
    assert part("docstrings").marked_up(docstring).split("\n\n") == [
        r"A product a \* b of x \[B, N]\[..., d], 0 &lt;= x &lt; 1.",
        'Args:\n    a, b: factors, "x: y".\n        [docs/method.md section '
        "3 (Solving\n        the flow)]"
        "[docs/method.md#3-solving-the-flow].",
        r'<span class="doc-section-title">Returns:</span> float32 \[\*shape]: the product.',
        '<span class="doc-section-title">Numerics:</span> exact, by `a * b`; [docs/numerics.md][docs/numerics.md].',
        "Raises:\n    ValueError: never.",
        "```pycon\n>>> 1\n1\n```",
    ]


# The build -------------------------------------------------------------------------------------------------------


def build(folder: Path, text: str) -> None:
    """The site of one page, as mkdocs.yml has it; raises as `mkdocs build` fails."""
    pytest.importorskip("mkdocs", reason=NEEDS)
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(text)
    here = {"docs_dir": str(folder / "docs"), "site_dir": str(folder / "site"), "nav": ["index.md"], "hooks": []}
    mkdocs_build(load_config(str(ROOT / "mkdocs.yml"), **here))


def test_a_page_builds(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    build(tmp_path, "# A\n\n[here](#a) and [there][ddfast.ops.noise.noise]\n\n::: ddfast.ops.noise.noise\n")
    page = (tmp_path / "site" / "index.html").read_text()
    assert 'id="ddfast.ops.noise.noise"' in page
    for title in ("Parameters:", "Returns:", "Numerics:", "Autograd:", "Raises:"):
        assert f'<span class="doc-section-title">{title}</span>' in page
    assert not list(part("hooks").faults_of(tmp_path / "site"))


def test_what_leads_nowhere_fails_the_build(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    gone = ("nothing.md", "#nothing", "nothing.png")
    with pytest.raises(Exception, match="4 warnings in strict mode"):
        build(tmp_path, "# A\n\n" + " ".join(f"[a]({to})" for to in gone) + " [a][ddfast.nothing]\n")


def test_an_entry_of_nothing_fails_the_build(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exception, match="Aborted"):
        build(tmp_path, "# A\n\n::: ddfast.ops.nothing\n")
    assert "ddfast.ops.nothing could not be found" in caplog.text


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ('<a href="b.html#there">b</a><a href="#here" id="here">c</a><a href="https://example.org">d</a>', None),
        ('<img src="data:image/png;base64,"><link rel="canonical" href="https://example.org/">', None),
        ('<a href="c.html">c</a>', "no file c.html"),
        ('<a href="b.html#nowhere">b</a>', "b.html has no anchor nowhere"),
        ('<a href="#nowhere">b</a>', "a.html has no anchor nowhere"),
        ('<img src="c.png">', "no file c.png"),
        ('<img src="https://example.org/c.png">', "fetches https://example.org/c.png"),
        ('<script src="//example.org/c.js"></script>', "fetches //example.org/c.js"),
        ('<link rel="stylesheet" href="https://example.org/c.css">', "fetches https://example.org/c.css"),
        ('<link rel="preconnect" href="https://example.org">', "fetches https://example.org"),
    ],
)
def test_faults_of_a_built_site(tmp_path, html, fault):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h2 id="there">b</h2>')
    found = list(part("hooks").faults_of(tmp_path))
    assert len(found) == (fault is not None)
    assert not fault or fault in found[0]


@pytest.mark.parametrize(
    "css", ['@import "c.css";', "a { background: url(https://example.org/c.png) }", 'a { src: url("//example.org/c") }']
)
def test_style_sheets_fetch_nothing(tmp_path, css):
    (tmp_path / "a.css").write_text("a { background: url(data:image/png;base64,) }")
    assert not list(part("hooks").faults_of(tmp_path))
    (tmp_path / "b.css").write_text(css)
    assert len(list(part("hooks").faults_of(tmp_path))) == 1
