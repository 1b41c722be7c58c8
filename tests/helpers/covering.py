"""Choose a few rows of a table in which all values of its columns meet."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product


def covering(rows: Sequence[Mapping[object, object]], together: int = 2) -> list[int]:
    """Indices of rows in which every combination of values of ``together`` columns occurs that occurs in any row.

    A greedy choice, the same in every run. With ``together=1`` every value of every column occurs.
    """
    combined = [
        set(combinations(sorted((str(k), str(v)) for k, v in row.items()), min(together, len(row)))) for row in rows
    ]
    missing, chosen = set().union(*combined), []
    while missing:
        chosen.append(max(range(len(rows)), key=lambda i: len(combined[i] & missing)))
        missing -= combined[chosen[-1]]
    return chosen


def meeting(*columns: Iterable[object]) -> list[tuple]:
    """Rows of the product of columns in which every two values meet: cases of a test whose code asks for no three."""
    rows = list(product(*columns))
    return [rows[i] for i in covering([dict(enumerate(row)) for row in rows])]
