"""Record launches and compile their kernels for a named target, on a machine without one: Triton's side of the audit.

`leanstep.kernels.audit` measures what this module returns and imports without Triton itself.
"""

import importlib
import pkgutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import leanstep.kernels.triton_impl as package
from leanstep.kernels.triton_impl._common import TL_DTYPE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel, as its launcher asked for it.

    Attributes:
        kernel: the `triton.jit` function.
        arguments: type of every runtime argument, in Triton's spelling.
        constants: value of every constexpr argument.
        threads: threads per program.
        fp_fusion: whether multiply-adds may be contracted.
    """

    kernel: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    threads: int
    fp_fusion: bool

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a constexpr argument names, or that a pointer points to."""
        value = self.constants[name] if name in self.constants else self.arguments[name]
        return next(dtype for dtype, triton_dtype in TL_DTYPE.items() if triton_dtype.name == str(value).strip("*"))


@dataclass(frozen=True, kw_only=True)
class AuditCase(Launch):
    """A launch, and what its launcher's docstring promises of it.

    Attributes:
        label: the configuration in words.
        elements: elements that one turn of a main loop handles.
        read, written: bytes per element that are moved from and to memory.
        cached: bytes per element read besides, from what the program has just read or written.
        sweeps: main loops that every element goes through; further loops of the same kind are alternatives.
        wide: whether the main loop's accesses of tensors are 128 bits wide.
        flat: whether it accesses nothing else.
    """

    label: str
    elements: int
    read: float
    written: float
    cached: float = 0.0
    sweeps: int = 1
    wide: bool = False
    flat: bool = False


def recorded_cases(
    launch_all: Callable[[], object], promises: Mapping[Any, Callable[[Launch], dict[str, Any]]]
) -> list[AuditCase]:
    """The distinct launches that `launch_all` makes, each with the fields that `promises` gives for its kernel.

    Nothing is run on a device: a launcher is called with CPU or meta tensors, and its kernels are only recorded.
    """
    launches: list[Launch] = []

    def record(
        kernel: Any, *values: Any, grid: Any, warmup: bool, num_warps: int, enable_fp_fusion: bool = True, **named: Any
    ) -> None:
        bound = dict(zip(kernel.arg_names, values, strict=False)) | named
        constants = {p.name: bound[p.name] for p in kernel.params if p.is_constexpr}
        arguments = {name: mangle_type(value) for name, value in bound.items() if name not in constants}
        threads = num_warps * TARGETS["sm_90"].warp_size
        launch = Launch(
            kernel=kernel, arguments=arguments, constants=constants, threads=threads, fp_fusion=enable_fp_fusion
        )
        if kernel in promises and launch not in launches:  # launchers may use kernels of other modules
            launches.append(launch)

    with mock.patch.object(JITFunction, "run", record):
        launch_all()
    return [AuditCase(**vars(launch), **promises[launch.kernel](launch)) for launch in launches]


@dataclass(frozen=True)
class Build:
    """A compiled kernel as text: intermediate code, machine code and the tool's table of resources."""

    key: str
    ttir: str
    machine_code: str
    resources: str
    shared: int


@cache
def modules() -> list[ModuleType]:
    """The modules of this package that define kernels."""
    names = [info.name for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    loaded = [importlib.import_module(name) for name in sorted(names)]
    return [module for module in loaded if hasattr(module, "audit_cases")]


@cache
def cases() -> list[AuditCase]:
    """Every configuration that a launcher of this package can pick."""
    return [case for module in modules() for case in module.audit_cases()]


def compile_case(case: AuditCase, target: str) -> Any:
    """Triton's compiled kernel for a target that need not be here."""
    types = dict(case.arguments) | dict.fromkeys(case.constants, "constexpr")
    signature = {name: types[name] for name in case.kernel.arg_names}
    # torch allocations are aligned at least so, and Triton specialises on it at launch
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constants), attrs=aligned)
    gpu = TARGETS[target]
    options = {"num_warps": case.threads // gpu.warp_size, "enable_fp_fusion": case.fp_fusion}
    return triton.compile(source, target=gpu, options=options)


def disassemble(compiled: Any, machine_code: bool = True) -> Build:
    """Disassemble a compiled kernel with the tools that ship in Triton's wheel.

    `machine_code=False` leaves that text empty for NVIDIA's targets, which halves the time.
    """
    asm = compiled.asm
    if "amdgcn" in asm:
        text = resources = asm["amdgcn"]
    else:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(asm["cubin"])
            text = _tool("nvdisasm", "-c", "-ndf", str(cubin)) if machine_code else ""
            resources = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
    return Build(compiled.hash, asm["ttir"], text, resources, compiled.metadata.shared)


def cache_folder() -> Path:
    """Triton's cache folder (TRITON_CACHE_DIR)."""
    return Path(triton.knobs.cache.dir)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
