"""A gate that runs low-rank attention where it is accurate enough and cheaper, and exact attention elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from leanstep.kernels.op import outside_dispatch_modes
from leanstep.kernels.poly.attention import poly_attention
from leanstep.lora.attention.attention import (
    LowRankAttentionError,
    check_normalisers,
    key_means,
    relative_error,
    softmax_error,
    taylor_coefficients,
)
from leanstep.lora.attention.cost import AttentionShape, break_even, cost_ratio, measure_speed
from leanstep.lora.attention.error_bounds import largest_logit
from leanstep.lora.attention.gate_state import GateReport, LayerState, check_state
from leanstep.lora.attention.interface import AttentionInputs, Call, Tap, attach, detach
from leanstep.lora.attention.norms import NON_FINITE, head_norms, sample_rows, sampled_error
from leanstep.lora.layers.linear import autocasted

MODES = ("exact", "auto", "force")


class LowRankGate:
    """Runs attention layers of a transformers model low-rank where that is accurate enough and cheaper.

    In mode ``"auto"``, a layer runs exactly until two conditions hold. First, ``patience`` consecutive judgements find
    all its heads within the tolerance, by the bound ``scale * max |q| * max |k|`` or by sampled logits and the error on
    sampled queries. Second, low-rank attention is predicted to be cheaper at this length. From then on **every** call
    compares sampled queries with exact attention. The layer falls back if their error exceeds the tolerance, or a
    normaliser is not positive, or a number is not finite: it computes this call exactly and starts over.
    :meth:`report` returns all measurements.

    Args:
        model: a transformers model that calls attention by name (LLaMA, GPT-2 and others). Its own implementation is
            the exact one; :meth:`close` restores it.
        mode: ``"exact"``, ``"auto"``, or, for research, ``"force"``: low-rank wherever possible, at any error.
        degree: even degree of Taylor's sum.
        tolerance: largest accepted relative error of softmax weights, and of the output on sampled queries.
        every: number of calls between judgements of a layer that runs exactly.
        patience: number of consecutive favourable judgements needed. From 2 on, the mean subtracted from the keys comes
            from earlier batches, so causal attention stays causal.
        speed: seconds per operation relative to exact attention; 1 compares operations. None: measure it once, in about
            a second (:func:`leanstep.lora.attention.cost.measure_speed`), or take it from a loaded state.
        seed: seed of the samples.

    Raises:
        ValueError: for a model without such layers, or a setting out of range; the model is unchanged.
        LowRankAttentionError: in a forward pass, in mode ``"force"``, for a normaliser that is not positive.

    Notes:
        Some calls always run exactly, and the report gives the reason: dropout in attention, one query against a cache,
        masks other than causal and padding, soft caps, sinks, position biases, and mixed dtypes. Under autocast, q, k
        and v are cast to its dtype first, as torch does for exact attention. Every low-rank call reads one number back
        from the device, and every 200th low-rank training call of a layer compares one head's gradients with exact
        ones. Samples are 64 queries of two sequences of the batch, drawn anew for every call; the bound on the logits
        covers the whole batch. Each process of a distributed run decides for itself; attention exchanges nothing. The
        recomputation of activation checkpointing follows the decision of the first pass. A run resumed with
        :meth:`state_dict` makes the same decisions as an uninterrupted one.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from leanstep.lora import LowRankGate
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2))
        >>> with LowRankGate(model, mode="auto", speed=1) as gate:
        ...     _ = model(torch.randint(64, (1, 40)))
        >>> gate.report()[0].low_rank
        False
    """

    # queries compared in every low-rank call, and the number of sequences that they come from
    rows, sequences = 64, 2
    # low-rank training calls of a layer between two comparisons of gradients, which cost exact attention of one head
    spot_every = 200

    def __init__(
        self,
        model: nn.Module,
        mode: str = "exact",
        *,
        degree: int = 2,
        tolerance: float = 0.05,
        every: int = 50,
        patience: int = 2,
        speed: float | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"LowRankGate: expected mode 'exact', 'auto' or 'force', got {mode!r}")
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
            raise ValueError(f"LowRankGate: expected an even degree >= 2, whose sums are positive, got {degree!r}")
        if every < 1 or patience < 1:
            raise ValueError(f"LowRankGate: expected every >= 1 and patience >= 1, got {every} and {patience}")
        if not tolerance > 0 or (speed is not None and not speed > 0):
            raise ValueError(f"LowRankGate: expected tolerance > 0 and speed > 0, got {tolerance} and {speed}")
        gated = [tap.name for tap in attach(model).values() if tap.gate is not None]
        if gated:
            raise ValueError(f"LowRankGate: {gated[0]} has a gate already; close that one first")
        self.model, self.mode, self.degree, self.tolerance = model, mode, degree, tolerance
        self.every, self.patience, self.speed = every, patience, speed
        self.coefficients = taylor_coefficients(degree)
        self._settings = {"degree": degree, "tolerance": tolerance}
        self.generator = torch.Generator().manual_seed(seed)
        self._speeds: dict[str, float] = {}
        self._taps: dict[nn.Module, Tap] = attach(model)
        self._layers = {layer: LayerState(tap.name) for layer, tap in self._taps.items()}
        for tap in self._taps.values():
            tap.gate = self.answer

    def __enter__(self) -> LowRankGate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the gate and restore the model's own attention. The report stays."""
        for tap in self._taps.values():
            if tap.gate == self.answer:
                tap.gate = None
        if self._taps:
            detach(self.model)
        self._taps = {}

    def report(self) -> list[GateReport]:
        """One report per layer, in the model's order."""
        return [state.report() for state in self._layers.values()]

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log: fraction of low-rank calls, number of fallbacks, and last error of every layer."""
        rows = self.report()
        calls = max(1, sum(row.calls for row in rows))
        numbers = {
            "low-rank calls": sum(row.low_rank_calls for row in rows) / calls,
            "fallbacks": float(sum(row.fallbacks for row in rows)),
        }
        numbers |= {f"gate error/{row.layer}": row.error for row in rows if row.error is not None}
        for row in rows:
            numbers |= {f"gate {kind} error/{row.layer}": value for kind, value in row.gradient_errors.items()}
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """The state that future decisions depend on, as tensors, numbers and strings.

        Contains the layers' decisions, counters, errors and key means, the measured speeds, and the random generator.
        """
        return {
            "settings": dict(self._settings),
            "generator": self.generator.get_state(),
            "speeds": dict(self._speeds),
            "layers": {state.layer: state.to_dict() for state in self._layers.values()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load another gate's :meth:`state_dict`. The same calls then get the same decisions.

        Raises:
            ValueError: for a state of other layers, or of another degree or tolerance; the gate is unchanged.
        """
        check_state(state, (layer.layer for layer in self._layers.values()), self._settings)
        for module, layer in self._layers.items():
            layer.restore(state["layers"][layer.layer], next(module.parameters()).device)
        self.generator.set_state(state["generator"].cpu())
        self._speeds = dict(state["speeds"])

    # --- one call ---------------------------------------------------------------------------------------------------

    def answer(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Compute one call, low-rank or exactly; called by the layer."""
        state = self._layers[call.layer]
        call = replace(call, inputs=autocasted_inputs(call.inputs))
        # a forward pass while autograd runs is a recomputation of activation checkpointing, which repeats the last call
        if torch._C._current_graph_task_id() != -1:
            if not state.low_rank:
                return call.exact()
            return _as_layer(self._attention(call.inputs, state.last_center)[0])
        state.calls += 1
        state.low_rank, state.last_center = False, None
        if outside_dispatch_modes(lambda: self._should_run(call, state)):
            out, total = self._attention(call.inputs, state.center)
            if outside_dispatch_modes(lambda: self._passes(call.inputs, out, total, state)):
                state.low_rank_calls += 1
                return _as_layer(out)
        return call.exact()

    def _should_run(self, call: Call, state: LayerState) -> bool:
        """Whether to run the call low-rank; ``state.reason`` says why not."""
        if self.mode == "exact":
            state.reason = "mode is 'exact'"
            return False
        impossible = why_impossible(call)
        if impossible is not None:
            state.reason = impossible
            return False
        inputs = call.inputs
        (batch, heads, length, dim), key_heads = inputs.query.shape, inputs.key.shape[1]
        shape = AttentionShape(heads, key_heads, length, dim, inputs.value.shape[-1], inputs.causal, batch)
        settings = (self.degree, self._speed(inputs), torch.is_grad_enabled())
        state.cost = cost_ratio(shape, *settings)
        if self.mode == "force":
            state.reason = "mode is 'force'"
            return True
        # a layer that runs low-rank is checked in every call instead
        if not state.on and ((state.calls - 1) % self.every == 0 or 0 < state.good < self.patience):
            self._judge(call, state)
        if state.on and state.cost >= 1:
            state.reason = (
                f"close enough, but predicted to cost {state.cost:.2g} of exact attention at length {length:,}; it "
                f"pays from {break_even(shape, *settings):,} on"
            )
        return state.on and state.cost < 1

    def _speed(self, inputs: AttentionInputs) -> float:
        if self.speed is not None:
            return self.speed
        query, dim, wide = inputs.query, inputs.query.shape[-1], inputs.value.shape[-1]
        device, dtype = query.device, query.dtype
        # omits the device's index, which may differ when a saved state is loaded
        kind = f"{dim} {wide} {device.type} {dtype}"
        if kind not in self._speeds:
            self._speeds[kind] = measure_speed(dim, wide, self.degree, device, dtype)
        return self._speeds[kind]

    def _sequences(self, inputs: AttentionInputs) -> slice:
        """A random range of neighbouring sequences of the batch."""
        last = max(0, inputs.query.shape[0] - self.sequences)
        start = int(torch.randint(last + 1, (), generator=self.generator))
        return slice(start, start + self.sequences)

    def _judge(self, call: Call, state: LayerState) -> None:
        """Measure the norms of all heads and the error on sampled queries, and switch the layer on or off."""
        inputs = call.inputs
        sample = inputs.sequences(self._sequences(inputs))
        norms = head_norms(
            sample, degrees=(self.degree,), rows=self.rows, center=state.center, generator=self.generator
        )
        # the bound covers the whole batch
        shift = key_means(inputs.key, inputs.key_mask) if state.center is None else state.center
        centred = inputs.key.detach() - shift[..., None, :]
        certified = float(largest_logit(inputs.query, centred, inputs.scale, inputs.key_mask).max())
        sampled = float(norms.sampled.max())
        state.error, state.logit = float(norms.errors.max()), sampled
        good, why = verdict(certified, sampled, state.error, self.coefficients, self.tolerance)
        if why != NON_FINITE:
            _update_center(state, sample)
        state.good = state.good + 1 if good else 0
        state.on = state.good >= self.patience
        waiting = "" if state.on or not good else f" ({state.good} of {self.patience} judgements)"
        state.reason = why + waiting

    def _passes(self, inputs: AttentionInputs, out: Tensor, total: Tensor, state: LayerState) -> bool:
        """Check an output and its normalisers; if they fail, the layer falls back to exact attention."""
        center = state.center
        try:
            check_normalisers(total.detach(), self.degree, inputs.causal, inputs.key_mask)
        except LowRankAttentionError as error:
            if self.mode == "force":
                raise
            self._fall_back(state, str(error) if all_finite(inputs) else NON_FINITE)
            return False
        sequences = self._sequences(inputs)
        sample = inputs.sequences(sequences)
        indices = sample_rows(inputs.query.shape[2], self.rows, self.generator).to(out.device)
        state.error = float(sampled_error(sample, out[sequences], indices).max())
        if self.mode == "auto" and not state.error <= self.tolerance:
            why = f"sampled error {state.error:.2g} is over the tolerance {self.tolerance:g}"
            self._fall_back(state, why if math.isfinite(state.error) or all_finite(inputs) else NON_FINITE)
            return False
        state.largest_error = max(state.largest_error, state.error)
        state.low_rank, state.last_center = True, center
        if self.mode == "force" or not inputs.causal or state.low_rank_calls % 8 == 0:
            _update_center(state, sample)
        if out.requires_grad and state.low_rank_calls % self.spot_every == 0:
            self._spot_check(inputs, center, out, state)
        return True

    def _fall_back(self, state: LayerState, why: str) -> None:
        state.on, state.good, state.fallbacks, state.reason = False, 0, state.fallbacks + 1, f"fell back: {why}"

    def _attention(self, inputs: AttentionInputs, center: Tensor | None) -> tuple[Tensor, Tensor]:
        # low_rank_attention does not return the normalisers
        return poly_attention(
            inputs.query, inputs.key, inputs.value, self.coefficients, scale=inputs.scale, causal=inputs.causal,
            center=center, key_mask=inputs.key_mask,
        )  # fmt: skip

    def _spot_check(self, inputs: AttentionInputs, center: Tensor | None, out: Tensor, state: LayerState) -> None:
        """Compare one head's gradients with those of exact attention as soon as the output's gradient arrives."""
        group = inputs.query.shape[1] // inputs.key.shape[1]
        batch = int(torch.randint(inputs.query.shape[0], (), generator=self.generator))
        head = int(torch.randint(inputs.query.shape[1], (), generator=self.generator))
        key_head = head // group
        q, k, v = (
            x.detach()[batch, index][None, None]
            for x, index in ((inputs.query, head), (inputs.key, key_head), (inputs.value, key_head))
        )
        mask = None if inputs.key_mask is None else inputs.key_mask[batch : batch + 1]
        shift = None if center is None else center[key_head][None]

        @torch.enable_grad()
        def compare(grad: Tensor) -> None:
            leaves = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
            one_head = AttentionInputs(*leaves, inputs.scale, inputs.causal, mask)
            upstream = grad.detach()[batch, head][None, None]
            outputs = self._attention(one_head, shift)[0], exact_attention(one_head)
            low_rank, exact = (
                [t.detach().float() for t in (y, *torch.autograd.grad(y, leaves, upstream))] for y in outputs
            )
            state.gradient_errors = {
                kind: float((a - b).norm() / b.norm().clamp(min=1e-30))
                for kind, a, b in zip(("O", "dQ", "dK", "dV"), low_rank, exact, strict=True)
            }

        out.register_hook(compare)


def _update_center(state: LayerState, inputs: AttentionInputs) -> None:
    """Update the running mean of the keys: 0.9 times the old one, plus 0.1 times the mean of these keys."""
    means = key_means(inputs.key, inputs.key_mask).mean(dim=0)
    state.center = means if state.center is None else state.center.lerp(means, 0.1)


def _as_layer(out: Tensor) -> tuple[Tensor, None]:
    """Transpose [B, H, L, e] to [B, L, H, e], which transformers' layers expect, with None for the weights."""
    return out.transpose(1, 2).contiguous(), None


# --- checks -----------------------------------------------------------------------------------------------------------


def why_impossible(call: Call) -> str | None:
    """The reason why a call cannot run low-rank at any norms; None if it can."""
    query, key, value = call.inputs[:3]
    if call.unsupported_mask is not None:
        return call.unsupported_mask
    if call.special:
        return f"the layer has {', '.join(call.special)}"
    if call.dropout > 0:
        return f"dropout of {call.dropout:g} on attention weights, which are not formed"
    if query.shape[2] != key.shape[2]:
        return f"{query.shape[2]} queries against a cache of {key.shape[2]} keys"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype} and {value.dtype}"
    return None


def autocasted_inputs(inputs: AttentionInputs) -> AttentionInputs:
    """Cast q, k and v as autocast does for exact attention; fp64 tensors stay fp64."""
    q, k, v = (autocasted(x) for x in inputs[:3])
    return inputs._replace(query=q, key=k, value=v)


def verdict(
    certified: float, sampled: float, error: float, coefficients: Sequence[float], tolerance: float
) -> tuple[bool, str]:
    """Decide whether a layer's low-rank attention is accurate enough, and give the reason.

    Args:
        certified, sampled: upper bound on all logits, and the largest sampled logit.
        error: relative error of the output on sampled queries.
        coefficients: coefficients of the polynomial.
        tolerance: largest accepted error of softmax weights and of the output.
    """
    # norms of finite queries and keys can overflow fp32
    if not (math.isfinite(certified) and math.isfinite(sampled)):
        return False, NON_FINITE
    weight_errors = [softmax_error(relative_error(coefficients, min(s, 1e3))) for s in (certified, sampled)]
    if weight_errors[0] <= tolerance and math.isfinite(error):
        return True, f"certified: no logit exceeds {certified:.3g}"
    if weight_errors[1] <= tolerance and error <= tolerance:
        return True, f"measured: sampled logits reach {sampled:.3g}, with an error of {error:.2g}"
    return False, (
        f"logits reach {sampled:.3g}, where degree {len(coefficients) - 1} is off by {weight_errors[1]:.2g}; sampled "
        f"error {error:.2g}, tolerance {tolerance:g}"
    )


def all_finite(inputs: AttentionInputs) -> bool:
    """Whether all queries and all unmasked keys are finite."""
    key = inputs.key if inputs.key_mask is None else torch.where(inputs.key_mask[:, None, :, None], inputs.key, 0.0)
    return bool(inputs.query.isfinite().all() & key.isfinite().all())


def exact_attention(inputs: AttentionInputs) -> Tensor:
    """Exact attention of one head."""
    tensors = inputs.query, inputs.key, inputs.value
    if inputs.key_mask is None:
        return scaled_dot_product_attention(*tensors, is_causal=inputs.causal, scale=inputs.scale)
    mask = inputs.key_mask[:, None, None, :].expand(-1, 1, inputs.query.shape[2], -1)
    mask = mask.tril() if inputs.causal else mask
    # queries without a visible key are padding: let them see themselves to avoid NaN
    mask = mask | (~mask.any(dim=-1, keepdim=True) & torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device))
    return scaled_dot_product_attention(*tensors, attn_mask=mask, scale=inputs.scale)
