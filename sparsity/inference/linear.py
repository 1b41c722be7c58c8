"""A linear layer whose weight stays compressed in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from leanstep.kernels import bitmask_pack, bitmask_unpack, bitmask_validate
from leanstep.kernels.sparse.linear import RepeatedProduct, why_slower
from leanstep.sparsity.inference.matrices import DTYPE_NAMES, WEIGHT_DTYPES, Form


class CompressedWeight(Tensor):
    """Stands for the weight of a :class:`SparseLinear`: its shape, dtype and device, without storage.

    Code that asks for a layer's dtype or device gets an answer. An operation that reads the weight gets a dense copy,
    and one that would change it raises TypeError.
    """

    _is_hf_initialized: bool
    _layer: SparseLinear

    @staticmethod
    def __new__(cls, layer: SparseLinear, dtype: torch.dtype) -> CompressedWeight:
        """The weight of a layer."""
        shape, device = (layer.out_features, layer.in_features), layer.weight_mask.device
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._layer = layer
        # transformers initialises the weights that it did not load
        weight._is_hf_initialized = True
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CompressedWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    @property
    def data(self) -> CompressedWeight:
        """The weight itself, which is constant."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError(_constant("data"))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func._schema.is_mutable:
            raise TypeError(_constant(func))
        args, kwargs = tree_map_only(cls, lambda weight: weight._layer.dense_weight(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _constant(operation: object) -> str:
    return (
        f"{operation}: the weight of a SparseLinear is compressed and cannot be changed; `leanstep export --format "
        "dense` writes a folder with dense weights"
    )


def why_slow(model: nn.Module) -> str | None:
    """Why a model on the CPU generates slower from its sparse weights than from dense ones; None if it does not."""
    layers = (layer for layer in model.modules() if isinstance(layer, SparseLinear))
    on_cpu = ((*layer.weight.shape, layer.weight_values) for layer in layers if layer.weight_mask.is_cpu)
    # codes of 4 bits come in pairs
    return why_slower([(*shape, 4 if v.dtype is torch.uint8 else 8 * v.itemsize) for *shape, v in on_cpu])


class SparseLinear(nn.Linear):
    """``x W^T + bias`` of a constant weight that is stored as a bit mask and its nonzeros.

    Buffers: ``weight_values`` (nnz,), ``weight_mask`` (out, ceil(in / 32)) int32, ``weight_offsets`` (out + 1,) int64,
    and, for values of int8 or int4, ``weight_scales``. ``leanstep.sparsity.inference.matrices`` has their layout.
    ``weight`` is a :class:`CompressedWeight`. Gradients flow to the input and the bias.

    Attributes:
        is_transposed: whether files have the weight as (in, out), as transformers' Conv1D does.

    Args:
        in_features, out_features: as for nn.Linear.
        bias: (out,), or None.
        dtype: of the weight and of the product; with quantised values, of the bias.
        parts: the buffers without ``weight_``.

    Notes:
        Memory: the buffers. Products of many tokens expand one tile of the weight at a time.
    """

    weight_values: Tensor
    weight_mask: Tensor
    weight_offsets: Tensor
    weight_scales: Tensor | None
    _dtype: torch.dtype

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        parts: dict[str, Tensor],
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.is_transposed = False
        self.in_features, self.out_features, self._dtype = in_features, out_features, dtype
        for part in ("values", "mask", "offsets", "scales"):
            self.register_buffer(f"weight_{part}", parts.get(part))
        self.register_parameter("bias", bias)
        self._product = RepeatedProduct()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_product": RepeatedProduct(), **state})  # layers pickled before it had one

    @classmethod
    def from_dense(cls, weight: Tensor, bias: nn.Parameter | None = None) -> SparseLinear:
        """Compress a weight (out, in)."""
        parts = dict(zip(("values", "mask", "offsets"), bitmask_pack(weight.detach()), strict=True))
        return cls(weight.shape[1], weight.shape[0], parts=parts, dtype=weight.dtype, bias=bias)

    @classmethod
    def from_conv1d(cls, weight: Tensor, bias: nn.Parameter | None = None) -> SparseLinear:
        """Compress the weight (in, out) of transformers' Conv1D."""
        layer = cls.from_dense(weight.t().contiguous(), bias)
        layer.is_transposed = True
        return layer

    @property
    def weight(self) -> CompressedWeight:  # type: ignore[override]
        """Shape, dtype and device of the weight; reading it makes a dense copy."""
        return CompressedWeight(self, self._dtype)

    def form(self) -> Form:
        """How the weight is stored in a file. Raises ValueError for a dtype that files do not have."""
        shape, dtype = (self.out_features, self.in_features), DTYPE_NAMES[self._dtype]
        if self.is_transposed:
            shape = shape[::-1]
        if dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"a compressed weight of {self._dtype} cannot be saved: expected {', '.join(WEIGHT_DTYPES)}; convert "
                "the model first, as by model.to(torch.float32)"
            )
        codes = {torch.int8: "int8", torch.uint8: "int4"}.get(self.weight_values.dtype)
        return Form(shape, dtype, codes=codes)

    def stored_parts(self) -> dict[str, Tensor]:
        """The parts of the weight in the orientation of its file. A transposed one is packed again, by a dense copy."""
        if self.is_transposed:
            return dict(zip(("values", "mask", "offsets"), bitmask_pack(self.dense_weight().t()), strict=True))
        parts = {part: getattr(self, f"weight_{part}") for part in ("values", "mask", "offsets", "scales")}
        return {part: tensor for part, tensor in parts.items() if tensor is not None}

    def validate(self) -> None:
        """Raise ValueError for offsets, masks and scales that do not fit the values. Meta tensors pass."""
        if not self.weight_values.is_meta:
            parts = (self.weight_values, self.weight_mask, self.weight_offsets)
            bitmask_validate(*parts, (self.out_features, self.in_features), self.weight_scales)

    def dense_weight(self) -> Tensor:
        """The dense weight (out, in), a copy."""
        shape = (self.out_features, self.in_features)
        if self.weight_mask.is_meta:
            return torch.empty(shape, dtype=self._dtype, device="meta")
        dtype = None if self.weight_scales is None else self._dtype
        return bitmask_unpack(
            self.weight_values, self.weight_mask, self.weight_offsets, shape, self.weight_scales, dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]. Raises RuntimeError in an export to ONNX."""
        if self.weight_scales is None and torch.is_autocast_enabled(x.device.type):
            # autocast does not know the operation; the values cannot be cast at every call
            x = x.to(self._dtype)
        parts = (self.weight_values, self.weight_mask, self.weight_offsets)
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return self._product(x, *parts, self.in_features, bias, self.weight_scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        scales = self.weight_scales
        self._product = RepeatedProduct()
        super()._apply(fn, recurse)
        if scales is not None:
            # the scales keep their dtype, and the layer follows the dtype that was asked for
            self.weight_scales = scales.to(self.weight_mask.device)
            self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        else:
            self._dtype = self.weight_values.dtype
        return self
