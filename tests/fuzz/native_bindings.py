"""The bindings of ddfast_native called as nobody should: by themselves, without ddfast.ops in front of them.

    python tests/fuzz/native_bindings.py --cases 10000 --seed 0

Arrays lie at the very end of their memory, so that a read or a write behind them ends the process (and under
AddressSanitizer, tests/fuzz/sanitized.py, one anywhere outside of them). They are exactly as long as the sizes say, and
hold any bits; nothing else is promised. Numbers are any: sizes, strides, dtypes, settings, threads, null and odd
addresses. A binding either refuses by a ValueError of one line, a TypeError or a MemoryError, or comes back with codes
that are in the codebook, every element of its results written or its row reported, and its inputs as they were.

What a binding cannot see, and is not asked here: an array shorter than its sizes say, and results that overlap inputs
in another way than being the same.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ddfast_native as native
import numpy as np

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)
ODD_SIZES = (-1, 0, 0, -(2**63), 2**63 - 1, 2**62, 2**61, -(2**31), 2**63)
FILLING = 0xA5
"""Of results before a call: four or eight such bytes are a number that nothing comes to."""

ODD_NUMBERS = (0.0, -0.0, -1.0, 1e-45, 1e-320, 1e38, 1e300, float("inf"), float("-inf"), float("nan"))
ODD_TYPES = (None, "1", 1.5, [], b"", 2**64, object())


class Finding(AssertionError):
    """What a binding must not do."""


class Memory:
    """Room for arrays that end where a page without access begins; used again from case to case."""

    def __init__(self, slots: int = 12) -> None:
        page, room = mmap.PAGESIZE, 1 << 20
        libc = ctypes.CDLL(None, use_errno=True)
        self.maps = []
        for _ in range(slots):
            area = mmap.mmap(-1, room + page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(area))
            if libc.mprotect(ctypes.c_void_p(address + room), page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
            self.maps.append((area, room))
        self.used = 0

    def array(self, count: int, dtype: Any) -> np.ndarray:
        """The last bytes of the next room; NumPy's own where that is too small."""
        size = count * np.dtype(dtype).itemsize
        area, room = self.maps[self.used % len(self.maps)]
        self.used += 1
        if size > room or SANITIZED:
            return np.empty(count, dtype)
        return np.frombuffer(area, dtype, count, room - size) if count else np.empty(0, dtype)


SANITIZED = "sanitized" in native.version
"""Then every array has memory of its own, around which nothing may be touched."""


class Call:
    """A binding's arguments on their way: numbers by name, arrays by name, in order."""

    def __init__(self, memory: Memory, number: int) -> None:
        self.random = random.Random(number)
        self.numpy = np.random.default_rng(number % 2**32)
        self.memory = memory
        self.values: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray] = {}
        self.results: list[str] = []
        self.changed: list[str] = []
        memory.used = 0

    def size(self) -> int:
        return self.random.choice(SIZES)

    def positive(self) -> int:
        return max(1, self.size())

    def number(self, name: str, value: Any) -> Any:
        self.values[name] = value
        return value

    def _array(self, name: str, count: int, dtype: Any) -> np.ndarray:
        array = self.memory.array(count, dtype)
        self.arrays[name] = array
        self.values[name] = array.ctypes.data if count else self.random.choice([0, array.ctypes.data // 8 * 8])
        return array

    def floats(self, name: str, count: int) -> np.ndarray:
        """float32, mostly ordinary, at times any bits."""
        array = self._array(name, count, np.float32)
        kind = self.random.random()
        if kind < 0.75:
            array[:] = self.numpy.standard_normal(count, np.float32) * self.random.choice([1, 1, 1e-3, 30])
        else:
            array.view(np.uint32)[:] = self.numpy.integers(0, 2**32, count, np.uint32)
        if kind > 0.6 and count:
            special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, 3e38, -3e38], np.float32)
            where = self.numpy.random(count) < self.random.choice([0.02, 0.5])
            array[where] = self.numpy.choice(special, int(where.sum()))
        return array

    def uniform(self, name: str, count: int) -> np.ndarray:
        array = self.floats(name, count)
        if self.random.random() < 0.8:
            array[:] = self.numpy.random(count, np.float32)
        return array

    def integers(self, name: str, count: int, values: Any) -> np.ndarray:
        array = self._array(name, count, np.int64)
        array[:] = self.numpy.choice(np.array(values, np.int64), count)
        return array

    def elements(self, name: str, count: int, dtype: int) -> np.ndarray:
        """Of a kernel's dtype: float32, or 16 bits of any kind."""
        if dtype == 0:
            return self.floats(name, count)
        array = self._array(name, count, np.uint16)
        ordinary = self.numpy.standard_normal(count, np.float32)
        array[:] = ordinary.view(np.uint32) >> 16 if dtype == 1 else ordinary.astype(np.float16).view(np.uint16)
        if self.random.random() < 0.3:
            array[:] = self.numpy.integers(0, 2**16, count, np.uint16)
        return array

    def rows(self, name: str, rows: int, width: int, dtype: int, stride: str) -> None:
        """[rows, width] with a row stride that follows: the width, more, or nothing."""
        apart = self.random.choice([width, width, width + 3, 2 * width, 0])
        self.elements(name, (rows - 1) * apart + width if rows else 0, dtype)
        self.number(stride, apart)

    def result(self, name: str, count: int, dtype: Any) -> None:
        array = self._array(name, count, dtype)
        array.view(np.uint8)[:] = FILLING
        self.results.append(name)

    def threads(self) -> None:
        self.number("threads", self.random.choice([1, 1, 1, 2, 3]))

    def filters(self, rows: int, num_codes: int) -> None:
        choice = self.random.choice
        dtype = choice([0, 0, 1, 2])
        self.rows("logits", rows, num_codes, dtype, "row_stride")
        if choice([True, False]):
            self.rows("uncond", rows, num_codes, dtype, "uncond_row_stride")
            self.floats("cfg_scale", rows)
        else:
            self.values |= {"uncond": 0, "uncond_row_stride": 0, "cfg_scale": 0}
        self.number("dtype", dtype)
        self.number("temperature", choice([1.0, 1.0, 0.5, 3.0, 1e-30, 1e30]))
        self.number("top_k", choice([0, 0, 1, 2, num_codes // 2, num_codes, num_codes + 1, 2**62]))
        self.number("top_p", choice([1.0, 1.0, 0.9, 0.5, 1e-9, 1e-320, 1 - 1e-16]))

    def flow(self, rows: int, num_codes: int, dim: int) -> None:
        choice = self.random.choice
        self.floats("noise", rows * dim)
        self.floats("codebook", num_codes * dim)
        self.floats("geometry", num_codes + 1)
        self.result("codes", rows, np.int64)
        if choice([True, False]):
            self.result("evaluations", rows, np.int32)
        else:
            self.number("evaluations", 0)
        self.values |= {"rows": rows, "V": num_codes, "d": dim, "steps": choice([1, 2, 3, 8, 20])}
        self.values |= {"solver": choice([1, 2, 3, 4]), "sigma_min": choice([0.05, 1e-3, 10.0, 1e-30, 1e30])}
        self.values |= {"early_exit": choice([True, False])}


FILTERS = ("logits", "dtype", "row_stride", "uncond", "uncond_row_stride", "cfg_scale", "temperature", "top_k", "top_p")
FLOW = ("noise", "codebook", "geometry", "codes", "evaluations", "rows", "V", "d", "steps", "solver", "sigma_min",
        "early_exit", "threads")  # fmt: skip


def noise(c: Call) -> tuple[str, ...]:
    count, size = c.number("count", c.size()), c.number("per_sample", c.size())
    c.number("seed", c.random.choice([0, 1, 2**64 - 1, 2**63]))
    c.integers("index", count, [0, -1, 2**63 - 1, -(2**63), 5])
    c.result("out", count * size, np.float32)
    return "seed", "index", "count", "per_sample", "out", "threads"


def nearest_code(c: Call) -> tuple[str, ...]:
    rows, num_codes, dim = c.size(), c.positive(), c.positive()
    c.floats("x", rows * dim)
    c.floats("codebook", num_codes * dim)
    c.result("codes", rows, np.int64)
    c.values |= {"rows": rows, "V": num_codes, "d": dim, "cosine": c.random.choice([True, False])}
    return "x", "codebook", "codes", "rows", "V", "d", "cosine", "threads"


def filter_logits(c: Call) -> tuple[str, ...]:
    rows, num_codes = c.number("rows", c.size()), c.number("V", c.positive())
    c.filters(rows, num_codes)
    c.result("out", rows * num_codes, np.float32)
    return (*FILTERS, "out", "rows", "V", "threads")


def draw_codes(c: Call) -> tuple[str, ...]:
    rows, num_codes = c.number("rows", c.size()), c.number("V", c.positive())
    c.filters(rows, num_codes)
    c.uniform("uniform", rows)
    c.result("codes", rows, np.int64)
    return (*FILTERS, "uniform", "codes", "rows", "V", "threads")


def _posterior(c: Call) -> tuple[int, int]:
    rows, num_codes, dim = c.number("rows", c.size()), c.number("V", c.positive()), c.number("d", c.positive())
    dtype = c.number("dtype", c.random.choice([0, 0, 1, 2]))
    c.floats("x", rows * dim)
    c.uniform("t", rows)
    c.rows("log_probs", rows, num_codes, dtype, "row_stride")
    if c.random.random() < 0.4:  # few codes of any probability: another way through the kernel
        array = c.arrays["log_probs"]
        array[c.numpy.random(len(array)) < 0.8] = {0: -np.inf, 1: 0xFF80, 2: 0xFC00}[dtype]
    c.floats("codebook", num_codes * dim)
    return rows, dim


def codebook_posterior_forward(c: Call) -> tuple[str, ...]:
    rows, dim = _posterior(c)
    c.result("x0", rows * dim, np.float32)
    c.result("lse", rows, np.float32)
    return "x", "t", "log_probs", "dtype", "row_stride", "codebook", "x0", "lse", "rows", "V", "d", "threads"


def codebook_posterior_backward(c: Call) -> tuple[str, ...]:
    rows, dim = _posterior(c)
    for name, count in (("grad", rows * dim), ("x0", rows * dim), ("lse", rows)):
        c.floats(name, count)
    c.result("dx", rows * dim, np.float32)
    return ("grad", "x", "t", "log_probs", "dtype", "row_stride", "codebook", "x0", "lse", "dx", "rows", "V", "d",
            "threads")  # fmt: skip


def flow_sample(c: Call) -> tuple[str, ...]:
    rows, num_codes, dim = c.size(), c.positive(), c.positive()
    dtype = c.number("dtype", c.random.choice([0, 0, 1, 2]))
    c.rows("log_probs", rows, num_codes, dtype, "row_stride")
    c.flow(rows, num_codes, dim)
    return ("log_probs", "dtype", "row_stride", *FLOW)


def sample_codes(c: Call) -> tuple[str, ...]:
    rows, num_codes, dim = c.size(), c.positive(), c.positive()
    c.filters(rows, num_codes)
    c.flow(rows, num_codes, dim)
    return (*FILTERS, *FLOW)


def decode_attention(c: Call) -> tuple[str, ...]:
    choice = c.random.choice
    rows, kv_heads, group = choice([0, 1, 2, 3]), choice([1, 2]), choice([1, 2])
    length, dim = c.positive(), c.positive()
    dtype = c.number("dtype", choice([0, 1, 2]))
    c.rows("qkv", rows, (group + 2) * kv_heads * dim, dtype, "qkv_stride")
    cached = rows * kv_heads * length * dim
    c.elements("keys", cached, dtype)
    c.elements("values", cached, dtype)
    c.integers("position", 1, [c.random.randrange(length)])
    c.values |= {"rope": 0, "first": 0, "scale": choice([1.0, 0.0, -1.0, 1e30])}
    if dim % 2 == 0 and choice([True, False]):
        c.floats("rope", length * dim)
    if choice([True, False]):
        c.integers("first", rows, [0, 1, length, -1, 2**63 - 1, -(2**63)])
    c.result("out", rows * group * kv_heads * dim, np.float32 if dtype == 0 else np.uint16)
    c.results += ["keys", "values"]
    c.values |= {"rows": rows, "heads": group * kv_heads, "kv_heads": kv_heads, "length": length, "head_dim": dim}
    return ("qkv", "dtype", "qkv_stride", "keys", "values", "position", "rope", "first", "out", "rows", "heads",
            "kv_heads", "length", "head_dim", "scale", "threads")  # fmt: skip


def activate(c: Call) -> tuple[str, ...]:
    rows, width = c.number("rows", c.size()), c.number("width", c.random.choice([*SIZES, 300, 1030]))
    dtype = c.number("dtype", c.random.choice([0, 1, 2]))
    c.rows("x", rows, width, dtype, "x_stride")
    c.values |= {"times": 0, "times_stride": 0, "gelu": c.random.choice([True, False])}
    if c.random.choice([True, False]):
        c.rows("times", rows, width, dtype, "times_stride")
    c.result("out", rows * width, np.float32 if dtype == 0 else np.uint16)
    return "x", "x_stride", "times", "times_stride", "out", "dtype", "rows", "width", "gelu", "threads"


BINDINGS: dict[str, Callable[[Call], tuple[str, ...]]] = {
    "noise": noise,
    "nearest_code": nearest_code,
    "filter_logits": filter_logits,
    "draw_codes": draw_codes,
    "codebook_posterior_forward": codebook_posterior_forward,
    "codebook_posterior_backward": codebook_posterior_backward,
    "flow_sample": flow_sample,
    "sample_codes": sample_codes,
    "decode_attention": decode_attention,
    "activate": activate,
}
SIZED = ("count", "per_sample", "rows", "V", "d", "width", "heads", "kv_heads", "length", "head_dim")
STRIDES = ("row_stride", "uncond_row_stride", "qkv_stride", "x_stride", "times_stride")


def change(c: Call, name: str) -> None:
    """Another number for one argument; an array stays as long as the numbers say, or is not looked at."""
    value = c.values[name]
    if name in c.arrays:
        if not len(c.arrays[name]):
            return
        value = c.random.choice([0, value + 1, "x", None, 1.5, -1, 2**64])
    elif name in SIZED:
        # What must be refused, or asks for nothing: other sizes are those of memory that is not there.
        value = c.random.choice([*ODD_SIZES, *((2**31, 2**33) if name == "V" else ()), *ODD_TYPES])
    elif name in STRIDES:
        value = c.random.choice([-1, -(2**63), 2**63, None, "1", 1.5])
    elif name == "dtype":
        value = c.random.choice([-1, 3, 2**31, 2**31 - 1, None, "float32", 0.5])
    elif name == "threads":
        value = c.random.choice([0, -1, 4097, 2**31 - 1, 2**31, -(2**31), None, "1", 1.5])
    elif name == "seed":
        value = c.random.choice([-1, 2**64, None, "0", 1.5])
    elif name in ("steps", "top_k"):
        value = c.random.choice([0, -1, 2**63, -(2**63), 2**62, None, "1", 1.5])
    elif name == "solver":
        value = c.random.choice([0, 5, -1, 2**31, "dpm3m", None])
    elif name in ("cosine", "gelu", "early_exit"):
        value = c.random.choice([None, 0, 1, "x", [], 2.5])
    elif name in ("temperature", "top_p", "sigma_min", "scale"):
        value = c.random.choice([*ODD_NUMBERS, None, "1", 10**400])
    c.values[name] = value
    c.changed.append(name)


def alias(c: Call) -> None:
    """A result that is one of the inputs of its size."""
    name = c.random.choice(c.results)
    same = [other for other, array in c.arrays.items()
            if other not in c.results and array.nbytes == c.arrays[name].nbytes and array.nbytes
            and array.itemsize == c.arrays[name].itemsize]  # fmt: skip
    if same and c.values[name]:
        other = c.random.choice(same)
        c.values[name] = c.values[other]
        c.results.append(other)
        c.changed.append(f"{name} is {other}")


def run(binding: str, number: int, memory: Memory) -> str:
    """What a case came to: "refused", "reported" (a bad row) or "done".

    Raises:
        Finding: none of these.
    """
    c = Call(memory, number)
    c.threads()
    names = BINDINGS[binding](c)
    if c.random.random() < 0.4:
        for name in c.random.sample(names, c.random.choice([1, 1, 2])):
            change(c, name)
    elif c.random.random() < 0.1:
        alias(c)
    before = {name: array.tobytes() for name, array in c.arrays.items() if name not in c.results}
    told = f"{binding} {number}, changed {c.changed}: {c.values}"
    try:
        status = getattr(native, binding)(*(c.values[name] for name in names))
    except TypeError:
        if not c.changed:
            raise
        return "refused"
    except (ValueError, MemoryError) as error:
        if not c.changed or not (isinstance(error, MemoryError) or re.fullmatch(r"\w+: got .+", str(error))):
            raise Finding(f"{type(error).__name__}: {error} -- {told}") from error
        return "refused"
    for name, content in before.items():
        if c.arrays[name].tobytes() != content and not any(change.endswith(f" is {name}") for change in c.changed):
            raise Finding(f"{name} was written to -- {told}")
    if c.changed:
        return "done"
    bad = status is not None and status >= 0
    if bad and status >= c.values["rows"]:
        raise Finding(f"reported row {status} of {c.values['rows']} -- {told}")
    for name in () if bad else c.results:
        array = c.arrays[name]
        filling = int.from_bytes(bytes([FILLING]) * array.itemsize, "little")
        unwritten = array.view(f"u{array.itemsize}") == filling
        if array.itemsize > 2 and name not in ("keys", "values") and bool(unwritten.any()):
            raise Finding(f"{name} was not written to everywhere -- {told}")
    if "codes" in c.results and not bad:
        codes = c.arrays["codes"]
        if len(codes) and not (codes.min() >= 0 and codes.max() < c.values["V"]):
            raise Finding(f"codes from {codes.min()} to {codes.max()} -- {told}")
    return "reported" if bad else "done"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of every binding and instruction set")
    parser.add_argument("--seed", type=int, default=0, help="the first case's number")
    parser.add_argument("--binding", choices=sorted(BINDINGS), action="append")
    parser.add_argument("--trace", action="store_true", help="print every case before it runs: the last one ended it")
    options = parser.parse_args()
    memory, found = Memory(), 0
    for isa in native.isa_available():
        native.set_isa(isa)
        for binding in options.binding or BINDINGS:
            start, outcomes = time.monotonic(), Counter[str]()
            for number in range(options.seed, options.seed + options.cases):
                if options.trace:
                    print(binding, number, flush=True)
                try:
                    outcomes[run(binding, number, memory)] += 1
                except Finding as finding:
                    outcomes["findings"] += 1
                    print(finding, flush=True)
                    if outcomes["findings"] >= 5:
                        break
            found += outcomes["findings"]
            print(f"{isa} {binding}: {dict(outcomes)}, {time.monotonic() - start:.1f} s", flush=True)
    return min(found, 1)


if __name__ == "__main__":
    sys.exit(main())
