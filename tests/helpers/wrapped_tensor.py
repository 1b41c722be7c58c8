"""A class of tensors without memory of its own, as quantized weights are."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# results that stay in the class; those of all other operations are plain tensors
_PRESERVED = ("detach", "clone", "copy_", "alias", "view")


class WrappedTensor(Tensor):
    """Holds its elements in another tensor. A kernel that asks for their address ends the process: here it raises."""

    inner: Tensor
    without: tuple[str, ...] = ()

    @staticmethod
    def __new__(cls, inner: Tensor) -> "WrappedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def data_ptr(self) -> int:
        raise AssertionError("the address of a tensor without memory")

    untyped_storage = data_ptr  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in cls.without:
            raise NotImplementedError(f"{cls.__name__} has no {name}")
        plain_args, plain_kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        result = func(*plain_args, **plain_kwargs)
        if name == "copy_":
            return args[0]
        return cls(result) if name in _PRESERVED else result


class Uncopyable(WrappedTensor):
    """One that cannot be written to."""

    without = ("copy_",)
