"""Verify that compiled kernels have no races, by SentryWard on their PTX: over all schedules of a recorded launch.

A launch's integers and grid are those that the audit recorded, the grid cut to a few programs per axis. So is what
integer tensors hold that the kernel only reads: tables of pointers and sizes decide addresses and branches. Other
tensors hold any numbers. Tensors of the arguments lie apart, and so do the tables and what they point to.

What the tool does not take is changed in the PTX, where that hides no race:

- A kernel that reads pointers from a table gets one more parameter, `memory`, an object that begins at address 0, which
  is added to each pointer after its load. So the tensors behind a table lie in one object, at the addresses that they
  had at the launch, and the tool compares their accesses with one another.
- Accesses to a tensor leave the PTX if all of them are atomics, or if all store the same constant.
- A branch that depends on data, and jumps over accesses alone, is not taken.
- Threads that hold the same element may store it to the same word of shared memory. Only the first and then only the
  last of them stores it: each of their conflicts with others is one with these two. That they store equal numbers is
  not verified, and the verdict `conditional` says so.
"""

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

VERSION = "0.1.1"
TARGETS = ("sm_80", "sm_90", "sm_100")
PROVED, CONDITIONAL, RACE, NOT_COVERED = VERDICTS = ("proved", "conditional", "race", "not covered")
# the reason of a conditional verdict
SAME_NUMBER = "if threads that store one element twice store the same number"
# programs along an axis of the grid
_MOST_PROGRAMS = 3
_MOST_RUNS, _MOST_TIME = 24, 5
_RACES = ("potential_race", "not_wellsynced", "invalid_lifecycle")


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a rung says of one kernel configuration: a verdict, and its reason in words."""

    kernel: str
    label: str
    target: str
    verdict: str
    reason: str = ""
    rung: str = "races"


def missing() -> str:
    """Why no kernel can be verified here, in one line; empty if SentryWard is installed in the version in use."""
    return other_version("sentryward", VERSION)


def other_version(tool: str, expected: str) -> str:
    """What to install, in one line, where a tool is absent or has another version than the expected one; or empty."""
    try:
        installed = version(tool)
    except PackageNotFoundError:
        installed = "none"
    return f"expected {tool} {expected}, found {installed}; pip install {tool}=={expected}" * (installed != expected)


def prove(case: Any, target: str, ptx: str, seconds: float = 120.0) -> Proof:
    """Verify one configuration, an `AuditCase`, from its PTX.

    Each run of the tool takes `seconds` at most, and all of them _MOST_TIME times that. What is then not proved is not
    covered.
    """
    names = dict(kernel=case.kernel.__name__, label=case.label, target=target)
    try:
        code, launch = _described(case, ptx)
    except ValueError as error:
        return Proof(**names, verdict=NOT_COVERED, reason=str(error))
    end = time.monotonic() + _MOST_TIME * seconds
    for _ in range(_MOST_RUNS):
        result = _run(code, launch, seconds, end)
        if not code.simplify(result):
            break
    verdict = _verdict(result)
    if verdict == PROVED and code.guards:
        code.last = True
        result = _run(code, launch, seconds, end)
        verdict = CONDITIONAL if _verdict(result) == PROVED else _verdict(result)
    reason = SAME_NUMBER if verdict == CONDITIONAL else ""
    return Proof(**names, verdict=verdict, reason=reason or code.explain(result))


def _run(code: "Code", launch: Mapping[str, Any], seconds: float, end: float) -> dict[str, Any]:
    import sentryward

    decisions = [{"line": line, "taken": False} for line in sorted(code.decided)]
    with tempfile.TemporaryDirectory() as folder:
        kernel, description = Path(folder, "kernel.ptx"), Path(folder, "launch.json")
        kernel.write_text(code.text())
        description.write_text(json.dumps({**launch, "branch_decisions": decisions}))
        return sentryward.verify(
            kernel, input=description, timeout_seconds=max(0.01, min(seconds, end - time.monotonic()))
        )


def _verdict(result: Mapping[str, Any]) -> str:
    checks = result["checks"]
    if result["result"] == "race_free" and checks["synchronization"] == checks["memory"] == "passed":
        return PROVED
    return RACE if result["result"] in _RACES else NOT_COVERED


def _described(case: Any, ptx: str) -> tuple["Code", dict[str, Any]]:
    """The code of a configuration and its launch, in SentryWard's words."""
    names = [name for name in case.kernel.arg_names if name in case.arguments]
    values = [case.values[name] for name in names]
    buffers = {i: value for i, value in enumerate(values) if case.arguments[names[i]].startswith("*")}
    tables = {i for i, buffer in buffers.items() if case.addresses.intersection(buffer.contents)}
    addresses = {address for i in tables for address in case.addresses.intersection(buffers[i].contents)}
    code = Code(ptx, tables, min(addresses, default=0))
    # Triton's two areas of scratch memory follow the arguments
    objects = {i: f"scratch_{i}" for i in range(len(names), len(code.types))}
    for i, buffer in buffers.items():
        twin = next((j for j in buffers if j < i and buffer.memory and buffers[j].memory == buffer.memory), i)
        if buffers[twin].address != buffer.address:
            raise ValueError(f"{names[i]} and {names[twin]} lie in one memory")
        objects[i] = names[twin]
        if buffer.address in addresses:
            raise ValueError(f"{names[i]} lies behind a table, too")
    named = list(objects.values())
    code.drop_equal_accesses(i for i in buffers if named.count(objects[i]) == 1)
    written = code.written()
    return code, {
        "schema": "spverify.kernel-input/v1",
        "launch": {
            "grid_dim": [min(programs, _MOST_PROGRAMS) for programs in (*case.grid, 1, 1)[:3]],
            "block_dim": [code.threads, 1, 1],
        },
        "declarations": [
            {"parameter": i, "type": "pointer", "space": "global", "object": name}
            for i, name in [*objects.items(), *([(len(code.types), "memory")] if tables else [])]
        ],
        "arguments": [
            {"parameter": i, "type": code.types[i], "value": _unsigned(value, int(code.types[i][1:]))}
            for i, value in enumerate(values)
            if i not in buffers
        ],
        "shape_arrays": [
            {"parameter": i, "element_type": f"u{bits}", "shapes": [[_unsigned(n, bits) for n in buffer.contents]]}
            for i, buffer in buffers.items()
            if i not in written and buffer.contents and (bits := torch.iinfo(buffer.dtype).bits)
        ],
    }


def _unsigned(value: Any, bits: int) -> Any:
    return value if isinstance(value, float) else int(value) & (1 << bits) - 1


_PARAMETER = re.compile(r"\.param \.(\w+) .*?_param_(\d+)")
_GUARD = r"\s*(@!?%p\d+\s+)?"
_DEFINITION = re.compile(_GUARD + r"([a-z][\w.]*)\s+(\{ %\w+(?:, %\w+)* \}|%\w+), (.*);")
_ACCESS = re.compile(_GUARD + r"(ld|st|atom|red)\.global\S*\s+(?:\{.*?\}, |%\w+, )?\[ ?(%rd\d+)[^\]]*\](?:, )?(.*);")
_BRANCH = re.compile(r"\s*@!?%p\d+\s+bra\s+(\$\w+);")
_CONTROL = re.compile(r"\b(bra|ret|bar|barrier|shfl|mbarrier)\b|^\$L__BB")
_SHARED = re.compile(_GUARD + r"(st\.shared\S*\s.*;)")
_INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "add": np.add,
    "shl": np.left_shift,
    "shr": np.right_shift,
}
# operations that carry a pointer on
_CARRY = ("mov", "add", "sub", "or", "selp", "mad", "cvta", "min", "max")


class Code:
    """PTX of one kernel, and what of it was changed. All changes keep the numbers of its lines."""

    def __init__(self, ptx: str, tables: set[int], lowest: int) -> None:
        lines = ptx.splitlines()
        # without positions in the source, the tool names lines of the PTX
        self.lines = ["" if line.lstrip().startswith(".loc") else line for line in lines]
        self.sources = _sources(lines)
        self.types = {int(i): kind.replace("b", "u") for kind, i in _PARAMETER.findall(ptx)}
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # type: ignore[index]
        self.tables, self.lowest = tables, lowest
        self.guards: dict[int, int] = {}
        self.decided: set[int] = set()
        self.last = False
        self._definitions: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for line in self.lines:
            if definition := _DEFINITION.match(line):
                for register in _names(definition[3]):
                    self._definitions[register].append((definition[2], definition[4]))
        self._accesses = {i: match for i, line in enumerate(self.lines) if (match := _ACCESS.match(line))}
        self._bases = {i: self._parameters_behind(access[3]) for i, access in self._accesses.items()}

    def _parameters_behind(self, register: str) -> set[int]:
        """The parameters that an address is computed from."""
        parameters: set[int] = set()
        seen, waiting = {register}, [register]
        while waiting:
            for operation, operands in self._definitions[waiting.pop()]:
                if parameter := re.search(r"_param_(\d+)\]", operands):
                    parameters.add(int(parameter[1]))
                elif operation.startswith(_CARRY):
                    added = operands.split(", ")[-1] if operation.startswith("mad") else operands
                    new = set(_names(added)) - seen
                    seen |= new
                    waiting += new
        return parameters

    def written(self) -> set[int]:
        """The parameters whose tensors are stored to."""
        return {i for line, access in self._accesses.items() if access[2] != "ld" for i in self._bases[line]}

    def drop_equal_accesses(self, parameters: Iterable[int]) -> None:
        """Drop the accesses to a parameter's tensor that are all atomics, or all stores of the same constant."""
        for parameter in parameters:
            lines = [line for line, bases in self._bases.items() if parameter in bases]
            kinds = {"atomic" if self._accesses[i][2] in ("atom", "red") else self._constant(i) for i in lines}
            if len(kinds) == 1 and kinds != {""} and all(self._bases[i] == {parameter} for i in lines):
                for i in lines:
                    self.lines[i] = ""

    def _constant(self, line: int) -> str:
        """The constant that a store writes; empty if it is none, or for a load."""
        registers = _names(self._accesses[line][4]) if self._accesses[line][2] == "st" else []
        values = {operands for register in registers for _, operands in self._definitions[register]}
        return values.pop() if len(values) == 1 and not any("%" in value for value in values) else ""

    def simplify(self, result: Mapping[str, Any]) -> bool:
        """Change what stopped the tool, as the module's docstring says; False where it did not stop for that."""
        diagnostic = next(iter(result["diagnostics"]), {})
        if diagnostic.get("code") == "control_predicate_not_static":
            line = diagnostic["details"]["location"]["line"]
            if self._only_skips(line):
                self.decided.add(line)
                return True
        for race in result.get("races", [])[:1]:
            first, second = race["first"], race["second"]
            line, bit = first["location"]["line"] - 1, first["actor"] ^ second["actor"]
            same = first["location"] == second["location"] and first["mode"] == second["mode"] == "write"
            store = _SHARED.match(self.lines[line])
            if same and store and not store[1] and bit.bit_count() == 1 and not self.guards.get(line, 0) & bit:
                self.guards[line] = self.guards.get(line, 0) | bit
                self._guard_alike()
                return True
        return False

    def _guard_alike(self) -> None:
        """Guard all stores without a predicate by the bits of the thread that their addresses do not depend on."""
        for i, line in enumerate(self.lines):
            if (store := _SHARED.match(line)) and not store[1] and (address := re.search(r"\[(%r\d+)", line)):
                try:
                    words = self._of_threads(address[1])
                except LookupError:
                    continue
                bits = [1 << b for b in range(self.threads.bit_length() - 1)]
                threads = np.arange(self.threads)
                alike = sum(bit for bit in bits if np.array_equal(words, words[threads ^ bit]))
                self.guards |= {i: self.guards.get(i, 0) | alike} if alike else {}

    def _of_threads(self, operand: str) -> np.ndarray:
        """An integer in every thread. Raises LookupError if it does not follow from the thread alone."""
        if operand == "%tid.x":
            return np.arange(self.threads)
        if not operand.startswith("%"):
            # addresses count from the beginning of shared memory
            number = 0 if operand == "global_smem" else int(operand) if operand.lstrip("-").isdigit() else None
            if number is None:
                raise LookupError(operand)
            return np.full(self.threads, number)
        if len(definitions := self._definitions[operand]) != 1:
            raise LookupError(operand)
        operation, operands = definitions[0]
        values = map(self._of_threads, operands.split(", "))
        return _INTEGERS[operation.split(".")[0]](*values) & 0xFFFFFFFF

    def _only_skips(self, line: int) -> bool:
        """Whether a branch jumps forward over code without barriers and labels that sets no register for later."""
        branch = _BRANCH.match(self.lines[line - 1])
        end = next((i for i, text in enumerate(self.lines) if branch and text.startswith(f"{branch[1]}:")), 0)
        skipped, rest = self.lines[line:end], [*self.lines[:line], *self.lines[end:]]
        if not skipped or line in self.decided or any(_CONTROL.search(text) for text in skipped):
            return False
        defined = {name for text in skipped if (match := _DEFINITION.match(text)) for name in _names(match[3])}
        return not defined & {name for text in rest if "\t.reg" not in text for name in _names(text)}

    def text(self) -> str:
        """The changed PTX."""
        lines = list(self.lines)
        for i, access in self._accesses.items():
            if lines[i] and access[2] == "ld" and ".b64" in access[0] and self._bases[i] & self.tables:
                for register in re.findall(r"%rd\d+", access[0].partition("[")[0]):
                    lines[i] += f" setp.ge.u64 %pointer, {register}, {self.lowest};"
                    lines[i] += f" @%pointer add.s64 {register}, {register}, %memory;"
        for i, mask in self.guards.items():
            store, wanted = lines[i].strip(), mask if self.last else 0
            lines[i] = f"and.b32 %bits, %thread, {mask}; setp.eq.b32 %stores, %bits, {wanted}; @%stores {store}"
        end, body = lines.index(")"), lines.index("{")
        if self.tables:
            lines[end - 1] += ","
            lines[end] = ".param .u64 .ptr .global .align 1 memory_parameter )"
            lines[body] += " .reg .b64 %memory; .reg .pred %pointer;"
        if self.guards:
            lines[body] += " .reg .b32 %thread, %bits; .reg .pred %stores;"
        if self.tables:
            lines[body] += " ld.param.b64 %memory, [memory_parameter];"
        if self.guards:
            lines[body] += " mov.u32 %thread, %tid.x;"
        return "\n".join(lines)

    def explain(self, result: Mapping[str, Any]) -> str:
        """The two accesses of a race, or why the tool stopped; empty if all is proved."""
        for race in result.get("races", []):
            accesses = [
                f"{access['mode']} at {self._place(access)} by program {access['actor'] // self.threads} "
                f"thread {access['actor'] % self.threads}"
                for access in (race["first"], race["second"])
            ]
            region = race["region"]
            return f"{' and '.join(accesses)}, of {region['address_space']} {region['allocation']}+{region['offset']}"
        for diagnostic in result["diagnostics"]:
            place = self._place(diagnostic.get("details", {}))
            return f"{result['result']}, {diagnostic['code']}{' at ' * bool(place)}{place}"
        return "" if _verdict(result) == PROVED else str(result["result"])

    def _place(self, evidence: Mapping[str, Any]) -> str:
        line = evidence.get("location", {}).get("line", evidence.get("ptx_line"))
        return self.sources[line - 1] if line else ""


def _names(text: str) -> list[str]:
    """The registers that a text names."""
    return re.findall(r"%\w+", text)


def _sources(lines: list[str]) -> list[str]:
    """The place in Python of each line of PTX."""
    places = [""]
    for line in lines:
        position = re.search(r"// ([\w.]+:\d+)", line) if line.lstrip().startswith(".loc") else None
        places.append(position[1] if position else places[-1])
    return places[1:]
