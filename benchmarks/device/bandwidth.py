"""Steps and elementwise operations as fractions of the bandwidth of a device copy.

    python benchmarks device/bandwidth [--dry-run] [--out FOLDER]

"GB moved" is what an operation must read and write: Lion reads p, g, m and its rounding state and writes all but g; a
pass of SinkGD reads G; its update reads G and W and writes W. "of a copy" is that over the time, divided by the same of
one copy that moves as many bytes as the parameters and back: 1 is the speed of the copy. Times are the device's, with a
cold L2 cache, interleaved, medians. Parameters and gradients are random, the lists those of the recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from events import Timer
from models import llama_parameters
from stages import Cases, Row, Stage, run_stage, stage_parser
from torch import Tensor

from leanstep.kernels import (
    StepOptions,
    lion_agreement,
    lion_step,
    lora_dropout,
    lora_scale_,
    lora_scale_backward,
    nm_apply,
    nm_mask,
    scaled_step,
    sinkhorn,
    sinkhorn_step,
    swiglu,
    swiglu_backward_,
)
from leanstep.optimizers import SinkGD
from leanstep.recipes.config.loader import load

PARSER = stage_parser(__doc__)
FULL = {"recipes": ("llama-60m-sinkgd", "llama-1b-sinkgd"), "tokens": 8192, "width": 8192, "rounds": 15}
DRY = {"recipes": ("llama-nano-sinkgd",), "tokens": 16, "width": 64, "rounds": 1}
# operation, and the bytes it must move
Runs = dict[str, tuple[Callable[[], Any], int]]


def main() -> int:
    """Measure, and print the table."""
    return run_stage("bandwidth", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per parameter list, and one of activations."""
    cases = {f"{name}, bf16": partial(measure, stage, name, partial(steps, name)) for name in stage.sizes.recipes}
    name = f"{stage.sizes.tokens} x {stage.sizes.width}, bf16"
    return cases | {name: partial(measure, stage, name, activations)}


def measure(stage: Stage, name: str, runs_of: Callable[[Stage], tuple[Runs, int]]) -> list[Row]:
    """Time all operations beside a copy."""
    runs, size = runs_of(stage)
    source = torch.zeros(size, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    runs["copy"] = (lambda: target.copy_(source), 2 * size)
    medians = Timer(stage.device).medians({operation: run for operation, (run, _) in runs.items()}, stage.sizes.rounds)
    speed = {operation: moved / medians[operation] for operation, (_, moved) in runs.items()}
    return [
        {
            "tensors": name,
            "operation": operation,
            "ms": 1e3 * medians[operation],
            "GB moved": moved / 1e9,
            "GB/s": speed[operation] / 1e9,
            "of a copy": speed[operation] / speed["copy"],
        }
        for operation, (_, moved) in runs.items()
    ]


def steps(name: str, stage: Stage) -> tuple[Runs, int]:
    """The steps on a recipe's parameters in bf16, and the bytes of the parameters."""
    sizes = {"vocab_size": 2048} | dict(load(name, []).model.config)
    hidden, others = llama_parameters(sizes, torch.bfloat16, stage.device)
    params: list[Tensor] = hidden + others
    grads, momenta = [p.grad for p in params], [torch.zeros_like(p) for p in params]
    numbers = torch.tensor([1e-6, 1.0, 0.9, 0.1, 0.99, 0.01], device=stage.device)
    count = torch.arange(len(params), device=stage.device)
    runs: Runs = {}
    states: dict[str, list[Tensor]] = {
        "nearest": [], "stochastic": [], "kahan": [torch.zeros_like(p) for p in params],
        "master": [p.detach().float() for p in params],
        "split": [torch.zeros_like(p, dtype=torch.int8) for p in params],
    }  # fmt: skip
    for rounding, state in states.items():
        options = StepOptions(numbers, rounding, seeds=count, offsets=torch.zeros_like(count))
        step = partial(lion_step, params, grads, momenta, state, options)
        runs[f"Lion, {rounding}"] = (step, 2 * size_of(params, momenta, state) + size_of(grads))
    runs["Lion, agreement"] = (partial(lion_agreement, grads, momenta, StepOptions(numbers)), size_of(grads, momenta))
    mats, matrix_options = [p.grad for p in hidden], StepOptions(numbers[:2].clone())
    scales, size = sinkhorn(mats, 1), size_of(mats)
    runs["SinkGD, one pass"] = (partial(sinkhorn, mats, 1), size)
    update = partial(scaled_step, hidden, mats, scales.rows, scales.cols, [], matrix_options)
    runs["SinkGD, update"] = (update, 3 * size)
    whole = partial(sinkhorn_step, hidden, mats, [], matrix_options, num_iters=5)
    runs["SinkGD, five passes and the update"] = (whole, 8 * size)
    fallback = SinkGD(others, algorithm="adamw", lr=1e-6)
    runs["SinkGD's AdamW on embedding, head, norms"] = (fallback.step, 7 * size_of(others))
    return runs, size_of(params)


def activations(stage: Stage) -> tuple[Runs, int]:
    """The elementwise operations on matrices of activations or weights, and the bytes of one."""
    shape = stage.sizes.tokens, stage.sizes.width
    x, y, z, weight = (torch.randn(shape, dtype=torch.bfloat16, device=stage.device) for _ in range(4))
    factors, alpha = torch.ones(shape[1], device=stage.device), torch.tensor(0.5, device=stage.device)
    masks = nm_mask([weight], 2, 4)
    size, mask_size = size_of([x]), size_of(masks)
    return {
        "SwiGLU": (lambda: swiglu(x, y), 3 * size),
        "SwiGLU, backward": (lambda: swiglu_backward_(z, x, y), 6 * size),
        "DoRA's factor": (lambda: lora_scale_(z, factors), 2 * size),
        "DoRA's factor, backward": (lambda: lora_scale_backward(x, y, factors), 3 * size),
        "dropout from a seed": (lambda: lora_dropout(x, 0.1, torch.tensor(1)), 2 * size),
        "2:4 mask": (lambda: nm_mask([weight], 2, 4, out=masks), size + mask_size),
        "1:32 mask": (lambda: nm_mask([weight], 1, 32, out=masks), size + mask_size),
        "masked weight": (lambda: nm_apply(weight, masks[0], alpha), 2 * size + mask_size),
    }, size


def size_of(*lists: Sequence[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensors in lists for tensor in tensors)
