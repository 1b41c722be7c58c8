"""Tokenizers: byte-level BPE trained on the training text and cached, or any fast tokenizer of a folder or the hub."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leanstep.recipes.data.cache import build_once, cache_root
from leanstep.recipes.data.hub import is_folder_name, offline_unless_reached
from leanstep.recipes.data.sources import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "END_OF_TEXT",
    "encode",
    "load_tokenizer",
    "open_tokenizer",
    "tokenizer_fingerprint",
    "train_bpe",
    "trained_size",
]

END_OF_TEXT = "<|endoftext|>"
_SMALLEST = 257  # 256 bytes and the end of text
_PIECE = 1 << 20  # characters given to the tokenizer at once
_CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")


def trained_size(spec: str) -> int | None:
    """Return SIZE if ``spec`` is ``train:SIZE``, or None if it names a folder or a hub tokenizer.

    Raises ValueError if SIZE is not a whole number of at least 257 (256 bytes and the end of text).
    """
    if not spec.startswith("train:"):
        return None
    size = re.fullmatch(r"train:(\d+)", spec.replace("_", ""))
    if not size or int(size[1]) < _SMALLEST:
        raise ValueError(
            f"data.tokenizer: expected train:SIZE with SIZE at least {_SMALLEST} (256 bytes and the end of text), "
            f"got '{spec}'"
        )
    return int(size[1])


def train_bpe(texts: Iterable[str], size: int) -> Any:
    """Train a byte-level BPE of at most ``size`` tokens and return the ``tokenizers.Tokenizer``.

    Deterministic: the same texts give the same file, byte for byte. Every byte is a token, so any Unicode text
    round-trips; token 0 is ``<|endoftext|>``. A text too small for ``size`` merges gives a smaller vocabulary.

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
    """Return the tokenizer that ``spec`` asks for: ``train:SIZE``, a folder, or a hub id.

    A trained one is cached under the hash of its training text; of several processes one trains and the others wait.

    Args:
        spec: ``train:SIZE``, a local folder with a tokenizer, or a hub id.
        texts: starts a pass over the training texts; called only when there is something to train.
        fingerprint: hash of those texts, which names the cache entry.
        cache_dir: the cache folder; None takes the default (:func:`leanstep.recipes.data.cache.cache_root`).

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
        return file.is_file() and stored.is_file() and stored.read_text() == _file_hash(file)

    key = hashlib.sha256(f"bpe 1 {size} {fingerprint}".encode()).hexdigest()[:20]
    folder = build_once(cache_root(cache_dir) / f"tokenizer-{size}-{key}", is_valid, build)
    return _wrap(folder / "tokenizer.json")


def _wrap(file: Path) -> "PreTrainedTokenizerFast":
    require("transformers")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def open_tokenizer(spec: str) -> "PreTrainedTokenizerFast":
    """Open a tokenizer from a local folder or, by name, from the hub; it must be fast and have an end-of-text token."""
    require("transformers")
    from transformers import AutoTokenizer

    folder = Path(spec).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"data.tokenizer: the folder '{spec}' holds no tokenizer (no tokenizer.json)")
    if not folder.is_dir() and is_folder_name(spec):
        raise ValueError(f"data.tokenizer: the folder '{spec}' does not exist")
    try:
        with nullcontext() if folder.is_dir() else offline_unless_reached():
            tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else spec)
    except Exception as error:  # missing on the hub, no network, or a broken file: many types, one meaning
        what = "the folder" if folder.is_dir() else "the hub's"
        raise ValueError(
            f"data.tokenizer: could not open {what} '{spec}' ({str(error).strip().splitlines()[0]}). "
            f"One that needs no network: data.tokenizer=train:4096"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"data.tokenizer: '{spec}' has no fast version (tokenizer.json), which is needed here")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer: '{spec}' has no end-of-text token (eos_token), which separates documents")
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Hash of everything that decides the tokens of a text, end-of-text token included."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    model["truncation"] = model["padding"] = None  # settings of the last call, not of the tokenizer
    return hashlib.sha256(json.dumps([model, tokenizer.eos_token_id], sort_keys=True).encode()).hexdigest()


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str]) -> list[np.ndarray]:
    """Tokenise documents, each to an int64 array without special tokens.

    A literal ``<|endoftext|>`` inside a text stays text: it is not taken for the end of the document.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        pieces = [piece for text in texts for piece in _pieces(text)]
        encoded = iter(backend.encode_batch_fast(pieces, add_special_tokens=False))
    finally:
        backend.encode_special_tokens = before
    return [np.concatenate([np.asarray(next(encoded).ids, np.int64) for _ in _pieces(text)]) for text in texts]


def _pieces(text: str) -> list[str]:
    """Cut a long text where byte-level tokenizers cut anyway, before a lone space or line break, to bound memory."""
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        cut = _CUT.search(text, start + _PIECE)
        if not cut:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]
