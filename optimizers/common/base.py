"""The base class of all optimizers: steps, batches of parameters, counts of non-finite gradients."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import StepOptions
from leanstep.kernels.steps.common import compute_dtype
from leanstep.optimizers.common.checks import describe, naming_options, refuse_complex
from leanstep.optimizers.common.groups import refuse_flattened, refuse_replaced
from leanstep.optimizers.common.loading import StateLoading
from leanstep.optimizers.common.quantized import average_values, scale_key, store_averages
from leanstep.optimizers.common.rounding import ENTRIES, effective, init_rounding, rounding_states, seeds_for
from leanstep.optimizers.common.sharding import (
    Reducer,
    Shard,
    all_reduce_flags,
    check_class,
    facts_of,
    has_memory,
    placed_like,
    plain,
    positions_of,
    readable,
    run,
    shard_of,
    together,
)
from leanstep.optimizers.common.state import shapes_of, update_state


class NonFiniteGradientError(RuntimeError):
    """A gradient has an infinite or NaN entry, and the optimizer was built with ``nonfinite="raise"``."""


class Batch(NamedTuple):
    """Parameters of one group, device and dtype that have a gradient; the lists have one entry per parameter."""

    group: dict[str, Any]
    rounding: str  # "nearest" for fp32 and fp64, else the group's
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Any]]
    indices: list[int]  # index of the parameter, counted over all groups
    shards: list[Shard]

    def part(self, span: slice) -> Batch:
        """Return the batch of some of the parameters."""
        return self._replace(
            params=self.params[span],
            grads=self.grads[span],
            states=self.states[span],
            indices=self.indices[span],
            shards=self.shards[span],
        )

    def rounding_state(self) -> list[Tensor]:
        """Return this process's shards of the rounding state; an empty list if there is none."""
        return rounding_states(self.states, self.rounding)

    def options(self, scalars: Tensor, *, seeded: bool = False, **more: Any) -> StepOptions:
        """Return the kernel's options for this step. Call it once a step: it counts steps of stochastic rounding.

        ``seeded``: the step also rounds state stochastically.
        """
        more.setdefault("skip_nonfinite", self.group["nonfinite"] != "pass")
        if seeded or self.rounding == "stochastic":
            more |= positions_of(self.shards, scalars.device)
            steps = [state["step"] for state in self.states]
            torch._foreach_add_(steps, 1)
            more["seeds"] = seeds_for(steps, self.indices, self.group["seed"], scalars.device)
        return StepOptions(scalars, self.rounding, **more)


def step_decoded(batch: Batch, key: str, step: Callable[[Batch], Reducer[Any]]) -> Reducer[None]:
    """Decode an average of 8 bits, step with it in fp32 (fp64 for fp64 parameters), and encode it."""
    steps = [state["step"] for state in batch.states]
    if batch.rounding != "stochastic":  # which counts the steps itself
        torch._foreach_add_(steps, 1)
    values, states = [], []
    for param, state, shard in zip(batch.params, batch.states, batch.shards, strict=True):
        values.append(average_values(state, key, shard, compute_dtype(param.dtype)))
        states.append({name: value for name, value in state.items() if name != scale_key(key)} | {key: values[-1]})
    yield from step(batch._replace(states=states))
    seeds = seeds_for(steps, batch.indices, batch.group["seed"], values[0].device)
    yield from store_averages(values, batch.states, key, batch.shards, seeds.unbind())


class GradientAverage(NamedTuple):
    """The entry of a parameter's state through which alone a step depends on its gradient."""

    key: str
    weight: float  # of the old average; the gradient has the rest


class Prepared(NamedTuple):
    """What a step asks about a parameter. It is asked again when :func:`facts_of` it or its group's settings change."""

    facts: list[Any] | None
    shard: Shard
    rounding: str  # "nearest" for fp32 and fp64, else the group's
    plan: Any  # the answer of the optimizer's own function, such as the name of a rule


class LeanOptimizer(StateLoading):
    """Base class: loading preserves the dtypes of state, and non-finite gradients are counted.

    All state is in ``self.state`` and ``self.param_groups``. deepcopy, pickle, ``state_dict`` and
    ``torch.distributed.checkpoint`` therefore cover all of it.

    Subclasses declare :attr:`_state_entries`, and implement :meth:`_check_group` and :meth:`_group_steps`. A subclass
    whose rule spans groups implements :meth:`_steps` in place of :meth:`_group_steps`.

    Attributes:
        _drop_state: how a user drops the state of a resized parameter.
        _dims: the number of dimensions of every parameter, by group, when the groups were added.
        _checked: the settings of every group when they were checked.
        _records: what was asked with these settings, by the index of the parameter, counted over all groups.
        releases_gradients: whether ``release_gradients`` steps inside backward.
        _separable: whether the update of a parameter depends on its own gradient and state alone.
    """

    _drop_state = "del optimizer.state[parameter]"
    releases_gradients = False
    _separable = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _note_settings(self) -> None:
        """Note the settings of all groups: they are checked. What was asked before is asked again."""
        self._records: dict[int, Prepared] = {}
        settings = [key for key in self.defaults if key != "lr"]  # which every step checks
        self._checked = [{key: group[key] for key in settings if key in group} for group in self.param_groups]

    def _check_changed_groups(self) -> None:
        """Check the groups whose settings were changed since they were checked.

        Raises:
            ValueError, TypeError, RuntimeError: a setting is out of range, or does not fit the parameters. Nothing was
                changed.
        """
        changed = []
        for number, group in enumerate(self.param_groups):
            _check_rate(type(self).__name__, group)
            if number >= len(self._checked) or _differ(group, self._checked[number]):
                changed.append(number)
        if not changed:
            return
        for check in (
            self._check_running_group,
            lambda group: self._check_fit(self.param_groups, group),
        ):
            for number in changed:
                group = self.param_groups[number]
                try:
                    check(group)
                except (ValueError, TypeError, RuntimeError) as error:
                    name = group.get("name", number)
                    raise type(error)(f"{error} (Group {name!r} was changed; nothing was updated.)") from error
        self._note_settings()

    def _check_first_step(self, group: dict[str, Any], position: int) -> None:
        """Raise ValueError if a parameter without state was replaced by one that its rule cannot take.

        Sharding engines replace parameters after the constructor has checked them.
        """
        if self._takes_flattened(group):
            return
        refuse_flattened(type(self).__name__, group, position)
        for other, dims in zip(self.param_groups, self._dims, strict=False):
            if other is group:
                refuse_replaced(type(self).__name__, group, position, dims)

    def _update_state(self, state: dict[str, Any], group: dict[str, Any], position: int, param: Tensor) -> None:
        """Create the missing entries of a parameter that has a gradient, and convert those of changed settings."""
        rounding = effective(type(self).__name__, group, position, param)
        update_state(self._state_entries, state, group, param)
        init_rounding(state, param, rounding)

    def _prepared(
        self, group: dict[str, Any], position: int, index: int, plan: Callable[[Tensor], Any]
    ) -> tuple[Tensor, dict[str, Any], Prepared]:
        """Return gradient, state and record of a parameter that has a gradient. Creates missing state.

        Args:
            group, position: of the parameter.
            index: of the parameter, counted over all groups.
            plan: returns ``Prepared.plan``, which may depend on the facts and on settings.

        Raises:
            RuntimeError, ValueError, TypeError: as :func:`dense_gradient` and :meth:`_state_of`.
        """
        param = group["params"][position]
        known = not torch.compiler.is_compiling()  # which would guard on every record
        record = self._records.get(index) if known else None
        state = None if record is None else self.state.get(param)
        if record is not None and state is not None and record.facts == facts_of(param, param.grad, state):
            return param.grad, state, record
        grad = dense_gradient(type(self).__name__, group, position, param)
        shard = self._check_placements(group, position, param)
        state = self._state_of(group, position, param, checked=True)
        facts = facts_of(param, param.grad, state) if known else None
        record = Prepared(facts, shard, effective(type(self).__name__, group, position, param), plan(param))
        if facts is not None:
            self._records[index] = record
        return grad, state, record

    def _state_of(
        self, group: dict[str, Any], position: int, param: Tensor, *, checked: bool = False
    ) -> dict[str, Any]:
        """Return the state of a parameter that has a gradient, created if it is missing.

        ``checked``: :meth:`_check_placements` has accepted the parameter in this step.

        Raises:
            ValueError: the parameter was resized after its state was created, and kernels would write past its end;
                or its shards do not fit the group's settings.
        """
        if param not in self.state:
            self._check_first_step(group, position)
        if not checked:
            self._check_placements(group, position, param)
        state = self.state[param]
        self._update_state(state, group, position, param)
        for key, shape in shapes_of((*ENTRIES, *self._state_entries), state, group, param).items():
            if tuple(state[key].shape) != shape:
                raise ValueError(
                    f"{type(self).__name__}: expected the state {key!r} of {describe(group, position)} to have shape "
                    f"{shape}, got {tuple(state[key].shape)}: the parameter was resized, or a setting that gives the "
                    "shape was changed, after its state was created. Nothing was changed. Drop the state "
                    f"({self._drop_state}), or build a new optimizer."
                )
            if state[key].device != param.device:  # kernels would read addresses of the other device
                raise ValueError(
                    f"{type(self).__name__}: {describe(group, position)} is on {param.device}, and its state {key!r} "
                    f"on {state[key].device}: the parameter was moved after its state was made. Nothing was changed. "
                    "Move the model first and then build the optimizer, or load its state_dict again, which moves it."
                )
        return state

    def __init_subclass__(cls, **settings: Any) -> None:
        """Let the constructor name its options."""
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls):
            cls.__init__ = naming_options(cls.__name__, cls.__init__)  # type: ignore[method-assign]

    def _group_steps(
        self, group: dict[str, Any], first_index: int, only: Sequence[int] | None = None
    ) -> list[Reducer[None]]:
        """Return generators that update a group, or only its parameters at the positions ``only``.

        ``first_index`` is the number of parameters in the groups before. A bad gradient raises here, before any
        update.
        """
        raise NotImplementedError

    def _gradient_average(self, group: dict[str, Any], param: Tensor) -> GradientAverage | str:
        """Return the average that can take a sum of gradients in parts, or why there is none.

        The reason is the end of a sentence that begins with the step of the parameter.
        """
        return "is not linear in the gradient"

    def _steps(self) -> list[Reducer[None]]:
        """Return the generators of a whole step. Subclasses whose rule spans groups override this."""
        rules: list[Reducer[None]] = []
        first_index = 0
        for group in self.param_groups:
            rules += self._group_steps(group, first_index)
            first_index += len(group["params"])
        return rules

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        In this order: pre-hooks (``register_step_pre_hook``), the closure, the check of ``nonfinite="raise"``, checks
        of gradients and creation of state, the update, post-hooks. A closure computes gradients anew, so what a
        pre-hook did to them is lost: clip, mask or add to gradients at the end of the closure.

        Args:
            closure: computes the loss and its gradients, and returns the loss.

        Returns:
            The closure's value; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._init_group()
        else:
            self._check_changed_groups()
        self._raise_on_nonfinite()
        run(together(self._steps()))
        return loss

    def _init_group(self) -> None:
        """Create the state of all parameters that have a gradient.

        torch.compile calls a method of this name instead of tracing it, and then reads the state once. State that is
        created later is lost.
        """
        self._check_changed_groups()
        for group in self.param_groups:
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    dense_gradient(type(self).__name__, group, position, param)
                    self._state_of(group, position, param)

    def _batches(
        self,
        group: dict[str, Any],
        first_index: int,
        only: Sequence[int] | None = None,
        rule: Callable[[Tensor], str] = lambda param: "",
        joined: Callable[[str], bool] = lambda name: False,
    ) -> list[tuple[str, Batch]]:
        """Return (rule name, batch) for every rule, device and dtype; with ``foreach=False`` for every parameter.

        Creates missing state.

        Args:
            group, first_index, only: as for :meth:`_group_steps`.
            rule: returns the name of a parameter's rule.
            joined: whether the rule of this name takes all its parameters at once also with ``foreach=False``.
        """
        batches: dict[Any, tuple[str, Batch]] = {}
        params, separate = group["params"], group["foreach"] is False
        for position in range(len(params)) if only is None else only:
            param = params[position]
            if param.grad is None:
                continue
            grad, state, record = self._prepared(group, position, first_index + position, rule)
            name = record.plan
            alone = separate and not joined(name)
            key = (name, param.device, param.dtype, position if alone else None)
            if key not in batches:
                batches[key] = name, Batch(group, record.rounding, [], [], [], [], [])
            batch = batches[key][1]
            batch.params.append(param)
            batch.grads.append(grad)
            batch.states.append(state)
            batch.indices.append(first_index + position)
            batch.shards.append(record.shard)
        return list(batches.values())

    @classmethod
    def _method(cls) -> str:
        """Return the name of the direct subclass of LeanOptimizer, also for a user's subclass of it."""
        return next(
            c.__name__ for c in reversed(cls.__mro__) if issubclass(c, LeanOptimizer) and c is not LeanOptimizer
        )

    def _raise_on_nonfinite(self) -> None:
        """Raise NonFiniteGradientError if a gradient of a group with nonfinite="raise" is not finite; waits once."""
        named = [
            (describe(group, position), param, placed_like(param.grad, param))
            for group in self.param_groups
            if group["nonfinite"] == "raise"
            for position, param in enumerate(group["params"])
            if param.grad is not None and not param.grad.is_sparse
        ]
        if not named:
            return
        device = named[0][1].device
        flags = torch.stack([~torch.isfinite(readable(grad)).all().to(device) for *_, grad in named])
        run(all_reduce_flags(flags, [shard_of(param) for _, param, _ in named]))  # all processes raise, or none
        bad = [name for (name, *_), flag in zip(named, flags.tolist(), strict=True) if flag]
        if bad:
            raise NonFiniteGradientError(
                f"{type(self).__name__}: non-finite gradient in {', '.join(bad[:5])}"
                f"{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}; nothing was updated. "
                'Lower the learning rate, clip, or build the optimizer with nonfinite="skip".'
            )


def count_nonfinite(group: dict[str, Any], flags: Tensor) -> None:
    """Add the flagged tensors of a step to the group's counter, on the device."""
    if flags.numel() == 0:
        return
    total = flags.sum()
    if isinstance(group.get("nonfinite_count"), Tensor):
        group["nonfinite_count"].add_(total.to(group["nonfinite_count"].device))
    else:
        group["nonfinite_count"] = total + group.get("nonfinite_count", 0)


def dense_gradient(owner: str, group: dict[str, Any], position: int, param: Tensor) -> Tensor:
    """Return the gradient of a parameter, redistributed to the parameter's placements.

    Raises:
        RuntimeError: for a sparse gradient.
        ValueError: the parameter was resized after the backward pass, is complex, or its gradient is on another mesh.
        TypeError: for a tensor class that kernels can neither address nor copy.
    """
    grad = param.grad
    assert grad is not None
    if param.is_complex():  # it may become so after its group was checked
        refuse_complex(owner, group, position)
    if grad.is_sparse:
        raise RuntimeError(
            f"{owner}: the gradient of {describe(group, position)} is sparse; expected a dense one. "
            "Build the embedding with sparse=False, or give it to torch.optim.SparseAdam."
        )
    if getattr(grad, "device_mesh", None) != getattr(param, "device_mesh", None):
        kinds = [f"on {t.device_mesh}" if hasattr(t, "device_mesh") else "a plain tensor" for t in (param, grad)]
        raise ValueError(
            f"{owner}: {describe(group, position)} is {kinds[0]}, but its gradient is {kinds[1]}; expected both on one "
            "mesh. Nothing was changed. Place the gradient by distribute_tensor(gradient, parameter.device_mesh, "
            "parameter.placements)."
        )
    if grad.device != param.device:
        raise ValueError(
            f"{owner}: {describe(group, position)} is on {param.device}, and its gradient on {grad.device}; the "
            "parameter was moved after the backward pass. Nothing was changed. Set parameter.grad to None and compute "
            "it anew."
        )
    if grad.shape != param.shape:
        raise ValueError(
            f"{owner}: {describe(group, position)} has a gradient of shape {tuple(grad.shape)}; the parameter was "
            "resized after the backward pass. Nothing was changed. Set parameter.grad to None and compute it anew."
        )
    for tensor, whose in ((param, ""), (grad, "the gradient of ")):
        if not has_memory(tensor):
            check_class(owner, f"{whose}{describe(group, position)}", tensor)
    return plain(placed_like(grad, param))


def _differ(group: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    for key, value in settings.items():  # noqa: SIM110  every step asks, and a generator takes longer
        if group[key] is not value:
            return True
    return False


def _check_rate(owner: str, group: Mapping[str, Any]) -> None:
    rate = group["lr"]
    if type(rate) is float and math.isfinite(rate) or (isinstance(rate, Tensor) and rate.numel() == 1):
        return
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not math.isfinite(rate):
        came = f"a tensor of shape {tuple(rate.shape)}" if isinstance(rate, Tensor) else f"{rate!r:.80}"
        raise ValueError(
            f"{owner}: expected a finite number or a one-element tensor as lr of group "
            f"{group.get('name', '(unnamed)')!r}, got {came}; nothing was updated. Set group['lr'] again."
        )


def by_device_and_dtype(params: list[Tensor], *, alone: bool = False) -> list[list[int]]:
    """Group the indices of parameters by device and dtype; with ``alone`` every parameter is its own group."""
    if alone:
        return [[position] for position in range(len(params))]
    sets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, param in enumerate(params):
        sets.setdefault((param.device, param.dtype), []).append(position)
    return list(sets.values())
