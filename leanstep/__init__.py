"""Cheaper training of transformers: lean and stateless optimizers on fused kernels, with recipes that use them.

The public names load on first use (PEP 562), so ``import leanstep`` takes milliseconds. The first optimizer or kernel
imports torch, the first Triton kernel imports Triton, and only recipes import transformers.

    >>> import leanstep
    >>> optimizer = leanstep.SinkGD(model.parameters(), lr=1e-2)  # doctest: +SKIP

Import the same objects from :mod:`leanstep.optimizers` and :mod:`leanstep.kernels` to make dependencies explicit.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanstep.kernels import BackendError, backend_table, use_backend
    from leanstep.optimizers import *  # the other public names

__version__ = "0.1.0"

__all__ = [
    "LANTON",
    "MFAC",
    "BackendError",
    "GradientRelease",
    "LearningRates",
    "Lion",
    "NonFiniteGradientError",
    "ParamGroups",
    "SinkGD",
    "__version__",
    "backend_table",
    "create",
    "find_lr",
    "from_parameters",
    "param_groups",
    "release_gradients",
    "use_backend",
]

import_module("leanstep._checkpoint.transformers").register_when_imported()

_SUBPACKAGES = frozenset({"kernels", "lora", "optimizers", "pruning", "recipes", "sparsity"})


def __getattr__(name: str) -> object:
    """Import the package that defines a public name and store the object as an ordinary attribute."""
    if name in _SUBPACKAGES:
        return import_module(f"leanstep.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'leanstep' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    kernels, optimizers = import_module("leanstep.kernels"), import_module("leanstep.optimizers")
    value = getattr(optimizers if name in optimizers.__all__ else kernels, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return public names and subpackages, loaded or not."""
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
