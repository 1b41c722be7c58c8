"""Cheaper training of transformers: lean and stateless optimizers on fused kernels, with recipes that use them.

The public names below load on first use (PEP 562), so that ``import leanstep`` costs milliseconds: torch comes with the
first optimizer or kernel that is asked for, Triton with the first Triton kernel, transformers only with a recipe.

    >>> import leanstep
    >>> optimizer = leanstep.SinkGD(model.parameters(), lr=1e-2)  # doctest: +SKIP

The same objects live in :mod:`leanstep.optimizers` and :mod:`leanstep.kernels`, which are the names to import from in a
program that wants its dependencies explicit.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from leanstep._version import __version__

if TYPE_CHECKING:
    from leanstep.kernels import BackendError, backend_table, use_backend
    from leanstep.optimizers import (
        LANTON,
        MFAC,
        GradientRelease,
        Lion,
        NonFiniteGradientError,
        SinkGD,
        release_gradients,
    )

    # by its module: type checkers take the package's attribute of that name for the module
    from leanstep.optimizers.param_groups import ParamGroups, param_groups

__all__ = [
    "LANTON",
    "MFAC",
    "BackendError",
    "GradientRelease",
    "Lion",
    "NonFiniteGradientError",
    "ParamGroups",
    "SinkGD",
    "__version__",
    "backend_table",
    "param_groups",
    "release_gradients",
    "use_backend",
]

_OF_KERNELS = frozenset({"BackendError", "backend_table", "use_backend"})  # all other names are optimizers'
_SUBPACKAGES = frozenset({"kernels", "lora", "optimizers", "pruning", "recipes", "sparsity"})


def __getattr__(name: str) -> object:
    """Import the package that owns a public name, once; afterwards the name is an ordinary attribute."""
    if name in _SUBPACKAGES:
        return import_module(f"leanstep.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'leanstep' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value = getattr(import_module("leanstep.kernels" if name in _OF_KERNELS else "leanstep.optimizers"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names and subpackages, whether they are loaded yet or not."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
