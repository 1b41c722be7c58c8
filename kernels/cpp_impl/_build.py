"""Build and load the C++ kernels: small files, prebuilt in a wheel or compiled on first use for this processor.

One call processes a whole list of tensors, split over torch's threads. Macros select dtypes and flags. Each combination
of macros is a shared library: it takes seconds to build, stays in the cache folder, and is loaded with
ctypes. No torch headers, no extension module, nothing to install. The libraries use torch's OpenMP runtime, so that
both share one pool of threads.

A library that the wheel carries (``_prebuilt.py``) comes first; ``LEANSTEP_PREBUILT=0`` leaves it out. Torch's switch
``ATEN_CPU_CAPABILITY`` (``avx2``, ``default``) holds the kernels, too, to these instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.cpp_impl import _prebuilt
from leanstep.kernels.cpp_impl._cache import KernelCacheError, load_or_build
from leanstep.kernels.cpp_impl._prebuilt import FLAGS, SOURCES

TYPES = {torch.float32: "float", torch.bfloat16: "bf16"}
# of the products with bit masks
SPARSE_TYPES = {**TYPES, torch.float16: "fp16"}


class BuildError(RuntimeError):
    """The C++ compiler did not build a kernel; the message holds what it printed."""


class MissingKernelError(BuildError):
    """A kernel with these macros is not prebuilt, and there is no compiler to build it."""


def cpp_compiler() -> tuple[str, ...]:
    """Command of the C++ compiler, the path of a program first; empty without one.

    ``$CXX``, which may have arguments (``ccache g++``), or the first of g++, clang++ and c++ on the PATH.
    """
    return _first_compiler(os.environ.get("CXX", "").strip(), os.environ.get("PATH", ""))


@functools.cache
def _first_compiler(requested: str, path: str) -> tuple[str, ...]:
    commands = [["g++"], ["clang++"], ["c++"]]
    if requested:
        # a program whose path has spaces, or a command
        commands = [[requested]] if shutil.which(requested, path=path) else [_words(requested)]
    programs = ((shutil.which(name, path=path), arguments) for name, *arguments in commands)
    return next(((file, *arguments) for file, arguments in programs if file), ())


def _words(command: str) -> list[str]:
    with contextlib.suppress(ValueError):  # a quote without its end
        return shlex.split(command) or [command]
    return [command]


def _no_compiler() -> str:
    requested = os.environ.get("CXX", "").strip()
    tried = f"CXX is {requested!r}, which names no program" if requested else "CXX, g++, clang++"
    return f"no C++ compiler on the PATH ({tried})"


def why_not_cpp() -> str | None:
    """Why kernels cannot be built here, or None. The first call builds a small kernel to test it."""
    if not sys.platform.startswith("linux"):
        return f"C++ kernels are built on Linux, not on {sys.platform}"
    compiler, prebuilt = cpp_compiler(), uses_prebuilt()
    return _why_it_fails(compiler, prebuilt) if compiler or prebuilt else _no_compiler()


@functools.cache
def _why_it_fails(compiler: tuple[str, ...], prebuilt: bool) -> str | None:
    try:
        library("steps/nonfinite_flags", {"TENSOR": "float"})
    except (KernelCacheError, MissingKernelError) as error:
        return str(error)
    except (BuildError, OSError) as error:
        return f"{shlex.join(compiler)} failed: {str(error).splitlines()[-1]}"
    return None


def uses_prebuilt() -> bool:
    """Whether prebuilt libraries are loaded: this installation has some for this processor, and none are refused."""
    return os.environ.get("LEANSTEP_PREBUILT", "1") not in ("", "0") and bool(_prebuilt.installed_levels())


def origin(kernel: str) -> str:
    """Say in words where a C++ kernel (``steps/lion_int8``, ...) comes from."""
    if uses_prebuilt():
        names = dict(_prebuilt.installed_levels())
        for level in _prebuilt.levels():
            if level.name in names and (level.only is None or kernel.startswith(level.only)):
                return f"prebuilt for {level.name}"
    return "built on first use by a C++ compiler"


def library(name: str, macros: Mapping[str, str | int]) -> ctypes.CDLL:
    """Load ``NAME.cpp`` compiled with these macros, prebuilt or from the cache. Build it first if it is in neither.

    Raises:
        MissingKernelError: there is no compiler.
        BuildError: the compiler failed.
        KernelCacheError: no folder can hold the library.
    """
    return _library(name, tuple(sorted(macros.items())))


@functools.cache
def _library(name: str, macros: tuple[tuple[str, str | int], ...]) -> ctypes.CDLL:
    refused = None
    if uses_prebuilt():
        try:
            return _load_prebuilt(name, dict(macros))
        except OSError as error:
            refused = str(error)
    compiler = cpp_compiler()
    if not compiler:
        raise MissingKernelError(f"{refused}, and {_no_compiler()}" if refused else _no_compiler())
    command = [*compiler, *FLAGS, *_native(), *(f"-D{key}={value}" for key, value in macros)]
    # a library needs torch's OpenMP runtime by its name, which differs from one build of torch to another
    runtimes = [path.name for path in _bundled_openmp()]
    ingredients = [*command, *runtimes, _version(compiler), _processor(), _prebuilt.sources()]
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:24]

    def build(target: Path) -> None:
        source = str(SOURCES / f"{name}.cpp")
        arguments = [*command, f"-I{SOURCES}", "-shared", source, "-o", str(target), *_openmp()]
        ran = subprocess.run(arguments, capture_output=True, text=True)
        if ran.returncode:
            raise BuildError(f"{' '.join(command)} {source} failed:\n{ran.stderr.strip()}")

    return load_or_build(f"{name.replace('/', '-')}-{digest}.so", build)


def _load_prebuilt(name: str, macros: Mapping[str, str | int]) -> ctypes.CDLL:
    """Load the best prebuilt library that the loader takes. Raises OSError if there is none for this processor."""
    flags = ", ".join(f"{key}={value}" for key, value in sorted(macros.items()))
    refused: OSError = FileNotFoundError(f"no prebuilt {name} with {flags}")
    for path in _prebuilt.find(name, macros):
        _share_openmp()
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            refused = error
    raise refused


@functools.cache
def _share_openmp() -> None:
    """Let prebuilt libraries see the OpenMP runtime that torch has loaded; they are linked with none."""
    for path in _bundled_openmp():
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _bundled_openmp() -> list[Path]:
    return sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


def _openmp() -> list[str]:
    """Link torch's OpenMP runtime, not the compiler's: two runtimes would have two pools of threads."""
    return ["-Wl,--as-needed", *map(str, _bundled_openmp())]


def _native() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["-mcpu=native"]
    if _prebuilt.held_to():
        return next((list(level.flags) for level in _prebuilt.levels()), ["-march=x86-64"])
    # by default, compilers use only half of each AVX-512 vector, which halves the speed of 16-bit loops
    return ["-march=native", "-mprefer-vector-width=512"]


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _processor() -> str:
    """The processor's model and features, which -march=native depends on; machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def call(name: str, function: str, macros: Mapping[str, str | int], *arguments: Any) -> None:
    """Call a function of ``NAME.cpp``, compiled with these macros. It may use torch's number of threads.

    A tensor becomes the address of its first element, a list of tensors or integers an array, None a null pointer, an
    integer an int64 and a float an fp32 number. Objects of ctypes are passed as they are.
    """
    getattr(library(name, macros), function)(*map(as_c, arguments), torch.get_num_threads())


def as_c(value: Any) -> Any:
    """Convert an argument of :func:`call`."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, list):
        numbers = [t.data_ptr() for t in value] if value and isinstance(value[0], Tensor) else value
        return (ctypes.c_int64 * len(numbers))(*numbers)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without holes or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether one loop over storage visits equal indices of all tensors."""
    if all(t.is_contiguous() for t in tensors):
        return True
    first = tensors[0]
    return is_dense(first) and all(t.stride() == first.stride() for t in tensors[1:])


def group_by_dtypes(lists: Sequence[Sequence[Tensor]], selected: Sequence[bool]) -> list[list[int]]:
    """Group the selected indices by the dtypes of all lists' tensors at the index, in order of first appearance."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, dtypes in enumerate(zip(*[[t.dtype for t in ts] for ts in lists], strict=True)):
        if selected[i]:
            groups.setdefault(dtypes, []).append(i)
    return list(groups.values())
