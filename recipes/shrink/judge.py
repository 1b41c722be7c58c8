"""``--eval-tasks`` of ``leanstep prune`` and ``compress``: tasks of the dense model and of the written one."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from leanstep._files import table_lines
from leanstep.recipes.report.progress import ProgressBar

if TYPE_CHECKING:
    from leanstep.recipes.data.tasks import Tasks


def load_tasks(options: argparse.Namespace) -> "Tasks":
    """The tasks of the command, loaded before the model is changed."""
    from leanstep.recipes.data.tasks import Tasks

    return Tasks([name for name in options.eval_tasks.split(",") if name], limit=options.eval_limit)


def judge(tasks: "Tasks", options: argparse.Namespace, bar: ProgressBar) -> list[dict[str, Any]]:
    """Evaluate both models on the device of the command, and write the rows into the report of ``--out``.

    A row is a :class:`~leanstep.recipes.data.tasks.Score` of the dense model, ``before``, and the same ``after``.
    """
    from leanstep._checkpoint.files import read_json
    from leanstep.pruning.folder.checkpoint import SIDECAR, write_report
    from leanstep.pruning.folder.loading import open_tokenizer

    tokenizer = open_tokenizer(options.checkpoint)
    before, after = (_scores(tasks, folder, tokenizer, options, bar) for folder in (options.checkpoint, options.out))
    rows = [{"before": old, "after": new} for old, new in zip(before, after, strict=True)]
    write_report(read_json(options.out / SIDECAR) | {"tasks": rows}, options.out)
    return rows


def _scores(tasks: "Tasks", folder: Any, tokenizer: Any, options: argparse.Namespace, bar: ProgressBar) -> list[Any]:
    from leanstep.pruning.folder.loading import open_model
    from leanstep.recipes.evaluate import find_device

    model: Any = open_model(folder)
    model.to(find_device(options.device)).eval()
    scores = tasks.evaluate(model, tokenizer, options.batch_size, lambda done, all_of: bar(done, all_of, "tasks"))
    return [asdict(score) for score in scores]


def task_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as a table."""
    from leanstep.pruning.folder.report import TASKS, task_rows

    return table_lines([TASKS, *task_rows(rows)])
