"""Validation losses of options of the optimizers beside those without them, on nano recipes.

    python benchmarks optimizers/option_losses [TABLE ...] --out runs/options [--seeds 0 1 2] [--set key=value ...]

Trains every row of a table from each seed, one run after the other. Finished runs are not repeated, so that an
interrupted command continues. Runs of one seed share batches, and weights where they start, so losses are compared in
pairs: a row has the mean difference to the row above it that it is compared with, and its interval of Student's t,
which takes two seeds or more. Commands with different seeds may share the folder and run at the same time.

The table "int8" has all averages in 8 bits, those of the AdamW fallback too, except those of vectors. "int8-micro" has
them on llama-micro, which needs `python benchmarks recipes/english`. "qk-clip" also prints each run's largest logit,
and how many heads were clipped in all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import add_tables, command_line, machine_line, print_table, read_json_lines, train_once
from comparison.summary import paired_difference

LOSSES = (50, 100)  # steps of the evaluations that the tables show
SETTINGS = [
    "batch.tokens_per_step=1024", "batch.micro_batch_size=4", "data.val_tokens=30000", "log.every=1",
    f"steps={LOSSES[-1]}", f"eval.every={LOSSES[0]}", "eval.at_start=false", "checkpoint.every=0", "precision=bf16",
]  # fmt: skip


class Variant(NamedTuple):
    """A row: its name, the recipe, the recipe's settings, and the name of the row that it is compared with."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    against: str | None = None


def _int8() -> Iterator[Variant]:
    """Every method, with averages in fp32 and in 8 bits; Lion also in fp8, and with weights of 24 bits."""
    int8 = "optimizer.args.momentum_dtype=int8"
    adamw = ("optimizer.name=sinkgd", "optimizer.groups=[{match: '', algorithm: adamw}]")
    nesterov = ("optimizer.args.momentum=0.9", "optimizer.args.nesterov=true")
    split = ("precision=bf16-pure", "optimizer.args.rounding=split", int8)
    for name, recipe, settings, of_int8 in (
        ("SinkGD, momentum 0.9, Nesterov", "llama-nano-sinkgd", nesterov, (int8,)),
        ("Lion", "llama-nano-lion", (), (int8,)),
        ("AdamW", "llama-nano-adamw", adamw, (int8,)),
        ("LANTON", "llama-nano-lanton", (), (int8, "optimizer.args.noise_dtype=int8")),
    ):
        yield Variant(name, recipe, settings)
        yield Variant(f"{name}, int8", recipe, (*settings, *of_int8), name)
        if name == "Lion":
            yield Variant("Lion, int8, split weights", recipe, split, name)
            yield Variant("Lion, fp8", recipe, ("optimizer.args.momentum_dtype=fp8",), name)


def _int8_micro() -> Iterator[Variant]:
    """The same for three methods on a LLaMA of 6M parameters, over twice as many steps of twice as many tokens."""
    longer = (
        "batch.tokens_per_step=2048", "data.val_path=null", "data.val_tokens=60000", f"steps={2 * LOSSES[-1]}",
        f"eval.every={LOSSES[-1]}",
    )  # fmt: skip
    int8 = "optimizer.args.momentum_dtype=int8"
    alone = ("optimizer.groups=[]", "optimizer.args={}")
    adamw = ("optimizer.name=sinkgd", "optimizer.lr=1e-3", "optimizer.args={}",
             "optimizer.groups=[{match: '', algorithm: adamw}]")  # fmt: skip
    lanton = ("optimizer.name=lanton", *alone, "optimizer.args.alpha=auto", "optimizer.lr=2e-2")
    for name, settings, of_int8 in (
        ("AdamW", adamw, (int8,)),
        ("Lion", ("optimizer.name=lion", *alone, "optimizer.lr=5e-4"), (int8,)),
        ("LANTON", lanton, (int8, "optimizer.args.noise_dtype=int8")),
    ):
        yield Variant(name, "llama-micro-adamw", (*longer, *settings))
        yield Variant(f"{name}, int8", "llama-micro-adamw", (*longer, *settings, *of_int8), name)


DECAY, CAUTIOUS = "optimizer.weight_decay=0.5", "optimizer.args.cautious_decay=true"
FAST = "optimizer.groups=[{match: 'q_proj|k_proj', lr: 0.16}]"
NESTEROV = ("optimizer.args.momentum=0.95", "optimizer.args.nesterov=true")
TABLES: dict[str, list[Variant]] = {
    "int8": list(_int8()),
    "int8-micro": list(_int8_micro()),
    "rows": [
        Variant("LANTON", "llama-nano-lanton"),
        Variant('LANTON, `variance="rows"`', "llama-nano-lanton", ("optimizer.args.variance=rows",), "LANTON"),
    ],
    "cautious": [
        Variant("SinkGD", "llama-nano-sinkgd"),
        Variant("SinkGD, decay 0.5", "llama-nano-sinkgd", (DECAY,), "SinkGD"),
        Variant("SinkGD, cautious decay 0.5", "llama-nano-sinkgd", (DECAY, CAUTIOUS), "SinkGD, decay 0.5"),
        Variant("LANTON", "llama-nano-lanton"),
        Variant("LANTON, decay 0.5", "llama-nano-lanton", (DECAY,), "LANTON"),
        Variant("LANTON, cautious decay 0.5", "llama-nano-lanton", (DECAY, CAUTIOUS), "LANTON, decay 0.5"),
    ],
    "qk-clip": [
        # a threshold that no logit passes measures the logits
        Variant("LANTON", "llama-nano-lanton", ("qk_clip.threshold=1e9",)),
        Variant("LANTON, QK-clip at 20", "llama-nano-lanton", ("qk_clip.threshold=20",), "LANTON"),
        Variant("LANTON, eight times the rate of Q and K", "llama-nano-lanton", (FAST, "qk_clip.threshold=1e9")),
        Variant("the same, QK-clip at 100", "llama-nano-lanton", (FAST, "qk_clip.threshold=100"),
                "LANTON, eight times the rate of Q and K"),
    ],
    "embeddings": [
        Variant("SinkGD, AdamW embedding", "llama-nano-sinkgd"),
        Variant("SinkGD, balanced embedding", "llama-nano-balanced", (), "SinkGD, AdamW embedding"),
        Variant("SinkGD with Nesterov momentum, AdamW embedding", "llama-nano-sinkgd", NESTEROV),
        Variant("SinkGD with Nesterov momentum, balanced embedding", "llama-nano-balanced", NESTEROV,
                "SinkGD with Nesterov momentum, AdamW embedding"),
    ],
}  # fmt: skip

PARSER = command_line(__doc__, seeds=[0, 1, 2])
PARSER.add_argument("--out", type=Path, required=True)
PARSER.add_argument("--set", nargs="+", default=[], metavar="key=value", dest="settings", help="settings of every run")
add_tables(PARSER, *TABLES)


class Curves(NamedTuple):
    """Validation losses of a variant's runs at each of ``LOSSES``, and the logits that QK-clip saw."""

    losses: dict[int, list[float]]
    logits: list[tuple[float, int]]


def train(variant: Variant, options: Any) -> Curves:
    """Train a variant from each seed."""
    curves = Curves({}, [])
    for seed in options.seeds:
        settings = [*SETTINGS, *variant.settings, *options.settings, f"seed={seed}"]
        digest = hashlib.sha256(" ".join(settings).encode()).hexdigest()[:12]
        folder = options.out / f"{variant.recipe}-{digest}"  # tables share runs
        train_once(variant.recipe, folder, settings)
        rows = read_json_lines(folder / "log.jsonl")
        for row in rows:
            if row["kind"] == "eval":
                curves.losses.setdefault(row["step"], []).append(row["loss"])
        curves.logits.append(logits_of(rows))
    return curves


def logits_of(rows: list[dict[str, Any]]) -> tuple[float, int]:
    """The largest logit before clipping of all steps, and how many heads were clipped in all."""
    clips = [row["qk_clip"] for row in rows if row.get("qk_clip")]
    largest = max((value for clip in clips for key, value in clip.items() if key.startswith("logit/")), default=0.0)
    return largest, sum(int(clip["heads"]) for clip in clips)


def row_of(variant: Variant, curves: dict[str, Curves], *, with_logits: bool) -> list[str]:
    """The cells of a row: losses and differences at every evaluation."""
    mine, cells = curves[variant.name], [variant.name]
    for step, losses in sorted(mine.losses.items()):
        cells.append(" ".join(f"{loss:.3f}" for loss in losses))
        if variant.against is None:
            cells += ["", ""]
            continue
        others = curves[variant.against].losses[step]
        if len(losses) < 2:  # no interval
            cells += [f"{losses[0] - others[0]:+.3f}", "one seed"]
            continue
        difference = paired_difference(losses, others)
        interval = f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
        cells += [interval, difference.reading]
    if with_logits:
        cells.append(", ".join(f"{largest:.1f} ({heads})" for largest, heads in mine.logits))
    return cells


def main() -> None:
    """Train, and print the tables, each row when its runs are done."""
    options = PARSER.parse_args()
    print(f"{machine_line()}, seeds {', '.join(map(str, options.seeds))}", flush=True)
    for table in options.tables:
        print()
        with_logits = table == "qk-clip"
        head, times = [""], 2 if table == "int8-micro" else 1
        for step in (times * step for step in LOSSES):
            head += [f"losses, step {step}", "difference [95 % interval]", "reading"]
        head += ["largest logit (heads clipped)"] * with_logits
        curves: dict[str, Curves] = {}

        def rows(
            table: str = table, curves: dict[str, Curves] = curves, with_logits: bool = with_logits
        ) -> Iterator[list[str]]:
            for variant in TABLES[table]:
                curves[variant.name] = train(variant, options)
                yield row_of(variant, curves, with_logits=with_logits)

        print_table(head, rows())


if __name__ == "__main__":
    main()
