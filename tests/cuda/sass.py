"""Counts the instructions of the loops in kernels' machine code, as cuobjdump disassembles a cubin or a module.

python tests/cuda/sass.py FILE --kernel 'nearest_kernel<8>' --opcodes    # of FILE, by default the built ddfast_cuda
python tests/cuda/sass.py --triton nearest_code                          # of Triton kernels, compiled for sm_90
python tests/cuda/sass.py --record [FILE...]                             # into instructions.json

A pass is the shortest way once round a loop that goes by its work, products and exponentials: what a warp issues per
turn while nothing rare happens. It goes by the block with most work, and skips no guarded code that is full of it (a
chunk of codes, say, that a row may not fill). Inner loops are no work of the outer one; one that cannot be skipped
turns once. The whole is every instruction of the loop, inner loops and what is rare included. Padding counts nowhere,
nor do the copies of a collective for warps that have diverged (`BRA.DIV`): ours have not.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ARCHITECTURE = "sm_90a"
TABLE = Path(__file__).with_name("instructions.json")
MARKER = re.compile(r"HMMA|HGMMA|MUFU\.EX2")
"""What kernels are written for: products of the tensor cores, exponentials. By them the hot loop is known."""
WORK = {"HMMA": 32, "HGMMA": 32, "MUFU.EX2": 8, "FFMA": 1}
"""And products without tensor cores; each as so many of these, roughly as long as it keeps its unit."""
LEAST_WORK = 0.4
"""Per instruction of guarded code that a pass does not skip: chunks of codes have 0.5, a new maximum's case 0.3."""
PADDING = ("NOP",)
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?\w+)\s+)?([\w.]+)([^;]*);", re.MULTILINE)
FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)


class Instruction(NamedTuple):
    at: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch, but of the one that a diverged warp takes."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands)
        leads = self.opcode.split(".")[0] in ("BRA", "JMP") and self.opcode != "BRA.DIV"
        return int(found[1], 16) if found and leads else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. A condition stands in front, or is an operand: `BRA P0, ..`."""
        leaves = self.opcode.split(".")[0] in ("BRA", "JMP", "BRX", "EXIT", "RET", "KILL")
        return not leaves or self.predicate is not None or "," in self.operands


class Loop(NamedTuple):
    head: int
    """Address of its first instruction."""
    depth: int
    turn: list[Instruction]
    """Those of a pass."""
    whole: list[Instruction]
    markers: int
    """In its own instructions, those of inner loops apart."""


def cuobjdump() -> str | None:
    """CUDA's own, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(beside)) if beside else None)


def kernels(file: str | Path, architecture: str = ARCHITECTURE) -> dict[str, list[Instruction]]:
    """The instructions of every kernel that the file has for an architecture, by readable name."""
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump: neither CUDA's nor Triton's is there")
    done = subprocess.run([tool, "-sass", "-arch", architecture, file], capture_output=True, text=True, check=True)
    return parsed(done.stdout)


def parsed(text: str) -> dict[str, list[Instruction]]:
    _, *parts = FUNCTION.split(text)
    return {
        readable(name): [
            Instruction(int(at, 16), predicate or None, opcode, operands.strip())
            for at, predicate, opcode, operands in INSTRUCTION.findall(code)
        ]
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def readable(mangled: str) -> str:
    """`name<1, true>` of a mangled kernel's name, as far as names of ours need it."""
    found = re.match(r"_ZN6ddfast\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}(\d+)(\w+)$", mangled)
    if not found:
        return mangled
    name, rest = found[2][: int(found[1])], found[2][int(found[1]) :]
    values = re.findall(r"L([a-z])(n?\d+)E", rest[: rest.index("EE") + 1]) if rest.startswith("IL") else []
    texts = [{"b0": "false", "b1": "true"}.get(kind + value, value.replace("n", "-")) for kind, value in values]
    return f"{name}<{', '.join(texts)}>" if texts else name


def loops(code: list[Instruction]) -> list[Loop]:
    """The loops of a kernel, by address: what leads back to a block that is under way (the graphs are reducible)."""
    blocks, after = _blocks(code)
    bodies: dict[int, set[int]] = {}
    before: dict[int, list[int]] = {at: [] for at in blocks}
    for at, next_ones in after.items():
        for one in next_ones:
            before[one].append(at)
    for latch, head in _back_edges(next(iter(blocks)), after):
        body, waiting = bodies.setdefault(head, {head}), [latch]
        while waiting:
            if (at := waiting.pop()) not in body:
                body.add(at)
                waiting += before[at]
    found = []
    for head, body in sorted(bodies.items()):
        inner = set().union(*(other for at, other in bodies.items() if at != head and at in body))
        own = {at: _counted(blocks[at]) for at in body - inner}
        markers = sum(bool(MARKER.match(one.opcode)) for code in own.values() for one in code)
        by = max(own, key=lambda at: (_work(own[at]), len(own[at]), -at))
        edges = _unskipped({at: [one for one in after[at] if one in body] for at in body}, head, own)
        way = _shortest(head, by, blocks, edges) + (_shortest(by, head, blocks, edges) if by != head else [])
        depth = sum(head in other for at, other in bodies.items() if at != head)
        whole = [one for at in sorted(body) for one in _counted(blocks[at])]
        turn = [one for at in way for one in _counted(blocks[at])]
        found.append(Loop(head, depth, turn, whole, markers))
    return found


def hot_loop(code: list[Instruction]) -> Loop | None:
    """The loop with the most markers in its own instructions; if none has any, the longest of the innermost."""
    every = loops(code)
    innermost = [
        one for one in every if not any(other is not one and set(other.whole) < set(one.whole) for other in every)
    ]
    return max(every, key=lambda one: (one.markers, one in innermost, len(one.turn)), default=None)


def _counted(code: Iterable[Instruction]) -> list[Instruction]:
    return [one for one in code if one.opcode not in PADDING]


def _work(code: Iterable[Instruction]) -> int:
    return sum(next((cost for name, cost in WORK.items() if one.opcode.startswith(name)), 0) for one in code)


def _blocks(code: list[Instruction]) -> tuple[dict[int, list[Instruction]], dict[int, list[int]]]:
    """Straight pieces of code by address, those that are reached, and which ones may follow each."""
    targets = {one.target for one in code}
    starts = targets | {b.at for a, b in itertools.pairwise(code) if a.target or not a.falls_through}
    blocks: dict[int, list[Instruction]] = {}
    for one in code:
        if not blocks or one.at in starts:
            blocks[one.at] = mine = []
        mine.append(one)
    order = list(blocks)
    after = {}
    for at, beyond in zip(order, [*order[1:], None], strict=True):
        last = blocks[at][-1]
        ways = [last.target, beyond if last.falls_through else None]
        after[at] = [way for way in ways if way is not None and way in blocks]
    reached = _reached(order[0], after)
    return {at: blocks[at] for at in order if at in reached}, {at: after[at] for at in order if at in reached}


def _reached(begin: int, edges: dict[int, list[int]], end: int | None = None) -> set[int]:
    """The blocks on the ways from `begin`, before they come to `end`."""
    reached: set[int] = set()
    waiting = [begin]
    while waiting:
        if (at := waiting.pop()) not in reached and at != end:
            reached.add(at)
            waiting += edges[at]
    return reached


def _unskipped(edges: dict[int, list[int]], head: int, own: dict[int, list[Instruction]]) -> dict[int, list[int]]:
    """Without the edges that skip work of the loop's own: from a fork to where its other branch leads in any case."""
    certain = {at: set(edges) for at in edges}  # what every way from a block goes by before the loop's next turn
    before: dict[int, set[int]] = {at: set() for at in edges}
    for at, next_ones in edges.items():
        for one in next_ones:
            before[one].add(at)
    waiting = set(edges)
    while waiting:
        at = waiting.pop()
        now = {at} | set.intersection(*({head} if one == head else certain[one] | {head} for one in edges[at]))
        if now != certain[at]:
            certain[at] = now
            waiting |= before[at]

    def skips(to: int, other: int) -> bool:
        if to == other or other == head or to not in certain[other]:
            return False
        skipped = [one for at in _reached(other, edges, to) for one in own.get(at, ())]
        return _work(skipped) > LEAST_WORK * len(skipped)

    return {
        at: [to for to in next_ones if not any(skips(to, other) for other in next_ones)]
        for at, next_ones in edges.items()
    }


def _back_edges(entry: int, after: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
    under_way, seen = [(entry, iter(after[entry]))], {entry}
    active = {entry}
    while under_way:
        at, rest = under_way[-1]
        for one in rest:
            if one in active:
                yield at, one
            elif one not in seen:
                seen.add(one)
                active.add(one)
                under_way.append((one, iter(after[one])))
                break
        else:
            active.discard(at)
            under_way.pop()


def _shortest(begin: int, end: int, blocks: dict[int, list[Instruction]], edges: dict[int, list[int]]) -> list[int]:
    """The way with the fewest instructions, of one step or more: the blocks behind `begin`, up to `end`."""
    queue: list[tuple[int, list[int]]] = [(0, [begin])]
    done = set()
    while queue:
        length, way = heapq.heappop(queue)
        if way[-1] == end and len(way) > 1:
            return way[1:]
        if way[-1] not in done:
            if len(way) > 1:
                done.add(way[-1])
            for one in edges[way[-1]]:
                heapq.heappush(queue, (length + len(_counted(blocks[one])), [*way, one]))
    raise AssertionError("a loop leads back to its head")


def compiler(file: str | Path) -> str:
    """The version of nvcc, as it is left in what it makes."""
    found = re.search(rb"Cuda compilation tools, release [\d.]+, (V[\d.]+)", Path(file).read_bytes())
    return found[1].decode() if found else "unknown"


def triton_kernels(pattern: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Of the ahead-of-time cases of tests/kernels/compile_kernels.py whose name has the pattern."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
    import compile_kernels

    for case in compile_kernels.cases(90):
        if re.search(pattern, case.name):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compile_kernels.compiled(case, int(ARCHITECTURE[3:-1])).asm["cubin"])
                file.flush()
                sizes = ", ".join(f"{name}={value}" for name, value in case.constants.items())
                for code in kernels(file.name).values():
                    yield f"{case.name} ({sizes}, {case.num_warps} warps)", code


def described(loop: Loop, *, opcodes: bool) -> str:
    text = f"at {loop.head:#07x} {'  ' * loop.depth}pass {len(loop.turn)}, whole {len(loop.whole)}"
    text += f", {loop.markers} markers" * bool(loop.markers)
    if opcodes:
        counted = Counter(one.opcode for one in loop.turn).most_common()
        text += ": " + ", ".join(f"{count} {opcode}" for opcode, count in counted)
    return text


def passes(code_of: dict[str, list[Instruction]]) -> dict[str, int]:
    """The instructions of a pass of every kernel's hot loop."""
    hot = {name: hot_loop(code) for name, code in code_of.items()}
    return {name: len(loop.turn) for name, loop in hot.items() if loop}


def record(files: list[str]) -> None:
    """Into the table: what is new of these kernels; those of another compiler give way."""
    versions = {compiler(file) for file in files}
    if len(versions) != 1:
        raise ValueError(f"files of several compilers: {sorted(versions)}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    made = {"compiler": versions.pop(), "architecture": ARCHITECTURE}
    old = table.get("passes", {}) if {**table, **made} == table else {}
    new = {name: count for file in files for name, count in passes(kernels(file)).items()}
    table = {**made, "passes": dict(sorted({**old, **new}.items()))}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


def _built() -> str:
    from ddfast.ops import native

    if not hasattr(native.cuda, "__file__"):
        raise FileNotFoundError(f"ddfast_cuda: {native.cuda_reason}")
    return str(native.cuda.__file__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="cubins or modules; by default the built ddfast_cuda")
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels whose name has this")
    parser.add_argument("--opcodes", action="store_true", help="what a pass is made of")
    parser.add_argument("--triton", metavar="REGEX", help="Triton kernels instead, of tests/kernels/compile_kernels.py")
    parser.add_argument("--record", action="store_true", help=f"write {TABLE.name}, which test_instructions.py reads")
    given = parser.parse_args()
    if given.record:
        record(given.files or [_built()])
        sys.exit()
    if given.triton is None:
        every = itertools.chain.from_iterable(kernels(file).items() for file in given.files or [_built()])
    else:
        every = triton_kernels(given.triton)
    for name, code in every:
        if re.search(given.kernel, name):
            hot = hot_loop(code)
            print(f"{name}: {len(_counted(code))} instructions")
            for loop in loops(code):
                mark = "*" if hot and loop.head == hot.head else " "
                print(f"  {mark} {described(loop, opcodes=given.opcodes)}")
