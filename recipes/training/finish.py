"""The end of a run: an ordinary Hugging Face folder, a sample of what it writes, and the report."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanstep._files import publish_folder
from leanstep.recipes.config.schema import ExpectConfig, RunConfig
from leanstep.recipes.training.checkpoint import TrainState
from leanstep.recipes.training.failures import RunFailure, disk_trouble
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.saver import Saver
from leanstep.recipes.training.world import all_agree

__all__ = ["compare", "export_final", "finish", "sample"]

_SAMPLE_TOKENS = 64
_TEMPERATURE = 0.8


def finish(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    saver: Saver,
    state: TrainState,
    say: Callable[[str], None],
) -> None:
    """Write ``final/``, sample from it, compare with what was expected. Raises RunFailure when it cannot be written."""
    export_final(accelerator, folder, saver)
    if accelerator.is_main_process:
        text = sample(folder.final, config.seed, accelerator.device)
        folder.log({"step": state.step, "kind": "sample", "text": text})
        say(f"sample (temperature {_TEMPERATURE:g}, seed {config.seed}):\n{text}")
        if state.val_loss is not None:
            say(compare(state.val_loss, config.expect))
        say(f"model and tokenizer: {folder.final}")


def write_report(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Write report.html; a missing package or a full disk is said and ends nothing."""
    try:
        from leanstep.recipes.report.report import write_report as write

        say(f"report: {write([folder.root], folder.root / 'report.html')}")
    except (ImportError, OSError) as error:
        say(f"WARNING: no report was written: {error}")


def export_final(accelerator: Accelerator, folder: RunFolder, saver: Saver) -> None:
    """Write the model and tokenizer to ``final/``, aside first and then renamed, replacing an older one."""
    staged = folder.root / ".writing-final"
    failure: Exception | None = None
    try:
        if accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        saver.export(staged)
        if accelerator.is_main_process:
            publish_folder(staged, folder.final)
    except Exception as error:
        failure = error
    fine = all_agree(accelerator, failure is None)
    if not fine and accelerator.is_main_process:
        shutil.rmtree(staged, ignore_errors=True)
    if failure is not None:
        trouble = disk_trouble(failure, folder.root, 0)
        if trouble is None:
            raise failure
        raise RunFailure(
            "disk",
            1,
            f"{folder.final} could not be written: {trouble}. Make room and start the same command again: it continues "
            "from the last checkpoint",
        ) from failure


def sample(path: Path, seed: int, device: torch.device) -> str:
    """Text that the model in a folder writes from the start of a document; the same for the same seed and device.

    Draws from generators of its own: the run's random state is left as it was.
    """
    model = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    start = torch.tensor([[tokenizer.eos_token_id]], device=device)
    positions = getattr(model.config, "max_position_embeddings", _SAMPLE_TOKENS + 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=min(_SAMPLE_TOKENS, positions - 1),
            do_sample=True,
            temperature=_TEMPERATURE,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(tokens[0, 1:], skip_special_tokens=True))


def compare(val_loss: float, expect: ExpectConfig) -> str:
    """One line: the validation loss, and whether it is what the recipe says it should be. Never fatal."""
    line = f"validation loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 700.0)):.2f}"
    if expect.val_loss is None:
        return line + (f" (not compared: {expect.source})" if expect.source else "")
    difference = val_loss - expect.val_loss
    source = f" ({expect.source})" if expect.source else ""
    where = "within" if abs(difference) <= expect.tolerance else "NOT within"
    return (
        f"{line}: {where} the expected {expect.val_loss:.4f} +- {expect.tolerance:g}{source}, "
        f"difference {difference:+.4f}"
    )
