"""Samples of embedding models and classifiers: texts that are read one by one or images, and their labels."""

import argparse
from pathlib import Path
from typing import Any

from leanstep._checkpoint.files import read_json
from leanstep.pruning.folder.kinds import Judge
from leanstep.pruning.folder.loading import open_tokenizer
from leanstep.pruning.folder.run import check_reads_text
from leanstep.pruning.folder.text import TextSamples, sequence_length
from leanstep.pruning.measure.metrics import CLASSIFIER
from leanstep.recipes.data.images import labelled, read_images
from leanstep.recipes.data.sources import open_file, read_labels, sotu_corpus, split_newest


def all_samples(folder: Path, judge: Judge, options: argparse.Namespace) -> Any:
    """The data of ``leanstep eval``, all of it or the first ``--batches``, with labels if it has some.

    Raises:
        ValueError: for data that cannot be read, or of another kind than the model takes.
    """
    count = None if options.batches is None else options.batches * options.batch_size
    if options.data.endswith(".safetensors"):
        images, classes = read_images(options.data)
        return labelled(images[:count], None if classes is None else classes[:count], options.batch_size)
    check_reads_text(judge.model_class, options.data)
    labels = None
    if options.data == "sotu":
        documents: Any = split_newest(tuple(sotu_corpus().documents()))[1]
    else:
        documents = open_file(options.data, options.text_key)
        labels = read_labels(documents, options.text_key, options.label_key, judge.name == CLASSIFIER)
    tokenizer = open_tokenizer(folder)
    length = sequence_length(folder, read_json(folder / "config.json"), tokenizer, options.seq_len)
    return TextSamples(tokenizer, length, folder).drawn(documents, labels, None)[:count]
