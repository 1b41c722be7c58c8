"""A task of the evaluation harness from any text: which of four continuations is the true one?"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

BEGIN, CONTINUATION, CHOICES = 24, 12, 4  # words, words, continuations of which one is true
_TASK = """\
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: begin
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(documents: Sequence[str], questions: int, folder: Path) -> Path:
    """Write questions about places spread evenly over documents; wrong continuations are those of other places."""
    words, draw = " ".join(documents).split(), random.Random(0)
    size = BEGIN + CONTINUATION
    if questions < CHOICES or questions * size > len(words):
        raise ValueError(f"{len(words):,} words hold from {CHOICES} to {len(words) // size:,} questions")
    begins = [index * (len(words) - size) // (questions - 1) for index in range(questions)]
    ends = [" ".join(words[begin + BEGIN : begin + size]) for begin in begins]
    folder.mkdir(parents=True, exist_ok=True)
    file, task = folder.absolute() / "questions.jsonl", folder / "continuations.yaml"
    rows = []
    for index, begin in enumerate(begins):
        choices = draw.sample(ends[:index] + ends[index + 1 :], CHOICES - 1)
        answer = draw.randrange(CHOICES)
        choices.insert(answer, ends[index])
        rows.append({"begin": " ".join(words[begin : begin + BEGIN]), "choices": choices, "answer": answer})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task.write_text(_TASK.format(data=json.dumps(str(file))), encoding="utf-8")
    return task
