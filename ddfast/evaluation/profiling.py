"""Where the time of a sample goes: a table, NVTX ranges, a Chrome trace, and the Nsight commands to go on with."""

from __future__ import annotations

import resource
import shlex
import sys
from pathlib import Path

import torch
from torch import Tensor

from ddfast.config import TrainConfig
from ddfast.evaluation.sources import Source, sources_for
from ddfast.evaluation.speed import IMAGE_DECODER, measure_speed
from ddfast.models.protocol import Teacher
from ddfast.models.student import Student
from ddfast.progress import Progress, silent
from ddfast.sampling import first_request
from ddfast.tracing import activities, span, write_trace

_COUNTED = 8
"""Samples whose passes are counted."""


def profile(
    config: TrainConfig,
    teacher: Teacher,
    student: Student,
    out: Path,
    *,
    command: str,
    rounds: int = 7,
    progress: Progress = silent,
) -> list[str]:
    """Time AR decoding against the student and write a Chrome trace to `out/trace.json`.

    Args:
        config: its evaluation's batch sizes.
        teacher, student: what is timed.
        out: folder of the trace.
        command: the command line to give to Nsight.
        rounds: repetitions of every measurement.
        progress: called with rounds done, rounds in all, and what is being timed.

    Returns:
        The lines of a table (milliseconds per image without and with image decoding, ratios to both AR decoders, peak
        memory) and what to run next.
    """
    batches = config.evaluation.batch_sizes
    sources = [source for source in sources_for(teacher, student) if source.profile]
    labels = {source.name: source.profile for source in sources}
    seconds = measure_speed(teacher, student, batch_sizes=batches, rounds=rounds, progress=progress)
    decoder = seconds.pop(IMAGE_DECODER, None)
    lines = []
    for decoded in (False, True) if decoder is not None else (False,):
        lines += ["", f"milliseconds per image, image decoding {'included' if decoded else 'excluded'}"]
        lines.append(f"{'batch':>8s}  " + "  ".join(f"{label:>24s}" for label in labels.values()))
        for batch in batches:
            values = [1e3 * (seconds[name][batch] + (decoder[batch] if decoded and decoder else 0)) for name in labels]
            plain, own = values[:2]
            cells = [f"{value:.3f} ({plain / value:.1f}x, {own / value:.1f}x)" for value in values]
            lines.append(f"{batch:8d}  " + "  ".join(f"{cell:>24s}" for cell in cells))
    device = teacher.codebook.device
    lines += ["", "(times as fast as plain PyTorch's AR decoding, as ddfast's)"]
    lines += [_passes(source, teacher, student) for source in sources if source.counts_passes]
    lines.append(f"peak memory: {_peak_memory(device)}")
    trace = _trace(teacher, student, batches[-1], out)
    lines += [f"Chrome trace: {trace} (chrome://tracing or ui.perfetto.dev)", "", "With Nsight on a GPU:"]
    command += "" if device.type == "cuda" else " --device cuda"
    lines.append(f"  nsys profile --trace=cuda,nvtx,osrt --output {shlex.quote(f'{out}/nsys')} {command}")
    include = "--nvtx-include 'student 1 step/'"
    lines.append(f"  ncu --nvtx {include} --set full --export {shlex.quote(f'{out}/ncu')} {command}")
    return lines


def _passes(source: Source, teacher: Teacher, student: Student) -> str:
    """How many passes of the network a few samples of a source take."""
    request = first_request(teacher, student, _COUNTED)
    source.maker(teacher)(request)
    assert request.passes is not None
    passes = float(request.passes.double().mean())
    each = f"{passes:.1f} passes for {teacher.num_tokens} tokens, {teacher.num_tokens / passes:.2f} tokens a pass"
    return f"{source.profile}: {each} (mean of {_COUNTED} samples)"


def _trace(teacher: Teacher, student: Student, batch: int, out: Path) -> Path:
    """One pass of every stage under torch.profiler, each in an NVTX range of its own.

    AR decoding stops after 16 groups: LlamaGen's 256 would make a trace of hundreds of megabytes of the same.
    """
    device = teacher.codebook.device
    request = first_request(teacher, student, batch)
    condition, eps = request.condition, request.noise
    stop = teacher.group_starts()[min(len(teacher.groups), 16)]
    stages = {  # no comma in a name: ncu's range filter reads it as a separator
        "teacher AR": lambda: teacher.generate(condition, stop=stop),
        "teacher flow": lambda: teacher.generate(condition, sampler="flow", noise=eps, stop=stop),
        "student 1 step": lambda: student.sample(condition, eps),
        "student 2 steps": lambda: student.sample(condition, eps, **student.settings(2)),
    }
    made: Tensor | None = None
    with torch.profiler.profile(activities=activities(device)) as profiler:
        for name, stage in stages.items():
            with span(name):
                made = stage()
        if teacher.has_decoder:
            with span("image decoding"):
                assert made is not None
                teacher.decode(made)
    return write_trace(profiler, out / "trace.json")


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the GPU"
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB resident"
