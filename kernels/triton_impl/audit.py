"""Measure compiled Triton kernels without a GPU: registers, spills, shared memory, access widths and bytes moved.

`leanstep audit` compiles every configuration that a launcher can pick, for sm_80, sm_90, sm_100 and gfx942, and reads
the machine code. It prints a table. It fails if a kernel spills, uses the stack, makes narrow accesses where it
promises 128 bits, moves more bytes per element than it promises, or computes an offset in 32 bits that can pass 2^31.
`leanstep audit --prove` verifies instead that the code for NVIDIA's targets has no races (`_checks/races.py`), and that
no barrier is missing between accesses to shared memory (`_checks/barriers.py`), and executes the intermediate code
(`_checks/execution.py`).

Triton's cache folder (TRITON_CACHE_DIR) keeps compiled kernels and measurements. This module imports without Triton.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from leanstep._arguments import OneLineParser
from leanstep.kernels._backend import has_triton
from leanstep.kernels.triton_impl._checks import barriers, execution, offsets, races
from leanstep.kernels.triton_impl._checks.operations import MODULES
from leanstep.kernels.triton_impl._checks.races import CONDITIONAL, NOT_COVERED, RACE, Proof

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# rung: what names the tool to install, where it is absent
RUNGS = {"races": races.missing, "barriers": lambda: "", execution.RUNG: execution.missing}

# tolerated bytes per element beyond the promise, such as a row's scale
_SLACK = 0.07


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One kernel configuration on one target.

    `loads` and `stores` count the whole kernel's instructions by bits per access; `main_loads` and `main_stores` count
    those of the main loop. The main loop is the innermost loop with the most bytes in 128-bit accesses. All four are
    empty if the audit does not disassemble. `read` and `written` are bytes per element as issued. `spills` counts
    registers (gfx942) or bytes of local memory. `narrow` are the operations whose 32 bits an offset can pass.
    """

    kernel: str
    label: str
    target: str
    threads: int
    elements: int
    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    main_loads: dict[int, int]
    main_stores: dict[int, int]
    read: float
    written: float
    promised_read: float
    promised_written: float
    cached: float
    wide: bool
    flat: bool
    narrow: list[str]


def measure(
    targets: Sequence[str] = TARGETS,
    match: str | Collection[str] = "",
    processes: int | None = None,
    all_widths: bool = True,
) -> list[Measurement]:
    """Compile and measure the configurations whose "kernel label" contains `match`, in parallel processes.

    A collection `match` holds whole names "kernel label". `all_widths=False` measures widths only where 128 bits are
    promised, which saves a third of the time.

    Raises:
        RuntimeError: if Triton is not installed.
    """
    with _pool(processes) as pool:
        cases = _cases(pool, match)
        return list(pool.map(_measure, [(i, target, all_widths) for i, *_ in cases for target in targets], chunksize=4))


def prove(
    targets: Sequence[str] = races.TARGETS,
    match: str | Collection[str] | None = None,
    processes: int | None = None,
    rungs: Sequence[str] = tuple(RUNGS),
) -> list[Proof]:
    """Verify the largest configuration of each kernel, or those of `match`, as for `measure`: a proof for each rung.

    A rung whose tool is not installed in the version in use covers none. The rung "ttir" executes the operations that
    launch the kernels; configurations that these launch besides get a proof, too, if that is not "right".

    Raises:
        RuntimeError: if Triton is not installed.
    """
    absent = {rung: reason for rung in rungs if (reason := RUNGS[rung]())}
    with _pool(processes) as pool:
        cases = _cases(pool, match)
        verified = [rung for rung in rungs if rung not in {*absent, execution.RUNG}]
        tasks = [(i, target, verified) for i, *_ in cases for target in targets]
        proofs = [proof for proofs in pool.map(_prove, tasks) for proof in proofs]
        if execution.RUNG in rungs and execution.RUNG not in absent:
            operations = dict.fromkeys(name for *_, module in cases for name in MODULES[module])
            executed = pool.map(_execute, [(name, target) for name in operations for target in targets])
            proofs += execution.merged([proof for proofs in executed for proof in proofs], cases, targets)
    return proofs + [
        Proof(kernel=kernel, label=label, target=target, rung=rung, verdict=NOT_COVERED, reason=reason)
        for rung, reason in absent.items() for _, kernel, label, _ in cases for target in targets
    ]  # fmt: skip


def _cases(pool: Executor, match: str | Collection[str] | None) -> list[tuple[int, str, str, str]]:
    # a view of a dict, such as its values, cannot be sent to a process
    return pool.submit(_selected, match if match is None or isinstance(match, str) else set(match)).result()


def _pool(processes: int | None) -> ProcessPoolExecutor:
    if not has_triton():
        raise RuntimeError("the kernel audit needs the triton package (Linux on x86-64), and it is not installed")
    # torch has threads, so processes must not be forked; spawned ones can also import Triton without its interpreter
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes or os.cpu_count() or 1, mp_context=context, initializer=_leave_interpreter)


def problems(measured: Measurement) -> list[str]:
    """Name each broken promise of a kernel in words."""
    wrong = []
    if measured.spills or measured.stack:
        wrong.append(f"spills {measured.spills}, stack {measured.stack} bytes")
    if measured.wide:
        wrong += _narrow(measured, "loads", measured.main_loads, measured.promised_read)
        wrong += _narrow(measured, "stores", measured.main_stores, measured.promised_written)
    if measured.read - measured.cached > measured.promised_read + _SLACK:
        wrong.append(
            f"reads {measured.read:.2f} bytes per element, promised {measured.promised_read + measured.cached:.2f}"
        )
    if measured.written > measured.promised_written + _SLACK:
        wrong.append(f"writes {measured.written:.2f} bytes per element, promised {measured.promised_written:.2f}")
    return wrong + [f"a 32-bit offset can pass 2^31: {operation}" for operation in measured.narrow]


def _narrow(measured: Measurement, kind: str, widths: dict[int, int], promised: float) -> list[str]:
    wide = sum(bits // 8 * count for bits, count in widths.items() if bits >= 128) * measured.threads
    if wide < promised * measured.elements:
        return [f"128-bit {kind} cover {wide} of {promised * measured.elements:.0f} bytes per turn of the main loop"]
    if measured.flat and any(bits < 128 for bits in widths):
        return [f"narrow {kind} in the main loop: {widths}"]
    return []


def _leave_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _selected(match: str | Collection[str] | None) -> list[tuple[int, str, str, str]]:
    """(index, kernel, label, module) of the cases whose name matches, or of the largest of each kernel."""
    from leanstep.kernels.triton_impl import _compile

    cases = _compile.cases()
    largest = set(map(id, _compile.largest(cases))) if match is None else set()
    selected = []
    for i, case in enumerate(cases):
        kernel, module = case.kernel.__name__, case.kernel.__module__.removeprefix(f"{_compile.package.__name__}.")
        name = f"{kernel} {case.label}"
        if id(case) in largest if match is None else match in name if isinstance(match, str) else name in match:
            selected.append((i, kernel, case.label, module))
    return selected


def _prove(task: tuple[int, str, Sequence[str]]) -> list[Proof]:
    from leanstep.kernels.triton_impl import _compile

    index, target, rungs = task
    if not rungs:
        return []
    case = _compile.cases()[index]
    ptx = _compile.compile_case(case, target).asm["ptx"]
    return [{"races": races, "barriers": barriers}[rung].prove(case, target, ptx) for rung in rungs]


def _execute(task: tuple[str, str]) -> list[Proof]:
    return execution.execute(*task)


def _measure(task: tuple[int, str, bool]) -> Measurement:
    from leanstep.kernels.triton_impl import _compile

    index, target, all_widths = task
    case = _compile.cases()[index]
    compiled = _compile.compile_case(case, target)
    readers = (__file__, offsets.__file__)
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in readers)).hexdigest()[:16]
    disassembled = case.wide or all_widths
    cache, name = _compile.get_cache_manager(compiled.hash), f"leanstep-audit-{code}-{disassembled:d}.json"
    path = cache.get_file(name)
    if path is None:
        machine_code, resources = _compile.disassemble(compiled, disassembled)
        measured = {"shared": compiled.metadata.shared} | _resources(resources) | _widths(machine_code)
        measured["loops"] = loop_traffic(compiled.asm["ttir"])
        measured["narrow"] = offsets.narrow_offsets(compiled.asm["ttir"])
        path = cache.put(json.dumps(measured), name, binary=False)
    values = json.loads(Path(path).read_text())
    loops = sorted(values.pop("loops"), reverse=True)[: case.sweeps]
    for name in ("loads", "stores", "main_loads", "main_stores"):
        values[name] = {int(bits): count for bits, count in values[name].items()}
    return Measurement(
        kernel=case.kernel.__name__,
        target=target,
        read=sum(read for read, _ in loops) / case.elements,
        written=sum(written for _, written in loops) / case.elements,
        promised_read=case.read,
        promised_written=case.written,
        **{name: getattr(case, name) for name in ("label", "threads", "elements", "cached", "wide", "flat")},
        **values,
    )


def _resources(text: str) -> dict[str, int]:
    """Read registers, spills and stack from cuobjdump's table, or from the metadata at the end of AMD's assembly."""
    nvidia = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if nvidia:
        registers, stack, local = map(int, nvidia.groups())
        return {"registers": registers, "spills": local, "stack": stack}
    amd = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return {
        "registers": amd["vgpr_count"],
        "spills": amd["vgpr_spill_count"] + amd["sgpr_spill_count"],
        "stack": amd["private_segment_fixed_size"],
    }


_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"(?:\bBRA\b.*`\((\.L\w+)\)|\bs_c?branch\w*\s+(\.L\w+))")
_ACCESS = re.compile(r"\b(LDG|STG|LDL|STL)\.E?([\w.]*)|\b(?:global|buffer|flat|scratch)_(load|store)_(\w+)")
_AMD_BITS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}


def _widths(text: str) -> dict[str, dict[int, int]]:
    """Count the global accesses in SASS or AMD assembly by width: in the kernel, and in its main loop."""
    lines = text.splitlines()
    accesses = [_access(line) for line in lines]
    loads, stores = _count(accesses)
    # Shortest first, so that max() returns the innermost of loops with equal wide accesses. Not every machine loop is a
    # loop of the source: gfx942 moves the bodies of masked accesses out of line and branches back.
    spans = sorted(_loops(lines), key=lambda span: span[1] - span[0])
    loops = [_count(accesses[first : last + 1]) for first, last in spans]
    main = max(loops, key=lambda loop: _wide_bytes(loop[0]) + _wide_bytes(loop[1]), default=(Counter(), Counter()))
    return {"loads": loads, "stores": stores, "main_loads": main[0], "main_stores": main[1]}


def _access(line: str) -> tuple[bool, int] | None:
    """Return (is a load, bits) of a global access; None for other instructions."""
    access = _ACCESS.search(line)
    if access is None:
        return None
    nvidia, modifiers, amd, suffix = access.groups()
    if nvidia:
        width = re.search(r"\.(?:[US])?(256|128|64|16|8)(?:\.|$)", "." + modifiers)
        return nvidia.startswith("LD"), int(width[1]) if width else 32
    name = suffix.split("_")[0]
    return amd == "load", _AMD_BITS.get(name, 8)


def _count(accesses: Iterable[tuple[bool, int] | None]) -> tuple[Counter[int], Counter[int]]:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for access in accesses:
        if access is not None:
            (loads if access[0] else stores)[access[1]] += 1
    return loads, stores


def _wide_bytes(widths: Counter[int]) -> int:
    return sum(bits * count for bits, count in widths.items() if bits >= 128)


def _loops(lines: Sequence[str]) -> list[tuple[int, int]]:
    """Return first and last line of every loop, from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    loops: dict[str, tuple[int, int]] = {}
    for number, line in enumerate(lines):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = number
        elif branch := _BRANCH.search(line):
            name = branch[1] or branch[2]
            if name in labels and number - labels[name] > 1:
                loops[name] = (labels[name], number)
    return list(loops.values())


_TENSOR = re.compile(r"tt\.(load|store)\b.*: tensor<([\dx]+)x!tt\.ptr<([a-z]+)(\d+)")


def loop_traffic(ttir: str) -> list[tuple[int, int]]:
    """Count the bytes read and written per turn of every innermost loop, in Triton's intermediate code."""
    loops: list[list[int]] = []
    # the loop index of every open region
    stack: list[int | None] = []
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*$", "", line).strip()
        if text.startswith("}") and stack:
            stack.pop()
        if text.endswith("{") or text.endswith("({"):
            inner = len(loops) if "scf.for" in text or "scf.while" in text else (stack[-1] if stack else None)
            if inner == len(loops):
                loops.append([0, 0])
            stack.append(inner)
        access = _TENSOR.search(text)
        if access and stack and stack[-1] is not None:
            size = int(access[4]) // 8
            for dim in access[2].split("x"):
                size *= int(dim)
            loops[stack[-1]][access[1] == "store"] += size
    return [(read, written) for read, written in loops]


def table(measurements: Sequence[Measurement]) -> str:
    """Format the measurements as aligned text, one line per configuration and target."""
    head = ("kernel", "configuration", "target", "reg", "spill", "stack", "shared", "loads", "stores",
            "read B/elem (cached, promised)", "written (promised)", "")  # fmt: skip
    rows = [head]
    for m in measurements:
        rows.append((
            m.kernel, m.label, m.target, str(m.registers), str(m.spills), str(m.stack), str(m.shared),
            _format_widths(m.main_loads or m.loads), _format_widths(m.main_stores or m.stores),
            f"{m.read:.2f} ({m.cached:g}, {m.promised_read:g})", f"{m.written:.2f} ({m.promised_written:g})",
            "; ".join(problems(m)),
        ))  # fmt: skip
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows
    )


def _format_widths(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the audit.

    Return 1 for a problem, a race or a wrong result, 2 if the audit or a rung cannot run here, and 3 for kernels that
    are not proved.
    """
    parser = OneLineParser(
        prog="leanstep audit",
        description="Compile every Triton kernel for every target, without a GPU, and print a table. "
        "Loads and stores are those of the main loop: count x bits.",
    )
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this target; may be repeated")
    parser.add_argument("--match", help='only configurations whose "kernel label" contains this')
    parser.add_argument("--processes", type=int, help="compile in this many processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--prove", nargs="*", choices=tuple(RUNGS), metavar="RUNG", help="verify instead that the code for NVIDIA's "
        "targets has no races, misses no barriers, and computes the definition's results (extra prove), or what is "
        f"named of {', '.join(RUNGS)}; without --match, the largest configuration of each kernel"
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        if arguments.prove is not None:
            return _print_proofs(arguments)
        measurements = measure(arguments.target or TARGETS, arguments.match or "", arguments.processes)
    except RuntimeError as error:
        sys.stderr.write(f"leanstep audit: {error}\n")
        return 2
    wrong = sum(bool(problems(m)) for m in measurements)
    if arguments.json:
        text = json.dumps([asdict(m) | {"problems": problems(m)} for m in measurements], indent=1)
    else:
        text = f"{table(measurements)}\n\n{len(measurements)} kernels compiled, {wrong} with problems"
    sys.stdout.write(text + "\n")
    return 1 if wrong or not measurements else 0


def _print_proofs(arguments: argparse.Namespace) -> int:
    asked, rungs = arguments.target or TARGETS, arguments.prove or list(RUNGS)
    proofs = prove([target for target in asked if target in races.TARGETS], arguments.match, arguments.processes, rungs)
    rows = [(p.kernel, p.label, p.target, p.rung, p.verdict, p.reason) for p in proofs]
    text = _aligned([("kernel", "configuration", "target", "rung", "verdict", ""), *rows]) + "\n"
    for rung in dict.fromkeys(p.rung for p in proofs):
        of_rung = Counter(p.verdict for p in proofs if p.rung == rung)
        text += f"\n{rung}: " + ", ".join(f"{count} {verdict}" for verdict, count in of_rung.items())
    for target in (target for target in asked if target not in races.TARGETS):
        text += f"\n{target}: not covered, no rung takes its code"
    sys.stdout.write((json.dumps([asdict(p) for p in proofs], indent=1) if arguments.json else text) + "\n")
    verdicts = {p.verdict for p in proofs}
    if not proofs or verdicts & {RACE, execution.WRONG}:
        return 1
    if any(RUNGS[rung]() for rung in rungs):
        return 2
    return 3 if verdicts & {CONDITIONAL, NOT_COVERED} else 0
