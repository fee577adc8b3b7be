"""The emulator itself: a proof is worth what its tool would have caught."""

import ctypes
import re
from pathlib import Path

import pytest
import torch
from emulation import address as address_of


def address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(address_of(tensor))


def run(emulator, kind: int) -> torch.Tensor:
    out = torch.full((64,), torch.nan)
    emulator.check(emulator.library.mistake_emulated(kind, address(out)))
    return out


@pytest.mark.parametrize("kind", [0, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_correct_kernel(emulator, kind, seed):
    emulator.configure(seed=seed)
    assert run(emulator, kind).tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(("kind", "words"), [(1, "others never reach"), (3, "different"), (4, "past the end")])
def test_mistakes_are_errors(emulator, kind, words):
    with pytest.raises(RuntimeError, match=words):
        run(emulator, kind)


def test_memory_that_nobody_wrote_is_nan(emulator):
    assert run(emulator, 5).isnan().all()


def test_a_forgotten_barrier_shows(emulator):
    results = []
    for seed in range(1, 4):
        emulator.configure(seed=seed)
        results.append(run(emulator, 6))
    assert not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
    assert torch.cat(results).isnan().any()


TRESPASSES = {
    "past the end": "thread 63: 0 bytes past the end of in",
    "before the beginning": "thread 0: 4 bytes before in",
    "into an input": "access to in, which is an input",
    "past shared memory": "thread 63: 0 bytes past the end of shared memory",
    "misaligned": r"an address that is not aligned, or null, at .*emulated.cpp:\d+",
    "nobody's": "access to memory that is nobody's",
    "shift": r"thread 32: a shift by too much at .*emulated.cpp:\d+",
    "returned": "access to shared memory of a block that has returned",
    "not started": "access to shared memory of a block that has not started",
    "no such rank": "a rank that the cluster does not have",
}
"""By kind, as emulated.cpp numbers them: what the error says, threads in order."""


@pytest.mark.parametrize("kind", TRESPASSES)
def test_trespasses_are_errors(emulator, kind):
    emulator.configure(seed=0, front=kind == "before the beginning")
    tensor, out = torch.arange(64.0), torch.full((64,), torch.nan)
    for _ in range(2):  # the first leaves no trace
        status = emulator.library.trespass_emulated(list(TRESPASSES).index(kind), *map(address, (tensor, out)))
        with pytest.raises(RuntimeError, match=TRESPASSES[kind]):
            emulator.check(status)
    assert run(emulator, 0).tolist() == list(range(63, -1, -1))


def test_every_launcher_has_its_tensors_fenced():
    source = Path(__file__).with_name("emulated.cpp").read_text()
    launchers = re.split(r"^int (?=\w+\(const \w+Arguments\*)", source, flags=re.MULTILINE)[1:]
    assert len(launchers) >= 5
    for body in launchers:
        assert "return tensors.close(" in body.split("\n}\n")[0], body.split("(")[0]


@pytest.mark.parametrize("cluster", [1, 2])
def test_blocks_have_no_order(emulator, cluster):
    def chain(seed):
        emulator.configure(seed=seed)
        out = torch.full((64,), torch.nan)
        emulator.check(emulator.library.chain_emulated(address(out), cluster))
        return out

    assert chain(0).tolist() == list(range(1, 65))
    assert chain(1).isnan().any()
    assert not torch.equal(chain(1).nan_to_num(-1), chain(2).nan_to_num(-1))


TF32, BF16_SHORT, BF16 = range(3)


def product(emulator, a: torch.Tensor, b: torch.Tensor, kind: int) -> torch.Tensor:
    out = torch.empty(16, 8)
    emulator.check(emulator.library.product_emulated(*(address(x) for x in (a, b, out)), kind))
    return out


@pytest.mark.parametrize("kind", [TF32, BF16_SHORT, BF16])
def test_tensor_core_fragments(emulator, kind):
    depth = 16 if kind == BF16 else 8
    a, b = torch.randint(-8, 9, (16, depth)).float(), torch.randint(-8, 9, (depth, 8)).float()
    assert torch.equal(product(emulator, a, b, kind), a @ b)


@pytest.mark.parametrize(
    ("kind", "value", "rounded"),
    [(TF32, 1 + 2**-10 + 2**-11, 1 + 2**-10), (BF16, 1 + 2**-7 + 2**-8, 1 + 2**-6), (BF16, 1 + 2**-8, 1.0)],
)
def test_tensor_cores_round_their_inputs(emulator, kind, value, rounded):
    a, b = torch.zeros(16, 16 if kind == BF16 else 8), torch.zeros(16 if kind == BF16 else 8, 8)
    a[3, 2], b[2, 5] = value, 1.0
    out = product(emulator, a, b, kind)
    assert out[3, 5] == rounded
    assert out.count_nonzero() == 1


def test_launches_that_a_device_would_refuse(emulator):
    emulator.configure(clusters=False)
    noise, codebook = torch.randn(1, 8), torch.randn(64, 8)
    with pytest.raises(RuntimeError, match="refuse"):
        emulator.sample_codes(torch.randn(1, 64), noise, codebook, cluster=2)
