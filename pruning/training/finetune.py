"""After pruning: keep the masks in fine-tuning, prune further on a schedule, and renew batch-norm statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from glob import escape
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanstep._torch import StepHooks, place_like, whole_tensor
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.targets import find_targets, prunable_names

Result = TypeVar("Result")

KINDS = ("cubic", "geometric")


def keep_masks(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> MaskKeeper:
    """Keep the zeros of a pruned model while an optimizer trains it.

    Sets the gradients of pruned weights to zero before ``step()``, and after every call of the closure in
    ``step(closure)``, as if the model computed with ``weight * mask``. Sets pruned weights to zero after the step,
    whatever weight decay, momentum or a normalized update did to them.

    Args:
        model: a pruned model. Shard it before, because sharding replaces parameters.
        optimizer: of the model, or Accelerate's wrapper of it; None: :meth:`MaskKeeper.attach` one later.
        masks: by parameter name, True where a weight is kept. None: the current nonzeros of each matrix that has zeros,
            of the matrices that :func:`leanstep.pruning.find_targets` selects.
        include, exclude: see :func:`leanstep.pruning.find_targets`; ignored with ``masks``.

    Returns:
        :class:`MaskKeeper`; as a context manager it removes its hooks at the end.

    Raises:
        ValueError: for masks of other names or shapes than the parameters, a model without a zero, or an optimizer that
            does not train the masked parameters or whose gradients :func:`leanstep.release_gradients` frees before its
            step. Nothing is attached then.
        TypeError: for anything but a torch optimizer.

    Notes:
        Memory: 1 byte per weight of a masked parameter. Time: one pass over these weights and their gradients per step.
        A frozen parameter, such as the base of a low-rank adapter, keeps its zeros without masks. Merging the adapter
        fills them; call :meth:`MaskKeeper.apply` after the merge. Clipping a gradient norm before the step includes the
        gradients of pruned weights.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> _ = model[0].weight.data[0].zero_()
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with keep_masks(model, optimizer):
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     _ = optimizer.step()
        >>> bool(model[0].weight[0].any())
        False
    """
    parameters = dict(model.named_parameters())
    if masks is None:
        names = dict.fromkeys(target.parameter for target in find_targets(model, include=include, exclude=exclude))
        nonzero = {name: parameters[name].detach() != 0 for name in names}
        masks = {name: mask for name, mask in nonzero.items() if not bool(whole_tensor(mask).all())}
        if not masks:
            raise ValueError("keep_masks: no matrix of the model has a zero: prune it first, or give masks")
    for name, mask in masks.items():
        if name not in parameters:
            raise ValueError(f"keep_masks: the model has no parameter {name!r}")
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ValueError(
                f"keep_masks: expected a bool mask of shape {tuple(parameters[name].shape)} for {name!r}, got "
                f"{tuple(mask.shape)} of {mask.dtype}"
            )
    keeper = MaskKeeper({name: parameters[name] for name in masks}, masks)
    if optimizer is not None:
        keeper.attach(optimizer)
    keeper.apply()
    return keeper


class MaskKeeper:
    """Masks of parameters, and the hooks that keep the parameters masked; made by :func:`keep_masks`.

    Attributes:
        parameters: the masked parameters, by their names in the model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]):
        self.parameters = dict(parameters)
        # True where a weight is pruned, so that no step has to invert the mask
        self._pruned = {name: place_like(~mask, self.parameters[name]) for name, mask in masks.items()}
        self._hooks: list[StepHooks] = []

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def masks(self) -> dict[str, Tensor]:
        """By parameter name, True where a weight is kept. Copies."""
        return {name: ~pruned for name, pruned in self._pruned.items()}

    def sparsity(self) -> float:
        """Fraction of the masked parameters' weights that are pruned."""
        pruned = sum(int(whole_tensor(p.sum())) for p in self._pruned.values())
        return pruned / sum(p.numel() for p in self._pruned.values())

    def attach(self, optimizer: torch.optim.Optimizer) -> MaskKeeper:
        """Mask gradients and weights in every step of an optimizer; returns self. Errors as :func:`keep_masks`."""
        self._hooks.append(
            StepHooks(
                optimizer,
                lambda _: self.mask_gradients(),
                lambda _: self.apply(),
                caller="keep_masks",
                parameters=self.parameters,
            )
        )
        return self

    def detach(self) -> None:
        """Remove the hooks from all optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def apply(self) -> None:
        """Set pruned weights to zero."""
        for name, parameter in self.parameters.items():
            parameter.masked_fill_(self._zeros(name), 0)

    def _zeros(self, name: str) -> Tensor:
        """True where a weight is pruned, on the device of its parameter, which may have been moved."""
        device = self.parameters[name].device
        if self._pruned[name].device != device:
            self._pruned[name] = self._pruned[name].to(device)
        return self._pruned[name]

    def filled(self) -> list[str]:
        """Names of the parameters with a pruned weight that is not zero."""
        return [n for n, parameter in self.parameters.items() if bool(parameter.detach()[self._zeros(n)].any())]

    @torch.no_grad()
    def refresh(self) -> None:
        """Add the current zeros to the masks, after pruning further. Pruned weights stay pruned."""
        for name, parameter in self.parameters.items():
            self._pruned[name] = self._zeros(name) | (parameter == 0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self._zeros(name), 0)


def _keep_pruned(
    model: nn.Module, result: Any, earlier: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str]
) -> MaskKeeper:
    """Keep the zeros of the matrices in a :class:`PruneResult`, of those masked earlier, and of ``find_targets``."""
    names = list(earlier)
    if isinstance(result, PruneResult):
        names += [target.parameter for group in result.groups for target in group.targets]
    try:
        names += prunable_names(model, include=include, exclude=exclude)
    except ValueError:
        # a model of which nothing but what the result names is pruned
        if include is not None or exclude or not names:
            raise
    return keep_masks(model, include=[escape(name) for name in dict.fromkeys(names)])


def gradual_sparsity(
    step: int, *, begin: int, end: int, final: float, initial: float = 0.0, kind: str = "cubic"
) -> float:
    """The sparsity of a schedule at a step: ``initial`` until ``begin``, ``final`` from ``end`` on.

    With x = (step - begin) / (end - begin) between them: "cubic": ``final + (initial - final) (1 - x)^3``; "geometric":
    the density falls by a constant factor, ``(1 - initial)^(1 - x) (1 - final)^x``.

    Raises:
        ValueError: for another kind, ``end <= begin``, or sparsities that are not 0 <= initial <= final < 1.

    References:
        Zhu, Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1 (cubic); Frantar, Kurtic, Alistarh, arXiv
        2107.03356 (geometric, between recomputations).
    """
    if kind not in KINDS:
        raise ValueError(f"gradual_sparsity: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if end <= begin or not 0 <= initial <= final < 1:
        raise ValueError(
            f"gradual_sparsity: expected begin < end and 0 <= initial <= final < 1, got {begin}, {end}, {initial} and "
            f"{final}"
        )
    x = min(max((step - begin) / (end - begin), 0.0), 1.0)
    if kind == "cubic":
        return final + (initial - final) * (1 - x) ** 3
    return 1 - (1 - initial) ** (1 - x) * (1 - final) ** x


def iterative_sparsities(target: float, rate: float = 0.2) -> list[float]:
    """The targets of iterative pruning, ``1 - (1 - rate)^i`` for i = 1, 2, ..., with ``target`` the last.

    Raises:
        ValueError: for numbers outside (0, 1).

    References:
        Xu et al., arXiv 2308.10438, with rate 0.2 (and 0.6 for VGG-16).
    """
    if not (0 < target < 1 and 0 < rate < 1):
        raise ValueError(f"iterative_sparsities: expected target and rate in (0, 1), got {target} and {rate}")
    sparsities: list[float] = []
    while (sparsity := 1 - (1 - rate) ** (len(sparsities) + 1)) < target - 1e-9:
        sparsities.append(sparsity)
    return [*sparsities, target]


def prune_iteratively(
    model: nn.Module,
    sparsities: Sequence[float],
    prune_to: Callable[[float], Result],
    fine_tune: Callable[[MaskKeeper], object],
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> list[Result]:
    """Prune and fine-tune with the masks, from one sparsity to the next.

    Args:
        model: changed in place.
        sparsities: increasing, for instance :func:`iterative_sparsities`.
        prune_to: prunes the model to a sparsity, for instance ``lambda s: prune(model, data, sparsity=s)``. It is
            called on the current model: curves are measured anew, and zeros stay zero.
        fine_tune: trains the model. It gets a :class:`MaskKeeper`, to which it attaches its optimizer.
        include, exclude: whose zeros are kept, see :func:`leanstep.pruning.find_targets`. The matrices of a
            :class:`leanstep.pruning.PruneResult` that ``prune_to`` returns are kept in any case.

    Returns:
        The results of ``prune_to``. The model is also fine-tuned after the last one.

    Raises:
        ValueError: for sparsities that do not increase, or a model without a zero after ``prune_to``.

    References:
        Xu et al., arXiv 2308.10438, for rate-distortion curves; Han, Pool, Tran, Dally, arXiv 1506.02626.
    """
    if any(a >= b for a, b in zip(sparsities, sparsities[1:], strict=False)):
        raise ValueError(f"prune_iteratively: sparsities must increase, got {list(sparsities)}")
    rules, without = None if include is None else list(include), list(exclude)
    results, masked = [], list[str]()
    for sparsity in sparsities:
        results.append(prune_to(sparsity))
        with _keep_pruned(model, results[-1], masked, rules, without) as keeper:
            fine_tune(keeper)
            keeper.apply()
        masked = list(keeper.parameters)
    return results


class GradualPruner:
    """Prunes a model on a schedule during training, after some of the optimizer's steps.

    Args:
        model: the model to prune. Its masks are kept from the first pruning on.
        optimizer: its steps are counted.
        prune_to: prunes the model to a sparsity; see :func:`prune_iteratively`. Called within ``optimizer.step()``,
            after the update.
        schedule: sparsity at a step, for instance ``partial(gradual_sparsity, begin=100, end=1000, final=0.8)``.
        every: optimizer steps between two prunings. Prunes only if the schedule has risen.
        include, exclude: whose zeros are kept; see :func:`prune_iteratively`.

    Raises:
        ValueError: for ``every`` below 1, or freed gradients as for :func:`keep_masks`; in a step, for a model without
            a zero after ``prune_to``.

    Notes:
        The step count and the names of the masked parameters are in :meth:`state_dict`; the masks are the zeros of the
        weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        prune_to: Callable[[float], Any],
        schedule: Callable[[int], float],
        every: int = 1,
        *,
        include: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
    ):
        if every < 1:
            raise ValueError(f"GradualPruner: expected every >= 1, got {every}")
        self.model, self.optimizer = model, optimizer
        self.step_count, self.sparsity = 0, 0.0
        self._prune_to, self._schedule, self._every = prune_to, schedule, every
        self._include, self._exclude = None if include is None else list(include), list(exclude)
        self._keeper: MaskKeeper | None = None
        # registered once: no hook can be added while an optimizer runs its hooks
        self._hooks = StepHooks(
            optimizer, lambda _: self._before_step(), lambda _: self._after_step(), caller="GradualPruner"
        )

    def _before_step(self) -> None:
        if self._keeper is not None:
            self._keeper.mask_gradients()

    def _after_step(self) -> None:
        self.step_count += 1
        if self._keeper is not None:
            self._keeper.apply()
        target = self._schedule(self.step_count)
        if self.step_count % self._every or target <= self.sparsity:
            return
        result = self._prune_to(target)
        self.sparsity = target
        self._keeper = _keep_pruned(self.model, result, self._masked, self._include, self._exclude)

    @property
    def _masked(self) -> list[str]:
        return [] if self._keeper is None else list(self._keeper.parameters)

    def detach(self) -> None:
        """Remove the hooks from the optimizer; training may then change pruned weights."""
        self._hooks.remove()

    def state_dict(self) -> dict[str, Any]:
        """The step count, the current sparsity and the names of the masked parameters."""
        return {"step": self.step_count, "sparsity": self.sparsity, "masked": self._masked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; load the model's weights of that step before."""
        self.step_count, self.sparsity = state["step"], state["sparsity"]
        masked = state.get("masked", ())
        self._keeper = None
        if self.sparsity > 0:
            self._keeper = _keep_pruned(self.model, None, masked, self._include, self._exclude)


@torch.no_grad()
def renew_batch_norms(model: nn.Module, data: Any, *, batch_size: int = 256) -> int:
    """Recompute the running means and variances of a pruned model's batch norms; change nothing else.

    Pruning makes outputs smaller than the stored statistics say. Without fine-tuning, this costs a convolutional
    network much of its accuracy. :func:`leanstep.pruning.prune` does not change the statistics, because curves are
    measured with them.

    Args:
        model: a pruned model. Its mode is restored.
        data: see :func:`leanstep.pruning.measure.batches.as_batches`; labels are not needed.
        batch_size: samples per batch, if ``data`` is a tensor. Batches are of nearly equal size, and none of several
            has one sample, of which there is no variance. Statistics are means over batches.

    Returns:
        Number of batch norms.

    Raises:
        ValueError: for no data. After any error, the statistics are restored.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    if isinstance(data, Tensor) and batch_size > 1:
        # a last batch of one sample has no variance, and any smaller one would count as much as the others
        data = data.tensor_split(max(1, min(-(-len(data) // batch_size), len(data) // 2))) if len(data) else ()
    batches = as_batches(data, model, batch_size=batch_size)
    before = [(norm.momentum, {name: value.clone() for name, value in norm.named_buffers()}) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                # None: mean over all batches, not a moving average
                norm.momentum = None
                norm.train()
            for batch in batches:
                batch.run(model)
    except BaseException:
        for norm, (_, buffers) in zip(norms, before, strict=True):
            for name, value in norm.named_buffers():
                value.copy_(buffers[name])
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
    return len(norms)
