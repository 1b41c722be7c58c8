"""Divide the suite among the workers of pytest-xdist.

The tests of a file stay together, so that its fixtures are made once. The interpreter tests of all files stay together,
so that one process runs them all (interpreter_session.py). Files that take long come first, so that no worker is left
alone with one at the end.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

_INTERPRETED = "interpreter-tests.json"
# the time of a test marked slow, in those of one that is not
_SLOW = 40


def longest_files_first(items: list[pytest.Item], interpreted: list[str]) -> None:
    """Sort the tests: the interpreted ones, then those whose file is expected to take the longest."""
    process_of_its_own = set(interpreted)
    weights = Counter[str]()
    for item in items:
        if item.nodeid not in process_of_its_own:
            weights[_file(item.nodeid)] += _SLOW if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (item.nodeid not in process_of_its_own, -weights[_file(item.nodeid)]))


def _file(nodeid: str) -> str:
    return nodeid.split("::", 1)[0]


def tell_scheduler(folder: Path, nodeids: list[str]) -> None:
    """Write down which tests are interpreted. Only workers collect, and the scheduler knows no more than names."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_INTERPRETED}.{os.getpid()}"
    temporary.write_text(json.dumps(nodeids), encoding="utf-8")
    temporary.replace(folder / _INTERPRETED)


class FileScheduling(LoadScopeScheduling):
    """Hand out whole files in the order of the collection, and the interpreter tests first, as one."""

    def __init__(self, config, folder: Path, log=None) -> None:
        config.option.loadscopereorder = False  # by the number of tests
        super().__init__(config, log)
        self.folder = folder
        self.interpreted: set[str] | None = None

    def _split_scope(self, nodeid: str) -> str:
        if self.interpreted is None:
            self.interpreted = set(json.loads((self.folder / _INTERPRETED).read_text(encoding="utf-8")))
        return "interpreter" if nodeid in self.interpreted else _file(nodeid)
