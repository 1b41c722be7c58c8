"""Token files: the shard format of modded-nanogpt and llm.c, written once per corpus and tokenizer, read by memory map.

A file is 256 little-endian int32 of header, then the tokens: ``header[0]`` magic 20240520, ``header[1]`` version (1:
uint16 tokens, 2: uint32), ``header[2]`` number of tokens. Readers of that format use these three; ``header[3]`` holds
a CRC-32 of the tokens here, by which a damaged file is noticed.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from leanstep.recipes.data.cache import build_once, cache_root
from leanstep.recipes.data.tokenizer import encode, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.data.sources import Corpus

__all__ = ["TokenFile", "read_shard", "tokenise", "write_shard"]

_MAGIC = 20240520
_HEADER_BYTES = 1024
_VERSIONS = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
_MOST_TOKENS = 2**31 - 1
_FORMAT = 1  # of the cache folder; raise it when the same text gives other tokens


def write_shard(path: Path, chunks: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write token chunks as one shard, 2 bytes a token up to a vocabulary of 65,536, else 4; return how many tokens.

    Not atomic by itself: write into a folder that is renamed when complete. Raises ValueError beyond 2**31 - 1 tokens.
    """
    version = 1 if vocab_size <= 1 << 16 else 2
    count = checksum = 0
    with open(path, "wb") as stream:
        stream.write(bytes(_HEADER_BYTES))
        for chunk in chunks:
            raw = chunk.astype(_VERSIONS[version]).tobytes()
            checksum = zlib.crc32(raw, checksum)
            count += len(chunk)
            if count > _MOST_TOKENS:
                raise ValueError(f"the corpus has more than {_MOST_TOKENS:,} tokens; set data.streaming: true")
            stream.write(raw)
        header = np.zeros(_HEADER_BYTES // 4, dtype="<i4")
        header[:3] = _MAGIC, version, count
        header[3:4].view("<u4")[0] = checksum
        stream.seek(0)
        stream.write(header.tobytes())
    return count


def read_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard into memory, read-only, uint16 or uint32.

    Raises:
        ValueError: the file is not such a shard, is truncated, or its tokens do not match their checksum.
    """
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=_HEADER_BYTES // 4)
    if size < _HEADER_BYTES or header[0] != _MAGIC or int(header[1]) not in _VERSIONS:
        raise ValueError(f"'{path}' is not a token shard: its header does not begin with {_MAGIC} and a known version")
    dtype, count = _VERSIONS[int(header[1])], int(header[2])
    expected = _HEADER_BYTES + count * dtype.itemsize
    if size != expected:
        raise ValueError(f"'{path}' has {size} bytes, its header promises {expected} ({count} tokens)")
    if count == 0:
        return np.empty(0, dtype)
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(count,))
    if zlib.crc32(tokens) != int(header[3:4].view("<u4")[0]):
        raise ValueError(f"'{path}' is damaged: its tokens do not match their checksum")
    return tokens


class TokenFile:
    """The tokens of a corpus with the place of its documents; pickles as its path, so that workers map it themselves.

    ``tokens`` is uint16 or uint32 ``[tokens]``; document i is ``tokens[ends[i - 1] : ends[i]]`` with its end-of-text
    token last, and had ``text_bytes[i]`` bytes of UTF-8 text; both are int64 ``[documents]``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = read_shard(folder / "tokens.bin")
        self.ends, self.text_bytes = np.load(folder / "documents.npy")
        if len(self.ends) and (self.ends[-1] != len(self.tokens) or (np.diff(self.ends) <= 0).any()):
            raise ValueError(f"'{folder}' is damaged: its documents do not add up to its tokens")

    def __reduce__(self) -> tuple:
        return TokenFile, (self.folder,)

    def __len__(self) -> int:
        return len(self.tokens)


def tokenise(
    corpus: "Corpus", tokenizer: "PreTrainedTokenizerFast", cache_dir: str | None = None, at_most: int | None = None
) -> TokenFile:
    """Tokenise a corpus, an end-of-text token after each document, or find its tokens in the cache.

    The cache entry is named by the content of the text and of the tokenizer; a damaged one is built again.
    ``at_most`` stops after the document with which so many tokens are reached.
    """
    identity = f"{_FORMAT} {corpus.fingerprint} {tokenizer_fingerprint(tokenizer)} {at_most}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:20]

    def build(folder: Path) -> None:
        ends: list[int] = []
        sizes: list[int] = []
        chunks = _documents(corpus.documents(), tokenizer, ends, sizes, at_most)
        write_shard(folder / "tokens.bin", chunks, len(tokenizer))
        np.save(folder / "documents.npy", np.array([ends, sizes], dtype=np.int64))

    def is_valid(folder: Path) -> bool:
        try:
            TokenFile(folder)
        except (OSError, ValueError, EOFError):
            return False
        return True

    return TokenFile(build_once(cache_root(cache_dir) / f"tokens-{key}", is_valid, build))


def _documents(
    texts: Iterable[str],
    tokenizer: "PreTrainedTokenizerFast",
    ends: list[int],
    sizes: list[int],
    at_most: int | None,
) -> Iterator[np.ndarray]:
    """Yield the tokens of each document with its end of text, noting where it ends and how many bytes its text had."""
    end_of_text = np.array([tokenizer.eos_token_id], dtype=np.int64)
    texts, total = iter(texts), 0
    while batch := list(islice(texts, 64)):
        for text, tokens in zip(batch, encode(tokenizer, batch), strict=True):
            total += len(tokens) + 1
            ends.append(total)
            sizes.append(len(text.encode("utf-8", "surrogatepass")))
            yield tokens
            yield end_of_text
            if at_most is not None and total >= at_most:
                return
