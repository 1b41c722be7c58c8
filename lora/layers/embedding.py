"""Adapted embeddings: ``y = W[t] + scale * A^T[t] B^T``.

They use torch's own operations: tokens have no gradient, and autograd saves only the tokens and ``H = A^T[t]``, r
numbers per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels.op import outside_dispatch_modes
from leanstep.lora.layers.dora import row_norms
from leanstep.lora.layers.linear import Adapter, FastPath, LoRALayer, factor_type, mix_in, why_not_fast
from leanstep.lora.layers.rule import dora_factor


class LoRAEmbeddingLayer(LoRALayer):
    """``y = W[t] + scale * A^T[t] B^T``, mixed into an embedding's class.

    Attributes:
        lora_embedding_A, lora_embedding_B: (r, vocabulary) and (width, r).
    """

    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, vocabulary) and B (width, r)."""
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Integer tokens [...] to [..., width]."""
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
        embed_scale = getattr(self, "embed_scale", None)
        if embed_scale is not None:
            # some models scale the output inside the embedding
            h = h * torch.as_tensor(embed_scale).to(h)
        base_rows, h_rows = base.reshape(-1, base.shape[-1]), h.reshape(-1, h.shape[-1])
        # not addmm: autocast would round the base
        y = torch.add(base_rows.to(b.dtype), torch.mm(h_rows, b.t()), alpha=self.lora.scale)
        if self.lora_magnitude_vector is not None:
            y = y * dora_factor(self.lora_magnitude_vector, self.norms())
        return y.to(base.dtype).view(base.shape)

    @property
    def fast_path(self) -> FastPath:
        """Whether the next forward pass runs on the fast path, and why (not)."""
        reason = why_not_fast(self.lora, {"weight": self.weight})
        return FastPath(reason is None, reason or "torch's own operations, which save r numbers per token")

    def norms(self) -> Tensor:
        """DoRA's norms, one per column of the embedding: (width,), without a gradient."""
        a, b = (factor.detach() for factor in self.factors())
        return outside_dispatch_modes(lambda: row_norms(self.weight.detach().t(), a, b, self.lora.scale))


def attach_embedding(module: Any, adapter: Adapter, config: Any) -> None:
    """Turn an embedding into an adapted one, in place, after all checks."""
    like = factor_type(module.weight)
    a = torch.zeros(adapter.rank, module.num_embeddings, **like)
    b = torch.randn(module.embedding_dim, adapter.rank, **like)
    if config.init_lora_weights is False:
        a.normal_()
    module.lora_embedding_A, module.lora_embedding_B = nn.Parameter(a), nn.Parameter(b)
    mix_in(LoRAEmbeddingLayer, module, adapter, config.use_dora)
