"""Low-rank attention in a model, only where it is close enough and cheaper, and exact attention everywhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from leanstep.kernels._modes import unseen
from leanstep.kernels.poly.attention import poly_attention
from leanstep.lora.attention.attention import LowRankAttentionError, check_normalisers, key_means
from leanstep.lora.attention.cost import AttentionShape, break_even, cost_ratio, measure_speed
from leanstep.lora.attention.error_bounds import largest_logit
from leanstep.lora.attention.features import taylor_coefficients
from leanstep.lora.attention.gate_checks import (
    NON_FINITE,
    all_finite,
    autocasted_seen,
    distance,
    exact_attention,
    verdict,
    why_impossible,
)
from leanstep.lora.attention.gate_state import GateReport, LayerState, Plan, check_state
from leanstep.lora.attention.interface import Call, Tap, attach, detach
from leanstep.lora.attention.norms import Seen, head_norms, sample_rows, sampled_error

__all__ = ["LowRankGate"]

MODES = ("exact", "auto", "force")


class LowRankGate:
    """Lets the attention layers of a transformers model run low-rank where that is certified or measured, and pays.

    In mode ``"auto"`` a layer runs exactly until ``patience`` judgements in a row find all its heads within the
    tolerance (by the bound ``scale * max |q| * max |k|``, or by sampled logits and the error on sampled queries) and
    low-rank attention predicted cheaper at this length. From then on **every** call compares sampled queries with exact
    attention; where they differ by more than the tolerance, a normaliser is not positive, something overflows or is
    not finite, the same call is answered exactly, and the layer starts over. What is measured is reported either way.

    Args:
        model: a transformers model that calls attention by name (LLaMA, GPT-2 and others). The implementation it has is
            the exact one, and comes back with :meth:`close`.
        mode: ``"exact"`` (default), ``"auto"``, or ``"force"``, for research: low-rank wherever it is possible at all,
            whatever the error.
        degree: of Taylor's sum; even.
        tolerance: of the relative error of softmax weights, and of the output on sampled queries.
        every: calls of a layer between judgements, while it runs exactly.
        patience: judgements in a row that must be good. With 2 and more, what is taken off the keys comes from batches
            before, and causal attention stays causal.
        rows: queries compared in every low-rank call; sequences: of how many of a batch, others every time. The bound
            of the logits is of the whole batch.
        spot_every: low-rank calls of a layer in training between comparisons of one head's gradients with exact ones,
            which take the time of exact attention of one head; 0 for none.
        chunk_size: as in :func:`leanstep.lora.low_rank_attention`.
        speed: time of an operation over exact attention's; None measures it, about a second once (see
            :func:`leanstep.lora.attention.cost.measure_speed`), unless a loaded state has it; 1 compares operations.
        seed: of the samples.

    Raises:
        ValueError: for a model without such layers, or a setting out of range; the model is unchanged.
        LowRankAttentionError: in a forward pass, in mode ``"force"``, for a normaliser that is not positive.

    Notes:
        Never low-rank, with the reason in the report: dropout in attention, one query against a cache, masks other than
        causal and padding, soft caps, sinks and position biases, dtypes that differ. Under autocast, q, k and v get its
        dtype first, as torch casts them for exact attention. The check of every low-rank call reads one number back
        from the device. Processes of a distributed run decide each for itself, which is sound:
        attention exchanges nothing. The pass that activation checkpointing repeats does what the first one did. With
        :meth:`state_dict`, training that is resumed decides as it would have without the break.

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

    def __init__(
        self,
        model: nn.Module,
        mode: str = "exact",
        *,
        degree: int = 2,
        tolerance: float = 0.05,
        every: int = 50,
        patience: int = 2,
        rows: int = 64,
        sequences: int = 2,
        spot_every: int = 200,
        chunk_size: int = 128,
        speed: float | None = None,
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"LowRankGate: expected mode 'exact', 'auto' or 'force', got {mode!r}")
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 2 or degree % 2:
            raise ValueError(f"LowRankGate: expected an even degree >= 2, whose sums are positive, got {degree!r}")
        for name, value, least in (
            ("every", every, 1), ("patience", patience, 1), ("rows", rows, 1), ("sequences", sequences, 1),
            ("spot_every", spot_every, 0), ("chunk_size", chunk_size, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"LowRankGate: expected {name} >= {least}, got {value}")
        if not tolerance > 0 or (speed is not None and not speed > 0):
            raise ValueError(f"LowRankGate: expected tolerance > 0 and speed > 0, got {tolerance} and {speed}")
        taken = [tap.name for tap in attach(model).values() if tap.gate is not None]
        if taken:
            raise ValueError(f"LowRankGate: {taken[0]} has a gate already; close that one first")
        self.model, self.mode, self.degree, self.tolerance = model, mode, degree, tolerance
        self.every, self.patience, self.rows, self.sequences = every, patience, rows, sequences
        self.spot_every, self.chunk_size, self.speed = spot_every, chunk_size, speed
        self.coefficients = taylor_coefficients(degree)
        self.generator = torch.Generator().manual_seed(seed)
        self._speeds: dict[str, float] = {}
        self._taps: dict[nn.Module, Tap] = attach(model)
        self._layers = {layer: LayerState(tap.name) for layer, tap in self._taps.items()}
        for tap in self._taps.values():
            tap.gate = self

    def __enter__(self) -> LowRankGate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the gate off; the model has its own attention back. The report stays."""
        for tap in self._taps.values():
            if tap.gate is self:
                tap.gate = None
        if self._taps:
            detach(self.model)
        self._taps = {}

    def report(self) -> list[GateReport]:
        """What every layer did and does, in the order of the model."""
        return [state.report() for state in self._layers.values()]

    def diagnostics(self) -> dict[str, float]:
        """Numbers for a log: the share of low-rank calls, fallbacks, and the last measured error of every layer."""
        rows = self.report()
        calls = max(1, sum(row.calls for row in rows))
        found = {
            "low-rank calls": sum(row.low_rank_calls for row in rows) / calls,
            "fallbacks": float(sum(row.fallbacks for row in rows)),
        }
        found |= {f"gate error/{row.layer}": row.error for row in rows if row.error is not None}
        for row in rows:
            found |= {f"gate {kind} error/{row.layer}": value for kind, value in row.gradient_errors.items()}
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that decides what the next calls do, as tensors, numbers and texts: the layers' decisions, counters,
        errors and key means, the measured speeds, and the generator of the samples.
        """
        return {
            "settings": self._settings(),
            "generator": self.generator.get_state(),
            "speeds": dict(self._speeds),
            "layers": {state.name: state.to_dict() for state in self._layers.values()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the gate did whose :meth:`state_dict` this is: the same calls then get the same answers.

        Raises:
            ValueError: for a state of other layers, or of another degree or tolerance; the gate is unchanged.
        """
        check_state(state, (layer.name for layer in self._layers.values()), self._settings())
        for module, layer in self._layers.items():
            layer.restore(state["layers"][layer.name], next(module.parameters()).device)
        self.generator.set_state(state["generator"].cpu())
        self._speeds = dict(state["speeds"])

    def _settings(self) -> dict[str, Any]:
        """What decisions are made for."""
        return {"degree": self.degree, "tolerance": self.tolerance}

    # --- one call ---------------------------------------------------------------------------------------------------

    def answer(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Attention of one call, exact or not; called by the layer."""
        state = self._layers[call.layer]
        call = replace(call, seen=autocasted_seen(call.seen))
        if _in_backward():
            if not state.plan.low_rank:
                return call.exact()
            return _as_layer(self._attention(call.seen, state.plan.center)[0])
        state.calls += 1
        # what is measured is no part of a pass that is repeated
        out = self._low_rank(call, state) if unseen(lambda: self._wanted(call, state)) else None
        if out is not None:
            state.low_rank_calls += 1
            return _as_layer(out)
        state.plan = Plan(False, None)
        return call.exact()

    def _wanted(self, call: Call, state: LayerState) -> bool:
        """Whether the call is to run low-rank; says why not."""
        if self.mode == "exact":
            state.reason = "mode is 'exact'"
            return False
        impossible = why_impossible(call)
        if impossible is not None:
            state.reason = impossible
            return False
        seen = call.seen
        (batch, heads, length, dim), key_heads = seen.query.shape, seen.key.shape[1]
        shape = AttentionShape(heads, key_heads, length, dim, seen.value.shape[-1], seen.causal, batch)
        settings = (self.degree, self.chunk_size, self._speed(seen))
        state.cost = cost_ratio(shape, *settings, backward=torch.is_grad_enabled())
        if self.mode == "force":
            state.reason = "mode is 'force'"
            return True
        # a layer that is on is compared in every call
        if not state.on and ((state.calls - 1) % self.every == 0 or 0 < state.good < self.patience):
            self._judge(call, state)
        if state.on and state.cost >= 1:
            state.reason = (
                f"close enough, but predicted to cost {state.cost:.2g} of exact attention at length {length:,}; it "
                f"pays from {break_even(shape, *settings, backward=torch.is_grad_enabled()):,} on"
            )
        return state.on and state.cost < 1

    def _speed(self, seen: Seen) -> float:
        if self.speed is not None:
            return self.speed
        dim, wide, device, dtype = seen.query.shape[-1], seen.value.shape[-1], seen.query.device, seen.query.dtype
        # without the device's number, which may be another where a saved state is loaded
        kind = f"{dim} {wide} {device.type} {dtype}"
        if kind not in self._speeds:
            self._speeds[kind] = measure_speed(dim, wide, self.degree, device, dtype, self.chunk_size)
        return self._speeds[kind]

    def _sequences(self, seen: Seen) -> slice:
        """Some neighbouring sequences of the batch, others every time."""
        last = max(0, seen.query.shape[0] - self.sequences)
        start = int(torch.randint(last + 1, (), generator=self.generator))
        return slice(start, start + self.sequences)

    def _judge(self, call: Call, state: LayerState) -> None:
        """Look at the norms of all heads and at the error on sampled queries, and switch the layer on or off."""
        seen = call.seen.some(self._sequences(call.seen))
        found = head_norms(seen, degrees=(self.degree,), rows=self.rows, center=state.center, generator=self.generator)
        # the certificate is of the whole batch
        shift = key_means(call.seen.key, call.seen.key_mask) if state.center is None else state.center
        moved = call.seen.key.detach() - shift[..., None, :]
        certified = float(largest_logit(call.seen.query, moved, call.seen.scale, call.seen.key_mask).max())
        sampled = float(found.sampled.max())
        state.error, state.logit = float(found.errors.max()), sampled
        good, why = verdict(certified, sampled, state.error, self.coefficients, self.tolerance)
        if why != NON_FINITE:
            means = key_means(seen.key, seen.key_mask).mean(dim=0)
            state.center = means if state.center is None else state.center.lerp(means, 0.1)
        state.good = state.good + 1 if good else 0
        state.on = state.good >= self.patience
        waiting = "" if state.on or not good else f" ({state.good} of {self.patience} judgements)"
        state.reason = why + waiting

    def _low_rank(self, call: Call, state: LayerState) -> Tensor | None:
        """The output if it passes the checks; None for exact attention instead."""
        out, total = self._attention(call.seen, state.center)
        return out if unseen(lambda: self._passes(call.seen, out, total, state)) else None

    def _passes(self, seen: Seen, out: Tensor, total: Tensor, state: LayerState) -> bool:
        """Whether an output and its normalisers are good; the layer falls back if they are not."""
        center = state.center
        try:
            check_normalisers(total.detach(), self.coefficients, seen.causal, seen.key_mask)
        except LowRankAttentionError as error:
            if self.mode == "force":
                raise
            self._fall_back(state, str(error) if all_finite(seen) else NON_FINITE)
            return False
        chosen = self._sequences(seen)
        few = seen.some(chosen)
        at = sample_rows(seen.query.shape[2], self.rows, self.generator).to(out.device)
        state.error = float(sampled_error(few, out[chosen], at).max())
        if self.mode == "auto" and not state.error <= self.tolerance:
            why = f"sampled error {state.error:.2g} is over the tolerance {self.tolerance:g}"
            self._fall_back(state, why if math.isfinite(state.error) or all_finite(seen) else NON_FINITE)
            return False
        state.largest_error = max(state.largest_error, state.error)
        state.plan = Plan(True, center)
        if self.mode == "force" or not seen.causal or state.low_rank_calls % 8 == 0:
            means = key_means(few.key, few.key_mask).mean(dim=0)
            state.center = means if center is None else center.lerp(means, 0.1)
        if self.spot_every and out.requires_grad and state.low_rank_calls % self.spot_every == 0:
            self._spot_check(seen, center, out, state)
        return True

    def _fall_back(self, state: LayerState, why: str) -> None:
        state.on, state.good, state.fallbacks, state.reason = False, 0, state.fallbacks + 1, f"fell back: {why}"

    def _attention(self, seen: Seen, center: Tensor | None) -> tuple[Tensor, Tensor]:
        # by hand what low_rank_attention does, since the normalisers are wanted
        return poly_attention(
            seen.query, seen.key, seen.value, self.coefficients, scale=seen.scale, causal=seen.causal, center=center,
            key_mask=seen.key_mask, chunk=self.chunk_size,
        )  # fmt: skip

    def _spot_check(self, seen: Seen, center: Tensor | None, out: Tensor, state: LayerState) -> None:
        """Once the gradient of the output is there, compare one head's gradients with those of exact attention."""
        group = seen.query.shape[1] // seen.key.shape[1]
        batch = int(torch.randint(seen.query.shape[0], (), generator=self.generator))
        head = int(torch.randint(seen.query.shape[1], (), generator=self.generator))
        key_head = head // group
        q, k, v = (
            x.detach()[batch, at][None, None]
            for x, at in ((seen.query, head), (seen.key, key_head), (seen.value, key_head))
        )
        mask = None if seen.key_mask is None else seen.key_mask[batch : batch + 1]
        shift = None if center is None else center[key_head][None]

        @torch.enable_grad()
        def compare(grad: Tensor) -> None:
            own = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
            alone = Seen(*own, seen.scale, seen.causal, mask)
            upstream = grad.detach()[batch, head][None, None]
            found, _ = self._attention(alone, shift)
            want = exact_attention(alone)
            grads = [torch.autograd.grad(y, (alone.query, alone.key, alone.value), upstream) for y in (found, want)]
            pairs = zip(("O", "dQ", "dK", "dV"), (found, *grads[0]), (want, *grads[1]), strict=True)
            state.gradient_errors = {kind: distance(a.detach(), b.detach()) for kind, a, b in pairs}

        out.register_hook(compare)


def _as_layer(out: Tensor) -> tuple[Tensor, None]:
    """[B, H, L, e] as transformers' layers want it, [B, L, H, e], and no weights."""
    return out.transpose(1, 2).contiguous(), None


def _in_backward() -> bool:
    """Whether autograd is running: then a forward pass is one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1
