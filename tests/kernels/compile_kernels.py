"""Compiles every Triton kernel to a cubin for GPUs that need not be there; prints what each needs of the hardware.

python tests/kernels/compile_kernels.py 90 80     # a JSON line per kernel and architecture, the first of them whole

Run in a process of its own, without TRITON_INTERPRET: that switch decides what `triton.jit` makes of a function.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from ddfast_kernels import codebook_posterior, filter_logits, flow_sample, nearest_code, noise
from ddfast_kernels.launch import FUSED, UNFUSED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

POINTERS = {
    "out_ptr": "*i64", "kept_ptr": "*i32", "evaluations_ptr": "*i32", "index_ptr": "*i64",
    "logits_ptr": "*bf16", "uncond_ptr": "*bf16", "log_probs_ptr": "*bf16",
}  # fmt: skip
FLOATS = ("temperature", "top_p", "sigma_min")


class Case(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    types: dict[str, str] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    hot: bool = True


def cases(*, every: bool) -> Iterator[Case]:
    """At the papers' code dimensions: everything that tuning may choose, or of each kernel one configuration."""
    floats = {"out_ptr": "*fp32"}
    quads = {"QUADS": 256}
    yield Case("noise", noise.noise_kernel, quads, types=floats, options=UNFUSED)
    switches = {"GUIDED": True, "TOP_K": True, "TOP_P": True}
    for write in (True, False):
        constants = {**switches, "WRITE": write, "ROWS": 1, "CODES": 16384}
        # A row of LlamaGen's fills the registers, and what spills is read again from the nearest cache: not marked hot.
        kernel = filter_logits.filter_logits_kernel
        yield Case("filter_logits", kernel, constants, 16, types=floats, options=UNFUSED, hot=False)
    for dim in (8, 32):
        for config in nearest_code.configs(dim)[: None if every else 1]:
            yield _tuned("nearest_code", nearest_code.nearest_code_kernel, dim, config)
        for config in codebook_posterior.configs(dim)[: None if every else 1]:
            module = codebook_posterior
            yield _tuned("codebook_posterior", module.codebook_posterior_kernel, dim, config, floats)
            yield _tuned("codebook_posterior_backward", module.codebook_posterior_backward_kernel, dim, config, floats)
        for config in flow_sample.configs(dim)[: None if every else 1]:
            for filtered in (False, True):
                switches = {"SOLVER": 3, "FILTER": filtered, "GUIDED": filtered, "EARLY_EXIT": True, "COUNT": False}
                name = "sample_codes" if filtered else "flow_sample"
                yield _tuned(name, flow_sample.flow_sample_kernel, dim, config, **switches)


def _tuned(name: str, kernel: Any, dim: int, config: triton.Config, types: dict[str, str] | None = None, **more: Any):
    constants = {"dim": dim, **config.kwargs, **more}
    constants["DIM"] = nearest_code.padded_dim(constants)
    return Case(name, kernel, constants, config.num_warps, config.num_stages, types or {})


def compiled(case: Case, architecture: int) -> Any:
    """The kernel of a case, compiled."""
    function = case.kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    names = function.arg_names
    pointers = {**POINTERS, **case.types}
    signature = {
        name: "constexpr" if name in case.constants
        else pointers.get(name, "*fp32") if name.endswith("_ptr")
        else "fp32" if name in FLOATS
        else "i32"
        for name in names
    }  # fmt: skip
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in case.constants.items()})
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **FUSED, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack per thread, as the assembler assigned them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}


if __name__ == "__main__":
    for number, architecture in enumerate(map(int, sys.argv[1:])):
        for case in cases(every=number == 0):
            kernel = compiled(case, architecture)
            sizes = {name: value for name, value in case.constants.items() if name in ("ROWS", "CODES", "dim")}
            facts = {"name": case.name, "sm": architecture, **sizes, "warps": case.num_warps, "hot": case.hot}
            fused = "fma.rn.f64" in kernel.asm["ptx"]
            print(
                json.dumps({**facts, "shared": kernel.metadata.shared, "fma_f64": fused, **usage(kernel.asm["cubin"])})
            )
