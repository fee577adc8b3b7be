"""Fuzzing guided by coverage, for as long as there is time: `python tests/fuzz/coverage_guided.py TARGET --runs N`.

TARGET is one of `targets.TARGETS`, "command lines", or "all", in turn. libFuzzer keeps what reaches new lines of
ddfast, and the mutator changes it with the file's structure in mind (`mutations.py`), or byte by byte. What is found
ends the target with its traceback, and the file is kept as crash-*; `--file` reads such a file again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND_LINES = "command lines"
_INSTRUMENTED = [
    "ddfast.files", "ddfast.config", "ddfast.runs", "ddfast.hub", "ddfast.tables", "ddfast.trajectories",
    "ddfast.cli", "ddfast.models.checkpoint", "ddfast.models.loading", "ddfast.models.official", "ddfast.models.family",
    "ddfast.models.caption_files", "ddfast.evaluation.images", "ddfast.evaluation.references", "ddfast.drawing",
    "ddfast.evaluation.judgements", "ddfast.evaluation.clip", "ddfast.ops.findings", "ddfast.distill.checkpoints",
    "ddfast.distill.tracking", "ddfast.judging",
]  # fmt: skip
"""What decides over a file or a command line; with PyTorch a case would be a hundred times slower."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=10_000, help="cases, of each target")
    parser.add_argument("--seconds", type=int, default=0, help="at most, of each target; 0: as long as the cases take")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", type=Path, help="read this file alone, without guidance")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    if options.inside or options.file is not None:
        return _one(options)
    if importlib.util.find_spec("atheris") is None:
        print("error: coverage-guided fuzzing needs atheris: pip install atheris", file=sys.stderr)
        return 1
    return _processes(options)


def _processes(options: argparse.Namespace) -> int:
    """A process for each target: libFuzzer ends the one that it runs in, and leaves what it has in temporary files."""
    from targets import TARGETS

    names, codes = (*TARGETS, COMMAND_LINES) if options.target == "all" else (options.target,), {}
    for name in names:
        settings = ["--inside", "--runs", options.runs, "--seconds", options.seconds, "--seed", options.seed]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, name, *map(str, settings)]
            codes[name] = subprocess.run(command, env={**os.environ, "TMPDIR": folder}).returncode
    failed = [name for name, code in codes.items() if code]
    print(f"{len(codes)} targets: " + (f"findings in {', '.join(failed)}" if failed else "nothing found"))
    return 1 if failed else 0


def _one(options: argparse.Namespace) -> int:
    if options.file is None:
        import atheris

        with atheris.instrument_imports(include=_INSTRUMENTED):
            import command_lines
            import targets
    else:
        import command_lines
        import targets
    import mutations
    import trial

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.target == COMMAND_LINES:
            stack.enter_context(command_lines.place(folder))
            seeds, kind = [bytes([number]) * 4 for number in range(32)], "bytes"

            def case(data: bytes) -> None:
                command_lines.ended(command_lines.drawn(random.Random(data)))

        elif options.target in targets.TARGETS:
            target = targets.TARGETS[options.target]
            seeds, kind = targets.prepared(target, folder), target.kind

            def case(data: bytes) -> None:
                trial.refused(target, folder, data)

        else:
            known = ", ".join((*targets.TARGETS, COMMAND_LINES))
            print(f"error: unknown target {options.target!r}; known: {known}", file=sys.stderr)
            return 1
        if options.file is not None:
            case(options.file.read_bytes())
            return 0
        for data in seeds:  # what is imported now is not counted as memory or as files elsewhere
            case(data)
        stack.enter_context(trial.little_memory(3 * trial.MEMORY))
        _fuzz(options, case, seeds, kind, mutations.mutated)
    return 0


def _fuzz(options: argparse.Namespace, case: Any, seeds: list[bytes], kind: str, mutated: Any) -> None:
    """Run libFuzzer, which ends the process."""
    import atheris

    def mutate(data: bytes, largest: int, seed: int) -> bytes:
        draw = random.Random(seed)
        made = atheris.Mutate(data, largest) if draw.randrange(4) == 0 else mutated(data, draw, kind)
        return made[:largest]

    corpus = Path(tempfile.mkdtemp())
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)
    largest = 2 * max(len(data) for data in seeds) + 10_000
    flags = [
        f"-atheris_runs={options.runs}",
        f"-max_len={largest}",
        f"-seed={options.seed}",
        "-timeout=30",
        "-rss_limit_mb=0",
    ]
    flags += [f"-max_total_time={options.seconds}"] if options.seconds else []
    atheris.Setup([options.target, *flags, "-print_final_stats=1", str(corpus)], case, custom_mutator=mutate)
    print(f"{options.target}: {len(seeds)} seeds, at most {options.runs} cases", flush=True)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
