"""Record launches and compile their kernels for any target, on a machine without it: Triton's side of the audit.

`leanstep.kernels.triton_impl.audit` measures the compiled kernels and imports without Triton.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager as get_cache_manager
from triton.runtime.jit import JITFunction, mangle_type

import leanstep.kernels.triton_impl as package
from leanstep.kernels.triton_impl._common import STATE_DTYPE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


# integers of a longer tensor are data, which decides no address
_MOST_CONTENTS = 4096


@dataclass(frozen=True)
class Buffer:
    """A tensor of a launch: its memory's address, its own, its dtype, and the integers in it, unless they are many."""

    memory: int
    address: int
    dtype: torch.dtype
    contents: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, as recorded from its launcher.

    Attributes:
        kernel: the `triton.jit` function.
        arguments: type of every runtime argument, in Triton's spelling.
        constants: value of every constexpr argument.
        threads: threads per program.
        fp_fusion: whether multiply-adds may be contracted.
        grid: programs along each axis.
        values: what every runtime argument was, a `Buffer` for a tensor. Launches that differ in these two alone are
            one configuration, of which the first is kept.
        addresses: where tensors lay whose addresses were asked for, as for a table of pointers.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    threads: int
    fp_fusion: bool
    grid: tuple[int, ...] = field(compare=False)
    values: Mapping[str, Any] = field(compare=False)
    addresses: frozenset[int] = field(compare=False)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a constexpr argument or of a pointer's target."""
        value = self.constants[name] if name in self.constants else self.arguments[name]
        return next(dtype for dtype, triton_dtype in STATE_DTYPE.items() if triton_dtype.name == str(value).strip("*"))


@dataclass(frozen=True, kw_only=True)
class AuditCase(Launch):
    """A launch and the promises of its module's docstring.

    Attributes:
        label: the configuration in words.
        elements: elements per turn of a main loop.
        read, written: bytes per element read from and written to memory.
        cached: further bytes per element read from the cache, which the program has just read or written.
        sweeps: number of main loops that every element passes through; other loops are alternatives.
        wide: whether the main loop accesses tensors in 128 bits.
        flat: whether the main loop makes no other accesses.
    """

    label: str
    elements: int
    read: float
    written: float
    cached: float = 0.0
    sweeps: int = 1
    wide: bool = False
    flat: bool = False


# for each kernel, the function that returns the fields that an AuditCase adds to a launch
Promises = Mapping[Any, Callable[[Launch], dict[str, Any]]]


def recorded_cases(launch_all: Callable[[], Promises]) -> list[AuditCase]:
    """Record the distinct launches of `launch_all`, and add the fields that its promises return for each kernel.

    No kernel runs: `launch_all` calls launchers with CPU or meta tensors, and their launches are only recorded.
    """
    launches: list[Launch] = []
    addresses: set[int] = set()
    data_ptr = torch.Tensor.data_ptr

    def recorded_address(tensor: torch.Tensor) -> int:
        addresses.add(data_ptr(tensor))
        return data_ptr(tensor)

    def record(
        kernel: Any, *values: Any, grid: Any, warmup: bool, num_warps: int, enable_fp_fusion: bool, **named: Any
    ) -> None:
        bound = dict(zip(kernel.arg_names, values, strict=False)) | named
        compiled = configuration(kernel, bound, num_warps, enable_fp_fusion)
        launch = Launch(
            **compiled, grid=tuple(grid), values={name: _value(bound[name]) for name in compiled["arguments"]},
            addresses=frozenset(addresses - {0}),
        )  # fmt: skip
        if launch not in launches:
            launches.append(launch)

    with mock.patch.object(JITFunction, "run", record), mock.patch.object(torch.Tensor, "data_ptr", recorded_address):
        promises = launch_all()
    # launchers may use kernels of other modules
    promised = [launch for launch in launches if launch.kernel in promises]
    return [AuditCase(**vars(launch), **promises[launch.kernel](launch)) for launch in promised]


def configuration(kernel: Any, bound: Mapping[str, Any], num_warps: int, enable_fp_fusion: bool) -> dict[str, Any]:
    """What of a launch decides the compiled code: the fields of a `Launch` that are compared."""
    constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
    types = {p.name: p.annotation_type for p in kernel.params}
    arguments = {name: types[name] or mangle_type(value) for name, value in bound.items() if name not in constants}
    threads = num_warps * TARGETS["sm_90"].warp_size
    return dict(kernel=kernel, arguments=arguments, constants=constants, threads=threads, fp_fusion=enable_fp_fusion)


def _value(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    integers = value.dtype in (torch.int32, torch.int64) and value.device.type == "cpu"
    contents = value.flatten().tolist() if integers and value.numel() <= _MOST_CONTENTS else ()
    memory = 0 if value.device.type == "meta" else value.untyped_storage().data_ptr()
    return Buffer(memory, value.data_ptr(), value.dtype, tuple(contents))


@cache
def modules() -> list[ModuleType]:
    """The modules of this package that define kernels."""
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    loaded = [importlib.import_module(name) for name in sorted(names)]
    return [module for module in loaded if hasattr(module, "audit_launches")]


@cache
def cases() -> list[AuditCase]:
    """Every configuration that a launcher of this package can choose."""
    return [case for module in modules() for case in recorded_cases(module.audit_launches)]


def largest(cases: list[AuditCase]) -> list[AuditCase]:
    """One configuration per kernel: the most bf16, then 128-bit accesses, then the largest tile."""
    kernels = dict.fromkeys(case.kernel for case in cases)
    return [max((case for case in cases if case.kernel is kernel), key=_size) for kernel in kernels]


def _size(case: AuditCase) -> tuple[int, bool, int]:
    return len(re.findall("bf16|bfloat16", case.label)), case.wide, case.elements


def compile_case(case: AuditCase, target: str) -> Any:
    """Compile a kernel for a target, which this machine need not have."""
    source, options = _source(case, target)
    return triton.compile(source, target=TARGETS[target], options=options)


def intermediate_code(case: AuditCase, target: str = "sm_90") -> str:
    """Triton's intermediate code of a kernel, the same as `compile_case` makes on its way."""
    source, options = _source(case, target)
    backend, context = make_backend(TARGETS[target]), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed, stages = backend.parse_options(options), {}
    functions = backend.get_codegen_implementation(parsed)
    module = source.make_ir(TARGETS[target], parsed, functions, backend.get_module_map(), context)
    backend.add_stages(stages, parsed, source.language)
    return str(stages["ttir"](module, {}))


def _source(case: AuditCase, target: str) -> tuple[ASTSource, dict[str, Any]]:
    types = dict(case.arguments) | dict.fromkeys(case.constants, "constexpr")
    signature = {name: types[name] for name in case.kernel.arg_names}
    # torch aligns allocations to at least 16 bytes, and Triton specialises kernels on it at launch
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    warps = case.threads // TARGETS[target].warp_size
    return source, {"num_warps": warps, "enable_fp_fusion": case.fp_fusion}


def disassemble(compiled: Any, machine_code: bool = True) -> tuple[str, str]:
    """Machine code and table of resources of a compiled kernel, by the tools that ship in Triton's wheel.

    `machine_code=False` leaves the machine code empty for NVIDIA's targets, which halves the time.
    """
    if "amdgcn" in compiled.asm:
        return (compiled.asm["amdgcn"],) * 2
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = _tool("nvdisasm", "-c", "-ndf", str(cubin)) if machine_code else ""
        return text, _tool("cuobjdump", "--dump-resource-usage", str(cubin))


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
