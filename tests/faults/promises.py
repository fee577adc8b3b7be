"""docs/reliability.md, made from the tests: `python tests/faults/promises.py` writes it anew.

What the tests of this folder do to every operation is read from their tables; what else is tested elsewhere stands
here, by the name of the test.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cli")]

from injection import FAULTS  # noqa: E402
from operations import OPERATIONS, Operation  # noqa: E402
from test_damage import FILES, MADE_AGAIN  # noqa: E402
from test_damage import cells as damages  # noqa: E402
from test_matrix import PLACES, TRAIN  # noqa: E402
from test_not_finite import READ, TEACHER  # noqa: E402

PAGE = ROOT / "docs" / "reliability.md"

GOES_ON, ANEW, UNHARMED, REFUSED, REMADE = "goes on", "anew", "unharmed", "refused", "made again"
EITHER = "one of both"

MEANING = {
    GOES_ON: """one line says what happened; no name stands for half a file; the same command does what is left, and
  ends with the very bytes of a run that nobody disturbed. At most what came after the last shard, checkpoint, batch of
  samples or stage is done again""",
    ANEW: "as before, and the same command does all of it again: it takes seconds, or leaves nothing behind",
    UNHARMED: "it ends as if nothing had been",
    REFUSED: "one line names the file or the setting and says what to do; nothing that was there is changed",
    REMADE: "a line says so, and what only ddfast writes is made again",
    EITHER: "is refused in a line, or both end, and what is there is what one would have made",
}
"""Of a cell's words."""


@dataclass(frozen=True)
class Row:
    """A fault, what is promised of it by the operation's function, and the tests (a file, or a test of one)."""

    fault: str
    cells: dict[str, str]
    tests: tuple[str, ...]


def promised(operation: Operation) -> str:
    return GOES_ON if operation.keeps else ANEW


def every(promise: str, *without: str) -> dict[str, str]:
    return {name: promise for name in OPERATIONS if name not in without}


def some(promise: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, promise)


MATRIX = "tests/faults/test_matrix.py::test_nothing_is_lost"
TRAINING = ("pairs", "dd1", "dd2", "report")
SAMPLING = ("sample_codes", "sample_npz", "sample_files", "sample_grid")
KEEPS = tuple(name for name, operation in OPERATIONS.items() if operation.keeps)


def rows() -> Iterator[Row]:
    for fault in FAULTS.values():
        cells = {
            name: UNHARMED if fault.harmless else promised(operation)
            for name, operation in OPERATIONS.items()
            if operation.meets(fault)
        }
        yield Row(fault.name, cells, (MATRIX,))
    yield Row(
        "full /tmp",
        {name: promised(operation) if name in TRAIN else UNHARMED for name, operation in OPERATIONS.items()},
        ("tests/faults/test_matrix.py::test_a_full_tmp_harms_nothing",),
    )
    damaged: dict[str, str] = {}
    for file, (name, *_) in FILES.items():
        damaged[name] = REFUSED if damaged.get(name) == REFUSED or file not in MADE_AGAIN else REMADE
    yield Row("a damaged file (below)", damaged, ("tests/faults/test_damage.py::test_damage_is_never_used",))
    yield Row(
        "two processes in one folder",
        every(EITHER),
        (
            "tests/faults/test_two_processes.py::test_nothing_is_mixed",
            "tests/cli/test_samples_kept.py::test_a_second_run_meanwhile_is_refused",
        ),
    )
    yield Row(
        "one rank dead",
        some(GOES_ON, *KEEPS),
        (
            "tests/cli/test_faults.py::test_killed_again_and_again_it_ends_as_the_undisturbed_run",
            "tests/cli/test_faults.py::test_torchrun_starts_it_again_by_itself",
            "tests/cli/test_parallel.py::test_what_ends_all_is_said_once_and_what_ends_one_by_that_one",
            "tests/cli/test_samples_kept.py::test_any_number_of_processes_goes_on",
            "benchmarks/kill_matrix.py",
        ),
    )
    yield Row(
        "one rank slow or silent",
        some(GOES_ON, *KEEPS),
        ("tests/test_processes.py::test_one_that_ends_or_hangs_ends_the_others",),
    )
    yield Row(
        "out of memory on a device",
        some(GOES_ON, "pairs", "dd1", "dd2"),
        (
            "tests/distill/test_micro_batch.py::test_memory_that_jumps_is_found_by_backing_off",
            "tests/distill/test_micro_batch.py::test_too_little_memory_is_one_line",
            "tests/trajectories/test_generate.py::test_a_batch_that_does_not_fit_after_all_is_one_error",
        ),
    )
    yield Row(
        "NaN in a loss",
        some(REFUSED, "dd1", "dd2"),
        (
            "tests/distill/test_dd1.py::test_a_loss_that_is_not_finite_stops_before_the_weights_change",
            "tests/distill/test_dd2.py::test_diverged_weights_end_the_training_with_its_name",
        ),
    )
    yield Row(
        "NaN in logits or samples",
        some(REFUSED, "pairs", *SAMPLING, "hub_load"),
        (
            "tests/models/test_recycling.py::test_samples_of_nan_are_an_error_on_any_device",
            "tests/cuda/test_filter_logits.py::test_bad_rows_are_nan_and_leave_others_alone",
        ),
    )
    yield Row(
        "NaN in weights of a file",
        {name: REMADE if path == TEACHER else REFUSED for name, path in READ.items()},
        ("tests/faults/test_not_finite.py::test_weights_that_diverged_are_refused",),
    )
    yield Row(
        "a changed configuration",
        {
            **some(REFUSED, *TRAINING, *SAMPLING, "convert", "evaluate"),
            **some(UNHARMED, "teacher_cache", "verdicts"),
        },
        (
            "tests/trajectories/test_store.py::test_other_settings_are_refused_by_name",
            "tests/trajectories/test_store.py::test_another_teacher_is_refused",
            "tests/cli/test_commands.py::test_other_settings_are_refused_and_nothing_is_lost",
            "tests/cli/test_samples_kept.py::test_other_settings_are_refused_before_anything_is_loaded",
            "tests/cli/test_samples_kept.py::test_so_are_other_weights_and_captions",
            "tests/cli/test_convert.py::test_nothing_is_overwritten_and_errors_are_one_line",
            "tests/models/test_digits.py::test_a_teacher_of_before_is_the_same",
            "tests/ops/test_verification.py::test_findings_are_kept_per_machine",
        ),
    )
    yield Row(
        "files of the release before",
        some(GOES_ON, "pairs", "dd1", "sample_codes", "hub_load", "teacher_cache", "verdicts"),
        (
            "tests/faults/test_upgrades.py::test_a_run_goes_on",
            "tests/faults/test_upgrades.py::test_sampling_goes_on",
            "tests/faults/test_upgrades.py::test_a_hub_folder_is_loaded",
            "tests/faults/test_upgrades.py::test_what_is_of_a_later_format_is_refused",
        ),
    )


BEGINNING = """# Reliability

<!-- made by tests/faults/promises.py -->

What is promised when machines, disks and files are as they are, and the test that holds ddfast to it. Faults are
injected from outside, into what a process asks of the system, at places drawn from a seed: {injected} in
{operations} operations, and {damages} damaged files (`make test-all`; `make test` has each fault once). Empty
cells: the operation has no such event, or the fault does not concern it.

"""

DAMAGED = """SIGTERM ends a command with exit code 75 and Ctrl-C with 130, after the line that says how to go on; errors
end it with 1. Where memory is refused inside of PyTorch's convolutions
(oneDNN), the process ends as if killed. A rank that is silent for `--limit` seconds counts as dead.

## Damaged files

Each cut short, with a changed bit, with zeros in it, empty, missing, or swapped with another file of its kind. It
is never used: files of ddfast hold a digest of every tensor, and of what else they say.

"""

BESIDES = """
## Hostile files

No file runs code, leads out of its folder, or is given the memory that it claims: [SECURITY.md](../SECURITY.md).

## Fuzzing

Every loader, op, C++ binding and command line takes valid inputs, changed at random (`tests/fuzz`): what comes of it is
a right result or one printable line; no crash, no other exception, nothing opened elsewhere, no memory beyond a limit.
A part runs with the tests, by a seed. What has run, on two cores, before everything that it found was mended and after:

| what | cases | command |
|---|---|---|
| loaders (31), random changes | 228,000 | the tables and changes of `tests/fuzz/targets.py` and `mutations.py` |
| loaders, coverage-guided by atheris | 64,000 | `python tests/fuzz/coverage_guided.py all --seconds 10` |
| command lines | 7,300 | `python tests/fuzz/coverage_guided.py "command lines"` |
| ops (14), against float64 or the reference | 105,000 | `python tests/fuzz/op_cases.py --cases 5000` |
| bindings, under AddressSanitizer and UBSan | 450,000 | `python tests/fuzz/native_bindings.py --cases 10000` |
| bindings, arrays that end at a page nobody may read | 240,000 | the same, without a sanitizer |

The last passes over loaders, command lines and bindings had no finding. The GPU's bindings have not been fuzzed.

## Long runs

An hour of training by both methods, sampling in every form, refinement and ops of ever other shapes in one process
(`python benchmarks/long_run.py --minutes 60`, two cores, beside other work): 458 MiB of resident memory in the second
quarter and 457 MiB in the last, 8 open files, 1 thread and 5 entries of caches in both.

## Versions of files

Stores, checkpoints, students, hub folders, cached teachers and the table of verified kernels carry the number of
their format. Files without one, of before, are read; files of a later one are refused by a line that says so.
Files of every format that there was are kept (`tests/data/formats`), and every change of ddfast is held to
reading them and to going on from them.
"""
"""What the tables do not say."""


def page() -> str:
    """The text of docs/reliability.md."""
    meetings = [(operation, fault) for operation in OPERATIONS.values() for fault in FAULTS.values()]
    injected = PLACES * sum(operation.meets(fault) for operation, fault in meetings)
    found, operations = [*rows()], OPERATIONS.values()
    titles = " | ".join(operation.title for operation in operations)
    beginning = BEGINNING.format(injected=injected, operations=len(operations), damages=len(damages()))
    lines = [*beginning.splitlines(), *(f"- **{name}**: {meaning}." for name, meaning in MEANING.items())]
    lines += ["", f"| | {titles} |", "|---" * (len(operations) + 1) + "|"]
    lines += [f"| {row.fault} | {' | '.join(row.cells.get(name, '') for name in OPERATIONS)} |" for row in found]
    lines += ["", *DAMAGED.splitlines(), "| file | read when | then |", "|---|---|---|"]
    for file, (name, *_) in FILES.items():
        then = REMADE if file in MADE_AGAIN else REFUSED
        if file.startswith("checkpoint"):
            then = "the run goes on from the checkpoint before; without one it is refused"
        lines.append(f"| {file} | {OPERATIONS[name].title} | {then} |")
    lines += [BESIDES, "## The tests", ""]
    lines += [f"- **{row.fault}**: {', '.join(f'`{test}`' for test in row.tests)}" for row in found]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
