"""The order of a layer's products by time: both are run on tensors of its shapes, once in a process."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.lora.layers.autograd import Kept, Part, Setting, Weights, layers_backward, project
from leanstep.lora.layers.contraction import LEAST_GAIN, Order

__all__ = ["timed_order"]

_WARM_UP, _REPEATS = 2, 5

# rows (a power of two), widths of input and output, rank, dtype and device; words and numbers only, since torch.compile
# guards a dict with other keys by its length, and would compile again whenever another layer is measured
Case = tuple[int, int, int, int, str, str]
_measured: dict[Case, Order] = {}
_lock = threading.Lock()


def timed_order(x: Tensor, n: int, m: int, r: int) -> Order | None:
    """The order that is faster for an input, each pass by itself; the sum where it saves more than 3 % of the time.

    Measured at the first input of its kind, in 7 forward and 7 backward passes of either order, in turns; the medians
    of 5 count. Kinds differ by rows, n, m, r, dtype and device. Rows are rounded down to a power of two: so nothing
    larger is made than the layer's own pass makes, beside a second weight and its sum, and in doubt the factors win,
    which take less memory.

    Args:
        x: [..., n], fp32 or fp64.
        n, m, r: width of the input, width of the output, rank.

    Returns:
        None where nothing is known of the kind and nothing can be measured: while torch.compile traces, for tensors
        without numbers (fake, meta) and subclasses such as DTensor, under a dispatch mode, in the capture of a CUDA
        graph, without rows.

    Notes:
        Measured is one layer alone with a bias and a weight as ``torch.nn.Linear`` keeps it. No random number is drawn
        from torch's own generators. Processes of a distributed run measure each for itself: their orders may differ,
        and their results by rounding.
    """
    rows = x.numel() // max(1, x.shape[-1])
    bucket = row_bucket(rows)
    case = (bucket, n, m, r, str(x.dtype), str(x.device))
    found = _measured.get(case)
    if found is None and rows > 0 and _can_measure(x):
        # one at a time: two would slow each other down
        with _lock:
            if case not in _measured:
                _measured[case] = _measure(bucket, n, m, r, x.dtype, x.device)
        found = _measured[case]
    return found


def row_bucket(rows: int) -> int:
    """The largest power of two that is not above ``rows``; 1 for 0."""
    bucket = 1
    # a loop, since torch.compile may not know the number
    while 2 * bucket <= rows:
        bucket *= 2
    return bucket


def _can_measure(x: Tensor) -> bool:
    """Whether operations on tensors like x would run, at once, and be seen by nobody."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta":
        return False
    # modes count, record or replay operations, as selective checkpointing does; those of a measurement are no part
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _measure(rows: int, n: int, m: int, r: int, dtype: torch.dtype, device: torch.device) -> Order:
    """Time the passes of :mod:`leanstep.lora.layers.autograd` on random tensors."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=dtype, device=device)
    layer = Weights(random(m, n), random(m), random(r, n), random(m, r))
    x, g = random(rows, n), random(rows, m)
    trained = Weights(*(name in ("a", "b") for name in Weights._fields))  # type: ignore[arg-type]

    def forward(through_sum: bool) -> None:
        project(x, Setting(1.0, order=Order(forward=through_sum)), layer, None)

    def backward(through_sum: bool) -> None:
        setting = Setting(1.0, order=Order(backward=through_sum))
        layers_backward(x, [Part(g, Kept(None, None, None), setting, layer, None, trained)], True)

    passes = [partial(run, through_sum) for run in (forward, backward) for through_sum in (False, True)]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        times = _medians(passes, device)
    return Order(*(summed < (1 - LEAST_GAIN) * split for split, summed in (times[:2], times[2:])))


def _medians(runs: Sequence[Callable[[], None]], device: torch.device) -> list[float]:
    """Seconds of each, run in turns. An accelerator is waited for once, at the end, so that it is never idle."""
    marks = []
    for _ in range(_WARM_UP + _REPEATS):
        for run in runs:
            begin = _mark(device)
            run()
            marks.append((begin, _mark(device)))
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    times = [_between(*pair) for pair in marks]
    return [statistics.median(times[i :: len(runs)][_WARM_UP:]) for i in range(len(runs))]


def _mark(device: torch.device) -> Any:
    """Now: the time on a CPU, else an event after what the device was given to do."""
    if device.type == "cpu":
        return perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
