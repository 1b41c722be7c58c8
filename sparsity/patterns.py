"""N:M patterns, and rules that assign them to layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

_MOST = 2**31 - 1  # weights of a group: no matrix has more columns
_SHOWN = 40  # characters of a text in a message


@dataclass(frozen=True, order=True)
class NM:
    """At most ``n`` nonzero in every ``m`` consecutive weights along one axis, the input dimension by default.

    Attributes:
        n: weights kept, 0 <= n <= m. ``n == m`` is dense, 0 prunes everything.
        m: weights of a group, m >= 1.

    Raises:
        TypeError: for numbers that are not integers.
        ValueError: for n outside 0 .. m, or m outside 1 .. 2^31 - 1.

    Example:
        >>> NM(2, 4).sparsity, str(NM.parse("1:16")), NM(1, 8).scaled(4)
        (0.5, '1:16', NM(n=4, m=32))
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"NM: {name} must be an integer, got {value!r}")
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise ValueError(f"NM: expected 0 <= n <= m and m >= 1 (n kept of m), got n = {self.n}, m = {self.m}")
        if self.m > _MOST:
            raise ValueError(f"NM: expected groups of at most {_MOST} weights, got m = {self.m}")

    @classmethod
    def parse(cls, text: str) -> NM:
        """Parse a text ``"N:M"``.

        Raises:
            ValueError: for any other text.
        """
        # no number with more digits is within the bounds
        match = re.fullmatch(r"\s*(\d{1,10})\s*:\s*(\d{1,10})\s*", text)
        if match is None:
            raise ValueError(f"NM.parse: expected 'N:M', such as '2:4', got {text[:_SHOWN]!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def density(self) -> float:
        """Fraction of weights kept, n / m."""
        return self.n / self.m

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, 1 - n / m."""
        return (self.m - self.n) / self.m

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.n == self.m

    def scaled(self, factor: int) -> NM:
        """The pattern of equal density with groups ``factor`` times as long. Every mask of this pattern obeys it."""
        return NM(factor * self.n, factor * self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def as_pattern(pattern: NM | str) -> NM:
    """Convert a text such as ``"2:4"`` to a pattern; return a pattern as it is.

    Raises:
        TypeError: for anything else.
        ValueError: for any other text.
    """
    if isinstance(pattern, NM):
        return pattern
    if isinstance(pattern, str):
        return NM.parse(pattern)
    raise TypeError(f"expected an N:M pattern (NM or a text such as '2:4'), got {pattern!r}")


def match_patterns(names: Iterable[str], patterns: Mapping[str, NM | str] | NM | str) -> dict[str, NM]:
    """Assign a pattern to every name by ordered rules; the first match decides.

    Args:
        names: names of layers.
        patterns: shell-style wildcards -> pattern, such as ``{"*.mlp.*": NM(1, 8), "*.q_proj": "2:4"}``. Case matters,
            and ``*`` crosses dots. A single pattern applies to all names.

    Returns:
        name -> pattern, in the order of ``names``, without names that match no rule.

    Raises:
        ValueError: without rules; for a rule that matches no name, or only names that earlier rules took.
    """
    names = list(names)
    rules = patterns if isinstance(patterns, Mapping) else {"*": patterns}
    if not rules:
        raise ValueError("match_patterns: expected at least one rule such as {'*.mlp.*': '2:4'}, got none")
    parsed = [(rule, as_pattern(pattern)) for rule, pattern in rules.items()]
    matched: dict[str, NM] = {}
    used = set()
    for name in names:
        match = next(((rule, pattern) for rule, pattern in parsed if fnmatchcase(name, rule)), None)
        if match is not None:
            used.add(match[0])
            matched[name] = match[1]
    for rule, pattern in parsed:
        if rule not in used:
            earlier = [name for name in names if fnmatchcase(name, rule)]
            why = f"earlier rules took {_listed(earlier)}" if earlier else f"the names are {_listed(names)}"
            raise ValueError(f"match_patterns: the rule {rule!r} (pattern {pattern}) matches no layer; {why}")
    return matched


def abbreviate(names: list[str], most: int = 5) -> str:
    """List up to ``most`` names for a message, and say how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _listed(names: list[str]) -> str:
    return abbreviate(list(map(repr, names)), 40) or "no names"
