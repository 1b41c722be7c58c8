"""Ways to choose codes on one grid: to nearest, GPTQ, and searches of single steps after them.

    leanstep train llama-nano-sinkgd
    python benchmarks pruning/rounding --out runs/rounding.jsonl
    python benchmarks pruning/rounding --report docs/results/rounding-nano.jsonl [--write]

ggml chooses the scales of every matrix of the blocks, with the importance of its inputs. The codes are those of ggml,
those of GPTQ, and those that a search ends with: one step up or down of one weight of a row at a time, as long as it
lowers the sum of squared errors of the row's outputs, or their largest error (the objective of discrete min-max
violation, arXiv 2508.13437; the search is our own, simpler one). All see the dense model's inputs on ``--samples``
sequences of the older addresses of the State of the Union text, the largest error ``--rows`` of them, drawn anew with
every seed. KL divergence to the dense model and perplexity are those on sequences of the newest addresses. Differences
are paired by seed, with Student's interval.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, machines, read_json_lines
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report
from torch import Tensor

PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), seeds=[0, 1, 2], types=["Q4_0", "IQ4_NL", "Q5_0"],
    samples=(32, "calibration sequences"), rows=(2048, "tokens whose largest error counts"),
    steps=(1000, "most steps of a row"), eval_samples=(16, "held-out sequences"), seq_len=256,
    out=Path("runs/rounding.jsonl"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("samples", "rows", "steps", "eval_samples", "seq_len")
METHODS = {
    "nearest": "ggml's rounding", "nearest-largest": "ggml's, then steps by the largest error", "gptq": "GPTQ",
    "gptq-largest": "GPTQ, then steps by the largest error", "gptq-squares": "GPTQ, then steps by squared errors",
}  # fmt: skip
BASELINE = "gptq"
# weights of a row whose step is tried at once: those that lower its largest error most
_TRIED = 8


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    from leanstep.pruning import find_targets

    torch.set_num_threads(1)
    text, rows = CalibratedModel(options.model, options.seq_len, options.eval_samples), read_json_lines(options.out)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"name": text.name, "weights": text.weights}
    if not rows:
        append_json_line(options.out, settings)
    elif rows[0] != settings:
        raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
    present = {(row["seed"], row["type"], row["method"]) for row in rows[1:]}
    targets = find_targets(text.model)
    for seed in options.seeds:
        inputs = _inputs(text, text.calibration(options.samples, seed))
        for type in options.types:
            for method in METHODS:
                if (seed, type, method) in present:
                    continue
                begin, largest = time.process_time(), []
                with text.snapshot.restored():
                    for target in targets:
                        weight = text.model.get_parameter(target.parameter)
                        draw = torch.Generator().manual_seed(seed)
                        some = inputs[target.name][torch.randperm(len(inputs[target.name]), generator=draw)]
                        some, before = some[: options.rows], weight.detach()
                        values = rounded_by(method, type, before, inputs[target.name], some, options.steps)
                        errors = some @ (values - before).T
                        largest.append(float(errors.abs().amax(0).mean() / errors.std()))
                        weight.data.copy_(values)
                    row = {"seed": seed, "type": type, "method": method, "largest": statistics.mean(largest)}
                    row |= {"seconds": time.process_time() - begin} | text.cost() | machine_state()
                append_json_line(options.out, row)
                print(row, flush=True)


def _inputs(text: CalibratedModel, data: Tensor) -> dict[str, Tensor]:
    """The dense model's inputs of each matrix, [tokens, in]."""
    from leanstep.pruning import find_targets
    from leanstep.pruning.measure.activation_cache import ActivationCache
    from leanstep.pruning.measure.batches import as_batches, evaluating
    from leanstep.pruning.score.calibration import collect_inputs

    targets = find_targets(text.model)
    pieces: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    with evaluating(text.model):
        cache = ActivationCache(text.model, as_batches(data, text.model, batch_size=8))
        collect_inputs(cache, targets, {name: of_target.append for name, of_target in pieces.items()})
    return {name: torch.cat(of_target) for name, of_target in pieces.items()}


def rounded_by(method: str, type: str, weight: Tensor, inputs: Tensor, some: Tensor, steps: int) -> Tensor:
    """The values of a matrix [out, in] in a type by a method; ``some`` are the inputs whose largest error counts."""
    from leanstep._gguf.ggml import TYPES
    from leanstep.pruning.compress.grids import grid_of
    from leanstep.pruning.compress.rounding import rounded
    from leanstep.pruning.score.sparsegpt import inverse_factor

    start, _, search = method.partition("-")
    gram = inputs.T @ inputs
    factor = inverse_factor(gram, 0.01).to(weight) if start == "gptq" else None
    values, data = rounded(weight, type, gram.diagonal() / len(inputs), factor)
    if not search:
        return values
    grid = grid_of(type)
    if grid is None:
        raise SystemExit(f"{type} has codes of several values together: leave it out of --types")
    low, span = (end.view_as(weight) for end in grid.ends(data.reshape(-1, TYPES[type].size)))
    levels, most = grid.nearest(values, low, span), len(grid.shares) - 1
    find, every = (_Largest(weight, some) if search == "largest" else _Squares(weight, gram)), torch.arange(len(weight))
    for _ in range(steps):
        values = low + span * grid.shares[levels]
        up, down = (low + span * grid.shares[(levels + way).clamp(0, most)] - values for way in (1, -1))
        columns, is_up, gains = find(values, up, down)
        if not bool(gains.any()):
            break
        levels[every[gains], columns[gains]] += torch.where(is_up[gains], 1, -1)
    return low + span * grid.shares[levels]


class _Largest:
    """For each row the step that lowers its largest error most, of those that lower that error itself most.

    Args:
        weight: [out, in], before rounding.
        inputs: [tokens, in].
    """

    def __init__(self, weight: Tensor, inputs: Tensor) -> None:
        self.weight, self.inputs = weight, inputs
        self.errors: Tensor | None = None  # [out, tokens]

    def __call__(self, values: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns [out], whether the step goes up, and whether it gains; ``up`` and ``down`` are changes of values."""
        if self.errors is None:
            self.errors = (values - self.weight) @ self.inputs.T
        largest, token = self.errors.abs().max(dim=1)
        inputs = self.inputs[token] * self.errors.gather(1, token[:, None]).sign()
        is_up = up * inputs < down * inputs
        change = torch.where(is_up, up, down)
        columns = (change * inputs).topk(min(_TRIED, change.shape[1]), largest=False).indices
        tried = self.errors[:, None] + change.gather(1, columns)[..., None] * self.inputs.T[columns]
        new, best = tried.abs().amax(dim=-1).min(dim=1)
        every, gains = torch.arange(len(best)), new < largest * (1 - 1e-6)
        self.errors[gains] = tried[every[gains], best[gains]]
        column = columns[every, best]
        return column, is_up[every, column], gains


class _Squares:
    """For each row the step that lowers the sum of its squared errors most.

    Args:
        weight: [out, in], before rounding.
        gram: of the inputs, [in, in].
    """

    def __init__(self, weight: Tensor, gram: Tensor) -> None:
        self.weight, self.gram = weight, gram

    def __call__(self, values: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`_Largest.__call__`."""
        difference = values - self.weight
        slope, diagonal = difference @ self.gram, self.gram.diagonal()
        after_up, after_down = (change * (2 * slope + change * diagonal) for change in (up, down))
        gain, column = torch.minimum(after_up, after_down).min(dim=1)
        every = torch.arange(len(column))
        return column, (after_up < after_down)[every, column], gain < -1e-6 * (difference * slope).sum(dim=1)


def table(path: Path) -> str:
    """The block of the page: a row for each type and method."""
    settings, *rows = read_json_lines(path)
    lines = []
    for type in dict.fromkeys(row["type"] for row in rows):
        of_method = {
            method: {row["seed"]: row for row in rows if (row["type"], row["method"]) == (type, method)}
            for method in METHODS
        }
        for method, of_seed in of_method.items():
            seeds = sorted(of_seed.keys() & of_method[BASELINE].keys())
            if not seeds:
                continue
            kl, base = ([of_method[name][seed]["kl"] for seed in seeds] for name in (method, BASELINE))
            means = [
                statistics.mean(of_seed[seed][key] for seed in seeds) for key in ("perplexity", "largest", "seconds")
            ]
            lines.append([
                f"{type}, {METHODS[method]}", ", ".join(map(str, seeds)), f"{statistics.mean(kl):.5f}",
                "–" if method == BASELINE else f"{paired_percent(kl, base):+.1f}", f"{means[0]:.2f}", f"{means[1]:.1f}",
                f"{means[2]:.0f}",
            ])  # fmt: skip
    head = ["", "seeds", "KL", "to GPTQ, %", "perplexity", "largest error ÷ rms", "processor s"]
    text = (
        f"`python benchmarks pruning/rounding`, every cell in [{path.name}](../results/{path.name}): "
        f"{settings['name']} (SHA-256 of its weights: {settings['weights'][:8]}), {settings['samples']} x "
        f"{settings['seq_len']} tokens, {settings['rows']} of them for the largest error, at most {settings['steps']} "
        f"steps of a row, {settings['eval_samples']} x {settings['seq_len']} held out; {machines(rows)}."
    )
    return f"{text}\n\n{markdown(head, lines)}"


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
