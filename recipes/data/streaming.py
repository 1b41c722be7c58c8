"""Streamed data: shuffled in blocks, split over processes, resumed exactly in the middle of a block.

The order of shards follows from (seed, epoch). A block ends after a number of documents or of characters, whichever
comes first, and the order of its sequences follows from (seed, process, block). So a position is a few numbers: epoch,
shard, documents read of that shard, tokens left over, and sequences given from the block. Restoring it reads at most
one shard from its start.
"""

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from leanstep._files import one_line
from leanstep.recipes.config.schema import trained_size
from leanstep.recipes.data.sequences import (
    LoadedData,
    as_sequence,
    cut_document,
    load_validation,
    padding,
    sequence_begin,
    shuffled,
)
from leanstep.recipes.data.sources import Corpus, open_stream, open_validation, stream_texts
from leanstep.recipes.data.tokens import encode, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.config.schema import DataConfig

BLOCK_DOCUMENTS = 1024  # about half a million tokens of C4
BLOCK_CHARACTERS = 4 << 20  # about twice those of such a block; fewer documents where they are books
_TOKENIZER_BYTES = 32 << 20  # bytes of text to train a tokenizer on


class StreamedSequences(IterableDataset):
    """Endless sequences of ``seq_len`` tokens from rows that are read on demand.

    Items are as in :class:`sequences.PackedSequences`, with the tokenizer's begin of text. In each epoch, the processes
    together visit every document once. They take whole shards in turn. With fewer shards than processes, each process
    reads all shards and takes every ``world_size``-th document. The last tokens of an epoch, fewer than ``seq_len``,
    begin the next one.

    Args:
        rows: a ``datasets.IterableDataset``, unshuffled, whose ``shard(n, i)`` gives the rows of one shard.
        tokenizer: a fast tokenizer with an end-of-text token.
        seq_len: tokens in a sequence.
        text_key: column with the text; null and blank texts are skipped.
        packing: join documents with end-of-text tokens; False: one padded or cut document per sequence.
        seed: decides every order.
        epochs: number of epochs; None never ends.
        block_documents: the most documents tokenised and shuffled at once.
        block_characters: a block ends with the document that reaches this number.

    Raises:
        RuntimeError: iterated in a DataLoader worker, which cannot save the position.
        ValueError: no text for this process, or the state of another stream.
        StreamError: a file that cannot be read.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        seq_len: int,
        text_key: str = "text",
        packing: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        block_documents: int = BLOCK_DOCUMENTS,
        block_characters: int = BLOCK_CHARACTERS,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}")
        # a copy of the tokenizer, because a thread makes the blocks
        self.rows, self.tokenizer, self.seq_len = rows, copy.deepcopy(tokenizer), seq_len
        self.text_key, self.packing = text_key, packing
        self.seed, self.rank, self.world_size, self.epochs = seed, rank, world_size, epochs
        self.block_documents, self.block_characters = block_documents, block_characters
        self.num_shards = int(rows.num_shards)
        self.pad_id, self.begin = padding(tokenizer), sequence_begin(tokenizer, seq_len)
        # the position: the state at the start of a block, and the number of sequences given from it
        self._block: dict[str, Any] = {"epoch": 0, "shard": 0, "row": 0, "block": 0, "left_over": []}
        self._given = 0

    @property
    def by_shards(self) -> bool:
        """Whether each process reads whole shards; otherwise each reads every ``world_size``-th document."""
        return self.num_shards >= self.world_size

    def state_dict(self) -> dict[str, Any]:
        """Position after the last sequence: numbers, and a list of fewer than ``seq_len`` token ids."""
        return {**self._identity(), **self._block, "left_over": list(self._block["left_over"]), "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state`` at the next ``iter()``.

        Raises ValueError if it was saved by a stream with other shards, seed, lengths, or number of processes, or holds
        values of another type or range.
        """
        missing = [key for key in (*self._identity(), *self._block, "given") if key not in state]
        if missing:
            raise ValueError(f"not the state of a stream: it has no {', '.join(missing)}")
        other = {key: (state[key], mine) for key, mine in self._identity().items() if state[key] != mine}
        if other:
            differences = "; ".join(f"{key} was {one_line(theirs)}, is {mine}" for key, (theirs, mine) in other.items())
            raise ValueError(
                f"the saved position belongs to another stream ({differences}); resume with the same settings"
            )
        block, given = {key: state[key] for key in self._block}, state["given"]
        tokens, most = block["left_over"], len(self.tokenizer)
        counts = {key: value for key, value in (*block.items(), ("given", given)) if key != "left_over"}
        wrong = [key for key, value in counts.items() if type(value) is not int or not 0 <= value < 2**62]
        if wrong:
            raise ValueError(f"the saved position is damaged: {wrong[0]} is {one_line(counts[wrong[0]])}")
        whole = isinstance(tokens, list) and all(type(token) is int and 0 <= token < most for token in tokens)
        if not whole or len(tokens) >= self.seq_len:
            raise ValueError(f"the saved position is damaged: expected fewer than {self.seq_len} tokens below {most:,}")
        self._block, self._given = block, given

    def _identity(self) -> dict[str, Any]:
        names = ("seed", "rank", "world_size", "num_shards", "seq_len", "packing")
        identity = {name: getattr(self, name) for name in (*names, "block_documents", "block_characters")}
        # sequences of earlier versions had none
        return identity | ({"begin": list(self.begin)} if self.begin else {})

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise RuntimeError(
                "streamed data is read in the main process, so that its position can be saved; use num_workers=0"
            )
        texts = self._texts()
        # a thread reads and tokenises (outside the GIL) the next block meanwhile
        with ThreadPoolExecutor(1, thread_name_prefix="leanstep-stream") as ahead:
            coming = ahead.submit(self._prepare, texts, self._block)
            while (block := coming.result()) is not None:
                sequences, after = block
                order = shuffled(len(sequences), self.seed, 1 + self.rank, self._block["block"]).tolist()
                coming = ahead.submit(self._prepare, texts, after)
                while self._given < len(sequences):
                    item = as_sequence(sequences[order[self._given]], self.seq_len, self.pad_id, self.begin)
                    self._given += 1
                    yield item
                self._block, self._given = after, 0

    def _prepare(
        self, texts: Iterator[tuple[str, dict[str, int]]], start: dict[str, Any]
    ) -> tuple[list[np.ndarray], dict[str, Any]] | None:
        """Make the sequences of the block at ``start``, and the start of the next block; None at the end."""
        batch: list[str] = []
        size, position = 0, dict[str, int]()
        for text, after in islice(texts, self.block_documents):
            batch.append(text)
            position = after
            size += len(text)
            if size >= self.block_characters:
                break
        if not batch:
            return None
        sequences, left_over = self._sequences(batch, start["left_over"])
        return sequences, {**position, "block": start["block"] + 1, "left_over": left_over}

    def _texts(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield this process's texts from ``self._block`` on, each with the position after it."""
        epoch, first_shard, skip = (self._block[key] for key in ("epoch", "shard", "row"))
        while self.epochs is None or epoch < self.epochs:
            order = shuffled(self.num_shards, self.seed, epoch).tolist()
            mine = order[self.rank :: self.world_size] if self.by_shards else order
            any_text = skip > 0 or first_shard > 0
            for shard in range(first_shard, len(mine)):
                rows = self.rows.shard(num_shards=self.num_shards, index=mine[shard])
                what = f"shard {mine[shard] + 1} of {self.num_shards}, in the order of their names,"
                texts = stream_texts(rows.skip(skip) if skip else rows, self.text_key, what, skip)
                for number, text in enumerate(texts, start=skip):
                    if not self.by_shards and number % self.world_size != self.rank:
                        continue
                    if text.strip():
                        any_text = True
                        yield text, {"epoch": epoch, "shard": shard, "row": number + 1}
                skip = 0
            # another epoch may give this process a shard that is not blank
            if not any_text and not (self.by_shards and self._has_text()):
                raise ValueError(
                    f"data: no text for process {self.rank} of {self.world_size} in {self.num_shards} shards "
                    f"(column '{self.text_key}')"
                )
            epoch, first_shard = epoch + 1, 0

    def _has_text(self) -> bool:
        return any(text.strip() for text in stream_texts(self.rows, self.text_key))

    def _sequences(self, texts: list[str], left_over: list[int]) -> tuple[list[np.ndarray], list[int]]:
        """Tokenise the documents of a block; return its sequences and the tokens left over for the next block."""
        documents = [np.append(tokens, self.tokenizer.eos_token_id) for tokens in encode(self.tokenizer, texts)]
        step = self.seq_len - len(self.begin)
        if not self.packing:
            return [cut_document(document, step) for document in documents], []
        tokens = np.concatenate([np.array(left_over, dtype=np.int64), *documents])
        whole = len(tokens) // step * step
        return list(tokens[:whole].reshape(-1, step)), tokens[whole:].tolist()


def load_stream(config: "DataConfig", *, seed: int, rank: int, world_size: int) -> LoadedData:
    """Open streamed training data, and tokenise its separate validation text. See :func:`sequences.load_data`.

    ``tokenizer: train:SIZE`` trains on the first 32 MB of the stream.
    """
    rows = open_stream(config)
    separate = open_validation(config)
    tokenizer = _tokenizer(config, rows)
    if trained_size(config.tokenizer) is not None:
        tokenizer.model_max_length = config.seq_len  # of one that was opened, others rely on its own
    train = StreamedSequences(
        rows,
        tokenizer,
        seq_len=config.seq_len,
        text_key=config.text_key,
        packing=config.packing,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    way = "by shards" if train.by_shards else "by documents, because there are fewer shards than processes"
    facts = {
        "data": f"{config.source} {config.name or config.path}, streamed: {train.num_shards:,} shards",
        "tokenizer": f"{config.tokenizer}, {len(tokenizer):,} tokens",
        "training": f"sequences of {config.seq_len} tokens, {'packed' if config.packing else 'one document each'}; "
        f"process {train.rank} of {train.world_size}" + (f", split {way}" if train.world_size > 1 else ""),
    }
    validation: Any = []
    bytes_per_token, facts["validation"] = None, "none (data.val_tokens: 0)"
    if separate is not None:
        validation, bytes_per_token, facts["validation"] = load_validation(config, separate, tokenizer)
    identity = {"tokenizer": tokenizer_fingerprint(tokenizer)}
    return LoadedData(tokenizer, train, validation, bytes_per_token, stream=True, facts=facts, identity=identity)


def _tokenizer(config: "DataConfig", rows: Any) -> "PreTrainedTokenizerFast":
    if trained_size(config.tokenizer) is None:
        return load_tokenizer(config.tokenizer, list, "", config.cache_dir)
    texts, size = [], 0
    for text in stream_texts(rows, config.text_key):
        texts.append(text)
        size += len(texts[-1])
        if size >= _TOKENIZER_BYTES:
            break
    sample = Corpus.of_texts("first texts of the stream", texts)
    return load_tokenizer(config.tokenizer, sample.documents, sample.fingerprint, config.cache_dir)
