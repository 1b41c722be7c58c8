"""Which parameter of an adapted model goes to which rule of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_A, _B = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B")


def lora_groups(
    model: nn.Module,
    *,
    a: Mapping[str, Any] | None = None,
    b: Mapping[str, Any] | None = None,
    rest: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of an adapted model: A, B, and the rest, each parameter exactly once.

    Args:
        model: adapted; what needs no gradient is left out.
        a, b: options of the groups of A (r, in) and of B (out, r), such as ``lr`` or an optimizer's ``algorithm``.
            LoRA+ (Hayou, Ghosh, Yu, arXiv 2402.12354) gives B a rate several times A's.
        rest: options of everything else that is trained: magnitudes, biases, modules trained whole.

    Returns:
        Dicts with ``name`` (``"lora_A"``, ``"lora_B"``, ``"rest"``), ``params`` (pairs of name and parameter, as
        torch's optimizers take them) and the options; groups without parameters are left out.

    Raises:
        ValueError: for a model in which nothing is trained.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {"lora_A": [], "lora_B": [], "rest": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "lora_A" if name.endswith(_A) else "lora_B" if name.endswith(_B) else "rest"
            members[group].append((name, parameter))
    options = {"lora_A": a, "lora_B": b, "rest": rest}
    groups = [{**(options[name] or {}), "name": name, "params": params} for name, params in members.items() if params]
    if not groups:
        raise ValueError("lora_groups: no parameter of the model needs a gradient; apply_lora gives it some that do")
    return groups
