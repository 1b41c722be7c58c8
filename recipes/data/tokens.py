"""Tokenizers and token files, made once and cached.

A tokenizer is a byte-level BPE trained on the training text, or a fast tokenizer from a folder or the hub. A token file
has the shard format of modded-nanogpt and llm.c: 256 little-endian int32 of header, then the tokens. ``header[0]`` is
the magic 20240520, ``header[1]`` the version (1: uint16 tokens, 2: uint32), ``header[2]`` the number of tokens. We
add a CRC-32 of the tokens in ``header[3]``, which other readers ignore.
"""

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leanstep._files import gguf_file, is_folder_name, one_line
from leanstep.recipes.config.schema import trained_size
from leanstep.recipes.data.cache import build_once, cache_root, require
from leanstep.recipes.data.hub import cached_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.data.sources import Corpus

END_OF_TEXT = "<|endoftext|>"
_PIECE = 1 << 20  # characters given to the tokenizer at once
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


def train_bpe(texts: Iterable[str], size: int) -> Any:
    """Train a byte-level BPE of at most ``size`` tokens and return the ``tokenizers.Tokenizer``.

    Deterministic: the same texts give the same file, byte for byte. Every byte is a token, so any Unicode text
    round-trips. Token 0 is ``<|endoftext|>``. A short text gives a smaller vocabulary.

    References:
        R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
        arXiv:1508.07909; on bytes: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    require("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(
    spec: str, texts: Callable[[], Iterable[str]], fingerprint: str, cache_dir: str | Path | None = None
) -> "PreTrainedTokenizerFast":
    """Return the tokenizer ``spec``: ``train:SIZE``, a folder, or a hub id.

    A trained tokenizer is cached under the hash of its text. One of several processes trains, and the others wait.

    Args:
        spec: ``train:SIZE``, a local folder with a tokenizer, or a hub id.
        texts: starts a pass over the training texts; called only to train.
        fingerprint: hash of those texts, which names the cache entry.
        cache_dir: the cache folder; None takes :func:`cache_root`.

    Raises:
        ValueError: a malformed size, a missing folder, or a tokenizer that is not fast or has no end-of-text token.
    """
    size = trained_size(spec)
    if size is None:
        return open_tokenizer(spec)

    def build(folder: Path) -> None:
        file = folder / "tokenizer.json"
        train_bpe(texts(), size).save(str(file))
        _wrap(file).save_pretrained(folder)
        (folder / "sha256").write_text(_file_hash(file))

    def is_valid(folder: Path) -> bool:
        file, stored = folder / "tokenizer.json", folder / "sha256"
        return file.is_file() and stored.is_file() and stored.read_bytes() == _file_hash(file).encode()

    key = hashlib.sha256(f"bpe 1 {size} {fingerprint}".encode()).hexdigest()[:20]
    folder = build_once(cache_root(cache_dir) / f"tokenizer-{size}-{key}", is_valid, build)
    return _wrap(folder / "tokenizer.json")


def _wrap(file: Path) -> "PreTrainedTokenizerFast":
    require("transformers")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def open_tokenizer(spec: str, key: str | None = "data.tokenizer") -> "PreTrainedTokenizerFast":
    """Open a fast tokenizer with an end-of-text token, from a local folder or by name from the hub.

    ``key`` begins messages: the key of a recipe that names the tokenizer; None where a checkpoint must bring its own.
    """
    begin = f"{key}: " if key else ""
    advice = f"One that needs no network: {key}=train:4096" if key else "Save the model's own there by save_pretrained"
    require("transformers")
    from leanstep.pruning.folder import loading

    folder = Path(spec).expanduser()
    files = ("tokenizer.json", "tokenizer_config.json")
    if gguf_file(folder) is None and folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise ValueError(f"{begin}the folder '{spec}' holds no tokenizer (no tokenizer.json). {advice}")
    if not folder.is_dir() and is_folder_name(spec):
        raise ValueError(f"{begin}the folder '{spec}' does not exist")
    try:
        with cached_if_unreachable(folder):
            tokenizer = loading.open_tokenizer(spec)
    except ValueError as error:
        what = "the folder" if folder.is_dir() else "the hub's"
        raise ValueError(f"{begin}could not open {what} '{spec}' ({error}). {advice}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{begin}'{spec}' has no fast version (tokenizer.json), which is needed here")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{begin}'{spec}' has no end-of-text token (eos_token), which separates documents")
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hash the tokenizer's model and its end-of-text token."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model["truncation"] = model["padding"] = None  # settings of the last call
    return hashlib.sha256(json.dumps([model, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[np.ndarray]:
    """Tokenise documents, each to an int64 array without special tokens.

    A literal ``<|endoftext|>`` in a text is encoded as text, not as the end of the document. Raises ValueError for a
    tokenizer that cannot encode the text.
    """
    from leanstep.pruning.folder.loading import encoding

    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        pieces = [piece for text in texts for piece in _pieces(text)]
        with encoding(tokenizer.name_or_path):
            encoded = iter(backend.encode_batch_fast(pieces, add_special_tokens=False))
    finally:
        backend.encode_special_tokens = before
    return [np.concatenate([np.asarray(next(encoded).ids, np.int64) for _ in _pieces(text)]) for text in texts]


def decode_halves(tokenizer: Any, tokens: Any, count: int) -> tuple[str, str]:
    """Decode the first ``count`` tokens, and the rest as it follows them, both without special tokens.

    A sentencepiece tokenizer strips the space before the first token of what it decodes.
    """
    begin, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:count], tokens))
    return begin, whole[len(os.path.commonprefix([begin, whole])) :]


def _pieces(text: str) -> list[str]:
    """Cut a long text before single spaces or line breaks, where byte-level tokenizers cut anyway, to limit memory."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        cut = _CUT.search(text, start + _PIECE)
        if not cut:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


def vocabulary_size(tokenizer: Any) -> int:
    """Largest token id in data plus one: ordinary tokens, begin, end, padding and unknown tokens, those before a text.

    Encoding plain text never produces the other special tokens. T5's tokenizer has 100 sentinels above its 32,000
    tokens, and the models of the published LLaMA runs on C4 have 32,000.
    """
    from leanstep.pruning.folder.loading import begin_tokens

    special = set(tokenizer.all_special_ids)
    used = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id} - {None}
    ordinary = (index for index in tokenizer.get_vocab().values() if index not in special)
    return 1 + max(max(ordinary, default=0), *used, *begin_tokens(tokenizer), 0)


_MAGIC = 20240520
_HEADER_BYTES = 1024
_VERSIONS: dict[int, np.dtype] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
_MOST_TOKENS = 2**31 - 1
_FORMAT = 1  # of the cache folder; raise it when the same text gives other tokens


def write_shard(path: Path, chunks: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write token chunks as one shard and return their number. 2 bytes a token for a vocabulary up to 65,536, else 4.

    ``vocab_size`` is the largest token id plus one. Not atomic. Raises ValueError for an id beyond it, and beyond
    2**31 - 1 tokens.
    """
    version = 1 if vocab_size <= 1 << 16 else 2
    count = checksum = 0
    with open(path, "wb") as stream:
        stream.write(bytes(_HEADER_BYTES))
        for chunk in chunks:
            if (largest := int(chunk.max(initial=0))) >= vocab_size:
                raise ValueError(f"the tokenizer produced the token {largest}, its largest is {vocab_size - 1}")
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
        ValueError: the file is no shard, is truncated, or has a wrong checksum.
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
    if zlib.crc32(tokens.data) != int(header[3:4].view("<u4")[0]):
        raise ValueError(f"'{path}' is damaged: its tokens do not match their checksum")
    return tokens


def _checksum(path: Path) -> int:
    return int(np.fromfile(path, dtype="<u4", count=4)[3])


def write_documents(path: Path, ends: Sequence[int], text_bytes: Sequence[int]) -> None:
    """Write a document index: an npy file, int64 ``[2, documents]``, and the CRC-32 of its bytes, little-endian.

    Not atomic.
    """
    file = io.BytesIO()
    np.save(file, np.array([ends, text_bytes], dtype="<i8"))
    content = file.getvalue()
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))


def read_documents(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a document index: the end of each document in tokens, and its bytes of text, both int64 ``[documents]``.

    Raises:
        ValueError: the file is no document index, has a wrong checksum, ends that do not rise from above 0, or
            negative sizes.
    """
    raw = path.read_bytes()
    content, checksum = raw[:-4], raw[-4:]
    if zlib.crc32(content).to_bytes(4, "little") != checksum:
        raise ValueError(f"'{path}' is damaged: its content does not match its checksum")
    try:
        index = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"'{path}' is no document index: {one_line(error)}") from None
    if not isinstance(index, np.ndarray) or index.dtype != np.dtype("<i8") or index.ndim != 2 or len(index) != 2:
        raise ValueError(f"'{path}' is no document index: expected int64 [2, documents]")
    ends, text_bytes = index
    if (ends[:1] <= 0).any() or (ends[1:] <= ends[:-1]).any() or (text_bytes < 0).any():
        raise ValueError(f"'{path}' is damaged: its ends do not rise, or a document has less than no text")
    return ends, text_bytes


class TokenFile:
    """The tokens of a corpus and the ends of its documents. Pickles as its path, and each process maps the file.

    ``tokens`` is uint16 or uint32 ``[tokens]``. Document i is ``tokens[ends[i - 1] : ends[i]]``, its end-of-text token
    included. ``text_bytes[i]`` is the size of its UTF-8 text. Both are int64 ``[documents]``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = read_shard(folder / "tokens.bin")
        self.ends, self.text_bytes = read_documents(folder / "documents.npy")
        last = int(self.ends[-1]) if len(self.ends) else 0
        if last != len(self.tokens):
            raise ValueError(f"'{folder}' is damaged: its documents have {last} tokens, its shard {len(self.tokens)}")

    def __reduce__(self) -> tuple:
        return TokenFile, (self.folder,)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def identity(self) -> str:
        """Number and CRC-32 of the tokens, as the shard's header has them."""
        return f"{len(self):,} tokens, CRC-32 {_checksum(self.folder / 'tokens.bin'):08x}"


def tokenise(
    corpus: "Corpus", tokenizer: "PreTrainedTokenizerFast", cache_dir: str | None = None, at_most: int | None = None
) -> TokenFile:
    """Tokenise a corpus, with an end-of-text token after each document, or read its tokens from the cache.

    The cache key is a hash of text and tokenizer. A damaged entry is built again. ``at_most`` stops after the document
    that reaches so many tokens.
    """
    identity = f"{_FORMAT} {corpus.fingerprint} {tokenizer_fingerprint(tokenizer)} {at_most}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:20]

    def build(folder: Path) -> None:
        ends: list[int] = []
        sizes: list[int] = []
        chunks = _documents(corpus.documents(), tokenizer, ends, sizes, at_most)
        write_shard(folder / "tokens.bin", chunks, 1 + max(tokenizer.get_vocab().values()))
        write_documents(folder / "documents.npy", ends, sizes)

    def is_valid(folder: Path) -> bool:
        try:
            TokenFile(folder)
        except (OSError, ValueError, EOFError):
            return False
        return True

    return TokenFile(build_once(cache_root(cache_dir) / f"tokens-{key}", is_valid, build))


def _documents(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerFast", ends: list[int], sizes: list[int], at_most: int | None
) -> Iterator[np.ndarray]:
    """Yield the tokens of each document and its end of text; append to ``ends`` and ``sizes`` (bytes of text)."""
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
