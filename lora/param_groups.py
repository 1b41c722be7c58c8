"""Parameter groups of an adapted model for an optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

# PEFT adds the adapter's name: "q_proj.lora_A.default.weight", "wte.lora_embedding_B.default"
_FACTOR = re.compile(r"(?:^|\.)lora_(?:embedding_)?([AB])(?:\.|$)(?!(?:.*\.)?bias$)")


def lora_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    lr_ratio: float | None = None,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
    rest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Split the trained parameters of an adapted model into groups for A, B and the rest.

    Args:
        model: adapted by leanstep or PEFT. Parameters that need no gradient are left out.
        lr: learning rate of A and of all other trained parameters; None: that of the optimizer.
        lr_ratio: learning rate of B as a multiple of ``lr``, at least 1: LoRA+ (Hayou, Ghosh, Yu, arXiv 2402.12354),
            which recommends 16. Needs ``lr``.
        a, b: options for A (r, in) and B (out, r), such as ``lr`` or an optimizer's ``algorithm``; they override the
            rates above.
        rest: options for all other trained parameters: magnitudes, biases, modules trained whole.

    Returns:
        Dicts with ``name`` (``"lora_A"``, ``"lora_B"``, ``"rest"``), ``params`` (pairs of name and parameter, as
        torch's optimizers take them) and the options. Empty groups are left out.

    Raises:
        ValueError: for a model that trains no parameter, or neither A nor B; for an ``lr_ratio`` without ``lr``, below
            1, or for a model that trains no B.

    Notes:
        Warns about options for an empty group.
    """
    if lr_ratio is not None and (lr is None or not lr_ratio >= 1):
        raise ValueError(f"lora_groups: expected lr, and lr_ratio >= 1 (LoRA+), got lr={lr!r}, lr_ratio={lr_ratio!r}")
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"lora_A": [], "lora_B": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = _FACTOR.search(name)
            groups[f"lora_{factor.group(1)}" if factor else "rest"].append((name, parameter))
    if not any(groups.values()):
        raise ValueError("lora_groups: no parameter of the model needs a gradient; call apply_lora first")
    if not groups["lora_A"] and not groups["lora_B"]:
        raise ValueError(
            f"lora_groups: expected trained parameters called lora_A or lora_B, got {len(groups['rest'])} others, such "
            f"as {groups['rest'][0][0]}; adapt the model with apply_lora or PEFT first"
        )
    options = {"lora_A": a, "lora_B": b, "rest": rest}
    unused = [name for name, parameters in groups.items() if options[name] and not parameters]
    if unused:
        warnings.warn(
            f"lora_groups: ignored the options for {', '.join(unused)}: the model trains no such parameter",
            stacklevel=2,
        )
    if lr_ratio is not None and not groups["lora_B"]:
        raise ValueError(f"lora_groups: lr_ratio={lr_ratio!r} is a rate of B, and the model trains no lora_B")
    rates = {name: {} if lr is None else {"lr": lr * (lr_ratio or 1) if name == "lora_B" else lr} for name in groups}
    return [
        {**rates[name], **(options[name] or {}), "name": name, "params": params}
        for name, params in groups.items()
        if params
    ]
