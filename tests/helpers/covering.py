"""Choose a few rows of a table in which all values of its columns meet."""

from collections.abc import Mapping, Sequence
from itertools import combinations


def covering(rows: Sequence[Mapping[str, object]], together: int = 2) -> list[int]:
    """Indices of rows in which every combination of values of ``together`` columns occurs that occurs in any row.

    A greedy choice, the same in every run. With ``together=1`` every value of every column occurs.
    """
    combined = [set(combinations(sorted((k, str(v)) for k, v in row.items()), min(together, len(row)))) for row in rows]
    missing, chosen = set().union(*combined), []
    while missing:
        chosen.append(max(range(len(rows)), key=lambda i: len(combined[i] & missing)))
        missing -= combined[chosen[-1]]
    return chosen
