"""Are the kernels right on this GPU? Found out once, in a process of its own: a wrong one breaks nothing of the user's.

The process runs `ddfast.ops.checks`, and tells on its standard output which check it begins and how that ended. One
that dies, or takes too long, takes the kernel that it ran with it; the rest goes to another process.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import torch

from ddfast import env, messages
from ddfast.ops import findings
from ddfast.ops.findings import Check, Verdict

TIMEOUT = 120.0
"""Seconds that one check may take, compiling its kernel and starting CUDA included."""

_lock = threading.Lock()

_undecided: dict[tuple[str, str], Verdict] = {}
"""By machine and check: what could not be found out, as the process could not run here. Only this process remembers."""


def known(check: Check, device: torch.device) -> Verdict | None:
    """What was found about a kernel on this GPU, by this process or an earlier one."""
    found = findings.of(device)["verdicts"].get(check.name)
    if found is not None:
        return Verdict(bool(found[0]), str(found[1]))
    return _undecided.get((findings.machine_key(findings.index_of(device)), check.name))


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
        found = {check.name: [verdict.passed, verdict.text] for check, verdict in verdicts.items() if verdict.final}
        findings.add(device, "verdicts", found)
        for check, verdict in verdicts.items():
            if not verdict.final:
                _undecided[findings.machine_key(index), check.name] = verdict._replace(final=True)
    _warn(verdicts)


def _warn(verdicts: dict[Check, Verdict]) -> None:
    """One line for all that cannot run by itself."""
    wrong = [f"{check.op} ({check.backend}, {verdict.text})" for check, verdict in verdicts.items()
             if verdict.final and not verdict.passed]  # fmt: skip
    if wrong:
        messages.warn(f"not right on this GPU, other backends run instead: {'; '.join(wrong)}; see `ddfast doctor`")
    unknown = {verdict.text for verdict in verdicts.values() if not verdict.final}
    for text in sorted(unknown):
        messages.warn(f"kernels could not be verified, references run instead: {text}; DDFAST_VERIFY=0 runs them")


def run(checks: Sequence[Check], index: int | None, command: Sequence[str] | None = None) -> dict[Check, Verdict]:
    """The verdicts on kernels, each run in a child process; final, but where no child could run.

    Args:
        checks: what is asked.
        index: the GPU's number; None: on the CPU (for tests).
        command: starts the child, which is given a line of JSON; None: `python -m ddfast.ops.checks`.
    """
    if command is None:
        if not sys.executable:
            text = "there is no Python to start a process with"
            return dict.fromkeys(checks, Verdict(False, text, final=False))
        command = [sys.executable, "-m", "ddfast.ops.checks"]
    verdicts: dict[Check, Verdict] = {}
    rest = list(checks)
    while rest:
        found = _child(rest, index, command)
        verdicts.update(found)
        rest = [check for check in rest if check not in found]
    return verdicts


def _child(checks: Sequence[Check], index: int | None, command: Sequence[str]) -> dict[Check, Verdict]:
    """One child's verdicts: on the first of the checks at least."""
    wanted = {"index": index, "checks": [[c.op, c.backend, str(c.dtype), c.dim] for c in checks]}
    found: dict[Check, Verdict] = {}
    running: Check | None = None
    ready = False
    with tempfile.TemporaryFile("w+") as errors:
        try:
            child = subprocess.Popen(
                [*command, json.dumps(wanted)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                text=True, env=env.of_a_verifier(),
            )  # fmt: skip
        except OSError as error:
            return dict.fromkeys(checks, Verdict(False, f"no process could be started ({error})", final=False))
        try:
            for line in _lines(child):
                event = _event(line)
                ready |= "ready" in event
                if "begins" in event:
                    running = checks[event["begins"]]
                elif "ends" in event:
                    wrong, unknown = event.get("wrong", ""), event.get("unknown", "")
                    found[checks[event["ends"]]] = Verdict(
                        not (wrong or unknown), wrong or unknown or "verified on this GPU", final=not unknown
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
        last = next((line.strip() for line in reversed(errors.read().splitlines()) if line.strip()), "")
    if running is not None:
        found[running] = Verdict(False, ending)
    elif not found:  # it never came so far as to run a kernel
        text = f"{ending} before a kernel ran" + (f" ({last})" if last and not ready else "")
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


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
