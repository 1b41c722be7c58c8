"""Text that the tests make themselves: pronounceable, different in each document, the same on every run."""

import gzip
import json
import random
from pathlib import Path

_SYLLABLES = [first + second for first in "bdfgklmnprstvw" for second in ("a", "e", "i", "o", "u", "an", "er", "is")]


def sentences(count: int, seed: int = 0) -> str:
    """Return ``count`` sentences of made-up words, of which some are common and most are rare, as in any language."""
    source = random.Random(seed)
    words = ["".join(source.choices(_SYLLABLES, k=source.randint(1, 3))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines = []
    for _ in range(count):
        line = " ".join(source.choices(words, weights, k=source.randint(4, 12)))
        lines.append(line.capitalize() + ".")
    return " ".join(lines)


def documents(count: int, seed: int = 0) -> list[str]:
    """Return ``count`` documents, each naming its number, so that a lost or doubled one is seen."""
    lengths = random.Random(seed)
    return [f"Document {i}: {sentences(lengths.randint(2, 6), seed * 100_003 + i)}" for i in range(count)]


def chat_tokenizer(template: str, end: str, size: int = 400):
    """Return a byte-level tokenizer with the tokens of three roles, ``<|end|>`` of a turn, and a chat template."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.data.tokens import train_bpe

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(documents(40), size), eos_token=end)
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def write_c4(folder: Path, texts: list[str], shards: int, split: str = "train") -> Path:
    """Write texts as a local copy of C4: gzipped JSON lines with the keys and the file names that C4 has."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        name = f"c4-{split}.{shard:05d}-of-{shards:05d}.json.gz"
        with gzip.open(folder / name, "wt", encoding="utf-8") as stream:
            for text in texts[shard::shards]:
                row = {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org/"}
                stream.write(json.dumps(row) + "\n")
    return folder


def small_blocks() -> None:
    """Let streams of this process have blocks of 16 documents, so that a short run uses several."""
    from leanstep.recipes.data.streaming import StreamedSequences

    StreamedSequences.__init__.__kwdefaults__["block_documents"] = 16
