"""Compiles every Triton kernel to a cubin for GPUs that need not be there; prints what each needs of the hardware.

python tests/kernels/compile_kernels.py 90 80     # a JSON line per kernel and architecture

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
from ddfast_kernels import (
    activate,
    add_norm,
    append_normed,
    codebook_posterior,
    decode_attention,
    draw_codes,
    filter_logits,
    flow_sample,
    nearest_code,
    noise,
    norm_linear,
    tiles,
)
from ddfast_kernels.launch import FUSED, UNFUSED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

WHOLE = (80, 90)
"""Architectures that all kernels are compiled for; others get those of the table of tiles."""

POINTERS = {
    "out_ptr": "*i64", "kept_ptr": "*i32", "evaluations_ptr": "*i32", "index_ptr": "*i64",
    "logits_ptr": "*bf16", "uncond_ptr": "*bf16", "log_probs_ptr": "*bf16",
    "qkv_ptr": "*bf16", "keys_ptr": "*bf16", "values_ptr": "*bf16", "position_ptr": "*i64", "first_ptr": "*i64",
}  # fmt: skip
FLOATS = ("temperature", "top_p", "sigma_min", "scale", "eps")


class Case(NamedTuple):
    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    types: dict[str, str] = {}  # noqa: RUF012
    options: dict[str, Any] = {}  # noqa: RUF012
    hot: bool = True
    multiples: tuple[str, ...] = ()
    """Numbers that 16 divides, which a launch finds out."""


def cases(architecture: int) -> Iterator[Case]:
    """Every kernel as it is launched at the papers' sizes; those of the table of tiles at every line of it."""
    yield from _tabled(architecture)
    if architecture not in WHOLE:
        return
    floats = {"out_ptr": "*fp32"}
    quads = {"QUADS": 256}
    yield Case("noise", noise.noise_kernel, quads, types=floats, options=UNFUSED)
    switches = {"GUIDED": True, "TOP_K": True, "TOP_P": True}
    strides = ("num_codes", "logits_stride", "uncond_stride")
    row = {**switches, "ROWS": 1, "CODES": 16384, "WHOLE": True}
    for write in (True, False):
        # With what is written a row of LlamaGen's does not fit the registers, once and outside of all loops: not hot.
        kernel = filter_logits.filter_logits_kernel
        constants = {**row, "WRITE": write}
        yield Case("filter_logits", kernel, constants, 16, 2, floats, UNFUSED, hot=not write, multiples=strides)
    for whole in (True, False):
        constants = {**row, "WHOLE": whole, "PART": 4096}
        kernel = draw_codes.draw_codes_kernel
        yield Case("draw_codes", kernel, constants, 16, options=UNFUSED, hot=whole, multiples=strides)
    yield from _decode_attention()
    yield from _fused_layers()
    yield from _norm_linear()


def _tabled(architecture: int) -> Iterator[Case]:
    """Of the kernels whose tiles are in kernels/tiles.py: 8 coordinates (LlamaGen), 32 (VAR), and what lies behind.

    With the tiles that a launch takes where this Triton makes the table's spill.
    """
    kernels = {
        "nearest_code": nearest_code.nearest_code_kernel,
        "codebook_posterior": codebook_posterior.codebook_posterior_kernel,
        "codebook_posterior_backward": codebook_posterior.codebook_posterior_backward_kernel,
        "flow_sample": flow_sample.flow_sample_kernel,
    }
    assert kernels.keys() == tiles.TILES.keys()
    strides = ("num_codes", "stride", "uncond_stride", "x_stride")
    for kernel, function in kernels.items():
        variants: dict[str, dict[str, Any]] = {kernel: {}}
        types = {"out_ptr": "*fp32"} if kernel.startswith("codebook_posterior") else {}
        if kernel == "flow_sample":
            flow = {"SOLVER": 3, "EARLY_EXIT": True, "COUNT": False}
            variants = {
                name: {**flow, "FILTER": on, "GUIDED": on}
                for name, on in (("flow_sample", False), ("sample_codes", True))
            }
        for dim in (8, 32, 64, 128):
            for name, switches in variants.items():
                case = Case(name, function, {**switches, "dim": dim}, types=types, multiples=strides)
                yield _tiled(case, tiles.tile_of(kernel, architecture, dim), architecture)


def _tiled(case: Case, first: tiles.Tile, architecture: int) -> Case:
    """With the tile that a launch would take."""

    def of(tile: tiles.Tile) -> Case:
        constants = {**case.constants, **tiles.constants(tile, case.constants["dim"])}
        return case._replace(constants=constants, num_warps=tile.num_warps, num_stages=tile.num_stages)

    return of(tiles.judge(first, lambda tile: usage(compiled(of(tile), architecture).asm["cubin"])["STACK"]).tile)


def _decode_attention() -> Iterator[Case]:
    """LlamaGen-L on an H200: 16 heads of 64; two rows of a long and a short sequence, a few rows and many."""
    out = {"out_ptr": "*bf16"}
    for rows, length in ((2, 1025), (2, 257), (16, 257), (128, 257)):
        tile, splits, num_warps = decode_attention.cut(16 * rows, 1, length, 64, 2, 132)
        constants = {"dim": 64, "DIM": 64, "SPLITS": splits}
        if splits > 1:
            parts = {**constants, "PARTS": triton.next_power_of_2(splits)}
            yield Case("decode_attention_merge", decode_attention.merge_kernel, parts, types=out)
        constants |= {"ROPE": True, "FIRST": True, "GROUP": 1, "HEADS": 1, "TILE": tile}
        yield Case("decode_attention", decode_attention.decode_attention_kernel, constants, num_warps, types=out)


def _fused_layers() -> Iterator[Case]:
    """LlamaGen-L, 2 and 128 rows of one position; VAR-d16 and d24, a first scale of 2 rows and a last of 128."""
    names = ("x", "branch", "gate", "weight", "bias", "total", "normed", "times", "scale", "out")
    bf16 = {f"{name}_ptr": "*bf16" for name in names}
    rms = {"BRANCH": True, "GATE": False, "WEIGHT": True, "BIAS": False, "RMS": True}
    modulated = {"BRANCH": True, "GATE": True, "WEIGHT": True, "BIAS": True, "RMS": False}
    for variant, rows, length, width in (
        (rms, 1, 2, 1024), (rms, 1, 128, 1024),
        *((modulated, *sizes, width) for sizes in ((2, 1), (128, 256)) for width in (1024, 1536)),
    ):  # fmt: skip
        tile, num_warps = add_norm.cut(rows * length, length, width, 132)
        constants = {**variant, "width": width, "WIDTH": triton.next_power_of_2(width), "TILE": tile}
        strides = ("gate_stride", "weight_stride", "bias_stride")
        yield Case("add_norm", add_norm.add_norm_kernel, constants, num_warps, types=bf16, multiples=strides)
    for gelu in (False, True):
        constants = {"GELU": gelu, "TIMES": not gelu, "ELEMENTS": 1024}
        numbers = ("x_stride", "times_stride", "width")
        yield Case("activate", activate.activate_kernel, constants, types=bf16, multiples=numbers)
    for heads in (16, 24):
        constants = {"SCALE": True, "heads": heads, "dim": 64, "DIM": 64, "ROWS": 16}
        yield Case("append_normed", append_normed.append_normed_kernel, constants, types=bf16)


def _norm_linear() -> Iterator[Case]:
    """LlamaGen-L's layers and head; LlamaGen-3B's first; VAR-d16's and d24's of a class's own vectors."""
    names = ("x", "branch", "gate", "weight", "bias", "linear", "linear_bias", "total", "out")
    strides = ("gate_stride", "weight_stride", "bias_stride", "outputs")
    none = {"BRANCH": False, "GATE": False, "NORM": "none", "WEIGHT": False, "BIAS": False, "OWN": False}
    rms = {**none, "BRANCH": True, "NORM": "rms", "WEIGHT": True}
    modulated = {"BRANCH": True, "GATE": True, "NORM": "layer", "WEIGHT": True, "BIAS": True, "OWN": True}
    for front, activation, width, outputs, type_ in (
        (rms, "none", 1024, 3072, "bf16"), (none, "none", 1024, 1024, "bf16"), (rms, "swiglu", 1024, 2816, "bf16"),
        (none, "none", 2816, 1024, "bf16"), (none, "none", 1024, 16384, "bf16"), (rms, "none", 3200, 9600, "bf16"),
        (modulated, "gelu", 1024, 4096, "bf16"), (modulated, "none", 1536, 4608, "bf16"),
        (rms, "swiglu", 1024, 2816, "fp32"), (none, "none", 1024, 16384, "fp32"),
        (modulated, "gelu", 1536, 6144, "fp32"),
    ):  # fmt: skip
        size, matrices = 2 if type_ == "bf16" else 4, 2 if activation == "swiglu" else 1
        layer = norm_linear.cut(width, outputs, matrices, size, front["NORM"] != "none", 132)
        for rows in sorted({norm_linear.slots(rows, size) for rows in range(1, 9)}):
            tensors = 1 + front["BRANCH"] + 3 * front["OWN"]
            constants = {
                **front, "LINEAR_BIAS": front["BIAS"], "ACTIVATION": activation, "width": width,
                "WIDTH": max(256 * layer.num_warps, triton.next_power_of_2(width)), "ROWS": rows,
                "OUTPUTS": layer.outputs, "SLICE": layer.slice, "WARPS": layer.num_warps,
                "STAGES": norm_linear.stages(layer, width, rows, tensors, matrices, size),
            }  # fmt: skip
            types = {f"{name}_ptr": f"*{type_}" for name in names}
            kernel = norm_linear.norm_linear_kernel
            yield Case(
                "norm_linear", kernel, constants, layer.num_warps, types=types, options=UNFUSED, multiples=strides
            )


def compiled(case: Case, architecture: int) -> Any:
    """The kernel of a case, compiled."""
    names = case.kernel.arg_names
    early = {name: architecture >= 90 for name in ("DEPENDENT", "PREFETCH") if name in names}
    case = case._replace(constants={**case.constants, **early})
    pointers = {**POINTERS, **case.types}
    signature = {
        name: "constexpr" if name in case.constants
        else pointers.get(name, "*fp32") if name.endswith("_ptr")
        else "fp32" if name in FLOATS
        else "i32"
        for name in names
    }  # fmt: skip
    # PyTorch's allocations begin at multiples of 16 bytes, which is what copies of 16 bytes are made for.
    multiples = [name for name in names if name.endswith("_ptr") or name in case.multiples]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    source = ASTSource(case.kernel, signature, constants, aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **FUSED, **case.options}
    options["launch_pdl"] = early.get("DEPENDENT", False)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack per thread, as the assembler assigned them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout)}


def order(code: str) -> list[str]:
    """How every sum over a dimension of a kernel's tensors is shared out: elements of a thread, lanes, warps."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    found = []
    for axis, layout in re.findall(r'"tt\.reduce".*?axis = (\d).*?<[0-9x]+xf32, (#\w+)>\) ->', code, re.DOTALL):
        shares = re.findall(r"(sizePerThread|threadsPerWarp|warpsPerCTA|instrShape) = \[([\d, ]+)\]", layouts[layout])
        found.append(f"{axis}: {[(name, sizes.split(', ')[int(axis)]) for name, sizes in shares]}")
    return found


def waits(code: str) -> bool | None:
    """Whether a kernel waits for the one before it ahead of every read and write; None: not at all."""
    before, wait, _ = code.partition("griddepcontrol.wait")
    return re.search(r"\b(ld|st|atom|red|cp\.async\.c[ag])\b\S*\.global", before) is None if wait else None


if __name__ == "__main__":
    for architecture in map(int, sys.argv[1:]):
        for case in cases(architecture):
            kernel = compiled(case, architecture)
            shown = ("ROWS", "CODES", "dim", "width", "TILE", "SPLITS", "OUTPUTS", "NORM", "ACTIVATION")
            sizes = {name: value for name, value in case.constants.items() if name in shown}
            facts = {"name": case.name, "sm": architecture, **sizes, "warps": case.num_warps, "hot": case.hot}
            if case.name == "norm_linear":
                facts |= {"type": case.types["x_ptr"], "order": order(kernel.asm["ttgir"])}
            code = kernel.asm["ptx"]
            facts |= {"shared": kernel.metadata.shared, "fma_f64": "fma.rn.f64" in code, "waits": waits(code)}
            print(json.dumps({**facts, **usage(kernel.asm["cubin"])}))
