"""Optimizer steps captured in a CUDA graph beside eager ones, and torch.compile of model and step.

    python benchmarks device/graphs [--dry-run] [--out FOLDER]

Captured: every optimizer of the test suite's battery (tests/helpers/optimizer_cases.py) takes two eager steps, is
captured, and replays the graph with new gradients; a second one takes the same steps eagerly. "same bits" compares
parameters and state. "ms" are of an eager step and of a replay. An optimizer that waits for the host cannot be
captured: the note says where. Compiled: a LLaMA of two layers and the optimizer's step by torch.compile, losses beside
the eager run's. On the CPU, where there are no graphs, the dry run calls the step instead, and compiles by the backend
"eager".
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from events import Timer
from models import random_llama, tensors_of
from stages import ROOT, Cases, Row, Stage, describe, is_device_lost, run_stage, stage_parser

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, param_groups

sys.path.append(str(ROOT / "tests" / "helpers"))
import optimizer_cases as battery  # noqa: E402

PARSER = stage_parser(__doc__)
COMPILED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]], lr=1e-3),
    "Lion": partial(Lion, lr=1e-4),
    "SinkGD": partial(SinkGD, lr=1e-3),
    "LANTON": partial(LANTON, lr=1e-3),
    "MFAC": partial(MFAC, lr=1e-3, window=4, damping=1.0),
}
SHAPES = ((1024, 1024), (1376, 512), (33, 70), (5, 3), (64,), (7,))
FULL = {"shapes": SHAPES, "replays": 4, "rounds": 9, "hidden": 512, "mlp": 1376, "length": 256, "backend": "inductor",
        "variants": battery.CASES, "compiled": tuple(COMPILED)}  # fmt: skip
DRY = {"shapes": ((6, 5), (7,)), "replays": 1, "rounds": 1, "hidden": 16, "mlp": 24, "length": 8, "backend": "eager",
       "variants": tuple({case.cls: case for case in battery.CASES}.values()), "compiled": ("Lion",)}  # fmt: skip
STEPS = 5


def main() -> int:
    """Compare, and print the table."""
    return run_stage("graphs", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per optimizer."""
    captured = {f"captured {case.name}": partial(compare_captured, stage, case) for case in stage.sizes.variants}
    return captured | {f"compiled {name}": partial(compare_compiled, stage, name) for name in stage.sizes.compiled}


def compare_captured(stage: Stage, case: battery.OptimizerCase) -> list[Row]:
    """Replay the captured step beside the eager one."""
    sets = [[p.detach().to(stage.device).requires_grad_() for p in case.params(stage.sizes.shapes)] for _ in range(2)]
    captured, eager = (case.build(params) for params in sets)
    row = {"how": "captured", "optimizer": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    for step in range(2):
        for params, optimizer in zip(sets, (captured, eager), strict=True):
            fill_grads(params, step)
            optimizer.step()
    try:
        replay = capture(stage, captured.step)
    except RuntimeError as error:
        if is_device_lost(error) and "captur" not in str(error):
            raise
        # M-FAC asks the device for numbers in every step, as its page says
        verdict = {} if case.cls is MFAC else {"ok": False}
        return [row | verdict | {"note": f"not captured: {describe(error)}"}]
    for step in range(2, 2 + stage.sizes.replays):
        for params, run in zip(sets, (replay, eager.step), strict=True):
            fill_grads(params, step)
            run()
    pairs = zip(*(state_of(*pair) for pair in zip(sets, (captured, eager), strict=True)), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    medians = Timer(stage.device).host_medians({"eager": eager.step, "captured": replay}, stage.sizes.rounds)
    times = {f"{name} ms": 1e3 * seconds for name, seconds in medians.items()}
    return [row | {"same bits": same, **times, "ok": same}]


def capture(stage: Stage, step: Callable[[], Any]) -> Callable[[], Any]:
    """A graph's replay in place of a step; the first replay is the first step. On a CPU, the step itself."""
    if stage.device.type != "cuda":
        return step
    torch.cuda.synchronize(stage.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def fill_grads(params: list[torch.Tensor], step: int) -> None:
    """New gradients, at the addresses of the first."""
    host = [torch.empty(p.shape, dtype=p.dtype, requires_grad=True) for p in params]
    battery.fill_grads(host, step)
    for param, source in zip(params, host, strict=True):
        assert source.grad is not None
        if param.grad is None:
            param.grad = source.grad.to(param.device)
        else:
            param.grad.copy_(source.grad)


def state_of(params: list[torch.Tensor], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and all tensors of the state."""
    state = [tensor for param in params for tensor in tensors_of(dict(optimizer.state.get(param, {})))]
    return [tensor.detach().cpu().clone() for tensor in (*params, *state)]


def compare_compiled(stage: Stage, name: str) -> list[Row]:
    """Train a small LLaMA eagerly and compiled, on the same tokens."""
    sizes = stage.sizes
    warnings.simplefilter("ignore")
    ids = torch.randint(512, (4, sizes.length), generator=torch.Generator().manual_seed(0)).to(stage.device)
    runs, losses = {}, {}
    for how in ("eager", "compiled"):
        model = random_llama(sizes.hidden, sizes.mlp, 2, sizes.length).to(stage.device)
        optimizer = COMPILED[name](param_groups(model))
        torch._dynamo.reset()
        forward, step = model, optimizer.step
        if how == "compiled":
            forward = torch.compile(model, backend=sizes.backend)
            # the steps of this package are one graph each: a break is an error
            step = torch.compile(optimizer.step, backend=sizes.backend, fullgraph=name != "AdamW")
        runs[how] = partial(train, forward, optimizer, step, ids)
        losses[how] = torch.stack([runs[how]() for _ in range(STEPS)]).double().cpu()
    gap = float((losses["compiled"] - losses["eager"]).abs().max())
    medians = Timer(stage.device).host_medians(runs, sizes.rounds)
    times = {f"{how} ms": 1e3 * seconds for how, seconds in medians.items()}
    # fp32: rounding in another order, through five steps; a wrong step changes the loss in its first digits
    return [{"how": "compiled", "optimizer": name, "dtype": "float32", **times, "largest gap of losses": gap,
             "ok": gap < 1e-2 * float(losses["eager"][0])}]  # fmt: skip


def train(model: Any, optimizer: torch.optim.Optimizer, step: Callable[[], Any], ids: torch.Tensor) -> torch.Tensor:
    """One training step; returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    step()
    optimizer.zero_grad(set_to_none=False)
    return loss.detach()
