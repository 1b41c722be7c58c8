"""A model's optimizer by name, with its parameters in groups by role."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, overload

from torch import nn
from torch.optim import AdamW, Optimizer

from leanstep._torch import output_head
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import known_options
from leanstep.optimizers.lanton.optimizer import LANTON
from leanstep.optimizers.lion import Lion
from leanstep.optimizers.mfac.optimizer import MFAC
from leanstep.optimizers.param_groups import param_groups
from leanstep.optimizers.peers import SCALE, MuonAdamW, peer_algorithm
from leanstep.optimizers.rates.adamw import convert_rates
from leanstep.optimizers.sinkgd.optimizer import SinkGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "lanton": LANTON,
    "lion": Lion,
    "mfac": MFAC,
    "muon": MuonAdamW,
    "scale": SCALE,
    "sinkgd": SinkGD,
}


def class_named(name: str, owner: str) -> type[Optimizer]:
    """Return the class of a name of :func:`create`. Raises ValueError for another name, with the nearest one."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    near = difflib.get_close_matches(str(name).lower(), OPTIMIZERS, n=1, cutoff=0.7)
    advice = f"; take {near[0]!r}" if near else ""
    raise ValueError(f"{owner}: expected one of {', '.join(map(repr, OPTIMIZERS))} as name, got {name!r:.80}{advice}")


@overload
def create(model: nn.Module, name: Literal["lanton", "lion", "mfac", "sinkgd"], **options: Any) -> LeanOptimizer: ...


@overload
def create(model: nn.Module, name: str, **options: Any) -> Optimizer: ...


def create(
    model: nn.Module,
    name: str,
    *,
    like_adamw: Mapping[str, Any] | None = None,
    embeddings: str = "adamw",
    split: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    overrides: Iterable[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]] = (),
    say: Callable[[str], Any] | None = print,
    **options: Any,
) -> Optimizer:
    """Make the optimizer of a model: :func:`param_groups`, then the class, in one call.

    Args:
        model: the model, with the parameters to train unfrozen. Shard or adapt it first.
        name: "lanton", "lion", "mfac" or "sinkgd", the names that recipes use; or, to compare with, "adamw" (torch's,
            fused), "muon" (torch's Muon on hidden matrices and AdamW on the rest) or "scale".
        like_adamw: AdamW's learning rate and weight decay, such as ``{"lr": 3e-4, "weight_decay": 0.1}``, in place of
            ``lr`` and ``weight_decay``, for all but "mfac", "muon" and "scale". Steps move weights as far as AdamW's
            would, and decay by as much; schedule and warm-up stay. Rates in ``settings`` and ``overrides`` are then
            AdamW's too. ``docs/howto/learning-rates.md`` has the rule of each class.
        embeddings, split, settings, overrides: as for :func:`param_groups`; "balanced" embeddings need "sinkgd", and
            ``split`` needs "sinkgd" or "lanton".
        say: takes the table of groups, with the rules of the class; None: no table, as on all ranks but one.
        **options: arguments of the class, such as ``lr``; torch's switches as for the class.

    Raises:
        ValueError: for an unknown name; ``like_adamw`` without a rate, with unknown keys, with settings of roles that
            no parameter has, with a class without a rule, or with options that it sets; ``embeddings="balanced"`` or
            ``split`` for an optimizer without that rule; and as the class and :func:`param_groups` do.
        TypeError: for an option that the class does not have.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> optimizer = create(model, "lion", lr=1e-4, say=None)
        >>> optimizer = create(model, "sinkgd", like_adamw={"lr": 3e-4, "weight_decay": 0.1}, say=None)

        transformers' Trainer calls it after it has wrapped the model, as FSDP needs::

            Trainer(model, optimizer_cls_and_kwargs=(lambda: create, {"name": "sinkgd", "lr": 2e-2}), ...)
    """
    cls = class_named(name, "create")
    known = set(inspect.signature(cls).parameters) - {"params"}
    options = known_options(f"create: {cls.__name__}", options, known)
    if embeddings == "balanced" and cls is not SinkGD:
        raise ValueError(
            f"create: embeddings='balanced' is a rule of SinkGD; {cls.__name__} does not have it. Take 'sinkgd', or "
            "two optimizers: SinkGD for the groups of param_groups(model, embeddings='balanced') with "
            f"algorithm='balanced', {cls.__name__} for the others."
        )
    if split is not None and "blocks" not in known:
        raise ValueError(
            f"create: split={split!r} is for the rules of matrices of SinkGD and LANTON, not {cls.__name__}"
        )
    groups = param_groups(model, settings, embeddings=embeddings, split=split, overrides=overrides)
    head = output_head(model)
    for group in groups:
        algorithm = peer_algorithm(name, group, head)
        if algorithm is not None:
            group["algorithm"] = algorithm
        elif cls is AdamW:
            group.pop("algorithm", None)
    if cls is AdamW:
        options.setdefault("fused", True)
    if like_adamw is not None:
        if groups.unused_settings:
            roles = ", ".join(groups.unused_settings)
            raise ValueError(f"create: like_adamw: no parameter has the role {roles} of settings; leave it out")
        convert_rates("create: like_adamw", cls, groups, options, like_adamw)
    if say is not None:
        say(f"{cls.__name__}\n{groups.summary(cls)}")
    return cls(groups, **options)
