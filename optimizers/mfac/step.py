"""The directions of M-FAC's step, for all scopes side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from leanstep.optimizers.common.sharding import Steps, together
from leanstep.optimizers.mfac.bundle import Bundle, Direction, Problem


def directions(problems: Sequence[Problem]) -> Steps[list[Direction]]:
    """The directions of all scopes; those that are at one place of their rings are worked on in one launch."""
    alike: dict[Any, list[int]] = {}
    for i, problem in enumerate(problems):
        rate = float(problem.rate) if (problem.settings["damping_schedule"] or ("",))[0] == "lr" else 0.0
        counts = tuple(problem.home["counts"].tolist())
        key = (counts, rate, problem.home["gram"].device, json.dumps(problem.settings, sort_keys=True))
        alike.setdefault(key, []).append(i)
    rules = [Bundle([problems[i] for i in members]).steps() for members in alike.values()]
    found = yield from together(rules)
    results: dict[int, Direction] = {}
    for members, result in zip(alike.values(), found, strict=True):
        results.update(zip(members, result, strict=True))
    return [results[i] for i in range(len(problems))]
