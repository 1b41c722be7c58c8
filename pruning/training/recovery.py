"""Recovery after pruning: train the weights that are left on the dense model's outputs, with the zeros held."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from leanstep.lora import LoraConfig, apply_lora, keep_zeros, merge, remove_lora
from leanstep.lora.layers.frozen import is_linear
from leanstep.optimizers import NonFiniteGradientError, create
from leanstep.pruning.config import Progress
from leanstep.pruning.measure.batches import Batch, as_batches, batches_hash, evaluating
from leanstep.pruning.measure.curve_file import configuration_hash, weights_hash
from leanstep.pruning.measure.metrics import (
    KL,
    Distortion,
    check_runs,
    cross_entropy_sums,
    logits_of,
    may_give_logits,
    summarise,
    token_rows,
)
from leanstep.pruning.result import Recovery, RecoveryResult
from leanstep.pruning.score.gradients import only_gradients_of
from leanstep.pruning.score.targets import Stored, Target, WeightSnapshot, abbreviate, find_targets, parameters_of
from leanstep.pruning.training.finetune import MaskKeeper, keep_masks
from leanstep.pruning.training.recovery_file import RecoveryFile

# logits of one pass, which take 4 bytes each, four times
_TOGETHER = 1 << 26
# part of the steps in which the learning rate rises
_WARM_UP = 0.1


def recover(
    model: nn.Module,
    data: Any,
    recovery: Recovery,
    *,
    teacher: nn.Module | None = None,
    held_out: Any = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    progress: Progress | None = None,
    stored: Stored | None = None,
    state: str | Path | None = None,
) -> RecoveryResult:
    """Train a pruned model in place, with its zeros held. Only the matrices that :func:`find_targets` selects change.

    The loss is ``KL(softmax(teacher(x)) || softmax(model(x)))``, a mean over tokens; without a teacher, the
    cross-entropy of the next token. :class:`leanstep.SinkGD` takes the steps, which has no state for matrices:
    ``W -= lr_t * X`` with X the normalized gradient of the weights that are left: those of pruned weights are set to
    zero before it is normalized. With ``rank``, it steps LoRA factors whose product is
    masked, and these are merged at the end. Dropout is off.

    Args:
        model: with zeros in its matrices.
        data: see :func:`leanstep.pruning.measure.batches.as_batches`. Samples of a tensor are shuffled, and passes
            begin again until all steps are taken. Batches are steps as they are; those without a token that counts are
            left out.
        recovery: the settings.
        teacher: the dense model, on the model's device.
        held_out: data for a comparison of the pruned with the trained model; the better one stays. None: no comparison.
        include, exclude: see :func:`find_targets`.
        progress: called with (steps taken, steps in all, "recovery").
        stored: see :func:`leanstep.pruning.prune`.
        state: file for the trained weights and the optimizer, replaced about once a minute. An interrupted recovery
            goes on from it, to the weights of one that was not interrupted. None: no file.

    Returns:
        :class:`RecoveryResult`.

    Raises:
        ValueError: for a model without a zero or without logits, ``distill=True`` without a teacher, data without next
            tokens and no teacher, a rank for a model without linear layers to adapt, a ``state`` of another recovery,
            or a loss that is not finite. The weights are the pruned ones after any error.

    Notes:
        Memory besides both models: the gradients of the trained matrices, a mask of 1 byte per weight, a copy of the
        matrices that are not ``stored``, one of the trained weights while a ``state`` is written, and the activations
        and logits of some samples, at most 2^26 logits unless one sample has more. With ``rank``, the gradients are of
        the factors. Time: a step is three passes of the model and one of the teacher over ``batch_size`` samples.

    References:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; M. Scetbon et
        al., arXiv 2502.06742 (SinkGD); J. P. Munoz et al., arXiv 2410.03750 (adapters on a sparse base).
    """
    if recovery.distill and teacher is None:
        raise ValueError("recovery with distill=True needs the dense model as teacher, got None")
    teacher = None if recovery.distill is False else teacher
    targets = find_targets(model, include=include, exclude=exclude)
    with evaluating(model), nullcontext() if teacher is None else evaluating(teacher):
        samples = Samples(data, model, teacher, recovery)
        compared = [] if held_out is None else as_batches(held_out, model, batch_size=1, what="held_out")
        snapshot = WeightSnapshot(targets, stored)
        with keep_masks(model, include=[escape(target.parameter) for target in targets]) as keeper:
            before = _cost(model, teacher, compared)
            snapshot.take()
            with snapshot.restored_on_error():
                file = RecoveryFile(
                    None if state is None else Path(state),
                    {} if state is None else _identity(model, teacher, samples, recovery),
                )
                losses = _train(model, teacher, targets, keeper, samples, recovery, progress, file)
                if filled := keeper.filled():
                    raise RuntimeError(f"recovery filled zeros of {', '.join(filled)}; the pruned weights are back")
                after = _cost(model, teacher, compared)
    applied = before is None or after is None or after.mean < before.mean
    if before is not None and after is not None and not before.is_finite:
        applied = after.is_finite
    notes = [*filter(None, [file.note, _untrained_note(targets, recovery.rank)])]
    if before is None:
        notes.append("there was no held-out data: the effect of recovery was not measured")
    elif not applied and after is not None:
        snapshot.restore()
        notes.append(
            f"recovery was not applied: it takes the held-out loss from {before.mean:.4g} to {after.mean:.4g}; try "
            "more samples, more steps or a smaller rate"
        )
    settings = replace(recovery, lr=recovery.step_size, distill=teacher is not None)
    metric = "cross_entropy" if teacher is None else "kl"
    return RecoveryResult(settings, tuple(losses), metric, before, after, applied, notes=notes)


def check_recoverable(model: nn.Module, names: Iterable[str], batch: Batch, recovery: Recovery) -> None:
    """Raise ValueError for a model that :func:`recover` would refuse. Runs nothing; the model may be without values.

    Args:
        model: the dense model.
        names: of the parameters to prune.
        batch: of the calibration data.
        recovery: the settings. With ``distill=None``, the dense model is taken to fit into the memory.
    """
    if not may_give_logits(model):
        raise ValueError(_without_logits(type(model).__name__))
    if recovery.distill is False and batch.labels is None:
        raise ValueError(_NO_NEXT_TOKEN)
    if recovery.rank is not None and not any(is_linear(model.get_submodule(n.rpartition(".")[0])) for n in names):
        raise ValueError(_without_linear(recovery.rank, type(model).__name__))


_NO_NEXT_TOKEN = (
    "recovery without distillation predicts the next token, and this model or data has none; distil from the dense "
    "model (without --no-distill)"
)


def _without_logits(name: str) -> str:
    return (
        f"recovery compares logits: expected a model that gives logits (a tensor, or an output with .logits), got "
        f"{name}; leave out recovery (--recover), or prune the model with its head"
    )


def is_adapted(target: Target) -> bool:
    """Whether LoRA factors can stand beside a matrix; not beside convolutions and the experts of one parameter."""
    return target.expert is None and is_linear(target.module)


def _untrained_note(targets: Sequence[Target], rank: int | None) -> str:
    """Which matrices a recovery with a rank leaves as they are; "" for none."""
    names = [] if rank is None else [target.name for target in targets if not is_adapted(target)]
    if not names:
        return ""
    return (
        f"{len(names)} of {len(targets)} pruned matrices were not trained: {abbreviate(names, 3)}. Recovery with "
        f"rank={rank} adapts linear layers, not experts in one parameter or convolutions; without a rank "
        "(--recover-rank), all are trained"
    )


def _without_linear(rank: int, name: str) -> str:
    return (
        f"recovery with rank={rank} adapts linear layers, and {name} has none among its pruned ones; take rank=None "
        "(leave out --recover-rank), which trains the weights"
    )


def _train(
    model: nn.Module,
    teacher: nn.Module | None,
    targets: Sequence[Target],
    keeper: MaskKeeper,
    samples: Samples,
    recovery: Recovery,
    progress: Progress | None,
    file: RecoveryFile,
) -> list[float]:
    """Take all steps that the file's state has not taken; returns the losses of all."""
    with training(model, targets, recovery):
        half = any(p.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
        optimizer = create(
            model,
            "sinkgd",
            lr=recovery.step_size,
            scale=1.0,
            rounding="stochastic" if half else "nearest",
            seed=recovery.seed,
            nonfinite="raise",
            say=None,
        )
        if recovery.rank is None:
            keeper.attach(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        losses = file.restore(trained, optimizer)
        for step, batches in enumerate(islice(samples.batches(), len(losses), recovery.steps), len(losses) + 1):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * rate_factor(step - 1, recovery.steps)
            losses.append(_step(model, teacher, batches, optimizer))
            file.save(trained, optimizer, losses)
            if progress is not None:
                progress(step, recovery.steps, "recovery")
    return losses


def _identity(model: nn.Module, teacher: nn.Module | None, samples: Samples, recovery: Recovery) -> dict[str, Any]:
    """Everything that the trained weights depend on."""
    settings = asdict(replace(recovery, lr=recovery.step_size, distill=teacher is not None))
    return {
        "weights": weights_hash(model),
        "configuration": configuration_hash(model),
        "dense weights": None if teacher is None else weights_hash(teacher),
        "dense configuration": None if teacher is None else configuration_hash(teacher),
        "data": batches_hash(as_batches(samples.data, model)),
        "settings": settings,
    }


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step, from 0: a linear rise to 1 times a cosine that falls to 0."""
    rise = (step + 1) / max(1, round(_WARM_UP * steps))
    return min(1.0, rise) * (1 + math.cos(math.pi * step / steps)) / 2


def pass_rows(samples: int, logits: int) -> int:
    """Number of samples in a pass of a step with so many samples and logits of one sample."""
    return max(1, min(samples, _TOGETHER // logits))


class Samples:
    """The training data: batches of every step, without end.

    Attributes:
        data: a tensor of samples, or batches.
        rows: samples of one pass, of a tensor.
    """

    def __init__(self, data: Any, model: nn.Module, teacher: nn.Module | None, recovery: Recovery) -> None:
        self.model, self.recovery = model, recovery
        self.data: Tensor | list[Batch] = data if isinstance(data, Tensor) else as_batches(data, model)
        first = as_batches(self.data[:1], model)[0].sample(0)
        check_runs(model, first)
        try:
            logits = logits_of(first.run(model))
        except TypeError:
            raise ValueError(_without_logits(type(model).__name__)) from None
        if teacher is None and (first.labels is None or logits.dim() != 3):
            raise ValueError(_NO_NEXT_TOKEN)
        if teacher is not None and (dense := logits_of(first.run(teacher)).shape) != logits.shape:
            raise ValueError(f"the dense model gives logits {tuple(dense)}, the pruned one {tuple(logits.shape)}")
        if isinstance(self.data, Tensor):
            usable = _has_token(first, logits, teacher)
        else:
            # steps without a term in the loss would divide by zero
            self.data = [batch for batch in self.data if _has_token(batch, logits, teacher)]
            usable = bool(self.data)
        if not usable:
            raise ValueError("recovery: the data has no token that counts, or that follows another")
        self.rows = pass_rows(recovery.batch_size, logits.numel())

    def batches(self) -> Iterator[list[Batch]]:
        """Yield the passes of each step."""
        generator = torch.Generator().manual_seed(self.recovery.seed)
        while True:
            order = torch.randperm(len(self.data), generator=generator)
            if not isinstance(self.data, Tensor):
                yield from ([self.data[index]] for index in order.tolist())
                continue
            for indices in order.split(self.recovery.batch_size):
                yield as_batches(self.data[indices.to(self.data.device)], self.model, batch_size=self.rows)


def _step(
    model: nn.Module, teacher: nn.Module | None, batches: Sequence[Batch], optimizer: torch.optim.Optimizer
) -> float:
    """One update by the mean loss of some batches; returns that."""
    size, total = sum(batch.size for batch in batches), 0.0
    for batch in batches:
        with torch.enable_grad():
            loss = _loss(model, teacher, batch) * (batch.size / size)
            loss.backward()
        total += float(loss.detach())
    try:
        if not math.isfinite(total):
            raise NonFiniteGradientError(f"the loss is {total}")
        optimizer.step()
    except NonFiniteGradientError as error:
        raise ValueError(f"recovery stopped, take a smaller learning rate: {error}") from error
    optimizer.zero_grad()
    return total


def _loss(model: nn.Module, teacher: nn.Module | None, batch: Batch) -> Tensor:
    """Mean over tokens of the divergence from the teacher, or of the cross-entropy."""
    if teacher is None:
        sums, counts = cross_entropy_sums(batch.run(model), batch)
        return sums.sum() / counts.sum()
    with torch.no_grad():
        dense = token_rows(logits_of(batch.run(teacher)), batch)
    rows = token_rows(logits_of(batch.run(model)), batch)
    divergences = [
        kl_div(_log_probabilities(row), _log_probabilities(expected), log_target=True, reduction="sum")
        for row, expected in zip(rows, dense, strict=True)
    ]
    return torch.stack(divergences).sum() / sum(len(row) for row in rows)


def _log_probabilities(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(-1)
    # finite where a logit is -inf: the divergence has 0 times -inf there, which is NaN
    return log_p.clamp(min=torch.finfo(log_p.dtype).min) if bool(log_p.isneginf().any()) else log_p


def _has_token(batch: Batch, logits: Tensor, teacher: nn.Module | None) -> bool:
    """Whether the loss has a term: a token that counts, or without a teacher the label of a next one."""
    if teacher is None and batch.labels is not None:
        labels = batch.labels if batch.mask is None else batch.labels.masked_fill(~batch.mask, -100)
        return bool((labels[:, 1:] != -100).any())
    return logits.dim() == 2 or batch.mask is None or bool(batch.mask.any())


def _cost(model: nn.Module, teacher: nn.Module | None, batches: Sequence[Batch]) -> Distortion | None:
    """The loss on held-out batches; None for none."""
    if not batches:
        return None
    if teacher is None:
        return summarise(cross_entropy_sums(batch.run(model), batch) for batch in batches)
    metric = KL()
    return summarise(
        metric.compare(metric.reference(batch.run(teacher), batch), batch.run(model), batch) for batch in batches
    )


@contextmanager
def training(model: nn.Module, targets: Sequence[Target], recovery: Recovery) -> Iterator[None]:
    """Context manager: only the targets' parameters, or factors beside them that are merged at the end, are trained."""
    parameters = list(model.parameters())
    try:
        with only_gradients_of(model, [] if recovery.rank is not None else parameters_of(targets).values()):
            if recovery.rank is None:
                yield
                return
            linear = [target for target in targets if is_adapted(target)]
            if not linear:
                raise ValueError(_without_linear(recovery.rank, type(model).__name__))
            # an expression for whole names: a list of names would also select layers whose names end in one of them
            names = "|".join(re.escape(target.parameter.removesuffix(".weight")) for target in linear)
            config = LoraConfig(r=recovery.rank, lora_alpha=recovery.rank, target_modules=names)
            with torch.random.fork_rng():
                torch.manual_seed(recovery.seed)
                apply_lora(model, config)
            try:
                keep_zeros(model)
                yield
                merge(model)
            finally:
                remove_lora(model)
    finally:
        for parameter in parameters:
            parameter.grad = None
