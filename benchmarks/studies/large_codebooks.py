"""How the ops take language-sized codebooks: the tables of docs/notes/large-codebooks.md.

python benchmarks/studies/large_codebooks.py accuracy      # codes of the exact map, by dimension, start and steps
python benchmarks/studies/large_codebooks.py projected     # 50,000 codes of 768 dimensions, projected to few
python benchmarks/studies/large_codebooks.py time          # per token, on one thread; time-50000 for 50,000 codes
python benchmarks/studies/large_codebooks.py memory        # peak, in a process each
python benchmarks/studies/large_codebooks.py geometry      # what the flow needs of a codebook once

Each writes its rows into benchmarks/results/studies/large_codebooks.json (--out), beside those of the others. Seeds are
fixed. Logits are independent, N(0, 2.5^2), for accuracy N(0, 3^2).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from ddfast import ops
from ddfast.ops import flow_sample as flow_op
from ddfast.ops import geometry, native
from ddfast.report import machine

OUT = Path(__file__).parents[1] / "results" / "studies" / "large_codebooks.json"
flow_module = sys.modules["ddfast.ops.flow_sample"]
STD = 2.5
SIZES, DIMS = (100, 1000, 16384, 50000), (8, 64, 256, 1024)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def start_at(spreads: Callable[[int], float], ends: float = 1.0) -> Iterator[None]:
    """The reference's grid from so many spreads, to so much of sigma_min."""
    found = geometry.codebook_geometry

    def further(codebook: Tensor, **settings: bool) -> geometry.CodebookGeometry:
        known = found(codebook, **settings)
        return known._replace(sigma_min=ends * known.sigma_min)

    with mock.patch.multiple(flow_module, _start_spreads=spreads, codebook_geometry=further):
        yield


def exact_codes(log_probs: Tensor, noise: Tensor, codebook: Tensor, steps: int) -> Tensor:
    """The reference in float64, of a grid from 5 code distances (40 spreads at least) to a third of the usual end."""
    with start_at(lambda dim: 5 * math.sqrt(max(64, dim)), ends=1 / 3):
        wide = log_probs.double(), noise.double(), codebook.double()
        return ops.flow_sample(*wide, steps=steps, backend="reference")[0]


def agreement(codes: Tensor, exact: Tensor) -> float:
    """Share of tokens."""
    return round((codes == exact).double().mean().item(), 4)


def accuracy() -> Iterator[dict[str, Any]]:
    """Of starts, of which that at 8 spreads no number of steps mends, and of steps."""
    tokens, num_codes = 400, 300
    starts = {"8": lambda _: 8.0, "sqrt(2 d)": lambda dim: math.sqrt(2 * dim), "d / 4": lambda dim: dim / 4}
    for kind, dims in (("gaussian", (8, 32, 64, 128, 256, 512, 1024)), ("unit", (64, 256, 1024))):
        for dim in dims:
            codebook = normal(0, num_codes, dim)
            codebook = F.normalize(codebook, dim=-1) if kind == "unit" else codebook
            given = (3 * normal(1, tokens, num_codes)).log_softmax(-1), normal(2, tokens, dim), codebook
            exact = exact_codes(*given, 200)
            row: dict[str, Any] = {"codes": kind, "V": num_codes, "d": dim, "tokens": tokens}
            row["exact, half the steps"] = agreement(exact_codes(*given, 100), exact)
            for name, spreads in starts.items() if dim > 32 else ():
                with start_at(spreads):
                    found = [ops.flow_sample(*given, steps=steps, backend="reference")[0] for steps in (20, 64)]
                row[f"from {name} spreads, 20 and 64 steps"] = [agreement(codes, exact) for codes in found]
            for steps in (8, 12, 16, 20, 32):
                row[f"{steps} steps"] = agreement(ops.flow_sample(*given, steps=steps)[0], exact)
                row[f"evaluations of {steps} steps"] = evaluations(*given, steps)
            yield row


def evaluations(log_probs: Tensor, noise: Tensor, codebook: Tensor, steps: int) -> float:
    """What the CPU kernel takes per token, on average."""
    assert native.cpu is not None
    codes = torch.empty(len(noise), dtype=torch.int64)
    count = torch.empty(len(noise), dtype=torch.int32)
    arguments, _alive = flow_module.native_flow_arguments(noise, codebook, codes, steps, "dpm3m")
    arguments = (*arguments[:4], count.data_ptr(), *arguments[5:])
    native.cpu.flow_sample(log_probs.data_ptr(), 0, log_probs.stride(0), *arguments)
    return round(count.double().mean().item(), 1)


def projected() -> Iterator[dict[str, Any]]:
    """A language model's number of codes, half of whose variance is that of 64 clusters, given to the flow in few."""
    tokens, num_codes, width = 64, 50000, 768
    wide = normal(0, num_codes, width) + normal(1, 64, width)[torch.arange(num_codes) % 64]
    log_probs = (STD * normal(2, tokens, num_codes)).log_softmax(-1)
    for dim in (4, 8, 16, 32):
        codebook = wide @ normal(3, width, dim) / width**0.5
        given = log_probs, normal(4, tokens, dim), codebook
        exact = exact_codes(*given, 200)
        row: dict[str, Any] = {"V": num_codes, "d": dim, "tokens": tokens}
        for steps in (12, 20, 32):
            row[f"{steps} steps"] = agreement(ops.flow_sample(*given, steps=steps)[0], exact)
            row[f"evaluations of {steps} steps"] = evaluations(*given, steps)
        yield row


whole_geometry = geometry._compute


def sampled_geometry(codebook: Tensor) -> geometry.CodebookGeometry:
    """In the whole one's place where only the time of what follows is asked for: of the first 256 codes."""
    few = whole_geometry(codebook[:256])
    nearest = few.nearest[torch.arange(len(codebook)) % len(few.nearest)]
    packed = torch.cat([nearest, few.packed[-1:]])
    return few._replace(nearest=nearest, packed=packed, centred=codebook - codebook.mean(0), codes=codebook.clone())


def calls(codebook: Tensor, rows: int) -> dict[str, Callable[[str], Any]]:
    """Each op on inputs for a codebook, by backend."""
    noise = normal(1, rows, codebook.shape[1])
    logits = STD * normal(2, rows, len(codebook))
    log_probs, uniform = logits.log_softmax(-1), torch.rand(rows, generator=torch.Generator().manual_seed(3))
    return {
        "nearest_code": lambda by: ops.nearest_code(noise, codebook, backend=by),
        "codebook_posterior": lambda by: ops.codebook_posterior(noise, 0.5, log_probs, codebook, backend=by),
        "flow_sample": lambda by: flow_op(log_probs, noise, codebook, backend=by),
        "sample_codes top-k 50": lambda by: ops.sample_codes(logits, noise, codebook, top_k=50, backend=by),
        "sample_codes top-p .95": lambda by: ops.sample_codes(logits, noise, codebook, top_p=0.95, backend=by),
        "filter_logits top-k 50": lambda by: ops.filter_logits(logits, top_k=50, backend=by),
        "draw_codes top-k 50": lambda by: ops.draw_codes(logits, uniform, top_k=50, backend=by),
    }


def times(sizes: tuple[int, ...], dims: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Microseconds per token, medians of up to 7 calls within 0.4 s."""
    torch.set_num_threads(1)
    for num_codes in sizes:
        for dim in dims:
            rows = 64 if num_codes * dim <= 2**22 else 16
            for name, call in calls(normal(0, num_codes, dim), rows).items():
                if name.startswith(("filter", "draw")) and dim != dims[0]:
                    continue  # which know no d
                row: dict[str, Any] = {"op": name, "V": num_codes, "d": dim, "rows": rows}
                for backend in ("cpu", "reference"):
                    call(backend)
                    begin, found = time.perf_counter(), list[float]()
                    while not found or (len(found) < 7 and time.perf_counter() - begin < 0.4):
                        before = time.perf_counter()
                        call(backend)
                        found.append(time.perf_counter() - before)
                    row[backend] = round(1e6 * statistics.median(found) / rows, 2)
                yield row


def memory() -> Iterator[dict[str, Any]]:
    """What a call adds to the peak of its process, MiB, 64 rows (of which the logits take 12); geometry apart."""
    for name in calls(normal(0, 2, 1), 1):
        for dim in (64, 1024):
            if name.startswith(("filter", "draw")) and dim != 64:
                continue
            row: dict[str, Any] = {"op": name, "V": 50000, "d": dim, "rows": 64}
            for backend in ("cpu", "reference"):
                command = [sys.executable, __file__, "peak", "--call", f"{name},{dim},{backend}"]
                row[backend] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            yield row


def peak(text: str) -> None:
    """Print what one call adds."""
    import resource

    name, dim, backend = text.split(",")
    codebook = normal(0, 50000, int(dim))
    call = calls(codebook, 64)[name]
    calls(normal(0, 8, int(dim)), 2)[name](backend)
    geometry.codebook_geometry(codebook)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call(backend)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def geometries() -> Iterator[dict[str, Any]]:
    """Seconds of the nearest codes of 512 codes, by differences and by products, times what there are of them."""
    torch.set_num_threads(1)
    for num_codes in SIZES[2:]:
        for dim in DIMS:
            points = normal(0, num_codes, dim)
            row: dict[str, Any] = {"V": num_codes, "d": dim}
            for name, wide, mode in (("differences", points, "donot_use_mm"), ("products", points.double(), "use_mm")):
                before = time.perf_counter()
                torch.cdist(wide[:512], wide, compute_mode=f"{mode}_for_euclid_dist").amin(-1)
                row[name] = round((time.perf_counter() - before) * num_codes / 512, 2)
            yield row


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "accuracy": accuracy,
    "projected": projected,
    "time": lambda: times(SIZES[:3], DIMS),
    "time-50000": lambda: times(SIZES[3:], (8, 16, 32, 64, 256, 1024)),
    "memory": memory,
    "geometry": geometries,
}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "peak"])
    parser.add_argument("--call", default="", help="of `peak`: op, dimension and backend")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    sampled = arguments.part.startswith("time") or arguments.part == "peak"
    with mock.patch.object(geometry, "_compute", sampled_geometry if sampled else whole_geometry):
        if arguments.part == "peak":
            peak(arguments.call)
            return
        rows = []
        for row in PARTS[arguments.part]():
            rows.append(row)
            print(json.dumps(row), flush=True)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    command = " ".join(["python", "benchmarks/studies/large_codebooks.py", *sys.argv[1:]])
    results[arguments.part] = {"machine": {**machine(), "command": command}, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    arguments.out.write_text(re.sub(r"\n {4,}(?=[\"}])", " ", text) + "\n")


if __name__ == "__main__":
    main()
