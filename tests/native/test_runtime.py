import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

native = pytest.importorskip("ddfast_native")


@pytest.fixture(params=["own threads", "PyTorch's threads"], autouse=True)
def threads_of(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here with both sets of threads."""
    from ddfast.ops.native import _gomp_parallel

    address = 0
    if request.param == "PyTorch's threads":
        address = _gomp_parallel()
        if not address:
            pytest.skip("this PyTorch does not bring GNU's OpenMP runtime")
    native.use_openmp(address)
    yield
    native.use_openmp(_gomp_parallel())


def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(4000, 8)).astype(np.float32), rng.normal(size=(2000, 8)).astype(np.float32)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"name: got 'sse9', expected one of .*baseline"):
        native.set_isa("sse9")
    assert native.isa() in native.isa_available()


def test_module_states_its_convention() -> None:
    from ddfast.ops.native import ABI

    assert native.abi == ABI
    assert native.version[0].isdigit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_after_fork(kernels) -> None:
    x, codebook = problem()
    expected = kernels.nearest_code(x, codebook, threads=4)  # starts the workers, which the child will not have
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(kernels.nearest_code(x, codebook, threads=4), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_concurrent_calls(kernels) -> None:
    x, codebook = problem()
    expected = kernels.nearest_code(x, codebook)
    wrong = []

    def work() -> None:
        for _ in range(10):
            if not np.array_equal(kernels.nearest_code(x, codebook, threads=3), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong


def test_interpreter_exits_while_workers_wait() -> None:
    code = (
        "import ddfast_native as n, array\n"
        "i, o = array.array('q', range(100)), array.array('f', bytes(4 * 100 * 1000))\n"
        "n.noise(0, i.buffer_info()[0], 100, 1000, o.buffer_info()[0], 4)\n"
        "print(o[0] != 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.parametrize("threads", [1, 3])
def test_out_of_memory_is_an_exception(threads) -> None:
    """Also one that strikes in another thread, and the next call is none the wiser."""
    x, codebook = problem()
    qkv, position = np.zeros((64, 24), np.float32), np.zeros(1, np.int64)
    claimed, here = qkv.ctypes.data, position.ctypes.data  # room is asked for before anything is read
    with pytest.raises(MemoryError):
        native.nearest_code(claimed, claimed, here, 1, 2**20, 2**23, False, 2)
    with pytest.raises(MemoryError):  # scores of 2^38 positions, in every thread
        native.decode_attention(claimed, 0, 3, claimed, claimed, here, 0, 0, claimed, 32, 1, 1, 2**38, 1, 1.0, threads)
    codes = np.zeros(len(x), np.int64)
    native.nearest_code(
        x.ctypes.data, codebook.ctypes.data, codes.ctypes.data, *x.shape[:1], *codebook.shape, False, threads
    )
    assert codes.max() > 0
