"""M-FAC's directions: new rows, Gram rows, small systems, and combinations of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep._torch import local_part
from leanstep.kernels.fisher.inverse_fisher import EIGEN, OK
from leanstep.kernels.reference.fisher.gradient_window import wide_dtype
from leanstep.kernels.steps.common import nonfinite_flags
from leanstep.optimizers.common.sharding import Reducer, Reduction, together
from leanstep.optimizers.mfac import rule
from leanstep.optimizers.mfac.window import Columns, DenseRows, Piece, combination_dtype, pieces_of

# columns of a scope's `stats`, one row per Gram matrix
# ("unused": saved states have six columns)
STATS = ("jittered", "eigen", "unused", "unused", "decrease", "norm")
_JITTERED, _EIGEN, _, _, _DECREASE, _NORM = range(len(STATS))


class Problem(NamedTuple):
    """Inputs of one scope's direction. Computing it updates ``scope_state`` and ``states`` in place.

    The lists have one entry per parameter of the scope.
    """

    settings: dict[str, Any]  # that the groups of the scope share
    scope_state: dict[str, Any]
    states: list[dict[str, Any]]
    formats: list[type[DenseRows]]
    columns: list[Columns]
    vectors: list[Tensor]  # this process's shards of the gradients, with sign, decay and mask applied
    weights: list[int]  # of every Gram matrix, over all processes, with those that masks exclude


class Direction(NamedTuple):
    """Flat updates of a scope's parameters (None if it skips the step), and flags (1: non-finite gradient)."""

    updates: list[Tensor] | None
    flags: list[int]


def directions(problems: Sequence[Problem]) -> Reducer[list[Direction]]:
    """Compute the directions of all scopes. Scopes with equal settings and counters share all kernel launches."""
    batches: dict[Any, list[int]] = {}
    for i, problem in enumerate(problems):
        counters = tuple(problem.scope_state["counters"].tolist())
        settings = json.dumps(problem.settings, sort_keys=True, default=float)
        key = (counters, problem.scope_state["gram"].device, settings)
        batches.setdefault(key, []).append(i)
    solved = yield from together([ScopeBatch([problems[i] for i in batch]).solve() for batch in batches.values()])
    results: dict[int, Direction] = {}
    for batch, result in zip(batches.values(), solved, strict=True):
        results.update(zip(batch, result, strict=True))
    return [results[i] for i in range(len(problems))]


class ScopeBatch:
    """Scopes with equal settings and counters. Gram matrices and parameters are numbered over all its scopes."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.settings = settings = problems[0].settings
        window = settings["window"]
        rows = int(problems[0].scope_state["counters"][1])
        self.index = rows % window
        self.rows_before, self.rows_after = min(rows, window), min(rows + 1, window)
        self.device = problems[0].scope_state["gram"].device
        counts = [p.scope_state["gram"].shape[0] for p in problems]
        self.scope_of_gram = [i for i, count in enumerate(counts) for _ in range(count)]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.grams_of_scope = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        self.gram_count = sum(counts)
        self.masked = any(["mask" in state for p in problems for state in p.states])
        self.param_keys = [(i, k) for i, p in enumerate(problems) for k in range(len(p.vectors))]
        # equal on every process, even if one has an empty shard
        self.group_sets = list(dict.fromkeys([columns.groups for p in problems for columns in p.columns]))
        self.row_sets = self._make_row_sets()
        self.vectors = [[self._vector_of(piece) for piece in rows.pieces] for rows, _ in self.row_sets]

    def _joined(self, key: str) -> Tensor:
        return torch.cat([p.scope_state[key] for p in self.problems])

    def _make_row_sets(self) -> list[tuple[DenseRows, tuple[Any, ...]]]:
        sets: dict[Any, list[Piece]] = {}
        for param_index, (i, k) in enumerate(self.param_keys):
            problem, first_gram = self.problems[i], self.grams_of_scope[i].start
            state, row_format, columns = problem.states[k], problem.formats[k], problem.columns[k]
            pieces = pieces_of(param_index, first_gram, columns, state, self.settings["scope"])
            if pieces:
                vector = problem.vectors[k]
                key = (columns.groups, vector.device, row_format, state[row_format.key].dtype, wide_dtype(vector.dtype))
                sets.setdefault(key, []).extend(pieces)
        return [(row_format(pieces, self.settings), groups) for (groups, _, row_format, *_), pieces in sets.items()]

    def _vector_of(self, piece: Piece) -> Tensor:
        i, k = self.param_keys[piece.param_index]
        flat = self.problems[i].vectors[k].reshape(-1)
        return flat if piece.span is None else flat[piece.span[0] : piece.span[1]]

    def solve(self) -> Reducer[list[Direction]]:
        """Compute dots of the new rows, write them, and solve. A scope with a non-finite gradient is not changed."""
        for (rows, _), vectors in zip(self.row_sets, self.vectors, strict=True):
            rows.encode(vectors)
        dots, squares, nonfinite = yield from self._compare()
        flags, valid = self._check_finite(squares, nonfinite)
        updates: dict[int, list[Tensor]] = {}
        if valid:
            self._write(valid, dots, squares)
            updates = self._combine(valid, self._coefficients(valid))
        if self.settings["nonfinite"] == "pass":
            for i, problem in enumerate(self.problems):
                updates.setdefault(i, [v.reshape(-1) for v in problem.vectors])
        by_scope: list[list[int]] = [[] for _ in self.problems]
        for (i, _), flag in zip(self.param_keys, flags, strict=True):
            by_scope[i].append(flag)
        return [Direction(updates.get(i), flags) for i, flags in enumerate(by_scope)]

    def _compare(self) -> Reducer[tuple[Tensor, Tensor, Tensor]]:
        """Return dots with the stored rows [grams, n], squared norms [grams] and flags per parameter; one reduction.

        With masks it also counts the weights that they exclude.
        """
        width = self.rows_before
        columns = width + 1 + self.masked
        total = self.gram_count * columns
        values = []
        for (rows, groups), vectors in zip(self.row_sets, self.vectors, strict=True):
            squares = rows.squared_norms()
            table = squares.new_zeros(self.gram_count, columns)
            table[: len(squares), width] = squares
            if width:
                table[: len(squares), :width] = rows.dots(width)
            if self.masked:
                self._count_excluded(rows.pieces, table[:, width + 1])
            flags = squares.new_zeros(len(self.param_keys))
            for piece, flag in zip(rows.pieces, nonfinite_flags(vectors).to(torch.float64), strict=True):
                flags[piece.param_index] += flag
            values.append((torch.cat([table.view(-1), flags]), groups))
        reduced = yield from self._over_processes(values, total + len(self.param_keys))
        table = reduced[:total].view(self.gram_count, columns)
        self.excluded = table[:, width + 1] if self.masked else None
        return table[:, :width], table[:, width], reduced[total:]

    def _count_excluded(self, pieces: Sequence[Piece], counts: Tensor) -> None:
        for piece in pieces:
            if "mask" in piece.state:
                mask = local_part(piece.state["mask"]).reshape(-1)
                mask = mask if piece.span is None else mask[piece.span[0] : piece.span[1]]
                counts[piece.gram : piece.gram + piece.blocks] += (~mask).view(piece.blocks, -1).sum(dim=1)

    def _check_finite(self, squares: Tensor, nonfinite: Tensor) -> tuple[list[int], list[int]]:
        """Return the flag of every parameter, and the scopes that take a step. Waits for the device once."""
        counts = torch.cat([nonfinite, (~torch.isfinite(squares)).to(nonfinite.dtype)]).tolist()
        params = len(self.param_keys)
        flags = [int(count > 0) for count in counts[:params]]
        skipped = {scope for (scope, _), flag in zip(self.param_keys, flags, strict=True) if flag}
        for scope, overflow in zip(self.scope_of_gram, counts[params:], strict=True):
            if overflow and scope not in skipped:  # the squared norm overflows
                skipped.add(scope)
                flags = [1 if i == scope else flag for (i, _), flag in zip(self.param_keys, flags, strict=True)]
        return flags, [i for i in range(len(self.problems)) if i not in skipped]

    def _write(self, valid: list[int], dots: Tensor, squares: Tensor) -> None:
        grams = {gram for gram, scope in enumerate(self.scope_of_gram) if scope in valid}
        for rows, _ in self.row_sets:
            rows.write(self.index, grams)
        gram_rows = dots.new_zeros(self.gram_count, self.rows_after)
        gram_rows[:, : self.rows_before] = dots
        gram_rows[:, self.index] = squares
        for i in valid:
            state = self.problems[i].scope_state
            state["counters"] += 1
            rule.write_gram_row(state["gram"], gram_rows[self.grams_of_scope[i]], self.index)

    def _coefficients(self, valid: list[int]) -> Tensor:
        settings, n = self.settings, self.rows_after
        stats = self._joined("stats")
        gram = torch.cat([p.scope_state["gram"][:, :n, :n] for p in self.problems])
        denominator = rule.denominator(settings["scaling"], settings["window"], n)
        indices = [index for index, scope in enumerate(self.scope_of_gram) if scope in valid]
        solved = rule.coefficients(gram[indices], self._dampings(gram)[indices], denominator, self.index)
        coefficients = gram.new_zeros(self.gram_count, n)
        coefficients[indices] = solved.values
        decrease, norm = rule.decrease_and_norm(gram, coefficients, self.index)
        stats[indices, _JITTERED] += ((solved.status > OK) & (solved.status < EIGEN)).to(stats)
        stats[indices, _EIGEN] += (solved.status >= EIGEN).to(stats)
        stats[:, _DECREASE], stats[:, _NORM] = decrease, norm
        for i in valid:
            self.problems[i].scope_state["stats"].copy_(stats[self.grams_of_scope[i]])
        return coefficients

    def _dampings(self, gram: Tensor) -> Tensor:
        settings = self.settings
        weights = torch.tensor([d for p in self.problems for d in p.weights], dtype=torch.float64, device=gram.device)
        if self.excluded is not None:
            weights = (weights - self.excluded).clamp_min(1.0)  # a scope may have excluded weights alone
        return rule.shrinkage_at(gram, settings["shrinkage"], weights) + settings["damping"]

    def _combine(self, valid: list[int], coefficients: Tensor) -> dict[int, list[Tensor]]:
        updates: dict[int, Tensor] = {}
        for (rows, _), vectors in zip(self.row_sets, self.vectors, strict=True):
            out = []
            for piece, vector in zip(rows.pieces, vectors, strict=True):
                whole = updates.get(piece.param_index)
                if whole is None:
                    i, k = self.param_keys[piece.param_index]
                    size = math.prod(self.problems[i].columns[k].shape)
                    whole = torch.empty(size, dtype=combination_dtype(piece.state), device=vector.device)
                    updates[piece.param_index] = whole
                out.append(whole if piece.span is None else whole[piece.span[0] : piece.span[1]])
            rows.combine(coefficients.to(out[0].device), out)
        by_scope: dict[int, list[Tensor]] = {i: [] for i in valid}
        for param_index, (i, k) in enumerate(self.param_keys):
            if i in by_scope:
                update = updates.get(param_index)
                if update is None:  # of an empty shard, in the dtype of the others
                    problem = self.problems[i]
                    update = problem.vectors[k].new_empty(0, dtype=combination_dtype(problem.states[k]))
                by_scope[i].append(update)
        return by_scope

    def _over_processes(self, values: list[tuple[Tensor, tuple[Any, ...]]], size: int) -> Reducer[Tensor]:
        """Sum vectors over their process groups, and return the sum of the results, fp64 [size]."""
        sets = {groups: torch.zeros(size, dtype=torch.float64, device=self.device) for groups in self.group_sets}
        for value, groups in values:
            sets[groups].add_(value.to(self.device))
        for level in range(max(map(len, sets), default=0)):
            yield [Reduction(total, groups[level]) for groups, total in sets.items() if len(groups) > level]
        return sum(sets.values(), torch.zeros(size, dtype=torch.float64, device=self.device))
