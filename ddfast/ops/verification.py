"""Are the kernels right on this GPU? Found out once, in a process of its own: a wrong one breaks nothing of the user's.

The process runs `ddfast.ops.checks`, and tells on its standard output which check it begins and how that ended. One
that dies, or takes too long, takes the kernel that it ran with it; the rest goes to another process. What may have
another reason than the kernel (no memory, a full disk, a killed process, a loaded machine) no file remembers.
"""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ddfast import env, messages
from ddfast.ops import findings
from ddfast.ops.findings import Check, Verdict

TIMEOUT = 120.0
"""Seconds that one check may take, compiling its kernel and starting CUDA included."""

_lock = threading.Lock()

AGAIN = 300.0
"""Seconds after which is asked again what could not be found out; twice as many after every time in vain."""

_COMMAND = (
    "import sys; '' in sys.path[:1] and sys.path.pop(0); "
    "from ddfast.ops import checks; sys.exit(checks.main(sys.argv[1]))"
)
"""Of the child: -c and -m put the working directory first, where a queue.py or torch/ of the user's may be."""

_CRASHES = {getattr(signal, f"SIG{name}", None) for name in ("SEGV", "ABRT", "BUS", "ILL", "FPE")}
"""Signals that a kernel's code leads to; others are sent, by whoever ends the process or by the kernel of Linux."""


class _Undecided(NamedTuple):
    """A verdict that only this process remembers: for good if it is final, else for `wait` seconds from `since` on."""

    verdict: Verdict
    since: float
    wait: float

    @property
    def holds(self) -> bool:
        return self.verdict.final or time.monotonic() < self.since + self.wait


_undecided: dict[tuple[int, str], _Undecided] = {}
"""By GPU and check: another GPU of the same model may have the memory that this one has not."""

_told: set[tuple[int, str]] = set()
"""GPUs and checks whose failing was told of by this process."""


def known(check: Check, device: torch.device) -> Verdict | None:
    """What was found about a kernel on this GPU, by this process or an earlier one."""
    found = findings.of(device)["verdicts"].get(check.name)
    key = findings.index_of(device), check.name
    if found is not None:
        verdict = Verdict(bool(found[0]), str(found[1]))
        if not verdict.passed and key not in _told:
            _told.add(key)
            _warn({check: verdict})
        return verdict
    undecided = _undecided.get(key)
    return undecided.verdict if undecided is not None and undecided.holds else None


def verify(checks: Sequence[Check], device: torch.device) -> None:
    """Find out about the checks of which nothing is known; then `known` answers for all of them."""
    with _lock, findings.locked():
        findings.of(device, again=True)  # another process may have been here while this one waited
        missing = [check for check in dict.fromkeys(checks) if known(check, device) is None]
        if not missing:
            return
        index = findings.index_of(device)
        name = findings.identity(index)["gpu"]
        messages.note(f"verifying {len(missing)} kernels on this {name}, once (DDFAST_VERIFY=0 goes without)")
        verdicts = run(missing, index)
        kept = {check: verdict for check, verdict in verdicts.items() if verdict.final and verdict.kept}
        findings.add(device, "verdicts", {check.name: [passed, text] for check, (passed, text, *_) in kept.items()})
        for check in verdicts.keys() - kept.keys():
            before = _undecided.get((index, check.name))
            wait = AGAIN if before is None else 2 * before.wait
            _undecided[index, check.name] = _Undecided(verdicts[check], time.monotonic(), wait)
        _told.update((index, check.name) for check in kept)
    _warn(verdicts)


def _warn(verdicts: dict[Check, Verdict]) -> None:
    """One line for all that cannot run by itself."""
    wrong = [f"{check.op} ({check.backend}, {verdict.text})" for check, verdict in verdicts.items()
             if verdict.final and not verdict.passed]  # fmt: skip
    if wrong:
        messages.warn(f"not right on this GPU, other backends run instead: {'; '.join(wrong)}; see `ddfast doctor`")
    unknown = {verdict.text for verdict in verdicts.values() if not verdict.final}
    for text in sorted(unknown):
        messages.warn_once(f"kernels could not be verified, references run instead: {text}; DDFAST_VERIFY=0 runs them")


def run(checks: Sequence[Check], index: int | None, command: Sequence[str] | None = None) -> dict[Check, Verdict]:
    """The verdicts on kernels, each run in a child process; final, but where something else than the kernel ended it.

    Args:
        checks: what is asked.
        index: the GPU's number; None: on the CPU (for tests).
        command: starts the child, which is given a line of JSON; None: `ddfast.ops.checks.main`.
    """
    if command is None:
        if not sys.executable:
            text = "there is no Python to start a process with"
            return dict.fromkeys(checks, Verdict(False, text, final=False))
        command = [sys.executable, "-c", _COMMAND]
    verdicts: dict[Check, Verdict] = {}
    rest = list(checks)
    while rest:
        try:
            found = _child(rest, index, command)
        except OSError as error:
            text = f"no process could be started ({error})"
            found = dict.fromkeys(rest, Verdict(False, text, final=False))
        verdicts.update(found)
        rest = [check for check in rest if check not in found]
    return verdicts


def _child(checks: Sequence[Check], index: int | None, command: Sequence[str]) -> dict[Check, Verdict]:
    """One child's verdicts: on the first of the checks at least."""
    wanted = {"index": index, "checks": [[c.op, c.backend, str(c.dtype), c.dim] for c in checks]}
    found: dict[Check, Verdict] = {}
    running: Check | None = None
    ready, code = False, None
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [*command, json.dumps(wanted)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            text=True, errors="replace", env=env.of_a_verifier(),
        )  # fmt: skip
        try:
            for line in _lines(child):
                event = _event(line)
                ready |= "ready" in event
                if "begins" in event:
                    running = checks[event["begins"]]
                elif "ends" in event:
                    wrong, unknown = event.get("wrong", ""), event.get("unknown", "")
                    right = "; ".join(["verified on this GPU", *event.get("remarks", ())])
                    found[checks[event["ends"]]] = Verdict(
                        not (wrong or unknown), wrong or unknown or right, final=not unknown
                    )
                    running = None
            code = child.wait(timeout=TIMEOUT)
            ending = f"its process ended with {_ending(code)}"
        except (queue.Empty, subprocess.TimeoutExpired):
            ending = f"it took longer than {TIMEOUT:.0f} s"
        finally:
            child.kill()
            child.wait()
        errors.seek(0)
        last = _last(errors.read())
    if running is not None:
        crashed = code is not None and -code in _CRASHES
        found[running] = Verdict(False, ending, final=crashed or code is None, kept=crashed)
    elif not found:  # it never came so far as to run a kernel
        text = f"{ending} before a kernel ran" + (f" ({last})" if last and not ready else "")
        if "busy or unavailable" in text:
            text += ": in exclusive compute mode a GPU takes one process, and this one or another has it"
        found = dict.fromkeys(checks, Verdict(False, text, final=False))
    return found


def _lines(child: subprocess.Popen[str]) -> Any:
    """Lines of the child's output as they come; queue.Empty where the next one takes too long."""
    lines: queue.Queue[str | None] = queue.Queue()
    output = child.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while (line := lines.get(timeout=TIMEOUT)) is not None:
        yield line
    reader.join()
    output.close()


def _event(line: str) -> dict[str, Any]:
    """What a line tells; nothing where something else has printed it."""
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _last(errors: str) -> str:
    """The last line that names an exception, which PyTorch lets hints follow; the last one where none does."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines or [""])[-1]


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
