"""Failures that end a run: their messages, with the last good checkpoint and settings to try, and nan_dump/."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from leanstep._files import format_bytes, free_bytes, is_disk_full, is_quota_used_up, replacing, write_text
from leanstep._memory import peak_process_memory
from leanstep._process import allowed_memory, lacks_memory
from leanstep._processes import is_first_to_fail
from leanstep._torch import whole_tensor
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.data.batches import Batch
from leanstep.recipes.training.checkpoint import find_checkpoints

EXIT_DONE, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_NAN, EXIT_MEMORY = 0, 1, 2, 3, 4


class RunFailure(Exception):
    """Ends the run with an exit code and a message; status.json gets ``failed:<reason>``.

    ``alone``: whether other processes may not know of it, so that the first to fail has to tell it.
    """

    def __init__(self, reason: str, exit_code: int, message: str, *, alone: bool = False) -> None:
        self.reason, self.exit_code, self.alone = reason, exit_code, alone
        super().__init__(message)


def refuse(error: Exception) -> int:
    """Print the error of a run that cannot start, in the first process that meets it; return the exit code."""
    # all meet most errors, and one alone may meet others
    if is_first_to_fail():
        print(f"error: {of_process()}{error}", file=sys.stderr, flush=True)
    return EXIT_BAD_CONFIG


def of_process() -> str:
    """``process N: `` for messages of other processes than the first one, else nothing."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"process {rank}: "


def nonfinite_message(
    config: RunConfig, folder: Path, step: int, event: str, *, updated: bool = False, advice: Iterable[str] = ()
) -> str:
    """Describe a non-finite step or a spike: the event, the last good checkpoint, and settings to try, cheapest first.

    ``updated``: whether ``release_gradients`` has applied the step already. ``advice`` are lines to show first.
    """
    warmup = min(1.0, max(0.05, 2 * config.schedule.warmup_fraction))
    applied = "release_gradients has updated the weights already" if updated else "The weights were not updated"
    lines = [
        f"step {step}: {event}. {applied}; the batch and the norms are in {folder / 'nan_dump'}.",
        f"  last good checkpoint: {_last(folder)}",
        *(f"  {line}" for line in advice),
        f"  lower learning rate:  optimizer.lr={config.optimizer.lr / 2:g}",
        f"  longer warm-up:       schedule.warmup_fraction={warmup:g}",
    ]
    if config.max_grad_norm is None and not config.release_gradients:
        lines.append("  clip the gradient:    max_grad_norm=1.0")
    if config.precision != "fp32":
        lines.append("  more precision:       precision=fp32")
    lines.append("  These change the recipe: start anew with out=ANOTHER_FOLDER (and model.init_from=CHECKPOINT/hf).")
    return "\n".join(lines)


@contextmanager
def memory_failures(run: Any) -> Iterator[None]:
    """Context manager: what a lack of memory raises inside becomes RunFailure, at any point of a ``Run``."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        step, rows = run.state.step + 1 if run.begun else 0, run.memory.rows() if run.memory else ()
        message = memory_message(run.config, run.folder.root, step, rows)
        raise RunFailure("out of memory", EXIT_MEMORY, message, alone=True) from error


def memory_message(config: RunConfig, folder: Path, step: int, rows: Iterable[tuple[str, int]] = ()) -> str:
    """Describe an out-of-memory error and settings to try, first those that keep the maths.

    ``step`` is 0 before training. ``rows`` are (name, bytes) of the memory estimate.
    """
    micro = config.batch.micro_batch_size
    when = "before the first step" if step == 0 else "after the last step" if step > config.steps else f"step {step}"
    lines = [f"{when}: out of memory ({_peak()})."]
    lines += [f"    {name:<28}  {format_bytes(size):>10}" for name, size in rows]
    lines.append("  Try, in this order:")
    hints = []
    if micro > 1:
        hints.append((f"batch.micro_batch_size={micro // 2}", "the same maths in more passes; may be resumed"))
    if not config.activation_checkpointing:
        hints.append(("activation_checkpointing=true", "the same maths, about a third slower; may be resumed"))
    if config.precision == "fp32":
        hints.append(("precision=bf16", "activations at half the size"))
    elif config.precision in ("bf16", "fp16"):
        hints.append(("precision=bf16-pure", "weights, gradients and optimizer state at half the size"))
    lines += [f"    {setting:<32}  {why}" for setting, why in hints + lighter_state(config)]
    lines.append(f"  last good checkpoint: {_last(folder)}")
    return "\n".join(lines)


def lighter_state(config: RunConfig) -> list[tuple[str, str]]:
    """(setting, effect) pairs that shrink the optimizer state, nearest to this run first."""
    name, args = config.optimizer.name, config.optimizer.args
    hints = []
    if name == "adamw":
        why = "one state tensor or none, where AdamW has two (a run of its own)"
        hints.append(("optimizer.name=lion or sinkgd", why))
    elif name == "lion":
        hints.append(("optimizer.name=sinkgd", "no state for matrices, where Lion has one tensor (a run of its own)"))
    elif name == "lanton" and args.get("noise_adaptive", True) and not args.get("noise_dtype"):
        hints.append(("optimizer.args.noise_dtype=bfloat16", "kept gradients at half the size"))
    elif name == "mfac":
        if not args.get("compression"):
            if not args.get("storage"):
                hints.append(("optimizer.args.storage=bf16", "the window at half the size"))
            hints.append(("optimizer.args.compression=topk", "the window at about a hundredth of the size"))
        window = int(args.get("window", 1024))
        if window > 1:
            hints.append((f"optimizer.args.window={window // 2}", "half as many gradients in the window"))
    return hints


def _last(folder: Path) -> str:
    checkpoints = find_checkpoints(folder / "checkpoints")
    return str(checkpoints[-1]) if checkpoints else "none yet"


def _peak() -> str:
    if allowed := allowed_memory():
        return allowed
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} of {total / 2**30:.2f} GiB"
    peak = peak_process_memory()
    return "of this process" if peak is None else f"this process had {peak / 2**30:.2f} GiB at its peak"


_LOST = {
    "another process ended": (
        "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "remote process exited",
    ),
    "another process did not answer": ("Timed out waiting", "Watchdog caught collective operation timeout"),
}  # fmt: skip


def lost_process(error: BaseException, world_size: int) -> tuple[str, str] | None:
    """The reason and what gloo or NCCL says when another process of the run has ended or does not answer.

    None for other errors.
    """
    message = str(error).partition("\n")[0]
    for reason, signs in _LOST.items():
        if world_size > 1 and any(sign in message for sign in signs):
            return reason, message[:200]
    return None


def disk_trouble(error: BaseException, folder: Path, needed: int) -> str | None:
    """Describe the disk error that stopped a checkpoint; None for other errors.

    Writers raise different types on a full disk (RuntimeError, SafetensorError, CheckpointException). So any exception
    with less than ``needed`` bytes free counts as a full disk, and every OSError as a disk error.
    """
    other = isinstance(error, Exception) and not isinstance(error, OSError)
    try:
        free = free_bytes(folder)
    except OSError as gone:
        return f"cannot write: {gone}"
    if is_quota_used_up(error):
        # the disk may have room for others
        return "disk full: the user's quota is used up"
    if is_disk_full(error) or (other and free < needed):
        return f"disk full, {format_bytes(free)} free"
    return f"cannot write: {error}" if isinstance(error, OSError) else None


def dump_step(
    accelerator: Accelerator, folder: Path, model: torch.nn.Module, facts: dict[str, Any], window: list[Batch]
) -> None:
    """Write ``nan_dump/report.json`` (``facts`` and the fp32 norms of the layers) and ``batch.safetensors``.

    Every process calls it; the first one writes. Non-finite numbers become strings such as ``"nan"`` or ``"-inf"``.
    """

    def norm(tensor: torch.Tensor | None) -> float | None:
        if tensor is None:
            return None
        # a collective call for a sharded tensor
        return float(whole_tensor(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)).item())

    norms = {
        name: {"weight": norm(parameter), "gradient": norm(parameter.grad)}
        for name, parameter in accelerator.unwrap_model(model).named_parameters()
    }
    if not accelerator.is_main_process:
        return
    target = folder / "nan_dump"
    target.mkdir(exist_ok=True)
    write_text(target / "report.json", json.dumps(_plain(facts | {"layers": norms}), indent=1))
    batches = {f"{key}.{index}": value for index, batch in enumerate(window) for key, value in batch.items()}
    with replacing(target / "batch.safetensors") as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in batches.items()}, partial)


def _plain(value: Any) -> Any:
    # JSON has no nan and inf
    return json.loads(json.dumps(value), parse_constant=lambda text: str(float(text)))
