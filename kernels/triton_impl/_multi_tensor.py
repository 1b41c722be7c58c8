"""One launch for many tensors: tables of pointers and sizes, and a map from programs to pieces of tensors.

A launch reads two int64 arrays on the device:

- `rows`: one row of fixed length per tensor, with the addresses, sizes, strides and alignment that the kernel reads;
- `programs`: one entry `tensor << 32 | piece` per program, the piece of a tensor that the program works on. Tensors
  without elements get no program.

The host builds both, uploads them through pinned memory without waiting, and caches them by content. If all tensors
have the addresses of the previous step, nothing is uploaded. If only addresses change, only the rows are uploaded, a
few bytes per tensor.

Under CUDA graph capture, the graph itself uploads a new array. Both copies of the array are then kept forever.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanstep.kernels.steps.common import StepOptions

ALIGNMENT = 16  # bytes: the widest access of one thread
# device memory of cached arrays; beyond it, the least recently used are dropped. M-FAC on 7B parameters needs 113 MiB
_CACHE_BYTES = 256 << 20


@dataclass
class _Upload:
    host: Tensor
    device: Tensor
    event: Any = None
    stream: Any = None


class _UploadCache:
    """Device copies of int64 arrays by content, least recently used first."""

    def __init__(self, capacity: int = _CACHE_BYTES):
        self.capacity = capacity
        self.uploads = 0
        self._cached: OrderedDict[Hashable, _Upload] = OrderedDict()
        self._captured: list[_Upload] = []
        self._bytes = 0
        # optimizers that step during the backward pass run in autograd's threads
        self._lock = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], np.ndarray], device: torch.device) -> Tensor:
        """Return the device copy of `build()`, which must depend on `key` alone."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self._lock:
            upload = self._cached.get((device, key))
            if upload is None:
                return self._add((device, key), _upload(build(), device, capturing), capturing)
            self._cached.move_to_end((device, key))
            if capturing:
                # The graph reads this memory at every replay, even after the cache has dropped it. Replays are ordered
                # after the warm-up, which uploaded it and wrote the tensors it points to.
                self._captured.append(upload)
            elif upload.event is not None:
                _order_after(upload, device)
            return upload.device

    def _add(self, key: Hashable, upload: _Upload, capturing: bool) -> Tensor:
        self.uploads += 1
        if capturing:
            # the array is empty until the graph runs, so eager launches must not get it from the cache
            self._captured.append(upload)
            return upload.device
        self._cached[key] = upload
        self._bytes += upload.device.nbytes
        while self._bytes > self.capacity and len(self._cached) > 1:
            _, dropped = self._cached.popitem(last=False)
            self._bytes -= dropped.device.nbytes
        return upload.device


def _upload(values: np.ndarray, device: torch.device, capturing: bool) -> _Upload:
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64).reshape(-1))
    if device.type != "cuda":
        return _Upload(host, host.to(device))
    pinned = torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=True)
    pinned.copy_(host)
    with torch.cuda.device(device):
        upload = _Upload(pinned, pinned.to(device, non_blocking=True), stream=torch.cuda.current_stream(device))
        if not capturing:
            upload.event = torch.cuda.Event()
            upload.event.record(upload.stream)
    return upload


def _order_after(upload: _Upload, device: torch.device) -> None:
    stream = torch.cuda.current_stream(device)
    if stream != upload.stream:
        stream.wait_event(upload.event)
        upload.device.record_stream(stream)


_uploads = _UploadCache()


def device_rows(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """Upload rows of integers, one per tensor and of equal length, as a flat int64 tensor on `device`."""
    key = tuple(rows)
    return _uploads.get(("rows", key), lambda: np.array(key, dtype=np.int64), device)


def device_programs(pieces: Sequence[int], device: torch.device) -> Tensor | None:
    """Upload the map of a launch with `pieces[i]` programs for tensor i. None if there are no programs."""
    key = tuple(pieces)
    if not any(key):
        return None
    return _uploads.get(("programs", key), lambda: _program_map(key), device)


def _program_map(pieces: tuple[int, ...]) -> np.ndarray:
    counts = np.array(pieces, dtype=np.int64)
    tensor = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    piece = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    return tensor << 32 | piece


def is_aligned(*tensors: Tensor | None) -> bool:
    """Whether each tensor's first element lies on a 16-byte boundary."""
    return all(t is None or t.data_ptr() % ALIGNMENT == 0 for t in tensors)


def has_aligned_rows(mat: Tensor) -> bool:
    """Whether every row of [B, m, n] is dense, starts on a 16-byte boundary and fills whole 8-element accesses."""
    stride_b, stride_m, stride_n = mat.stride()
    return stride_n == 1 and is_aligned(mat) and all(step % 8 == 0 for step in (mat.shape[2], stride_m, stride_b))


def on_device(device: torch.device) -> AbstractContextManager:
    """Context manager that makes `device` current, because Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# programs along the second and the third dimension of a grid; the first takes 2**31 - 1
MOST_PROGRAMS = 65535


def warps(threads: int) -> int:
    """Number of warps of `threads` threads: a warp has 32 on NVIDIA, 64 on AMD's data-centre devices."""
    return threads // (64 if torch.version.hip else 32)


def launches(keys: Sequence[Hashable], pieces: Sequence[int], device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    """Yield (key, map of programs) per launch: one launch per distinct key, `pieces[i]` programs for tensor i."""
    for key in dict.fromkeys(keys):
        programs = device_programs([n * (other == key) for n, other in zip(pieces, keys, strict=True)], device)
        if programs is not None:
            yield key, programs


def seeds_and_offsets(options: StepOptions, count: int) -> tuple[Tensor, Tensor]:
    """The options' seeds and offsets, or zeros for `count` tensors, because kernels always read them."""
    seeds, offsets = options.seeds, options.offsets
    if seeds is None or offsets is None:
        zeros = torch.zeros(count, dtype=torch.int64, device=options.scalars.device)
        return zeros if seeds is None else seeds, zeros if offsets is None else offsets
    return seeds, offsets


def effective_rounding(rounding: str, dtype: torch.dtype) -> str:
    """The rounding of parameters of `dtype`: nearest for fp32; stochastic and split for bf16 only."""
    if dtype == torch.float32 or (rounding in ("stochastic", "split") and dtype != torch.bfloat16):
        return "nearest"
    return rounding


def native_dtype(dtype: torch.dtype, param_dtype: torch.dtype, *besides: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel takes a tensor: its own if the kernel has a variant for it, else fp32 (exact)."""
    native = (param_dtype, torch.float32, *(() if param_dtype == torch.float16 else besides))
    return dtype if dtype in native else torch.float32


class Staging:
    """Copies tensors that a kernel does not take, for their dtype or strides; `finish` writes changed copies back."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._written: list[tuple[Tensor, Tensor]] = []

    def read(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return `tensor` or a contiguous copy in `dtype`. Keep it alive until `finish`: tables hold only addresses."""
        return self.hold(tensor.detach().to(dtype or tensor.dtype).contiguous())

    def hold(self, tensor: Tensor) -> Tensor:
        """Return `tensor` and keep it alive until `finish`."""
        self._alive.append(tensor)
        return tensor

    def write(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Like `read`, for a tensor that the kernel changes in place."""
        staged = self.read(tensor, dtype)
        if staged.data_ptr() != tensor.data_ptr() or staged.dtype != tensor.dtype:
            self._written.append((tensor.detach(), staged))
        return staged

    def rounded(self, param: Tensor, state: Tensor | None, rounding: str) -> tuple[Tensor, Tensor | None, str]:
        """Return the tensor that a kernel updates, its rounding state, and its rounding.

        An fp32 parameter needs no rounding state. Its remainder is added to it. `finish` copies it to its master copy.
        """
        if rounding == "split" and param.dtype != torch.bfloat16:
            return param, None, "nearest"
        if state is not None and param.dtype == torch.float32:
            if rounding == "master":
                self._written.append((state.detach(), param.detach()))
                return param, None, "nearest"
            param.detach().add_(state.detach())
            state.detach().zero_()
            return param, None, "nearest"
        return param, state, effective_rounding(rounding, param.dtype)

    def parameter(
        self, param: Tensor, grad: Tensor, state: Tensor | None, rounding: str
    ) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """Return a parameter, its gradient and its rounding state as kernels take them, and its rounding."""
        param, state, rounding = self.rounded(param, state, rounding)
        param = self.write(param)
        grad = self.read(grad, native_dtype(grad.dtype, param.dtype))
        return param, grad, None if state is None else self.write(state), rounding

    def finish(self) -> None:
        """Write the changed copies back and drop all copies."""
        # in reverse: a master copy may itself have been copied
        for tensor, staged in reversed(self._written):
            tensor.copy_(staged)
        self._written.clear()
        self._alive.clear()
