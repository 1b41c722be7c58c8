"""Which parameter of an adapted model goes to which rule of an optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

# also under the name of an adapter, as PEFT has it: "q_proj.lora_A.default.weight", "wte.lora_embedding_B.default"
_FACTOR = re.compile(r"(?:^|\.)lora_(?:embedding_)?([AB])(?:\.|$)(?!(?:.*\.)?bias$)")


def lora_groups(
    model: nn.Module,
    *,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
    rest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of an adapted model: A, B, and the rest, each parameter exactly once.

    Args:
        model: adapted by leanstep or PEFT; what needs no gradient is left out.
        a, b: options of the groups of A (r, in) and of B (out, r), such as ``lr`` or an optimizer's ``algorithm``.
            LoRA+ (Hayou, Ghosh, Yu, arXiv 2402.12354) gives B a rate several times A's.
        rest: options of everything else that is trained: magnitudes, biases, modules trained whole.

    Returns:
        Dicts with ``name`` (``"lora_A"``, ``"lora_B"``, ``"rest"``), ``params`` (pairs of name and parameter, as
        torch's optimizers take them) and the options; groups without parameters are left out.

    Raises:
        ValueError: for a model in which nothing is trained, or neither an A nor a B is.

    Notes:
        Warns where options are given for a group that no trained parameter belongs to.
    """
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
            f"lora_groups: the model trains nothing that belongs to {', '.join(unused)}, so these options are not used",
            stacklevel=2,
        )
    return [{**(options[name] or {}), "name": name, "params": params} for name, params in groups.items() if params]
