"""Read the folder of a done, running or killed run, and collect warnings about it."""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from leanstep._files import parse_json, read_text
from leanstep.recipes.training.folder import is_held

_SHOWN_WARNINGS, _SHOWN_SPIKES = 8, 20
LOG_LIMIT = 1 << 30  # bytes of log.jsonl and train.log
_WORD = 200  # characters of a name or state
LARGEST = 1e100  # of a number that is shown; larger ones overflow in charts


@dataclass
class Run:
    """Content of the files of one run; empty for a missing file.

    ``train``, ``evals`` and ``spike_entries`` are the entries of log.jsonl of kind "train", "eval" and "spike";
    ``problems`` are warnings to print.
    """

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    spike_entries: list[dict[str, Any]] = field(default_factory=list)
    sample: str | None = None
    status: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    problems: list[str] = field(default_factory=list)
    optimizer_report: list[dict[str, Any]] = field(default_factory=list)
    sparsity_report: dict[str, Any] = field(default_factory=dict)
    attention_report: list[dict[str, Any]] = field(default_factory=list)
    gate_report: list[dict[str, Any]] = field(default_factory=list)
    held: bool = False

    @property
    def state(self) -> str:
        """``done``, ``running``, ``interrupted``, ``crashed``, ``failed:<reason>``, or ``unknown``.

        ``crashed``: status.json says ``running``, but no process holds the lock of the folder.
        """
        word = str(self.status.get("status", "unknown"))[:_WORD]
        return "crashed" if word == "running" and not self.held else word

    @property
    def final_eval(self) -> dict[str, Any]:
        """The last evaluation, or an empty dict."""
        return self.evals[-1] if self.evals else {}

    def column(self, key: str, rows: str = "train") -> list[float | None]:
        """The values of ``key``, one per line of the log; None where it is missing or not a number."""
        return [number(row.get(key)) for row in getattr(self, rows)]

    def last(self, key: str) -> float | None:
        """The last value of ``key`` in the training lines."""
        return next((value for value in reversed(self.column(key)) if value is not None), None)

    def median(self, key: str) -> float | None:
        """Median of ``key`` in the training lines."""
        known = [value for value in self.column(key) if value is not None and math.isfinite(value)]
        return median(known) if known else None

    def reported_keys(self, section: str) -> list[str]:
        """Keys of a section of the log, such as "optimizer", in order."""
        rows = (row.get(section) for row in self.train)
        return list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))

    def reported_column(self, section: str, key: str) -> list[float | None]:
        """The values of a section's ``key``, one per line of the log."""
        rows = (row.get(section) for row in self.train)
        return [number(row.get(key)) if isinstance(row, dict) else None for row in rows]

    def spikes(self) -> tuple[int, int, list[int]] | None:
        """(steps skipped, rollbacks, newest steps) of the loss spikes; None without spikes or their counts."""
        content = self.status.get("spikes")
        if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
            return None
        counts = [number(content.get(name)) for name in ("skipped", "rollbacks")]
        steps = [number(step) for step in content["steps"][-_SHOWN_SPIKES:]]
        if not all(value is not None and 0 <= value <= sys.maxsize for value in (*counts, *steps)):
            return None
        skipped, rollbacks = (int(value) for value in counts if value is not None)
        return skipped, rollbacks, [int(step) for step in steps if step is not None]

    def setting(self, path: str) -> Any:
        """The value at a dotted path of the configuration, or None."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def expectation(self) -> tuple[float, float, bool] | None:
        """(expected validation loss, tolerance, met), or None without an expected or measured loss."""
        expected, measured = number(self.setting("expect.val_loss")), number(self.final_eval.get("loss"))
        if expected is None or measured is None or not math.isfinite(expected):
            return None
        tolerance = number(self.setting("expect.tolerance")) or 0.0
        return expected, tolerance, abs(measured - expected) <= tolerance


def number(value: Any) -> float | None:
    """Convert to float, or None. Parses text, since YAML 1.1 readers take ``4e-3`` for text.

    Numbers beyond :data:`LARGEST` become infinite.
    """
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        return None
    try:
        converted = float(value)
    except ValueError:
        return None
    except OverflowError:
        # only of whole numbers
        converted = -math.inf if isinstance(value, int) and value < 0 else math.inf
    return converted if abs(converted) <= LARGEST or converted != converted else math.copysign(math.inf, converted)


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted keys with text values."""
    if isinstance(values, dict) and values:
        flattened = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items()]
        return {key: text for pairs in flattened for key, text in pairs.items()}
    if values is None or isinstance(values, (bool, float)):
        return {prefix: f"{values:g}" if isinstance(values, float) else json.dumps(values)}
    return {prefix: ", ".join(map(str, values)) if isinstance(values, list) else str(values)}


def duration(seconds: float | None) -> str:
    """Format seconds: 42.0 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def read_run(folder: Path) -> Run:
    """Read the folder of a run. Raises ValueError for a folder without log.jsonl and config.yaml."""
    run = read_files(folder)
    run.command = _text(run, "command.txt", needed=False).strip()
    run.env = _json(run, "env.json")
    run.optimizer_report, run.attention_report, run.gate_report = (
        [row for row in _json(run, name, needed=False, kind=list) if isinstance(row, dict)]
        for name in ("optimizer_report.json", "attention_report.json", "gate_report.json")
    )
    run.sparsity_report = _json(run, "sparsity_report.json", needed=False)
    read_log(run, _text(run, "log.jsonl"))
    run.problems = [*_judge(run), *run.problems]
    return run


def read_files(folder: Path) -> Run:
    """Read the settings and the state of a run, but not its log. Raises ValueError as :func:`read_run` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"'{folder}' is not a folder; expected a run folder with log.jsonl and config.yaml")
    if not (folder / "log.jsonl").is_file() and not (folder / "config.yaml").is_file():
        raise ValueError(f"'{folder}' is not a run folder: it has neither log.jsonl nor config.yaml")
    run = Run(folder, folder.resolve().name)
    run.config_text = _text(run, "config.yaml")
    run.config = _yaml(run)
    run.name = str(run.config.get("name") or run.name)[:_WORD]
    run.status = _json(run, "status.json")
    run.held = is_held(folder)
    return run


def _text(run: Run, name: str, *, needed: bool = True) -> str:
    try:
        return read_text(run.folder / name, LOG_LIMIT, errors="replace")
    except FileNotFoundError:
        if needed:
            run.problems.append(f"{name} is missing")
    except OSError as error:
        run.problems.append(f"{name} cannot be read: {error.strerror}")
    return ""


def _yaml(run: Run) -> dict[str, Any]:
    try:
        from leanstep.recipes.config.values import read_document
    except ImportError:
        run.problems.append("config.yaml is shown as it is: reading it needs pip install 'leanstep[recipes]'")
        return {}
    document = read_document(run.config_text)
    if document.problems:
        line, problem = document.problems[0]
        run.problems.append(f"config.yaml cannot be understood: line {line}: {problem}"[:300])
    return document.value if isinstance(document.value, dict) else {}


def _json(run: Run, name: str, *, needed: bool = True, kind: type = dict) -> Any:
    text = _text(run, name, needed=needed)
    try:
        content = parse_json(text) if text else kind()
    except ValueError:
        run.problems.append(f"{name} cannot be understood")
        content = kind()
    return content if isinstance(content, kind) else kind()


def read_log(run: Run, text: str) -> None:
    """Add lines of log.jsonl to a run; lines that cannot be read are counted in its ``problems``."""
    unreadable = 0
    rows_of = {"train": run.train, "eval": run.evals, "spike": run.spike_entries}
    for line in text.splitlines():
        try:
            entry = parse_json(line)
            kind = entry["kind"]
            step = number(entry.get("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += bool(line.strip())
            continue
        if kind == "sample":
            run.sample = str(entry.get("text", ""))
        elif step is None or not 0 <= step <= sys.maxsize:
            unreadable += 1
        elif isinstance(kind, str) and kind in rows_of:
            rows_of[kind].append({**entry, "step": int(step)})
    if unreadable:
        run.problems.append(
            f"{_count(unreadable, 'line')} of log.jsonl could not be read and {_is(unreadable)} left out"
        )


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _is(amount: int) -> str:
    return "is" if amount == 1 else "are"


def _judge(run: Run) -> list[str]:
    notes = []
    steps, step = (str(run.status.get(key))[:_WORD] for key in ("steps", "step"))
    if run.state.startswith("failed"):
        notes.append(f"The run failed ({run.state.partition(':')[2] or 'no reason given'}) at step {step} of {steps}.")
    elif run.state == "crashed":
        notes.append(
            f"The run is not done: status.json says that it is running, but no process holds the folder. It was killed "
            f"after step {step} of {steps}; the same command continues it."
        )
    elif run.state != "done":
        notes.append(f"The run is not done ({run.state}): step {step} of {steps}.")
    if (run.folder / "nan_dump").is_dir():
        notes.append("The batch that went wrong is in the run's folder nan_dump.")
    if math.isfinite(skipped := run.last("nonfinite") or 0.0) and skipped >= 1:
        notes.append(f"{_count(int(skipped), 'step')} with a loss or gradient that was not finite.")
    if spikes := run.spikes():
        steps = ", ".join(f"{step:,}" for step in spikes[2])
        notes.append(
            f"Loss spikes: {_count(spikes[0], 'step')} skipped, {_count(spikes[1], 'rollback')} (newest at {steps})."
        )
    if broken := sum(1 for value in run.column("loss") if value is None or not math.isfinite(value)):
        notes.append(f"The training loss is not finite in {_count(broken, 'logged step')}.")
    if (met := run.expectation()) and not met[2]:
        loss = number(run.final_eval["loss"])
        notes.append(f"The validation loss {loss:.4f} is not the expected {met[0]:g} ± {met[1]:g}.")
    losses = [(value, row["step"]) for value, row in zip(run.column("loss", "evals"), run.evals, strict=True) if value]
    # NaN has no order
    best, at = min((pair for pair in losses if math.isfinite(pair[0])), default=(math.inf, 0))
    if losses and losses[-1][0] > 1.02 * best:
        notes.append(f"The validation loss rose from {best:.4f} at step {at} to {losses[-1][0]:.4f}.")
    lines = [line.strip() for line in _text(run, "train.log", needed=False).splitlines() if "WARNING" in line]
    different = list(dict.fromkeys(lines))
    notes += [line[:300] for line in different[:_SHOWN_WARNINGS]]
    if len(different) > _SHOWN_WARNINGS:
        notes.append(f"{_count(len(different) - _SHOWN_WARNINGS, 'more warning')} in train.log.")
    return notes
