"""Prune a checkpoint folder: check everything first, and write a complete folder or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from leanstep import __version__
from leanstep._checkpoint.files import check_apart, check_output, check_space, new_folder
from leanstep._checkpoint.mapped import RESIDENT, CopiesInFiles, ResidentSet, Scratch
from leanstep._files import exclusive_lock, output_folder, restore_replaced
from leanstep._process import processor_name
from leanstep._processes import Processes
from leanstep.pruning.allocate.knapsack import InfeasibleBudget
from leanstep.pruning.compress.files import check_format, write_compressed
from leanstep.pruning.config import Execution, Progress, PruneConfig, begin, read_config, read_fields, takes_fields
from leanstep.pruning.cost import Plan, Shapes, Workload
from leanstep.pruning.folder.checkpoint import (
    HELD_OUT,
    SIDECAR,
    SOURCE_WEIGHTS,
    bytes_in_files,
    check_files,
    copy_others,
    has_zeros,
    hash_and_zeros,
    map_copies,
    map_weights,
    remove_search_files,
    search_files,
    suggest_resume,
    tensor_rows,
    unmapped_note,
    write_report,
    write_weights,
)
from leanstep.pruning.folder.estimate import largest_files, patch_count, seconds_of
from leanstep.pruning.folder.files import DTYPES, Checkpoint, most_common_dtype, open_checkpoint, written_bytes
from leanstep.pruning.folder.kinds import Judge, judge_of
from leanstep.pruning.folder.loading import checkpoint_values, empty_model_of, load_model, stored_parameters
from leanstep.pruning.folder.recovery import recover_model, space_beside
from leanstep.pruning.folder.text import CalibrationText, held_out_hash, longest, perplexity_of, sequences_of
from leanstep.pruning.measure.activation_cache import find_stages
from leanstep.pruning.measure.batches import as_batches, evaluating, hooked
from leanstep.pruning.measure.blocks import BlockMover
from leanstep.pruning.measure.metrics import check_runs, kind_of, values_of
from leanstep.pruning.measure.products import products_in
from leanstep.pruning.planner import check_target, groups_of, targets_of
from leanstep.pruning.prune import prune
from leanstep.pruning.result import PruneResult
from leanstep.pruning.score.targets import prunable_names
from leanstep.pruning.training.recovery import Recovery, check_recoverable

ACTIVATIONS = ("memory", "disk")
_UNCHECKED = "the disk space for activations was not checked: the data is batches, not a tensor of samples"


@dataclass(frozen=True, kw_only=True)
class FolderRun:
    """How :func:`prune_checkpoint` runs.

    Attributes:
        held_out: as for :func:`prune`; ignored with a :class:`CalibrationText`, which has its own.
        evaluate: measure on the held-out sequences before and after: perplexity; of embedding models and classifiers
            what :data:`leanstep.pruning.folder.kinds.KINDS` has.
        resume: continue an interrupted run: with its curves, from ``OUT.curves.jsonl``, and its search, from
            ``OUT.refine.json`` or the ``state`` of ``refine``, which stays. If that run had finished ``out``, removes
            the first two, and raises the error of an ``out`` that exists.
        device: that computes. On another device than the CPU, a block is copied there while it runs; see
            :class:`leanstep.pruning.measure.blocks.BlockMover`.
        progress: as for :func:`prune`; and with the phases of reading and writing, ``perplexity`` and ``recovery``.
        recovery: train the pruned model on ``data`` after its folder is written, and replace that; see
            :func:`leanstep.pruning.recover_checkpoint`, which also goes on where a run was interrupted in this.
        activations: where the activations before a block and the dense outputs are kept, and what a search, a
            correction of curves and dense inputs need of all matrices: ``memory``, or ``disk``, in files next to
            ``out``.
        resident: bytes of weights that stay in memory, and of such files.
        processes: as for :func:`prune`, on one machine. The first writes ``out`` and recovers the model.
        format: of the weights in ``out``: ``dense``, in safetensors; or, with a menu, ``gguf``, one file for llama.cpp
            and engines that read its files, or ``sparse``, which :func:`leanstep.sparsity.load_sparse` reads.
    """

    held_out: Any = None
    evaluate: bool = False
    resume: bool = False
    device: str | torch.device = "cpu"
    progress: Progress | None = None
    recovery: Recovery | None = None
    activations: str = "memory"
    resident: int = RESIDENT
    processes: Processes | None = None
    format: str = "dense"

    def check(self, data: Any, config: PruneConfig) -> None:
        """Raise ValueError for what does not exist or does not go together, and a device that is not here."""
        if self.activations not in ACTIVATIONS or self.resident < 0:
            raise ValueError(
                f"expected activations of {' or '.join(ACTIVATIONS)} and resident bytes of at least 0, got "
                f"{self.activations!r} and {self.resident}"
            )
        if self.recovery is not None and data is None:
            raise ValueError("recovery trains on the calibration data: give data")
        if self.recovery is not None and config.menu:
            raise ValueError(
                "recovery trains weights off the values of their formats: give reconstruct, which does not"
            )
        if self.format != "dense":
            check_format(self.format, config.pattern)
        check_device(self.device)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"the device {str(self.device)!r} is not available: {str(error).splitlines()[0]}"
            ) from None


@takes_fields(FolderRun, PruneConfig)
def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    data: CalibrationText | Any = None,
    config: PruneConfig | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a Hugging Face checkpoint into a new folder of the same files, names and dtypes, with exact zeros.

    ``out`` gets the weights as dense safetensors in the same number of files, copies of tokenizer and configuration,
    ``sparsity.json`` (the result, with sparsity per tensor and the curves), and ``report.html``. It opens in
    transformers, and its logits are those of the pruned model bit for bit.

    Args:
        source: a folder, or the name of a model on the hub.
        out: the folder to create; it must not exist. It appears when all files are written.
        data: a :class:`CalibrationText` for language models, or data as for :func:`prune`.
        config: the settings, as one object.
        **options: settings by name, the fields of :class:`leanstep.pruning.PruneConfig`, which change those of
            ``config``; the fields of :class:`leanstep.pruning.folder.run.FolderRun`; and ``curve_data``, ``stored`` as
            for :func:`prune`. Without data of its own, :attr:`CalibrationText.refine_samples` sequences judge a search.

    Raises:
        ValueError: for an incomplete or quantised checkpoint, too little text, contradictory settings, a target out of
            reach, an ``out`` that exists or lies in ``source``, or curves of an interrupted run without ``resume``.
        OSError: if the disk is full. After any error, ``source`` is unchanged and ``out`` does not exist, or holds the
            pruned model if the error came in recovery.

    Notes:
        Memory: ``resident``, and that of :func:`prune` without its copy of the dense weights, which are read again
        from the files. Weights are mapped from copies of the files, which become ``out``: a pruned matrix is written
        there, and weights that were used longest ago leave the memory. Experts that transformers fuses on loading are
        in files, too. Weights from files of ``torch.save``, and others that it converts, stay in memory; the result's
        notes say so.

        Another device than the CPU holds two blocks at a time, their activations and statistics, and with
        ``activations="memory"`` the cached ones. It holds the whole model for ``mfac``, the gradients of ``refine``
        and of a correction, Fisher curves of classifiers and recovery, and where blocks do not run alone, which a note
        says.

        Disk: ``out``, and with ``activations="disk"`` tokens x width values for each of ``data`` and ``held_out``, and
        for ``kl`` 4 bytes per token and entry of the vocabulary; three copies of fused experts while it runs. Each of
        several processes takes this memory and disk while it runs.
    """
    run, curve_data = read_fields(FolderRun, options), options.pop("curve_data", None)
    config = read_config("prune_checkpoint", config, options)
    config.check(has_data=data is not None, alone=run.processes is None or run.processes.size == 1)
    run.check(data, config)
    out = output_folder(out)
    with ExitStack() as stack:
        (run.processes or Processes()).from_first(lambda: stack.enter_context(exclusive_lock(out)))
        return _prune_into(source, out, data, curve_data, config, run)


def _prune_into(
    source: str | Path, out: Path, data: Any, curve_data: Any, config: PruneConfig, run: FolderRun
) -> PruneResult:
    """:func:`prune_checkpoint` after the checks of its arguments, as the only run that writes ``out``."""
    processes, progress, recovery = run.processes or Processes(), run.progress, run.recovery
    partial, search = search_files(out)
    processes.from_first(lambda: _check_start(out, run.resume, config))
    begin(progress, "checkpoint")
    checkpoint = open_checkpoint(source)
    judge = judge_of(checkpoint.folder)
    beside = 0 if recovery is None else space_beside(checkpoint, recovery)
    if run.format == "sparse":  # written beside the dense weights, which are removed then
        beside = int(config.budget.target)  # type: ignore[union-attr]
    written = sum(written_bytes(checkpoint, processes.size, beside).values())
    processes.from_first(lambda: check_output(out, written))
    check_apart(out, checkpoint.folder)
    if config.refine is not None and config.refine.state is None:
        config = replace(config, refine=replace(config.refine, state=search))
    several = recovery is not None or moves_blocks(torch.device(run.device))
    if several and not isinstance(data, torch.Tensor | CalibrationText | None):
        data = list(data)
    check_run(checkpoint, data, config, recovery=recovery, evaluate=run.evaluate)
    begin(progress, "text")
    given = _Calibration(data, run.held_out, curve_data, config, judge=judge)
    calibration = _calibration(checkpoint, given, several=several or run.evaluate)
    if run.evaluate and calibration.held_out is None:
        raise ValueError("the evaluation needs held-out samples: give a text, or images")
    begin(progress, "checkpoint")
    # experts that transformers joins
    resident_weights = ResidentSet(run.resident)
    joined = Scratch(out.absolute().parent, resident_weights)
    with CopiesInFiles(joined):
        model = load_model(checkpoint)
    names = _prunable_names(model, config)
    source_weights, zeros = processes.from_first(lambda: hash_and_zeros(checkpoint, names))
    if zeros:  # else not: counting takes the memory of all weights
        check_reach(model, config)
    unchecked = ""
    if run.activations == "disk":
        first = calibration.held_out if calibration.data is None else calibration.data
        plan = _plan_of(checkpoint, model, names, calibration, first)
        if first is not None and not isinstance(first, torch.Tensor | bool):
            unchecked = _UNCHECKED
        processes.from_first(lambda: check_space(out, written + largest_files(plan) * processes.size))
    content: dict[str, Any] = {"leanstep": __version__, "source": str(source)}
    content[SOURCE_WEIGHTS] = source_weights
    # as asked for: the allocation that is applied may be another, which the comparison found to be better
    content["settings"] = config.recorded() | _amounts(given)
    if calibration.text:
        content["calibration_text"] = calibration.text
    content[HELD_OUT] = held_out_hash(calibration.held_out)
    with _staged(out, run) as folder:
        map_model = map_weights if processes.is_first else map_copies
        with CopiesInFiles(joined):
            mapped = map_model(checkpoint, model, folder, resident_weights)
            stored = stored_parameters(checkpoint, model, joined)
        with _computing_on(run.device, model, calibration) as notes:
            execution = Execution(
                resume=partial,
                progress=progress,
                stored=stored,
                scratch=Scratch(folder, ResidentSet(run.resident)) if run.activations == "disk" else None,
                processes=processes,
            )
            result = _pruned(model, calibration, execution, evaluate=run.evaluate and processes.is_first)
        if not processes.is_first:
            return result
        begin(progress, "writing")
        result.notes.extend(filter(None, [*notes, unmapped_note(mapped), unchecked]))
        content |= result.to_dict()
        if run.evaluate and not moves_blocks(torch.device(run.device)):
            content["speed"] = _speed(model, calibration)
        with CopiesInFiles(joined):
            values = checkpoint_values(checkpoint, model)
        changed = write_weights(checkpoint, values, folder)
        del values
        mapped.detach()
        in_files = 0 if moves_blocks(torch.device(run.device)) else bytes_in_files(model, mapped)
        content["tensors"] = tensor_rows(changed, result)
        if run.format != "gguf":
            copy_others(checkpoint, folder)
        if run.format != "dense":
            write_compressed(checkpoint, folder, result, run.format)
        write_report(content, folder)
    remove_search_files(out)
    if recovery is not None:
        try:
            result.recovery = recover_model(
                model.to(run.device),
                checkpoint,
                out,
                calibration.data,
                recovery,
                held_out=calibration.held_out,
                evaluate=run.evaluate,
                device=run.device,
                progress=progress,
                in_files=in_files,
            )
        except ValueError as error:
            raise ValueError(f"{out} holds the pruned model, and recovery stopped: {error}") from error
    return result


def check_run(
    checkpoint: Checkpoint, data: Any, config: PruneConfig, *, recovery: Recovery | None, evaluate: bool
) -> None:
    """Raise ValueError for what a run could not do with a checkpoint. A dry run asks the same.

    Looks at the configuration and at one sample of the data, and runs nothing. Where the target is out of reach, reads
    the files up to the first zeros, which would change that. What the weights decide, and data that can be read only
    once, are left to the run.

    Args:
        data, config, recovery, evaluate: as for :func:`prune_checkpoint`.
    """
    try:
        dtype = DTYPES[most_common_dtype(checkpoint)]
    except ValueError:  # files without weights, which loading refuses with the names of those that it expects
        dtype = torch.float32
    model = empty_model_of(checkpoint, dtype)
    names = _prunable_names(model, config)
    try:
        check_reach(model, config)
    except InfeasibleBudget:
        if not has_zeros(checkpoint, names):  # which change what is in reach; the weights themselves decide then
            raise
    if isinstance(data, CalibrationText):
        check_reads_text(type(model), data.label, has_decoder=getattr(model.config, "is_encoder_decoder", False))
        first: Any = torch.zeros(1, 2, dtype=torch.int64)
    elif isinstance(data, torch.Tensor | list | tuple):
        first = data[:1]
    else:
        return
    batch = as_batches(first, model, batch_size=config.batch_size)[0]
    if recovery is not None:
        check_recoverable(model, names, batch, recovery)
    kind = kind_of(type(model), model.config)
    if evaluate and kind and recovery is not None:
        raise ValueError(
            f"{type(model).__name__} is not evaluated after recovery: leave out evaluate (--eval), and compare the "
            "folders then (leanstep eval OUT --against CHECKPOINT)"
        )
    if evaluate and not kind and batch.labels is None:
        raise ValueError(
            f"perplexity needs a model that predicts the next token, which {type(model).__name__} does not; leave out "
            "evaluate (--eval)"
        )


def _prunable_names(model: nn.Module, config: PruneConfig) -> list[str]:
    return list(prunable_names(model, include=config.include, exclude=config.exclude))


def check_reads_text(model_class: type, label: str, *, has_decoder: bool = False) -> None:
    """Raise ValueError for text for a model of transformers that takes images or sounds."""
    name, kind = getattr(model_class, "main_input_name", "input_ids"), model_class.__name__
    if name == "input_ids":
        return
    instead = "give images: a safetensors file with a tensor pixel_values (--data FILE.safetensors)"
    if name != "pixel_values" or has_decoder:
        instead = (
            f"the command has no such data. Give batches of {name} in Python, or prune without data (--score magnitude "
            "--allocation erk)"
        )
    raise ValueError(f"{kind} takes {name}, and the calibration data is text ({label}); {instead}")


def check_reach(model: nn.Module, config: PruneConfig) -> None:
    """Raise ValueError for a target that a model cannot meet, with its weights or without values.

    Left to :func:`prune` are budgets of operations, which a pass over the data counts, and models with convolutions,
    of which it may leave out some.
    """
    targets = targets_of(model, config, empty=True)
    if not config.counts_operations and all(target.layout != "conv" for target in targets):
        check_target(groups_of(targets, config), config)


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a name that is none of a device that computes; it need not be in this machine."""
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {str(device)!r} is not available: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class _Calibration:
    """Data by use, the settings of pruning, a line about the text ("" for other data), and who judges the model."""

    data: Any
    held_out: Any
    curve_data: Any
    config: PruneConfig
    text: str = ""
    judge: Judge | None = None


def _amounts(given: _Calibration) -> dict[str, Any]:
    """How many samples were asked for, and of a text which; nothing about data whose length is not known."""
    if isinstance(given.data, CalibrationText):
        return {name: getattr(given.data, name) for name in ("samples", "curve_samples", "held_out", "seq_len", "seed")}
    tensors = {"samples": given.data, "curve_samples": given.curve_data, "held_out": given.held_out}
    return {name: len(value) for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def _calibration(checkpoint: Checkpoint, given: _Calibration, *, several: bool) -> _Calibration:
    """Draw the sequences of a text; other data is taken as it is, as a list if it is read ``several`` times."""
    if given.judge is not None:
        given = replace(given, config=replace(given.config, metric=given.judge.metric(given.config.metric)))
    data, refine = given.data, given.config.refine
    if not isinstance(data, CalibrationText):
        if several and not isinstance(given.held_out, torch.Tensor | bool | None):
            return replace(given, held_out=list(given.held_out))
        return given
    has_judging = refine is None or refine.data is not None
    scores, held_out, judging = sequences_of(checkpoint, data, refine=not has_judging)
    config = given.config
    if refine is not None and not has_judging:
        config = replace(config, refine=replace(refine, data=judging))
    curve_data = scores[: data.curve_samples] if given.curve_data is None else given.curve_data
    text = f"{data.label}, {len(scores)} x {longest(scores)} tokens, seed {data.seed}; curves {data.curve_samples}"
    return replace(given, data=scores, held_out=held_out, curve_data=curve_data, config=config, text=text)


def _pruned(model: nn.Module, calibration: _Calibration, execution: Execution, *, evaluate: bool) -> PruneResult:
    held_out, judge = calibration.held_out, calibration.judge
    with products_in(model, calibration.config.products):
        if evaluate and judge is not None:
            dense = judge.outputs(model, held_out, execution.progress)
        elif evaluate:
            perplexity = perplexity_of(model, held_out, execution.progress).named("before")
        result = prune(
            model,
            calibration.data,
            calibration.config,
            held_out=held_out,
            curve_data=calibration.curve_data,
            **vars(execution),
        )
        if evaluate and judge is not None:
            changed = judge.outputs(model, held_out, execution.progress)
            result.quality = {"samples": len(dense.rows), "before": judge.measures(dense)}
            result.quality["after"] = judge.measures(changed, dense)
        elif evaluate:
            result.perplexity = perplexity | perplexity_of(model, held_out, execution.progress).named("after")
    return result


def _speed(model: nn.Module, calibration: _Calibration) -> dict[str, Any]:
    """How fast the changed model reads a held-out sample alone, on this processor."""
    with products_in(model, calibration.config.products), evaluating(model):
        sample = as_batches(calibration.held_out, model)[0].sample(0)
        # images count as they are, texts by their tokens
        count, unit = (1, "samples") if sample.is_floating_point else (sample.numel, "tokens")
        rate = count / seconds_of(lambda: sample.run(model), 0.05)
    return {"per_second": rate, "unit": unit, "machine": f"{processor_name()}, {torch.get_num_threads()} threads"}


@contextmanager
def _computing_on(device: str | torch.device, model: nn.Module, calibration: _Calibration) -> Iterator[list[str]]:
    """Context manager: the model, in host memory, computes on a device; yields notes about how."""
    if not moves_blocks(torch.device(device)):
        yield []
        return
    data = calibration.held_out if calibration.data is None else calibration.data
    with BlockMover(model, device) as mover:
        yield [] if data is None or data is False else [mover.try_on(as_batches(data, model)[0].sample(0))]


def moves_blocks(device: torch.device) -> bool:
    """Whether blocks are copied to a device while they run; the CPU reads them where they are."""
    return device.type != "cpu"


def _plan_of(checkpoint: Checkpoint, model: nn.Module, names: list[str], calibration: _Calibration, first: Any) -> Plan:
    """The run, to tell the size of its files; of data that is no tensor nothing is known. ``first`` has a sample."""
    config, refine = calibration.config, calibration.config.refine
    curves = calibration.data if calibration.curve_data is None else calibration.curve_data
    data = (calibration.data, curves, calibration.held_out, None if refine is None else refine.data)
    samples, curve_samples, held_out, judging = (len(one) if isinstance(one, torch.Tensor) else 0 for one in data)
    workload = Workload(
        # where time decides, the method that needs most
        config if config.curve_method else replace(config, curves="anchored"),
        samples=samples,
        curve_samples=curve_samples,
        held_out=held_out,
        refine_samples=judging or int(refine is not None),
        activations="disk",
    )
    shapes, is_tensor = Shapes.of(checkpoint, model, names), isinstance(first, torch.Tensor)
    if is_tensor and not first.is_floating_point():
        return Plan(replace(shapes, tokens=first.shape[1]), workload)
    if is_tensor and not patch_count(model.config):
        return Plan(_of_a_sample(shapes, model, first), workload)
    return Plan(replace(shapes, tokens=patch_count(model.config)), workload)


@torch.no_grad()
def _of_a_sample(shapes: Shapes, model: nn.Module, data: torch.Tensor) -> Shapes:
    """Shapes with a sample for a token: the largest output of a stage, and the model's output."""
    sample, sizes = as_batches(data[:1], model)[0], [0]
    check_runs(model, sample)

    def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
        sizes.append(sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)))

    with hooked(stage.register_forward_hook(measure) for _, stage in find_stages(model, sample)):
        outputs = values_of(sample.run(model)).numel()
    return replace(shapes, tokens=1, width=-(-max(sizes) // shapes.itemsize), outputs=outputs)


def _check_start(out: Path, resume: bool, config: PruneConfig) -> None:
    """Raise ValueError for a folder that exists, or files of an interrupted run that is not to be resumed."""
    restore_replaced(out)
    if resume and (out / SIDECAR).is_file():
        # the interrupted run had written its folder and was about to remove these
        remove_search_files(out)
    check_output(out)
    check_files(out, resume, config)


@contextmanager
def _staged(out: Path, run: FolderRun) -> Iterator[Path]:
    """Context manager: the temporary folder of the first process, which becomes ``out``."""
    processes = run.processes or Processes()
    if not processes.is_first:
        yield processes.from_first(Path)
        return
    with suggest_resume(*search_files(out)), new_folder(out) as folder:
        yield processes.from_first(lambda: folder)
