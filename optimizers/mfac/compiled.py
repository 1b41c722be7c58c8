"""M-FAC's direction as one custom op, for torch.compile and fake tensors.

The index of the new row and the number of rows are Python numbers that change every step. A trace of the plain code
would therefore be compiled again at every step.

The op returns nothing and writes its results to arguments, because torch cannot functionalize an op that both mutates
inputs and returns a list of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers.mfac.compressed import SparseRows
from leanstep.optimizers.mfac.direction import Direction, Problem, directions
from leanstep.optimizers.mfac.state import SCOPE_KEYS, WINDOW
from leanstep.optimizers.mfac.window import BlockRows, Columns, DenseRows, combination_dtype

_FORMATS = {f.__name__: f for f in (DenseRows, BlockRows, SparseRows)}
_ROW_KEYS = (*[entry.name for entry in WINDOW], "mask")


def directions_by_op(problems: Sequence[Problem]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Compute :func:`~leanstep.optimizers.mfac.direction.directions` of unsharded parameters by the custom op.

    Returns:
        For the parameters of all scopes: flat updates (zeros if the step is skipped); int32 flags of non-finite
        gradients; bools, whether there is an update.
    """
    tensors: list[Tensor] = []
    plan = []
    for problem in problems:
        scope_keys = [key for key in SCOPE_KEYS if key in problem.scope_state]
        row_keys = [[key for key in _ROW_KEYS if key in state] for state in problem.states]
        tensors += [problem.scope_state[key] for key in scope_keys]
        tensors += [state[key] for state, keys in zip(problem.states, row_keys, strict=True) for key in keys]
        formats = [f.__name__ for f in problem.formats]
        settings = {key: _constant(value) for key, value in problem.settings.items()}
        shapes, weights = _constant([c.shape for c in problem.columns]), _constant(problem.weights)
        plan.append([settings, scope_keys, row_keys, formats, shapes, weights])
    vectors = [v for p in problems for v in p.vectors]
    states = [s for p in problems for s in p.states]
    updates = [v.new_zeros(v.numel(), dtype=combination_dtype(s)) for v, s in zip(vectors, states, strict=True)]
    flags, updated = (vectors[0].new_zeros(len(vectors), dtype=dtype) for dtype in (torch.int32, torch.bool))
    torch.ops.leanstep.mfac_directions(vectors, tensors, _encoded(plan), [*updates, flags, updated])
    return updates, flags, updated


def _constant(value: Any) -> Any:
    """Return a setting or sizes without the symbols that torch.compile(dynamic=True) takes numbers for.

    A change of a number is compiled anew.
    """
    if isinstance(value, (list, tuple)):
        return [_constant(v) for v in value]
    if isinstance(value, int):
        return index(value)
    return float.fromhex(value.hex()) if isinstance(value, float) else value


def _encoded(plan: list[Any]) -> str:
    return json.dumps(plan, default=float)  # numpy's numbers, too


# as torch.compiler.assume_constant_result, which would import the compiler: the function is called during tracing
_encoded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decoded(vectors: list[Tensor], tensors: list[Tensor], plan: str) -> Iterator[Problem]:
    next_vector, next_tensor = iter(vectors), iter(tensors)
    for settings, scope_keys, row_keys, names, shapes, weights in json.loads(plan):
        scope_state = {key: next(next_tensor) for key in scope_keys}
        states = [{key: next(next_tensor) for key in keys} for keys in row_keys]
        formats = [_FORMATS[name] for name in names]
        columns = [Columns(tuple(shape)) for shape in shapes]
        gradients = [next(next_vector) for _ in shapes]
        yield Problem(settings, scope_state, states, formats, columns, gradients, weights)


def _run(vectors: list[Tensor], tensors: list[Tensor], plan: str, out: list[Tensor]) -> None:
    """Write the updates, the flags, and whether there is an update to ``out``, the latter two last."""
    problems = list(_decoded(vectors, tensors, plan))
    results: list[Direction] = []
    with torch.no_grad():
        try:
            next(directions(problems))
        except StopIteration as end:  # unsharded parameters need no reduction
            results = end.value
    *updates, flags, updated = out
    flags.copy_(torch.tensor([f for r in results for f in r.flags], dtype=torch.int32, device="cpu"))
    values: list[Tensor | None] = []
    for problem, result in zip(problems, results, strict=True):
        values += result.updates or [None] * len(problem.vectors)
    updated.copy_(torch.tensor([value is not None for value in values], device="cpu"))
    for update, value in zip(updates, values, strict=True):
        if value is not None:
            update.copy_(value)


_directions_op = torch.library.custom_op("leanstep::mfac_directions", _run, mutates_args=("tensors", "out"))


@_directions_op.register_fake
def _(vectors, tensors, plan, out):
    return None
