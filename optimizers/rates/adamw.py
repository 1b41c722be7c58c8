"""AdamW's learning rate and weight decay, in the units of Lion, SinkGD and LANTON: one rule for all."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from leanstep.optimizers.common.checks import check_number

# squared mean over variance of an entry's gradient, chosen on the nano LLaMA (docs/howto/learning-rates.md): AdamW's
# steps then have a root mean square of 0.28; without any signal it is 0.23
_SIGNAL = 0.03
# LANTON's "muon" scaling gives steps this root mean square
_MUON_LENGTH = 0.2
# Largest singular value of AdamW's step of a matrix, in that of an orthogonal step of the same root mean square. Chosen
# on a LLaMA of width 64: a signal of one direction has sqrt(64), noise up to 2. The smaller side's root is the most.
_FEW_DIRECTIONS = 4.0
# AdamW's rates where none is given, of matrices at this width and of the rest (docs/howto/learning-rates.md)
_WIDTH, _MATRICES, _REST = 128, 1e-3, 2e-2
# that of adapters: 5e-4 at a width of 2000, and this power of the width (Schulman, "LoRA Without Regret", 2025)
_ADAPTERS, _ADAPTER_WIDTH, _ADAPTER_POWER = 5e-4, 2000, 0.781


def step_length(newest: float, beta: float) -> float:
    """Return the root mean square of AdamW's steps, per unit of its rate, if AdamW averaged gradients as given.

    The average is ``newest * g + (1 - newest) * m``, with m = beta * m + (1 - beta) * g of the steps before. It keeps
    ``noise`` of the variance of g, and all of its mean. Steps of this length move as far along the mean as AdamW's.
    """
    noise = newest**2 + (1 - newest) ** 2 * (1 - beta) / (1 + beta)
    return math.sqrt((_SIGNAL + noise) / (_SIGNAL + 1))


def _length(beta: float, nesterov: bool) -> float:
    return step_length(1 - beta**2 if nesterov else 1 - beta, beta)


def _adamw(options: Mapping[str, Any], rate: Any, decay: float) -> dict[str, Any]:
    return {"lr": rate, "weight_decay": decay}


def _lion(options: Mapping[str, Any], rate: Any, decay: float) -> dict[str, Any]:
    length = step_length(1 - options["betas"][0], options["betas"][1])
    return {"lr": rate * length, "weight_decay": decay / length}


def _sinkgd(options: Mapping[str, Any], rate: Any, decay: float) -> dict[str, Any]:
    if options["algorithm"] == "adamw":
        return _adamw(options, rate, decay)
    length = _length(options["momentum"], options["nesterov"] or options["algorithm"] == "balanced")
    return {"lr": rate, "weight_decay": decay / length, "scale": length}


def _lanton(options: Mapping[str, Any], rate: Any, decay: float) -> dict[str, Any]:
    length = _length(options["betas"][0], options["nesterov"])
    radius = length
    if options["norm"] == "rms":
        smaller_side = max(min(_sides(param.shape)) for _, param in options["params"])
        radius *= min(_FEW_DIRECTIONS, math.sqrt(smaller_side)) / _MUON_LENGTH
    lengths = {"lr": rate, "weight_decay": decay, "scaling": "muon", "radius": radius}
    # the noise of a sign is a sum over a table: beside one of positions it would halve the embedding's steps
    return {**lengths, "alpha": "auto", "noise_adaptive": options["norm"] != "sign"}


def customary_rates(
    cls: type, groups: Sequence[MutableMapping[str, Any]], options: MutableMapping[str, Any]
) -> dict[str, float] | None:
    """Return AdamW's customary rates for :func:`convert_rates` where SinkGD, LANTON or Lion has no rate, else None.

    Takes ``weight_decay`` out of the options, and gives groups of other rates theirs, both in place. Matrices have
    1e-3 * sqrt(128 / width), with the larger side of the narrowest one as width; adapters 5e-4 * (2000 / width)^0.781,
    with the fewest inputs of one; the rest 2e-2.
    """
    if cls.__name__ not in ("SinkGD", "LANTON", "Lion"):
        return None
    if {*options}.union(*groups) & {"lr", *_RULES[cls.__name__][1]}:
        return None
    widths: list[int] = []
    for group in groups:
        if group["norm"] != "rms":
            group["lr"] = _REST
            continue
        sides = [_sides(param.shape) for _, param in group["params"]]
        if group.get("name") == "lora":
            # a factor B has the outputs of a layer, which may be few: keys that heads share
            inputs = [columns for rows, columns in sides if rows <= columns] or [rows for rows, _ in sides]
            group["lr"] = _ADAPTERS * (_ADAPTER_WIDTH / max(1, min(inputs))) ** _ADAPTER_POWER
        else:
            widths += map(max, sides)
    rate = _MATRICES * math.sqrt(_WIDTH / max(1, min(widths, default=_WIDTH)))
    return {"lr": rate, "weight_decay": options.pop("weight_decay", 0.0)}


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    rows, *others = shape[1:] if len(shape) == 3 else shape  # of a stack's matrices
    return rows, math.prod(others)


# class -> its rule, and the options that would change the length of its steps
_RULES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "AdamW": (_adamw, ()),
    "Lion": (_lion, ()),
    "SinkGD": (_sinkgd, ("scale", "base_width", "spectral", "momentum_order")),
    "LANTON": (_lanton, ("scaling", "radius")),
}


def convert_rates(
    owner: str,
    cls: type,
    groups: Sequence[MutableMapping[str, Any]],
    options: Mapping[str, Any],
    rates: Mapping[str, Any],
) -> None:
    """Set learning rate, weight decay and length of steps of an optimizer's groups, in place.

    LANTON gets ``alpha="auto"`` and, for embeddings and heads, ``noise_adaptive=False``, where nothing else is given.

    Args:
        owner: what messages begin with.
        cls: Lion, SinkGD or LANTON.
        groups: their ``lr`` and ``weight_decay``, where they have them, are AdamW's.
        options: arguments of the class, without these two.
        rates: AdamW's ``lr``, and its ``weight_decay`` or 0, of the groups without their own.

    Raises:
        ValueError: for M-FAC, missing or unknown keys, a rate out of range, or an option that changes the length.
        TypeError: for rates that are no mapping, and a rate that is no number.
    """
    if not isinstance(rates, Mapping):
        raise TypeError(f"{owner}: expected a mapping such as {{'lr': 3e-4, 'weight_decay': 0.1}}, got {rates!r:.80}")
    if "lr" not in rates or (unknown := rates.keys() - {"lr", "weight_decay"}):
        got = f"without 'lr': {sorted(rates)}" if "lr" not in rates else f"with {sorted(unknown)}"
        raise ValueError(
            f"{owner}: expected AdamW's 'lr' and, if it has one, 'weight_decay', got a mapping {got}; rates of roles "
            "go into settings, such as {'embedding': {'lr': 1e-3}}"
        )
    if cls.__name__ not in _RULES:
        advice = "Give lr=, and tune it"
        if cls.__name__ == "MFAC":
            advice = "Its step grows as gradients shrink: give lr=, from 1e-3, and tune it with damping"
        raise ValueError(
            f"{owner}: no rule carries AdamW's rate over to {cls.__name__}. {advice} (docs/howto/learning-rates.md); "
            "Lion, SinkGD and LANTON have a rule."
        )
    rule, lengths = _RULES[cls.__name__]
    defaults = {name: option.default for name, option in inspect.signature(cls).parameters.items()}
    converted = []
    for group in groups:
        if given := sorted({"lr", "weight_decay"} & options.keys() | {*lengths} & {*options, *group}):
            raise ValueError(
                f"{owner}: leave out {', '.join(given)}; the rates are AdamW's, and the length of a step follows"
            )
        rate, decay = (group.get(key, rates.get(key, 0.0)) for key in ("lr", "weight_decay"))
        for key, value in (("lr", rate), ("weight_decay", decay)):
            check_number(f"{owner}, group {group.get('name')!r}", key, value, 0.0)
        converted.append(rule({**defaults, **options, **group}, rate, decay))
    for group, values in zip(groups, converted, strict=True):
        explicit = {*options, *group} - {"lr", "weight_decay"}
        group.update({key: value for key, value in values.items() if key not in explicit})
