"""A GPU that is not there, for tests of what is decided about its kernels."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddfast.ops import dispatch, findings, native, verification
from ddfast.ops.findings import Check, Verdict


class Machine:
    """A GPU that is not there: what its kernels would be found to be."""

    def __init__(self) -> None:
        self.wrong: dict[tuple[str, str], Verdict] = {}
        self.runs: list[list[Check]] = []
        self.capturing = False

    def run(self, wanted: list[Check], index: int | None) -> dict[Check, Verdict]:
        self.runs.append(list(wanted))
        right = Verdict(True, "verified on this GPU")
        return {check: self.wrong.get((check.op, check.backend), right) for check in wanted}


def machine_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Machine:
    """All kernels can run on GPU 0, and nothing is known of them."""
    stand_in = Machine()
    monkeypatch.setenv("DDFAST_CACHE", str(folder))
    for name in ("DDFAST_BACKEND", "DDFAST_VERIFY", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "missing", lambda *_: {})
    monkeypatch.setattr(native, "cuda", SimpleNamespace(max_dim=64))
    monkeypatch.setattr(native, "multiplies_matrices", lambda _: True)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(findings, "identity", lambda index: {"gpu": "Test GPU", "index": index})
    monkeypatch.setattr(findings, "_read", {})
    monkeypatch.setattr(verification, "_undecided", {})
    monkeypatch.setattr(verification, "run", stand_in.run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stand_in.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return stand_in
