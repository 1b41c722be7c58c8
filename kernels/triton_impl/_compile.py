"""Compiling a kernel for a named target on a machine without one, and taking the result apart.

Everything the audit needs from Triton is here, so that `leanstep.kernels.audit` itself imports without it.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True, kw_only=True)
class AuditCase:
    """One configuration of one kernel, as its launcher would ask for it.

    `elements` is the number of elements that one turn of the main loop handles; `read` and `written` are the bytes per
    element that the launcher's docstring promises; `sweeps` is how often the loop body of such a tile is entered with
    data that is in the cache already (it reads no memory then). `wide` promises 128-bit accesses in the main loop.
    """

    kernel: Any
    label: str
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    threads: int
    fp_fusion: bool
    elements: int
    read: float
    written: float
    wide: bool


def pointer(dtype: str) -> str:
    """Signature of a pointer argument that comes from a torch allocation."""
    return "*" + dtype
