"""Shared by the parts of ``leanstep check``: a section of the report, facts passed on, tables."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

GIB, MIB = 2**30, 2**20


@dataclass
class Section:
    """One part of the report: lines to print, and problems, each of which makes the check fail."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line with a name in front."""
        self.lines.append(f"{name:<15} {text}")


@dataclass
class Facts:
    """Results of one section that later sections use."""

    vocabulary: int = 0
    train_sequences: int | None = None
    offline: bool = False
    device: str = "cpu"
    memory: Any = None


def size_text(size: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Format rows as aligned columns; columns of numbers are flush right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(cell[:1].isdigit() for cell in column[1:]) and len(column) > 1 for column in zip(*rows, strict=True)]
    align = [str.rjust if right else str.ljust for right in numeric]
    padded = ([put(cell, width) for put, cell, width in zip(align, row, widths, strict=True)] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]
