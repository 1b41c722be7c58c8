"""The trackers of a run (Weights & Biases, MLflow, ...), by Accelerate; a resumed run goes on in its own record."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from leanstep._files import one_line, parse_json, read_text, write_text

_FILE = "trackers.json"  # in the run folder: tracker -> the id of its record


class _Record(NamedTuple):
    """How a tracker names the record of a run.

    Attributes:
        begin: its arguments for a new record, given the run's name.
        resume: its arguments for the record of an id.
        id_of: the id of the record that a tracker writes.
    """

    begin: Callable[[str], dict[str, Any]]
    resume: Callable[[str], dict[str, Any]]
    id_of: Callable[[Any], str]


# Accelerate's names, as far as tried; TensorBoard's record is a folder in the run's. Others begin a new record.
_RECORDS = {
    "wandb": _Record(lambda name: {"name": name}, lambda id: {"id": id, "resume": "allow"}, lambda t: t.run.id),
    "trackio": _Record(
        lambda name: {"name": name}, lambda name: {"name": name, "resume": "allow"}, lambda t: t.run.name
    ),
    "mlflow": _Record(lambda name: {"run_name": name}, lambda id: {"run_id": id}, lambda t: t.active_run.info.run_id),
}


class Trackers:
    """The trackers of a run. One that fails is told once and gets nothing more; the run goes on.

    Accelerate opens them in the first process only; the other processes may call all methods.
    """

    def __init__(self, accelerator: Accelerator, say: Callable[[str], object]) -> None:
        self._accelerator, self._say = accelerator, say
        self._threads_hook = threading.excepthook

    def open(self, project: str, name: str, settings: Mapping[str, Any], folder: Path, *, is_new: bool) -> None:
        """Start the trackers of the accelerator.

        ``folder`` keeps the ids of their records. A run that is not new goes on in these; one without an id there
        begins a record. Settings are given to new records alone: MLflow refuses others for an old one.
        """
        _hide_errors_of_writing_threads()
        accelerator, ids = self._accelerator, {} if is_new else _read(folder / _FILE)
        asked, opened = list(accelerator.log_with), []
        for tracker in asked:
            kind = str(getattr(tracker, "value", tracker))
            record, id = _RECORDS.get(kind), ids.get(kind)
            arguments = {} if record is None else record.begin(name) if id is None else record.resume(id)
            accelerator.log_with, accelerator.trackers = [tracker], []
            try:
                accelerator.init_trackers(project, None if id else dict(settings), {kind: arguments})
                if record is not None and accelerator.is_main_process:
                    ids[kind] = str(record.id_of(accelerator.trackers[0]))
            except Exception as error:  # each package has classes of its own, for a missing key or a network
                self._give_up(kind, error)
                continue
            opened += accelerator.trackers
        accelerator.log_with, accelerator.trackers = asked, opened
        if ids and accelerator.is_main_process:
            write_text(folder / _FILE, json.dumps(ids) + "\n")

    def log(self, numbers: Mapping[str, Any], step: int) -> None:
        """Give every tracker the numbers that are not None."""
        values = {key: value for key, value in numbers.items() if value is not None}
        self._each(lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._accelerator.is_main_process:
            self._each(lambda tracker: tracker.finish())
        self._accelerator.trackers = []
        threading.excepthook = self._threads_hook

    def _each(self, call: Callable[[Any], object]) -> None:
        for tracker in list(self._accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:  # as above
                self._accelerator.trackers.remove(tracker)
                self._give_up(tracker.name, error)

    def _give_up(self, kind: str, error: Exception) -> None:
        self._say(f"WARNING: tracker {kind}: {one_line(error)[:300]}; it gets nothing more")


def _read(path: Path) -> dict[str, str]:
    try:
        content = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {key: value for key, value in pairs if isinstance(value, str)}


def _hide_errors_of_writing_threads() -> None:
    """Print no traceback of TensorBoard's thread for an OSError, which the next call of its writer raises again."""
    shown = threading.excepthook

    def hook(caught: threading.ExceptHookArgs) -> None:
        package = type(caught.thread).__module__.partition(".")[0]
        if package != "tensorboard" or not issubclass(caught.exc_type, OSError):
            shown(caught)

    threading.excepthook = hook
