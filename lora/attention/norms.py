"""Norms of the queries and keys of each head, sampled logits, and the error that low-rank attention makes on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.reference.poly.attention import polynomial
from leanstep.lora.attention.attention import key_means
from leanstep.lora.attention.error_bounds import largest_logit
from leanstep.lora.attention.features import taylor_coefficients

__all__ = ["HeadNorms", "Seen", "head_norms", "sample_rows", "sampled_error"]


class Seen(NamedTuple):
    """What an attention layer computes with: q [B, Hq, L, d], k [B, H, M, d], v [B, H, M, e], and what masks it."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    key_mask: Tensor | None = None

    def some(self, at: slice) -> Seen:
        """The same for some sequences, detached."""
        q, k, v = (x.detach()[at] for x in (self.query, self.key, self.value))
        return Seen(q, k, v, self.scale, self.causal, None if self.key_mask is None else self.key_mask[at])


class HeadNorms(NamedTuple):
    """Numbers of every query head, fp32 [Hq] on the layer's device, the largest over the sequences.

    Attributes:
        gamma_q, gamma_k: largest absolute entries of ``sqrt(scale) Q`` and ``sqrt(scale) K``: the theorem's norms.
        certified, certified_raw: ``scale * max |q_i| * max |k_j|`` with and without centred keys; no logit is larger.
        sampled, sampled_raw: the largest logit that queries of the sampled rows see, with and without centred keys.
        errors: [degrees, Hq], relative error of the output on the sampled rows, ``|O~ - O| / |O|``, for degrees 2, 4,
            ..
    """

    gamma_q: Tensor
    gamma_k: Tensor
    certified: Tensor
    certified_raw: Tensor
    sampled: Tensor
    sampled_raw: Tensor
    errors: Tensor


def sample_rows(length: int, rows: int, generator: torch.Generator | None = None) -> Tensor:
    """Up to ``rows`` different queries, ascending; the last one, which sees most in causal attention, among them."""
    if rows >= length:
        return torch.arange(length)
    chosen = torch.randperm(length - 1, generator=generator)[: rows - 1]
    return torch.cat([chosen, torch.tensor([length - 1])]).sort().values


def head_norms(
    seen: Seen,
    *,
    degrees: Sequence[int] = (2,),
    rows: int = 256,
    center: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> HeadNorms:
    """Measure the heads of a layer in ``O(L d)``: everything but the sampled logits takes one pass over q and k.

    Args:
        seen: its inputs; all sequences count.
        degrees: of Taylor's sum, whose errors are measured.
        rows: sampled queries; they meet all keys.
        center: what is taken off the keys, [H, d] or [B, H, d]; None takes their mean.
        generator: of the sampled rows.
    """
    with torch.no_grad(), torch.autocast(seen.query.device.type, enabled=False):
        q, k = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in (seen.query, seen.key))
        shift = key_means(k, seen.key_mask) if center is None else center.to(k.dtype)
        group = q.shape[1] // k.shape[1]
        kept = k if seen.key_mask is None else torch.where(seen.key_mask[:, None, :, None], k, 0.0)
        moved = k - shift[..., None, :]
        root = abs(seen.scale) ** 0.5
        tops = [
            root * q.abs().amax(dim=(2, 3)),
            root * kept.abs().amax(dim=(2, 3)).repeat_interleave(group, dim=1),
            largest_logit(q, moved, seen.scale, seen.key_mask),
            largest_logit(q, k, seen.scale, seen.key_mask),
        ]
        at = sample_rows(q.shape[2], rows, generator).to(q.device)
        sampled = [_sampled(seen, q[:, :, at], k, moved, at, head, degrees) for head in range(k.shape[1])]
        per_head = [torch.cat(parts, dim=-1) for parts in zip(*sampled, strict=True)]
        return HeadNorms(*(top.amax(dim=0) for top in tops), *per_head)


def _sampled(
    seen: Seen, q: Tensor, k: Tensor, moved: Tensor, at: Tensor, head: int, degrees: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest centred and plain logits [group] that the rows of one key head see, and errors [degrees, group]."""
    group = q.shape[1] // k.shape[1]
    rows = q[:, head * group : (head + 1) * group]
    visible = _visible(seen, at)
    centred, plain = (seen.scale * rows @ x[:, head, None].mT for x in (moved, k))
    largest = [torch.where(visible, s.abs(), 0.0).amax(dim=(0, 2, 3)) for s in (centred, plain)]
    value = seen.value.detach()[:, head, None].to(q.dtype)
    exact = _softmax(plain, visible) @ value
    errors = [
        _error(torch.where(visible, polynomial(centred, taylor_coefficients(g)), 0.0), value, exact) for g in degrees
    ]
    return largest[0], largest[1], torch.stack(errors)


def _visible(seen: Seen, at: Tensor) -> Tensor:
    """Which keys the queries ``at`` see: [1 or B, 1, rows, M]."""
    keys = torch.arange(seen.key.shape[2], device=at.device)
    visible = (
        (keys <= at[:, None]) if seen.causal else torch.ones(len(at), len(keys), dtype=torch.bool, device=at.device)
    )
    return visible[None, None] if seen.key_mask is None else visible & seen.key_mask[:, None, None, :]


def _softmax(s: Tensor, visible: Tensor) -> Tensor:
    """Softmax over what is visible, zero for rows that see nothing."""
    weights = torch.softmax(s.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.where(visible.any(dim=-1, keepdim=True), weights, 0.0)


def _error(weights: Tensor, value: Tensor, exact: Tensor) -> Tensor:
    """Relative error of the rows' output a head, inf where a normaliser is not positive: [group]."""
    total = weights.sum(dim=-1, keepdim=True)
    out = weights @ value / torch.where(total > 0, total, 1.0)
    unseen = (weights == 0).all(dim=-1, keepdim=True)
    wrong = ~(((total > 0) & total.isfinite()) | unseen)
    off = (out - exact).square().sum(dim=(0, 2, 3)).sqrt()
    found = off / exact.square().sum(dim=(0, 2, 3)).sqrt().clamp(min=torch.finfo(off.dtype).tiny)
    return torch.where(wrong.any(dim=-1).any(dim=-1).any(dim=0) | ~found.isfinite(), torch.inf, found)


def sampled_error(seen: Seen, out: Tensor, at: Tensor) -> Tensor:
    """Relative error [Hq] of an output [B, Hq, L, e] on the queries ``at``; inf if it is not finite."""
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        group = seen.query.shape[1] // seen.key.shape[1]
        wide = torch.promote_types(out.dtype, torch.float32)
        visible = _visible(seen, at)
        found = []
        for head in range(seen.key.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            s = seen.scale * seen.query.detach()[:, heads, at].to(wide) @ seen.key.detach()[:, head, None].to(wide).mT
            exact = _softmax(s, visible) @ seen.value.detach()[:, head, None].to(wide)
            off = (out.detach()[:, heads, at].to(wide) - exact).square().sum(dim=(0, 2, 3)).sqrt()
            size = exact.square().sum(dim=(0, 2, 3)).sqrt().clamp(min=torch.finfo(wide).tiny)
            found.append(torch.where((off / size).isfinite(), off / size, torch.inf))
        return torch.cat(found)
