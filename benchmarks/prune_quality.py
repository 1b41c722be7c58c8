"""Perplexity of a small language model pruned by every allocation and score, at several sparsities, one command.

    leanstep train llama-nano-sinkgd
    python benchmarks/prune_quality.py --model runs/llama-nano-sinkgd/final --out runs/prune-quality

Calibration sequences are drawn from the older addresses of the State of the Union text, anew with every seed;
perplexity is measured on sequences of the newest ones, which neither the model nor the calibration has seen, the same
for all. Curves are measured once for each score and seed and serve all sparsities. DP is what the curves say,
without the comparison with uniform sparsity that ``leanstep prune`` makes; ``--allocations relinearised`` measures them
again around the model that they prune. Whatever is measured is kept in the output folder, so an interrupted call goes
on where it stopped; folders of other weights or settings are refused. Prints two markdown tables; ``--plot FILE`` draws
the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from leanstep.pruning import measure_curves, prune
from leanstep.pruning.folder.checkpoint import load_model, open_checkpoint
from leanstep.pruning.measure.batches import as_batches, token_sequences
from leanstep.pruning.measure.measure import Measurement
from leanstep.pruning.measure.metrics import CEDelta, summarise
from leanstep.pruning.measure.snapshot import evaluating, weights_hash
from leanstep.pruning.score.targets import find_targets

SPARSITIES = (0.5, 0.6, 0.7, 0.8)
ALLOCATIONS = ("uniform", "global", "lamp", "erk", "owl", "atp", "dp")
# DP on curves that are measured again around the pruned model, twice: takes as long as all others, so only if asked for
RELINEARISED = "relinearised"
SCORES = ("magnitude", "wanda", "sparsegpt")
# sparsities of the curves' levels, for all targets
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
NAMES = {
    "lamp": "LAMP",
    "erk": "ERK",
    "owl": "OWL",
    "atp": "ATP",
    "dp": "DP",
    RELINEARISED: "DP, relinearised",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
}
COLOURS = ("#7a828e", "#d9660b", "#0b8a6a", "#b3246f", "#6b46c8", "#a8860b", "#2457d6")


class Bench:
    """A model, its data, and what was measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        self.file = options.out / "results.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.results = {tuple(json.loads(line)["cell"]): json.loads(line) for line in lines}
        self.checkpoint = open_checkpoint(options.model)
        self.model: Any = load_model(self.checkpoint)
        self._check_settings()
        self.dense = {target.name: target.weight.clone() for target in find_targets(self.model)}
        self.encode, self.end = self._tokenizer()
        self.older, newest = self._texts()
        held_out = self._cut(newest, options.eval_samples, seed=0)
        self.held_out = as_batches(held_out, self.model)
        self.measurement = Measurement(self.model, self.held_out)

    def _check_settings(self) -> None:
        """Keep what all cells have in common; refuse to go on with what others of it began."""
        options = self.options
        common = {"weights": weights_hash(self.model), "samples": options.samples, "curves": options.curve_samples}
        common |= {"held out": options.eval_samples, "tokens": options.seq_len}
        if self.results.setdefault(("settings",), {"cell": ["settings"], **common}) != {"cell": ["settings"], **common}:
            raise SystemExit(f"{self.file} is of another model or other settings: give another --out")
        if not self.file.exists():
            self._keep(("settings",), **common)

    def _tokenizer(self) -> tuple[Any, int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.folder)
        settings = {"add_special_tokens": False, "verbose": False}
        return lambda text: tokenizer(text, **settings)["input_ids"], tokenizer.eos_token_id

    def _texts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        from leanstep.recipes.data.sources import sotu_corpus
        from leanstep.recipes.prune import split_newest

        return split_newest(tuple(sotu_corpus().documents()))

    def _cut(self, documents: tuple[str, ...], count: int, seed: int) -> torch.Tensor:
        return token_sequences(self.encode, documents, count, self.options.seq_len, end=self.end, seed=seed)

    def calibration(self, seed: int) -> torch.Tensor:
        """Sequences of one seed; of the older texts a tenth, which is enough to draw from and quick to tokenise."""
        first = seed % 10
        return self._cut(self.older[first::10], self.options.samples, seed)

    def restore(self) -> None:
        """Put the dense weights back."""
        with torch.no_grad():
            for target in find_targets(self.model):
                target.weight.copy_(self.dense[target.name])

    def cost(self) -> dict[str, float]:
        """Perplexity and distortion on the held-out sequences, with the weights as they are."""
        loss, losses, distortions = CEDelta(), [], []
        with evaluating(self.model):
            for kept, batch in zip(self.measurement.reference, self.held_out, strict=True):
                output = batch.run(self.model)
                losses.append(loss.compare(torch.zeros(batch.size, dtype=torch.float64), output, batch))
                distortions.append(self.measurement.metric.compare(kept, output, batch))
        return {"perplexity": math.exp(summarise(losses).mean), "joint": summarise(distortions).mean}

    def run(self) -> None:
        """Every cell that is missing."""
        begin = time.perf_counter()
        if ("dense",) not in self.results:
            self._keep(("dense",), **self.cost())
        for seed in self.options.seeds:
            data = None
            for score in self.options.scores:
                curves = None
                for allocation, sparsity in self._cells():
                    cell = (seed, score, allocation, sparsity)
                    if cell in self.results:
                        continue
                    data = self.calibration(seed) if data is None else data
                    if allocation in ("dp", RELINEARISED) and curves is None:
                        curves = self._curves(score, seed, data)
                    self._measure(cell, data, curves)
                    print(f"{time.perf_counter() - begin:6.0f} s  {self._told(cell)}", flush=True)

    def _cells(self) -> Iterator[tuple[str, float]]:
        for sparsity in self.options.sparsities:
            yield from ((allocation, sparsity) for allocation in self.options.allocations)

    def _curves(self, score: str, seed: int, data: torch.Tensor) -> Any:
        return measure_curves(
            self.model,
            data[: self.options.curve_samples],
            score=score,
            score_data=data,
            levels=LEVELS,
            resume=self.options.out / f"curves-{score}-{seed}.jsonl",
        )

    def _measure(self, cell: tuple[Any, ...], data: torch.Tensor, curves: Any) -> None:
        _, score, allocation, sparsity = cell
        try:
            result = prune(
                self.model,
                data,
                sparsity=sparsity,
                allocation="dp" if allocation == RELINEARISED else allocation,
                score=score,
                curves=curves if allocation in ("dp", RELINEARISED) else None,
                correction="relinearise" if allocation == RELINEARISED else "none",
                levels=LEVELS,
                curve_data=data[: self.options.curve_samples],
                held_out=False,
            )
            self._keep(cell, sparsity=result.sparsity, predicted=result.allocation.predicted, **self.cost())
        finally:
            self.restore()

    def _keep(self, cell: tuple[Any, ...], **values: Any) -> None:
        self.results[cell] = {"cell": list(cell), **values}
        with self.file.open("a") as file:
            file.write(json.dumps(self.results[cell]) + "\n")

    def _told(self, cell: tuple[Any, ...]) -> str:
        return f"{' '.join(map(str, cell))}: perplexity {self.results[cell]['perplexity']:.2f}"

    # -- tables and plot --------------------------------------------------------------------------------------------

    def values(self, score: str, allocation: str, sparsity: float, key: str = "perplexity") -> list[float]:
        """One value per seed."""
        return [self.results[seed, score, allocation, sparsity][key] for seed in self.options.seeds]

    def tables(self) -> str:
        """Perplexity by score, sparsity and allocation; and how far DP's distortions add up."""
        columns = " | ".join(NAMES.get(allocation, allocation) for allocation in self.options.allocations)
        lines = [f"| | {columns} |", "| --- |" + " ---: |" * len(self.options.allocations)]
        best = 0
        for score in self.options.scores:
            for sparsity in self.options.sparsities:
                values = {name: self.values(score, name, sparsity) for name in self.options.allocations}
                first = min(values, key=lambda name: statistics.mean(values[name]))
                best += first == "dp"
                cells = [f"**{_told(values[name])}**" if name == first else _told(values[name]) for name in values]
                lines.append(f"| {NAMES.get(score, score)} {sparsity:.0%} | {' | '.join(cells)} |")
        total = len(self.options.scores) * len(self.options.sparsities)
        lines += [
            "",
            f"dense perplexity {self.results[('dense',)]['perplexity']:.2f}; mean ± standard deviation over "
            f"{len(self.options.seeds)} calibration seeds; DP is best in {best} of {total} cells",
        ]
        if "dp" in self.options.allocations:
            columns = " | ".join(f"{sparsity:.0%}" for sparsity in self.options.sparsities)
            lines += ["", f"| joint / summed, DP | {columns} |", "| --- |" + " ---: |" * len(self.options.sparsities)]
            for score in self.options.scores:
                ratios = [self._ratio(score, sparsity) for sparsity in self.options.sparsities]
                lines.append(f"| {NAMES.get(score, score)} | {' | '.join(ratios)} |")
        return "\n".join(lines)

    def _ratio(self, score: str, sparsity: float) -> str:
        joint, summed = (self.values(score, "dp", sparsity, key) for key in ("joint", "predicted"))
        return f"{statistics.mean(a / b for a, b in zip(joint, summed, strict=True)):.2f}"

    def plot(self, path: Path) -> None:
        """Perplexity over sparsity, a panel for each score."""
        import matplotlib

        matplotlib.use("svg")
        # letters stay letters, and the same numbers give the same file
        matplotlib.rcParams |= {"svg.hashsalt": "leanstep", "svg.fonttype": "none"}
        import matplotlib.pyplot as plt

        figure, panels = plt.subplots(1, len(self.options.scores), figsize=(11, 3.6), sharey=True, squeeze=False)
        for panel, score in zip(panels[0], self.options.scores, strict=True):
            for allocation, colour in zip(ALLOCATIONS, COLOURS, strict=True):
                if allocation not in self.options.allocations:
                    continue
                means = [statistics.mean(self.values(score, allocation, s)) for s in self.options.sparsities]
                width = 2.4 if allocation == "dp" else 1.2
                panel.plot(
                    self.options.sparsities,
                    means,
                    "o-",
                    color=colour,
                    lw=width,
                    ms=3,
                    label=NAMES.get(allocation, allocation),
                )
            panel.axhline(self.results[("dense",)]["perplexity"], color="#9aa2ae", lw=0.8, ls=":")
            panel.set(title=NAMES.get(score, score), xlabel="sparsity", yscale="log")
        panels[0][0].set_ylabel("perplexity")
        panels[0][0].legend(frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})


def _told(values: list[float]) -> str:
    """Mean and spread; of numbers beyond a million, two digits."""
    mean = statistics.mean(values)

    def told(value: float) -> str:
        return f"{value:.1e}" if mean >= 1e6 else f"{value:.0f}" if mean >= 1000 else f"{value:.1f}"

    spread = told(statistics.stdev(values)) if len(values) > 1 else "0"
    return told(mean) if float(spread) == 0 else f"{told(mean)} ± {spread}"


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/llama-nano-sinkgd/final"))
    parser.add_argument("--out", type=Path, default=Path("runs/prune-quality"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=float, nargs="+", default=list(SPARSITIES))
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=(*ALLOCATIONS, RELINEARISED))
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--curve-samples", type=int, default=8, help="of them for the curves")
    parser.add_argument("--eval-samples", type=int, default=48, help="held-out sequences")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as an SVG")
    bench = Bench(parser.parse_args())
    bench.run()
    print("\n" + bench.tables())
    if bench.options.plot:
        bench.plot(bench.options.plot)


if __name__ == "__main__":
    main()
