"""Find offsets of pointers that are computed in 32 bits and can pass 2^31, in Triton's intermediate code.

Each integer has a range, from these assumptions:

- a 32-bit argument, a program's number along the first axis, and a 32-bit number from memory is a size of one dimension
  or a place in it, from 0 to 2^31 - 2^17. So the end of a dimension's last tile fits in 32 bits;
- the programs of the first axis count tiles of one dimension: their number times a constant is a place in it, unless
  the kernel has a 64-bit argument, whose tiles they may count. The other axes have at most 65,535 programs;
- 64-bit numbers from memory are not negative, and 64-bit arithmetic does not overflow;
- a number is cast to 32 bits only where the launcher makes it fit, unless its upper bound is beyond 2^31.

So the sum or product of two dimensions does not fit. A number that can pass 2^31 is reported if it reaches the offset
of a pointer. Masks and shifts to a byte end its trace: bits are counted and hashed with arithmetic that wraps.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

_SIZE = 2**31 - 2**17
_PROGRAMS = 65535

# numbers of pointer tables that count along one dimension; not the numbers of elements, of tensors or of batches
_DIMENSIONS = {"n", "columns", "blocks", "row_blocks", "column_blocks", "per_block", "chunks", "size", "count"}
# Variables whose bound does not follow from ranges, for each kernel.
_SIZES: dict[str, dict[str, int]] = {
    # an index in a block has 16 bits
    "sparse_dots_kernel": {"per_block": 2**15},
    # tiles and words of a row
    "lora_norms_kernel": {"tiles": _SIZE // 64},
    "bitmask_linear_kernel": {"words": _SIZE // 32},
    # the last of all rows
    "bitmask_expand_kernel": {"words": _SIZE // 32, "offs_o": _SIZE},
    # a column of x: the group times m, plus the place in the group
    "nm_matmul_kernel": {"column": _SIZE},
    # a row block of the batch, which was a program of another launch
    "sinkhorn_reduce_kernel": {"sum_ptr": _SIZE},
    # the root of twice the number of programs
    "symmetric_product_kernel": {"row": 46340},
    # from the program's first element: whole rows of its few blocks
    **dict.fromkeys(
        (f"{name}_int8_kernel" for name in ("adamw_step", "average_step", "lion_agreement", "lion_step")),
        {"offs": _SIZE},
    ),
}


@dataclass(frozen=True)
class _Range:
    """Bounds of an integer; the operation that can pass 2^31 on its way; whether it counts programs."""

    low: float
    high: float
    wrapped: str = ""
    tiles: bool = False


_UNKNOWN = _Range(-math.inf, math.inf)
_Rule = Callable[[_Range, _Range], tuple[float, float]]


def _corners(operation: Callable[[float, float], float]) -> _Rule:
    def bounds(a: _Range, b: _Range) -> tuple[float, float]:
        values = [operation(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        return min(values), max(values)

    return bounds


def _product(x: float, y: float) -> float:
    return 0 if x == 0 or y == 0 else x * y


def _remainder(a: _Range, b: _Range) -> tuple[float, float]:
    return (0 if a.low >= 0 else -b.high + 1), min(max(a.high, 0), b.high - 1)


def _masked(a: _Range, b: _Range) -> tuple[float, float]:
    positive = [x.high for x in (a, b) if x.low >= 0]
    return (0, min(positive)) if positive else (-math.inf, math.inf)


def _quotient(a: _Range, b: _Range) -> tuple[float, float]:
    return min(a.low, 0), max(a.high, 0) / max(b.low, 1)


_RULES: dict[str, _Rule] = {
    "addi": lambda a, b: (a.low + b.low, a.high + b.high),
    "subi": lambda a, b: (a.low - b.high, a.high - b.low),
    "muli": _corners(_product),
    "divsi": _quotient,
    "divui": _quotient,
    "remsi": _remainder,
    "remui": _remainder,
    "minsi": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "maxsi": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
    "select": lambda a, b: (min(a.low, b.low), max(a.high, b.high)),
    "andi": _masked,
    "shli": lambda a, b: _corners(_product)(a, _Range(2 ** min(max(b.low, 0), 63), 2 ** min(max(b.high, 0), 63))),
    "shrsi": lambda a, b: _quotient(a, _Range(2 ** min(max(b.low, 0), 63), math.inf)),
    "shrui": lambda a, b: _quotient(a, _Range(2 ** min(max(b.low, 0), 63), math.inf)),
}
_OPERATION = re.compile(r'^(?:(%[\w#]+)(?::\d+)? = )?"?([a-z]+\.[\w.]+)"?(.*)$')
_OPERAND = re.compile(r"%\w+(?:#\d+)?")
_LOOP = re.compile(r"(%\w+) = (%[\w#]+) to (%[\w#]+) step")


def narrow_offsets(ttir: str) -> list[str]:
    """Name each operation whose 32-bit result can pass 2^31 and that reaches a pointer's offset; empty if none does."""
    return sorted(_Trace().run(ttir))


class _Trace:
    """Ranges of the values of one function, in the order of its text."""

    def __init__(self) -> None:
        self.sizes: Mapping[str, int] = {}
        self.ranges: dict[str, _Range] = {}
        self.tiles = True
        self.narrow: set[str] = set()
        # per open region: the names of its results, and the lists of what its branches yield
        self.regions: list[tuple[str, list[list[_Range]]]] = []

    def run(self, ttir: str) -> set[str]:
        for line in ttir.splitlines():
            text = re.sub(r"\s*loc\(.*$", "", line).strip()
            if "tt.func" in text:
                self.sizes = _SIZES.get(re.search(r"@(\w+)", text)[1], {})  # type: ignore[index]
                self.tiles = not re.search(r"%\w+: i64", line)
                arguments = re.findall(r"%(\w+): i32", line)
                self.ranges |= {f"%{name}": _Range(0, self.sizes.get(name, _SIZE)) for name in arguments}
            elif text.startswith("}"):
                self._close(text)
            elif match := _OPERATION.match(text):
                self._operation(*match.groups(), text)
        return self.narrow

    def _close(self, text: str) -> None:
        if text.startswith("} else") or not self.regions:
            return
        name, branches = self.regions.pop()
        for i, values in enumerate(zip(*branches, strict=False)):
            low, high = min(v.low for v in values), max(v.high for v in values)
            wrapped = next((v.wrapped for v in values if v.wrapped), "")
            for spelled in (f"{name}#{i}", name):
                self.ranges[spelled] = _Range(low, high, wrapped)

    def _operation(self, result: str | None, operation: str, rest: str, text: str) -> None:
        operands = [self.ranges.get(name, _UNKNOWN) for name in _OPERAND.findall(rest)]
        if operation == "scf.yield" and self.regions:
            self.regions[-1][1].append(operands)
        elif text.endswith("{"):
            self._open(result, operation, rest)
        elif operation == "tt.addptr" and operands[1].wrapped:
            self.narrow.add(operands[1].wrapped)
        if result and not text.endswith("{"):
            value = self._value(operation, operands, rest)
            bits = re.search(r"(?:x|^|\s)i(\d+)>*$", rest.split(" to ")[-1].split("->")[-1])
            variables = [re.sub(r"_\d+$", "", name[1:]) for name in (result, *_OPERAND.findall(rest)[:1])]
            if operation == "arith.trunci" and _DIMENSIONS.intersection(variables):
                tiles = any("blocks" in name for name in variables)
                value = _Range(0, min(value.high, _SIZE), tiles=tiles)
            elif variables[0] in self.sizes:
                value = _Range(0, self.sizes[variables[0]])
            if bits and int(bits[1]) == 32 and not value.wrapped and value.high > 2**31 - 1 and value is not _UNKNOWN:
                value = replace(value, wrapped=text)
            self.ranges[result] = value

    def _open(self, result: str | None, operation: str, rest: str) -> None:
        """Enter a loop, a branch, or the function that a reduction combines with, whose result has an unknown range."""
        self.regions.append((result or "", []))
        if operation == "scf.for" and (loop := _LOOP.search(rest)):
            first, end = (self.ranges.get(loop[i], _UNKNOWN) for i in (2, 3))
            self.ranges[loop[1]] = _Range(first.low, end.high - 1, first.wrapped or end.wrapped, end.tiles)
            # what a loop carries may grow in every turn
            for name in re.findall(r"(%\w+) = %", rest.partition("iter_args")[2]):
                self.ranges[name] = _UNKNOWN

    def _value(self, operation: str, operands: Sequence[_Range], rest: str) -> _Range:
        kind = operation.split(".")[-1]
        if kind == "constant":
            number = re.search(r"(?:dense<)?(-?\d+|true|false)>? : ", rest)
            value = float({"true": 1, "false": 0}.get(number[1], number[1])) if number else 0.0
            return _Range(value, value)
        if kind == "get_program_id":
            return _Range(0, _SIZE, tiles=self.tiles) if rest.split()[0] == "x" else _Range(0, _PROGRAMS)
        if kind == "make_range":
            return _Range(0, int(re.search(r"end = (\d+)", rest)[1]) - 1)  # type: ignore[index]
        if kind == "load":
            bits = int(match[1]) if (match := re.search(r"ptr<i(\d+)>", rest)) else 64
            return _Range(0, {32: _SIZE, 64: 2**63}.get(bits, 2**bits - 1))
        if kind in _RULES and len(operands) >= 2:
            return self._arithmetic(kind, *operands[-2:], bits=64 if re.search(r"i64>?$", rest) else 32)
        if kind == "trunci":
            return replace(operands[0], low=max(operands[0].low, -(2**31)))
        return operands[0] if operands else _UNKNOWN

    def _arithmetic(self, kind: str, a: _Range, b: _Range, bits: int) -> _Range:
        low, high = _RULES[kind](a, b)
        constant = a.low == a.high or b.low == b.high
        if kind == "muli" and bits == 32 and constant and (a.tiles or b.tiles):
            return _Range(0, _SIZE, a.wrapped or b.wrapped)
        if kind == "andi" and b.low == 2**32 - 1:
            return _Range(0, _SIZE)  # a piece in the map of programs, of a tensor that may have more elements
        wrapped = "" if kind == "andi" or (kind[:3] == "shr" and b.low >= 24) else a.wrapped or b.wrapped
        return _Range(low, high, wrapped, (a.tiles or b.tiles) and kind in ("divsi", "remsi", "subi", "minsi"))
