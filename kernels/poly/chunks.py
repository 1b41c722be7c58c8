"""Polynomial attention by features, running states and chunks, forward and backward; no matrix of weights is formed.

Letters: n independent key heads, g query heads per key head, L queries, M keys, d dims of q and k, k features, e - 1
dims of v. The products with ``[V, 1]`` (``values``, e dims) give numerators and denominators:

    forward    O1 = f(X) S,  S = f(Y)^T [V, 1];  O = O1[:e-1] / O1[e-1]
    backward   G = [dO / D, -(dO . O) / D];  T = f(X)^T G
               dX = J(X)^T (S G^T),  dY = J(Y)^T (T [V, 1]^T),  d[V, 1] = f(Y) T

Causal sums run over chunks: S sums the earlier chunks, T the later ones. Inside a chunk, the weights themselves are
computed and masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leanstep.kernels.poly.features import poly_features, poly_features_backward
from leanstep.kernels.poly.tables import feature_count, poly_tables
from leanstep.kernels.reference.poly.attention import polynomial

# bytes for the features of one chunk; they limit the number of heads processed at once
_SCRATCH = {"cpu": 16 << 20}
_SCRATCH_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class Heads:
    """The inputs of some key heads: q [n, g, L, d], k [n, M, d], v [n, M, e - 1], all of one dtype.

    ``center`` [n, d] is subtracted from the keys. ``mask`` [n, M] is False for keys to ignore. ``scale`` multiplies the
    queries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    center: Tensor | None
    mask: Tensor | None
    coefficients: Sequence[float]
    scale: float
    causal: bool
    chunk: int

    @property
    def degree(self) -> int:
        """The degree of the polynomial."""
        return len(self.coefficients) - 1

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def slices(self, length: int) -> list[slice]:
        """The chunks of a sequence."""
        return [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]

    def queries(self, span: slice) -> Tensor:
        """Scaled queries of a chunk, features first: [n, d, g * c]."""
        x = self.q[:, :, span].to(self.wide) * self.scale
        return x.flatten(1, 2).mT.contiguous()

    def keys(self, span: slice) -> Tensor:
        """Centred keys of a chunk: [n, d, c]."""
        y = self.k[:, span].to(self.wide)
        y = y if self.center is None else y - self.center[:, None, :]
        return y.mT.contiguous()

    def values(self, span: slice) -> Tensor:
        """``[V, 1]`` of a chunk, zero for ignored keys: [n, c, e]."""
        v = self.v[:, span].to(self.wide)
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
        # a masked value may be anything, NaN included
        return v if self.mask is None else torch.where(self.mask[:, span, None], v, 0.0)

    def split(self) -> Iterator[tuple[slice, Heads]]:
        """Yield groups of heads whose features fit into the scratch memory."""
        n, group, _, dim = self.q.shape
        bytes_of_one = feature_count(dim, self.degree) * self.chunk * group * self.wide.itemsize
        budget = _SCRATCH.get(self.q.device.type, _SCRATCH_ELSEWHERE)
        size = max(1, budget // bytes_of_one)
        for start in range(0, n, size):
            span = slice(start, start + size)
            center = None if self.center is None else self.center[span]
            mask = None if self.mask is None else self.mask[span]
            tensors = (self.q[span], self.k[span], self.v[span], center, mask)
            yield span, Heads(*tensors, self.coefficients, self.scale, self.causal, self.chunk)


def _ratios(heads: Heads) -> Tensor | None:
    """Ratio of the polynomial's to Taylor's coefficient for each feature, [k, 1]; None if all ratios are 1."""
    ratios = [c * math.factorial(t) for t, c in enumerate(heads.coefficients)]
    if all(abs(ratio - 1) < 1e-15 for ratio in ratios):
        return None
    degrees = poly_tables(heads.q.shape[-1], heads.degree, heads.q.device).degrees
    return torch.tensor(ratios, dtype=heads.wide, device=heads.q.device)[degrees.long(), None]


class _State:
    """A running sum of ``features^T rows``, [n, k, e]. ``read`` applies the polynomial's coefficients."""

    def __init__(self, heads: Heads) -> None:
        n, dim = heads.q.shape[0], heads.q.shape[-1]
        size = (n, feature_count(dim, heads.degree), heads.v.shape[-1] + 1)
        self.sum = torch.zeros(size, dtype=heads.wide, device=heads.q.device)
        self.ratios = _ratios(heads)

    def add(self, features: Tensor, rows: Tensor) -> None:
        """Add a chunk: features [n, k, c], rows [n, c, e]."""
        # in place, by an op that torch's FLOP counter knows
        torch.baddbmm(self.sum, features, rows, out=self.sum)

    def read(self) -> Tensor:
        """Return the sum, each row multiplied by its ratio of coefficients."""
        return self.sum if self.ratios is None else self.sum * self.ratios


def _chunk_products(heads: Heads, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Products [n, g c, c] of a chunk's queries [n, d, g c] and keys [n, d, c], and the causal mask."""
    length = y.shape[-1]
    visible = torch.ones(length, length, dtype=torch.bool, device=y.device).tril()
    return torch.bmm(x.mT, y), visible.repeat(x.shape[-1] // length, 1)


def forward(heads: Heads) -> tuple[Tensor, Tensor]:
    """Output [n, g, L, e - 1] in the dtype of the inputs, and the normalisers [n, g, L]."""
    n, group, length, _ = heads.q.shape
    out = heads.v.new_empty(n, group, length, heads.v.shape[-1])
    normaliser = torch.empty(n, group, length, dtype=heads.wide, device=out.device)
    for span, subset in heads.split():
        (_forward_causal if heads.causal else _forward_full)(subset, out[span], normaliser[span])
    return out, normaliser


def _divide(sums: Tensor, out: Tensor, normaliser: Tensor) -> None:
    """Divide a chunk's numerators by their denominators; write zero where a denominator is zero."""
    sums = sums.unflatten(1, (out.shape[1], -1))
    total = sums[..., -1]
    normaliser.copy_(total)
    out.copy_(sums[..., :-1] / torch.where(total == 0, 1.0, total)[..., None])


def _forward_full(heads: Heads, out: Tensor, normaliser: Tensor) -> None:
    state = _State(heads)
    for span in heads.slices(heads.k.shape[1]):
        state.add(poly_features(heads.keys(span), heads.degree), heads.values(span))
    state_sum = state.read()
    for span in heads.slices(heads.q.shape[2]):
        sums = torch.bmm(poly_features(heads.queries(span), heads.degree).mT, state_sum)
        _divide(sums, out[:, :, span], normaliser[:, :, span])


def _forward_causal(heads: Heads, out: Tensor, normaliser: Tensor) -> None:
    state = _State(heads)
    slices = heads.slices(heads.k.shape[1])
    for span in slices:
        x, y, values = heads.queries(span), heads.keys(span), heads.values(span)
        products, visible = _chunk_products(heads, x, y)
        sums = torch.bmm(polynomial(products, heads.coefficients).mul_(visible), values)
        if span.start:
            torch.baddbmm(sums, poly_features(x, heads.degree).mT, state.read(), out=sums)
        if span is not slices[-1]:
            state.add(poly_features(y, heads.degree), values)
        _divide(sums, out[:, :, span], normaliser[:, :, span])


@dataclass(frozen=True)
class _Upstream:
    """Output and gradient of some heads, and the tensors for the gradients of q, k and v (None: not wanted)."""

    grad: Tensor
    out: Tensor
    normaliser: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None

    def rows(self, span: slice, wide: torch.dtype) -> Tensor:
        """``[dO / D, -(dO . O) / D]`` of a chunk of queries: [n, g c, e]."""
        grad, out, total = (
            self.grad[:, :, span].to(wide),
            self.out[:, :, span].to(wide),
            self.normaliser[:, :, span, None],
        )
        rows = torch.cat([grad, -(grad * out).sum(dim=-1, keepdim=True)], dim=-1)
        return torch.where(total == 0, 0.0, rows / total).flatten(1, 2)


def backward(
    heads: Heads, grad: Tensor, out: Tensor, normaliser: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v, in their dtype, from the output's gradient; None where not wanted."""
    inputs = (heads.q, heads.k, heads.v)
    # row-major whatever the layout of the inputs: a compiled graph relies on these strides
    results = [
        torch.zeros(x.shape, dtype=heads.wide, device=x.device) if want else None
        for x, want in zip(inputs, wanted, strict=True)
    ]
    for span, subset in heads.split():
        rows = [None if result is None else result[span] for result in results]
        upstream = _Upstream(grad[span], out[span], normaliser[span], *rows)
        (_backward_causal if heads.causal else _backward_full)(subset, upstream)
    dq, dk, dv = (None if x is None else x.to(heads.q.dtype) for x in results)
    return dq, dk, dv


def _add_queries(heads: Heads, up: _Upstream, span: slice, x: Tensor, grad: Tensor) -> None:
    """Add the gradient of a chunk's queries, from the gradient of their features."""
    if up.dq is not None:
        dx = poly_features_backward(grad, x, heads.degree).mT.unflatten(1, (heads.q.shape[1], -1))
        up.dq[:, :, span] += dx * heads.scale


def _add_keys(heads: Heads, up: _Upstream, span: slice, y: Tensor, suffix: Tensor) -> None:
    """Add the gradients of a chunk's keys and values; ``suffix`` is T, the state of the later queries."""
    if up.dk is not None:
        grad = torch.bmm(suffix, heads.values(span).mT)
        up.dk[:, span] += poly_features_backward(grad, y, heads.degree).mT
    if up.dv is not None:
        _add_values(heads, up.dv, span, torch.bmm(poly_features(y, heads.degree).mT, suffix[..., :-1]))


def _add_values(heads: Heads, dv: Tensor, span: slice, rows: Tensor) -> None:
    dv[:, span] += rows if heads.mask is None else torch.where(heads.mask[:, span, None], rows, 0.0)


def _backward_full(heads: Heads, up: _Upstream) -> None:
    query_slices, key_slices = heads.slices(heads.q.shape[2]), heads.slices(heads.k.shape[1])
    keys_wanted = up.dk is not None or up.dv is not None
    state, suffix = _State(heads), _State(heads)
    if up.dq is not None:
        for span in key_slices:
            state.add(poly_features(heads.keys(span), heads.degree), heads.values(span))
    state_sum = state.read()
    for span in query_slices:
        x, rows = heads.queries(span), up.rows(span, heads.wide)
        if up.dq is not None:
            _add_queries(heads, up, span, x, torch.bmm(state_sum, rows.mT))
        if keys_wanted:
            suffix.add(poly_features(x, heads.degree), rows)
    if keys_wanted:
        suffix_sum = suffix.read()
        for span in key_slices:
            _add_keys(heads, up, span, heads.keys(span), suffix_sum)


def _backward_causal(heads: Heads, up: _Upstream) -> None:
    slices = heads.slices(heads.k.shape[1])
    state = _State(heads)
    for span in slices:
        x, y, values, rows = heads.queries(span), heads.keys(span), heads.values(span), up.rows(span, heads.wide)
        _backward_within(heads, up, span, x, y, values, rows)
        if up.dq is not None:
            if span.start:
                _add_queries(heads, up, span, x, torch.bmm(state.read(), rows.mT))
            if span is not slices[-1]:
                state.add(poly_features(y, heads.degree), values)
    if up.dk is None and up.dv is None:
        return
    suffix = _State(heads)
    for span in reversed(slices):
        if span is not slices[-1]:
            _add_keys(heads, up, span, heads.keys(span), suffix.read())
        if span.start:
            suffix.add(poly_features(heads.queries(span), heads.degree), up.rows(span, heads.wide))


def _backward_within(
    heads: Heads, up: _Upstream, span: slice, x: Tensor, y: Tensor, values: Tensor, rows: Tensor
) -> None:
    """Add the gradients that come from pairs of a query and a key inside one chunk."""
    products, visible = _chunk_products(heads, x, y)
    if up.dv is not None:
        weights = polynomial(products, heads.coefficients).mul_(visible)
        _add_values(heads, up.dv, span, torch.bmm(weights.mT, rows[..., :-1]))
    if up.dq is None and up.dk is None:
        return
    slope = [t * c for t, c in enumerate(heads.coefficients)][1:] or [0.0]
    grad = polynomial(products, slope).mul_(visible).mul_(torch.bmm(rows, values.mT))
    if up.dq is not None:
        up.dq[:, :, span] += torch.bmm(grad, y.mT).unflatten(1, (heads.q.shape[1], -1)) * heads.scale
    if up.dk is not None:
        up.dk[:, span] += torch.bmm(grad.mT, x.mT)
