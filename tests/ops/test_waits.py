"""No op's way to its GPU kernels waits for the device: no value is read back, nothing is copied from the host.

The tensors have no values, on the device "meta", which the ops take as they take a GPU: it is no CPU. The kernels are
left out, and every op of PyTorch around them is seen.
"""

import contextlib
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddfast.ops import common, dispatch, geometry, native

B, N, V, D = 2, 5, 40, 8
MODULES = {op: importlib.import_module(f"ddfast.ops.{op}") for op in dispatch.KERNELS}
READS = ("aten._local_scalar_dense", "aten.equal", "aten.is_nonzero", "aten.nonzero", "aten.masked_select")
CODEBOOK = torch.randn(V, D, device="meta")
CASES = [(op, backend) for op, backends in dispatch.KERNELS.items() for backend in backends if backend != "cpu"]


class Watcher(TorchDispatchMode):
    """Notes what reads from a GPU, and what copies to it or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self):
        # Of numbers, which are copied from the host: PyTorch makes them without an op on this device.
        self.patch = pytest.MonkeyPatch()
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            self.patch.setattr(owner, name, self.noted(getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def noted(self, make):
        def made(*args, **kwargs):
            result = make(*args, **kwargs)
            self.waits += [] if result.is_cpu else [make.__name__]
            return result

        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        devices = {tensor.device.type for tensor in args if isinstance(tensor, torch.Tensor)}
        if kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        copies = name.startswith(("aten._to_copy", "aten.copy_")) and len(devices) > 1
        counts = name == "aten.index.Tensor" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if copies or counts or name.startswith(READS):
            self.waits.append(name)
        return func(*args, **kwargs)


class Kernels:
    """A module of kernels that do nothing: a size of 0, or thresholds for as many rows as come in."""

    max_dim = 64

    def __getattr__(self, name: str):
        return lambda first, *_, **__: first.new_empty(len(first), 3) if isinstance(first, torch.Tensor) else 0


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Ops call their implementations, those call kernels that do nothing, and the device is taken to be there."""
    monkeypatch.setattr(native, "cuda", Kernels())
    monkeypatch.setattr(native, "triton", lambda _: Kernels())
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: "")
    monkeypatch.setattr(common, "launch_place", lambda _: (0, 0))
    monkeypatch.setattr(geometry, "_compute", remembered)
    for op, module in MODULES.items():
        implementation = getattr(module, f"_{op}")
        name = "decode_attention_unchecked" if op == "decode_attention" else "_op"
        monkeypatch.setattr(module, name, implementation, raising=False)
        monkeypatch.setattr(torch.ops.ddfast, op, implementation)


def remembered(codebook: torch.Tensor) -> geometry.CodebookGeometry:
    """As if computed before, which waits once per codebook."""
    packed, codes = codebook.new_empty(V + 1, dtype=torch.float32), codebook.float().clone()
    return geometry.CodebookGeometry(packed[:V], 1.0, 0.1, packed, codes, codebook.clone())


def call(op: str, backend: str) -> object:
    """An op as decoding and training call it, settings given as numbers."""
    function = getattr(MODULES[op], op)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="meta")

    def whole(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device="meta")

    logits, x = normal(B, N, V, dtype=torch.bfloat16), normal(B, N, D)
    filters = {"uncond": normal(B, N, V), "cfg_scale": 2.0, "temperature": 0.9, "top_k": 7, "top_p": 0.9}
    given = {**filters, "backend": backend}
    match op:
        case "nearest_code":
            return [function(x, CODEBOOK, cosine=cosine, backend=backend) for cosine in (False, True)]
        case "filter_logits":
            return function(logits, **given)
        case "draw_codes":
            return function(logits, normal(B, N), **given)
        case "sample_codes":
            return function(logits, x, CODEBOOK, **given)
        case "flow_sample":
            return function(logits, x, CODEBOOK, backend=backend)
        case "codebook_posterior":
            flow = (x, normal(B, N), logits, CODEBOOK)
            backward = MODULES[op]._codebook_posterior_backward
            return function(x, 0.5, *flow[2:], backend=backend), backward(x, *flow, x, normal(B, N), backend)
    keys, values, vectors = normal(B, 2, 7, D), normal(B, 2, 7, D), normal(B, 1, 3, D)
    match op:
        case "decode_attention":
            rope, first = normal(7, D // 2, 2), whole(B)
            return function(normal(B, 8 * D), keys, values, whole(1), rope=rope, first=first, backend=backend)
        case "add_norm":
            gate, weight, bias = vectors.unbind(2)
            return function(x, x, gate=gate, weight=weight, bias=bias, eps=1e-5, backend=backend)
        case "norm_linear":
            weight, linear = vectors[0, 0, 0], normal(3, D)
            return function(x[:1], x[:1], linear, weight=weight, eps=1e-5, rms=True, backend=backend)
        case "append_normed":
            return function(normal(B, N, 3, 2, D), keys, values, 1, scale=normal(2), backend=backend)
        case "activate":
            return function(x, x, kind="silu", backend=backend)
        case "noise":
            return [function(3, index, (3, 2), "meta", backend=backend) for index in (whole(B), 5)]
    raise AssertionError(op)


@pytest.mark.parametrize(("op", "kernels"), CASES)
@torch.no_grad()
def test_no_op_waits(without_a_gpu, op, kernels):
    call(op, kernels)  # what is remembered from now on
    with Watcher() as watcher:
        call(op, kernels)
    assert watcher.waits == []


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor(2.0, device=x.device),
        lambda x: x.new_tensor([2.0]),
    ],
)
def test_what_waits_is_seen(waiting):
    x = torch.ones(3, device="meta")
    with Watcher() as watcher, contextlib.suppress(RuntimeError, NotImplementedError):  # no value is there to be read
        waiting(x)
    assert watcher.waits
