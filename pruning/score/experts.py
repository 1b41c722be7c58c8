"""Experts: inputs of those whose weights are one parameter of three dimensions, and scores of those with few tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leanstep.pruning.score.base import LayerPruner
from leanstep.pruning.score.targets import Group, Target


class ExpertProducts(TorchFunctionMode):
    """Passes every product with the weight of one expert to ``record``, and goes on with the output that it returns.

    ``record`` gets the expert, its inputs, the output, and whether the product is of all experts at once
    (``torch.bmm``), where a token that is not routed to the expert is a row of zeros. Which expert a weight belongs to
    is told by its address, wherever the parameter's data is at that moment.
    """

    def __init__(self, experts: Sequence[Target], record: Callable[[Target, Tensor, Tensor, bool], Tensor]) -> None:
        super().__init__()
        self._record = record
        self._experts: dict[tuple[nn.Module, str], dict[int, Target]] = {}
        for target in experts:
            assert target.expert is not None
            self._experts.setdefault((target.module, target.attribute), {})[target.expert] = target

    def _target_of(self, weight: Tensor) -> Target | None:
        for (module, attribute), experts in self._experts.items():
            whole = getattr(module, attribute)
            distance = weight.data_ptr() - whole.data_ptr()
            expert, rest = divmod(distance, whole.stride(0) * whole.element_size())
            if not rest and expert in experts:
                return experts[expert]
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        products = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
        if func in products and len(args) > 1 and isinstance(args[1], Tensor):
            target = self._target_of(args[1])
            if target is not None and args[0].shape[-1] == target.weight.shape[1]:
                return self._record(target, args[0], output, False)
        if func in (torch.bmm, Tensor.bmm) and len(args) > 1:
            targets = [self._target_of(weight) for weight in args[1]]
            if any(target is not None for target in targets):
                before = list(output)
                after = [
                    part if target is None else self._record(target, inputs, part, True)
                    for target, inputs, part in zip(targets, args[0], before, strict=True)
                ]
                return output if all(map(operator.is_, before, after)) else torch.stack(after)
        return output


@contextmanager
def one_expert_at_a_time(model: nn.Module) -> Iterator[None]:
    """Context manager: transformers models run experts one by one, so that each product can be intercepted."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_experts_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_experts_implementation(before)  # type: ignore[operator]


@contextmanager
def experts_without_masked_tokens(
    experts: Sequence[Target], mask_of_tokens: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Context manager: experts compute only the tokens that count; their output is 0 for the others.

    Of modules that take rows of tokens, their experts and the experts' weights, as those of transformers do, and return
    rows. Others compute all tokens.

    Args:
        experts: their modules are those that take the tokens.
        mask_of_tokens: returns the mask [batch, tokens] of the pass that runs, True for tokens that count; None: all.
    """
    shortened: dict[nn.Module, Tensor] = {}

    def shorten(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        mask = mask_of_tokens()
        if mask is None or len(args) != 3 or not all(isinstance(arg, Tensor) and arg.dim() == 2 for arg in args):
            return None
        if any(len(arg) != mask.numel() for arg in args):
            return None
        shortened[module] = mask.flatten()
        return tuple(arg[shortened[module]] for arg in args)

    def restore(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if (mask := shortened.pop(module, None)) is None:
            return None
        whole = output.new_zeros(len(mask), *output.shape[1:])
        whole[mask] = output
        return whole

    with ExitStack() as stack:
        for module in dict.fromkeys(target.module for target in experts):
            stack.callback(module.register_forward_pre_hook(shorten).remove)
            stack.callback(module.register_forward_hook(restore).remove)
        yield


def ratio(pruner: LayerPruner, squared: bool) -> float:
    """Mean score of a matrix, divided by the mean of what it is by magnitude alone."""
    return float(pruner.scores.mean() / _power(pruner.weight.abs(), squared).mean().clamp(min=1e-30))


def scales_of(groups: Sequence[Group], starved: Collection[str], ratio_of: Callable[[str], float]) -> dict[str, float]:
    """Factors of the experts that are scored by magnitude: the mean ratio of the other experts of their kind.

    Where there are none, it is the mean over all other matrices.

    Args:
        groups: the matrices, each a group.
        starved: names of these experts.
        ratio_of: :func:`ratio` of a matrix by name; called only if there are such experts.
    """
    experts = [group for group in groups if group.name in starved]
    ratios: dict[str, list[float]] = {}
    for group in groups if experts else ():
        if group.name not in starved:
            ratios.setdefault(group.targets[0].kind, []).append(ratio_of(group.name))
    every = [one for of_one in ratios.values() for one in of_one] or [1.0]
    return {group.name: fmean(ratios.get(group.targets[0].kind, every)) for group in experts}


def scaled(scores: Tensor, scale: float | None, squared: bool) -> Tensor:
    """Scores by magnitude in the unit of a score; with the scale None, scores as they are."""
    return scores if scale is None else _power(scores, squared) * scale


def _power(magnitudes: Tensor, squared: bool) -> Tensor:
    return magnitudes.square() if squared else magnitudes
