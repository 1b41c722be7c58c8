"""Adapted embeddings: one row of r numbers per token, and a matrix to the width of the model.

torch's own operations are lean here: the tokens have no gradient, and what autograd keeps is the tokens and
``H = A^T[tokens]``, r numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels._modes import unseen
from leanstep.lora.layers.autograd import Weights, dora_factor
from leanstep.lora.layers.dora import row_norms
from leanstep.lora.layers.layer import Adapter, FastPath, LoRALayer, common_reasons, mixture


class LoRAEmbeddingLayer(LoRALayer):
    """``y = W[t] + scale * A^T[t] B^T``, mixed into an embedding's class.

    Attributes:
        lora_embedding_A: (r, vocabulary). lora_embedding_B: (width, r).
        lora_magnitude_vector: (width,), for DoRA, else None.
    """

    weight: Tensor
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[...] to [..., width]."""
        base = super().forward(tokens, *args, **kwargs)
        if self.lora.merged or not self.lora.enabled:
            return base
        h = torch.nn.functional.embedding(
            tokens,
            self.lora_embedding_A.t(),
            padding_idx=self.padding_idx,  # type: ignore[arg-type]
            scale_grad_by_freq=self.scale_grad_by_freq,  # type: ignore[arg-type]
        )
        b = self.lora_embedding_B
        scale = self.lora.scale
        embed_scale = getattr(self, "embed_scale", None)
        if embed_scale is not None:
            # some models multiply what an embedding gives, inside it
            h = h * torch.as_tensor(embed_scale).to(h)
        rows, inner = base.reshape(-1, base.shape[-1]), h.reshape(-1, h.shape[-1])
        y = torch.addmm(rows.to(b.dtype), inner, b.t(), alpha=scale)
        if self.lora_magnitude_vector is not None:
            a = self.lora_embedding_A
            y = y * dora_factor(Weights(self.weight, None, a, b, None, self.lora_magnitude_vector, self.norms()))
        return y.to(base.dtype).view(base.shape)

    def why_not_fast(self, x: Tensor | None = None) -> str | None:
        """The reason against the fast path; None when there is none."""
        return common_reasons(self.lora, {"weight": self.weight}, None)

    @property
    def fast_path(self) -> FastPath:
        """Whether the next forward pass runs on the fast path, and why (not)."""
        reason = self.why_not_fast()
        return FastPath(reason is None, reason or "torch's own operations, which keep r numbers per token")

    def norms(self) -> Tensor:
        """DoRA's norms, of the columns of the embedding: (width,), no gradient."""
        a, b = self.lora_embedding_A.detach(), self.lora_embedding_B.detach()
        return unseen(lambda: row_norms(self.weight.detach().t(), a, b, self.lora.scale))


class LoRAEmbedding(LoRAEmbeddingLayer, nn.Embedding):  # type: ignore[misc]
    """An adapted ``torch.nn.Embedding``; see :class:`LoRAEmbeddingLayer` for what it computes."""


def attach_embedding(module: Any, adapter: Adapter, config: Any) -> None:
    """Turn an embedding into an adapted one, in place. Everything has been checked before."""
    weight = module.weight
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    a = torch.zeros(adapter.rank, module.num_embeddings, device=weight.device, dtype=dtype)
    b = torch.randn(module.embedding_dim, adapter.rank, device=weight.device, dtype=dtype)
    if config.init_lora_weights is False:
        a.normal_()
    module.lora = adapter
    module.lora_embedding_A, module.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
    module.register_parameter("lora_magnitude_vector", None)
    base: Any = type(module)
    adapter.base = base
    module.__class__ = mixture(base, LoRAEmbeddingLayer)
    assert isinstance(module, LoRAEmbeddingLayer)
    if config.use_dora:
        module.lora_magnitude_vector = nn.Parameter(module.norms().to(dtype))
    if adapter.save == "lora_fa":
        module.lora_embedding_A.requires_grad_(False)


def detach_embedding(module: Any) -> None:
    """Give an embedding its own class back, without the adapter."""
    base = module.lora.base
    for name in ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora"):
        delattr(module, name)
    module.__class__ = base
