"""Make transformers open sparse checkpoints, without importing it.

transformers finds the loader of a quantised checkpoint in a table of its module ``transformers.quantizers.auto``.
:func:`register_when_imported` adds ours when that module is imported, or at once if it has been.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_MODULE = "transformers.quantizers.auto"
# AutoQuantizationConfig looks the name up in this table
_NAME = "leanstep"


def register_when_imported() -> None:
    """Register the loader now if transformers has its table already, else when it is imported."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(module: ModuleType) -> None:
    # versions of transformers before 4.48 have no such functions
    if not hasattr(module, "register_quantizer") or _NAME in module.AUTO_QUANTIZER_MAPPING:
        return
    from leanstep.sparsity.inference.quantizer import SparseConfig, SparseQuantizer

    module.register_quantization_config(_NAME)(SparseConfig)
    module.register_quantizer(_NAME)(SparseQuantizer)


class _Finder:
    """Finds one module as the other finders do, and runs :func:`_register` after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, once; None for any other module."""
        if fullname != _MODULE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _Registering(spec.loader))
        return spec


class _Registering:
    """A module's own loader, with :func:`_register` after it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and give it back its loader."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
