"""What the compiled code of each kernel costs: bytes, instructions, occupancy, and the bound that follows, by a model.

    python benchmarks device/costs [MODULE ...] [--peers FOLDER]

One configuration per kernel, the one with the most bf16 and then the largest tile, for sm_80, sm_90, sm_100 and gfx942.
No GPU is needed, and nothing is measured on one. Bytes per element are those that the audit holds the kernel to.
Instructions per element are those of the threads between the labels of the machine code's main loop ("loop"), which is
the innermost loop with a tile's bytes in global accesses, or with the most. Where no loop of the source has them, they
are those on the way of a tile that is whole ("kernel"). Turns that are unrolled count as their mean, by the bytes that
they access. Of a kernel that passes several times over its elements, one pass is counted.
Occupancy is warps resident / most, by registers, shared memory and threads. "Roofline" is the time of the bytes at the
memory's bandwidth over the longer of this time and that of the instructions at one issue per cycle:

    A100 SXM 80 GB: 2.039 TB/s, 108 SMs, 4 schedulers, 32 lanes, 1.41 GHz
    H100 SXM: 3.35 TB/s, 132 SMs, 4 schedulers, 32 lanes, 1.755 GHz
    B200:     8 TB/s, 148 SMs, 4 schedulers, 32 lanes, 1.98 GHz (75 TFLOP/s of fp32)
    MI300X:   5.3 TB/s, 304 CUs, one instruction of 64 lanes per cycle and CU, 2.1 GHz

The model knows no latency, no cache and no unit slower than the issue; on the MI300X it counts scalar instructions as
vector ones. Code with matrix instructions has no fraction: its tiles come from caches and its time from tensor cores.
FOLDER holds checkouts named Liger-Kernel, axolotl and dion, whose kernels of the same job are compiled beside ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import print_table

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("modules", nargs="*", metavar="MODULE", help="only kernels of these modules, such as lora.swiglu")
PARSER.add_argument("--peers", type=Path, help="compile the kernels of the checkouts in this folder, too")
HEAD = ["kernel", "configuration", "target", "B/elem", "instr/elem", "of", "reg", "shared", "warps", "roofline"]


@dataclass(frozen=True)
class Device:
    """Published limits of a device. Registers are a lane's in one scheduler, and the multiple that a warp gets."""

    bandwidth: float
    lanes_per_second: float
    lanes: int
    registers: int
    granule: int
    most_warps: int
    shared: int
    reserved: int
    most_blocks: int


# registers: 65,536 per SM are 512 for each lane of its four schedulers
DEVICES = {
    "sm_80": Device(2.039e12, 108 * 4 * 32 * 1.41e9, 32, 512, 8, 64, 164 * 1024, 1024, 32),
    "sm_90": Device(3.35e12, 132 * 4 * 32 * 1.755e9, 32, 512, 8, 64, 228 * 1024, 1024, 32),
    "sm_100": Device(8e12, 148 * 4 * 32 * 1.98e9, 32, 512, 8, 64, 228 * 1024, 1024, 32),
    "gfx942": Device(5.3e12, 304 * 64 * 2.1e9, 64, 512, 8, 32, 64 * 1024, 0, 32),
}


def main() -> int:
    """Compile, and print the table."""
    from leanstep.kernels.triton_impl import _compile

    arguments = PARSER.parse_args()
    prefix = f"{_compile.package.__name__}."
    known = [module.__name__.removeprefix(prefix) for module in _compile.modules()]
    if unknown := set(arguments.modules) - set(known):
        PARSER.error(f"expected modules of {known}, got {sorted(unknown)}")
    wanted = {prefix + name for name in arguments.modules or known}
    cases = [case for case in _compile.largest(_compile.cases()) if case.kernel.__module__ in wanted]
    rows = [row(case, target) for case in cases for target in DEVICES]
    for name, make in PEERS.items() if arguments.peers else ():
        try:
            rows += [[f"{name} {cells[0]}", *cells[1:]] for case in make(arguments.peers / name) for target in DEVICES
                     for cells in [row(case, target, 16)]]  # fmt: skip
        except (FileNotFoundError, ImportError) as error:
            rows.append([name, f"not there: {error}", *["-"] * (len(HEAD) - 2)])
    print_table(HEAD, rows)
    return 0


def row(case: Any, target: str, divisor: int = 1) -> list[str]:
    """One line of the table. All integer arguments are taken as multiples of `divisor`, as Triton does at launch."""
    import triton

    from leanstep.kernels.triton_impl import _compile, audit

    source, options = _compile._source(case, target)
    integers = [i for i, kind in enumerate(source.signature.values()) if kind == "i32" and divisor > 1]
    source.attrs |= {(i,): [["tt.divisibility", divisor]] for i in integers}
    compiled = triton.compile(source, target=_compile.TARGETS[target], options=options)
    device = DEVICES[target]
    text, table = _compile.disassemble(compiled)
    registers, shared = audit._resources(table)["registers"], compiled.metadata.shared
    moved = case.read + case.written
    promised = case.elements * (moved + case.cached)
    # a loop that moves less is for the rest of a last tile; of those that share the bytes among them, each moves more
    loop = 6 * max(map(sum, audit.loop_traffic(compiled.asm["ttir"])), default=0) > promised
    count = instructions(text, loop, case.threads, promised)
    per_element = count * case.threads / case.elements
    warps = occupancy(target, registers, shared, case.threads)
    memory, issue = moved / device.bandwidth, per_element / device.lanes_per_second
    matrix = re.search(r"\b(?:UTC)?[HIQ]G?MMA\b|\bv_mfma_", text)
    fraction = "-" if matrix or not moved else f"{memory / max(memory, issue):.0%}"
    return [
        case.kernel.__name__, case.label, target, f"{moved:.2f}", f"{per_element:.1f}", "loop" if loop else "kernel",
        str(registers), str(shared), f"{warps}/{device.most_warps}", fraction,
    ]  # fmt: skip


_INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]{4,}\*/\s|(?:[sv]|ds|global|buffer|flat|scratch)_)")


def instructions(text: str, loop: bool, threads: int, bytes_per_turn: float) -> float:
    """Machine instructions of a thread, in one copy of the main loop's body or on the way of a whole tile."""
    from leanstep.kernels.triton_impl import audit

    lines = text.splitlines()
    if not loop:
        ways = whole_ways(lines)
        return ways[min(ways, key=lambda size: (abs(size * threads - bytes_per_turn), ways[size]))]
    spans = sorted(audit._loops(lines), key=lambda span: span[1] - span[0])
    bodies = [lines[first : last + 1] for first, last in spans]
    # loops around others move more
    size, body = max(
        ((_accessed(body) * threads, body) for body in bodies), key=lambda pair: min(pair[0], bytes_per_turn)
    )
    return _count(body) / max(1, round(size / bytes_per_turn))


def whole_ways(lines: list[str]) -> dict[int, int]:
    """Bytes in global accesses on the ways through a kernel -> instructions on the shortest; loops turn once."""
    from leanstep.kernels.triton_impl import audit

    labels = {label[1]: i for i, line in enumerate(lines) if (label := audit._LABEL.match(line.strip()))}
    starts, known = set(labels.values()), dict[int, dict[int, int]]()

    def rest(first: int, before: frozenset[int]) -> dict[int, int]:
        if first in known:
            return known[first]
        i, following, ends = first, list[int](), False
        while i < len(lines) and not following and not ends:
            line, branch = lines[i], audit._BRANCH.search(lines[i])
            i += 1
            ends = bool(re.search(r"\*/\s+EXIT|s_endpgm", line))
            if branch:
                following = [labels[branch[1] or branch[2]], *[i] * bool(re.search("@!?U?P|s_cbranch", line))]
            elif i in starts:
                following = [i]
        size, count = _accessed(lines[first:i]), _count(lines[first:i])
        after = [rest(each, before | {first}) for each in following if each not in before and each != first]
        known[first] = {}
        for more, others in (way for ways in after or [{0: 0}] for way in ways.items()):
            known[first][size + more] = min(count + others, known[first].get(size + more, count + others))
        return known[first]

    return rest(0, frozenset())


def _count(lines: list[str]) -> int:
    return sum(bool(_INSTRUCTION.match(line)) for line in lines)


def _accessed(lines: list[str]) -> int:
    """Bytes in global accesses of a thread; copies to shared memory that do not wait have 128 bits."""
    from leanstep.kernels.triton_impl import audit

    accesses = [audit._access(line) for line in lines]
    return sum(access[1] for access in accesses if access) // 8 + 16 * sum("LDGSTS" in line for line in lines)


def occupancy(target: str, registers: int, shared: int, threads: int) -> int:
    """Warps that one SM or CU holds, of blocks of `threads` threads. A block of this size must fit at all."""
    device = DEVICES[target]
    per_block = -(-threads // device.lanes)
    per_lane = -(-registers // device.granule) * device.granule
    by_registers = 4 * (device.registers // per_lane) // per_block
    by_shared = device.shared // (shared + device.reserved) if shared + device.reserved else device.most_blocks
    blocks = min(by_registers, by_shared, device.most_warps // per_block, device.most_blocks)
    return blocks * per_block


def _peer(kernel: Any, label: str, types: Mapping[str, str], constants: Mapping[str, Any], **settings: Any) -> Any:
    """A configuration of another library's kernel, without a launch."""
    from leanstep.kernels.triton_impl._compile import AuditCase

    return AuditCase(kernel=kernel, label=label, arguments=types, constants=constants, fp_fusion=True, grid=(1,),
                     values={}, addresses=frozenset(), **settings)  # fmt: skip


def _load(path: Path) -> Any:
    """A module from a file alone."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def liger(folder: Path) -> list[Any]:
    """SwiGLU by rows of 8,192, where no lane idles, and of 11,008, LLaMA's of 7B, with Liger's own settings."""
    sys.path.insert(0, str(folder / "src"))
    swiglu = _load(folder / "src/liger_kernel/ops/swiglu.py")
    cases = []
    for columns in (8192, 11008):
        block, warps = swiglu.calculate_settings(columns)
        for kernel, names, read, written in ((swiglu._swiglu_forward_kernel, ("a", "b", "c"), 4, 2),
                                             (swiglu._swiglu_backward_kernel, ("dc", "a", "b"), 6, 4)):  # fmt: skip
            types = {f"{name}_ptr": "*bf16" for name in names} | {"stride": "i32", "gate_multiplier": "fp32"}
            cases.append(_peer(kernel, f"bf16 rows of {columns}", types, {"n_cols": columns, "BLOCK_SIZE": block},
                               threads=32 * warps, elements=columns, read=read, written=written))  # fmt: skip
    return cases


def axolotl(folder: Path) -> list[Any]:
    """SwiGLU of LoRA's kernels, by its own tiles. The backward pass stores the product, too, as ours does."""
    sys.path.insert(0, str(folder / "src"))
    swiglu = _load(folder / "src/axolotl/kernels/swiglu.py")
    kernels = ((swiglu._swiglu_fwd_kernel, 4, 2), (swiglu._swiglu_bwd_kernel, 6, 6))
    return [
        _peer(kernel, "bf16", {n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names[:-1]},
              {"block_size": 1024}, threads=128, elements=1024, read=read, written=written)
        for kernel, read, written in kernels
    ]  # fmt: skip


def dion(folder: Path) -> list[Any]:
    """The symmetric product, in the one of the tiles that it tries on a device that is as large as ours."""
    kernel = _load(folder / "dion/newton_schulz_triton.py").ns_line_1_kernel.fn
    constants = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8, "LOWER_UPPER": 1,
                 "INPUT_PRECISION": "ieee"}  # fmt: skip
    types = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name not in constants}
    # strides of 1, which Triton makes constants at launch
    constants |= {name: 1 for name in types if name.endswith("stride_c")}
    types = {name: kind for name, kind in types.items() if name not in constants}
    return [_peer(kernel, "bf16 128 x 128 x 64", types, constants, threads=256, elements=16384, read=2, written=0)]


PEERS: dict[str, Callable[[Path], list[Any]]] = {"Liger-Kernel": liger, "axolotl": axolotl, "dion": dion}
