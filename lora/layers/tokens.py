"""Trained rows of embeddings and heads, PEFT's ``trainable_token_indices``: ``y = V[t]`` for the trained tokens t.

V (tokens, width) begins at the rows of the base weight and replaces them. The logits of these tokens in a head are
``V x``, with the head's bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanstep._torch import is_dtensor
from leanstep.lora.layers.embedding import scaled_rows
from leanstep.lora.layers.linear import Mixin, factor_type, mixture, restore_class

# the parameter's name here, and in PEFT's files
ROWS, IN_FILES = "lora_token_rows", "token_adapter.trainable_tokens_delta"


@dataclass
class TrainedTokens:
    """The state of a module with trained rows.

    Attributes:
        name: the module's name in the model.
        base: the class that the module had before.
        owner: the module with the same weight whose rows these are; None for rows of its own.
        enabled: whether the trained rows are on.
        merged: whether the base weight contains them.
        undo: the rows of the base weight before a merge.
    """

    name: str
    base: Any = nn.Module
    owner: Any = None
    enabled: bool = True
    merged: bool = False
    undo: Tensor | None = None

    @property
    def shares(self) -> bool:
        """Whether the rows are those of another module."""
        return self.owner is not None

    @property
    def active(self) -> bool:
        """Whether a forward pass computes with the rows."""
        return self.enabled and not self.merged


class TokenLayer(Mixin):
    """Base of modules with trained rows.

    Attributes:
        tokens: the :class:`TrainedTokens`.
        lora_token_rows: V (tokens, width).
        lora_tokens, lora_token_order: int64 (tokens,), the tokens in ascending order, and the place of each in V. Not
            in the state.
    """

    tokens: TrainedTokens
    lora_token_rows: nn.Parameter
    lora_tokens: Tensor
    lora_token_order: Tensor

    @property
    def indices(self) -> Tensor:
        """The tokens in the order of V, int64."""
        return torch.empty_like(self.lora_tokens).index_copy_(0, self.lora_token_order, self.lora_tokens)

    def replaced(self, weight: Tensor) -> Tensor:
        """A copy of the base weight with V in place of its rows."""
        rows = self.lora_token_rows.detach().to(weight)
        return weight.detach().index_copy(0, self.indices, rows)


class TokenEmbedding(TokenLayer):
    """An embedding with trained rows, mixed into the embedding's class."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Integer tokens [...] to [..., width]."""
        base = super().forward(tokens, *args, **kwargs)
        if not self.tokens.active:
            return base
        position = torch.searchsorted(self.lora_tokens, tokens).clamp_(max=len(self.lora_tokens) - 1)
        is_trained = torch.eq(self.lora_tokens[position], tokens).unsqueeze(-1)
        rows = F.embedding(self.lora_token_order[position], self.lora_token_rows)
        rows = scaled_rows(self, rows)
        if self.padding_idx is not None:
            rows = torch.where(torch.eq(tokens, self.padding_idx).unsqueeze(-1), rows.detach(), rows)  # type: ignore[arg-type]
        return torch.where(is_trained, rows.to(base.dtype), base)


class TokenHead(TokenLayer):
    """An output head with trained rows, mixed into a linear layer's class."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., width] to logits [..., vocabulary]."""
        base = super().forward(x, *args, **kwargs)
        if not self.tokens.active:
            return base
        bias = getattr(self, "bias", None)
        indices = self.indices
        logits = F.linear(x, self.lora_token_rows.to(x.dtype), None if bias is None else bias[indices].to(x.dtype))
        return base.index_copy(-1, indices, logits.to(base.dtype))


class SharedRows(TokenLayer):
    """Reads the rows of their owner. A parameter in two modules would be a tie that transformers does not know."""

    @property
    def lora_token_rows(self) -> nn.Parameter:  # type: ignore[override]
        """V (tokens, width) of the owner."""
        rows: nn.Parameter = self.tokens.owner.lora_token_rows
        return rows


class SharedTokenEmbedding(SharedRows, TokenEmbedding):
    """A :class:`TokenEmbedding` with the rows of another module."""


class SharedTokenHead(SharedRows, TokenHead):
    """A :class:`TokenHead` with the rows of another module."""


def why_no_tokens(module: nn.Module, indices: list[int]) -> str | None:
    """Why rows of a module cannot be trained; None if they can."""
    if not isinstance(module, (nn.Embedding, nn.Linear)):
        return f"it is a {type(module).__name__}; expected an embedding or a linear output head"
    count = module.num_embeddings if isinstance(module, nn.Embedding) else module.out_features
    outside = [index for index in indices if index >= count]
    if outside:
        return f"it has {count} tokens, and {outside[0]} is not one of them"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "it has max_norm or sparse gradients"
    if not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
        return "its weight is quantised or made by a parametrization"
    return None


def attach_tokens(module: Any, name: str, indices: list[int], owner: nn.Module | None = None) -> None:
    """Train rows of a module, in place, after all checks; ``owner``: the module with the same weight that has them."""
    weight = module.weight
    given = torch.tensor(indices, dtype=torch.int64, device=weight.device)
    tokens, order = given.sort()
    module.register_buffer("lora_tokens", tokens, persistent=False)
    module.register_buffer("lora_token_order", order, persistent=False)
    base: Any = type(module)
    module.tokens = TrainedTokens(name, base, owner)
    mixin: Any
    if owner is None:
        module.lora_token_rows = nn.Parameter(weight.detach()[given].to(**factor_type(weight)))
        mixin = TokenEmbedding if isinstance(module, nn.Embedding) else TokenHead
    else:
        mixin = SharedTokenEmbedding if isinstance(module, nn.Embedding) else SharedTokenHead
    module.__class__ = mixture(base, mixin)


def detach_tokens(module: Any) -> None:
    """Remove the trained rows of a module. Merged rows stay in the weight."""
    rows = () if module.tokens.shares else (ROWS,)
    restore_class(module, module.tokens.base, (*rows, "lora_tokens", "lora_token_order", "tokens"))


def check_tokens(name: str, module: Any) -> None:
    """Raise ValueError if the trained rows cannot be written into the base weight."""
    if is_dtensor(module.weight):
        raise ValueError(f"merge: the weight of {name}, whose rows are trained, is sharded; merge before it is sharded")
    if not torch.isfinite(module.lora_token_rows.to(module.weight.dtype)).all():
        raise ValueError(
            f"merge: the trained rows of {name} hold NaN or infinity in {module.weight.dtype}; nothing was merged"
        )


def merge_tokens(module: Any, keep_mask: bool) -> float:
    """Write the trained rows into the base weight; returns the rounding error. :func:`check_tokens` comes first."""
    state: TrainedTokens = module.tokens
    state.merged = True
    if state.shares:
        return 0.0
    indices, rows = module.indices, module.lora_token_rows.detach()
    state.undo = module.weight.detach()[indices].clone()
    if keep_mask:
        rows = torch.where(state.undo != 0, rows, 0.0)
    module.weight.index_copy_(0, indices, rows.to(module.weight.dtype))
    return float((module.weight[indices].to(rows.dtype) - rows).abs().max())


def unmerge_tokens(module: Any) -> None:
    """Write the rows of before the merge back, bit for bit."""
    state: TrainedTokens = module.tokens
    if state.undo is not None:
        module.weight.index_copy_(0, module.indices, state.undo)
    state.merged, state.undo = False, None
