"""Loading a state dict: every check, and every conversion, before anything of the optimizer is changed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.optimizers.common.checks import REMOVED, check_number, check_saved_count, check_saved_options, describe
from leanstep.optimizers.common.rounding import ENTRIES, effective, init_rounding
from leanstep.optimizers.common.saved_tensors import (
    Created,
    Misfit,
    as_number_tensor,
    check_readable,
    fitted,
    owned,
    separate,
)
from leanstep.optimizers.common.saving import StateSaving
from leanstep.optimizers.common.sharding import Shard, check_indices, shard_of
from leanstep.optimizers.common.state import Entry, Row, coded, rows_of, update_state

# settings that do not identify an optimizer: those of torch's optimizers, and those that all of leanstep's have
_COMMON_SETTINGS = frozenset(
    (*inspect.signature(torch.optim.AdamW).parameters, *inspect.signature(torch.optim.SGD).parameters)
    + ("nonfinite", "rounding", "seed", "momentum_dtype")
)

_ADVICE = "nothing was changed. Load a state that this optimizer saved, or start without it."

# characters of a message, which may quote the file
_LONGEST = 800


class Loaded(NamedTuple):
    """A parameter and its saved state."""

    group_index: int
    group: dict[str, Any]  # the saved settings, with the parameters of this optimizer
    position: int  # in the group
    param: Tensor
    saved_id: Any
    state: dict[str, Any]


class _Opaque:
    """State of a parameter on its way through ``torch.optim.Optimizer.load_state_dict``, which would cast tensors."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


class StateLoading(StateSaving):
    """The part of ``LeanOptimizer`` that loads a state dict.

    Attributes:
        _state_entries: the table of a parameter's state, without the entries of its rounding.
        _older_names: names of state and group entries in states of older versions -> their names now.
    """

    _state_entries: tuple[Entry, ...] = ()
    _older_names: Mapping[str, str] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the dtype it was saved in, bit for bit.

        The state is checked as if it came from a stranger, after the user's pre-hooks and before anything is changed:
        settings as in the constructor; the entries of every parameter against those that this optimizer would create
        (names, dtypes, shapes, placements, memory behind the tensors); ranges of counts and estimates. Momenta may be
        infinite or NaN, as training can make them so. Tensors with other strides, and those that share memory with
        another one, are copied. As in torch, all others share the memory of ``state_dict``. A parameter may have no
        state. :class:`leanstep.optimizers.SinkGD` casts AdamW's moments, and "kahan" its compensations, to the dtype
        that a step needs.

        Raises:
            ValueError: the state belongs to another optimizer, other groups or parameters of other shapes, has a
                setting that no longer exists or is out of range, or is damaged. Nothing is changed.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(
                f"{type(self).__name__}: expected a state dict, got {type(state_dict).__name__}; nothing was changed. "
                "Load what state_dict() returned."
            )
        # the user's hooks run before the first and after the second one
        before = self.register_load_state_dict_pre_hook(lambda _, loaded: _checked(self, loaded))
        after = self.register_load_state_dict_post_hook(lambda _: _unwrap(self), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _in_memory(self, states: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
        """Return the saved states in the form that they have in memory. States and groups may be damaged here."""
        return states

    def _check_entries(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an entry of a saved group that is no setting is out of range."""
        check_saved_count(type(self).__name__, "nonfinite_count", group)

    def _check_fit(self, groups: list[dict[str, Any]], group: dict[str, Any]) -> None:
        """Raise ValueError if the parameters of one of the loaded groups do not fit its settings."""
        self._check_params(group, {})

    def _check_loaded_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raise ValueError if a state with these settings cannot continue here."""

    def _check_loaded_states(self, groups: list[dict[str, Any]], entries: list[Loaded]) -> None:
        """Raise ValueError if states contradict each other or their settings; their tensors are checked already."""

    def _check_placements(self, group: dict[str, Any], position: int, param: Tensor) -> Shard:
        """Return this process's shard. Raises ValueError for partial sums, and as :meth:`_check_shard`."""
        shard = shard_of(param, lambda: describe(group, position))
        if shard.cuts:
            self._check_shard(group, position, shard)
        return shard

    def _check_shard(self, group: dict[str, Any], position: int, shard: Shard) -> None:
        """Raise ValueError if a sharded parameter does not fit its group's settings. Nothing was changed before."""
        if effective(type(self).__name__, group, position, group["params"][position]) == "stochastic":
            check_indices(
                f"{type(self).__name__}: rounding='stochastic'", describe(group, position), shard,
                instead="another rounding ('split', 'master')",
            )  # fmt: skip
        for key in coded(self._state_entries, group, group["params"][position]):
            check_indices(
                f"{type(self).__name__}: the state {key!r} of 8 bits", describe(group, position), shard,
                instead="another dtype, such as torch.bfloat16",
            )  # fmt: skip


def _checked(optimizer: StateLoading, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict that torch can load, with states as :class:`_Opaque`; the given one is not changed.

    Raises:
        ValueError: as ``LeanOptimizer.load_state_dict``.
    """
    try:
        return _loadable(optimizer, state_dict)
    except ValueError as error:
        text = "".join(c if c.isprintable() else "?" for c in str(error))
        raise ValueError(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]}...{text[-197:]}") from error


def _loadable(optimizer: StateLoading, state_dict: dict[str, Any]) -> dict[str, Any]:
    _check_form(optimizer, state_dict)
    _refuse_foreign(optimizer, state_dict)
    _check_ids(optimizer, state_dict)
    state_dict = _upgraded(optimizer, state_dict)
    saved_groups = [_readable_group(optimizer, group) for group in state_dict["param_groups"]]
    groups = _future_groups(optimizer, saved_groups)
    _refuse_other_order(optimizer, saved_groups)
    optimizer._check_loaded_groups(groups)
    entries = [
        Loaded(index, group, position, param, saved_id, state_dict["state"][saved_id])
        for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True))
        for position, (param, saved_id) in enumerate(zip(group["params"], saved["params"], strict=True))
        if state_dict["state"].get(saved_id)
    ]
    entries = _fitted_entries(optimizer, groups, entries)
    optimizer._check_loaded_states(groups, entries)
    states = {key: _Opaque({}) if state == {} else state for key, state in state_dict["state"].items()}
    states |= {entry.saved_id: _Opaque(entry.state) for entry in entries}
    return {**state_dict, "state": states, "param_groups": saved_groups}


def _unwrap(optimizer: StateLoading) -> None:
    for param, state in optimizer.state.items():
        if isinstance(state, _Opaque):
            optimizer.state[param] = state.state


# ---- the dict


def _check_form(optimizer: StateLoading, state_dict: dict[str, Any]) -> None:
    states, groups = (state_dict.get(key) for key in ("state", "param_groups"))
    _need(optimizer, isinstance(states, dict), "a dict under 'state'", type(states).__name__)
    _need(optimizer, isinstance(groups, (list, tuple)), "a list under 'param_groups'", type(groups).__name__)
    for group in groups or ():
        _need(optimizer, isinstance(group, dict), "a dict for every group", type(group).__name__)
        ids = group.get("params")
        valid = isinstance(ids, (list, tuple)) and all(isinstance(i, (int, str)) for i in ids)
        _need(optimizer, valid, "a list of numbers or names under 'params' of every group", f"{ids!r:.80}")
        if "param_names" in group:
            names = group["param_names"]
            valid = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
            _need(optimizer, valid and len(names) == len(ids), "a name for every parameter", f"{names!r:.80}")


def _check_ids(optimizer: StateLoading, state_dict: dict[str, Any]) -> None:
    states, groups = state_dict["state"], state_dict["param_groups"]
    sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (optimizer.param_groups, groups))
    _need(optimizer, sizes == saved_sizes, f"groups of {sizes} parameters", f"{saved_sizes}")
    ids = [i for group in groups for i in group["params"]]
    _need(optimizer, len(set(ids)) == len(ids), "every parameter once", f"the ids {ids!r:.80}")
    known = set(ids)
    for key, state in states.items():  # hooks may add other values under names
        if key in known:
            _need(optimizer, isinstance(state, dict), f"a dict for parameter {key!r}", type(state).__name__)
        else:
            _need(optimizer, not isinstance(key, int), f"states of the parameters {ids!r:.80}", f"one of {key!r}")


def _need(optimizer: StateLoading, condition: bool, expected: str, got: str) -> None:
    if not condition:
        raise ValueError(f"{type(optimizer).__name__}: expected {expected} in the saved state, got {got}; {_ADVICE}")


def _refuse_foreign(optimizer: StateLoading, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if another optimizer saved the state.

    The group's "optimizer" entry tells; without one, the state is refused if it lacks most of this optimizer's
    settings.
    """
    distinctive = optimizer.defaults.keys() - _COMMON_SETTINGS
    for group in state_dict["param_groups"]:
        other = group.get("optimizer")
        if other is None and 2 * len(distinctive & group.keys()) < len(distinctive):
            missing = ", ".join(sorted(distinctive - group.keys()))
            other = f"another optimizer (its groups have no {missing})"
        if other is not None and not (isinstance(other, str) and other == optimizer._method()):
            raise ValueError(
                f"{type(optimizer).__name__}: the state was saved by {other}, and {optimizer._method()} cannot "
                "continue from it; nothing was changed. Load it into the optimizer that saved it, or start without it."
            )


def _upgraded(optimizer: StateLoading, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the names, settings and shapes of this version. The given one is not changed.

    Raises:
        ValueError: the state was saved with a setting that no longer exists.
    """
    names, owner = optimizer._older_names, optimizer._method()
    for group in state_dict["param_groups"]:
        check_saved_options(owner, group)

    def renamed(entries: Any) -> Any:  # hooks may add values that are no dict
        return {names.get(k, k): v for k, v in entries.items()} if isinstance(entries, dict) else entries

    gone = REMOVED.get(owner, {}).keys() - optimizer._group_entries.keys()
    groups = [{k: v for k, v in renamed(group).items() if k not in gone} for group in state_dict["param_groups"]]
    states = optimizer._in_memory({key: renamed(state) for key, state in state_dict["state"].items()}, groups)
    return {**state_dict, "state": states, "param_groups": groups}


# ---- settings


def _readable_group(optimizer: StateLoading, group: dict[str, Any]) -> dict[str, Any]:
    """Return a saved group whose tensors (a learning rate, masks) have memory of their own."""

    def readable(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            return [readable(v) for v in value]
        return owned(value) if isinstance(value, Tensor) else value

    result = {}
    for key, value in group.items():
        try:
            result[key] = readable(value)
        except Misfit as error:
            raise ValueError(f"{type(optimizer).__name__}: the saved setting {key!r}: {error}; {_ADVICE}") from None
    return result


def _future_groups(optimizer: StateLoading, saved_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups as they will be after loading, with checked settings.

    Raises:
        ValueError: a saved setting is out of range, or a parameter does not fit its group's settings.
    """
    groups = []
    for number, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        names = {"param_names": group["param_names"]} if "param_names" in group else {}
        future = {**optimizer._first_values(), **names, **saved, "params": group["params"]}
        try:
            # as a step takes it, also slightly below 0
            check_number(type(optimizer).__name__, "learning rate", future["lr"], -(2.0**128))
            optimizer._check_running_group(future)
            optimizer._check_entries(future)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"{type(optimizer).__name__}: the saved settings of group {number} are not valid: {error}; {_ADVICE}"
            ) from error
        groups.append(future)
    for number, future in enumerate(groups):
        try:
            optimizer._check_fit(groups, future)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{type(optimizer).__name__}: the saved settings of group {number} do not fit its parameters: {error}; "
                f"{_ADVICE}"
            ) from error
    return groups


def _refuse_other_order(optimizer: StateLoading, saved_groups: list[dict[str, Any]]) -> None:
    names, saved_names = (
        [name for group in gs for name in group.get("param_names") or ()]
        for gs in (optimizer.param_groups, saved_groups)
    )
    # different sets of names are accepted, as torch does: the model was renamed
    if names != saved_names and sorted(names) == sorted(saved_names):
        here, there = next(pair for pair in zip(names, saved_names, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"{type(optimizer).__name__}: the saved state has its parameters in another order ({there!r} where "
            f"{here!r} is here); nothing was changed. Build the optimizer with its parameters in the saved order."
        )


# ---- states


def _describe(optimizer: StateLoading, entry: Loaded) -> str:
    return describe(optimizer.param_groups[entry.group_index], entry.position)


def _fitted_entries(optimizer: StateLoading, groups: list[dict[str, Any]], entries: list[Loaded]) -> list[Loaded]:
    """Return the entries with tensors that a step can use.

    Raises:
        ValueError: a state has a missing or an unknown entry, or one that is not what the optimizer would create.
    """
    tables = [rows_of((*ENTRIES, *optimizer._state_entries), e.group, e.param) for e in entries]
    keys: list[tuple[int, str]] = []
    tensors: list[Tensor] = []
    for i, (entry, rows, created) in enumerate(zip(entries, tables, _created_states(optimizer, entries), strict=True)):
        for key, tensor in _fitted_state(optimizer, entry, rows, created).items():
            keys.append((i, key))
            tensors.append(tensor)
    params = [p for group in groups for p in group["params"]]
    tensors = separate(tensors, [*params, *(p.grad for p in params if p.grad is not None)])
    states: list[dict[str, Any]] = [{} for _ in entries]
    for (i, key), tensor in zip(keys, tensors, strict=True):
        states[i][key] = tensor
    return [entry._replace(state=state) for entry, state in zip(entries, states, strict=True)]


@torch.no_grad()
def _created_states(optimizer: StateLoading, entries: list[Loaded]) -> list[dict[str, Created]]:
    """Return what the optimizer would create of every saved state, from fake tensors, which take no memory."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    mode, result, owner = FakeTensorMode(allow_non_fake_inputs=True), [], type(optimizer).__name__
    for _, group, position, param, _, saved in entries:
        part, state = local_part(param), dict[str, Any]()
        allocates_nothing = part.device.type == "meta" or isinstance(part, FakeTensor)
        try:
            with nullcontext() if allocates_nothing else mode:
                optimizer._check_placements(group, position, param)
                rounding = effective(owner, group, position, param)
                update_state([e for e in optimizer._state_entries if e.name in saved], state, group, param, unused=True)
                init_rounding(state, param, rounding)
                result.append({key: Created.of(value) for key, value in state.items()})
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{owner}: the saved state cannot be used: {error}; {_ADVICE}") from error
    return result


def _fitted_state(
    optimizer: StateLoading, entry: Loaded, rows: Mapping[str, Row], created: Mapping[str, Created]
) -> dict[str, Tensor]:
    name = _describe(optimizer, entry)
    missing = [key for key, row in rows.items() if row.required and key not in entry.state]
    has_stepped = any(key not in rows or not rows[key].loads.early for key in entry.state)
    if missing and has_stepped:
        raise ValueError(
            f"{type(optimizer).__name__}: the saved state of {name} has no {', '.join(missing)}, only "
            f"{', '.join(map(str, entry.state))}; {_ADVICE}"
        )
    state = {}
    for key, value in entry.state.items():
        try:
            if key not in rows:
                raise Misfit(f"expected one of {', '.join(rows)}")
            shape, rule, _ = rows[key]
            tensor = check_readable(as_number_tensor(value, rule))
            if tuple(tensor.shape) != shape:
                order = "are the parameters here in the order of the saved state?"
                raise Misfit(f"expected shape {shape}, got {tuple(tensor.shape)}; {order}")
            state[key] = fitted(tensor, rule, created.get(key), local_part(entry.param).device)
        except Misfit as error:
            raise ValueError(
                f"{type(optimizer).__name__}: the saved entry {key!r:.80} of the state of {name}: {error}; {_ADVICE}"
            ) from None
    return state
