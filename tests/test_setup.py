"""What an install builds of the CUDA module, and what it says of the rest; stand-ins for the compilers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ddfast.diagnosis import diagnosis
from ddfast.ops import native

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
setup_cuda = sys.modules["setup_cuda"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_cuda)

ALL = ("80-real", "86-real", "89-real", "90a-real", "100-real", "120-real", "120-virtual")
OF_13_0 = "75 80 86 87 88 89 90 90a 100 103 110 120 121"
OF_11_8 = "35 37 50 52 53 60 61 62 70 72 75 80 86 87 89 90"
OF_11_5 = "35 37 50 52 53 60 61 62 70 72 75 80 86 87"
OF_10_2 = "30 32 35 37 50 52 53 60 61 62 70 72 75"

# What the nvcc of a toolkit does, as far as an install asks: `--list-gpu-code` is an option of later ones.
NVCC = """#!/bin/sh
for word; do
  case $word in
    --version) echo "Cuda compilation tools, release {release}, V{release}.1"; exit 0 ;;
    --list-gpu-code) echo "nvcc fatal   : Unknown option '--list-gpu-code'" >&2; exit 1 ;;
    -gencode=*) kind=${{word##*sm_}} ;;
    --dryrun) dry=yes ;;
  esac
done
case " {kinds} " in
  *" $kind "*) ;;
  *) echo "nvcc fatal   : Unsupported gpu architecture 'compute_$kind'" >&2; exit 1 ;;
esac
[ -n "$dry" ] && exit 0
{compiles}
"""
REFUSES_GCC = (
    'echo "/usr/include/crt/host_config.h:132:2: error: #error -- unsupported GNU version! gcc versions later than 11 '
    'are not supported! The nvcc flag can be used to override this" >&2; exit 1'
)
REFUSES_CLANG = (
    'echo "host_config.h:151:2: error: #error -- unsupported clang version! clang version must be less than 16 and '
    'greater than 3.2 ." >&2; exit 1'
)

# Builds nothing: its module is an empty file. What it was asked goes to cmake.jsonl beside it.
CMAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "cmake.jsonl", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "--build":
    build, target = pathlib.Path(sys.argv[2]), sys.argv[4]
    if (here / f"{{target}}_fails").exists():
        sys.exit("nearest_code.cu(10): error: expected a declaration")
    (build / "object.o").touch()
    output = pathlib.Path((build / "output").read_text())
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{{target}}{SUFFIX}").write_text(target)
else:
    build = pathlib.Path(sys.argv[sys.argv.index("-B") + 1])
    (build / "output").write_text(next(w for w in sys.argv if "LIBRARY_OUTPUT" in w).partition("=")[2])
"""

RUN = """
import runpy, sys
sys.executable = sys.argv.pop(1)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def nvcc(path: Path, release: str = "13.0", kinds: str = OF_13_0, compiles: str = "exit 0") -> Path:
    return script(path, NVCC.format(release=release, kinds=kinds, compiles=compiles))


class Machine:
    """A copy of the sources, and a PATH with a C++ compiler, cmake, ninja and what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.source = folder / "source"
        for name in ("ddfast", "kernels", "csrc"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "left_out.txt")
            shutil.copytree(ROOT / name, self.source / name, ignore=ignored)
        for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.source)
        own = f'TOOLKIT = "{setup_cuda.TOOLKIT}"'  # of the real machine: not to be found
        text = (self.source / "setup_cuda.py").read_text()
        assert own in text
        (self.source / "setup_cuda.py").write_text(text.replace(own, 'TOOLKIT = "/nowhere"'))
        script(self.bin / "cmake", CMAKE)
        script(self.bin / "ninja", "")
        script(self.bin / "c++", "#!/bin/sh\necho c++ of this machine\n")
        script(self.bin / "pybind11" / "__init__.py", "def get_cmake_dir():\n    return ''\n")

    def setup(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python setup.py WORDS`, with cmake and ninja beside that python."""
        return subprocess.run(
            [sys.executable, "-c", RUN, str(self.bin / "python"), "-q", *words], cwd=self.source,
            env={"PATH": str(self.bin), "PYTHONPATH": str(self.bin), "HOME": str(self.bin), **environment},
            capture_output=True, text=True,
        )  # fmt: skip

    def asked(self) -> list[list[str]]:
        """The words of every call of cmake since the last time."""
        log = self.bin / "cmake.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def modules(self) -> set[str]:
        """In the source folder, where an editable install has them."""
        return {path.name.removesuffix(SUFFIX) for path in self.source.glob(f"*{SUFFIX}")}

    def left_out(self) -> str:
        return (self.source / "kernels" / "left_out.txt").read_text()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def wish(*gpus: int, **environment: str):
    return setup_cuda.wish(environment, lambda: gpus)


def test_without_a_word_the_gpus_of_the_machine_else_the_list():
    assert wish() == setup_cuda.Wish(ALL)
    assert wish(75, 90, 90) == setup_cuda.Wish(("75-real", "90a-real"), setup_cuda.OWN_GPU)
    assert wish(121).architectures == ("121-real",)


@pytest.mark.parametrize(
    ("variable", "value", "architectures"),
    [
        ("TORCH_CUDA_ARCH_LIST", "9.0", ["90-real"]),
        ("TORCH_CUDA_ARCH_LIST", "9.0a+PTX", ["90a-real", "90a-virtual"]),
        ("TORCH_CUDA_ARCH_LIST", "8.0;9.0", ["80-real", "90-real"]),
        ("TORCH_CUDA_ARCH_LIST", " 7.5 8.0 12.0+PTX ", ["75-real", "80-real", "120-real", "120-virtual"]),
        ("TORCH_CUDA_ARCH_LIST", "Ampere;Hopper", ["80-real", "86-real", "86-virtual", "90-real", "90-virtual"]),
        ("CUDAARCHS", "89", ["89-real", "89-virtual"]),
        ("CUDAARCHS", "80-real;90a-real;90-virtual", ["80-real", "90a-real", "90-virtual"]),
        ("CUDAARCHS", "all-major", list(ALL)),
        ("CUDAARCHS", "native", ["86-real"]),
        ("TORCH_CUDA_ARCH_LIST", "", ["86-real"]),
        ("CUDAARCHS", ";", ["86-real"]),
        ("CMAKE_ARGS", "-Wno-dev -DCMAKE_CUDA_ARCHITECTURES:STRING='80;86-real'", ["80-real", "80-virtual", "86-real"]),
        ("CMAKE_ARGS", "-DCMAKE_CUDA_FLAGS=-lineinfo", ["86-real"]),
    ],
)  # fmt: skip
def test_variables_of_the_field(variable, value, architectures):
    assert wish(86, **{variable: value}).architectures == tuple(architectures)


def test_of_several_variables_cmakes_own_come_first():
    named = {"TORCH_CUDA_ARCH_LIST": "8.0", "CUDAARCHS": "86-real"}
    assert wish(90, **named) == setup_cuda.Wish(("86-real",), "CUDAARCHS")
    assert wish(90, **named, CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=89-real").by == "CMAKE_ARGS"


def test_what_is_no_architecture_is_told():
    found = wish(TORCH_CUDA_ARCH_LIST="9.0;90;Lovelace")
    assert found == setup_cuda.Wish(("90-real",), "TORCH_CUDA_ARCH_LIST", ("90", "Lovelace"))
    plan = setup_cuda.plan(found, lambda kind: True, "nvcc")
    assert plan.unmet
    assert plan.left_out == "90, Lovelace (TORCH_CUDA_ARCH_LIST) is no architecture that ddfast knows, as 9.0 or 90 are"
    with pytest.raises(SystemExit, match=r"^ddfast: CMAKE_ARGS is \"-DA='b\": No closing quotation$"):
        wish(CMAKE_ARGS="-DA='b")


NEWER = "install a newer CUDA toolkit and run `CUDA_HOME=/usr/local/cuda pip install .`"


@pytest.mark.parametrize(
    ("wanted", "by", "kinds", "built", "left_out", "unmet"),
    [
        (ALL, "", OF_13_0, ALL, "", False),
        (ALL, "", OF_11_8, ("80-real", "86-real", "89-real", "90-real", "90-virtual"),
         f"sm_90a, sm_100, sm_120 (sm_90, PTX of sm_90 instead): the nvcc does not know it; {NEWER}", False),
        (ALL, "", OF_11_5, ("80-real", "86-real", "86-virtual"),
         f"sm_89, sm_90a, sm_100, sm_120 (PTX of sm_86 instead): the nvcc does not know it; {NEWER}", False),
        # A GPU that is newer than the compiler, than the kernels, or too old.
        (("120-real",), setup_cuda.OWN_GPU, OF_11_8, ("90-virtual",),
         f"sm_120 (the GPU of this machine) (PTX of sm_90 instead): the nvcc does not know it; {NEWER}", False),
        (("130-real",), setup_cuda.OWN_GPU, OF_13_0, ("120-virtual",),
         f"sm_130 (the GPU of this machine) (PTX of sm_120 instead): the nvcc does not know it; {NEWER}", False),
        (("75-real", "80-real"), setup_cuda.OWN_GPU, OF_13_0, ("80-real",),
         "sm_75 (the GPU of this machine): the kernels need compute capability 8.0 or more", False),
        # What a variable names.
        (("75-real", "90-real"), "CUDAARCHS", OF_13_0, ("90-real",),
         "sm_75 (CUDAARCHS): the kernels need compute capability 8.0 or more", False),
        (("90a-real", "90a-virtual"), "CUDAARCHS", OF_11_8, ("90-real", "90-virtual"),
         f"sm_90a (CUDAARCHS) (sm_90 instead): the nvcc does not know it; {NEWER}", True),
        # Nothing remains.
        (ALL, "", OF_10_2, None,
         f"sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120: the nvcc does not know it; {NEWER}", None),
        (("75-real",), setup_cuda.OWN_GPU, OF_13_0, None,
         "sm_75 (the GPU of this machine): the kernels need compute capability 8.0 or more; for a GPU of another "
         "machine name its kind, `CUDAARCHS=80 pip install .`", None),
    ],
)  # fmt: skip
def test_what_compiler_and_kernels_both_know(wanted, by, kinds, built, left_out, unmet):
    def plan():
        return setup_cuda.plan(setup_cuda.Wish(wanted, by), kinds.split().__contains__, "the nvcc")

    if built is None:
        with pytest.raises(setup_cuda.LeftOut) as raised:
            plan()
        assert str(raised.value) == left_out
    else:
        assert plan() == setup_cuda.Plan(built, left_out, unmet)


def test_which_compiler(tmp_path):
    homes = {name: nvcc(tmp_path / name / "bin" / "nvcc") for name in ("home", "path", "named")}

    def found(**environment):
        return Path(setup_cuda.Compiler({"PATH": str(homes["path"].parent), **environment}).path)

    assert found() == homes["path"]
    assert found(CUDA_HOME=str(tmp_path / "home")) == found(CUDA_PATH=str(tmp_path / "home")) == homes["home"]
    assert found(CUDA_HOME=str(tmp_path / "empty")) == homes["path"]
    assert found(CUDA_HOME=str(tmp_path / "home"), CUDACXX=str(homes["named"])) == homes["named"]
    assert found(CUDACXX="nvcc", CMAKE_ARGS=f"-DCMAKE_CUDA_COMPILER={homes['named']}") == homes["named"]
    with pytest.raises(setup_cuda.LeftOut, match=r"^no nvcc, CUDA's compiler, was found as gone/nvcc; .*`CUDA_HOME="):
        found(CUDACXX="gone/nvcc")


@pytest.mark.parametrize(
    ("compiles", "line"),
    [
        ("exit 0", ""),
        (REFUSES_GCC, "takes no gcc newer than 11; install that and run `CUDAHOSTCXX=g++-11 pip install .`, or a newer "
                      "CUDA toolkit and run `CUDA_HOME=/usr/local/cuda pip install .`"),
        (REFUSES_CLANG, "takes no clang newer than 15; install that and run `CUDAHOSTCXX=clang++-15 pip install .`, or "
                        "a newer CUDA toolkit and run `CUDA_HOME=/usr/local/cuda pip install .`"),
        ("echo 'nvcc fatal : Failed to preprocess host compiler properties.'; exit 1",
         "cannot compile an empty file (nvcc fatal : Failed to preprocess host compiler properties.); mend it, or "
         "install another CUDA toolkit and run `CUDA_HOME=/usr/local/cuda pip install .`"),
    ],
)  # fmt: skip
def test_a_compiler_that_refuses(tmp_path, compiles, line):
    path = nvcc(tmp_path / "nvcc", "11.8", OF_11_8, compiles)
    refusal = setup_cuda.Compiler({"PATH": str(tmp_path)}).refusal("90")
    assert refusal == (f"nvcc 11.8 ({path}) {line}" if line else "")


def test_a_compiler_gets_the_users_settings(tmp_path):
    nvcc(tmp_path / "nvcc", compiles='echo "error: $*"; exit 1')
    for environment in (
        {"CUDAHOSTCXX": "g++-11", "CUDAFLAGS": "-allow-unsupported-compiler"},
        {"CMAKE_ARGS": "-DCMAKE_CUDA_HOST_COMPILER=g++-11 -DCMAKE_CUDA_FLAGS=-allow-unsupported-compiler"},
    ):
        assert "(error: -allow-unsupported-compiler -ccbin=g++-11 -gencode=" in (
            setup_cuda.Compiler({"PATH": str(tmp_path), **environment}).refusal("90")
        )


def test_what_cannot_be_started_knows_nothing(tmp_path):
    script(tmp_path / "nvcc", "no program of this machine")
    compiler = setup_cuda.Compiler({"PATH": str(tmp_path)})
    assert not compiler.knows("80")
    assert str(compiler) == f"nvcc ({tmp_path / 'nvcc'})"


def test_the_compiler_of_this_machine(tmp_path):
    """The real one: its messages are those that the stand-ins have."""
    try:
        compiler = setup_cuda.Compiler(os.environ)
    except setup_cuda.LeftOut as reason:
        pytest.skip(str(reason))
    assert compiler.knows("80")
    assert not compiler.knows("999")
    if compiler.refusal("80"):
        pytest.skip(compiler.refusal("80"))
    future = script(tmp_path / "g++", '#!/bin/sh\nexec c++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    assert "run `CUDAHOSTCXX=g++-" in setup_cuda.Compiler({**os.environ, "CUDAHOSTCXX": str(future)}).refusal("80")


def test_gpus_of_the_machine(tmp_path):
    assert setup_cuda.gpus({"PATH": str(tmp_path)}) == []
    smi = '#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf "{}"; exit {}\n'
    script(tmp_path / "nvidia-smi", smi.format(r"7.5\n12.0\n[N/A]\n", 0))
    assert setup_cuda.gpus({"PATH": str(tmp_path)}) == [75, 120]
    script(tmp_path / "nvidia-smi", smi.format(r"Driver/library version mismatch 9.0\n", 18))
    assert setup_cuda.gpus({"PATH": str(tmp_path)}) == []


def test_how_many_compilers_at_once():
    gib = 1 << 30
    assert [setup_cuda.jobs({}, 16, memory) for memory in (None, 64 * gib, 5 * gib, 0)] == [16, 16, 5, 1]
    assert setup_cuda.jobs({"MAX_JOBS": "3", "CMAKE_BUILD_PARALLEL_LEVEL": "5"}, 16, 0) == 3
    assert setup_cuda.jobs({"MAX_JOBS": "", "CMAKE_BUILD_PARALLEL_LEVEL": "5"}, 16, 0) == 5
    assert setup_cuda.jobs({"MAX_JOBS": "many"}, 2, None) == setup_cuda.jobs({"MAX_JOBS": "0"}, 2, None) == 2


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Of /proc and /sys, on a machine with 64 CPUs and 100 GB free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)

    def write(**texts: str) -> Path:
        for name, text in {"proc/meminfo": "MemTotal: 200000000 kB\nMemAvailable: 100000000 kB\n", **texts}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_resources_without_limits(files):
    assert setup_cuda.resources(files()) == (64, 102_400_000_000)
    assert setup_cuda.resources(Path("/nowhere")) == (64, None)


@pytest.mark.parametrize(
    "texts",
    [
        {  # version 2: a batch job's limits are of the group around it
            "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
            "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
            "sys/fs/cgroup/slurm/job_7/step_0/cpu.max": "max 100000\n",
            "sys/fs/cgroup/slurm/job_7/memory.max": "4000000000\n",
            "sys/fs/cgroup/slurm/cpu.max": "350000 100000\n",
            "sys/fs/cgroup/slurm/memory.max": "9000000000\n",
        },
        {  # a container's are of its root
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "4000000000\n",
            "sys/fs/cgroup/cpu.max": "350000 100000\n",
        },
        {  # version 1
            "proc/self/cgroup": "5:cpu,cpuacct:/box\n3:memory:/box\n1:name=systemd:/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "4000000000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "350000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_resources_of_a_control_group(files, texts):
    assert setup_cuda.resources(files(**texts)) == (4, 4_000_000_000)


FAILURES = {
    "none": (None, "no nvcc, CUDA's compiler, was found; for a GPU of NVIDIA's install the CUDA toolkit and run"),
    "too old": (
        ("10.2", OF_10_2), "sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120: nvcc 10.2 ({nvcc}) does not know it; install"
    ),
    "refuses the host compiler": (
        ("11.8", OF_11_8, REFUSES_GCC),
        "nvcc 11.8 ({nvcc}) takes no gcc newer than 11; install that and run `CUDAHOSTCXX=g++-11 pip install .`",
    ),
    "breaks": (("12.0", OF_13_0), "compiling it by nvcc 12.0 ({nvcc}) failed ({where}); DDFAST_NO_CUDA=1 does not try"),
    "not wanted": (("12.0", OF_13_0), "DDFAST_NO_CUDA=1 was set; without it `pip install .` builds the module"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_an_install_never_fails_for_nvcc_unless_it_is_asked_for(machine, case):
    compiler, line = FAILURES[case]
    if compiler:
        nvcc(machine.bin / "nvcc", *compiler)
    if case == "breaks":
        (machine.bin / "ddfast_cuda_fails").touch()
    environment = {"DDFAST_NO_CUDA": "1"} if case == "not wanted" else {}
    line = line.format(nvcc=machine.bin / "nvcc", where="`DDFAST_CUDA=1 pip install .` shows where")
    done = machine.setup("build_ext", **environment)
    assert done.returncode == 0, done.stderr
    [said] = [text for text in done.stderr.splitlines() if "left out" in text]
    assert said.startswith(f"ddfast: left out: ddfast_cuda: {line}")
    [build] = (machine.source / "build").glob("lib.*")
    assert {path.name for path in build.iterdir()} == {f"ddfast_native{SUFFIX}", "ddfast_kernels"}
    assert (build / "ddfast_kernels" / "left_out.txt").read_text() == said.removeprefix("ddfast: left out: ") + "\n"

    strict = machine.setup("build_ext", **environment, DDFAST_CUDA="1")
    assert strict.returncode == 1
    line = line.replace("`DDFAST_CUDA=1 pip install .` shows where", "messages above")
    assert strict.stderr.splitlines()[-1].startswith(f"ddfast: DDFAST_CUDA=1 asks for ddfast_cuda: {line}")


def test_what_an_older_compiler_knows_is_built(machine):
    path = nvcc(machine.bin / "nvcc", "11.8", OF_11_8)
    done = machine.setup("build_ext", DDFAST_CUDA="1", MAX_JOBS="3", CMAKE_ARGS="-DCMAKE_CUDA_FLAGS='-lineinfo -v'")
    assert done.returncode == 0, done.stderr
    _, native_build, configure, build = machine.asked()
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;86-real;89-real;90-real;90-virtual" in configure
    assert {f"-DCMAKE_CUDA_COMPILER={path}", "-DDDFAST_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-lineinfo -v"} <= set(configure)
    assert build[2:] == ["--target", "ddfast_cuda", "--parallel", "3"]
    assert native_build[2:] == ["--target", "ddfast_native", "--parallel", "3"]
    line = f"ddfast_cuda: sm_90a, sm_100, sm_120 (sm_90, PTX of sm_90 instead): nvcc 11.8 ({path}) does not know it; "
    assert f"ddfast: left out: {line}" in done.stderr

    # What a variable names has to be built where it is asked for.
    done = machine.setup("build_ext", DDFAST_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0 9.0a")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ddfast: DDFAST_CUDA=1 asks for ddfast_cuda: sm_90a (TORCH_CUDA_ARCH_LIST) (sm_90 instead): nvcc 11.8 "
    )
    assert machine.setup("build_ext", TORCH_CUDA_ARCH_LIST="8.0 9.0a").returncode == 0


def test_only_the_kind_of_gpu_in_the_machine_is_built(machine):
    nvcc(machine.bin / "nvcc")
    script(machine.bin / "nvidia-smi", "#!/bin/sh\necho 9.0\necho 9.0\n")
    assert machine.setup("build_ext").returncode == 0
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in machine.asked()[2]


def test_an_editable_install_compiles_again_only_what_changed(machine, tmp_path):
    def install(**environment: str) -> set[str]:
        """Folders in which cmake built."""
        done = machine.setup("editable_wheel", "--dist-dir", str(tmp_path / "dist"), **environment)
        assert done.returncode == 0, done.stderr
        return {words[1] for words in machine.asked() if words[0] == "--build"}

    nvcc(machine.bin / "nvcc")
    folders = install()
    assert len(folders) == 2 and all(Path(folder).is_relative_to(machine.source / "build") for folder in folders)
    assert machine.modules() == {"ddfast_native", "ddfast_cuda"}
    assert machine.left_out() == ""

    marks = [Path(folder, "object.o") for folder in folders]
    for mark in marks:
        mark.write_text("of the first install")
    assert install() == folders
    assert [mark.read_text() for mark in marks] == 2 * ["of the first install"]

    nvcc(machine.bin / "nvcc", "13.1")  # objects of another compiler are of no use
    assert install() == folders
    assert sorted(mark.read_text() for mark in marks) == ["", "of the first install"]


def test_a_later_install_leaves_nothing_of_the_one_before(machine, tmp_path):
    def install(**environment: str) -> str:
        done = machine.setup("editable_wheel", "--dist-dir", str(tmp_path / "dist"), **environment)
        assert done.returncode == 0, done.stderr
        return machine.left_out()

    nvcc(machine.bin / "nvcc")
    assert install() == ""
    other = machine.source / "ddfast_cuda.of-another-python.so"
    other.touch()
    assert install(DDFAST_NO_CUDA="1") == (
        "ddfast_cuda: DDFAST_NO_CUDA=1 was set; without it `pip install -e .` builds the module\n"
    )
    assert machine.modules() == {"ddfast_native"}
    assert install(DDFAST_NO_NATIVE="1").splitlines() == [
        f"{name}: DDFAST_NO_NATIVE=1 was set; without it `pip install -e .` builds the module"
        for name in ("ddfast_native", "ddfast_cuda")
    ]
    assert machine.modules() == set()
    assert other.exists()
    assert install() == ""
    assert machine.modules() == {"ddfast_native", "ddfast_cuda"}


@pytest.mark.parametrize("pure", [False, True])
def test_a_wheel_says_what_it_lacks(machine, tmp_path, pure):
    (machine.source / "kernels" / "left_out.txt").write_text("ddfast_cuda: of an editable install\n")
    done = machine.setup("bdist_wheel", "--dist-dir", str(tmp_path), DDFAST_NO_NATIVE=str(int(pure)))
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        said = archive.read("ddfast_kernels/left_out.txt").decode().splitlines()
        assert (f"ddfast_native{SUFFIX}" in archive.namelist()) is not pure
    assert [line.split(":")[0] for line in said] == (["ddfast_native"] if pure else []) + ["ddfast_cuda"]
    assert all("`pip install .`" in line if pure else "no nvcc" in line for line in said)


def test_doctor_repeats_it(tmp_path, monkeypatch):
    (tmp_path / "ddfast_kernels").mkdir()
    note = tmp_path / "ddfast_kernels" / "left_out.txt"
    note.write_text("ddfast_native: as it is\nddfast_cuda: nvcc 10.2 is too old; run `that`\n")
    real = importlib.util.find_spec
    there = importlib.machinery.PathFinder.find_spec("ddfast_kernels", [str(tmp_path)])
    monkeypatch.setattr(
        native.importlib.util, "find_spec", lambda name: there if name == "ddfast_kernels" else real(name)
    )
    monkeypatch.setitem(sys.modules, "ddfast_cuda", None)  # not installed
    reason = "ddfast_cuda was left out of this install: nvcc 10.2 is too old; run `that`"
    assert native._load("ddfast_cuda") == (None, reason)
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "cuda_reason", reason)
    assert f"CUDA kernels: {reason}" in diagnosis()

    monkeypatch.setattr(native, "cuda", type("Module", (), {"architectures": "80-real", "max_dim": 64}))
    assert "  left out: nvcc 10.2 is too old; run `that`" in diagnosis()

    note.write_text("")
    assert native._load("ddfast_cuda")[1].endswith("run `pip install .` with a C++ compiler at hand")
    assert not [line for line in diagnosis() if line.startswith("  left out:")]
    there = None  # no kernels at all
    assert native.left_out("ddfast_cuda") == ""
