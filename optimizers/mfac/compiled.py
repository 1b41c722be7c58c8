"""M-FAC's direction as one operation, for torch.compile and for fake tensors.

Which row is written and how many are in use changes from step to step, and is a matter of the host. Traced, it would be
compiled again at every step until the window is full.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from leanstep.kernels.reference.fisher.gradient_window import wide_dtype
from leanstep.optimizers.mfac.bundle import Direction, Problem
from leanstep.optimizers.mfac.columns import Columns
from leanstep.optimizers.mfac.step import directions

_HOME = ("gram", "counts", "figures", "window_scale")
_ROWS = ("window", "window_values", "window_indices", "window_left", "window_right", "error", "basis")


def directions_in_one(problems: Sequence[Problem]) -> tuple[list[list[Tensor]], Tensor, Tensor]:
    """:func:`~leanstep.optimizers.mfac.step.directions` of parameters that are whole on this process.

    Returns:
        (updates, flat, of all scopes' members; int32 flags of all members in one vector; bool: which are to be made).
        Updates of skipped scopes are zero.
    """
    tensors: list[Tensor] = []
    plan = []
    for problem in problems:
        home = [key for key in _HOME if key in problem.home]
        rows = [[key for key in _ROWS if key in state] for state in problem.states]
        tensors += [problem.home[key] for key in home]
        tensors += [state[key] for state, keys in zip(problem.states, rows, strict=True) for key in keys]
        shapes = [list(c.shape) for c in problem.columns]
        plan.append([problem.settings, home, rows, shapes])
    vectors = [v for p in problems for v in p.vectors]
    rates = [torch.as_tensor(p.rate, dtype=torch.float64) for p in problems]
    *flat, flags, went = torch.ops.leanstep.mfac_directions(vectors, tensors, rates, _encoded(plan))
    found = iter(flat)
    return [[next(found) for _ in p.vectors] for p in problems], flags, went


def _encoded(plan: list[Any]) -> str:
    return json.dumps(plan)


# what torch.compiler.assume_constant_result does, which would import the compiler now: called while tracing, not traced
_encoded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no storage behind it, as where memory is estimated."""
    loaded = sys.modules.get("torch._subclasses.fake_tensor")
    return loaded is not None and isinstance(tensor, loaded.FakeTensor)


def _problems(vectors: list[Tensor], tensors: list[Tensor], rates: list[Tensor], plan: str) -> Iterator[Problem]:
    """The problems again, from the lists that an operation can take."""
    left, kept = iter(vectors), iter(tensors)
    for (settings, home, rows, shapes), rate in zip(json.loads(plan), rates, strict=True):
        shared = {key: next(kept) for key in home}
        states = [{key: next(kept) for key in keys} for keys in rows]
        columns = [Columns(tuple(shape)) for shape in shapes]
        yield Problem(settings, shared, states, columns, [next(left) for _ in shapes], rate)


def _run(vectors: list[Tensor], tensors: list[Tensor], rates: list[Tensor], plan: str) -> list[Tensor]:
    problems = list(_problems(vectors, tensors, rates, plan))
    found: list[Direction] = []
    with torch.no_grad():
        try:
            next(directions(problems))
        except StopIteration as end:  # nothing is asked of other processes
            found = end.value
    updates, went = [], []
    for problem, direction in zip(problems, found, strict=True):
        for k, vector in enumerate(problem.vectors):
            empty = vector.new_zeros(vector.numel(), dtype=_dtype(problem.states[k]))
            updates.append(empty if direction.updates is None else direction.updates[k].clone())
            went.append(direction.updates is not None)
    device = vectors[0].device
    flags = torch.tensor([f for d in found for f in d.flags], dtype=torch.int32, device=device)
    return [*updates, flags, torch.tensor(went, device=device)]


def _dtype(state: dict[str, Any]) -> torch.dtype:
    return wide_dtype(next(state[key].dtype for key in ("window", "window_values", "window_left") if key in state))


_directions_op = torch.library.custom_op("leanstep::mfac_directions", _run, mutates_args=("tensors",))


@_directions_op.register_fake
def _(vectors, tensors, rates, plan):
    problems = list(_problems(vectors, tensors, rates, plan))
    updates = [
        v.new_empty(v.numel(), dtype=_dtype(s)) for p in problems for v, s in zip(p.vectors, p.states, strict=True)
    ]
    count = len(vectors)
    return [*updates, vectors[0].new_empty(count, dtype=torch.int32), vectors[0].new_empty(count, dtype=torch.bool)]
