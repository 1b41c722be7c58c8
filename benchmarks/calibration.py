"""A language model with the texts of the State of the Union addresses, for benchmarks that prune it.

Calibration sequences are drawn from the older addresses, anew with every seed; held-out ones from the newest addresses,
which calibration never sees.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import torch

# a seed draws from every so many-th of the older addresses: enough text, and quick to tokenise
_STRIDE = 10


class CalibratedModel:
    """A checkpoint with its tokenizer and texts, and what a pruned model costs on the held-out ones.

    Args:
        folder: of the checkpoint.
        seq_len: tokens of a sequence.
        held_out: number of held-out sequences.
        dtype: of the weights; None: as they are stored.
        scratch: folder for the dense outputs; None: they stay in memory.
    """

    def __init__(
        self, folder: Path, seq_len: int, held_out: int, dtype: torch.dtype | None = None, scratch: Path | None = None
    ) -> None:
        from transformers import AutoTokenizer

        from leanstep._checkpoint.mapped import Scratch
        from leanstep.pruning import find_targets
        from leanstep.pruning.folder.files import open_checkpoint
        from leanstep.pruning.folder.loading import load_model
        from leanstep.pruning.measure.batches import as_batches
        from leanstep.pruning.measure.curve_file import weights_hash
        from leanstep.pruning.measure.measurement import Measurement
        from leanstep.pruning.score.targets import WeightSnapshot
        from leanstep.recipes.data.sources import sotu_corpus, split_newest

        checkpoint = open_checkpoint(folder)
        self.model: Any = load_model(checkpoint)
        if dtype is not None:
            self.model.to(dtype)
        self.weights, self.made_by = weights_hash(self.model), _command(folder.parent / "command.txt")
        self.tokenizer, self.seq_len = (
            AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False),
            seq_len,
        )
        self.older, self.newest = split_newest(tuple(sotu_corpus().documents()))
        self.snapshot = WeightSnapshot(find_targets(self.model))
        batches = as_batches(self.sequences(self.newest, held_out, 0), self.model, batch_size=4)
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        files = None if scratch is None else Scratch(scratch)
        self.held_out = Measurement(self.model, batches, scratch=files)

    @property
    def name(self) -> str:
        """What the configuration says of the model."""
        config = self.model.config
        return (
            f"a {config.model_type} of {config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"{sum(parameter.numel() for parameter in self.model.parameters()) / 1e6:.1f} M parameters"
        )

    def sequences(self, documents: tuple[str, ...], count: int, seed: int) -> torch.Tensor:
        """Token sequences that a seed draws from documents, int64 [count, seq_len]."""
        from leanstep.pruning.folder.loading import begin_tokens
        from leanstep.pruning.folder.text import token_sequences

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

        begin, end = begin_tokens(self.tokenizer), self.tokenizer.eos_token_id
        return token_sequences(encode, documents, count, self.seq_len, begin=begin, end=end, seed=seed)

    def calibration(self, count: int, seed: int) -> torch.Tensor:
        """Calibration sequences of a seed."""
        return self.sequences(self.older[seed % _STRIDE :: _STRIDE], count, seed)

    def cost(self) -> dict[str, float]:
        """Perplexity, and KL divergence to the dense model, of the present weights on the held-out sequences."""
        from leanstep._checkpoint.mapped import Scratch
        from leanstep.pruning.measure.batches import evaluating
        from leanstep.pruning.measure.metrics import cross_entropy_sums, summarise

        measurement, losses, distortions = self.held_out, [], []
        with evaluating(self.model):
            for reference, batch in zip(measurement.reference, measurement.batches, strict=True):
                output = batch.run(self.model)
                losses.append(cross_entropy_sums(output, batch))
                distortions.append(measurement.metric.compare(Scratch.open(reference), output, batch))
        return {"perplexity": math.exp(summarise(losses).mean), "kl": summarise(distortions).mean}


def _command(file: Path) -> str:
    """The command of the run that made a model, without the paths of its interpreter; "" where none is recorded."""
    words = shlex.split(file.read_text("utf-8")) if file.exists() else []
    names = [Path(word).name for word in words]
    return shlex.join(["leanstep", *words[names.index("leanstep") + 1 :]]) if "leanstep" in names else ""
