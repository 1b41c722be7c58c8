"""Divide the suite among the workers of pytest-xdist.

The tests of a file stay together, so that its fixtures are made once. The interpreter tests of all files stay together,
so that one process runs them all (interpreter_session.py).
"""

import json
import os
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

_INTERPRETED = "interpreter-tests.json"


def tell_scheduler(folder: Path, nodeids: list[str]) -> None:
    """Write down which tests are interpreted. Only workers collect, and the scheduler knows no more than names."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_INTERPRETED}.{os.getpid()}"
    temporary.write_text(json.dumps(nodeids), encoding="utf-8")
    temporary.replace(folder / _INTERPRETED)


class FileScheduling(LoadScopeScheduling):
    """Hand out whole files, and the interpreter tests first, as one."""

    def __init__(self, config, folder: Path, log=None) -> None:
        super().__init__(config, log)
        self.folder = folder
        self.interpreted: set[str] | None = None

    def _split_scope(self, nodeid: str) -> str:
        if self.interpreted is None:
            self.interpreted = set(json.loads((self.folder / _INTERPRETED).read_text(encoding="utf-8")))
        return "interpreter" if nodeid in self.interpreted else nodeid.split("::", 1)[0]
