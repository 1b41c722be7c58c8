"""Curves as they are measured, on disk point by point, so that a crash loses one point and not a night."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from leanstep.pruning.measure.metrics import Distortion

__all__ = ["PartialCurves"]


class PartialCurves:
    """A file of one line per measured point, behind a first line that says what was measured, and on what.

    Args:
        path: the file; it is made with the first point.
        identity: whatever decides the numbers: hashes of model and data, metric, score, levels.

    Raises:
        ValueError: the file was written for another identity, with what differs, or is none of ours.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.points: dict[tuple[str, int], Distortion] = {}
        if path.exists():
            self._read()

    def add(self, name: str, kept: int, point: Distortion) -> None:
        """Note a point; when this returns, it is on disk."""
        new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"identity": self.identity}) + "\n")
            file.write(json.dumps([name, kept, point.mean, point.stderr]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.points[name, kept] = point

    def remove(self) -> None:
        """Remove the file, once its content is kept elsewhere."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        raw = self.path.read_text(encoding="utf-8")
        whole = raw[: raw.rfind("\n") + 1]
        lines = whole.splitlines()
        try:
            found = json.loads(lines[0])["identity"] if lines else self.identity
            rows = [json.loads(line) for line in lines[1:]]
            self.points = {(str(name), int(kept)): Distortion(mean, error) for name, kept, mean, error in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} holds no measured curves ({error}); remove it, or name another file"
            ) from None
        differing = [key for key in {**found, **self.identity} if found.get(key) != self.identity.get(key)]
        if differing:
            told = "; ".join(f"{key}: {found.get(key)} then, {self.identity.get(key)} now" for key in differing)
            raise ValueError(
                f"{self.path} was measured under other circumstances ({told}): put back what changed to go on with it, "
                "or remove it to begin again"
            )
        if whole != raw or not lines:  # a line that a crash cut short
            partial = self.path.with_name(f"{self.path.name}.tmp")
            partial.write_text(whole, encoding="utf-8")
            if lines:
                os.replace(partial, self.path)
            else:
                partial.unlink()
                self.path.unlink()
