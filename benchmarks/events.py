"""Times on a device: events around the work, a cold L2 cache, and a host that is ahead of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Runs, interleaved, timed

# cycles per second of torch.cuda._sleep, at least: a device with slower clocks waits longer, which does no harm
_CYCLES = 2.5e9
_LONGEST_WAIT_S = 0.1


class Timer:
    """Measures calls on a device. On a CPU, seconds of the wall clock.

    Before every measured call the L2 cache is overwritten, and the device is kept busy for as long as the host took to
    enqueue the call the last time. So the events enclose the work of the device and no gaps in which it waits for
    Python; :meth:`host_medians` has these.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enqueue_s: dict[int, float] = {}
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self.flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of the device for one call."""
        if self.device.type != "cuda":
            return timed(run)[0]
        begin, end = self.events
        self.flush.zero_()
        wait = min(1.5 * self.enqueue_s.get(id(run), 0.0), _LONGEST_WAIT_S)
        torch.cuda._sleep(int(wait * _CYCLES))
        begin.record()
        started = time.perf_counter()
        run()
        self.enqueue_s[id(run)] = time.perf_counter() - started
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, runs: Runs, rounds: int) -> dict[str, float]:
        """Median seconds of the device for every run, interleaved, after two rounds of warm-up."""
        results = interleaved({name: lambda run=run: self.seconds(run) for name, run in runs.items()}, rounds, warmup=2)
        return {name: statistics.median(values) for name, values in results.items()}

    def host_medians(self, runs: Runs, rounds: int) -> dict[str, float]:
        """Median seconds of the wall clock from an idle device to an idle device, interleaved, after one round."""
        results = interleaved({name: lambda run=run: timed(run)[0] for name, run in runs.items()}, rounds)
        return {name: statistics.median(values) for name, values in results.items()}


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Bytes that a call allocates at most beyond what was allocated before. 0 on a CPU."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
