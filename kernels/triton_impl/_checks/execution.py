"""Execute compiled kernels on the CPU, by ttsem on Triton's intermediate code (TTIR): results, accesses, races.

The operations of `operations.py` run on inputs that need several programs of a kernel. Their kernels are not
interpreted: the TTIR compiled for a target is executed. ttsem raises at the first access outside of the launch's
tensors, at two programs that meet in one element, and at an operation without a result. The results are compared with
the definition's, as `results.py` says. A table of pointers is given to it with the memory behind its addresses.

ttsem 0.1.0 asks for Python 3.12 or newer and names Triton 3.8 as the only version that it was tried with; its code also
runs on Python 3.11 and Triton 3.9.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from leanstep.kernels.triton_impl._checks import races
from leanstep.kernels.triton_impl._checks.races import NOT_COVERED, Proof

VERSION, RUNG = "0.1.0", "ttir"
RIGHT, WRONG = "right", "wrong"


def missing() -> str:
    """Why no kernel can be executed here, in one line; empty if ttsem is installed in the version in use."""
    reason = races.other_version("ttsem", VERSION)
    return reason and f"{reason}, which needs Python 3.12 or newer"


def execute(name: str, target: str) -> list[Proof]:
    """Run an operation: a verdict for each configuration of a kernel that it launched."""
    from triton.runtime.driver import driver
    from ttsem import _fakedriver, harness, sanitize

    from leanstep.kernels.triton_impl import _compile
    from leanstep.kernels.triton_impl._checks.results import compare_small

    # records launches, and imports the kernels before the variable below is set, which would give them the interpreter
    cases = _compile.cases()
    record_launch, memory_type, tables = harness.record_launch, harness.Memory, Tables()
    launched: dict[tuple[str, str], int] = {}

    def record(kernel: Any, arguments: Any, settings: Mapping[str, Any], *rest: Any) -> Any:
        recorded = record_launch(kernel, arguments, settings, *rest)
        tables.read(recorded.record)
        label = label_of(kernel, recorded.record.bound, settings, cases)
        launched[kernel.__name__, label] = launched.get((kernel.__name__, label), 0) + 1
        return recorded

    def memory() -> Any:
        made = memory_type()
        for address, size in tables.storages:
            made.register(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))
        return made

    reason = ""
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(torch.Tensor, "data_ptr", tables.data_ptr),
        mock.patch.object(harness, "record_launch", record),
        mock.patch.object(harness, "Memory", memory),
        # ttsem leaves a driver without a device, and answers of torch.cuda
        mock.patch.object(driver, "_active", driver._active),
    ):
        try:
            with sanitize.session(cc=int(target.removeprefix("sm_")), cuda_is_cpu=False) as session:
                verdict = RIGHT if compare_small(name)["ok"] else WRONG
            if verdict == WRONG:
                reason = "results differ from the definition's"
            elif session.races_unchecked:
                verdict, reason = NOT_COVERED, f"{session.races_unchecked} launches without a check for races"
        except sanitize.KernelFault as fault:
            verdict, reason = WRONG, str(fault).partition(". A GPU run")[0]
        except sanitize.Unjudged as stop:
            verdict, reason = NOT_COVERED, str(stop)
        finally:
            _fakedriver.unstub_torch_cuda()
    return [
        Proof(kernel=kernel, label=label, target=target, rung=RUNG, verdict=verdict,
              reason=f"{name}, {count} launches" + f": {reason}" * bool(reason))
        for (kernel, label), count in launched.items()
    ]  # fmt: skip


def merged(executed: Sequence[Proof], cases: Sequence[tuple[Any, ...]], targets: Sequence[str]) -> list[Proof]:
    """One proof per configuration: of the cases, (index, kernel, label, module), and of others that are not right."""
    groups: dict[tuple[str, str, str], list[Proof]] = {
        (kernel, label, target): [] for _, kernel, label, _ in cases for target in targets
    }
    for proof in executed:
        name = proof.kernel, proof.label, proof.target
        if name in groups or proof.verdict != RIGHT:
            groups.setdefault(name, []).append(proof)
    proofs = []
    for (kernel, label, target), group in groups.items():
        verdict = min((proof.verdict for proof in group), key=(WRONG, NOT_COVERED, RIGHT).index, default=NOT_COVERED)
        reason = "; ".join(proof.reason for proof in group if proof.verdict == verdict)
        proofs.append(
            Proof(kernel=kernel, label=label, target=target, rung=RUNG, verdict=verdict,
                  reason=reason or "no operation of the check launches it")
        )  # fmt: skip
    return proofs


def label_of(kernel: Any, bound: Mapping[str, Any], settings: Mapping[str, Any], cases: Sequence[Any]) -> str:
    """The configuration of a launch in words; empty if the audit has none like it."""
    from leanstep.kernels.triton_impl import _compile

    compiled = _compile.configuration(kernel, bound, settings["num_warps"], settings["enable_fp_fusion"])
    alike = (case for case in cases if all(getattr(case, field) == value for field, value in compiled.items()))
    return next((str(case.label) for case in alike), "")


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
