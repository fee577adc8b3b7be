"""How often the flow's code equals the exact map's, by solver, start and evaluations: the table of docs/numerics.md.

    python benchmarks/numerics.py --tokens 1000 > table.md

The exact map: the reference's formula in float64 on the codes kept, in thousands of third-order steps from a grid that
starts at 40 spreads; doubling the steps is reported as a check. The approximations are the CPU kernel's, in float32.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from shapes import LLAMAGEN, VAR, Shape
from torch import Tensor

from ddfast.ops import filter_logits, native
from ddfast.ops.flow_sample import SOLVERS
from ddfast.ops.geometry import codebook_geometry

EVALUATIONS = (8, 12, 16, 20, 24, 32)
CHUNK_ELEMENTS = 1_000_000


@dataclass(kw_only=True)
class Case:
    """One row group of the table."""

    name: str
    log_probs: Tensor
    noise: Tensor
    codebook: Tensor


def case(name: str, shape: Shape, tokens: int, std: float, *, clustered: bool = False, filters: bool = True) -> Case:
    """Tokens at a paper's shape; `clustered`: codes in 64 clusters instead of one cloud."""
    shape = Shape(**{**vars(shape), "tokens": tokens, "filters": shape.filters if filters else {}})
    codebook = shape.codebook()
    if clustered:
        generator = torch.Generator().manual_seed(3)
        member = torch.randint(64, (shape.num_codes,), generator=generator)
        codebook = codebook[:64][member] + 0.15 * torch.randn(codebook.shape, generator=generator)
    log_probs = filter_logits(shape.logits(codebook, std=std), **shape.filters)
    return Case(name=f"{name} ({std})", log_probs=log_probs, noise=shape.noise(), codebook=codebook)


def exact_codes(case: Case, steps: int) -> Tensor:
    """Third-order steps in float64 over the kept codes only, tokens padded to the largest support of their chunk."""
    sigma_min = codebook_geometry(case.codebook).sigma_min
    support = (case.log_probs > -math.inf).sum(-1)
    order, result, start = support.argsort(), torch.empty(len(support), dtype=torch.int64), 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * int(support[order[stop]]) <= CHUNK_ELEMENTS:
            stop += 1
        rows = order[start:stop]
        kept = int(support[rows].max())
        log_p, index = case.log_probs[rows].double().topk(kept, dim=-1)
        codes = case.codebook.double()[index]
        result[rows] = index.gather(1, _solve(log_p, case.noise[rows].double(), codes, sigma_min, steps)[:, None])[:, 0]
        start = stop
    return result


def _solve(log_p: Tensor, eps: Tensor, codes: Tensor, sigma_min: float, steps: int) -> Tensor:
    half_norms = codes.square().sum(-1) / 2

    def scores(u: Tensor, sigma: Tensor) -> Tensor:
        return log_p + (torch.einsum("tkd,td->tk", codes, u) - half_norms) / sigma.square()

    def denoise(u: Tensor, sigma: Tensor) -> Tensor:
        return torch.einsum("tk,tkd->td", scores(u, sigma).softmax(-1), codes)

    mean = torch.einsum("tk,tkd->td", log_p.softmax(-1), codes)
    variance = (log_p.softmax(-1) * (codes - mean[:, None]).square().sum(-1)).sum(-1, keepdim=True) / codes.shape[-1]
    sigma = (40 * variance.sqrt()).clamp_min(2 * sigma_min)
    h = torch.log(sigma / sigma_min) / steps
    i0 = -torch.expm1(-h)
    i1 = h - i0
    i2 = h.square() - 2 * i1
    u = sigma * eps + mean
    history = [denoise(u, sigma)] * 3
    u = u + (history[-1] - mean) / 2
    for step in range(steps):
        if step:
            history = [*history[1:], denoise(u, sigma)]
        a, b, c = history
        u = (1 - i0) * u + i0 * c + i1 * (3 * c - 4 * b + a) / (2 * h) + i2 * (c - 2 * b + a) / (2 * h.square())
        sigma = sigma * (1 - i0)
    return scores(u, sigma).argmax(-1)


def kernel_codes(case: Case, steps: int, solver: str, early_exit: bool) -> tuple[Tensor, Tensor]:
    """Codes and evaluations per token of the CPU kernel."""
    codebook, geometry = case.codebook.contiguous(), codebook_geometry(case.codebook)
    codes = torch.empty(len(case.noise), dtype=torch.int64)
    evaluations = torch.empty(len(case.noise), dtype=torch.int32)
    assert native.cpu is not None
    native.cpu.flow_sample(
        case.log_probs.data_ptr(), 0, case.log_probs.stride(0), case.noise.data_ptr(), codebook.data_ptr(),
        geometry.packed.data_ptr(), codes.data_ptr(), evaluations.data_ptr(), len(codes), *codebook.shape,
        steps, SOLVERS[solver], geometry.sigma_min, early_exit, torch.get_num_threads(),
    )  # fmt: skip
    return codes, evaluations


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the exact map")
    arguments = parser.parse_args()
    tokens = arguments.tokens
    columns = " ".join(str(count) for count in EVALUATIONS)
    head = [f"tokens: {tokens}", "exact, steps doubled", f"euler {columns}", "heun", "dpm2m", "dpm3m"]
    print("| " + " | ".join([*head, "dpm3m, early exit: mean (max) -> agreement"]) + " |")
    print("|---|---|---|---|---|---|---|")
    for one in (
        case("VAR, gaussian codes", VAR, tokens, 1.0),
        case("VAR, gaussian codes", VAR, tokens, 2.5),
        case("VAR, clustered codes", VAR, tokens, 2.5, clustered=True),
        case("LlamaGen", LLAMAGEN, tokens, 1.0),
        case("LlamaGen", LLAMAGEN, tokens, 2.5),
        case("LlamaGen, all codes", LLAMAGEN, tokens, 2.5, filters=False),
    ):
        exact = exact_codes(one, arguments.steps)
        check = slice(0, min(100, tokens))
        few = Case(name="", log_probs=one.log_probs[check], noise=one.noise[check], codebook=one.codebook)
        doubled = (exact_codes(few, 2 * arguments.steps) == exact[check]).double().mean()
        cells = []
        for solver in ("euler", "heun", "dpm2m", "dpm3m"):
            shares = []
            for count in EVALUATIONS:
                codes, _ = kernel_codes(one, count // 2 if solver == "heun" else count, solver, False)
                shares.append(f"{(codes == exact).double().mean():.3f}".removeprefix("0"))
            cells.append(" ".join(shares))
        exits = []
        for count in (16, 20, 24, 32):
            codes, used = kernel_codes(one, count, "dpm3m", True)
            agreement = (codes == exact).double().mean()
            exits.append(f"{used.double().mean():.1f} ({int(used.max())}) -> {agreement:.3f}")
        print(f"| {one.name} | {doubled:.3f} | {' | '.join(cells)} | {'; '.join(exits)} |", flush=True)


if __name__ == "__main__":
    main()
