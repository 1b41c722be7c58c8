"""Two learning rates by short runs: that of the matrices and that of the rest, in factors of two."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from leanstep._files import table_lines
from leanstep.optimizers.create import class_named, create
from leanstep.optimizers.param_groups import DEFAULTS, param_groups, parameter_roles
from leanstep.optimizers.rates.adamw import customary_rates

MATRICES, REST = "matrices", "the rest"
# a neighbour is better if its loss is lower by more than this part: the standard errors of such runs are larger
_TIE = 2e-4
_WARMUP, _FINAL = 0.05, 0.1  # of the schedule of a run
_JUDGED = 0.1  # of the training losses, at the end, where there is no validation

Powers = tuple[int, ...]  # of two, one for each rate, relative to the start


def roles_by_rate(model: nn.Module) -> dict[str, list[str]]:
    """The roles of the trainable parameters of a model under :data:`MATRICES` and :data:`REST`, those that it has."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    present = {role for name, role in parameter_roles(model).items() if name in trainable}
    by_rate: dict[str, list[str]] = {}
    for role in (role for role in DEFAULTS if role in present):
        by_rate.setdefault(MATRICES if DEFAULTS[role]["algorithm"] == "sinkgd" else REST, []).append(role)
    return {rate: by_rate[rate] for rate in (MATRICES, REST) if rate in by_rate}


def best_powers(losses: Mapping[Powers, float]) -> Powers:
    """The point that is no worse than its tried neighbours, downhill from the start."""
    return _descend(losses)[0]


def _descend(losses: Mapping[Powers, float]) -> tuple[Powers, Powers | None]:
    """The best point, and the one beyond it in the direction from which it was reached."""
    point, beyond = (0,) * len(next(iter(losses))), None
    while tried := [neighbour for neighbour in _neighbours(point, losses) if neighbour in losses]:
        lowest = min(tried, key=losses.__getitem__)
        if math.isfinite(losses[point]) and not losses[lowest] < losses[point] - _TIE * abs(losses[point]):
            break
        beyond = tuple(2 * after - before for after, before in zip(lowest, point, strict=True))
        point = lowest
    return point, beyond


def next_powers(losses: Mapping[Powers, float], rates: int) -> list[Powers]:
    """The points to try next, given the losses of those tried (inf: diverged); none when the best is bracketed.

    From the start, the search tries both neighbours along the axis of each rate and goes to the best, then on in the
    same direction while that helps, until both neighbours along both axes are worse. While the start diverges, all
    rates fall by a factor of four.
    """
    if not losses:
        return [(0,) * rates]
    point, beyond = _descend(losses)
    around = _neighbours(point, losses)
    if beyond in around and beyond not in losses:
        return [beyond]
    return [neighbour for neighbour in around if neighbour not in losses]


def _neighbours(point: Powers, losses: Mapping[Powers, float]) -> list[Powers]:
    if math.isinf(losses[point]):
        return [tuple(power - 2 for power in point)]
    return [
        tuple(power + step * (axis == other) for other, power in enumerate(point))
        for axis in range(len(point))
        for step in (-1, 1)
    ]


@dataclass(frozen=True)
class LearningRates:
    """The rates that :func:`find_lr` chose, and the runs by which it chose them.

    Attributes:
        options: arguments of :func:`leanstep.optimizers.create` with the best rates: ``lr`` or ``like_adamw``,
            ``settings`` where the model has both kinds of parameters, and what :func:`find_lr` was given.
        rates: the best ones, by kind of parameter.
        loss: of the best run.
        is_bracketed: whether all rates a factor of two away are worse; otherwise the runs ended before that.
        trials: (rates by kind of parameter, loss) of every run, in order; the loss is inf where it diverged.
    """

    options: dict[str, Any]
    rates: dict[str, float]
    loss: float
    is_bracketed: bool
    trials: list[tuple[dict[str, float], float]]

    def __str__(self) -> str:
        rows = [[*(f"lr of {kind}" for kind in self.rates), "loss", ""]]
        for rates, loss in self.trials:
            rows.append([*(f"{rate:.3g}" for rate in rates.values()), f"{loss:.4f}", "best" * (rates == self.rates)])
        edge = [] if self.is_bracketed else ["the best rates lie on the edge of those tried: give more runs"]
        return "\n".join([*table_lines(rows), *edge])


def find_lr(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    data: Iterable[Any],
    name: str,
    *,
    steps: int = 60,
    validation: Sequence[Any] | None = None,
    most_runs: int = 16,
    **options: Any,
) -> LearningRates:
    """Choose the learning rates of a model by short runs: that of the matrices, and that of all other parameters.

    A run trains ``steps`` steps with a warm-up over 5 % of them and a cosine to a tenth. The first one has the rates of
    ``create`` with these ``options``. Each round then changes either rate by a factor of two from the best,
    until both neighbours of both rates are worse: 5 runs if the start is best, up to 13 if the best rates are a factor
    of four away. Short runs may prefer larger rates than long ones.

    Args:
        model: the model as it is before its first step, on one process. Its trainable parameters and buffers are copied
            once, and are back at the end; gradients are gone. Every run begins with torch's random state of now.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss, a scalar.
        data: the batches; the first ``steps`` are held in memory, and begin anew where there are fewer.
        name: as for :func:`leanstep.optimizers.create`.
        steps: of a run, at least 2.
        validation: batches whose mean loss judges a run. None: the mean of the last tenth of the training losses, which
            tells little where batches repeat.
        most_runs: the search ends after so many.
        **options: of :func:`leanstep.optimizers.create`. ``lr`` is the start, or ``like_adamw``, whose rates are then
            searched. Rates in ``settings`` keep their ratio to it; those in ``overrides`` stay. ``say`` takes a line
            for each run; None: silent.

    Raises:
        ValueError: without a batch, with several processes, for fewer than two steps or one run, for a rate of 0, if
            every run diverges, and as ``create`` does.
        TypeError: ``loss_fn`` returns no scalar tensor, and as ``create`` does.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> tokens = torch.arange(10)
        >>> def loss_fn(model, batch):
        ...     return nn.functional.cross_entropy(model(batch), (batch + 1) % 10)
        >>> rates = find_lr(model, loss_fn, [tokens], "sinkgd", steps=5, say=None)
        >>> optimizer = create(model, "sinkgd", **rates.options, say=None)
    """
    if steps < 2 or most_runs < 1:
        # the loss of the first step is that of the start, whatever the rates
        raise ValueError(f"find_lr: expected at least two steps and one run, got steps={steps}, most_runs={most_runs}")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_world_size() > 1:
        raise ValueError("find_lr: expected one process; search before the model is replicated or sharded")
    cls, roles, say = class_named(name, "find_lr"), roles_by_rate(model), options.pop("say", print)
    try:
        create(model, name, say=None, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("create:", "find_lr:", 1)) from None
    batches = list(islice(data, steps))
    if not batches:
        raise ValueError("find_lr: expected batches in data, got none")
    options, start = _with_customary_rates(model, cls, options), inspect.signature(cls).parameters["lr"].default
    if not (first := (options.get("like_adamw") or options).get("lr", start)) > 0:
        raise ValueError(f"find_lr: expected a start above 0, whose halves and doubles are tried, got lr={first}")
    losses: dict[Powers, float] = {}
    trials = []
    with _restored(model) as restore:
        while waiting := next_powers(losses, len(roles))[: most_runs - len(losses)]:
            for powers in waiting:
                restore()
                scaled, rates = scaled_rates(options, start, roles, powers)
                losses[powers] = loss = _train(model, loss_fn, batches, steps, name, scaled, validation)
                trials.append((rates, loss))
                if say is not None:
                    of_rates = ", ".join(f"lr of {kind} {rate:.3g}" for kind, rate in rates.items())
                    say(f"run {len(losses)}: {of_rates}: loss {loss:.4f}")
    best = best_powers(losses)
    if math.isinf(losses[best]):
        raise ValueError(f"find_lr: every run diverged, down to {trials[-1][0]}; give a lower lr as the start")
    is_bracketed = not next_powers(losses, len(roles))
    return LearningRates(*scaled_rates(options, start, roles, best), losses[best], is_bracketed, trials)


def _with_customary_rates(model: nn.Module, cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which the rates that ``create`` takes where none is given are named."""
    named = dict(options)
    if named.get("like_adamw") is not None:
        return named
    grouping = {key: named[key] for key in ("settings", "overrides", "split") if key in named}
    groups = param_groups(model, **grouping)
    rates = customary_rates(cls, groups, named)
    if rates is None:
        return named
    settings = {role: dict(values) for role, values in (named.get("settings") or {}).items()}
    for group in groups:
        if "lr" in group:
            settings.setdefault(group["name"], {})["lr"] = group["lr"]
    return {**named, "like_adamw": rates, **({"settings": settings} if settings else {})}


def scaled_rates(
    options: Mapping[str, Any], default: float, roles: Mapping[str, Sequence[str]], powers: Powers
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return options of ``create`` with its rates times powers of two, and the rate of each kind of parameter.

    ``roles`` as :func:`roles_by_rate`. The first kind has the rate of the optimizer, the roles of the other one have
    theirs in ``settings``; rates that are there keep their ratio. The rate of a kind is that of its roles where they
    have the same.
    """
    like = options.get("like_adamw")
    base = options.get("lr", default) if like is None else like["lr"]
    settings = {role: dict(values) for role, values in (options.get("settings") or {}).items()}
    rates: dict[str, float] = {}
    for (kind, of_kind), power in zip(roles.items(), powers, strict=True):
        distinct = {settings.get(role, {}).get("lr", base) for role in of_kind}
        rates[kind] = (distinct.pop() if len(distinct) == 1 else base) * 2.0**power
    first, *others = rates
    rate = base * 2.0 ** powers[0]
    scaled = {**options, "lr": rate} if like is None else {**options, "like_adamw": {**like, "lr": rate}}
    for kind, power in zip(roles, powers, strict=True):
        for role in roles[kind]:
            values = settings.get(role, {})
            if kind != first or "lr" in values:
                settings[role] = {**values, "lr": values.get("lr", base) * 2.0**power}
    return {**scaled, "settings": settings} if settings or others else scaled, rates


def _train(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    steps: int,
    name: str,
    options: Mapping[str, Any],
    validation: Sequence[Any] | None,
) -> float:
    """Train one run; return the loss that judges it, inf where it diverged."""
    optimizer = create(model, name, say=None, **options)
    schedule = LambdaLR(optimizer, lambda step: _factor(step, math.ceil(_WARMUP * steps), steps))
    losses = []
    for step in range(steps):
        loss = _scalar(loss_fn(model, batches[step % len(batches)]))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if validation is not None:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            losses = [_scalar(loss_fn(model, batch)).item() for batch in validation]
        model.train(was_training)
    else:
        losses = losses[-math.ceil(_JUDGED * steps) :]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


def _scalar(loss: Any) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise TypeError(f"find_lr: loss_fn(model, batch) should return the mean loss, a tensor of one number, got {came}")


def _factor(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return _FINAL + (1 - _FINAL) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Give a function that puts weights, buffers and random state back as they are now, and call it at the end."""
    tensors = [*(parameter for parameter in model.parameters() if parameter.requires_grad), *model.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    random, of_device = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        model.zero_grad()
        torch.set_rng_state(random)
        if of_device:
            torch.cuda.set_rng_state_all(of_device)

    try:
        yield restore
    finally:
        restore()
