"""What `ddfast.ops.measured` says, from a GPU's recorded run: python benchmarks/choices.py RESULTS.json

Rewrites ddfast/ops/measured.py: per op and number of rows, the fastest provider that is a backend of ours, or
"reference" where eager PyTorch won.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[1] / "ddfast" / "ops" / "measured.py"
BACKENDS = {"triton": "triton", "cuda": "cuda", "eager": "reference"}


def fastest(run: dict[str, Any]) -> dict[str, dict[int, str]]:
    """Op -> rows -> backend, of a run of benchmarks/test_gpu_kernels.py."""
    found: dict[str, dict[int, str]] = {}
    for benchmark in run["benchmarks"]:
        facts = benchmark["extra_info"]
        if "op" not in facts:  # of a whole update
            continue
        times = {name: row["median_ms"] for name, row in facts["providers"].items() if name in BACKENDS}
        winner = min(times, key=lambda name: times[name])
        found.setdefault(facts["op"], {})[facts["rows"]] = BACKENDS[winner]
    return {op: dict(sorted(rows.items())) for op, rows in sorted(found.items())}


def main() -> None:
    """Write the table, leaving the module's docstring."""
    table = fastest(json.loads(Path(sys.argv[1]).read_text()))
    lines = [
        f'    "{op}": {{{", ".join(f"{rows}: {name!r}" for rows, name in found.items())}}},'
        for op, found in table.items()
    ]
    docstring = ast.get_docstring(ast.parse(PLACE.read_text()))
    body = "\n".join(["FASTEST: dict[str, dict[int, str]] = {", *lines, "}"]).replace("'", '"')
    PLACE.write_text(f'"""{docstring}"""\n\n{body}\n')
    print(body)


if __name__ == "__main__":
    main()
