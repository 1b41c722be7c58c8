"""Files for llama.cpp at equal bytes: its own mixes of formats, one format for all, and leanstep compress; one command.

    python benchmarks pruning/compress --model runs/llama-256 --name "LLaMA of 5 M" --out runs/compress.jsonl
    python benchmarks pruning/compress --report docs/results/compress-llama.jsonl [--write]

For every mix of llama.cpp, made by its own library with and without an importance matrix, the other methods get the
bytes of that file: the best single format, dynamic programming with ggml's rounding, and that with compensated errors.
All see the same ``--samples`` sequences of the older addresses of the State of the Union text, drawn anew with every
seed. KL divergence to the dense model and perplexity are those of llama.cpp's outputs on sequences of the newest
addresses. Differences are paired by seed, with Student's interval.

The results file has a line for each cell; an interrupted call goes on where it stopped. ``--write`` puts the table of a
file into docs/.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from calibration import CalibratedModel
from common import append_json_line, command_line, machine_state, machines, read_json_lines, timed_and_peak
from comparison.summary import paired_percent
from comparison.tables import markdown, measure_or_report
from torch import Tensor

PARSER = command_line(
    __doc__, model=Path("runs/llama-256"), name=("", "in the table; default: from the configuration"), seeds=[0, 1, 2],
    mixes=["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"], samples=(32, "calibration sequences"),
    curve_samples=(8, "of them, for the curves"), eval_samples=(16, "held-out sequences"), seq_len=256,
    curves=("fisher", "how curves are obtained"), refine=(0, "minutes of a search, as one more method; 0: none"),
    reconstruct=(0, "steps of training for each block, as one more method; 0: none"),
    out=Path("runs/compress.jsonl"), write=(False, "with --report: write the table into docs/"),
)  # fmt: skip
PARSER.add_argument("--report", type=Path, help="a file of results whose table to print")
SETTINGS = ("name", "samples", "curve_samples", "eval_samples", "seq_len", "curves", "refine", "reconstruct")
METHODS = {
    "mix": "llama.cpp's mix", "mix-imatrix": "the mix, importance matrix", "uniform": "one format, compensated",
    "nearest": "programme, ggml's rounding", "gptq": "programme, compensated", "refined": "programme, refined",
    "reconstructed": "programme, compensated, blocks trained",
}  # fmt: skip
BASELINE = "mix-imatrix"
Row = dict[str, Any]


def run(options: argparse.Namespace) -> None:
    """Measure every missing cell."""
    from leanstep._gguf.writer import write_gguf

    torch.set_num_threads(1)
    text, rows = CalibratedModel(options.model, options.seq_len, options.eval_samples), read_json_lines(options.out)
    judge = LlamaCpp(text)
    with tempfile.TemporaryDirectory(dir=options.out.absolute().parent) as folder:
        dense, made = Path(folder) / "dense.gguf", Path(folder) / "made.gguf"
        write_gguf(options.model, dense, {}, "F32")
        settings = {name: getattr(options, name) for name in SETTINGS} | {"name": options.name or text.name}
        settings |= {"weights": text.weights, "dense": judge.cost(dense)}
        if not rows:
            append_json_line(options.out, settings)
        elif rows[0] | {"dense": ()} != settings | {"dense": ()}:
            raise SystemExit(f"{options.out} is of another model or other settings: give another --out")
        present = {(row["seed"], row["mix"], row["method"]) for row in rows[1:]}
        given = {"refined": options.refine, "reconstructed": options.reconstruct}
        methods = [name for name in METHODS if given.get(name, 1)]
        for seed in options.seeds:
            data, curves = text.calibration(options.samples, seed), dict[str, Any]()
            for mix in options.mixes:
                size = 0
                for method in methods:
                    if (seed, mix, method) in present and size:
                        continue
                    made.unlink(missing_ok=True)
                    work = _Work(options, text, data, dense, made, curves)
                    _, used = timed_and_peak(lambda work=work, m=method, x=mix, s=size: work.make(m, x, s))
                    size = size or made.stat().st_size
                    if (seed, mix, method) in present:
                        continue
                    row = {"seed": seed, "mix": mix, "method": method, "bytes": made.stat().st_size}
                    row |= judge.cost(made) | used | machine_state()
                    append_json_line(options.out, row)
                    print(row, flush=True)


class _Work:
    """Makes the files of one seed."""

    def __init__(
        self,
        options: argparse.Namespace,
        text: CalibratedModel,
        data: Tensor,
        dense: Path,
        made: Path,
        curves: dict[str, Any],
    ) -> None:
        self.options, self.text, self.data, self.dense, self.made = options, text, data, dense, made
        # by score: the first size of a seed measures them
        self.curves = curves

    def make(self, method: str, mix: str, size: int) -> None:
        """Make the file of a method, of at most ``size`` bytes."""
        if method.startswith("mix"):
            quantize_by_llama_cpp(self.dense, self.made, mix, self.importance() if method == "mix-imatrix" else None)
            return
        from leanstep._gguf.writer import write_gguf

        write_gguf(self.options.model, self.made, self.compressed(method, size).encoded, "F16")
        if self.made.stat().st_size > size:
            raise SystemExit(f"{method} at {mix}: {self.made.stat().st_size} bytes, the mix has {size}")

    def compressed(self, method: str, size: int) -> Any:
        """The result of leanstep compress within the bytes of a file."""
        from leanstep.pruning import PruneConfig, Refinement, prune
        from leanstep.pruning.compress.checkpoint import sized
        from leanstep.pruning.compress.compress import Size
        from leanstep.pruning.folder.files import open_checkpoint
        from leanstep.pruning.planner import targets_of
        from leanstep.pruning.score.targets import WeightSnapshot

        score = "nearest" if method == "nearest" else "gptq"
        refine = Refinement(minutes=self.options.refine, seed=0) if method == "refined" else None
        steps = self.options.reconstruct if method == "reconstructed" else None
        curves = self.curves.get(score, self.options.curves)
        config = PruneConfig(pattern="ggml", score=score, curves=curves, refine=refine, reconstruct=steps)
        config = sized(open_checkpoint(self.options.model), config, Size(size=size), "gguf")
        with WeightSnapshot(targets_of(self.text.model, config)).restored():
            if method == "uniform":
                return _uniform(self.text.model, self.data, config)
            curve_data = self.data[: self.options.curve_samples]
            result = prune(self.text.model, self.data, config, curve_data=curve_data, held_out=False)
            self.curves[score] = result.curves
            return result

    def importance(self) -> dict[str, Tensor]:
        """Mean squares of the inputs of each matrix, by its name in the file."""
        from leanstep._gguf.writer import tensor_names
        from leanstep.pruning.config import PruneConfig
        from leanstep.pruning.measure.activation_cache import ActivationCache
        from leanstep.pruning.measure.batches import as_batches
        from leanstep.pruning.planner import targets_of
        from leanstep.pruning.score.calibration import statistics_for

        targets = [t for t in targets_of(self.text.model, PruneConfig(pattern="ggml")) if t.input_modules]
        cache = ActivationCache(self.text.model, as_batches(self.data, self.text.model, batch_size=8))
        statistics, names = statistics_for(cache, targets, ["square_sum"]), tensor_names(self.options.model)
        return {names[t.name]: statistics[t.name].square_sum.float() / statistics[t.name].count for t in targets}


def _uniform(model: torch.nn.Module, data: Tensor, config: Any) -> Any:
    """The largest format that all matrices can have within the budget, applied; its ``encoded`` has the bytes."""
    from leanstep.pruning import Allocation
    from leanstep.pruning.allocate.budgets import BudgetConstraint
    from leanstep.pruning.allocate.levels import levels_of
    from leanstep.pruning.measure.activation_cache import ActivationCache
    from leanstep.pruning.measure.batches import as_batches
    from leanstep.pruning.measure.checks import Trial
    from leanstep.pruning.planner import groups_of, targets_of
    from leanstep.pruning.score.calibration import Pruning
    from leanstep.pruning.score.targets import WeightSnapshot

    targets = targets_of(model, config)
    groups = groups_of(targets, config)
    sizes = {group.name: group.layer.numel for group in groups}
    constraint = BudgetConstraint.of(config.budget, groups, None, {})
    counts, patterns = constraint.uniform(sizes, levels_of(groups, config, 0.5)) or ({}, {})
    if not counts:
        raise SystemExit("no single format fits into the bytes of the smallest mix: leave that out of --mixes")
    cache = ActivationCache(model, as_batches(data, model, batch_size=8))
    trial = Trial(groups, Pruning(cache, config.score), WeightSnapshot(targets))
    trial.apply(Allocation("uniform", sizes, counts, None, patterns, "size"))
    return trial


class LlamaCpp:
    """Judges files by llama.cpp's outputs on the held-out sequences, beside transformers' of the dense model."""

    def __init__(self, text: CalibratedModel) -> None:
        self.tokens = torch.cat([batch.kwargs["input_ids"] for batch in text.held_out.batches])
        with torch.no_grad():
            self.dense = torch.cat(
                [text.model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1) for row in self.tokens]
            )

    def cost(self, file: Path) -> dict[str, float]:
        """Perplexity, and KL divergence from the dense model, of a file."""
        logs = torch.cat([logits[:-1].log_softmax(-1) for logits in llama_cpp_logits(file, self.tokens)])
        kl = (self.dense.exp() * (self.dense - logs)).sum(-1).mean()
        targets = self.tokens[:, 1:].reshape(-1, 1)
        return {"perplexity": float((-logs.gather(1, targets)).mean().exp()), "kl": float(kl)}


def llama_cpp_logits(file: Path, tokens: Tensor) -> Iterator[Tensor]:
    """The logits of each sequence by llama.cpp, fp32 [tokens, vocabulary]."""
    from leanstep._gguf.vocabulary import engine

    with engine(file) as (ffi, library, model, errors):
        if model == ffi.NULL:
            raise SystemExit(f"llama.cpp does not open {file}: {errors}")
        settings = library.llama_context_default_params()
        length = tokens.shape[1]
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = settings.flash_attn_type = 0
        size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        context, batch = library.llama_init_from_model(model, settings), library.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for row in tokens.tolist():
            library.llama_memory_clear(library.llama_get_memory(context), True)
            for place, token in enumerate(row):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
                batch.seq_id[place][0], batch.logits[place] = 0, 1
            if library.llama_decode(context, batch):
                raise SystemExit(f"llama.cpp does not run {file}")
            values = ffi.buffer(library.llama_get_logits(context), 4 * length * size)
            yield torch.frombuffer(bytearray(values), dtype=torch.float32).view(length, size)
        library.llama_batch_free(batch)
        library.llama_free(context)


def quantize_by_llama_cpp(dense: Path, out: Path, mix: str, importance: dict[str, Tensor] | None) -> None:
    """Write a file in one of llama.cpp's mixes, by its library."""
    from leanstep._gguf.vocabulary import engine

    with engine(dense, vocab_only=True) as (ffi, library, _, errors):  # with its log off
        settings = library.llama_model_quantize_default_params()
        settings.nthread, settings.ftype = 1, getattr(library, f"LLAMA_FTYPE_MOSTLY_{mix}")
        # a row without a name ends the matrix, and what C points to lives as long as this list
        rows, held = ffi.new("struct llama_model_imatrix_data[]", len(importance or ()) + 1), list[Any]()
        for row, (name, values) in zip(rows, (importance or {}).items(), strict=False):
            held += [ffi.new("char[]", name.encode()), values.contiguous()]
            row.name, row.size = held[-2], values.numel()
            row.data = ffi.cast("float *", held[-1].data_ptr())
        if importance is not None:
            settings.imatrix = rows
        if library.llama_model_quantize(str(dense).encode(), str(out).encode(), ffi.addressof(settings)):
            raise SystemExit(f"llama.cpp does not write {mix}: {errors}")


def table(path: Path) -> str:
    """The block of the page: a row for each size and method."""
    settings, *rows = read_json_lines(path)
    cells: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        cells.setdefault((row["mix"], row["method"]), {})[row["seed"]] = row
    mixes = sorted({mix for mix, _ in cells}, key=lambda mix: next(iter(cells[mix, "mix"].values()))["bytes"])
    lines = []
    for mix in mixes:
        for method in [name for name in METHODS if (mix, name) in cells]:
            of_seed, base = cells[mix, method], cells.get((mix, BASELINE), {})
            means = {k: statistics.mean(row[k] for row in of_seed.values()) for k in ("kl", "perplexity", "bytes")}
            shared = sorted(set(of_seed) & set(base))
            difference = "–"
            if method != BASELINE and shared:
                pairs = [[one[seed]["kl"] for seed in shared] for one in (of_seed, base)]
                difference = f"{paired_percent(*pairs):+.1f}"
            lines.append([f"{mix}: {METHODS[method]}", f"{means['bytes'] / 1e6:.2f}", f"{means['kl']:.5f}", difference,
                          f"{means['perplexity']:.2f}"])  # fmt: skip
    head = ["", "MB", "KL", f"to {METHODS[BASELINE]}, %", "perplexity"]
    length, dense = settings["seq_len"], settings["dense"]
    caption = (
        f"`python benchmarks pruning/compress`, {settings['name']} (SHA-256 of its weights: "
        f"{settings['weights'][:8]}), perplexity {dense['perplexity']:.2f} in F32: files of at most the mix's bytes, "
        f"{settings['samples']} x {length} tokens for importance and errors, {settings['curve_samples']} x {length} "
        f"for the {settings['curves']} curves, {settings['eval_samples']} x {length} held out, judged in "
        f"llama.cpp. Seeds "
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}; differences are paired by seed, with Student's "
        f"95 % interval. {machines(rows)}."
    )
    return f"{caption}\n\n{markdown(head, lines)}"


def main() -> None:
    """Measure, or read a file; print the table."""
    measure_or_report(PARSER, run, table)


if __name__ == "__main__":
    main()
