"""What a step asks of the host on a GPU: launches, uploads, waits and time, for a LLaMA of 7B, without a GPU.

    python benchmarks device/host

Parameters and gradients are meta tensors, so nothing is allocated, and no kernel runs: launches of Triton are counted
and end in a launcher that does nothing. "us per launch" is the host's time in one, compilation left out: Triton's
arguments and cache, not the driver. Operations are torch's on tensors of the device, views and torch.empty left out;
each is a launch or more on a device. Uploads are those of tables of pointers and programs, in a step that finds all
tensors where they were. Reads are numbers of the device that the host waits for; here they are answered with zeros. MiB
is the most memory of a step beside its parameters, gradients and state. Milliseconds are the best of five steps,
without a driver's work; a step that reads has none, because answering takes longer. Products are in bf16, as on a GPU
that has it, and AdamW is torch's fused one. Otherwise meta tensors take the way of a device without CUDA: pinned memory
and streams are not seen.
"""

from __future__ import annotations

import argparse
import os
import time
import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
Step = Callable[[], object]
# dense bf16 of an H100 SXM, by its data sheet
PEAK = 989e12


def main() -> int:
    """Measure each optimizer, and print the table."""
    from leanstep.kernels.matrices.newton_schulz import flops

    PARSER.parse_args()
    rows = [[name, *measured(make)] for name, make in optimizers(*llama()).items()]
    print_table(
        ["optimizer", "launches", "us per launch", "operations", "uploads, step 1", "uploads, step 2", "reads", "MiB",
         "ms"], rows
    )  # fmt: skip
    products = sum(flops(matrix.shape) for matrix in llama()[0])
    print(f"LANTON's polar factors: {products:.2e} operations, {products / PEAK:.2f} s at an H100's 989 TFLOP/s")
    return 0


def llama(layers: int = 32, width: int = 4096, inner: int = 11008, vocabulary: int = 32000) -> tuple[list[Tensor], ...]:
    """Hidden matrices and the other parameters of a LLaMA in bf16, of 7B by default, with gradients."""
    shapes = [*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner)] * layers
    others = [*[(vocabulary, width)] * 2, *[(width,)] * (2 * layers + 1)]
    lists = tuple([torch.nn.Parameter(torch.empty(s, dtype=torch.bfloat16, device="meta")) for s in group]
                  for group in (shapes, others))  # fmt: skip
    for param in lists[0] + lists[1]:
        param.grad = torch.empty_like(param)
    return lists


def optimizers(hidden: list[Tensor], others: list[Tensor]) -> dict[str, Callable[[], Step]]:
    """name -> makes the step."""
    from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD

    params = hidden + others
    embeddings, gains = [p for p in others if p.dim() == 2], [p for p in others if p.dim() == 1]
    routed = [{"params": hidden, "norm": "rms"}, {"params": embeddings, "norm": "sign"},
              {"params": gains, "norm": "vector"}]  # fmt: skip
    return {
        "Lion": lambda: Lion(params, lr=1e-4).step,
        "Lion, int8 momentum": lambda: Lion(params, lr=1e-4, momentum_dtype=torch.int8).step,
        'Lion nonfinite="raise"': lambda: Lion(params, lr=1e-4, nonfinite="raise").step,
        "SinkGD, matrices": lambda: SinkGD(hidden, lr=1e-4, algorithm="sinkgd").step,
        "SinkGD": lambda: (
            SinkGD([{"params": hidden, "algorithm": "sinkgd"}, {"params": others, "algorithm": "adamw"}], lr=1e-4).step
        ),
        "LANTON": lambda: LANTON(routed, lr=1e-4).step,
        "M-FAC, 8 rows": lambda: MFAC(params, lr=1e-4, window=8, damping=1.0).step,
        "torch AdamW foreach": lambda: torch.optim.AdamW(params, foreach=True).step,
        "torch AdamW fused": lambda: torch.optim.AdamW(params, fused=True).step,
    }


class Operations(TorchDispatchMode):
    """Counts operations of torch that launch on the device, and the memory that they take beside `known` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.count = self.bytes = self.most_bytes = 0
        self.storages = {_storage(tensor) for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run."""
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
        on_device = [t for t in tensors if t.device.type == "meta"]
        self.count += bool(on_device) and not func.is_view and func is not torch.ops.aten.empty.memory_format
        for storage in {
            _storage(t): t.untyped_storage() for t in on_device if _storage(t) not in self.storages
        }.values():
            self._add(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._add, storage._cdata, -storage.nbytes())
        return result

    def _add(self, storage: int, size: int) -> None:
        (self.storages.add if size >= 0 else self.storages.discard)(storage)
        self.bytes += size
        self.most_bytes = max(self.most_bytes, self.bytes)


class Reads(TorchDispatchMode):
    """Answers the host's reads of the device with zeros, and counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer, or run."""
        named, source = kwargs or {}, args[0] if args else None
        if isinstance(source, Tensor) and source.device.type == "meta":
            copies = func is torch.ops.aten._to_copy.default and torch.device(named.get("device", "meta")).type == "cpu"
            if copies or func is torch.ops.aten._local_scalar_dense.default:
                self.count += 1
                zeros = torch.zeros(source.shape, dtype=named.get("dtype") or source.dtype)
                return zeros if copies else zeros.item()
        return func(*args, **named)


class NullDriver:
    """A device for Triton whose launcher does nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 232_448}
    )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from leanstep.kernels.triton_impl._compile import TARGETS

        answers = {"get_current_target": TARGETS["sm_90"], "launcher_cls": lambda *_: None}
        return lambda *_: answers.get(name, 0)


def _storage(tensor: Tensor) -> int:
    """A number of a tensor's memory."""
    return tensor.untyped_storage()._cdata


def measured(make: Callable[[], Step], repeats: int = 5) -> list[object]:
    """The cells of a row after the name."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from leanstep.kernels.triton_impl import _compile
    from leanstep.kernels.triton_impl._multi_tensor import _UploadCache

    # import Triton and the kernels before the variable below is set, which would give them the interpreter
    _compile.modules()
    launches: list[float] = []
    run, cache = JITFunction.run, _UploadCache()

    def launch(kernel: Any, *arguments: Any, **named: Any) -> None:
        begin = time.perf_counter()
        run(kernel, *arguments, **named)
        launches.append(time.perf_counter() - begin)

    # read when an operation chooses its backend
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
        mock.patch.object(driver, "_active", NullDriver()),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch("leanstep.kernels.triton_impl._multi_tensor._uploads", cache),
        mock.patch("leanstep.kernels.matrices.newton_schulz.compute_dtype", lambda dtype, _: dtype or torch.bfloat16),
        mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: ["meta"]),
        mock.patch("leanstep.optimizers.sinkgd.adamw._get_fused_kernels_supported_devices", lambda: ["meta"]),
    ):
        step = make()
        with Reads() as reads:
            step()
            first, reads.count = cache.uploads, 0
            launches.clear()
            with Operations(tensors_of(step)) as operations:
                step()
        uploads, count, best = cache.uploads - first, len(launches), float("inf")
        if reads.count:
            repeats = 0
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            best = min(best, time.perf_counter() - begin)
    per_launch = f"{1e6 * min(launches):.0f}" if launches else "-"
    milliseconds = f"{1000 * best:.1f}" if repeats else "-"
    memory = f"{operations.most_bytes / 2**20:.0f}"
    return [count, per_launch, operations.count, first, uploads, reads.count, memory, milliseconds]


def tensors_of(step: Step) -> list[Tensor]:
    """Parameters, gradients and state on the device, of a step that was run before."""
    optimizer = step.__self__  # type: ignore[attr-defined]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [t for entries in optimizer.state.values() for t in entries.values() if isinstance(t, Tensor)]
    return [t for t in [*params, *(p.grad for p in params), *state] if t.device.type == "meta"]
