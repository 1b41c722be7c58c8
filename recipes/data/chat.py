"""Fine-tuning data: JSON lines with ``messages``, or ``prompt`` and ``completion``; the loss is on the answers only.

The tokenizer's chat template renders messages, and the assistant's messages are the answers. Two texts are the prompt,
and the completion with the end-of-text token; two lists of messages are a conversation that ends in its answers. The
template gets the row's ``tools`` and ``chat_template_kwargs``. An answer with ``weight`` 0 is a prompt.
"""

import gzip
import inspect
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from leanstep._files import one_line
from leanstep.pruning.folder.loading import begin_tokens
from leanstep.recipes.data.sequences import IGNORED, LoadedData, checked_index, padding
from leanstep.recipes.data.sources import find_files
from leanstep.recipes.data.tokens import open_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from leanstep.recipes.config.schema import DataConfig

_EXPECTED = "expected 'messages', or 'prompt' and 'completion'"
_ANSWERS = "assistant"  # the role whose messages are answers
_JSON_NAMES = {list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Example:
    """A tokenised line: ``tokens`` int64 ``[n]``, and ``is_answer`` bool ``[n]``, True where a token is learned."""

    tokens: np.ndarray
    is_answer: np.ndarray


class ChatSequences(Dataset):
    """Sequences of ``seq_len`` tokens, each of one or, with ``packing``, several whole examples, padded on the right.

    Item i is ``{"input_ids": int64 [seq_len], "labels": int64 [seq_len]}``. Labels are -100 where nothing is learned:
    prompts, padding, and the first token of each example, which would be predicted from another example. Packed
    examples see those before them in the sequence, as packed documents do.
    """

    def __init__(self, examples: Sequence[Example], seq_len: int, *, pad_id: int, packing: bool) -> None:
        self.examples, self.seq_len, self.pad_id = examples, seq_len, pad_id
        self.rows = _packed([len(example.tokens) for example in examples], seq_len if packing else 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = [self.examples[number] for number in self.rows[checked_index(index, len(self))]]
        input_ids = torch.full((self.seq_len,), self.pad_id, dtype=torch.int64)
        labels = torch.full((self.seq_len,), IGNORED, dtype=torch.int64)
        begin = 0
        for example in row:
            tokens = torch.from_numpy(example.tokens)
            span = slice(begin, begin + len(tokens))
            input_ids[span] = tokens
            is_learned = torch.from_numpy(example.is_answer).clone()
            is_learned[0] = False
            labels[span] = torch.where(is_learned, tokens, IGNORED)
            begin += len(tokens)
        return {"input_ids": input_ids, "labels": labels}


def _packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Fill rows of ``room`` tokens with neighbouring examples, in order; one example a row if ``room`` is 0."""
    rows: list[list[int]] = []
    free = 0
    for number, length in enumerate(lengths):
        if length <= free:
            rows[-1].append(number)
            free -= length
        else:
            rows.append([number])
            free = room - length
    return rows


def load_chat(config: "DataConfig") -> LoadedData:
    """Load fine-tuning data. See :func:`leanstep.recipes.data.sequences.load_data`.

    Examples are cut to ``seq_len`` tokens; those without an answer in them are left out. The last examples, with at
    least ``val_tokens`` tokens, are held out unless ``val_path`` names another file. Memory: 9 bytes per token.

    Raises:
        ValueError: a line that is no example, a tokenizer without chat template for messages, or too few examples.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    train, cut = _read(str(config.path), "data.path", tokenizer, config.seq_len)
    facts = {"data": f"chat {config.path}: {_count(train)}"}
    if config.val_path:
        validation, also_cut = _read(config.val_path, "data.val_path", tokenizer, config.seq_len)
        cut += also_cut
    else:
        train, validation = _hold_out(train, config)
    if not train:
        raise ValueError(
            f"data: '{config.path}' has no example to train on: no answer lies within data.seq_len {config.seq_len} "
            "tokens, or data.val_tokens holds out all of them"
        )
    pad_id = padding(tokenizer)
    datasets = [
        ChatSequences(part, config.seq_len, pad_id=pad_id, packing=config.packing) for part in (train, validation)
    ]
    facts["tokenizer"] = f"{config.tokenizer}, {len(tokenizer):,} tokens"
    facts["training"] = f"{_count(train)}, {len(datasets[0]):,} sequences of {config.seq_len} tokens"
    facts["validation"] = f"{_count(validation)}, {len(datasets[1]):,} sequences" if validation else "none"
    if cut["answers"]:
        facts["cut"] = f"{cut['answers']:,} examples lose part of their answers, behind {config.seq_len} tokens"
    if cut["examples"]:
        facts["left out"] = f"{cut['examples']:,} examples without an answer in their first {config.seq_len} tokens"
    return LoadedData(
        tokenizer,
        datasets[0],
        datasets[1],
        None,
        facts=facts,
        identity={"tokenizer": tokenizer_fingerprint(tokenizer), "text": _identity(train)},
        largest_id=max(int(example.tokens.max()) for example in [*train, *validation]),
    )


def holds_conversations(path: str, text_key: str) -> bool:
    """Whether a file's first line is an example of these, without a column of texts."""
    try:
        row = json.loads(next(_lines(Path(path).expanduser()))) if path.endswith((".jsonl", ".jsonl.gz")) else None
    except (OSError, ValueError, StopIteration, RecursionError):
        return False  # its reader says what is wrong
    keys = {*row} if isinstance(row, dict) else set()
    return text_key not in keys and ("messages" in keys or {"prompt", "completion"} <= keys)


def load_answers(path: str, tokenizer: Any, seq_len: int, *, packing: bool) -> tuple[ChatSequences, str]:
    """Return the examples of a file, cut to ``seq_len`` tokens, and their description. Raises ValueError as above."""
    examples, cut = _read(path, "data.val_path", tokenizer, seq_len)
    if not examples:
        raise ValueError(f"data.val_path: no answer in '{path}' lies within {seq_len} tokens; give --seq-len")
    dataset = ChatSequences(examples, seq_len, pad_id=padding(tokenizer), packing=packing)
    return dataset, f"chat {path}: {_count(examples)}; {cut['answers']:,} cut, {cut['examples']:,} left out"


def _count(examples: Sequence[Example]) -> str:
    tokens = sum(len(example.tokens) for example in examples)
    answers = sum(int(example.is_answer.sum()) for example in examples)
    return f"{len(examples):,} examples, {tokens:,} tokens, {answers:,} of them in answers"


def _identity(examples: Sequence[Example]) -> str:
    checksum = 0
    for example in examples:
        checksum = zlib.crc32(example.is_answer.tobytes(), zlib.crc32(example.tokens.tobytes(), checksum))
    return f"{_count(examples)}, CRC-32 {checksum:08x}"


def _hold_out(examples: list[Example], config: "DataConfig") -> tuple[list[Example], list[Example]]:
    """Split off the last examples, with at least ``val_tokens`` tokens."""
    held_out, first = 0, len(examples)
    while held_out < config.val_tokens and first:
        first -= 1
        held_out += len(examples[first].tokens)
    if held_out < config.val_tokens or (config.val_tokens and not first):
        raise ValueError(
            f"data.val_tokens: {config.val_tokens:,} tokens cannot be held out from '{config.path}', which has "
            f"{sum(len(example.tokens) for example in examples):,} tokens in all; lower it, or give data.val_path"
        )
    return examples[:first], examples[first:]


def _read(
    path: str, key: str, tokenizer: "PreTrainedTokenizerFast", seq_len: int
) -> tuple[list[Example], Counter[str]]:
    """Return the examples of a file, folder or glob, cut to ``seq_len``, and how many lost "answers" or all of them."""
    examples, lost = [], Counter[str]()
    for where, row in read_rows(path, key):
        example = encode_row(row, where, tokenizer)
        # copies: a view would keep the whole example in memory
        cut = Example(example.tokens[:seq_len].copy(), example.is_answer[:seq_len].copy())
        if cut.is_answer[1:].any():
            examples.append(cut)
            lost["answers"] += bool(example.is_answer[seq_len:].any())
        else:
            lost["examples"] += 1
    if not examples and not lost:
        raise ValueError(f"{key}: '{path}' is empty; training needs examples, one JSON object a line")
    return examples, lost


def read_rows(path: str, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (``FILE:LINE``, row) of the lines that are not blank. Raises ValueError for a line that is no example."""
    for file in find_files(path, "chat", key):
        for number, line in enumerate(_lines(file), start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON: {one_line(error)[:200]}; expected one object a line") from None
            _check_row(row, where)
            if "\\ud" in line.lower():
                _check_unicode(row, where)
            yield where, row


def _lines(file: Path) -> Iterator[str]:
    for number, line in enumerate(_byte_lines(file), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}:{number}: not UTF-8 text: {error.reason}") from None


def _byte_lines(file: Path) -> Iterator[bytes]:
    if file.suffix != ".gz":
        with file.open("rb") as lines:
            yield from lines
        return
    with gzip.open(file, "rb") as lines:
        try:
            yield from lines
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{file} is damaged: {one_line(error)}; copy or download it again") from None


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {_EXPECTED} in an object, got {type(row).__name__}")
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        if not isinstance(row.get(key), kind | None):
            raise ValueError(f"{where}: {key}: expected {_JSON_NAMES[kind]}, got {one_line(repr(row[key]))[:60]}")
    if "messages" in row:
        _check_messages(row["messages"], f"{where}: messages")
        if not any(_is_answer(message) for message in row["messages"]):
            raise ValueError(
                f"{where}: no message has the role '{_ANSWERS}' and a weight other than 0, so there is nothing to learn"
            )
        return
    if not {"prompt", "completion"} <= row.keys():
        keys = one_line(", ".join(map(str, row)))[:200]
        raise ValueError(f"{where}: {_EXPECTED}, got the keys {keys or 'of an empty object'}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_messages(prompt, f"{where}: prompt")
        _check_messages(completion, f"{where}: completion")
    elif not (isinstance(prompt, str) and isinstance(completion, str)):
        raise ValueError(f"{where}: 'prompt' and 'completion' must be two texts or two lists of messages")


def _check_unicode(row: dict[str, Any], where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{where}: its values are nested too deeply; {_EXPECTED}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(f"{where}: the text has half of a surrogate pair, {half}; remove it") from None


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: expected a list of messages, got {one_line(repr(messages))[:60]}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: expected objects with 'role' and 'content', got {one_line(repr(message))[:60]}")
        if message.get("weight") not in (None, 0, 1):
            raise ValueError(f"{where}: weight: expected 0 or 1, got {one_line(repr(message['weight']))[:60]}")


def _is_answer(message: dict[str, Any]) -> bool:
    return bool(message["role"] == _ANSWERS and message.get("weight") != 0)


def encode_row(row: dict[str, Any], where: str, tokenizer: "PreTrainedTokenizerFast") -> Example:
    """Tokenise a row and mark its answers. Raises ValueError, with ``where``, if the chat template cannot render it."""
    if "messages" not in row and isinstance(row["prompt"], str):
        prompt = [*begin_tokens(tokenizer), *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return Example(np.array(prompt + answer, np.int64), np.repeat([False, True], [len(prompt), len(answer)]))
    if "messages" in row:
        messages = row["messages"]
        answers = [index for index, message in enumerate(messages) if _is_answer(message)]
    else:
        messages = [*row["prompt"], *row["completion"]]
        answers = [index for index in range(len(row["prompt"]), len(messages)) if messages[index].get("weight") != 0]
    variables = row.get("chat_template_kwargs") or {}
    if reserved := sorted(variables.keys() & inspect.signature(tokenizer.apply_chat_template).parameters):
        raise ValueError(
            f"{where}: chat_template_kwargs: expected variables of the template, got {reserved[0]!r}, an argument of "
            "transformers' apply_chat_template"
        )
    settings = variables | ({"tools": row["tools"]} if row.get("tools") else {})
    text, spans = render(messages, answers, where, tokenizer, settings)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    is_answer = np.zeros(len(starts), bool)
    for begin, end in spans:
        is_answer |= (starts >= begin) & (starts < end)
    return Example(np.array(encoded["input_ids"], np.int64), is_answer)


def render(
    messages: list[dict[str, Any]],
    answers: Sequence[int],
    where: str,
    tokenizer: "PreTrainedTokenizerFast",
    settings: dict[str, Any],
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation by the chat template; return the text and the (begin, end) of the answers in it.

    The template gets ``settings``, such as ``tools``; one that has no use for tools is refused.

    An answer begins where the template would let the model begin, and ends where its message ends, with the token that
    ends a turn.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where}: data.tokenizer '{tokenizer.name_or_path}' has no chat template, which messages need; take the "
            "tokenizer of a chat model, or write 'prompt' and 'completion' as texts"
        )

    def rendered(count: int, *, asks: bool = False, **changes: Any) -> str:
        options = {"tokenize": False, "add_generation_prompt": asks, **settings, **changes}
        return str(tokenizer.apply_chat_template(messages[:count], **options))

    try:
        text = rendered(len(messages))
        if "tools" in settings and rendered(len(messages), tools=None) == text:
            raise ValueError(
                f"{where}: the chat template of '{tokenizer.name_or_path}' does not show tools, so the model would "
                "learn calls of tools that it is not told of; take the tokenizer of a model for tools, or remove "
                "'tools'"
            )
        spans = []
        for index in answers:
            begin, end = rendered(index, asks=True) if index else "", rendered(index + 1)
            if not end.startswith(begin) or not text.startswith(end):
                raise ValueError(
                    f"{where}: the chat template of '{tokenizer.name_or_path}' changes earlier messages, so the "
                    "answers cannot be told from the prompts; give each answer a line of its own"
                )
            spans.append((len(begin), len(end)))
    except ValueError:
        raise
    except Exception as error:  # jinja2's, and whatever the template's own functions raise
        raise ValueError(f"{where}: the chat template cannot render it: {one_line(error)[:200]}") from error
    return text, spans


def render_talk(tokenizer: Any, messages: list[dict[str, str]], *, asks: bool) -> str:
    """Render a conversation for a model to answer (``asks``), or as it was. Raises ValueError if the template fails."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # jinja2's, and whatever the template's own functions raise
        reason = f"the chat template cannot render the conversation: {one_line(error)[:200]}"
        raise ValueError(f"{tokenizer.name_or_path}: {reason}") from error


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and the one that the template puts behind it."""
    stops, after = model.generation_config.eos_token_id, []
    if tokenizer.chat_template:
        answer = "an answer"
        talk = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        _, _, end = render_talk(tokenizer, talk, asks=False).rpartition(answer)
        after = tokenizer(end, add_special_tokens=False)["input_ids"]
    ends = [token for token in after if token in tokenizer.added_tokens_decoder]
    listed = [stops] if isinstance(stops, int) else stops or []
    return sorted({*listed, *ends[:1], tokenizer.eos_token_id} - {None})
