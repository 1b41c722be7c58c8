"""The command ``leanstep prune``: prune a checkpoint into a new folder, with a report."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, add_device, new_folder, positive, whole
from leanstep._files import find_model_folder, local_folder, one_line, restore_alone
from leanstep._memory import peak_process_memory
from leanstep._process import InterruptibleStart, allowed_memory, lacks_memory
from leanstep.pruning.config import PruneConfig
from leanstep.recipes.report.formatting import format_duration
from leanstep.recipes.report.progress import ProgressBar
from leanstep.recipes.report.prune_output import (
    OUT_OF_MEMORY,
    estimate_lines,
    recovery_lines,
    shown,
    summary_of,
    time_line,
)
from leanstep.recipes.shrink.judge import judge, load_tasks, task_lines

if TYPE_CHECKING:
    from leanstep._processes import Processes
    from leanstep.pruning import CalibrationText, Estimate, PruneResult, Recovery, RecoveryResult, Refinement
    from leanstep.pruning.folder.files import Checkpoint

__all__ = ["main"]

# difference of --sparsity and the fraction of zeros, by rounding in small matrices
_SAME_SPARSITY = 0.02
# bytes of weights x tokens for the scores, below which a run takes seconds
_SMALL = 10**10
# sequences or images that judge exchanges
_REFINE_SAMPLES = 32
_Group = argparse._ArgumentGroup
_OPTIONS = {"data.val_path": "--data", "data.text_key": "--text-key", "seq_len": "--seq-len", "samples": "--samples"}
# options of --data
_OF_DATA = ("text_key", "label_key", "samples", "curve_samples", "held_out", "seq_len")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep prune``. Returns 0, 2 after an error message about the input, or 1 about the disk."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 and (options.nproc == 1 or options.dry_run):
        return run(options)
    from leanstep.recipes.launch import exit_worker, run_workers

    if size == 1:
        return run_workers("leanstep", ["prune", *arguments], options.nproc, "the same command with --resume")
    exit_worker(run(options))


def run(options: argparse.Namespace) -> int:
    """Run the command with parsed options in this process, one of several under torchrun; returns as :func:`main`."""
    begin, rank = time.monotonic(), int(os.environ.get("RANK", "0"))
    try:
        local_folder(options.checkpoint)  # a mistyped one is refused before torch is imported
        options.curve_samples = min(options.curve_samples, options.samples)
        if options.eval_limit and options.eval_tasks is None:
            raise ValueError("--eval-limit goes with --eval-tasks, which is missing")
        if options.dry_run:
            return _dryrun(options)
        with ProgressBar(shown=rank == 0) as bar:
            with InterruptibleStart():
                import leanstep.pruning.public  # noqa: F401
            options.checkpoint = _model_folder(options.checkpoint)
            tasks = load_tasks(options) if rank == 0 and options.eval_tasks is not None else None
            result = _prune(options, bar)
            rows = judge(tasks, options, bar) if tasks and result is not None else []
    except (ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            reason = "; ".join(filter(None, (allowed_memory(), one_line(error) or type(error).__name__)))
            state = ""
            with suppress(Exception):  # what it reads takes memory, too
                state = f". {_state_of(options)}"
            print(f"error: {OUT_OF_MEMORY} ({reason}){state}", file=sys.stderr)
            return 1
        if type(error).__name__ == "ProcessEndedError":
            return 1  # the process that ended has said why, or its launcher says it
        if isinstance(error, RuntimeError):
            raise
        # of several processes all meet most errors, and one alone may meet others
        is_first = rank == 0
        if "torch" in sys.modules:
            from leanstep._processes import is_first_to_fail

            is_first = is_first_to_fail()
        if is_first:
            print(f"error: {one_line(error)}", file=sys.stderr)
        # a name or a task that needs the network is bad input, as for `eval`
        return 1 if isinstance(error, OSError) and not isinstance(error, ConnectionError) else 2
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\ninterrupted; {_state_of(options)}", file=sys.stderr)
        return 130
    if rank > 0 or result is None:
        return 0
    print(_output(result, options, rows))
    if options.json:
        return 0
    peak = peak_process_memory()
    memory = "" if peak is None else f", at most {peak / 2**30:.2f} GiB of memory"
    print(f"took {format_duration(time.monotonic() - begin)}{memory}")
    return 0


def _state_of(options: argparse.Namespace) -> str:
    """What an interrupted command has left in its folder, and how to go on."""
    try:
        content = json.loads((options.out / "sparsity.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        state = "exists, and is not of this command" if options.out.exists() else "was not created"
        from leanstep.pruning.folder.checkpoint import search_files

        saved = [str(path) for path in search_files(options.out) if path.exists()]
        if not saved:
            return f"{options.out} {state}, and nothing else was saved: the same command begins anew"
        return f"{options.out} {state}. Add --resume to the command to continue from {' and '.join(saved)}"
    report = f"complete, with its report {options.out / 'report.html'}"
    if content.get("recovery"):
        return f"{options.out} holds the recovered model, {report}"
    if options.recover is None:
        return f"{options.out} holds the pruned model, {report}"
    return f"{options.out} holds the pruned model, {report}. Add --resume to the command to recover it"


def _output(result: "PruneResult | RecoveryResult", options: argparse.Namespace, tasks: list[Any]) -> str:
    from leanstep.pruning import RecoveryResult

    shown_tasks = [*task_lines(tasks), ""] if tasks else []
    of_tasks = {"tasks": tasks} if tasks else {}
    if isinstance(result, RecoveryResult):
        if options.json:
            return json.dumps(result.to_dict() | of_tasks)
        return "\n".join([*shown_tasks, *recovery_lines(result)])
    from leanstep._checkpoint.files import read_json

    # counted when they were written: to count again would read all weights, and keep them in memory
    layers = read_json(options.out / "sparsity.json")["layers"]
    if options.json:
        return json.dumps(result.to_dict(layers) | of_tasks)
    return "\n".join([*shown_tasks, summary_of(result, layers, options.out)])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="leanstep prune",
        description="Prune a checkpoint, each matrix as far as it hurts least. CHECKPOINT is never changed.",
    )
    _folder_options(parser)
    data_options(parser.add_argument_group("calibration data"))
    _allocation_options(parser.add_argument_group("how far each matrix is pruned"))
    PruneConfig.add_options(parser.add_argument_group("which weights are pruned"), "weights")
    _afterwards_options(parser.add_argument_group("recovery and evaluation"))
    resources = parser.add_argument_group("memory, time and output")
    resource_options(resources)
    resources.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes that share it; default 1")
    parser.set_defaults(format="dense")
    return parser


def _folder_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, or the name of a model on the hub")
    add("--out", required=True, type=new_folder, metavar="DIR", help="the folder to create")
    PruneConfig.add_options(parser, "")


def data_options(group: _Group) -> None:
    """Add the options of the data."""
    add = group.add_argument
    add(
        "--data",
        metavar="sotu|FILE",
        help="text to calibrate with: a text file, folder or glob, JSON or Parquet; for vision models, images: a "
        "safetensors file with pixel_values [images, channels, height, width], as the model takes them",
    )
    add("--text-key", default="text", metavar="KEY", help="column of JSON or Parquet; default text")
    add("--label-key", metavar="KEY", help="column with the class, for classifiers; default label, if there is one")
    add("--samples", type=int, default=32, metavar="N", help="sequences or images for scores; default 32")
    add("--curve-samples", type=int, default=4, metavar="N", help="of --samples, those for curves; default 4")
    add("--held-out", type=int, default=8, metavar="N", help="sequences or images held out for checks; default 8")
    add("--seq-len", type=int, metavar="N", help="tokens of a sequence; default: as trained, at most 512")
    add("--seed", type=whole, default=0, metavar="N", help="decides which sequences are taken; default 0")


def _allocation_options(group: _Group) -> None:
    add = group.add_argument
    PruneConfig.add_options(group, "allocation")
    add("--latency-table", metavar="FILE", help="JSON: seconds of every matrix at some sparsities")
    search_options(group)


def search_options(group: _Group) -> None:
    """Add the options of the search."""
    add = group.add_argument
    add("--refine", type=float, metavar="MINUTES", help="search from the allocation on joint distortion, for this long")
    add("--refine-evaluations", type=int, metavar="N", help="search by at most N exchanges, in place of a time")
    add("--refine-samples", type=int, metavar="N", help="sequences or images that judge exchanges; default 32")


def _afterwards_options(group: _Group) -> None:
    add = group.add_argument
    PruneConfig.add_options(group, "afterwards")
    evaluation_options(group)
    add("--recover", type=int, metavar="STEPS", help="train after pruning on --data, with the zeros held")
    add("--recover-lr", type=float, metavar="LR", help="rms change of an entry in a step; default 3e-4 (factors 3e-3)")
    add("--recover-rank", type=int, metavar="R", help="recover by LoRA factors of this rank, merged at the end")
    add(
        "--distill",
        action=argparse.BooleanOptionalAction,
        help="recover on the dense model's outputs, or on the next tokens; default: the first, where memory allows",
    )


def evaluation_options(group: _Group) -> None:
    """Add the options of what is measured before and after."""
    group.add_argument(
        "--eval", action="store_true", help="measure the model on the held-out samples, before and after"
    )
    group.add_argument(
        "--eval-tasks",
        metavar="NAMES",
        help="hellaswag,arc_easy: questions of EleutherAI's harness, before and after; or YAML files of its format",
    )
    group.add_argument("--eval-limit", type=positive, metavar="N", help="the first N questions of each task only")


def resource_options(group: _Group) -> None:
    """Add the options of memory, time and output."""
    add = group.add_argument
    PruneConfig.add_options(group, "resources")
    add_device(group)
    add(
        "--activations",
        default="memory",
        choices=("memory", "disk"),
        help="where activations, dense outputs and what --refine needs of all matrices are kept; default memory",
    )
    add("--dry-run", action="store_true", help="state memory, disk and time, by config and file headers, and end")
    add("--resume", action="store_true", help="continue an interrupted run: with its curves, search or recovery")
    add("--json", action="store_true", help="print one JSON object")


def _config(options: argparse.Namespace) -> PruneConfig:
    from leanstep.pruning import LatencyTable

    if hasattr(options, "bits_per_weight"):  # of leanstep compress
        from leanstep.pruning.compress.checkpoint import Size, sized
        from leanstep.pruning.folder.files import open_checkpoint

        config = PruneConfig.of_options(options, budget=None, refine=_refinement(options))
        size = Size(bytes=options.bytes, bits_per_weight=options.bits_per_weight, size=options.size)
        config = sized(open_checkpoint(options.checkpoint), config, size, options.format)
        config.check(has_data=options.data is not None)
        return config
    if (options.budget == "latency") != (options.latency_table is not None):
        raise ValueError("--budget latency goes with a --latency-table FILE, and no other budget does")
    budget = options.budget if options.latency_table is None else LatencyTable.read(options.latency_table)
    return PruneConfig.of_options(options, budget=budget, refine=_refinement(options))


def _prune(options: argparse.Namespace, bar: ProgressBar) -> "PruneResult | RecoveryResult | None":
    from leanstep._processes import Processes
    from leanstep.pruning import prune_checkpoint, recover_checkpoint

    config, recovery = _config(options), _recovery(options)
    processes = Processes.from_environment()
    processes.from_first(lambda: restore_alone(options.out))
    if options.nproc not in (1, processes.size):
        raise ValueError(f"--nproc {options.nproc} in a run of {processes.size} processes; leave it out under torchrun")
    device = _device(options.device, processes)
    data = _data(options)
    judging = data.pop("judging", None)
    if config.refine is not None and judging is not None:
        config = replace(config, refine=replace(config.refine, data=judging))
    if recovery is not None and options.resume and processes.from_first(options.out.exists):
        if not processes.is_first:
            return None
        _refuse_other_settings(options)
        return recover_checkpoint(
            options.checkpoint,
            options.out,
            recovery=recovery,
            evaluate=options.eval,
            device=device,
            progress=bar,
            **{name: value for name, value in data.items() if name != "curve_data"},
        )
    if processes.is_first and device == "cpu" and data and not options.resume:
        _announce(options, config, recovery, data["data"])
    return prune_checkpoint(
        options.checkpoint,
        options.out,
        config=config,
        evaluate=options.eval,
        resume=options.resume,
        device=device,
        progress=bar,
        processes=processes,
        recovery=recovery,
        activations=options.activations,
        format=options.format,
        **data,
    )


def _model_folder(checkpoint: str) -> str:
    """The folder of a checkpoint, of a run that of its model; a name on the hub. Raises ValueError for no model."""
    from leanstep.pruning.folder.files import open_checkpoint

    folder = local_folder(checkpoint)
    if folder is None:
        return checkpoint
    with suppress(ValueError):  # told by those who open it
        folder = find_model_folder(folder)
    open_checkpoint(folder)
    return str(folder)


def _device(requested: str | None, processes: "Processes") -> str:
    """The device of a process: of several, each has a GPU of its own."""
    import torch

    if requested is None:
        requested = "cuda" if torch.cuda.device_count() >= processes.size else "cpu"
    return f"cuda:{processes.rank}" if requested == "cuda" and processes.size > 1 else requested


def _dryrun(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from leanstep._checkpoint.files import check_apart, check_new
    from leanstep.pruning.folder.checkpoint import check_files
    from leanstep.pruning.folder.files import open_checkpoint
    from leanstep.pruning.folder.run import check_device, check_run
    from leanstep.pruning.folder.text import CalibrationText, longest, sequences_of
    from leanstep.recipes.evaluate import find_device

    options.checkpoint = _model_folder(options.checkpoint)
    config, recovery = _config(options), _recovery(options)
    config.check(has_data=True, alone=options.nproc == 1)
    device = str(find_device(None)) if options.device is None else options.device
    check_device(device)
    if recovery is not None and options.resume and options.out.exists():
        _refuse_other_settings(options)
    else:
        check_new(options.out)
        check_files(options.out, options.resume, config)
    check_apart(options.out, (checkpoint := open_checkpoint(options.checkpoint)).folder)
    data = _data(options).get("data")
    check_run(checkpoint, data, config, recovery=recovery, evaluate=options.eval)
    tokens = options.seq_len
    if isinstance(data, CalibrationText):
        tokens = longest(sequences_of(checkpoint, data, refine=config.refine is not None)[0])
    estimate = _estimate(options, checkpoint, config, recovery, tokens, device)
    problems = estimate.problems()
    if options.json:
        print(json.dumps(asdict(estimate) | {"distills": estimate.distills, "problems": problems}))
    else:
        if config.menu:
            from leanstep.pruning.compress.checkpoint import reach

            print(f"sizes in reach: {reach(checkpoint, config, options.format)}")
        print("\n".join(estimate_lines(estimate)))
        if options.eval_tasks is not None:
            print(f"not in the estimate: --eval-tasks {options.eval_tasks}")
    for problem in problems:
        print(f"error: {options.checkpoint}: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _estimate(
    options: argparse.Namespace,
    checkpoint: "Checkpoint",
    config: PruneConfig,
    recovery: "Recovery | None",
    tokens: int | None,
    device: str,
) -> "Estimate":
    from leanstep.pruning import Workload, estimate_pruning

    workload = Workload(
        config,
        samples=options.samples,
        curve_samples=options.curve_samples,
        held_out=options.held_out,
        tokens=tokens,
        activations=options.activations,
        refine_samples=0 if config.refine is None else _refine_samples(options),
        processes=options.nproc,
        device=device,
    )
    return estimate_pruning(
        checkpoint, options.out, workload, include=options.include, exclude=options.exclude, recovery=recovery
    )


def _announce(options: argparse.Namespace, config: PruneConfig, recovery: "Recovery | None", data: Any) -> None:
    """Say on standard error how long a run on the CPU takes, unless its model and data are small."""
    from leanstep.pruning import CalibrationText
    from leanstep.pruning.folder.files import open_checkpoint
    from leanstep.pruning.folder.loading import open_tokenizer
    from leanstep.pruning.folder.text import sequence_length

    checkpoint, tokens = open_checkpoint(options.checkpoint), None
    if isinstance(data, CalibrationText):
        tokens = sequence_length(checkpoint.folder, checkpoint.config, open_tokenizer(options.checkpoint), data.seq_len)
    if checkpoint.size * options.samples * (tokens or 1) > _SMALL:
        print(time_line(_estimate(options, checkpoint, config, recovery, tokens, "cpu")), file=sys.stderr, flush=True)


def _refuse_other_settings(options: argparse.Namespace) -> None:
    """Raise ValueError if the pruned folder has other settings than the command: recovery would ignore these."""
    from leanstep.pruning.folder.recovery import pruned_content

    content = pruned_content(options.out)
    written = {name: content[name] for name in ("score", "pattern", "inputs") if name in content}
    written |= content.get("settings", {})
    asked = {name: getattr(options, name, value) for name, value in written.items()}
    settings = [(f"--{name.replace('_', '-')}", shown(written[name]), shown(asked[name])) for name in written]
    # a search that its note says was not possible was asked for
    notes = map(str, content["notes"]) if isinstance(content.get("notes"), list) else ()
    is_refined = bool(content.get("refinement")) or any(note.startswith("not refined") for note in notes)
    refined = ("left out", "given")
    settings.append(("--refine", refined[is_refined], refined[_refinement(options) is not None]))
    sparsity = content.get("sparsity")
    if options.budget == "params" and options.sparsity is not None and isinstance(sparsity, float):
        # allocations round the number of weights of each matrix
        is_same = abs(sparsity - options.sparsity) < _SAME_SPARSITY
        left = options.sparsity if is_same else round(sparsity, 4)
        settings.append(("--sparsity", shown(left), shown(options.sparsity)))
    for option, before, now in settings:
        if before != now:
            raise ValueError(
                f"{options.out} was pruned with {option} {before}, and the command has {option} {now}: repeat the "
                "settings of pruning to recover that folder, or name another --out"
            )


def _recovery(options: argparse.Namespace) -> "Recovery | None":
    from leanstep.pruning import Recovery

    if options.recover is None:
        for option, value in (("lr", options.recover_lr), ("rank", options.recover_rank)):
            if value is not None:
                raise ValueError(f"--recover-{option} goes with --recover STEPS")
        if options.distill is not None:
            raise ValueError("--distill and --no-distill go with --recover STEPS")
        return None
    if options.data is None:
        raise ValueError("--recover trains on --data, which is missing")
    return Recovery(
        steps=options.recover,
        lr=options.recover_lr,
        rank=options.recover_rank,
        batch_size=options.batch_size,
        distill=options.distill,
        seed=options.seed,
    )


def _refinement(options: argparse.Namespace) -> "Refinement | None":
    from leanstep.pruning import Refinement

    if options.refine is None and options.refine_evaluations is None:
        if options.refine_samples is not None:
            raise ValueError("--refine-samples goes with --refine MINUTES or --refine-evaluations N")
        return None
    return Refinement(minutes=options.refine, evaluations=options.refine_evaluations, seed=options.seed)


def _data(options: argparse.Namespace) -> dict[str, Any]:
    if options.data is None:
        if options.eval:
            raise ValueError("--eval measures the model on held-out samples of --data, which is missing")
        defaults = _parser()
        for name in () if options.dry_run else _OF_DATA:
            if getattr(options, name) != defaults.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} goes with --data, which is missing")
        return {}
    amounts = (options.samples, options.curve_samples, options.held_out)
    if min(amounts) < 1:
        raise ValueError(f"--samples, --curve-samples and --held-out must be at least 1, got {amounts}")
    return _images(options) if options.data.endswith(".safetensors") else {"data": _text(options)}


def _images(options: argparse.Namespace) -> dict[str, Any]:
    """Draw images for the scores, the curves, the comparison and with a search those that judge, from a file."""
    from leanstep.recipes.data.images import draw_images, labelled, read_images

    images, labels = read_images(options.data)
    if options.seq_len is not None:
        raise ValueError(
            f"--seq-len: for text alone, and --data {options.data} has images; leave out --seq-len, or name a text"
        )
    counts = {"--held-out": options.held_out, "--samples": options.samples}
    if _refinement(options) is not None:
        counts["--refine-samples"] = _refine_samples(options)
    held_out, samples, *judging = draw_images(len(images), options.data, counts, options.seed)
    data = {"data": images[samples], "curve_data": images[samples[: options.curve_samples]]}
    of_held_out = labels[held_out] if options.eval and labels is not None else None
    data["held_out"] = labelled(images[held_out], of_held_out)
    return data | ({"judging": images[judging[0]]} if judging else {})


def _refine_samples(options: argparse.Namespace) -> int:
    count = _REFINE_SAMPLES if options.refine_samples is None else options.refine_samples
    if count < 2:
        raise ValueError(f"--refine-samples must be at least 2, got {count}")
    return count


def _text(options: argparse.Namespace) -> "CalibrationText":
    from leanstep.pruning import CalibrationText
    from leanstep.pruning.folder.files import open_checkpoint
    from leanstep.pruning.folder.kinds import judge_of
    from leanstep.pruning.measure.metrics import CLASSIFIER
    from leanstep.recipes.data.sources import OptionTexts, in_options, open_file, read_labels, sotu_corpus, split_newest

    documents: Iterable[str]
    held_out = labels = None
    if options.data == "sotu":
        documents, held_out = split_newest(tuple(sotu_corpus().documents()))
    else:
        try:
            corpus = open_file(options.data, options.text_key)
            judge = judge_of(open_checkpoint(options.checkpoint).folder)
            has_classes = judge is not None and judge.name == CLASSIFIER
            labels = read_labels(corpus, options.text_key, options.label_key, has_classes)
            documents = OptionTexts(corpus, _OPTIONS)
        except ValueError as error:
            raise ValueError(in_options(str(error), _OPTIONS)) from error
    return CalibrationText(
        documents,
        options.data,
        samples=options.samples,
        curve_samples=options.curve_samples,
        held_out=options.held_out,
        held_out_documents=held_out,
        seq_len=options.seq_len,
        seed=options.seed,
        refine_samples=_refine_samples(options),
        labels=labels,
    )
