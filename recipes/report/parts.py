"""The parts of a report that are text and tables; each function returns HTML in which all values are escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from leanstep._charts import PALETTE, compact
from leanstep.recipes.report.runlog import Run, duration, number

__all__ = [
    "attention_table",
    "badge",
    "cut",
    "differences",
    "evaluations",
    "gate_table",
    "lead",
    "notes",
    "optimizer_table",
    "pairs",
    "results",
    "sparsity_tables",
    "tiles",
]


def cut(text: str, most: int) -> str:
    """``text`` escaped, and cut to ``most`` characters."""
    return escape(text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} characters more)")


def badge(run: Run) -> str:
    """The state of a run as a coloured word."""
    kind = {"done": "good", "running": "warn", "interrupted": "warn", "unknown": "warn"}.get(run.state, "bad")
    return f'<span class="badge {kind}">{escape(run.state.replace(":", ": "))}</span>'


def notes(problems: list[str]) -> str:
    """A box with what deserves attention, or nothing."""
    if not problems:
        return ""
    return f'<ul class="notes warn">{"".join(f"<li>{escape(problem)}</li>" for problem in problems)}</ul>'


def lead(run: Run) -> str:
    """The description, and below it in one line what was trained, how, on what, when."""
    optimizer, rate = run.setting("optimizer.name"), run.setting("optimizer.lr")
    facts = [
        f"{parameters:,.0f} parameters" if (parameters := number(run.env.get("parameters"))) else "",
        str(run.setting("model.family") or ""),
        f"{optimizer}, lr {rate}" if optimizer else "",
        f"data {run.setting('data.source')}" if run.setting("data.source") else "",
        f"seed {run.setting('seed')}" if run.setting("seed") is not None else "",
        str(run.env.get("started") or "")[:10],
    ]
    lines = [str(run.config.get("description") or ""), " · ".join(fact for fact in facts if fact)]
    return "<br>".join(escape(line) for line in lines if line)


def tiles(run: Run) -> str:
    """The numbers one looks for first."""
    final = run.final_eval
    loss, per_byte = number(final.get("loss")), number(final.get("bits_per_byte"))
    expected, verdict = run.expectation(), ""
    if expected:
        verdict = f"expected {expected[0]:g} ± {expected[1]:g}: {'met' if expected[2] else 'not met'}"
    elif loss is not None:
        verdict = f"at step {final.get('step')}"
    shown = [("Validation loss", f"{loss:.4f}", verdict)] if loss is not None else []
    if (perplexity := number(final.get("perplexity"))) is not None:
        shown.append(("Perplexity", f"{perplexity:.2f}", f"over {compact(number(final.get('tokens')) or 0)} targets"))
    if per_byte is not None:
        shown.append(("Bits per byte", f"{per_byte:.4f}", "comparable across tokenizers"))
    if (train := run.last("loss")) is not None:
        shown.append(("Training loss", f"{train:.4f}", "last logged step"))
    step, steps = run.status.get("step"), run.status.get("steps")
    if step is not None:
        shown.append(("Steps", f"{step:,}", f"of {steps:,}" if isinstance(steps, int) else ""))
    if (tokens := run.last("tokens")) is not None:
        shown.append(("Tokens", compact(tokens), "targets trained on"))
    if (speed := run.speed()) is not None:
        shown.append(("Tokens per second", compact(speed), "targets, median"))
    if (work := run.median("tflops")) is not None:
        used = run.median("mfu")
        shown.append(("Model TFLOP/s", compact(work), "6N + 12Lhs" if used is None else f"{used:.1%} of the peak"))
    shown.append(("Time", duration(run.last("elapsed_s")), str(run.env.get("device") or "")))
    if (memory := run.last("memory_gib")) is not None:
        shown.append(("Peak memory", f"{memory:.2f} GiB", "on the device"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def pairs(values: dict[str, str]) -> str:
    """A table of names and values."""
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(value[:1000])}</td></tr>" for name, value in values.items())
    return f'<div class="card"><table><tbody>{"".join(rows)}</tbody></table></div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1) -> str:
    """A table of ready HTML cells; columns from ``numeric_from`` on are numbers, set flush right."""
    heads = "".join(f"<th{' class=n' if i >= numeric_from else ''}>{cell}</th>" for i, cell in enumerate(header))
    body = ""
    for row in rows:
        cells = "".join(
            cell if cell.startswith("<td") else f"<td{' class=n' if i >= numeric_from else ''}>{cell}</td>"
            for i, cell in enumerate(row[1:], start=1)
        )
        body += f"<tr><th>{row[0]}</th>{cells}</tr>"
    return f'<div class="card"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def evaluations(run: Run) -> str:
    """A table of the validations, at most 25 of them."""
    shown = run.evals if len(run.evals) <= 25 else run.evals[:: -(-len(run.evals) // 24)]
    if shown[-1] is not run.evals[-1]:
        shown = [*shown, run.evals[-1]]
    keys = (("loss", "{:.4f}"), ("perplexity", "{:.2f}"), ("bits_per_byte", "{:.4f}"), ("tokens", "{:,.0f}"))
    rows = ([escape(str(row["step"])), *(_formatted(row.get(key), pattern) for key, pattern in keys)] for row in shown)
    return _table(["Step", "Loss", "Perplexity", "Bits per byte", "Targets"], rows)


def _formatted(value: Any, pattern: str) -> str:
    known = number(value)
    return "-" if known is None else pattern.format(known)


def results(runs: list[Run]) -> str:
    """A table of runs, best validation loss first."""

    def key(pair: tuple[int, Run]) -> float:
        loss = number(pair[1].final_eval.get("loss"))
        return float("inf") if loss is None or loss != loss else loss

    ordered = sorted(enumerate(runs), key=key)
    best = min((key(pair) for pair in ordered if pair[1].state == "done"), default=None)
    rows = []
    for index, run in ordered:
        loss = _formatted(run.final_eval.get("loss"), "{:.4f}")
        swatch = f'<i style="background:var(--c{index % len(PALETTE)})"></i>'
        rows.append(
            [
                f"{swatch}{escape(run.name)}",
                f"<td>{badge(run)}</td>",
                f"<td>{escape(str(run.setting('optimizer.name') or '-'))}</td>",
                _formatted(run.setting("optimizer.lr"), "{:g}"),
                f'<td class="n{" best" if run.state == "done" and key((index, run)) == best else ""}">{loss}</td>',
                _formatted(run.final_eval.get("perplexity"), "{:.2f}"),
                _formatted(run.final_eval.get("bits_per_byte"), "{:.4f}"),
                _formatted(run.status.get("step"), "{:,.0f}"),
                compact(tokens) if (tokens := run.last("tokens")) is not None else "-",
                compact(speed) if (speed := run.speed()) is not None else "-",
                duration(run.last("elapsed_s")),
            ]
        )
    header = ["Run", "Status", "Optimizer", "lr", "Val loss", "Perplexity", "Bits/byte", "Steps", "Tokens", "Tokens/s"]
    return _table([*header, "Time"], rows, numeric_from=3)


def differences(columns: list[dict[str, str]], runs: list[Run], same: str, *, only_different: bool = True) -> str:
    """A table of the keys whose values differ between runs (all the keys, if asked), one column a run."""
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = []
    for key in keys:
        values = [column.get(key, "-") for column in columns]
        if len(set(values)) > 1 and key not in ("name", "out", "source_file"):
            rows.append([escape(key), *(f"<td>{escape(value[:200])}</td>" for value in values)])
        elif not only_different and key in ("device", "versions.torch", "versions.leanstep", "world"):
            rows.append([escape(key), f"<td colspan={len(runs)}>{escape(values[0][:200])}</td>"])
    if not rows:
        return f'<p class="lead">{same}</p>'
    return _table(["", *(escape(run.name) for run in runs)], rows, numeric_from=99)


def optimizer_table(run: Run, most_text: int) -> str:
    """The rows that the optimizer reported at the end, as many as the page has room for; columns as they came."""
    return _rows_table(run.optimizer_report, most_text, "optimizer_report.json")


def attention_table(run: Run, most_text: int) -> str:
    """Where each head stood at the end: its norms, logits, the degree they need, what it costs, and the verdict."""
    columns = ("layer", "head", "rho", "certified", "sampled", "degree", "error", "cost", "drift", "status", "why")
    rows = [{key: row[key] for key in columns if key in row} for row in run.attention_report]
    return _rows_table(rows, most_text, "attention_report.json")


def gate_table(run: Run, most_text: int) -> str:
    """Which layers' attention ran low-rank at the end, how often, with which errors, and why (not)."""
    columns = ("layer", "low_rank", "calls", "low_rank_calls", "fallbacks", "error", "largest_error", "cost", "reason")
    rows = [{key: row[key] for key in columns if key in row} for row in run.gate_report]
    return _rows_table(rows, most_text, "gate_report.json")


def sparsity_tables(run: Run, most_text: int) -> str:
    """How sparse each layer ended, and what the run cost in operations by the three ways to count them."""
    layers = run.sparsity_report.get("layers")
    rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
    operations = run.sparsity_report.get("operations")
    counted = operations if isinstance(operations, dict) else {}
    dense = number(counted.get("dense"))
    cost = [
        [escape(name), compact(value), "-" if not dense else f"{value / dense:.3f}"]
        for name in counted
        if (value := number(counted[name])) is not None
    ]
    table = _table(["Operations of the run", "FLOP", "of dense"], cost) if cost else ""
    return table + _rows_table(rows, most_text, "sparsity_report.json")


def _rows_table(reported: list[dict[str, Any]], most_text: int, file: str) -> str:
    rows = reported[: max(1, most_text // 120)]
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[escape(_cell(row.get(key, ""))) for key in columns] for row in rows]
    left_out = len(reported) - len(rows)
    more = f'<p class="lead">{left_out:,} more in {file}</p>' if left_out else ""
    return _table([escape(key) for key in columns], cells) + more


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:200]
