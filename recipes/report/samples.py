"""Let the trained model continue held-out texts, for a reader's first impression."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from leanstep.pruning.folder.loading import open_model, open_tokenizer
from leanstep.recipes.data.chat import stop_tokens
from leanstep.recipes.data.sequences import IGNORED
from leanstep.recipes.data.tokens import decode_halves

TEMPERATURE = 0.8
_SAMPLES = 3
_LONGEST_PROMPT = 512  # tokens of a prompt of fine-tuning data
_PROMPT_TOKENS, _NEW_TOKENS = 16, 64


def held_out_prompts(
    validation: Dataset,
    end_of_text: int,
    starts_word: Callable[[int], bool] = lambda token: True,
    begin: Sequence[int] = (),
) -> list[list[int]]:
    """Return the first tokens of up to three validation sequences, spread evenly; ``[end_of_text]`` if there are none.

    A prompt has at most 16 tokens, and none is padding or ``end_of_text``. It begins and ends with a whole word, as far
    as ``starts_word`` tells, after the tokens ``begin`` of every sequence. Where the first tokens
    have no labels, as in fine-tuning data, they are the prompt, up to 512.
    """
    length = len(validation)  # type: ignore[arg-type]
    count = min(_SAMPLES, length)
    prompts = []
    for number in range(count):
        sequence = validation[number * length // count]
        is_learned = sequence["labels"] != IGNORED
        first = int(is_learned.nonzero()[0]) if is_learned.any() else 0
        # a packed sequence without a prompt has no label at its first token only, or at the begin of text
        if first > max(1, len(begin)):
            prompts.append(sequence["input_ids"][:first][-_LONGEST_PROMPT:].tolist())
            continue
        tokens = [token for token in sequence["input_ids"][is_learned].tolist() if token != end_of_text]
        if words := _whole_words(tokens, starts_word):
            prompts.append([*begin, *words])
    return prompts or [[end_of_text]]


def _whole_words(tokens: list[int], starts_word: Callable[[int], bool]) -> list[int]:
    """The first 16 tokens without the rest of a word before them and the begin of one at their end."""
    begin = next((index for index, token in enumerate(tokens[:_PROMPT_TOKENS]) if starts_word(token)), 0)
    end = begin + _PROMPT_TOKENS
    if end < len(tokens):
        end = next((index for index in range(end, begin, -1) if starts_word(tokens[index])), end)
    return tokens[begin:end]


def word_starts(tokenizer: Any) -> Callable[[int], bool]:
    """Whether a token of a byte-level or sentencepiece vocabulary begins a word."""
    return lambda token: str(tokenizer.convert_ids_to_tokens(token)).startswith(("\u0120", "\u2581", " "))


def sample(
    folder: Path, prompts: list[list[int]], seed: int, device: torch.device, *, answers: bool = False
) -> Iterator[str]:
    """Continue each prompt by 64 tokens with the model in ``folder``; yield one paragraph each, ``[prompt] text``.

    The model cannot answer with its end-of-text token, so that no paragraph is blank. With ``answers`` it ends a turn
    as it was trained to, and the paragraph is the conversation, the answer on lines of its own. Prompt and text are cut
    to the model's positions. The result depends on ``seed`` and device only; torch's random state stays as it was.
    """
    model: Any = open_model(folder, finite=False).to(device).eval()
    tokenizer = open_tokenizer(folder)
    ends = stop_tokens(model, tokenizer) if answers else None
    stops = {"eos_token_id": ends} if ends else {"suppress_tokens": [tokenizer.eos_token_id]}
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", _PROMPT_TOKENS + _NEW_TOKENS)

    def continued(prompt: list[int]) -> str:
        start = torch.tensor([prompt[: max(positions // 2, 1)]], device=device)
        tokens: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=min(_NEW_TOKENS, positions - start.shape[1]),
            do_sample=True,
            temperature=TEMPERATURE,
            **stops,
            pad_token_id=tokenizer.eos_token_id,
        )
        begin, end = decode_halves(tokenizer, tokens[0], start.shape[1])
        if answers:
            return f"{begin.strip()}\n{end.strip()}"
        return f"[{begin.strip()}]{end.rstrip()}" if begin.strip() else end.strip()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield from map(continued, prompts)
