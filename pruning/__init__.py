"""Prune trained models: score weights, measure distortion, and allocate sparsity to layers.

The public names load on first use, so that ``leanstep prune`` reads its options before torch is loaded.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leanstep.pruning.public import *  # noqa: F403

_PUBLIC = f"{__name__}.public"


class _Package(ModuleType):
    """The type of this module."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        public = import_module(_PUBLIC)
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value = getattr(public, name)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # importing a submodule sets it here, but some of them have the names of functions
        if name not in ("allocate", "compress", "prune") or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *import_module(_PUBLIC).__all__})


sys.modules[__name__].__class__ = _Package
