"""How an op is called: a kernel where tensors have memory, and torch's registered op where a graph is recorded.

:func:`op` says once of an operation what torch and ``leanstep info`` need. The function below it is the operation: it
chooses a backend and runs it. An example::

    @op("double", EVERYWHERE, fake=torch.empty_like)
    def _run(x: Tensor) -> Tensor:
        return implementation("double", x, reference, __name__).double(x)

``_run(x)`` calls the function, or ``torch.ops.leanstep.double`` under torch.compile. The schema of the registered op is
that of the function's annotations. An operation that plain torch computes in a graph, for the compiler to fuse, is not
registered: :func:`declare` gives it a row of the table.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch

from leanstep.kernels._backend import OPS, Support, choose

P = ParamSpec("P")
Result = TypeVar("Result")

EVERYWHERE = Support()
# matrix products: torch's BLAS computes them on a CPU
PRODUCTS = Support(("reference", "triton"))


def declare(name: str, support: Support) -> None:
    """Add a row to the table of ops: what :func:`choose` may select for ``name``."""
    OPS[name] = support


def _is_compiling(*_arguments: Any) -> bool:
    return torch.compiler.is_compiling()


def op(
    name: str,
    support: Support | None = None,
    *,
    fake: Callable[..., Any] | None = None,
    mutates: Sequence[str] = (),
    traced: Callable[..., bool] = _is_compiling,
    autograd: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    vmap_rows: bool = False,
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorate a function of positional arguments: register it as ``torch.ops.leanstep.NAME``, and call the right one.

    Args:
        name: of the op. The table's row has no final ``_``, which says that the op writes to an argument.
        support: the row of the table. None: the function chooses no backend, or under another name.
        fake: takes the arguments and returns an empty result. None: the function returns None.
        mutates: names of the arguments that the function writes. Kernels do not count their versions, so this does.
        traced: takes the arguments; whether torch must see the op. By default under torch.compile only.
        autograd: the backward pass and its setup, as ``register_autograd`` takes them.
        vmap_rows: whether :func:`vmap_over_rows` is the op's rule of torch.func.vmap.
    """

    def register(function: Callable[P, Result]) -> Callable[P, Result]:
        if support is not None:
            declare(name.removesuffix("_"), support)
        registered = torch.library.custom_op(f"leanstep::{name}", function, mutates_args=tuple(mutates))
        if fake is not None:
            registered.register_fake(fake)
        if autograd is not None:
            registered.register_autograd(autograd[0], setup_context=autograd[1])
        if vmap_rows:
            registered.register_vmap(vmap_over_rows(registered))
        torch_op = getattr(torch.ops.leanstep, name)
        written = [i for i, parameter in enumerate(inspect.signature(function).parameters) if parameter in mutates]

        @functools.wraps(function)
        def run(*arguments: P.args, **none: P.kwargs) -> Result:
            if traced(*arguments):
                return torch_op(*arguments)
            result = function(*arguments, **none)
            for i in written:
                torch.autograd.graph.increment_version(arguments[i])  # type: ignore[arg-type]
            return result

        return run

    return register


def triton_module(module: str) -> Any:
    """Import the launchers of Triton kernels that belong to a module: those of the same path in ``triton_impl``."""
    return importlib.import_module(module.replace("leanstep.kernels", "leanstep.kernels.triton_impl", 1))


def implementation(
    name: str, x: torch.Tensor, reference: ModuleType, module: str, cpp: ModuleType | None = None
) -> Any:
    """Return the module that runs the op ``name`` on ``x``: the definition's, the C++ launchers', or Triton's."""
    backend = choose(name, x.device, x.dtype).backend
    if backend == "triton":
        return triton_module(module)
    return cpp if backend == "cpp" else reference


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether no kernel can run on a tensor: a graph is recorded, torch.func transforms it, or it is a fake tensor."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return in_transform() or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


def in_transform() -> bool:
    """Whether a transform of torch.func, such as vmap, is on, outside torch.compile: its tensors have no memory."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def in_dispatch_mode() -> bool:
    """Whether a dispatch mode is on, outside torch.compile.

    A mode may keep a result and return the same tensor later, as selective activation checkpointing does in a repeated
    pass. An in-place addition to that tensor would then be made twice.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def without_autocast(compute: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate the ``compute(x, ...)`` of an op that fixes the precision of its products: autocast would lower it."""

    @functools.wraps(compute)
    def run(x: torch.Tensor, *others: Any) -> Result:
        if not torch.is_autocast_enabled(x.device.type):
            return compute(x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return compute(x, *others)

    return run


def outside_dispatch_modes(compute: Callable[[], Result]) -> Result:
    """Call ``compute`` without the user's dispatch modes, and return its result.

    Use it for work that a repeated pass skips, such as cached norms and measurements. Otherwise a mode that returns the
    results of the first pass in order would get out of step.
    """
    modes = range(torch._C._len_torch_dispatch_stack()) if in_dispatch_mode() else ()
    # torch's own modes trace or replace operations, so they have to see all of them
    if not modes or any(torch._C._get_dispatch_stack_at(i).is_infra_mode() for i in modes):
        return compute()
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return compute()


def vmap_over_rows(operation: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, int]]:
    """The rule of torch.func.vmap for an operation on the rows [n, in] of its first argument.

    A batch of first arguments becomes more rows of one call. Where another argument is batched, too, each example gets
    a call.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[torch.Tensor, int]:
        rows, *others = arguments
        if all(dim is None for dim in in_dims[1:]):
            rows = rows.movedim(in_dims[0], 0)
            return operation(rows.flatten(0, 1), *others).unflatten(0, rows.shape[:2]), 0
        examples = (
            [part if dim is None else part.select(dim, i) for part, dim in zip(arguments, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([operation(*example) for example in examples]), 0

    return rule
