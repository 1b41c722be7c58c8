"""A tokenizer.json as the vocabulary of a GGUF file, which llama.cpp reads as tokenizers does, or a refusal."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanstep._checkpoint.files import checked_file, read_json
from leanstep._files import one_line, read_text
from leanstep._gguf.ggml import INSTALL

try:
    from gguf import GGUFWriter, TokenType
    from tokenizers import Tokenizer
except ImportError as error:
    raise ImportError(f"GGUF files need the packages gguf and tokenizers: {INSTALL}") from error

# how llama.cpp cuts text before merges, by its names: those that cut differently, the simplest first
_CUTS = ("gpt-2", "smollm", "llama-bpe", "qwen2", "falcon", "starcoder", "gpt-4o", "tekken", "deepseek-llm",
         "deepseek-coder", "poro-chat", "viking", "chatglm-bpe", "olmo", "default")  # fmt: skip
_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it? They'LL say I'm 1234567 years old.",
    "  two spaces,   three,\ttab\n\nand\r\nlines \n  of code:\n\tif (x_1 != y[2]) { return -0.5e3; } // done!!!\n",
    "Größe, naïve café, Ελληνικά, кириллица, 中文字符和標點。日本語のテキスト、",
    "emoji 😀👍🏽 and maths ∑∫√ ½ ² — “quotes” … ‘single’ #hash @at 50% $3.99",
    "word",
    " word",
    "CamelCase snake_case UPPER lower 3rd 2nd a1b2c3 x=y*z e.g. i.e. don't we're you've he'd it's",
)
# llama.cpp drops letters of decomposed Hangul, which BERT's normalizer makes: such a file is right for other scripts
_HANGUL = "한국어 텍스트"
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
# names of special tokens, and of others that stand in for one
_SPECIAL = {"bos": "cls", "eos": "sep", "unk": None, "sep": None, "pad": None, "mask": None}
_TOKENS_TRIED = 4000


@dataclass
class Vocabulary:
    """What the keys ``tokenizer.ggml.*`` of a file hold."""

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str = "default"
    special: dict[str, int] = field(default_factory=dict)
    begins: bool = False
    ends: bool = False
    space_prefix: bool | None = None
    template: str | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, size: int, header: Callable[[], GGUFWriter]) -> Vocabulary:
    """Read a folder's tokenizer for ``size`` rows of an embedding, compared with llama.cpp's reading of it.

    Args:
        folder: with tokenizer.json.
        size: tokens of the model; the tokenizer may have less.
        header: makes a writer with the architecture's metadata.

    Raises:
        ValueError: there is none, GGUF cannot hold it, or llama.cpp makes other tokens of some text.
        ImportError: llama.cpp's library is not installed.
    """
    try:
        file = checked_file(folder / "tokenizer.json")
        content = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no tokenizer.json, of which a GGUF file holds a copy: save it there") from None
    try:
        tokenizer = Tokenizer.from_str(read_text(file, 1 << 28, follow=True))
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(f"{file} cannot be read by tokenizers: {one_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = _content(content, tokenizer, size, file)
    _add_special(vocabulary, folder, tokenizer, content, file)
    texts = list(_texts(tokenizer, vocabulary.model))
    differing: str | None = None
    for pre in _CUTS if vocabulary.model == "gpt2" else ("default",):
        vocabulary.pre = pre
        differing = _differing(vocabulary, header, tokenizer, texts)
        if differing is None:
            return vocabulary
    raise ValueError(f"{file}: llama.cpp makes other tokens than tokenizers of {differing!r}: GGUF cannot hold it")


def _content(content: dict[str, Any], tokenizer: Any, size: int, file: Path) -> Vocabulary:
    """Tokens, types, scores and merges by the kind of model."""
    model = content["model"]
    kind, parts = model.get("type"), list(_parts(content))
    if kind == "WordPiece" and model.get("continuing_subword_prefix") == "##":
        make: Callable[..., Vocabulary] = _word_pieces
    elif kind == "BPE" and "ByteLevel" in parts:
        make = _byte_pairs
    elif kind == "BPE" and model.get("byte_fallback"):
        make = _sentence_pieces
    else:
        raise ValueError(
            f"{file}: GGUF files are written with BPE on bytes, BPE of SentencePiece with byte_fallback, or WordPiece; "
            f"got {kind} with {', '.join(dict.fromkeys(parts)) or 'nothing else'}"
        )
    names = tokenizer.get_vocab(with_added_tokens=True)
    if names and max(names.values()) >= size:
        raise ValueError(f"{file} has a token of number {max(names.values())}, the model has {size} tokens")
    tokens = {index: name for name, index in names.items()}
    types = [TokenType.NORMAL if index in tokens else TokenType.UNUSED for index in range(size)]
    for index, added in tokenizer.get_added_tokens_decoder().items():
        types[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return make(model, [tokens.get(index, f"[PAD{index}]") for index in range(size)], types, content)


def _byte_pairs(model: dict[str, Any], tokens: list[str], types: list[int], content: dict[str, Any]) -> Vocabulary:
    return Vocabulary("gpt2", tokens, types, merges=[" ".join(pair) for pair in _pairs(model)])


def _sentence_pieces(model: dict[str, Any], tokens: list[str], types: list[int], content: dict[str, Any]) -> Vocabulary:
    """llama.cpp merges what gives the token of the highest score: the first merge that makes it says how high."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for index, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x"):
            types[index] = TokenType.BYTE
        elif token == model.get("unk_token"):
            types[index] = TokenType.UNKNOWN
    prefix = any(
        part.get("type") == "Prepend" or part.get("prepend_scheme") in ("first", "always")
        for part in _steps(content, "normalizer", "pre_tokenizer")
    )
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix)


def _word_pieces(model: dict[str, Any], tokens: list[str], types: list[int], content: dict[str, Any]) -> Vocabulary:
    """llama.cpp marks where a word begins, in place of where it goes on."""
    normal = [kind == TokenType.NORMAL for kind in types]
    marked = [
        token if not plain else token[2:] if token.startswith("##") and token != "##" else _SPACE_MARK + token
        for token, plain in zip(tokens, normal, strict=True)
    ]
    return Vocabulary("bert", marked, types)


def _pairs(model: dict[str, Any]) -> Iterator[list[str]]:
    return (merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or ())


def _steps(content: dict[str, Any], *names: str) -> Iterator[dict[str, Any]]:
    """The steps of normalizer, pre_tokenizer and decoder, those in sequences one by one."""
    level = [content.get(name) for name in names]
    while level:
        step = level.pop(0)
        if isinstance(step, dict):
            level += [inner for value in step.values() if isinstance(value, list) for inner in value]
            yield step


def _parts(content: dict[str, Any]) -> Iterator[str]:
    return (step["type"] for step in _steps(content, "normalizer", "pre_tokenizer", "decoder") if "type" in step)


def _add_special(vocabulary: Vocabulary, folder: Path, tokenizer: Any, content: dict[str, Any], file: Path) -> None:
    """Numbers of special tokens, which of them begin and end each text, and the chat template."""
    settings, config = (_optional(folder / name) for name in ("tokenizer_config.json", "config.json"))
    for name, other in _SPECIAL.items():
        index = next(filter(lambda one: one is not None, _numbers(name, other, settings, config, tokenizer)), None)
        if index is not None and 0 <= index < len(vocabulary.tokens):
            vocabulary.special[name] = index
    plain, whole = (tokenizer.encode("word", add_special_tokens=special).ids for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    first, last = whole[:start], whole[start + len(plain) :]
    if len(first) > 1 or len(last) > 1:
        raise ValueError(f"{file} puts {len(first)} tokens before a text and {len(last)} after it: GGUF holds one each")
    vocabulary.begins, vocabulary.ends = bool(first), bool(last)
    vocabulary.special |= {name: ids[0] for name, ids in (("bos", first), ("eos", last)) if ids}
    try:
        vocabulary.template = read_text(checked_file(folder / "chat_template.jinja"), follow=True)
    except FileNotFoundError:
        template = settings.get("chat_template")
        vocabulary.template = template if isinstance(template, str) else None


def _numbers(name: str, other: str | None, settings: Any, config: Any, tokenizer: Any) -> Iterator[int | None]:
    for one in filter(None, (name, other)):
        token = settings.get(f"{one}_token")
        text = token.get("content") if isinstance(token, dict) else token
        yield tokenizer.token_to_id(text) if isinstance(text, str) else None
        number = config.get(f"{one}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        yield number if isinstance(number, int) else None


def _optional(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def _texts(tokenizer: Any, model: str) -> Iterator[str]:
    """Fixed texts, and the tokenizer's own tokens side by side, whose borders another cut would move."""
    yield from _TEXTS if model == "bert" else (*_TEXTS, _HANGUL)
    names = tokenizer.get_vocab(with_added_tokens=False)
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ids = sorted(names.values())
    words = [tokenizer.decode([index]) for index in ids[:: max(1, len(ids) // _TOKENS_TRIED)]]
    line = [word for word in words if word.isascii() and (word.isprintable() or word.isspace())]
    for start in range(0, len(line), 50):
        # tokenizers takes a word of more than a hundred letters for unknown
        text = (" " if model == "bert" else "").join(line[start : start + 50])
        if not any(token in text for token in added):
            yield text


def _differing(vocabulary: Vocabulary, header: Callable[[], GGUFWriter], tokenizer: Any, texts: Any) -> str | None:
    """The first text of which llama.cpp makes other tokens; None if there is none."""
    handle, name = tempfile.mkstemp(suffix=".gguf")
    os.close(handle)
    path = Path(name)
    try:
        writer = header()
        vocabulary.add_to(writer)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return _compare(path, tokenizer, texts)
    finally:
        path.unlink()


def _compare(path: Path, tokenizer: Any, texts: Iterable[str]) -> str | None:
    with engine(path, vocab_only=True) as (ffi, library, model, _):
        if model == ffi.NULL:
            return next(iter(texts))
        vocabulary = library.llama_model_get_vocab(model)
        for text in texts:
            data = text.encode()
            room = ffi.new("llama_token[]", 2 * len(data) + 16)
            count = library.llama_tokenize(vocabulary, data, len(data), room, len(room), True, False)
            if list(room[0 : max(count, 0)]) != tokenizer.encode(text).ids:
                return text
        return None


@contextmanager
def engine(path: Path, **settings: bool) -> Iterator[tuple[Any, Any, Any, list[str]]]:
    """Context manager: llama.cpp opens a file, with its log off.

    Args:
        settings: fields of ``llama_model_params``.

    Returns:
        What describes its functions, the library, the model, which is NULL where the file is refused, and its errors.

    Raises:
        ImportError: llama.cpp's library is not installed.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        raise ImportError(f"GGUF files need the package llama-cpp-py-sync: {INSTALL}") from error
    ffi, library = get_ffi(), get_lib()
    before, data, errors = ffi.new("ggml_log_callback *"), ffi.new("void **"), []

    def note(level: int, text: Any, _: Any) -> None:
        if level == library.GGML_LOG_LEVEL_ERROR:
            errors.append(ffi.string(text).decode("utf-8", "replace"))

    quiet = ffi.callback("ggml_log_callback", note)
    library.llama_log_get(before, data)
    library.llama_log_set(quiet, ffi.NULL)
    try:
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.load_mode = library.LLAMA_LOAD_MODE_NONE
        for name, value in settings.items():
            setattr(parameters, name, value)
        model = library.llama_model_load_from_file(str(path).encode(), parameters)
        try:
            yield ffi, library, model, errors
        finally:
            if model != ffi.NULL:
                library.llama_model_free(model)
    finally:
        library.llama_log_set(before[0], data[0])
