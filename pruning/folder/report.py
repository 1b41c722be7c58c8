"""report.html of a pruned checkpoint: the sparsity of each matrix, its curve, and the cost. No script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from leanstep._files import model_name
from leanstep._pages.charts import COLORS, Series, chart, compact, heat_map
from leanstep._pages.page import render
from leanstep.pruning.allocate.budgets import UNITS
from leanstep.pruning.score.targets import role_of

_MOST_LINES = COLORS
_MOST_CHARTS = 12
_MOST_ROWS = 1000
_PERPLEXITIES = (
    ("before", "Perplexity before"),
    ("after", "Perplexity after"),
    ("recovered", "Perplexity recovered"),
)
_ERROR = "; ± is the standard error"
TASKS = ("Task", "Metric", "Questions", "Before", "After")
ZEROS_ALONE = (
    "File size and speed are those of the dense model: zeros alone make neither PyTorch nor vLLM faster. "
    "leanstep export stores the folder without its zeros, to run it in less memory on a CPU. 2:4 patterns can use "
    "sparse tensor cores."
)


def report_page(content: Mapping[str, Any]) -> str:
    """The whole page, as text; values are escaped.

    Args:
        content: content of sparsity.json, that is :meth:`leanstep.pruning.PruneResult.to_dict` and facts of the
            checkpoint. ``curves``, ``compared``, ``perplexity`` and ``notes`` are optional.
    """
    unit = _unit(content["layers"])
    rows = [
        [row["name"], "x".join(map(str, row["shape"])), f"{row[unit.key]:.4f}", row.get("pattern") or "-"]
        for row in content["layers"]
    ]
    return render(
        Path(__file__).parent / "templates" / "pruned.html",
        title=_title(content),
        lead=_lead(content),
        numbers=_numbers(content),
        remarks=[
            *content.get("notes", ()),
            *(content.get("recovery") or {}).get("notes", ()),
            *([ZEROS_ALONE] if unit.key == "sparsity" else []),
        ],
        tasks={"header": TASKS, "rows": task_rows(content.get("tasks") or ())},
        refinement=_refinement(content),
        refinement_chart=_refinement_chart(content),
        reconstruction=_reconstruction(content),
        recovery=_recovery(content),
        recovery_chart=_recovery_chart(content),
        allocation=_allocation_charts(content["layers"]) + _trade_off(content),
        comparison=[_compared(one, content["allocation"]["method"]) for one in content.get("compared") or ()],
        curves=_curve_charts(content) if content.get("curves") else "",
        matrices={
            "header": ["Matrix", "Shape", unit.title, "Format" if unit.key == "bits" else "N:M"],
            "rows": rows[:_MOST_ROWS],
            "left_out": max(len(rows) - _MOST_ROWS, 0),
        },
    )


def card_facts(content: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Title and table of the model's card: how it was made, and the numbers of the page."""
    numbers = {label: f"{value} ({note})" for label, value, note in _numbers(content)}
    tasks = {f"{row[0]} ({row[1]})": f"{row[4]} ({row[3]} before)" for row in task_rows(content.get("tasks") or ())}
    if speed := content.get("speed"):
        of = "decoded weights, in torch" if _unit(content["layers"]).key == "bits" else "in torch"
        numbers["Speed of reading"] = f"{compact(speed['per_second'])} {speed['unit']}/s on {speed['machine']} ({of})"
    return _title(content), {"How": _lead(content), **numbers, **tasks}


def _title(content: Mapping[str, Any]) -> str:
    name = model_name(content.get("source") or "model")
    if _unit(content["layers"]).key == "bits":
        return f"{name} compressed to {_bits(content)} bits per weight"
    return f"{name} pruned to {content['sparsity']:.2%} zeros"


class _Unit(NamedTuple):
    """By what rows of matrices differ: the key of a row, its name, and its text."""

    key: str
    title: str
    text: Callable[[float], str]

    def of(self, curve: Mapping[str, Any], numel: int) -> list[float]:
        """Of the levels of a curve of a matrix with some weights."""
        if self.key == "bits":
            return [8 * count / numel for count in curve["counts"]]
        return [1 - count / curve["numel"] for count in curve["counts"]]


def _unit(layers: Sequence[Mapping[str, Any]]) -> _Unit:
    if any("bits" in row for row in layers):
        return _Unit("bits", "Bits per weight", "{:.2f}".format)
    return _Unit("sparsity", "Sparsity", "{:.3f}".format)


def _bits(content: Mapping[str, Any]) -> str:
    weights = sum(row["numel"] for row in content["layers"])
    return f"{8 * content['budget']['after'] / weights:.2f}"


def _trade_off(content: Mapping[str, Any]) -> str:
    """Bytes against summed distortion: dynamic programming, and the formats that all matrices can have."""
    # a uniform allocation that was ahead on held-out data has no front
    if _unit(content["layers"]).key != "bits" or not content["allocation"]["front"]:
        return ""
    curves = content["curves"]
    costs, sums = map(list, zip(*content["allocation"]["front"], strict=True))
    front = Series("dynamic programming", costs, sums, color=0)
    levels = [
        dict(zip(c["patterns"], zip(c["counts"], c["distortion"], strict=True), strict=True)) for c in curves.values()
    ]
    shared = [name for name in levels[0] if all(name in level for level in levels)][1:]
    sizes, distortions = ([sum(level[name][part] for level in levels) for name in shared] for part in (0, 1))
    uniform = Series(f"all matrices as {', '.join(shared)}", sizes, distortions, color=1, dots=True)
    series = [front, uniform] if shared else [front]
    title = "Summed distortion of the curves over bytes of the matrices"
    return chart(series, title=title, x_label="bytes", log_y=True, wide=True)


def _lead(content: Mapping[str, Any]) -> str:
    facts = [f"{name} {content[name]}" for name in ("score", "pattern", "metric")]
    facts.insert(0, f"allocation {content['allocation']['method']}")
    if _unit(content["layers"]).key == "bits":
        del facts[2]  # of zeros
    elif content.get("inputs"):
        facts.append(f"inputs {content['inputs']}")
    sources = sorted({curve.get("source", "measured") for curve in (content.get("curves") or {}).values()})
    if sources:
        facts.append(f"curves {', '.join(sources)}")
    if content.get("calibration_text"):
        facts.append(f"calibration {content['calibration_text']}")
    return " · ".join(facts)


def _numbers(content: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    numbers = [("Sparsity", f"{content['sparsity']:.4f}", "of the matrices")]
    if _unit(content["layers"]).key == "bits":
        numbers = [("Bits per weight", _bits(content), "of the matrices")]
    budget = content.get("budget") or {}
    if budget:
        note = f"of {compact(budget['before'])} before; the budget: {compact(budget['target'])} at most"
        numbers.append((UNITS[budget["kind"]].capitalize(), compact(budget["after"]), note))
    perplexity = content.get("perplexity") or {}
    for name, label in _PERPLEXITIES:
        if perplexity.get(name) is not None:
            error = _plus_minus(perplexity, name)
            note = f"over {compact(perplexity.get('tokens') or 0)} targets" + (_ERROR if error else "")
            numbers.append((label, f"{perplexity[name]:.2f}{error}", note))
    quality = content.get("quality") or {}
    for name, measure in (quality.get("after") or {}).items():
        before = (quality.get("before") or {}).get(name)
        note = f"{quality['samples']} samples" + ("" if before is None else f"; {compact(before['mean'])} before")
        numbers.append((f"{name[0].upper()}{name[1:]} after", compact(measure["mean"]), note))
    held_out = content.get("held_out") or {}
    if held_out.get("joint") is not None:
        error = _plus_minus(held_out)
        note = "measured, held-out data" + (_ERROR if error else "")
        numbers.append((f"Distortion ({content['metric']})", compact(held_out["joint"]) + error, note))
    predicted = content["allocation"].get("predicted")
    if predicted is not None:
        numbers.append(("Predicted", compact(predicted), "sum of the curves, calibration data"))
    if held_out.get("ratio") is not None:
        numbers.append(("Additivity ratio", f"{held_out['ratio']:.2f}", "joint over summed; 1: distortions add up"))
    return numbers


def _plus_minus(one: Mapping[str, Any], name: str = "joint") -> str:
    error = one.get(f"{name}_stderr")
    return "" if error is None else f" ± {compact(error)}"


def _compared(one: Mapping[str, Any], applied: str) -> list[str]:
    """Table row of an allocation that was measured on held-out data."""
    ratio = "-" if one.get("ratio") is None else f"{one['ratio']:.3f}"
    mark = " (applied)" if one["method"] == applied else ""
    return [one["method"] + mark, _number(one["joint"]) + _plus_minus(one), _number(one["summed"]), ratio]


def task_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Table rows of tasks, with standard errors over the questions."""

    def text(one: Mapping[str, Any]) -> str:
        return f"{one['value']:.4f}" + ("" if one["stderr"] is None else f" ± {one['stderr']:.4f}")

    return [
        (one["task"], one["metric"], f"{one['questions']:,}", text(one), text(row["after"]))
        for row in rows
        for one in [row["before"]]
    ]


def _number(value: float | None) -> str:
    """A number in few characters; "-" for one that is not finite, of a model that overflows."""
    return "-" if value is None else compact(value)


def _refinement(content: Mapping[str, Any]) -> str:
    """What the search on joint distortion did, in one sentence; "" without it."""
    search = content.get("refinement") or {}
    if not search:
        return ""
    start, end = search.get("start", search["points"][0][2]), search["points"][-1][2]
    return (
        f"{search['accepted']} of {search['evaluations']} exchanges between matrices were better by more than their "
        f"noise. Joint distortion on the judging data: {_number(start)} at the start, {_number(end)} at the end, where "
        "all matrices are pruned anew on the inputs that the allocation gives."
    )


def _refinement_chart(content: Mapping[str, Any]) -> str:
    """Joint distortion of the search over its evaluations: steps down at the accepted exchanges."""
    search = content.get("refinement") or {}
    if not search:
        return ""
    points = [point for point in search["points"] if point[2] is not None]
    evaluations, distortion = [point[0] for point in points], [point[2] for point in points]
    x = [
        position
        for step in zip(evaluations, [*evaluations[1:], search["evaluations"]], strict=True)
        for position in step
    ]
    series = Series("joint distortion", x, [value for value in distortion for _ in range(2)])
    return chart([series], title="Joint distortion of the search", x_label="exchanges judged", wide=True)


def _reconstruction(content: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the trained blocks, and of the model; none without reconstruction."""
    reconstruction = content.get("reconstruction") or {}
    rows = [
        [block["name"], _number(block["before"]), _number(block["after"]), "yes" if block["applied"] else "no"]
        for block in reconstruction.get("blocks", ())
    ]
    if held_out := reconstruction.get("held_out"):
        before, name = (content.get("held_out") or {}).get("joint"), f"all, {content['metric']} on held-out data"
        rows.append([name, _number(before), _number(held_out["mean"]), ""])
    return rows


def _recovery(content: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of the dense, the pruned and the recovered model; none without recovery."""
    recovery, perplexity = content.get("recovery") or {}, content.get("perplexity") or {}
    if not recovery:
        return []
    rows = []
    for name, loss, key in (
        ("dense", None, "before"),
        ("pruned", "before", "after"),
        ("recovered", "after", "recovered"),
    ):
        cost = recovery.get(loss) if loss else None
        error = "" if not cost or cost["stderr"] is None else f" ± {compact(cost['stderr'])}"
        mark = "" if name != "recovered" or recovery["applied"] else " (not applied)"
        number = "-" if perplexity.get(key) is None else f"{perplexity[key]:.2f}"
        rows.append([name + mark, "-" if not cost else f"{recovery['metric']} {compact(cost['mean'])}{error}", number])
    return rows


def _recovery_chart(content: Mapping[str, Any]) -> str:
    losses = (content.get("recovery") or {}).get("losses") or []
    if not losses:
        return ""
    series = Series("training loss", list(range(1, len(losses) + 1)), losses, color=0)
    return chart([series], title="Training loss of recovery", x_label="step", wide=True)


def _allocation_charts(layers: Sequence[Mapping[str, Any]]) -> str:
    """Sparsity or bits over depth: a map of all matrices, and a line for each kind of them."""
    unit = _unit(layers)
    cells = [(role_of(row["name"]), row["block"], row[unit.key]) for row in layers if row.get("block") is not None]
    shades = heat_map(cells, title=f"{unit.title} of each matrix", x_label="block", text=unit.text)
    roles: dict[str, list[tuple[float, float]]] = {}
    for index, layer in enumerate(layers):
        depth = layer.get("block")
        roles.setdefault(role_of(layer["name"]), []).append((index if depth is None else depth, layer[unit.key]))
    if len(roles) > _MOST_LINES:  # without blocks, every name is a kind of its own
        roles = {"all matrices": [(index, layer[unit.key]) for index, layer in enumerate(layers)]}
    series = [
        Series(role, [x for x, _ in points], [y for _, y in points], color=number, dots=True)
        for number, (role, points) in enumerate(roles.items())
    ]
    return shades + chart(series, title=f"{unit.title} over depth", x_label="block", wide=True, y_format=unit.text)


def _curve_charts(content: Mapping[str, Any]) -> str:
    unit, sizes = _unit(content["layers"]), {layer["name"]: layer["numel"] for layer in content["layers"]}
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
            levels = unit.of(curve, sizes.get(curve["name"], curve["numel"]))
            series.append(Series(label, levels[1:], curve["distortion"][1:], color=number, dots=True))
        drawn.append(chart(series, title=role, x_label=unit.title.lower(), log_y=True))
    return "".join(drawn)
