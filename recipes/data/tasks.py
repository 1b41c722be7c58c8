"""Tasks of EleutherAI's evaluation harness (``lm_eval``): questions whose answers judge a language model."""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from leanstep._files import one_line
from leanstep._process import lacks_memory
from leanstep.recipes.data.cache import require
from leanstep.recipes.data.hub import offline, unreachable


@dataclass(frozen=True)
class Score:
    """A metric of a task, or of a group of tasks.

    ``stderr`` is the standard error over the questions, None where the harness has none. ``shots`` is the number of
    solved examples before a question, None for a group whose tasks differ.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    questions: int


class Tasks:
    """Tasks by their names in the harness, or from YAML files of its format.

    Args:
        names: names of tasks, groups and tags, and paths of YAML files. A file may name Python code, which runs.
        shots: solved examples before each question; None: as the task says. A task that says 0 has none, whatever is
            asked for, as in the harness's own command.
        limit: questions of each task, the first ones; None: all.

    Raises:
        ModuleNotFoundError: the harness is not installed.
        ValueError: no task has a name, or it cannot be loaded.
        ConnectionError: the data of a task are neither here nor, without the hub, to be had.
    """

    def __init__(self, names: Sequence[str], shots: int | None = None, limit: int | None = None) -> None:
        require("lm_eval", "'leanstep[tasks]'")
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.tasks import TaskManager

        self.limit, self.cut = limit, 0
        # reading the harness's own files, thousands, takes ten seconds
        manager = TaskManager(include_defaults=not all(map(_is_file, names)))
        if not names:
            raise ValueError("no task is named; give names such as hellaswag,arc_easy, or a YAML file")
        for name in names:
            if name.endswith(_FILES) and not _is_file(name):
                raise ValueError(f"the task {name}: there is no such file")
            if not (_is_file(name) or name in manager.all_tasks):
                near = "".join(f"did you mean {match}? " for match in get_close_matches(name, manager.all_tasks, 1))
                raise ValueError(
                    f"no task is named '{name}'; {near}`lm_eval ls tasks` lists them, and a YAML file can hold one"
                )
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        reason = unreachable()
        for name in names:
            with offline() if reason else contextlib.nullcontext(), _harness(name, reason):
                for kind, entries in manager.load([name]).items():
                    self._loaded[kind] |= entries
        for task in self._loaded["tasks"].values():
            preset = task.get_config("num_fewshot")
            if preset != 0 and (shots is not None or preset is None):
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    def evaluate(
        self, model: Any, tokenizer: Any, batch_size: int, progress: Callable[[int, int], object]
    ) -> list[Score]:
        """Evaluate a model of transformers on the device where it is.

        :attr:`cut` is then the number of prompts that were cut at their begin, to fit the model's positions.
        """
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM

        with _harness(", ".join(self._loaded["tasks"])) as printed:
            tokenizer.model_max_length = int(1e30)  # without a warning: positions of the model are what cuts a prompt
            model_of_harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            model_of_harness.set_cache_hook(_Answered(self._loaded["tasks"].values(), progress))
            results = evaluator.evaluate(model_of_harness, self._loaded, limit=self.limit, log_samples=False)
        self.cut = printed.getvalue().count("Truncating")
        return [*_scores(results)]


_FILES = (".yaml", ".yml")


def _is_file(name: str) -> bool:
    return name.endswith(_FILES) and Path(name).is_file()


class _Answered:
    """Counts answers, where the harness would store them in a cache."""

    def __init__(self, tasks: Any, progress: Callable[[int, int], object]) -> None:
        self._tasks, self._progress, self._done = tasks, progress, 0

    def add_partial(self, *answer: Any) -> None:
        self._done += 1
        self._progress(self._done, sum(len(task.instances) for task in self._tasks))


@contextlib.contextmanager
def _harness(names: str, unreachable: str | None = None) -> Iterator[io.StringIO]:
    """Run code of the harness and of tasks: yields what it prints and logs, and turns its errors into one line."""
    printed, logger = io.StringIO(), logging.getLogger("lm_eval")
    handler = logging.StreamHandler(printed)
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            yield printed
    except Exception as error:
        if lacks_memory(error):
            raise
        if unreachable and isinstance(error, ConnectionError):
            raise ConnectionError(
                f"the task {names} needs the network once, to load its data, and the hub cannot be reached "
                f"({unreachable}); a task in a YAML file may have its data in files"
            ) from error
        raise ValueError(f"the task {names}: {type(error).__name__}: {one_line(error)[:300]}") from error
    finally:
        logger.removeHandler(handler)


def _scores(results: Any) -> Iterator[Score]:
    for task, numbers in {**results["results"], **results.get("groups", {})}.items():
        for key, value in numbers.items():
            metric, _, selection = key.partition(",")
            if not selection or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = numbers.get(f"{metric}_stderr,{selection}")
            yield Score(
                task=task,
                metric=metric if selection == "none" else f"{metric} ({selection})",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                shots=results["n-shot"].get(task),
                questions=numbers["sample_len"],
            )
