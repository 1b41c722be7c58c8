"""Recover a pruned folder: train it on the calibration data and replace it in one step."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanstep._checkpoint.files import check_apart, check_space, new_folder, read_json
from leanstep._files import exclusive_lock, one_line, remove_leftovers, remove_partials, restore_replaced
from leanstep._memory import free_memory
from leanstep.pruning.config import Progress, begin
from leanstep.pruning.cost import Plan
from leanstep.pruning.folder.checkpoint import (
    HELD_OUT,
    SIDECAR,
    SOURCE_WEIGHTS,
    copy_others,
    remove_search_files,
    state_file,
    stored_hash,
    suggest_resume,
    write_report,
    write_weights,
)
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype, open_checkpoint, stored_tensors
from leanstep.pruning.folder.loading import READS, checkpoint_values, empty_model_of, load_model, stored_parameters
from leanstep.pruning.folder.text import CalibrationText, Perplexity, held_out_hash, perplexity_of, sequences_of
from leanstep.pruning.measure.batches import Batch, as_batches
from leanstep.pruning.measure.products import products_in
from leanstep.pruning.result import finite_values
from leanstep.pruning.score.targets import find_targets
from leanstep.pruning.training.recovery import Recovery, RecoveryResult, recover
from leanstep.pruning.training.recovery_file import stored_distill
from leanstep.pruning.training.recovery_memory import distillation_bytes, expected_distillation_bytes

# passes over the trained weights of an update: five alternating normalisations, masks, and the step
_UPDATE_PASSES = 30
OTHER_DATA = (
    "perplexities are on the held-out data of recovery, not on those of pruning; the dense model's is not known"
)


def recover_checkpoint(
    source: str | Path,
    folder: str | Path,
    data: CalibrationText | Any,
    recovery: Recovery,
    *,
    held_out: Any = None,
    evaluate: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> RecoveryResult:
    """Train a folder that :func:`prune_checkpoint` wrote, with its zeros held, and replace it. See :func:`recover`.

    Only pruned matrices change. The new folder is written beside the old one and takes its name when it is complete;
    ``sparsity.json`` and ``report.html`` then compare the model before and after.

    Args:
        source: the dense checkpoint, the teacher.
        folder: the pruned one.
        data, held_out: as for :func:`prune_checkpoint`.
        recovery: the settings. With ``distill=None``, the dense model is the teacher if what distillation takes fits
            into the free memory; else the data's next tokens are learnt, and a note says so.
        evaluate: measure perplexity on the held-out sequences.
        device: of both models.
        progress: see :func:`recover`.

    Raises:
        ValueError: for a folder that is not of :func:`prune_checkpoint`, was pruned from another source or from other
            weights or another configuration than the source has now, was recovered before (and that was applied), or
            has other zeros than its ``sparsity.json`` says; and as :func:`recover`.
        OSError: if the disk is full. After any error, the pruned folder is what it was.

    Notes:
        A run that was interrupted goes on from its last state, which is in ``FOLDER.recovery.pt`` until the new folder
        is complete. A state is written every minute, and more rarely where that would take over 5 % of the time.

        Memory: both models and what :func:`recover` needs. fp16 weights are trained in fp32. Disk: the folder, and
        besides a state and the new folder, or two states while one replaces the other. Without a rank, a state has the
        trained matrices in the dtype of training.
    """
    folder = Path(folder).expanduser()
    with exclusive_lock(folder):
        restore_replaced(folder)
        remove_leftovers(folder)
        content = pruned_content(folder)
        remove_search_files(folder)  # left if a run was killed between the folder's name and this
        state = state_file(folder)
        if content.get("source") != str(source):
            raise ValueError(f"{folder} was pruned from {content.get('source')}, not from {source}; name that")
        pruned = open_checkpoint(folder)
        check_space(folder, space_beside(pruned, recovery) - (state.stat().st_size if state.exists() else 0))
        begin(progress, "checkpoint")
        dense = open_checkpoint(source)
        check_apart(folder, dense.folder)
        _check_source(pruned, content, dense)
        if isinstance(data, CalibrationText):
            data, held_out, _ = sequences_of(dense, data)
        model = load_model(pruned, device)
        _check_unchanged(folder, content, model)
        return recover_model(
            model, dense, folder, data, recovery, held_out=held_out, evaluate=evaluate, device=device, progress=progress
        )


def recover_model(
    model: nn.Module,
    dense: Checkpoint,
    folder: Path,
    data: Any,
    recovery: Recovery,
    *,
    held_out: Any,
    evaluate: bool,
    device: str | torch.device,
    progress: Progress | None,
    in_files: int = 0,
) -> RecoveryResult:
    """As :func:`recover_checkpoint`, with the model of the pruned folder and the opened dense checkpoint.

    ``in_files``: see :func:`distillation_bytes`.
    """
    content, pruned, state = pruned_content(folder), open_checkpoint(folder), state_file(folder)
    names = _pruned_names(content)
    if is_half := any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        model.float()
        in_files = 0  # copies in memory
    if not isinstance(data, torch.Tensor):  # read once, for the memory and for the training
        data = as_batches(data, model)
    begin(progress, "dense model")
    # as the interrupted run decided: the free memory may be another now
    distill = stored_distill(state) if recovery.distill is None else recovery.distill
    decided = replace(recovery, distill=distill)
    teacher, note = _teacher(dense, model, data, names, decided, device, snapshot=is_half, in_files=in_files)
    if recovery.distill is None and distill is False:
        note = "recovery learnt the next tokens, not the dense model's outputs, as the interrupted run had begun to"

    def perplexity() -> Perplexity:
        with products_in(model, content.get("settings", {}).get("products", "auto")):  # as before recovery
            return perplexity_of(model, held_out, progress)

    content["perplexity"] = dict(content.get("perplexity") or {})
    for name in ("recovered", "recovered_stderr"):  # of an earlier recovery that was not applied
        content["perplexity"].pop(name, None)
    if evaluate and content.get(HELD_OUT) not in (None, held_out_hash(held_out)):
        # of other text, which no perplexity on this one compares with
        content["perplexity"], content[HELD_OUT] = perplexity().named("after"), held_out_hash(held_out)
        content["notes"] = [*content.get("notes", []), OTHER_DATA]
    begin(progress, "recovery")
    result = recover(
        model,
        data,
        recovery,
        teacher=teacher,
        held_out=None if held_out is False else held_out,
        include=[escape(name) for name in names],
        progress=progress,
        stored=stored_parameters(pruned, model),
        state=state,
    )
    del teacher
    result.notes.extend(filter(None, [note]))
    if evaluate:
        recovered = perplexity()
        content["perplexity"] |= recovered.named("recovered")
        result = replace(result, perplexity=recovered.value)
    begin(progress, "writing")
    content["perplexity"] = finite_values(content["perplexity"]) or None
    content["recovery"] = result.to_dict()
    with suggest_resume(folder), new_folder(folder, replace=True) as staged:
        changed = write_weights(pruned, checkpoint_values(pruned, model), staged)
        copy_others(pruned, staged)
        rows = content["tensors"]
        if refilled := [name for name, zeros in changed.items() if zeros < rows.get(name, {}).get("sparsity", 0.0)]:
            raise RuntimeError(f"recovery filled zeros of {', '.join(refilled)}; {folder} is what it was")
        for name, zeros in changed.items():
            rows[name] = rows.get(name, {}) | {"sparsity": zeros}
        write_report(content, staged, replaces=folder)
    _remove_state(state)
    return result


def _remove_state(state: Path) -> None:
    state.unlink(missing_ok=True)
    remove_partials(state)


def space_beside(pruned: Checkpoint, recovery: Recovery) -> int:
    """Most bytes on the disk besides the pruned folder: two states, or a state and the new folder."""
    stored = [(dtype, shape) for _, _, dtype, shape in stored_tensors(pruned.folder)]
    state = pruned.size * (2 if "F16" in dict(stored) else 1)
    if recovery.rank is not None:  # two factors of each matrix in fp32, without a state of the optimizer
        state = sum(4 * recovery.rank * sum(shape) for _, shape in stored if len(shape) == 2)
    return max(2 * state, state + pruned.size)


def pruned_content(folder: Path) -> dict[str, Any]:
    """Content of ``sparsity.json`` of a folder with the weights of pruning. Raises ValueError for any other.

    A recovery that was not applied has left these weights. The state of a finished one is removed.
    """
    try:
        content = read_json(folder / SIDECAR)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder of leanstep prune: its {SIDECAR} cannot be read ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("tensors"), dict) or "layers" not in content:
        raise ValueError(f"{folder} is no folder of leanstep prune: its {SIDECAR} has no layers and tensors")
    earlier = content.get("recovery")
    if earlier and not (isinstance(earlier, dict) and earlier.get("applied") is False):
        _remove_state(state_file(folder))  # a run was killed between the folder's new name and this
        raise ValueError(f"{folder} was recovered before; prune again into another folder to recover otherwise")
    return content


def _pruned_names(content: Mapping[str, Any]) -> list[str]:
    """Names of the pruned parameters; an expert's ends with its number in brackets."""
    return list(dict.fromkeys(re.sub(r"\[\d+\]$", "", str(row["name"])) for row in content["layers"]))


def _check_source(pruned: Checkpoint, content: Mapping[str, Any], dense: Checkpoint) -> None:
    """Compare the dense model with the one that was pruned. Folders of earlier versions do not name its weights."""
    names = [name for name in {*pruned.config, *dense.config} if pruned.config.get(name) != dense.config.get(name)]
    if names := sorted(name for name in names if not name.startswith("_") and name != "transformers_version"):
        raise ValueError(
            f"config.json in {dense.folder} differs in {', '.join(names)} from that of {pruned.folder}, which was "
            "copied from it. Copy the latter back, or prune into another folder"
        )
    then = content.get(SOURCE_WEIGHTS)
    if then is not None and (now := stored_hash(dense)) != then:
        raise ValueError(
            f"the weights in {dense.folder} changed since {pruned.folder} was pruned from them: their SHA-256 was "
            f"{str(then)[:12]}... then and is {now[:12]}... now. Put the former weights back, or prune into another "
            "folder"
        )


def _check_unchanged(folder: Path, content: Mapping[str, Any], model: nn.Module) -> None:
    """Compare the numbers of nonzero weights with those that were written."""
    try:
        targets = {target.name: target for target in find_targets(model, include=map(escape, _pruned_names(content)))}
        nonzero = {str(row["name"]): row["nonzero"] for row in content["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its {SIDECAR} does not describe its model: {error}") from None
    for name, count in nonzero.items():
        if name not in targets or int(targets[name].weight.count_nonzero()) != count:
            raise ValueError(
                f"{folder} changed since it was pruned: {name} has not {count} nonzero weights; prune again"
            )


def _teacher(
    dense: Checkpoint,
    model: nn.Module,
    data: Any,
    names: list[str],
    recovery: Recovery,
    device: str | torch.device,
    **settings: Any,
) -> tuple[nn.Module | None, str]:
    """The dense model, or None and a note why not. ``settings``: of :func:`distillation_bytes`."""
    if recovery.distill is False:
        return None, ""
    free = free_memory(device)
    if recovery.distill is None and free is not None:
        include = [escape(name) for name in names]
        uses = distillation_bytes(model, data, recovery, dense=dense.size, include=include, **settings)
        if (total := sum(uses.values())) > free:
            parts = ", ".join(f"{use} {size / 1e9:.2f}" for use, size in uses.items())
            return None, (
                f"recovery learnt the next tokens, not the dense model's outputs: these take {total / 1e9:.2f} GB "
                f"({parts}) and {free / 1e9:.2f} GB were free"
            )
    return load_model(dense, device), ""


def recovery_seconds(plan: Plan, recovery: Recovery) -> float:
    """Seconds of all steps, of the comparisons before and after them, and of the folder's files."""
    batch = min(recovery.batch_size, plan.workload.samples)
    # forward and backward, which takes the work of two; and of the dense model
    passes = (3 if recovery.distill is False else 4) * plan.pass_seconds(batch, compared=True, batch_size=batch)
    copied = plan.rates.copied
    update = 4 * _UPDATE_PASSES * plan.shapes.pruned * copied if recovery.rank is None else 0.0  # in fp32
    compared = 2 * 2 * plan.pass_seconds(plan.workload.held_out, compared=True)
    return recovery.steps * (passes + update) + compared + plan.shapes.size * READS * copied


def recovery_bytes(
    checkpoint: Checkpoint, names: list[str], recovery: Recovery, *, samples: int, tokens: int
) -> tuple[dict[str, int], str]:
    """Memory of :func:`recover_model` by use, from a pass of the model without values, and why it is not known, or "".

    The model runs once on tensors that have shapes and no values (torch's FakeTensorMode), which takes seconds. In
    such a pass transformers makes the masks of causal attention, which a run may do without: they are counted.

    Args:
        checkpoint: the dense model.
        names: of the parameters to prune.
        recovery: the settings; unless it has ``distill=False``, with the dense model as teacher.
        samples, tokens: of the calibration data. Images have the size in the configuration.
    """
    dtype = DTYPES[most_common_dtype(checkpoint)]
    is_half = dtype == torch.float16  # is trained in fp32
    try:
        model = empty_model_of(checkpoint, torch.float32 if is_half else dtype)
        batch = _sample(model, tokens)
        with _on_cpu(model):
            patterns = [escape(name) for name in names]
            sample = _batch_on_cpu(batch)
            uses = expected_distillation_bytes(model, sample, samples, recovery, include=patterns, snapshot=is_half)
            weights = sum(parameter.nbytes for parameter in model.parameters())
    except Exception as error:  # noqa: BLE001  # of any model that cannot run so
        return {}, f"memory of recovery, since the model does not run without values ({one_line(error)})"
    teacher = 0 if recovery.distill is False else checkpoint.size
    models = {"dense model": teacher, "pruned model": weights}
    return {use: size for use, size in models.items() if size} | uses, ""


def _sample(model: nn.Module, tokens: int) -> Batch:
    """One sample of a model on the meta device, without values as well."""
    config: Any = model.config
    if model.main_input_name == "input_ids":
        data = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    else:
        size = config.image_size
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        data = torch.zeros(1, config.num_channels, *sides, device="meta")
    (batch,) = as_batches(data, model)
    return batch


@contextmanager
def _on_cpu(model: nn.Module) -> Iterator[None]:
    """Context manager: tensors that are made have no values; those of the model, of the meta device, are replaced."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it prints the traceback of an error that is raised as well
    try:
        with FakeTensorMode():
            model._apply(_empty)
            model.tie_weights()  # type: ignore[operator]  # of transformers
            yield
    finally:
        log.setLevel(level)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _batch_on_cpu(batch: Batch) -> Batch:
    def copied(value: Any) -> Any:
        return _empty(value) if isinstance(value, Tensor) else value

    kwargs = {name: copied(value) for name, value in batch.kwargs.items()}
    return Batch(tuple(map(copied, batch.args)), kwargs, copied(batch.mask), copied(batch.labels))
