"""Perplexity of a small language model pruned by every allocation and score, at several sparsities, one command.

    leanstep train llama-nano-sinkgd
    python benchmarks pruning/quality --model runs/llama-nano-sinkgd/final --out runs/prune-quality

Calibration sequences are drawn from the older addresses of the State of the Union text, anew with every seed;
perplexity is measured on sequences of the newest ones, the same for all, which neither model nor calibration has seen.
Curves are measured once for each score and seed and serve all sparsities. DP is what the curves say, without the
comparison with uniform sparsity that ``leanstep prune`` makes; ``--allocations relinearised`` measures them again
around the model that they prune. Results are stored in the output folder: an interrupted call goes on, and folders of
other weights or settings are refused. Prints two markdown tables; ``--plot FILE`` draws the first.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from common import append_json_line, command_line, print_table, pyplot, read_json_lines, save_svg

from leanstep.pruning import measure_curves, prune
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.loading import begin_tokens, load_model
from leanstep.pruning.folder.text import token_sequences
from leanstep.pruning.measure.batches import as_batches, evaluating
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import cross_entropy_sums, summarise
from leanstep.pruning.score.targets import WeightSnapshot, find_targets

# DP on curves that are measured again around the pruned model, twice: as slow as all others, so only if asked for
RELINEARISED = "relinearised"
ALLOCATIONS = {"uniform": "uniform", "global": "global", "lamp": "LAMP", "erk": "ERK", "owl": "OWL", "atp": "ATP",
               "dp": "DP", RELINEARISED: "DP, relinearised"}  # fmt: skip
SCORES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", "alps": "ALPS"}
# sparsities of the curves' levels, for all targets
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
COLOURS = ("#7a828e", "#d9660b", "#0b8a6a", "#b3246f", "#6b46c8", "#a8860b", "#2457d6", "#222222")
DENSE, SETTINGS = ("dense",), ("settings",)
PARSER = command_line(
    __doc__, model=Path("runs/llama-nano-sinkgd/final"), out=Path("runs/prune-quality"), seeds=[0, 1, 2],
    sparsities=[0.5, 0.6, 0.7, 0.8], samples=(32, "calibration sequences"), seq_len=256,
    curve_samples=(8, "calibration sequences for the curves"), eval_samples=(48, "held-out sequences"),
)  # fmt: skip
PARSER.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS)[:-1], choices=ALLOCATIONS)
PARSER.add_argument("--scores", nargs="+", default=list(SCORES)[:-1], choices=SCORES)
PARSER.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as an SVG")
Cell = tuple[Any, ...]  # (seed, score, allocation, sparsity), or one of DENSE and SETTINGS


class Bench:
    """A model, its data, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        from leanstep.recipes.data.sources import sotu_corpus, split_newest

        self.options, self.file = options, options.out / "results.jsonl"
        self.results: dict[Cell, dict[str, Any]] = {tuple(row["cell"]): row for row in read_json_lines(self.file)}
        checkpoint = open_checkpoint(options.model)
        self.model: Any = load_model(checkpoint)
        settings = {"weights": weights_hash(self.model), "samples": options.samples, "curves": options.curve_samples}
        settings |= {"held out": options.eval_samples, "tokens": options.seq_len}
        if not self.results:
            self.record(SETTINGS, **settings)
        if self.results.get(SETTINGS) != {"cell": list(SETTINGS), **settings}:
            raise SystemExit(f"{self.file} is of another model or other settings: give another --out")
        self.snapshot = WeightSnapshot(find_targets(self.model))
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
        self.older, newest = split_newest(tuple(sotu_corpus().documents()))
        self.held_out = as_batches(self.sequences(newest, options.eval_samples, seed=0), self.model)
        self.measurement = Measurement(self.model, self.held_out)

    def sequences(self, documents: tuple[str, ...], count: int, seed: int) -> torch.Tensor:
        """Token sequences that a seed draws from documents."""

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        begin, end = begin_tokens(self.tokenizer), self.tokenizer.eos_token_id
        return token_sequences(encode, documents, count, self.options.seq_len, begin=begin, end=end, seed=seed)

    def record(self, cell: Cell, **values: Any) -> None:
        """Keep a result, in the file too."""
        self.results[cell] = {"cell": list(cell), **values}
        append_json_line(self.file, self.results[cell])

    def cost(self) -> dict[str, float]:
        """Perplexity and distortion on the held-out sequences, with the present weights."""
        losses, distortions = [], []
        with evaluating(self.model):
            for reference, batch in zip(self.measurement.reference, self.held_out, strict=True):
                output = batch.run(self.model)
                losses.append(cross_entropy_sums(output, batch))
                distortions.append(self.measurement.metric.compare(reference, output, batch))
        return {"perplexity": math.exp(summarise(losses).mean), "joint": summarise(distortions).mean}

    def run(self) -> None:
        """Measure every missing cell."""
        options = self.options
        if DENSE not in self.results:
            self.record(DENSE, **self.cost())
        for seed, score in itertools.product(options.seeds, options.scores):
            cells = [(seed, score, allocation, s) for s in options.sparsities for allocation in options.allocations]
            missing = [cell for cell in cells if cell not in self.results]
            if missing:
                # a tenth of the older texts is enough to draw from, and quick to tokenise
                self.measure(missing, self.sequences(self.older[seed % 10 :: 10], options.samples, seed))

    def measure(self, cells: list[Cell], data: torch.Tensor) -> None:
        """Measure cells of one seed and score."""
        seed, score, *_ = cells[0]
        curve_data = data[: self.options.curve_samples]
        curves = None
        if any(allocation in ("dp", RELINEARISED) for _, _, allocation, _ in cells):
            resume = self.options.out / f"curves-{score}-{seed}.jsonl"
            curves = measure_curves(self.model, curve_data, score_data=data, resume=resume, score=score, levels=LEVELS)
        for cell in cells:
            *_, allocation, sparsity = cell
            again = allocation == RELINEARISED
            by_curves = again or allocation == "dp"
            with self.snapshot.restored():
                result = prune(
                    self.model,
                    data,
                    sparsity=sparsity,
                    allocation="dp" if again else allocation,
                    curves=curves if by_curves else None,
                    levels=LEVELS if by_curves else None,
                    correction="relinearise" if again else "none",
                    curve_data=curve_data,
                    held_out=False,
                    score=score,
                )
                self.record(cell, sparsity=result.sparsity, predicted=result.allocation.predicted, **self.cost())
            print(*cell, f"perplexity {self.results[cell]['perplexity']:.2f}", flush=True)

    def values(self, score: str, allocation: str, sparsity: float, key: str = "perplexity") -> list[float]:
        """One value per seed."""
        return [self.results[seed, score, allocation, sparsity][key] for seed in self.options.seeds]

    def print_tables(self) -> None:
        """Perplexity by score, sparsity and allocation; and how far DP's distortions add up."""
        options, rows, wins = self.options, [], 0
        for score, sparsity in itertools.product(options.scores, options.sparsities):
            values = {name: self.values(score, name, sparsity) for name in options.allocations}
            best = min(values, key=lambda name: statistics.mean(values[name]))
            wins += best == "dp"
            cells = (f"**{mean_and_spread(v)}**" if name == best else mean_and_spread(v) for name, v in values.items())
            rows.append([f"{SCORES[score]} {sparsity:.0%}", *cells])
        print_table(["", *(ALLOCATIONS[name] for name in options.allocations)], rows)
        print(
            f"\ndense perplexity {self.results[DENSE]['perplexity']:.2f}; mean ± standard deviation over "
            f"{len(options.seeds)} calibration seeds; DP is best in {wins} of {len(rows)} cells"
        )
        if "dp" in options.allocations:
            print()
            ratios = ([SCORES[score], *(self.ratio(score, s) for s in options.sparsities)] for score in options.scores)
            print_table(["joint / summed, DP", *(f"{sparsity:.0%}" for sparsity in options.sparsities)], ratios)

    def ratio(self, score: str, sparsity: float) -> str:
        """Distortion of all layers together over the sum that DP minimized, mean of the seeds."""
        joint, summed = (self.values(score, "dp", sparsity, key) for key in ("joint", "predicted"))
        return f"{statistics.mean(a / b for a, b in zip(joint, summed, strict=True)):.2f}"

    def plot(self, path: Path) -> None:
        """Perplexity over sparsity, a panel for each score."""
        options = self.options
        figure, panels = pyplot().subplots(1, len(options.scores), figsize=(11, 3.6), sharey=True, squeeze=False)
        colours = dict(zip(ALLOCATIONS, COLOURS, strict=True))
        for panel, score in zip(panels[0], options.scores, strict=True):
            for name in options.allocations:
                means = [statistics.mean(self.values(score, name, s)) for s in options.sparsities]
                style = {"color": colours[name], "lw": 2.4 if name == "dp" else 1.2, "label": ALLOCATIONS[name]}
                panel.plot(options.sparsities, means, "o-", ms=3, **style)
            panel.axhline(self.results[DENSE]["perplexity"], color="#9aa2ae", lw=0.8, ls=":")
            panel.set(title=SCORES[score], xlabel="sparsity", yscale="log")
        panels[0][0].set_ylabel("perplexity")
        panels[0][0].legend(frameon=False, fontsize=8)
        save_svg(figure, path)


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation; two digits of numbers beyond a million."""
    mean = statistics.mean(values)
    digits = ".1e" if mean >= 1e6 else ".0f" if mean >= 1000 else ".1f"
    spread = format(statistics.stdev(values) if len(values) > 1 else 0.0, digits)
    return format(mean, digits) + (f" ± {spread}" if float(spread) else "")


def main() -> None:
    """Measure, and print the table."""
    bench = Bench(PARSER.parse_args())
    bench.run()
    print()
    bench.print_tables()
    if bench.options.plot:
        bench.plot(bench.options.plot)
