"""Recorded runs as Markdown: python benchmarks/table.py benchmarks/results/FILE.json ..."""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Print every run's table."""
    for name in sys.argv[1:]:
        show(json.loads(Path(name).read_text()))
        print()


def show(run: dict[str, Any]) -> None:
    """Print a row per benchmark: every provider's median, and how many times ddfast is faster."""
    machine, commit = run["machine_info"], run["commit_info"]["id"][:10]
    processor = machine["cpu"].get("brand_raw", machine["processor"])
    threads = machine["threads"]
    print(f"{processor}, {threads} threads, torch {machine['torch']}, {machine['cpu_kernels']}, commit {commit};")
    print(f"`{machine['command']}`; medians in one run.\n")
    print("| benchmark | ddfast, ms | against: median, ms (ddfast is faster by) |")
    print("|---|---|---|")
    for benchmark in run["benchmarks"]:
        providers = dict(benchmark["extra_info"]["providers"])
        ours = providers.pop(benchmark["extra_info"].get("ddfast", "ddfast"))  # on a GPU the name of our fastest
        others = sorted(providers.items(), key=lambda item: item[1]["median_ms"])
        cells = [f"{name}: {row['median_ms']:.2f} ({row['ddfast_is_faster_by']:.1f}x)" for name, row in others]
        print(f"| {benchmark['name'].removeprefix('test_')} | {ours['median_ms']:.3f} | {', '.join(cells)} |")


if __name__ == "__main__":
    main()
