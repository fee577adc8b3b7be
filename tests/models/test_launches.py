"""How much a step of decoding launches: at one image, launching takes longer than computing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

AT_MOST = {
    "LlamaGen-L, multinomial, guided": 130,
    "LlamaGen-L, multinomial, unguided": 129,
    "LlamaGen-L, flow, guided": 134,
    "LlamaGen-L, flow, unguided": 133,
    "VAR-d16, multinomial, guided": 159,
    "VAR-d16, multinomial, unguided": 158,
    "VAR-d16, flow, guided": 163,
    "VAR-d16, flow, unguided": 162,
}
"""Of LlamaGen-L for a token, of VAR-d16 for its last scale; one image. Fewer are welcome: write them here."""


def test_a_step_launches_no_more_than_it_did():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = Path(__file__).with_name("launches.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["case"] for line in lines} == AT_MOST.keys()
    more = [line for line in lines if line["launches"] > AT_MOST[line["case"]]]
    assert more == []
