"""What a first run on a GPU must tell before anything else: what no emulator and no interpreter shows.

Clusters of blocks, codes staged in shared memory, the second launch; two streams; two threads; a second device; replays
of a graph. Small, so that compute-sanitizer gets through: `-k cluster` is what it is given.
"""

import threading
from collections.abc import Callable

import pytest
import torch

from ddfast import ops
from ddfast.ops import checks, dispatch, native
from ddfast.ops.findings import Check

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BACKENDS = [name for name in ("cuda", "triton") if name in dispatch.available()]
MANY = [("top_k", 8000, 16384, 8), ("top_p", 0.9, 9001, 8), ("top_k", 0, 70_000, 32), ("top_k", 900, 4096, 32)]
"""A filter, codes and their dimension: codes staged; an unknown number of them, hence a second launch; eight blocks a
row and their lists in memory; half a multiprocessor per row."""


def sampling(rows: int, num_codes: int, dim: int, seed: int, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """Logits, flat and peaked in turn, noise and a codebook."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, num_codes, generator=generator)
    logits[::2] *= 5
    return tuple(
        tensor.to(device)
        for tensor in (
            logits,
            torch.randn(rows, dim, generator=generator),
            torch.randn(num_codes, dim, generator=generator),
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "value", "num_codes", "dim"), MANY)
def test_cluster_sampling(backend, name, value, num_codes, dim):
    """Two calls, so that what the first one left in shared memory or scratch would show in the second."""
    logits, noise, codebook = sampling(3, num_codes, dim, seed=0)
    codes = [ops.sample_codes(logits, noise, codebook, **{name: value}, backend=backend)[0].tolist() for _ in range(2)]
    exact = ops.sample_codes(*(t.double() for t in (logits, noise, codebook)), **{name: value}, backend="reference")[0]
    assert codes[0] == codes[1]
    assert (codes[0] == exact.cpu().numpy()).sum() >= 2


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
@pytest.mark.parametrize("num_codes", [4096, 16385, 70_000])
def test_cluster_filtering(num_codes):
    logits, *_ = sampling(3, num_codes, 1, seed=1)
    ours, exact = (ops.filter_logits(logits, top_k=500, backend=backend) for backend in ("cuda", "reference"))
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=0)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_cluster_nearest(rows):
    """Distances are compared, not codes: float32 may see two that are nearly as near the other way round."""
    _, x, codebook = sampling(rows, 16384, 8, seed=3)
    codes = ops.nearest_code(x, codebook, backend="cuda")
    x, codebook = x.double(), codebook.double()
    distance = codebook.square().sum(-1) - 2 * x @ codebook.T
    excess = distance.gather(1, codes[:, None])[:, 0] - distance.amin(-1)
    assert (excess <= 4e-6 * (x.square().sum(-1) + codebook.square().sum(-1).amax())).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in dispatch.KERNELS["draw_codes"]])
def test_cluster_draw(backend):
    logits, *_ = sampling(3, 16384, 1, seed=2)
    uniform = torch.tensor([0.0, 0.4, 0.9], device="cuda")
    ours, exact = (ops.draw_codes(logits, uniform, top_k=8000, backend=name) for name in (backend, "reference"))
    assert torch.equal(ours, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", sorted(checks.PROBLEMS))
def test_the_problems_by_which_kernels_are_verified(backend, op):
    if backend not in dispatch.KERNELS[op]:
        pytest.skip(f"no {backend} kernel")
    for dtype in (torch.float32, torch.bfloat16):
        checks.solve(Check(op, backend, dtype, dispatch.usual_dim(op)), torch.device("cuda", 0))


def several(count: int) -> list[tuple[Callable[[], torch.Tensor], list[int]]]:
    """Calls that need much shared memory and little, in turn, and their results when nothing else runs."""
    made = []
    for number in range(count):
        num_codes, dim, top_k = ((16384, 8, 8000), (512, 32, 0), (4096, 32, 900))[number % 3]
        given = sampling(64, num_codes, dim, seed=number)

        def call(given=given, top_k=top_k) -> torch.Tensor:
            return ops.sample_codes(*given, top_k=top_k, backend="cuda")[0]

        made.append((call, call().tolist()))
    torch.cuda.synchronize()
    return made


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
def test_two_streams():
    calls, streams = several(6), [torch.cuda.Stream() for _ in range(2)]
    results: list[list[torch.Tensor]] = [[] for _ in calls]
    for turn in range(20):
        for number, (call, _) in enumerate(calls):
            with torch.cuda.stream(streams[(turn + number) % 2]):
                results[number].append(call())
    torch.cuda.synchronize()
    for (_, expected), found in zip(calls, results, strict=True):
        assert all(codes.tolist() == expected for codes in found)


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
def test_two_threads():
    """One launches what needs much shared memory while the other launches what needs little."""
    calls, failures = several(6), []

    def work(first: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(30):
                call, expected = calls[(first + turn) % len(calls)]
                if call().tolist() != expected:
                    failures.append((first, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device_while_the_first_is_current(backend):
    torch.cuda.set_device(0)
    first, second = (sampling(5, 16384, 8, seed=0, device=f"cuda:{number}") for number in range(2))
    there = ops.sample_codes(*second, top_k=8000, backend=backend)[0]
    assert there.device.index == 1 and torch.cuda.current_device() == 0
    assert there.tolist() == ops.sample_codes(*first, top_k=8000, backend=backend)[0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_of_a_graph(backend):
    """The inputs change between replays, as those of a decoding do."""
    logits, noise, codebook = sampling(64, 16384, 8, seed=0)
    others = [sampling(64, 16384, 8, seed=number)[:2] for number in (1, 2)]
    run = lambda: ops.sample_codes(logits, noise, codebook, top_k=8000, backend=backend)[0]  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = run()
    for others_logits, others_noise in others:
        logits.copy_(others_logits)
        noise.copy_(others_noise)
        graph.replay()
        replayed = codes.tolist()
        assert replayed == run().tolist()


@pytest.mark.skipif("cuda" not in BACKENDS, reason="no CUDA kernels")
def test_a_failure_of_another_op_is_not_the_next_ones():
    """CUDA keeps a failed call's error for whoever asks next: neither our next launch nor PyTorch's may get it."""
    index = torch.arange(3, device="cuda")
    expected = ops.noise(0, index.cpu(), (5,))
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        native.cuda.check_device(999)
    assert torch.equal(ops.noise(0, index, (5,), backend="cuda").cpu(), expected)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
        native.cuda.check_device(999)
    total = index.add(1).sum()
    torch.cuda.synchronize()
    assert int(total) == 6 and torch.cuda.current_device() == 0
    assert torch.equal(ops.noise(0, index, (5,), backend="cuda").cpu(), expected)
