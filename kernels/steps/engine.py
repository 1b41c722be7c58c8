"""What every step on lists of tensors does around its rule: checks, backend, torch's registered op, groups, flags.

:func:`declare_step` says once what a step has. ``tests/kernels/test_step_engine.py`` declares one in a few lines.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from leanstep.kernels._backend import BackendError, choose, requested_backend
from leanstep.kernels.cpp_impl._build import MissingKernelError, group_by_dtypes, same_layout
from leanstep.kernels.op import triton_module
from leanstep.kernels.reference.quantization import FP8, scale_shape
from leanstep.kernels.steps.common import StepOptions

Lists = list[list[Tensor]]
# the types of schemas, by those of StepOptions
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool"}


def declare_step(
    module: str,
    name: str,
    *,
    lists: str,
    floats: int,
    options: Sequence[str] = StepOptions._fields,
    extras: Mapping[str, str] | None = None,
    result: torch.dtype | None = None,
    check: Callable[[Lists], None] | None = None,
    cpp: Callable[..., Tensor | None],
    definition: Callable[..., Tensor | None],
) -> Callable[..., Any]:
    """Register a step as ``torch.ops.leanstep.NAME`` and return what calls it: ``step(lists, options, *extras)``.

    Args:
        module: ``__name__`` of the caller. The Triton launcher is the function ``name`` of the module of the same path
            in ``triton_impl``; it takes the same arguments.
        name: of the step.
        lists: names of the lists of tensors, of equal length. "!" marks those that the step writes. "." precedes those
            whose tensors differ in shape from the first list's; ``check`` looks at them. The last may be empty.
        floats: how many of the first lists have the dtypes that decide which backend runs.
        options: the fields of :class:`StepOptions` that the rule reads.
        extras: further arguments, with their types in the schema. Tensors have one row per tensor of a list.
        result: dtype of the 1-D result, one number per tensor. None: none.
        check: raises ValueError for lists whose shapes do not fit.
        cpp: ``cpp(lists, options, *extras)`` runs tensors of one dtype per list, and returns their results. With
            ``check``, all are contiguous; without, those at an index have one dense layout.
        definition: ``definition(tensors, options, *extras)`` runs the tensors at one index, and returns their result,
            or None for 0.
    """
    names = [entry.strip(".!") for entry in lists.split()]
    written = [i for i, entry in enumerate(lists.split()) if entry.endswith("!")]
    alike = [i for i, entry in enumerate(lists.split()) if not entry.startswith(".")]

    @torch.no_grad()
    def run(*arguments: Any) -> Tensor | None:
        tensors, rest = arguments[: len(names)], arguments[len(names) :]
        fields, others = rest[: len(options)], rest[len(options) :]
        given = StepOptions(**dict(zip(options, fields, strict=False)))  # torch leaves out "runs" where it is None
        first = tensors[0]
        if not first:
            return None if result is None else torch.zeros(0, dtype=result, device="cpu")
        check_shapes(name, [tensors[i] for i in alike if tensors[i]])
        present = [ts for ts in tensors if ts]
        if check is not None:
            check(present)
        dtypes = dict.fromkeys([given.scalars.dtype, *[t.dtype for ts in tensors[:floats] for t in ts]])
        backend = choose(name, first[0].device, *dtypes).backend
        if backend != "reference":  # kernels do not count versions
            torch.autograd.graph.increment_version([t for i in written for t in tensors[i]])
        if backend == "triton":
            return getattr(triton_module(module), name)(present, given, *others)
        results = None if result is None else torch.zeros(len(first), dtype=result, device=first[0].device)

        def store(selection: Any, values: Tensor | None) -> None:
            if results is not None and values is not None:
                results[selection] = values.to(results.dtype)

        def of(selection: Any) -> list[Any]:
            return [given.of(selection), *(e[selection] if isinstance(e, Tensor) else e for e in others)]

        contiguous = [all(row) for row in zip(*[[t.is_contiguous() for t in ts] for ts in present], strict=True)]
        covered = [backend == "cpp" and flag for flag in contiguous]
        if backend == "cpp" and check is None and given.rounding != "stochastic" and not all(covered):
            covered = [flag or same_layout(row) for flag, row in zip(covered, zip(*present, strict=True), strict=True)]
        call_groups(present, covered, lambda group, parts: store(group, cpp(parts, *of(group))))
        for i in (i for i, is_covered in enumerate(covered) if not is_covered):
            store(i, definition([ts[i] for ts in present], *of(i)))
        return results

    marks = dict(zip(written, "abcdefgh", strict=False))
    parts = [f"Tensor({marks[i]}!)[] {n}" if i in marks else f"Tensor[] {n}" for i, n in enumerate(names)]
    hints = get_type_hints(StepOptions)
    # graphs that were exported before shards had runs end without them
    parts += [f"{_TYPES[hints[field]]} {field}{'=None' * (field == 'runs')}" for field in options]
    parts += [f"{kind} {extra}" for extra, kind in (extras or {}).items()]
    schema = f"({', '.join(parts)}) -> {'()' if result is None else 'Tensor'}"
    mutates = tuple(names[i] for i in written)
    registered = torch.library.custom_op(f"leanstep::{name}", run, mutates_args=mutates, schema=schema)
    scalars = len(names) + list(options).index("scalars")

    @registered.register_fake
    def fake(*arguments: Any) -> Tensor | None:
        return None if result is None else arguments[scalars].new_empty(len(arguments[0]), dtype=result)

    torch_op = getattr(torch.ops.leanstep, name)

    def step(tensors: Sequence[list[Tensor]], given: StepOptions, *others: Any) -> Any:
        fields = [getattr(given, field) for field in options]
        return (torch_op if torch.compiler.is_compiling() else run)(*tensors, *fields, *others)

    return step


def check_shapes(op: str, lists: Sequence[Sequence[Tensor]]) -> None:
    """Raise ValueError unless the tensors at every index have one shape. Kernels trust it with memory.

    Optimizers check their state; this is for what comes between, such as a graph that torch.compile took for another.
    """
    for index, shapes in enumerate(zip(*[[t.shape for t in ts] for ts in lists], strict=True)):
        if shapes.count(shapes[0]) < len(shapes):
            got = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{op}: expected tensors of one shape at index {index}, got {got}")


def call_groups(
    lists: Sequence[Sequence[Tensor]], covered: list[bool], cpp: Callable[[list[int], list[list[Tensor]]], None]
) -> None:
    """Call C++ once per group of equal dtypes. Clear ``covered`` where a kernel is not built and cannot be.

    Args:
        lists: of equal length.
        covered: per index, whether C++ takes the tensors; written.
        cpp: takes indices, and the lists' tensors there, of one dtype per list. Loads its kernel before it writes.

    Raises:
        BackendError: such a kernel, and "cpp" was asked for.
    """
    for indices in group_by_dtypes(lists, covered):
        try:
            cpp(indices, [[ts[i] for i in indices] for ts in lists])
        except MissingKernelError as error:
            if requested_backend() == "cpp":
                raise BackendError(f"backend 'cpp' was asked for, but: {error}") from None
            _tell_once(f"{error}: the definition runs. Install a C++ compiler, for instance by apt-get install g++")
            for i in indices:
                covered[i] = False


@functools.cache
def _tell_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def check_scales(op: str, codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """Raise ValueError unless every tensor of 8-bit codes has the scales of its shape."""
    for code, scale in zip(codes, scales, strict=True):
        if tuple(scale.shape) != scale_shape(code.shape):
            raise ValueError(
                f"{op}: expected scales of shape {scale_shape(code.shape)} for codes of {tuple(code.shape)}, got "
                f"{tuple(scale.shape)}"
            )


def fp8_macro(codes: Sequence[Tensor]) -> dict[str, str | int]:
    """Return the macro of C++ kernels for codes in fp8; none for int8."""
    return {"FP8": 1} if codes[0].dtype == FP8 else {}


def rows_and_columns(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Return the rows of every tensor, its first dimension, and the entries of a row."""
    return [t.shape[0] for t in tensors], [t.shape[1:].numel() for t in tensors]
