"""M-FAC's direction as one operation, for torch.compile and for fake tensors.

Which row is written and how many are in use changes from step to step, and is a matter of the host. Traced, it would be
compiled again at every step until the window is full.

The operation returns nothing and writes into tensors that it is given: torch cannot functionalize one that both changes
its inputs and returns a list of tensors.
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
    states = [s for p in problems for s in p.states]
    updates = [v.new_zeros(v.numel(), dtype=_dtype(s)) for v, s in zip(vectors, states, strict=True)]
    flags, went = (vectors[0].new_zeros(len(vectors), dtype=dtype) for dtype in (torch.int32, torch.bool))
    torch.ops.leanstep.mfac_directions(vectors, tensors, rates, _encoded(plan), [*updates, flags, went])
    found = iter(updates)
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


def _run(vectors: list[Tensor], tensors: list[Tensor], rates: list[Tensor], plan: str, out: list[Tensor]) -> None:
    """Write updates into all but the last two of ``out``, zeros to begin with, then flags and whether there are any."""
    problems = list(_problems(vectors, tensors, rates, plan))
    found: list[Direction] = []
    with torch.no_grad():
        try:
            next(directions(problems))
        except StopIteration as end:  # nothing is asked of other processes
            found = end.value
    *updates, flags, went = out
    flags.copy_(torch.tensor([f for d in found for f in d.flags], dtype=torch.int32))
    made = [u for p, d in zip(problems, found, strict=True) for u in d.updates or [None] * len(p.vectors)]
    went.copy_(torch.tensor([update is not None for update in made]))
    for target, update in zip(updates, made, strict=True):
        if update is not None:
            target.copy_(update)


def _dtype(state: dict[str, Any]) -> torch.dtype:
    return wide_dtype(next(state[key].dtype for key in ("window", "window_values", "window_left") if key in state))


_directions_op = torch.library.custom_op("leanstep::mfac_directions", _run, mutates_args=("tensors", "out"))


@_directions_op.register_fake
def _(vectors, tensors, rates, plan, out):
    return None
