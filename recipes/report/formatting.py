"""Format the numbers of a run for a log line and for trackers."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep.recipes.config.differences import flat
from leanstep.recipes.config.values import recorded

if TYPE_CHECKING:
    from leanstep.recipes.config.schema import RunConfig
    from leanstep.recipes.training.checkpoint import TrainState


def format_rate(tokens_per_s: float) -> str:
    """``850 tok/s``, ``12.4k tok/s``, ``1.20M tok/s``."""
    if tokens_per_s >= 1e6:
        return f"{tokens_per_s / 1e6:.2f}M tok/s"
    if tokens_per_s >= 1e3:
        return f"{tokens_per_s / 1e3:.1f}k tok/s"
    return f"{tokens_per_s:.0f} tok/s"


def format_duration(seconds: float) -> str:
    """``0:42``, ``12:40``, ``1:12:40``, ``3d 1:12:40``."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02d}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def format_line(entry: dict[str, Any], steps: int, eta: float | None, notes: list[str]) -> str:
    """Format a ``train`` entry of log.jsonl as one line, with ``notes`` in brackets."""
    parts = [f"step {entry['step']}/{steps}", f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.2e}"]
    if entry.get("grad_norm") is not None:
        parts.append(f"gnorm {entry['grad_norm']:.3f}")
    if entry.get("tokens_per_s"):
        parts.append(format_rate(entry["tokens_per_s"]))
    if entry.get("mfu"):
        parts.append(f"mfu {entry['mfu']:.1%}")
    if entry.get("memory_gib"):
        parts.append(f"mem {entry['memory_gib']:.1f} GiB")
    if entry.get("nonfinite"):
        parts.append(f"nonfinite {entry['nonfinite']}")
    if entry.get("spikes"):
        parts.append(f"spikes {entry['spikes']}")
    if eta is not None:
        parts.append(f"eta {format_duration(eta)}")
    return "  ".join(parts) + "".join(f"  [{note}]" for note in notes)


def format_live(entry: dict[str, Any], steps: int, eta: float | None, notes: list[str]) -> str:
    """Format a ``train`` entry for the line beside the bar, which a narrow terminal cuts at its end."""
    rate = entry.get("tokens_per_s")
    parts = [f"{entry['step']}/{steps}", f"loss {entry['loss']:.4f}"]
    parts += [format_rate(rate)] if rate else []
    parts += [f"eta {format_duration(eta)}"] if eta is not None else []
    return "  ".join([*(f"[{note}]" for note in notes), *parts, f"lr {entry['lr']:.2e}"])


def flat_scalars(tree: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """Flatten nested dicts to dotted keys for trackers; values that are no number, bool or text become text."""
    return {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in flat(tree)
        if value != {}
    }


def card_facts(config: "RunConfig", state: "TrainState", tokens_per_s: float | None, device: str) -> dict[str, str]:
    """What the card of a run's model says: data, length, optimizer, held-out loss, and the last speed of training."""
    data, optimizer = recorded(config)["data"], config.optimizer  # values of the environment are not shown
    names = (data["source"], Path(data["path"]).name if data["path"] else None, data["name"], data["subset"])
    facts = {
        "Data": " ".join(filter(None, names)),
        "Trained": f"{state.step:,} steps, {state.tokens:,} targets",
        "Optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}",
    }
    if config.lora.target_modules:
        bits = f", base in {config.lora.quantize_base}" if config.lora.quantize_base else ""
        facts["Adapters"] = f"rank {config.lora.r} of {', '.join(config.lora.target_modules)}{bits}"
    if state.val_loss is not None:
        perplexity = math.exp(min(state.val_loss, 700.0))
        error = "" if state.val_stderr is None else f" ± {state.val_stderr:.4f} (standard error over the sequences)"
        facts["Held-out loss"] = f"{state.val_loss:.4f}{error} nats per target, perplexity {perplexity:.2f}"
    if tokens_per_s:
        facts["Training speed"] = f"{format_rate(tokens_per_s)} on {device}"
    return facts


def measure_text(measure: dict[str, Any]) -> str:
    """A mean and its standard error, if that is known."""
    return f"{measure['mean']:.4g}" + ("" if measure["stderr"] is None else f" +- {measure['stderr']:.2g}")
