"""report.html of a pruned checkpoint: how far each matrix was pruned, what that does, and what it cost. No script."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from leanstep._charts import PALETTE, Series, chart, compact
from leanstep._page import style
from leanstep._version import __version__
from leanstep.pruning.allocate.budgets import UNITS

_MOST_LINES = len(PALETTE)
_MOST_CHARTS = 12
_MOST_ROWS = 1000
ZEROS_ALONE = (
    "File size and speed are those of the dense model: zeros alone make neither PyTorch nor vLLM faster. 2:4 patterns "
    "can use sparse tensor cores."
)


def report_page(content: Mapping[str, Any]) -> str:
    """The whole page, as text; values are escaped.

    Args:
        content: what sparsity.json holds (:meth:`leanstep.pruning.PruneResult.to_dict` and the checkpoint's facts):
            ``layers`` and ``allocation``, and where they are known ``curves``, ``compared``, ``perplexity``, ``notes``.
    """
    title = f"{Path(content.get('source') or 'model').name} pruned to {content['sparsity']:.2%} zeros"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(content))}</p>',
        _tiles(content),
        _notes([*content.get("notes", ()), ZEROS_ALONE]),
        "<h2>Allocation</h2>",
        f'<div class="grid">{_allocation_chart(content["layers"])}</div>',
    ]
    if content.get("compared"):
        parts += ["<h2>Cost on held-out data</h2>", _comparison(content)]
    if content.get("curves"):
        parts += ["<h2>Rate-distortion curves</h2>", _CURVES_LEAD, f'<div class="grid">{_curve_charts(content)}</div>']
    parts += ["<h2>Matrices</h2>", _layer_table(content)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{style()}</style></head><body><main>{''.join(parts)}"
        f"<footer>leanstep {escape(__version__)}</footer></main></body></html>\n"
    )


_CURVES_LEAD = (
    '<p class="lead">Distortion of the output when one matrix alone is pruned, as measured. Some blocks of each kind '
    "of matrix; the number is that of the sparsest level.</p>"
)


def _lead(content: Mapping[str, Any]) -> str:
    method = content["allocation"]["method"]
    facts = [
        f"allocation {method}",
        f"score {content['score']}",
        f"pattern {content['pattern']}",
        f"metric {content['metric']}",
        f"calibration {content['calibration_text']}" if content.get("calibration_text") else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _tiles(content: Mapping[str, Any]) -> str:
    shown = [("Sparsity", f"{content['sparsity']:.4f}", "of the pruned matrices")]
    budget = content.get("budget") or {}
    if budget:
        note = f"of {compact(budget['before'])} before; the budget: {compact(budget['target'])} at most"
        shown.append((UNITS[budget["kind"]].capitalize(), compact(budget["after"]), note))
    perplexity = content.get("perplexity") or {}
    for name, label in (("before", "Perplexity before"), ("after", "Perplexity after")):
        if perplexity.get(name) is not None:
            shown.append((label, f"{perplexity[name]:.2f}", f"over {compact(perplexity.get('tokens') or 0)} targets"))
    held_out = content.get("held_out") or {}
    if held_out.get("joint") is not None:
        shown.append((f"Distortion ({content['metric']})", compact(held_out["joint"]), "measured, held-out data"))
    predicted = content["allocation"].get("predicted")
    if predicted is not None:
        shown.append(("Predicted", compact(predicted), "sum of the curves, calibration data"))
    if held_out.get("ratio") is not None:
        shown.append(("Additivity ratio", f"{held_out['ratio']:.2f}", "joint over summed; 1: distortions add up"))
    cells = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
        for name, value, note in shown
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def _notes(notes: Iterable[str]) -> str:
    return f'<ul class="notes warn">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'


def role_of(name: str) -> str:
    """The kind of a matrix within its block: ``q_proj``, ``c_fc``, ``down_proj``."""
    return re.sub(r"\[\d+\]$", "", name).removesuffix(".weight").rpartition(".")[2]


def _allocation_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Sparsity over depth, a line for each kind of matrix."""
    roles: dict[str, list[tuple[float, float]]] = {}
    for place, layer in enumerate(layers):
        depth = layer.get("block")
        roles.setdefault(role_of(layer["name"]), []).append((place if depth is None else depth, layer["sparsity"]))
    if len(roles) > _MOST_LINES:  # of a network without blocks, each name is of its own kind
        roles = {"all matrices": [(place, layer["sparsity"]) for place, layer in enumerate(layers)]}
    series = [
        Series(role, [x for x, _ in points], [y for _, y in points], color=number, dots=True)
        for number, (role, points) in enumerate(roles.items())
    ]
    return chart(
        series, title="Sparsity of each matrix", x_label="block", wide=True, y_format=lambda value: f"{value:.3f}"
    )


def _comparison(content: Mapping[str, Any]) -> str:
    applied = content["allocation"]["method"]
    rows = []
    for one in content["compared"]:
        mark = " (applied)" if one["method"] == applied else ""
        ratio = "-" if one.get("ratio") is None else f"{one['ratio']:.3f}"
        error = one.get("joint_stderr")
        joint = compact(one["joint"]) + (f" ± {compact(error)}" if error is not None else "")
        rows.append([escape(one["method"] + mark), joint, compact(one["summed"]), ratio])
    return _table(["Allocation", "Joint distortion", "Summed distortion", "Joint / summed"], rows)


def _curve_charts(content: Mapping[str, Any]) -> str:
    blocks = {layer["name"]: layer.get("block") for layer in content["layers"]}
    roles: dict[str, list[Mapping[str, Any]]] = {}
    for curve in content["curves"].values():
        name = curve["name"]
        role = name.partition(": ")[2] if name.startswith("block ") else role_of(name)
        roles.setdefault(role, []).append(curve)
    if len(roles) > _MOST_CHARTS:
        roles = {"all": list(content["curves"].values())}
    drawn = []
    for role, curves in roles.items():
        step = math.ceil(len(curves) / _MOST_LINES)
        series = []
        for number, curve in enumerate(curves[::step]):
            block = blocks.get(curve["name"])
            label = curve["name"] if block is None or role == "all" else f"block {block}"
            sparsities = [1 - kept / curve["numel"] for kept in curve["kept"]]
            series.append(Series(label, sparsities[1:], curve["distortion"][1:], color=number, dots=True))
        drawn.append(chart(series, title=role, x_label="sparsity", log_y=True))
    return "".join(drawn)


def _layer_table(content: Mapping[str, Any]) -> str:
    rows = []
    for layer in content["layers"][:_MOST_ROWS]:
        shape = "x".join(map(str, layer["shape"]))
        rows.append([escape(layer["name"]), shape, f"{layer['sparsity']:.4f}", escape(layer.get("pattern") or "-")])
    left = len(content["layers"]) - len(rows)
    more = f'<p class="lead">{left:,} more in sparsity.json</p>' if left else ""
    return _table(["Matrix", "Shape", "Sparsity", "N:M"], rows) + more


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th{' class=n' if place else ''}>{cell}</th>" for place, cell in enumerate(header))
    body = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td class=n>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return f'<div class="card"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
