"""What every change must keep, checked on the source itself."""

import ast
import re
import subprocess
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
from torch import nn

from ddfast.config import read_toml
from ddfast.ops import dispatch
from ddfast.recipes import RECIPES, get_recipe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ddfast"

# A module may import from its own and lower layers, and no modules import each other in a circle.
LAYERS = [
    {
        "errors",
        "env",
        "files",
        "config",
        "interruption",
        "messages",
        "optimizers",
        "portable",
        "precision",
        "private_api",
        "processes",
    }
    | {"progress", "schedule", "seeds", "tracing", "frechet"},
    {"ops"},
    {"models"},
    {"trajectories"},
    {"distill"},
    {"sampling"},
    {"presets", "recipes", "runs", "pictures"},
    {"evaluation"},
    {
        "report",
        "page",
        "tables",
        "charts",
        "gallery",
        "pipeline",
        "planning",
        "saving",
        "drawing",
        "judging",
        "diagnosis",
    },
    {"hub"},
    {
        "cli",
        "train",
        "sample",
        "evaluate",
        "profile",
        "plan",
        "convert",
        "tune",
        "doctor",
        "trajectories.__main__",
        "__main__",
    },
]
ENTRIES = [
    "train.py",
    "sample.py",
    "evaluate.py",
    "profile.py",
    "plan.py",
    "convert.py",
    "tune.py",
    "doctor.py",
    "trajectories/__main__.py",
]

MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))


def layer(module: str) -> int:
    for level, names in enumerate(LAYERS):
        if module in names or (module.split(".")[0] in names and module != "trajectories.__main__"):
            return level
    raise AssertionError(f"{module} has no layer")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        # A relative import would slip past the table below.
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}:{node.lineno}: relative import"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ddfast":
            inside = ".".join(node.module.split(".")[1:])
            for alias in node.names:  # of a package: its module of that name, if it has one
                name = f"{inside}.{alias.name}".removeprefix(".")
                found.add(name if name in NAMES else inside or name)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("ddfast.") for alias in node.names if alias.name.startswith("ddfast.")}
    return found - {"__version__"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_downwards(path):
    own = layer(name_of(path))
    for module in imports(path):
        assert layer(module) <= own, f"{name_of(path)} imports {module}"


def test_the_page_has_the_layers():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.MULTILINE)
    told = {int(number) - 1: set(re.findall(r"`([\w.]+)`", names)) for number, names in rows}
    assert told == dict(enumerate(LAYERS))


def test_no_modules_import_each_other_in_a_circle():
    """Imports of types alone count too: what needs another's names belongs above it."""
    waiting = {name_of(path): imports(path) & NAMES for path in MODULES if path != PACKAGE / "__init__.py"}
    while free := {name for name, needed in waiting.items() if not needed & set(waiting) - {name}}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert not waiting


FAMILIES = ["digits", "llamagen", "text", "var"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_folder_with_the_same_files(family):
    folder = PACKAGE / "models" / family
    assert {"__init__.py", "files.py", "network.py", "tokenizer.py"} <= {path.name for path in folder.iterdir()}


def test_what_knows_a_family_is_in_its_folder():
    """Above, one module lists them, recipes and presets have what is published, a baseline decodes in its own way."""
    outside = {
        name_of(path)
        for path in MODULES
        for module in imports(path)
        if module.startswith(tuple(f"models.{family}." for family in FAMILIES))
        and not name_of(path).startswith(tuple(f"models.{family}" for family in FAMILIES))
    }
    captions = {"models.captions", "drawing", "evaluate", "hub", "profile"}
    assert outside == {"evaluation.plain_decoding", "models.families", "presets", "recipes", *captions}


def test_one_file_knows_private_names_of_pytorch():
    """They may be gone in the next version: `ddfast.private_api` does without."""
    private = re.compile(r"\btorch(\.\w+)*\._(?!_)|from torch[\w.]*\._(?!_)")
    knowing = {path.name for path in MODULES if private.search(path.read_text())}
    assert knowing <= {"private_api.py"}


def test_messages_go_through_one_function():
    """Only the first of several processes may speak; commands print their results."""
    printing = {
        name_of(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    commands = {"cli", *(name_of(PACKAGE / entry) for entry in ENTRIES)}
    assert printing <= {"messages", *commands}


def test_one_file_reads_the_environment():
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if re.search(r"os\.(environ|getenv)|from os import|import os as", path.read_text())
    }
    assert readers == {"env.py"}


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        (r"import nvtx|\bnvtx\.annotate", {"tracing"}),
        (r"\bsignal\.signal\(|from signal import", {"interruption"}),
        (
            r"torch\.distributed as|(from|import) torch\.distributed|from torch import .*\bdistributed\b",
            {"processes", "distill.sharding", "distill.checkpoints", "diagnosis"},
        ),
    ],
    ids=["ranges", "signals", "processes"],
)
def test_what_few_files_know(pattern, files):
    """The others ask these: for spans, for interruptions, for what processes agree on or share."""
    knowing = {name_of(path) for path in MODULES if re.search(pattern, path.read_text())}
    assert knowing == files


def test_one_file_seeds_generators():
    """PyTorch's own way reads a seed's low 32 bits only."""
    seeding = {"manual_seed", "manual_seed_all", "seed", "default_rng", "RandomState"}
    seeders = {
        path.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in seeding
    }
    assert seeders == {"seeds.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module"
    definitions = [
        (f"{outer.name}.{node.name}" if isinstance(outer, ast.ClassDef) else node.name, node)
        for outer in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
        for node in outer.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    # What overrides a documented method (forward, a teacher's interface) says nothing new.
    inherited = {
        "forward", "begin", "advance", "advance_window", "keep_rows", "read_out", "logits", "encode", "decode",
        "num_tokens", "group_cfg_scale", "condition_of", "num_conditions", "check_condition",
        "accepted", "filters", "codes_of", "codebook", "config",
        "features", "code_logits", "continuous", "involve_teacher", "settings", "sizes_config", "header", "read_header",
        "untrained", "trained", "build", "said", "conditioned", "read", "read_tokenizer", "describe", "student_config",
        "official_teacher", "official_student", "usual", "feature_network", "real_images", "condition", "step_ops",
    }  # fmt: skip
    missing = [
        name
        for name, node in definitions
        if not node.name.startswith("_") and node.name not in inherited and not ast.get_docstring(node)
    ]
    assert not missing


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_modules_are_thin(entry):
    assert len((PACKAGE / entry).read_text().splitlines()) < 80


def test_every_dependency_has_its_reason():
    project = read_toml(ROOT / "pyproject.toml")
    text = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(name for extra in project["project"]["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[\[<>=!;\s]", requirement)[0] for requirement in wanted} - {"ddfast"}
    assert not [name for name in names if f"| {name} |" not in text]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_builds_afresh(name):
    first, second = get_recipe(name), get_recipe(name)
    assert first == second
    assert first is not second
    assert first.dd1 is not second.dd1


SECTIONS = {
    "Every op": None,
    "A kernel for the CPU": "cpu",
    "A kernel in Triton": "triton",
    "A kernel in CUDA C++": "cuda",
}
"""Of docs/adding-an-op.md: what an op of a backend has (None: every op)."""

ELSEWHERE: dict[tuple[str, str], tuple[str, str] | None] = {
    # flow_sample's kernels filter what they read, so that they are sample_codes' too.
    ("sample_codes", "csrc/OP.h"): ("csrc/flow_sample.h", "int64_t sample_codes("),
    ("sample_codes", "csrc/variant.cpp"): ("csrc/variant.cpp", "flow_sample, sample_codes"),
    ("sample_codes", "tests/native/test_OP.py"): ("tests/native/test_flow_sample.py", "kernels.sample_codes("),
    ("sample_codes", "kernels/OP.py"): ("kernels/flow_sample.py", "def flow_sample("),
    ("sample_codes", "kernels/OP.h"): ("kernels/flow_sample.h", "sample_codes"),
    ("sample_codes", "kernels/OP.cu"): ("kernels/flow_sample.cu", "sample_codes"),
    ("sample_codes", "CMakeLists.txt"): ("CMakeLists.txt", "kernels/flow_sample.cu"),
    ("sample_codes", "tests/cuda/emulated.cpp"): ("tests/cuda/emulated.cpp", "kernels/flow_sample.cu"),
    ("sample_codes", "tests/cuda/test_OP.py"): ("tests/cuda/test_flow_sample.py", "sample_codes"),
    # The table of the instruction sets says posterior_forward.
    ("codebook_posterior", "csrc/kernels.h"): ("csrc/kernels.h", "posterior_forward)("),
    ("codebook_posterior", "tests/native/test_OP.py"): (
        "tests/native/test_codebook_posterior.py",
        "kernels.posterior_forward(",
    ),
    # One function for all instruction sets, as its bits must be the same.
    ("noise", "csrc/OP.h"): ("csrc/noise.cpp", "void noise("),
    ("noise", "csrc/kernels.h"): ("csrc/kernels.h", "void noise("),
    ("noise", "csrc/variant.cpp"): ("CMakeLists.txt", "csrc/noise.cpp"),
    # Missing.
    ("noise", "benchmarks/test_gpu_kernels.py"): None,
}
"""(op, file that the page names) -> the file and the text that stand for it, or None where there is none yet."""


def files_of_an_op(op: str) -> Iterator[tuple[str, str, str]]:
    """(file as the page names it, file, text in it), by docs/adding-an-op.md."""
    page = (ROOT / "docs" / "adding-an-op.md").read_text()
    for section in page.split("\n## ")[1:]:
        title, body = section.split("\n", 1)
        backend = SECTIONS.get(title, "no backend")
        if backend is None or backend in dispatch.KERNELS[op]:
            for file, text in re.findall(r"^\d+\. `(\S+)`, `(.+?)`:", body, re.MULTILINE):
                yield file, file.replace("OP", op), text.replace("OP", op)


@pytest.mark.parametrize("op", sorted(dispatch.KERNELS))
def test_an_op_has_one_name_everywhere(op):
    """The page's files are there under the op's name and hold it; what is elsewhere is listed, and nothing more."""
    missing = {
        (op, named)
        for named, file, text in files_of_an_op(op)
        if not (ROOT / file).is_file() or text not in (ROOT / file).read_text()
    }
    assert missing == {key for key in ELSEWHERE if key[0] == op}
    for file, text in filter(None, map(ELSEWHERE.get, missing)):
        assert text in (ROOT / file).read_text(), f"{text!r} is not in {file}"


def test_the_page_names_files_for_every_op_and_backend():
    page = (ROOT / "docs" / "adding-an-op.md").read_text()
    assert all(f"\n## {title}\n" in page for title in SECTIONS)
    numbers = [int(number) for number in re.findall(r"^(\d+)\. `", page, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(list(files_of_an_op("nearest_code"))) >= 20


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros", "bartlett_window", "hann_window",
}  # fmt: skip
LAYERS_WITH_WEIGHTS = {
    name
    for name in dir(nn)
    if isinstance(getattr(nn, name), type) and "dtype" in signature(getattr(nn, name)).parameters
}


def default_dtypes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every call whose result has PyTorch's default dtype, or would have with other arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.nn"):
            hidden = {alias.name for alias in node.names} & (FACTORIES | LAYERS_WITH_WEIGHTS)
            yield from ((node.lineno, f"import of {name}: write torch.{name}") for name in hidden)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        stated = any(keyword.arg == "dtype" for keyword in node.keywords)
        made = (owner == "torch" and name in FACTORIES) or name == "new_tensor"
        layer = owner in ("nn", "torch.nn") and name in LAYERS_WITH_WEIGHTS
        numbers = owner == "torch" and name == "where" and not any(map(is_tensor, node.args[1:3]))
        legacy = owner == "torch" and name.endswith("Tensor")
        if ((made or layer) and not stated) or numbers or legacy:
            yield node.lineno, ast.unparse(node)


def is_tensor(node: ast.expr) -> bool:
    """Whether an argument may be a tensor: it is no number."""
    if isinstance(node, ast.UnaryOp):
        return is_tensor(node.operand)
    return not isinstance(node, ast.Constant) and ast.unparse(node) not in ("torch.inf", "math.inf", "torch.nan")


@pytest.mark.parametrize("path", MODULES + KERNELS, ids=lambda path: path.relative_to(ROOT).with_suffix("").as_posix())
def test_every_tensor_states_its_dtype(path):
    """The global default dtype must not matter; of layers, `ddfast.models.layers` has those that are used."""
    found = [f"{path.name}:{line}: {text}" for line, text in default_dtypes(ast.parse(path.read_text()))]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3)", "torch.full((), 1.5, device=device)", "torch.randint(3, (2,))", "x.new_tensor([1])",
        "nn.Linear(2, 3)", "torch.nn.Conv2d(1, 2, 3)", "torch.where(mask, 0.0, -torch.inf)", "torch.FloatTensor(3)",
        "from torch import zeros", "from torch.nn import Linear", "torch.as_tensor(x)",
    ],
)  # fmt: skip
def test_a_default_dtype_is_found(code):
    assert list(default_dtypes(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "torch.zeros(3, dtype=torch.int64)", "x.new_zeros(3)", "torch.zeros_like(x)", "torch.where(mask, 0.0, x)",
        "Linear(2, 3)", "nn.SiLU()", "isinstance(x, nn.Linear)", "nn.Linear(2, 3, dtype=torch.float32)",
    ],
)  # fmt: skip
def test_a_stated_dtype_is_not(code):
    assert not list(default_dtypes(ast.parse(code)))


def test_no_path_of_a_developers_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"/(work|farm|root|home|opt)/[a-z]")
    of_images = re.compile(r"/(opt/(python|cuda|ddfast)|home/ddfast)\b")  # manylinux's and our own
    about_images = {"Dockerfile", ".github/workflows/wheels.yml", "docs/install.md"}
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".safetensors", ".pt", ".pth", ".png", ".json"} or not path.exists():
            continue
        text = path.read_text(errors="replace")  # checkpoints' files are no text
        assert not pattern.search(of_images.sub("", text) if name in about_images else text), name


PAGE = re.compile(r"(\]\([\w./-]+\.md|docs/[\w/-]+\.md|\b[A-Z][A-Z-]{3,}\.md)(?: section (\d+) \(([^)]+)\))?")


def test_every_citation_points_into_the_repository():
    """A page that code, tests or pages speak of is here, and a section has its number and title."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sections = 0
    for name in tracked:
        path = ROOT / name
        if path.suffix not in {".py", ".md", ".cu", ".h", ".cpp", ".toml", ".sh", ".txt", ""} or not path.is_file():
            continue
        text = re.sub(
            r"\n[ \t]*(?:#|//|\*)?[ \t]*", " ", path.read_text(errors="replace")
        )  # may go on in the next line
        for cited, number, title in PAGE.findall(text):
            page = cited.removeprefix("](")
            if page == "README.md":  # a hub folder's card is one too
                continue
            found = [place for place in (path.parent / page, ROOT / page, ROOT / "docs" / page) if place.is_file()]
            assert found, f"{name} cites {page}, which is not in the repository"
            if number:
                sections += 1
                heading = f"## {number}. {title}\n"
                assert heading in found[0].read_text(), f"{name} cites {page} section {number} ({title})"
    assert sections > 20
