"""Verify that a barrier lies between accesses of different warps to one byte of shared memory, by executing the PTX.

Of one program of a recorded launch, the integers are computed that addresses, predicates and branches follow from, for
all threads at once. Other numbers are unknown. Two accesses to one byte by different warps, of which one writes, need a
barrier between them; those of one warp do not. Copies and products that run beside the program (`cp.async`, `wgmma`)
access from their start until the wait for them. Every loop that begins turns at least twice: its branch back is taken
once more if the recorded sizes end it after one turn, so that barriers between its turns are missed. It turns twice if
data ends it.

One instruction may write a byte by several warps: Triton's reductions store an element so from all threads that hold
it. The verdict is then conditional: that they store one number is not verified. A kernel is not covered if an address
in shared memory depends on data, if a branch forward does that skips a barrier, other than to the end, or if the kernel
has an instruction of which the accesses are not known here. Accesses to global memory are not compared. Where accesses
follow from the launch alone, one schedule speaks for all.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from leanstep.kernels.triton_impl._checks.races import CONDITIONAL, NOT_COVERED, PROVED, RACE, SAME_NUMBER, Code, Proof

# instructions of one program, and bytes of shared memory of the largest target
_MOST_STEPS, _SHARED_BYTES, _WARP = 60_000, 233_472, 32
_SETS_NOTHING = ("st", "stmatrix", "red", "bra", "ret", "bar", "cp", "wgmma", "fence", "trap")
_ORDERING = ("bar", "barrier", "cp", "wgmma", "ret")
_Values = np.ndarray | None
_NUMBER = re.compile(r"[sub](?:8|16|32|64)|f(?:32|64)")
_NAME = r"%\w+|global_smem"
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_ACCESS = re.compile(r"(ld|st|atom|red|ldmatrix|stmatrix|cp\.async\.c[ag])\b.*?\.shared\b(?!::cluster)")
_ADDRESS = re.compile(r"\[\s*(%\w+|global_smem)\s*(?:\+\s*(-?\w+))?\s*\]")
# instructions with effects on shared memory, barriers or the order of threads, that are not executed here
_UNKNOWN = re.compile(
    r"mbarrier|tcgen05|barrier\.|bar\.(?!sync|warp)|cp\.async\.(?!c[ag]|commit|wait_group)|cp\.reduce|call"
)


class _NotCovered(Exception):
    """The check does not take a kernel."""


class _Fault(Exception):
    """Two accesses without a barrier between them."""


def prove(case: Any, target: str, ptx: str) -> Proof:
    """Verify the first and the last program of one configuration, an `AuditCase`, from its PTX."""
    verdict, reason = PROVED, ""
    try:
        for index in dict.fromkeys([(0, 0, 0), tuple(n - 1 for n in (*case.grid, 1, 1)[:3])]):
            program = _Program(case, ptx, index)
            program.run()
            if program.shared.is_written_twice:
                verdict, reason = CONDITIONAL, SAME_NUMBER
    except _NotCovered as stop:
        verdict, reason = NOT_COVERED, str(stop)
    except _Fault as fault:
        verdict, reason = RACE, str(fault)
    return Proof(
        rung="barriers", kernel=case.kernel.__name__, label=case.label, target=target, verdict=verdict, reason=reason
    )


class _Statement:
    """One instruction: its guard, its name, the registers that it sets, and its operands."""

    def __init__(self, text: str, line: int) -> None:
        if not (match := _STATEMENT.fullmatch(text)):
            raise _NotCovered(f"the instruction {text!r} is not known")
        negated, self.guard, self.name, rest = match.groups()
        self.text, self.line, self.negated = text, line, bool(negated)
        self.parts = self.name.split(".")
        self.operands = [word.strip() for word in re.split(r",(?![^{]*\})", rest)] if rest else []
        self.access = _ACCESS.match(self.name)
        self.sets: list[str] = []
        if self.operands and self.parts[0] not in _SETS_NOTHING:
            self.sets = re.findall(r"%\w+|\b_\b", self.operands[0])
        self.uses = [name for name in re.findall(_NAME, text) if name not in self.sets]


def _parsed(ptx: str) -> tuple[list[_Statement], dict[str, int]]:
    """The instructions of a kernel, and the one behind each label."""
    statements: list[_Statement] = []
    labels: dict[str, int] = {}
    lines = ptx.splitlines()
    for number, line in enumerate(lines[lines.index("{") :], lines.index("{")):
        text = line.partition("//")[0].strip()
        if label := re.match(r"(\$?\w+):(?!:)\s*", text):
            labels[label[1]], text = len(statements), text[label.end() :]
        for part in text.split(";"):
            word = part.strip(" \t{}") if part.lstrip().startswith(("{", "}")) else part.strip()
            if word and not word.startswith((".", "//")):
                statements.append(_Statement(word, number))
        if line == "}":
            break
    return statements, labels


class _Program:
    """One program of a launch: its threads, their registers, and what they access."""

    def __init__(self, case: Any, ptx: str, program: tuple[int, ...]) -> None:
        self.code = Code(ptx, set(), 0)
        self.statements, self.labels = _parsed(ptx)
        if stop := next((s for s in self.statements if _UNKNOWN.match(s.name)), None):
            raise _NotCovered(f"{stop.name} is not known, at {self.source_of(stop)}")
        self.threads = self.code.threads
        self.shared = _Shared(self.source_of)
        self.arguments = [case.values[name] for name in case.kernel.arg_names if name in case.arguments]
        self.written = self.code.written()
        lanes = np.arange(self.threads)
        self.all = np.ones(self.threads, bool)
        self.registers: dict[str, _Values] = {"global_smem": np.zeros_like(lanes), "%tid.x": lanes}
        self.registers |= {f"%ctaid.{axis}": np.full_like(lanes, i) for axis, i in zip("xyz", program, strict=True)}
        self.needed = self._needed()
        self.turned: dict[int, int] = {}

    def source_of(self, statement: _Statement) -> str:
        """The line of Python, and the instruction."""
        return f"{self.code.sources[statement.line]} ({statement.name})"

    def _needed(self) -> set[str]:
        """The registers that addresses, predicates and branches follow from."""
        needed = {name for s in self.statements if s.access or s.parts[0] in ("bra", "wgmma") for name in s.uses}
        size = 0
        while size < len(needed):
            size = len(needed)
            needed |= {name for s in self.statements if needed.intersection(s.sets) for name in s.uses}
        return needed

    def run(self) -> None:
        """Execute all threads, always those that are behind, up to the end."""
        end = len(self.statements)
        at, waiting = np.zeros(self.threads, int), np.zeros(self.threads, bool)
        for _ in range(_MOST_STEPS):
            if waiting.any() and (waiting | (at == end)).all():
                self.shared.barrier()
                waiting[:] = False
            position = int(at[~waiting].min())
            if position == end:
                return
            active = (at == position) & ~waiting
            statement = self.statements[position]
            at[active] = position + 1
            if statement.parts[0] in ("bar", "barrier") and statement.parts[1] == "sync":
                if statement.operands != ["0"]:
                    raise _NotCovered(f"a barrier of some warps at {self.source_of(statement)}")
                waiting |= active
            elif statement.parts[0] in ("bra", "ret", "exit"):
                leaving = active & self._leaving(statement, position, active)
                at[leaving] = end if statement.parts[0] != "bra" else self.labels[statement.operands[0]]
            else:
                self._execute(statement, active)
        raise _NotCovered(f"more than {_MOST_STEPS} instructions")

    def _leaving(self, statement: _Statement, position: int, active: np.ndarray) -> np.ndarray:
        """The threads that take a branch."""
        target = self.labels[statement.operands[0]] if statement.operands else len(self.statements)
        taken = self._active(statement, self.all)
        if taken is None and (target <= position or all(s.parts[0] == "ret" for s in self.statements[target:])):
            # a loop turns twice; threads that end have no more accesses
            taken = ~self.all
        if taken is None:
            # executed, the accesses that the branch may skip meet all that they could, if no barrier is among them
            skipped = self.statements[position + 1 : max(target, position + 1)]
            rest = [*self.statements[:position], *self.statements[max(target, position + 1) :]]
            later = self.needed.intersection(name for s in rest for name in s.uses)
            if not skipped or any(s.parts[0] in _ORDERING or later.intersection(s.sets) for s in skipped):
                raise _NotCovered(f"a branch that depends on data at {self.source_of(statement)}")
            return ~self.all
        if statement.guard and target <= position:
            turned, goes_on = self.turned.pop(position, 0), bool((taken & active).any())
            # the counter of a loop that was made to turn once more has passed its end
            taken = ~self.all if turned < 0 else taken if goes_on or turned else self.all
            if (taken & active).any():
                self.turned[position] = 1 if goes_on else -1
        return taken

    def _active(self, statement: _Statement, active: np.ndarray) -> np.ndarray | None:
        """The threads that execute a statement; None if that is unknown."""
        if not statement.guard:
            return active
        predicate = self.registers.get(statement.guard)
        return None if predicate is None else active & (predicate.astype(bool) ^ statement.negated)

    def _execute(self, statement: _Statement, active: np.ndarray) -> None:
        name = statement.parts[0]
        guarded = self._active(statement, active)
        if statement.access:
            self._access(statement, active if guarded is None else guarded)
        elif statement.name.startswith("cp.async.commit"):
            self.shared.commit("copy")
        elif statement.name.startswith("cp.async.wait"):
            self.shared.wait("copy", int(statement.operands[0]) if statement.operands else 0)
        elif name == "wgmma":
            self._product(statement, active)
        if not self.needed.intersection(statement.sets):
            return
        values = self._values(statement) if not statement.access else [None]
        values = values * len(statement.sets) if len(values) == 1 else values
        for register, value in zip(statement.sets, values, strict=True):
            before = self.registers.get(register, value)
            if value is not None and guarded is not None and not guarded.all():
                value = None if before is None else np.where(guarded, value, before)
            self.registers[register] = None if guarded is None else value

    # -- numbers

    def _read(self, operand: str, kind: str) -> _Values:
        """An operand in every thread, as a number of a PTX type."""
        if operand.startswith(("%", "global_smem")):
            name, _, added = operand.partition("+")
            value = self.registers.get(name)
            value = value + int(added) if value is not None and added else value
        elif operand.startswith(("0f", "0d")):
            value = np.full(self.threads, np.uint64(int(operand[2:], 16)).astype(np.int64))
        else:
            number = int(operand.rstrip("U"), 0) & 2**64 - 1
            value = np.full(self.threads, np.uint64(number).astype(np.int64))
        if value is None or kind in ("pred", "s64", "b64"):
            return value
        bits = int(kind[1:]) if kind[1:].isdigit() else 0
        if kind == "u64":
            return value.view(np.uint64)
        if kind in ("f32", "f64"):
            return value.astype(f"u{bits // 8}").view(f"f{bits // 8}")
        if kind[0] == "s" and bits:
            return value << (64 - bits) >> (64 - bits)
        return value & (1 << bits) - 1 if kind[0] in "ub" and bits else None

    def _values(self, statement: _Statement) -> list[_Values]:
        """What a statement sets its registers to."""
        name, kind, operands = statement.parts[0], statement.parts[-1], statement.operands
        if name in ("ld", "atom"):
            return [self._loaded(statement)]
        if name == "mov" and "{" in "".join(operands):
            parts = [re.findall(r"%\w+|\b_\b", operand) for operand in operands]
            bits = int(kind[1:]) // max(map(len, parts))
            pieces = [self._read(operand, f"u{bits if len(parts[1]) > 1 else kind[1:]}") for operand in parts[1]]
            read = [piece.astype(np.int64) for piece in pieces if piece is not None]
            if len(read) < len(pieces):
                return [None]
            if len(read) > 1:
                return [np.bitwise_or.reduce([piece << bits * i for i, piece in enumerate(read)])]
            return [read[0] >> bits * i for i in range(len(parts[0]))]
        if name == "shfl" and statement.parts[2] in ("idx", "bfly"):
            value, lane = self._read(operands[1], "b64"), self._read(operands[2], "u32")
            lanes = np.arange(self.threads)
            if value is None or lane is None:
                return [None]
            return [value[lanes & -_WARP | lane] if statement.parts[2] == "idx" else value[lanes ^ lane]]
        compute, kinds = _COMPUTED.get(name), [kind] * 3
        known = {
            "cvt": lambda: _NUMBER.fullmatch(statement.parts[-2]),
            "setp": lambda: statement.parts[1] in _COMPARISONS,
        }
        if compute is None or "hi" in statement.parts or name in known and not known[name]():
            return [None]
        if name in ("shl", "shr", "bfe"):
            kinds[1:] = "u32", "u32"
        if name == "selp":
            kinds[2] = "pred"
        if "wide" in statement.parts:
            kinds[2] = "b64"
        values = [self._read(operand, kinds[i]) for i, operand in enumerate(operands[1:])]
        if any(value is None for value in values):
            return [None]
        with np.errstate(all="ignore"):
            return [_bits(compute(statement.parts, *values))]

    def _loaded(self, statement: _Statement) -> _Values:
        """A parameter, or an integer of a tensor that the kernel only reads."""
        if statement.parts[1] == "param":
            number = int(re.search(r"_param_(\d+)", statement.operands[1])[1])  # type: ignore[index]
            value = self.arguments[number] if number < len(self.arguments) else None
            if isinstance(value, float):
                bits = np.array([value], "f4" if statement.parts[-1] == "b32" else "f8")
                return np.full(self.threads, int(bits.view(f"i{bits.itemsize}")[0]))
            # tensors lie apart
            number = value if isinstance(value, int) else number + 1 << 56
            return np.full(self.threads, np.uint64(number & 2**64 - 1).astype(np.int64))
        at = self._address(statement.operands[-1])
        guarded = self._active(statement, self.all)
        if at is None or guarded is None or len(statement.sets) > 1 or not guarded.any():
            return None if at is None or guarded is None or guarded.any() else np.zeros(self.threads, int)
        numbers, offsets = np.unique(at[guarded] >> 56), at & (1 << 56) - 1
        tensor = self.arguments[numbers[0] - 1] if len(numbers) == 1 and 0 < numbers[0] <= len(self.arguments) else None
        contents = np.array(getattr(tensor, "contents", ()), np.int64)
        if tensor is None or not contents.size or numbers[0] - 1 in self.written:
            return None
        offsets = offsets // tensor.dtype.itemsize
        return contents[np.where(guarded, offsets, 0)] if (offsets[guarded] < contents.size).all() else None

    def _address(self, operand: str) -> _Values:
        base, offset = _ADDRESS.match(operand).groups()  # type: ignore[union-attr]
        value = self._read(base, "b64")
        return value if value is None else value + int(offset or 0)

    # -- accesses

    def _access(self, statement: _Statement, active: np.ndarray) -> None:
        name, parts = statement.parts[0], statement.parts
        operand = next(operand for operand in statement.operands if operand.startswith("["))
        addresses = self._address(operand)
        if addresses is None:
            raise _NotCovered(f"an address that depends on data at {self.source_of(statement)}")
        if name in ("ldmatrix", "stmatrix"):
            size = 16
            count = next(int(part[1:]) for part in parts if re.fullmatch(r"x\d", part))
            active = active & (np.arange(self.threads) % _WARP < 8 * count)
        elif name == "cp":
            size = int(statement.operands[2], 0)
        else:
            vector = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
            size = vector * int(parts[-1][1:]) // 8
        touched = (addresses[active, None] & 0xFFFFFFFF) + np.arange(size)
        owners = np.repeat(np.flatnonzero(active) // _WARP, size)
        kind = "read" if name in ("ld", "ldmatrix") else "write"
        self.shared.access(kind, touched.ravel(), owners, statement, "copy" if name == "cp" else "")

    def _product(self, statement: _Statement, active: np.ndarray) -> None:
        """The reads of a product of matrices in shared memory, by the warps of its group."""
        if "commit_group" in statement.parts:
            self.shared.commit("product")
        elif "wait_group" in statement.parts:
            self.shared.wait("product", int(statement.operands[0]))
        elif "mma_async" in statement.parts:
            rows = [int(n) for n in re.search(r"m(\d+)n(\d+)k", statement.name).groups()]  # type: ignore[union-attr]
            descriptors = [word for word in statement.operands[1:3] if word.startswith("%")]
            transposed = [word == "1" for word in statement.operands[-2:]]
            sides = zip(rows[-len(descriptors) :], descriptors, transposed[-len(descriptors) :], strict=True)
            for count, register, turned in sides:
                descriptor = self._read(register, "b64")
                if descriptor is None:
                    raise _NotCovered(f"an address that depends on data at {self.source_of(statement)}")
                for warp in np.unique(np.flatnonzero(active) // _WARP):
                    touched = _matrix(int(descriptor[warp * _WARP]), count, turned)
                    self.shared.access("read", touched, np.full(touched.size, warp), statement, "product")


def _matrix(descriptor: int, rows: int, transposed: bool) -> np.ndarray:
    """The bytes of shared memory that hold one operand of a product, and those between its parts."""
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    width = (16, 128, 64, 32)[descriptor >> 62 & 3]
    # blocks of 8 rows of a width, 16 numbers of 2 bytes along the other axis
    blocks = (rows * 2 // width, 2) if transposed else (rows // 8, 1 if width > 16 else 2)
    steps = (leading, stride) if transposed else (stride, leading)
    starts = [i * steps[0] + j * steps[1] for i in range(max(blocks[0], 1)) for j in range(blocks[1])]
    return np.unique(start // (8 * width) * 8 * width + np.add.outer(starts, np.arange(8 * width)).ravel())


def _divide(_: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(object)) // np.abs(b.astype(object)) * np.sign(a) * np.sign(b)
    return quotient.astype(np.int64)


def _extract(parts: list[str], a: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    field = a >> start & (1 << size) - 1
    return field << (64 - size) >> (64 - size) if parts[-1][0] == "s" else field


def _convert(parts: list[str], a: np.ndarray) -> np.ndarray:
    target = parts[-2]
    if target[0] == "f":
        return a.astype(f"f{int(target[1:]) // 8}")
    return {"rmi": np.floor, "rni": np.rint}.get(parts[1], np.trunc)(a).astype(np.int64) if a.dtype.kind == "f" else a


def _compare(parts: list[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return getattr(np, _COMPARISONS[parts[1]])(a, b).astype(np.int64)


def _bits(value: np.ndarray) -> np.ndarray:
    """A number as the bits of a register."""
    return value.view(f"i{value.itemsize}").astype(np.int64)


_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip
_COMPUTED: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda _, a: a,
    "cvt": _convert,
    "add": lambda _, a, b: a + b,
    "sub": lambda _, a, b: a - b,
    "mul": lambda _, a, b: a * b,
    "mad": lambda _, a, b, c: a * b + c,
    "fma": lambda _, a, b, c: a * b + c,
    "div": _divide,
    "sqrt": lambda _, a: np.sqrt(a),
    "neg": lambda _, a: -a,
    "not": lambda parts, a: a ^ 1 if parts[-1] == "pred" else ~a,
    "and": lambda _, a, b: a & b,
    "or": lambda _, a, b: a | b,
    "xor": lambda _, a, b: a ^ b,
    "shl": lambda _, a, b: a << b,
    "shr": lambda _, a, b: a >> b.astype(a.dtype),
    "bfe": _extract,
    "min": lambda _, a, b: np.minimum(a, b),
    "max": lambda _, a, b: np.maximum(a, b),
    "selp": lambda _, a, b, chosen: np.where(chosen, a, b),
    "setp": _compare,
}


class _Shared:
    """Which warps accessed each byte of shared memory since the last barrier, and what is on its way."""

    def __init__(self, source_of: Callable[[_Statement], str]) -> None:
        self.source_of = source_of
        # whether one instruction wrote one byte by several warps
        self.is_written_twice = False
        self.warps = {kind: np.zeros(_SHARED_BYTES, np.uint32) for kind in ("read", "write")}
        self.by = {kind: np.zeros(_SHARED_BYTES, np.int32) for kind in ("read", "write")}
        self.statements: dict[int, _Statement] = {}
        # accesses of the groups that were not waited for
        self.open: dict[str, list[_Access]] = {"copy": [], "product": []}
        self.groups: dict[str, list[list[_Access]]] = {"copy": [], "product": []}
        self.flying = {kind: np.zeros(_SHARED_BYTES, np.int16) for kind in ("read", "write")}

    def barrier(self) -> None:
        """Forget the accesses before a barrier, but for those on their way."""
        for warps in self.warps.values():
            warps[:] = 0

    def access(self, kind: str, touched: np.ndarray, owners: np.ndarray, statement: _Statement, queue: str) -> None:
        """Compare an access with those before it, and note it; with a queue, it ends when that is waited for."""
        if touched.size and int(touched.max()) >= _SHARED_BYTES:
            raise _Fault(f"an access outside of shared memory at {self.source_of(statement)}")
        bits = np.left_shift(1, owners).astype(np.uint32)
        for other in ("read", "write") if kind == "write" else ("write",):
            if (met := touched[(self.warps[other][touched] & ~bits) > 0]).size:
                before = self.source_of(self.statements[int(self.by[other][met[0]])])
                raise _Fault(
                    f"no barrier between the {other} at {before} and the {kind} at {self.source_of(statement)}"
                )
            if (not queue or kind != other) and self.flying[other][touched].any():
                raise _Fault(f"no wait for a {other} before the {kind} at {self.source_of(statement)}")
        pairs = np.unique(touched * _WARP + owners)
        self.is_written_twice |= kind == "write" and bool((np.diff(pairs // _WARP) == 0).any())
        access = kind, touched, owners, statement
        if queue:
            np.add.at(self.flying[kind], touched, 1)
            self.open[queue].append(access)
        else:
            self._note(access)

    def _note(self, access: "_Access") -> None:
        kind, touched, owners, statement = access
        for warp in np.unique(owners):
            self.warps[kind][touched[owners == warp]] |= np.uint32(1 << warp)
        self.by[kind][touched] = statement.line
        self.statements[statement.line] = statement

    def commit(self, queue: str) -> None:
        """End a group of accesses."""
        self.groups[queue].append(self.open[queue])
        self.open[queue] = []

    def wait(self, queue: str, rest: int) -> None:
        """Wait for all groups but the last ones; their accesses lie before the next barrier."""
        groups = self.groups[queue]
        ended, self.groups[queue] = groups[: len(groups) - rest], groups[max(len(groups) - rest, 0) :]
        for kind, touched, owners, statement in (access for group in ended for access in group):
            np.add.at(self.flying[kind], touched, -1)
            self._note((kind, touched, owners, statement))


_Access = tuple[str, np.ndarray, np.ndarray, _Statement]
