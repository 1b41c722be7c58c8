"""A model's optimizer by name, with its parameters in groups by role."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from types import SimpleNamespace
from typing import Any, Literal, overload

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from leanstep._torch import output_head
from leanstep.optimizers.common.base import LeanOptimizer
from leanstep.optimizers.common.checks import known_options
from leanstep.optimizers.common.groups import is_flattened
from leanstep.optimizers.lanton.optimizer import LANTON
from leanstep.optimizers.lion import Lion
from leanstep.optimizers.mfac.optimizer import MFAC
from leanstep.optimizers.param_groups import DEFAULTS, ROLES, ParamGroups, param_groups
from leanstep.optimizers.peers import SCALE, MuonAdamW, NorMuon, check_rates, peer_algorithm
from leanstep.optimizers.rates.adamw import convert_rates, customary_rates
from leanstep.optimizers.sinkgd.optimizer import SinkGD

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "lanton": LANTON,
    "lion": Lion,
    "mfac": MFAC,
    "muon": MuonAdamW,
    "normuon": NorMuon,
    "scale": SCALE,
    "sgd": SGD,
    "sinkgd": SinkGD,
}


def class_named(name: str, owner: str) -> type[Optimizer]:
    """Return the class of a name of :func:`create`. Raises ValueError for another one, TypeError for a model."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if isinstance(name, nn.Module):
        raise TypeError(f"{owner}: expected the model first, then the name, as in {owner}(model, 'sinkgd')")
    near = difflib.get_close_matches(str(name).lower(), OPTIMIZERS, n=1, cutoff=0.7)
    advice = f"; take {near[0]!r}" if near else ""
    raise ValueError(f"{owner}: expected one of {', '.join(map(repr, OPTIMIZERS))} as name, got {name!r:.80}{advice}")


def _options(owner: str, cls: type[Optimizer], options: dict[str, Any]) -> tuple[set[str], dict[str, Any]]:
    """Return the names of a class's options, and those given. Raises TypeError for another one."""
    known = set(inspect.signature(cls).parameters) - {"params"}
    return known, known_options(f"{owner}: {cls.__name__}", options, known)


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
        name: "lanton", "lion", "mfac" or "sinkgd", the names that recipes use; or, to compare with, "adamw" and "sgd"
            (torch's, fused), "muon" (torch's Muon on hidden matrices and AdamW on the rest), "normuon" or "scale".
        like_adamw: AdamW's learning rate and weight decay, such as ``{"lr": 3e-4, "weight_decay": 0.1}``, in place of
            ``lr`` and ``weight_decay``, for "adamw", "lanton", "lion" and "sinkgd". Steps move weights as far
            as AdamW's would, and decay by as much; schedule and warm-up stay. Rates in ``settings`` and ``overrides``
            are then AdamW's too. ``docs/howto/learning-rates.md`` has the rule of each class. "sinkgd", "lanton" and
            "lion" without this, ``lr``, or an option that sets the length of steps (``scale``, ``base_width``,
            ``spectral``, ``momentum_order``, ``scaling``, ``radius``) take AdamW's customary rates, and
            ``weight_decay`` as AdamW's.
        embeddings, split, settings, overrides: as for :func:`param_groups`; "balanced" embeddings need "sinkgd", and
            ``split`` needs "sinkgd" or "lanton".
        say: takes the table of groups, with the rules of the class and the rates; None: no table, as on all ranks but
            one.
        **options: arguments of the class, such as ``lr``; torch's switches as for the class.

    Raises:
        ValueError: for an unknown name; ``like_adamw`` without a rate, with unknown keys, with settings of roles that
            no parameter has, with a class without a rule, or with options that it sets; ``embeddings="balanced"`` or
            ``split`` for an optimizer without that rule; and as the class and :func:`param_groups` do.
        TypeError: for an option that the class does not have, and for a model in the place of the name.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
        >>> optimizer = create(model, "lion", lr=1e-4, say=None)
        >>> optimizer = create(model, "sinkgd", like_adamw={"lr": 3e-4, "weight_decay": 0.1}, say=None)

        transformers' Trainer calls it after it has wrapped the model, as FSDP needs::

            Trainer(model, optimizer_cls_and_kwargs=(lambda: create, {"name": "sinkgd", "lr": 2e-2}), ...)
    """
    cls = class_named(name, "create")
    known, options = _options("create", cls, options)
    if embeddings == "balanced" and cls is not SinkGD:
        raise ValueError(
            f"create: embeddings='balanced' is a rule of SinkGD; {cls.__name__} does not have it. Take 'sinkgd', or "
            "two optimizers: SinkGD for the groups of param_groups(model, embeddings='balanced') with "
            f"algorithm='balanced', {cls.__name__} for the others."
        )
    if split is not None and "blocks" not in known:
        raise ValueError(f"create: split={split!r} is for the matrices of SinkGD and LANTON, not {cls.__name__}")
    groups = param_groups(model, settings, embeddings=embeddings, split=split, overrides=overrides)
    return _built("create", name, groups, output_head(model), like_adamw, say, options)


def _built(
    owner: str,
    name: str,
    groups: ParamGroups,
    head: Any,
    like_adamw: Mapping[str, Any] | None,
    say: Callable[[str], Any] | None,
    options: dict[str, Any],
) -> Optimizer:
    """Make the optimizer of groups by role. ``head``: what has the head's weight, or None."""
    cls = OPTIMIZERS[name]
    for group in groups:
        algorithm = peer_algorithm(name, group, head)
        if algorithm is not None:
            group["algorithm"] = algorithm
        elif cls in (AdamW, SGD):
            group.pop("algorithm", None)
    if cls in (AdamW, SGD):  # torch compares a rate that is no number, and does not name it
        check_rates(cls.__name__, options.get("lr", 0.0), options.get("weight_decay", 0.0))
        options.setdefault("fused", True)
    if like_adamw is None:
        like_adamw = customary_rates(cls, groups, options)
    elif groups.unused_settings:
        roles = ", ".join(groups.unused_settings)
        raise ValueError(f"{owner}: like_adamw: no parameter has the role {roles} of settings; leave it out")
    if like_adamw is not None:
        convert_rates(f"{owner}: like_adamw", cls, groups, options, like_adamw)
    shown = copy(groups)
    shown[:] = [dict(group) for group in groups]  # torch takes the names of the parameters away
    optimizer = cls(groups, **options)
    if say is not None:
        for group, made in zip(shown, optimizer.param_groups, strict=True):
            group["lr"] = made["lr"]
        say(f"{cls.__name__}\n{shown.summary(cls)}")
    return optimizer


def from_parameters(
    params: Iterable[Any],
    name: str = "sinkgd",
    *,
    vocab_size: int | None = None,
    roles: Mapping[str, str] | None = None,
    like_adamw: bool = False,
    say: Callable[[str], Any] | None = None,
    **options: Any,
) -> Optimizer:
    """Make the optimizer of parameters that come without names, as verl and NeMo Automodel give them.

    Roles come from shapes. ``roles`` comes first. A vector, also of shape (1, n), is ``other``: the rule of norms and
    biases. The first matrix with ``vocab_size`` rows is ``embedding``, the second ``head``. Any other matrix is
    ``hidden`` and counts as (out, in). A tensor of four or five dimensions is ``conv``. Nothing else follows from a
    shape. Groups get ``lr_mult`` and ``wd_mult``: their rates in those of the first one, which Automodel's scheduler
    multiplies by them.

    Args:
        params: parameters in the model's order, or groups of them, such as Automodel's with ``lr_mult``.
        name: as for :func:`create`.
        vocab_size: rows of the embedding; 0 for a model without one.
        roles: shape to role, such as ``{"1024x768": "position"}``, where the shape does not say it: tables of
            positions, experts, an embedding with padded rows.
        like_adamw: whether ``lr`` and ``weight_decay`` are AdamW's, as for :func:`create`.
        say: takes the table of groups; None: no table.
        **options: arguments of the class, such as ``lr``.

    Raises:
        ValueError: for parameters that FSDP1 has flattened, named by place and shape; without ``vocab_size``; for a
            vocabulary that no matrix or more than two have; three dimensions; an unknown role or shape in ``roles``;
            and as :func:`create`. Nothing was changed.
        TypeError: for an option that the class does not have.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> optimizer = from_parameters(model.parameters(), "lion", vocab_size=10, lr=1e-4)
        >>> [group["name"] for group in optimizer.param_groups]
        ['hidden', 'embedding', 'head', 'other']
    """
    cls = class_named(name, "from_parameters")
    options.pop("foreach", None)  # Automodel passes it to every factory that may take it
    rates: dict[str, Any] = {key: options.pop(key) for key in ["lr", "weight_decay"] if like_adamw and key in options}
    _, options = _options("from_parameters", cls, options)
    groups = _groups_by_shape(params, vocab_size, dict(roles or {}))
    tables = [p for group in groups if group["name"] in ("embedding", "head") for _, p in group["params"]]
    head = SimpleNamespace(weight=tables[-1]) if tables else None  # a tied one is the embedding
    factors = [{key: group.pop(key, 1.0) for key in ("lr_mult", "wd_mult")} for group in groups]
    optimizer = _built("from_parameters", name, groups, head, rates if like_adamw else None, say, options)
    first = {key: optimizer.param_groups[0][key] for key in ("lr", "weight_decay")}
    for group, given in zip(optimizer.param_groups, factors, strict=True):
        for key, factor in (("lr", "lr_mult"), ("weight_decay", "wd_mult")):
            group[factor] = given[factor] * (group[key] / first[key] if first[key] else 1.0)
    return optimizer


def _groups_by_shape(params: Iterable[Any], vocab_size: int | None, roles: dict[str, str]) -> ParamGroups:
    owner = "from_parameters"
    if unknown := sorted(set(roles.values()) - {*ROLES}):
        raise ValueError(f"{owner}: roles: unknown role {unknown[0]!r}; expected one of {ROLES}")
    entries = [entry if isinstance(entry, dict) else {"params": [entry]} for entry in params]
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    index, tables, unused = 0, 0, {*roles}
    for entry in entries:
        given = {key: value for key, value in entry.items() if key != "params"}
        for parameter in filter(lambda p: p.requires_grad, entry["params"]):
            shape = "x".join(map(str, parameter.shape))
            name, index = f"parameter {index} ({shape})", index + 1
            unused.discard(shape)
            role = roles.get(shape) or _role_of_shape(name, parameter, vocab_size, tables)
            tables += shape not in roles and role in ("embedding", "head")
            key = (ROLES.index(role), *sorted(given.items()))
            group = groups.setdefault(key, {"name": role, **DEFAULTS[role], **given, "params": []})
            group["params"].append((name, parameter))
    if unused:
        raise ValueError(f"{owner}: roles: no parameter to train has the shape {', '.join(sorted(unused))}")
    if vocab_size and not tables and not {"embedding", "head"} & {*roles.values()}:
        raise ValueError(
            f"{owner}: no matrix has vocab_size={vocab_size} rows; padded rows count: name the shape in roles, such as "
            f"roles={{'{vocab_size + 64}x64': 'embedding'}}"
        )
    return ParamGroups(groups[key] for key in sorted(groups, key=lambda key: key[0]))


def _role_of_shape(name: str, parameter: Any, vocab_size: int | None, tables: int) -> str:
    if is_flattened(parameter):
        raise ValueError(
            f"from_parameters: FSDP1 has flattened {name}, and its role is lost with its shape. Shard by FSDP2 "
            "(in verl strategy: fsdp2)"
        )
    dims = parameter.dim()
    if dims < 2 or (dims == 2 and parameter.shape[0] == 1):
        return "other"
    if dims == 3 or dims > 5:
        raise ValueError(
            f"from_parameters: {name} may be experts, a convolution or a table; name it in roles, such as "
            f"roles={{'{'x'.join(map(str, parameter.shape))}': 'expert'}}"
        )
    if vocab_size is None:
        raise ValueError(
            f"from_parameters: {name} may be an embedding, a head or hidden; give vocab_size, the rows of the "
            "embedding, or 0 for a model without one"
        )
    if dims > 2 or parameter.shape[0] != vocab_size:
        return "hidden" if dims == 2 else "conv"
    if tables == 2:
        raise ValueError(
            f"from_parameters: {name} is the third matrix with vocab_size={vocab_size} rows, and an embedding and a "
            "head are two; name the shapes in roles"
        )
    return "head" if tables else "embedding"
