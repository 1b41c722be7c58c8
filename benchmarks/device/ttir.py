"""Triton's intermediate code of every kernel, executed on a CPU: results, accesses, and races between programs.

    python benchmarks device/ttir [OPERATION ...]

The operations are those of `device/kernels`, with inputs of `device/planted`, which need several programs of a kernel.
The kernels are not interpreted: their TTIR, as compiled for sm_90, is executed by ttsem, which raises at the first
access outside of the launch's tensors, at two programs that meet in one element, and at an operation without a result.
The results are compared with the definition's. A table of pointers is given to it with the memory behind its addresses.
ttsem 0.1.0 asks for Python 3.12 or newer and names Triton 3.8 as the only version that it was tried with; its code also
runs on Python 3.11 and Triton 3.9.

The exit code is 0 if all are right, 1 for a fault or a wrong result, 3 if an operation is not covered, and 2 where
ttsem is absent or has another version.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import print_table

VERSION = "0.1.0"
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("operations", nargs="*", metavar="OPERATION", help="only these, such as swiglu")
RIGHT, WRONG, NOT_COVERED = "right", "wrong", "not covered"


def main() -> int:
    """Execute, and print the table."""
    from device.kernels import OPERATIONS

    options = PARSER.parse_args()
    if unknown := set(options.operations) - set(OPERATIONS):
        PARSER.error(f"expected operations of {list(OPERATIONS)}, got {sorted(unknown)}")
    try:
        installed = version("ttsem")
    except PackageNotFoundError:
        installed = "none"
    if installed != VERSION:
        print(f"expected ttsem {VERSION}, found {installed}; nothing is executed; pip install ttsem=={VERSION}")
        return 2
    rows = [[name, *executed(name)] for name in options.operations or OPERATIONS]
    print_table(["operation", "kernels", "launches", "verdict", "reason"], rows)
    verdicts = [row[3] for row in rows]
    return 1 if WRONG in verdicts else 3 if NOT_COVERED in verdicts else 0


def executed(name: str) -> list[Any]:
    """The kernels of an operation, how often they were launched, the verdict and its reason."""
    from stages import Stage
    from ttsem import harness, sanitize

    from leanstep.kernels.triton_impl import _compile

    # import the kernels before the variable below is set, which would give them the interpreter
    _compile.modules()
    from device import kernels
    from device.planted import SIZES

    dtypes = kernels.OPERATIONS[name].dtypes
    dtype = torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]
    stage = Stage(torch.device("cpu"), SimpleNamespace(**kernels.DRY | SIZES), dry_run=True, out=None, end=math.inf)
    record_launch, memory_type, tables = harness.record_launch, harness.Memory, Tables()

    def record(*arguments: Any) -> Any:
        recorded = record_launch(*arguments)
        tables.read(recorded.record)
        return recorded

    def memory() -> Any:
        made = memory_type()
        for address, size in tables.storages:
            made.register(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))
        return made

    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(torch.Tensor, "data_ptr", tables.data_ptr),
        mock.patch.object(harness, "record_launch", record),
        mock.patch.object(harness, "Memory", memory),
    ):
        try:
            with sanitize.session(cuda_is_cpu=False) as session:
                row = kernels.compare(stage, name, dtype)[0]
        except sanitize.KernelFault as fault:
            return [fault.fault.kernel, "-", WRONG, str(fault).partition(". A GPU run")[0]]
        except sanitize.Unjudged as stop:
            return ["-", "-", NOT_COVERED, str(stop)]
    unchecked = f"{session.races_unchecked} launches without a check for races" * bool(session.races_unchecked)
    verdict = WRONG if not row["ok"] else NOT_COVERED if unchecked else RIGHT
    return [row["kernels"], session.launches, verdict, unchecked]


class Tables:
    """The memory behind the addresses in a launch's tables: storages of tensors that were asked for their address."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, int]] = {}
        self.storages: set[tuple[int, int]] = set()
        ask = torch.Tensor.data_ptr

        def data_ptr(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            self.seen[ask(tensor)] = storage.data_ptr(), storage.nbytes()
            return ask(tensor)

        self.data_ptr = data_ptr

    def read(self, record: Any) -> None:
        """Note the storages behind the integers of a launch's tensors that are not storages of its arguments."""
        tensors = [value for value in record.bound.values() if isinstance(value, torch.Tensor)]
        numbers = {n for t in tensors if t.dtype == torch.int64 for n in t.flatten().tolist()}
        behind = {storage for number in numbers for storage in self._of(number)}
        self.storages = {storage for storage in behind if storage[0] not in record.bases.values()}

    def _of(self, number: int) -> list[tuple[int, int]]:
        if number in self.seen:
            return [self.seen[number]]
        # an address inside of a tensor; sizes and counts are small
        inside = [(first, size) for first, size in self.seen.values() if first < number < first + size]
        return inside[-1:] if number > 2**32 else []
