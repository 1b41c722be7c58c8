"""Kernels that a wheel carries: which there are, for which processors, and where. Imports the standard library only.

A wheel cannot be built for the reader's processor. It has each kernel once per level, a set of instructions that many
processors share, and :func:`levels` gives those of this one, best first. ``prebuilt.json`` lists the combinations of
macros that ordinary use reaches; for any other, the compiler is needed. ``_wheel.py`` builds them.

The folder of the libraries is named by a digest of the sources, so that libraries of other sources are never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp")

Macros = Mapping[str, str | int]


class Level(NamedTuple):
    """A set of instructions.

    Attributes:
        name: of its folder.
        flags: for the compiler.
        features: that /proc/cpuinfo names on a processor which has the instructions.
        only: how the names of kernels that are built for this level begin; the others gain nothing. None: all.
    """

    name: str
    flags: tuple[str, ...]
    features: frozenset[str]
    only: tuple[str, ...] | None = None


_V3 = frozenset(("avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"))
_V4 = _V3 | frozenset(("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"))
# by default, compilers use only half of each AVX-512 vector, which halves the speed of 16-bit loops
_WIDE = "-mprefer-vector-width=512"

# value of torch's switch ATEN_CPU_CAPABILITY -> how the names of features begin that kernels do not use then
_UNUSED = {"avx2": ("avx512", "amx"), "default": ("avx", "fma", "f16c")}

# machine -> its levels, best first
LEVELS: dict[str, tuple[Level, ...]] = {
    "x86_64": (
        Level(
            "x86-64-v4-bf16",
            ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mavx512bf16", _WIDE),
            _V4 | {"avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16"},
            only=("sparse/", "steps/lion_int8", "steps/average_int8"),
        ),
        Level("x86-64-v4", ("-march=x86-64-v4", _WIDE), _V4),
        Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
    ),
    "aarch64": (Level("armv8-a", ("-march=armv8-a",), frozenset({"asimd"})),),
}


def variants() -> Iterator[tuple[str, dict[str, str | int]]]:
    """Yield (kernel, macros) of every library of a wheel, without doubles."""
    listed = json.loads((SOURCES / "prebuilt.json").read_text("utf-8"))
    for kernel, blocks in listed.items():
        yielded = set()
        for block in blocks:
            for values in itertools.product(*block.values()):
                macros = dict(zip(block, values, strict=True))
                if (name := file_name(kernel, macros)) not in yielded:
                    yielded.add(name)
                    yield kernel, macros


def file_name(kernel: str, macros: Macros) -> str:
    """Name the library of a kernel compiled with these macros."""
    return "-".join([kernel.replace("/", "-"), *(f"{key}_{value}" for key, value in sorted(macros.items()))]) + ".so"


@functools.cache
def folder() -> Path:
    """Return the folder of the libraries of these sources, whether or not it exists."""
    digest = hashlib.sha256("\0".join((*FLAGS, sources())).encode()).hexdigest()
    return SOURCES / "prebuilt" / digest[:16]


@functools.cache
def sources() -> str:
    """Return the text of all C++ files."""
    return "\0".join(p.read_text("utf-8") for p in sorted((*SOURCES.rglob("*.cpp"), *SOURCES.glob("*.h"))))


def held_to() -> str:
    """Return "avx2" or "default" where ATEN_CPU_CAPABILITY holds torch, and so the kernels, to these instructions."""
    name = os.environ.get("ATEN_CPU_CAPABILITY", "")
    return name if name in _UNUSED else ""


@functools.cache
def levels() -> tuple[Level, ...]:
    """Return the levels of this processor that kernels may use, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    return levels_of(platform.machine(), lines, held_to())


def levels_of(machine: str, cpuinfo: list[str], held: str = "") -> tuple[Level, ...]:
    """Return the levels of a processor, best first, from the lines of its /proc/cpuinfo and :func:`held_to`."""
    named = (line.partition(":")[2].split() for line in cpuinfo if line.startswith(("flags", "Features")))
    features = frozenset(name for name in next(named, []) if not name.startswith(_UNUSED.get(held, ())))
    return tuple(level for level in LEVELS.get(machine, ()) if level.features <= features)


@functools.cache
def installed_levels() -> list[tuple[str, int]]:
    """Return, for each level of this processor, best first, its name and the number of its libraries, if it has any."""
    counts = ((level.name, len(list((folder() / level.name).glob("*.so")))) for level in levels())
    return [(name, count) for name, count in counts if count]


def find(kernel: str, macros: Macros) -> list[Path]:
    """Return the libraries of a kernel that this processor can run, best first."""
    name, home = file_name(kernel, macros), folder()
    paths = (home / level.name / name for level in levels())
    return [path for path in paths if path.is_file()]
