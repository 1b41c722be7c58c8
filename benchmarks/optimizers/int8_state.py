"""Steps with averages in 8 bits beside averages in the parameters' dtype, and peers; one process, interleaved.

    python benchmarks optimizers/int8_state [--device cuda] [--dtype bfloat16] [--threads 1] [--rounds 10] [--cpu-time]
        [--methods Lion AdamW]

Square matrices with gradients of root mean square 0.001; medians, and bytes of state per parameter after a step. SinkGD
has momentum and LANTON noise from successive gradients. The 8-bit optimizers of bitsandbytes and torchao are measured
where they are installed; torchao compiles its step first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from common import Clock, clock_of, command_line, interleaved_medians, print_table, start
from models import tensors_of

from leanstep.optimizers import LANTON, Lion, SinkGD

# name -> (class, settings, settings of the dtypes)
METHODS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "Lion": (Lion, {}, ("momentum_dtype",)),
    "AdamW": (SinkGD, {"algorithm": "adamw"}, ("momentum_dtype",)),
    "SinkGD": (SinkGD, {"algorithm": "sinkgd", "momentum": 0.9, "nesterov": True}, ("momentum_dtype",)),
    "LANTON": (LANTON, {"norm": "rms"}, ("momentum_dtype", "noise_dtype")),
}
# name -> (module, class, the method that it is a form of)
PEERS = {
    "bitsandbytes Lion8bit": ("bitsandbytes.optim", "Lion8bit", "Lion"),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", "AdamW"),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", "AdamW"),
}
PARSER = command_line(
    __doc__, device="cpu", dtype=["float32", "bfloat16"], threads=0, rounds=10, size=1024, matrices=4,
    cpu_time=(False, "measure processor time"),
)  # fmt: skip
PARSER.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)


def parameters(dtype: torch.dtype, device: str, size: int, matrices: int) -> list[torch.nn.Parameter]:
    """Return matrices with gradients."""
    params = [torch.nn.Parameter(torch.randn(size, size, device=device, dtype=dtype)) for _ in range(matrices)]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)  # the check for non-finite entries is shorter below 2
    return params


def stepped(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> tuple[Callable[[], Any], float]:
    """Step once; return the step, and the bytes of state per parameter."""
    optimizer.step()
    tensors = tensors_of(optimizer.state_dict()["state"])
    size = sum(t.untyped_storage().nbytes() if type(t) is torch.Tensor else _bytes(t) for t in tensors)
    return optimizer.step, size / sum(p.numel() for p in params)


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensors inside a tensor subclass, such as torchao's codes with their scales."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(getattr(tensor, name).untyped_storage().nbytes() for name in names)


def measure(dtype: str, rounds: int, device: str, size: int, matrices: int, clock: Clock, methods: list[str]) -> None:
    """Print one table."""
    runs, state_bytes = {}, {}

    def add(key: Any, cls: Any, settings: dict[str, Any]) -> None:
        params = parameters(getattr(torch, dtype), device, size, matrices)
        runs[key], state_bytes[key] = stepped(cls(params, lr=1e-6, **settings), params)

    for name in methods:
        cls, settings, dtypes = METHODS[name]
        for state in (None, torch.int8, torch.float8_e4m3fn):
            add((name, state), cls, {**settings, **dict.fromkeys(dtypes, state)})
    for name, (module, cls_name, method) in PEERS.items():
        if method not in methods:
            continue
        try:
            peer = getattr(importlib.import_module(module), cls_name)
        except ImportError:
            print(f"{name} is not installed", flush=True)
            continue
        add((name, torch.int8), peer, {})
    medians = interleaved_medians(runs, rounds, clock=clock, warmup=2)

    def cells(key: Any) -> tuple[str, str]:
        return (f"{state_bytes[key]:.2f}", f"{medians[key] * 1e3:.1f}") if key in medians else ("", "")

    def row(name: str, state: torch.dtype, method: str) -> list[str]:
        ratio = medians[name, state] / medians[method, None]
        label = name if name in PEERS else f"leanstep {name}, {'int8' if state == torch.int8 else 'fp8'}"
        return [label, *cells((name, None)), *cells((name, state)), f"{ratio:.2f}"]

    rows = [row(name, state, method) for method in methods for name, state in runs if state is not None
            if method == (PEERS[name][2] if name in PEERS else name)]  # fmt: skip
    print()
    head = [
        "bytes per parameter",
        "median ms",
        "8 bits, bytes per parameter",
        "8 bits, median ms",
        "8 bits ÷ leanstep, dtype",
    ]
    print_table([dtype, *head], rows)


def main() -> None:
    """Measure, and print the tables."""
    options = start(PARSER)
    for name in options.dtype:
        measure(
            name, options.rounds, options.device, options.size, options.matrices, clock_of(options), options.methods
        )  # fmt: skip


if __name__ == "__main__":
    main()
