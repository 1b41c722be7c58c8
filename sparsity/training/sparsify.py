""":func:`sparsify`, which applies a method of N:M training to a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from leanstep.sparsity.functional import GRAD_FLOWS
from leanstep.sparsity.patterns import NM, abbreviate
from leanstep.sparsity.training.controller import Controller, Score
from leanstep.sparsity.training.methods import Method, resolve_schedule
from leanstep.sparsity.training.modules import SparseLayer, install, plan_layers, spare_from_broadcast
from leanstep.sparsity.training.schedules import Schedule

SCORES = ("magnitude", "gradient", "transposable")


def sparsify(
    model: nn.Module,
    patterns: Mapping[str, NM | str] | NM | str,
    *,
    schedule: Schedule | int | None = None,
    method: str | None = None,
    score: str | Score = "magnitude",
    grad_flow: str | None = None,
    srste_lambda: float | None = None,
    mask_every: int = 1,
    axis: str = "in",
    pad: str = "refuse",
    measure_every: int = 0,
) -> Controller:
    """Make layers of a model compute with N:M sparse weights while the optimizer trains their dense weights.

    In every forward pass a sparse layer computes with ``W * (P + (1 - P) * alpha)``. P keeps the N highest scores in
    every M; alpha follows the schedule. The dense W stays the optimizer's parameter. g is the gradient of the masked
    weight:

    ==================  =======================================  =====================================================
    method              schedule                                 gradient of W
    ==================  =======================================  =====================================================
    "ste"               any                                      g
    "srste"             any                                      g + lambda (1 - P) W, lambda = 2e-4
    "fixed"             any; P is made when the pattern changes  P g
    "mdgf-linear"       alpha falls linearly                     g; alpha g on pruned entries with grad_flow="decay"
    "mdgf-exponential"  alpha = exp(-c j)                        the same
    "sdgf-stepwise"     (M-1):M, M/2:M, ..., N:M                 g
    "sdgf-geometric"    8N:8M, 4N:4M, 2N:2M, N:M                 g
    "sdgf-...+mdgf-..." both at once                             g; alpha g with grad_flow="decay"
    "s-ste"             constant; computes with beta S(W)        g
    ==================  =======================================  =====================================================

    Args:
        model: any module. Linear layers, convolutions, ``nn.MultiheadAttention``, transformers' ``Conv1D`` and fused
            experts (one tensor for the matrices of all experts) can be sparse. Changed in place.
        patterns: shell-style wildcards over layer names -> pattern, such as ``{"*.mlp.*": NM(1, 8),
            "*.q_proj": "2:4"}``; the first match decides. Projections of ``nn.MultiheadAttention`` go by the names of
            their parameters (``attn.in_proj_weight``), and so do experts (``mlp.experts.gate_up_proj``). A dense
            pattern such as ``NM(1, 1)`` leaves layers out; 0:M prunes everything, with a warning. A single pattern
            applies to every such layer except a transformers model's output head, and those whose rows are shorter
            than a group (patch embeddings, depthwise convolutions), of which it warns.
        schedule: the way to N:M. An integer: number of steps; the method sets the kind. None: only for methods with
            a constant schedule.
        method: a row of the table. None: the method of the schedule's kind; "ste" for a constant schedule.
        score: "magnitude"; "gradient" (|W * gradient| of the last step); "transposable" (magnitudes, with masks that
            are N:M along the outputs too, see :func:`transposable_mask`; slower, see ``mask_every``); or a function of
            (layer, weight) that returns scores of the weight's shape, compared by magnitude.
        grad_flow: "ste", "decay" or "fixed"; None: the method's.
        srste_lambda: factor of SR-STE's term, for any method; None: the method's.
        mask_every: optimizer steps between two updates of the masks.
        axis: direction of the groups: a layer's inputs ("in"; in-channels of convolutions) or its outputs ("out").
        pad: treatment of rows that groups do not fill: "refuse", or "zero" for a shorter last group.
        measure_every: steps between two measurements for :meth:`Controller.statistics`; 0: never.

    Returns:
        The :class:`Controller`. Attach it to the optimizer, or call its ``step`` after every step.

    Raises:
        TypeError: for patterns or a schedule of another type.
        ValueError: for a rule that matches no layer; M larger than a row, or no divisor of it; a layer that is already
            parametrized, quantised or sharded; tied weights with two patterns; settings that contradict each other.
            The model is unchanged.

    Notes:
        Memory: 1 byte per sparse weight for its mask, and the masked weight while autograd holds it. The controller
        adds SR-STE's term to the gradient once per optimizer step, after clipping and unscaling. Code that adds it in
        backward adds it once per use and micro batch, and a loss scale shrinks it. Tied weights are sparse in all their
        modules. Shard the model after this call. The optimizer may be built before or after it, but a resumed run needs
        the same order: this call reorders ``model.parameters()``, and optimizers load their state by position.

    References:
        Zhou et al., arXiv 2102.04010 (SR-STE); Bambhaniya et al., arXiv 2402.04744 (MDGF, SDGF); Hu, Zhu, Chen,
        arXiv 2409.09099 (S-STE).

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> controller = sparsify(model, {"0": "2:4"}, schedule=100, method="mdgf-exponential").attach(optimizer)
    """
    resolved, plan = resolve_schedule(schedule, method)
    flow = grad_flow if grad_flow is not None else resolved.grad_flow
    factor = resolved.srste_lambda if srste_lambda is None else srste_lambda
    _check_settings(resolved, plan, flow, factor, score, mask_every, measure_every)
    layers = plan_layers(model, patterns, axis, pad)
    if resolved.continuous and any(layer.weight.shape[layer.dim] % layer.target.m for layer in layers):
        raise ValueError("sparsify: method 's-ste' needs rows that groups fill; pad='zero' is for the other methods")
    if score == "transposable":
        _check_tiles(layers)
    controller = Controller(layers, plan, resolved, score, factor, mask_every, measure_every)
    empty = [f"{layer.name} ({layer.target})" for layer in layers if layer.target.n == 0]
    if empty:
        warnings.warn(f"sparsify: patterns 0:M prune every weight of {abbreviate(empty)}", stacklevel=2)
    for layer in layers:
        install(layer, flow, resolved.continuous)
    spare_from_broadcast(model)
    controller.refresh()
    return controller


def _check_settings(
    method: Method, schedule: Schedule, flow: str, factor: float, score: Any, mask_every: int, measure_every: int
) -> None:
    for name, accepted, expected, value in (
        ("grad_flow", flow in GRAD_FLOWS, "'ste', 'decay' or 'fixed'", flow),
        ("srste_lambda", 0 <= factor < float("inf"), ">= 0", factor),
        ("score", callable(score) or score in SCORES, f"a function or one of {SCORES}", score),
        ("mask_every", isinstance(mask_every, int) and mask_every >= 1, "an integer >= 1", mask_every),
        ("measure_every", isinstance(measure_every, int) and measure_every >= 0, "an integer >= 0", measure_every),
    ):
        if not accepted:
            raise ValueError(f"sparsify: {name} must be {expected}, got {value!r}")
    if method.continuous and (schedule.kind != "constant" or flow != "ste" or factor or score != "magnitude"):
        raise ValueError(
            "sparsify: method 's-ste' takes a constant schedule, the score 'magnitude', grad_flow 'ste' and no SR-STE"
        )


def _check_tiles(layers: list[SparseLayer]) -> None:
    for layer in layers:
        shape, m = tuple(layer.weight.shape), layer.target.m
        if len(shape) != 2 or shape[0] % m or shape[1] % m:
            raise ValueError(
                f"sparsify: score 'transposable' needs matrices that tiles of {m} x {m} fill, and {layer.name!r} has a "
                f"weight of shape {shape}; leave it out of the patterns, or give it another pattern"
            )
