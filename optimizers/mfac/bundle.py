"""The directions of scopes that are alike: new rows, their Gram rows, the small systems, and combinations of rows."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels import use_backend, window_coefficients, woodbury_coefficients
from leanstep.kernels.fisher.inverse_fisher import EIGEN, OK
from leanstep.kernels.reference.fisher.gradient_window import row_scale, wide_dtype
from leanstep.kernels.steps.common import nonfinite_flags
from leanstep.optimizers.common.sharding import Reduction, Steps
from leanstep.optimizers.mfac.columns import Columns
from leanstep.optimizers.mfac.damping import damping_at
from leanstep.optimizers.mfac.scopes import FIGURES, part_class, pieces_of
from leanstep.optimizers.mfac.window import Part, Piece

_JITTERED, _EIGEN, _CLIPPED, _RATIO, _DECREASE, _NORM = range(len(FIGURES))


class Problem(NamedTuple):
    """What the direction of one scope is computed from; ``home`` and ``states`` are updated in place.

    Attributes:
        settings: of the scope.
        home: gram, counts, figures and window_scale.
        states: of the members.
        columns: of the members: what is held here.
        vectors: what the members add to the new row: their gradients here, signed, decayed and masked as is set.
        rate: learning rate.
    """

    settings: dict[str, Any]
    home: dict[str, Any]
    states: list[dict[str, Any]]
    columns: list[Columns]
    vectors: list[Tensor]
    rate: float | Tensor


class Direction(NamedTuple):
    """Updates of a scope's members, flat; None where the step is skipped. ``flags``: 1 for non-finite gradients."""

    updates: list[Tensor] | None
    flags: list[int]


class Bundle:
    """Scopes with the same settings that have made the same number of steps and hold the same number of rows."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.settings = settings = problems[0].settings
        self.window = settings["window"]
        self.steps_done, self.rows_done = problems[0].home["counts"].tolist()
        self.live = min(self.rows_done, self.window)
        self.index = self.rows_done % self.window
        self.inserting = self.steps_done % settings["window_every"] == 0
        self.after = min(self.rows_done + 1, self.window) if self.inserting else self.live
        self.warm = self.after < settings["warmup_steps"]
        self.solving = self.steps_done % settings["precondition_every"] == 0
        self.from_row = self.inserting and settings["precondition"] == "row"
        self.device = problems[0].home["gram"].device
        blocks = [p.home["gram"].shape[0] for p in problems]
        self.first_slots = [sum(blocks[:i]) for i in range(len(blocks))]
        self.slots = sum(blocks)
        self.owners = [i for i, count in enumerate(blocks) for _ in range(count)]
        self.members = [(i, k) for i, p in enumerate(problems) for k in range(len(p.vectors))]
        self.scales = None
        if "window_scale" in problems[0].home:
            self.scales = torch.cat([p.home["window_scale"] for p in problems])
        # the same on every process, also where one holds nothing of a parameter
        self.group_sets = list(dict.fromkeys(p.columns[k].groups for p in problems for k in range(len(p.columns))))
        self.parts = self._make_parts()
        self.vectors = [self._of_part(part) for part, _ in self.parts]

    def _make_parts(self) -> list[tuple[Part, tuple[Any, ...]]]:
        """Pieces of one form, device, set of processes and dtypes (stored, and of sums), with the set of processes."""
        sets: dict[Any, list[Piece]] = {}
        for number, (i, k) in enumerate(self.members):
            problem = self.problems[i]
            state, columns, vector = problem.states[k], problem.columns[k], problem.vectors[k]
            kind = part_class(state, self.settings["scope"])
            dtype = next(state[key].dtype for key in ("window", "window_values", "window_left") if key in state)
            pieces = pieces_of(number, self.first_slots[i], columns, state, self.settings["scope"])
            if pieces:
                wide = wide_dtype(vector.dtype)
                sets.setdefault((columns.groups, vector.device, kind, dtype, wide), []).extend(pieces)
        return [
            (kind(pieces, self.settings, None if self.scales is None else self.scales.to(device)), groups)
            for (groups, device, kind, *_), pieces in sets.items()
        ]

    def _of_part(self, part: Part) -> list[Tensor]:
        """The flat vectors of a part's pieces."""
        found = []
        for piece in part.pieces:
            i, k = self.members[piece.member]
            flat = self.problems[i].vectors[k].reshape(-1)
            found.append(flat if piece.span is None else flat[piece.span[0] : piece.span[1]])
        return found

    def steps(self) -> Steps[list[Direction]]:
        """Look, then write, then solve: a scope whose gradient is not finite is left as it was."""
        yield from self._take_rows()
        dots, own, flags = yield from self._first_look()
        verdict = torch.cat([flags, (~torch.isfinite(own)).to(flags.dtype)]).tolist()  # the step's wait for the device
        count = len(self.members)
        flagged = [int(f > 0) for f in verdict[:count]]
        bad = {self.members[number][0] for number, flag in enumerate(flagged) if flag}
        for slot, overflow in enumerate(verdict[count:]):
            if overflow and self.owners[slot] not in bad:  # its squared norm is beyond the number range
                bad.add(self.owners[slot])
                flagged = [1 if i == self.owners[slot] else f for (i, _), f in zip(self.members, flagged, strict=True)]
        good = [i for i in range(len(self.problems)) if i not in bad]
        updates: list[list[Tensor] | None] = [None] * len(self.problems)
        if good:
            self._write(good, dots, own)
            found = yield from self._directions(good, dots, own)
            for i in good:
                updates[i] = found[i]
        results = []
        for i, problem in enumerate(self.problems):
            if i in bad and self.settings["nonfinite"] == "pass":
                updates[i] = [v.reshape(-1) for v in problem.vectors]
            results.append(
                Direction(updates[i], [f for (o, _), f in zip(self.members, flagged, strict=True) if o == i])
            )
        return results

    def _take_rows(self) -> Steps[None]:
        """Bring new rows into their stored form. For fp16 their largest entries are looked for first, everywhere."""
        if not self.inserting:
            return
        largest = None
        if self.scales is not None:
            found = [(p.largest(v), groups) for (p, groups), v in zip(self.parts, self.vectors, strict=True)]
            largest = yield from self._over_processes(found, (self.slots,), torch.float32, "max")
            self.factors = largest
        for (part, _), vectors in zip(self.parts, self.vectors, strict=True):
            part.take(vectors, None if largest is None else largest.to(vectors[0].device))

    def _first_look(self) -> Steps[tuple[Tensor, Tensor, Tensor]]:
        """Dots with the stored rows [G, live], squared norms [G] and flags [members]: one reduction of all three."""
        width = self.live if self.inserting or (self.solving and not self.warm) else 0
        total = self.slots * (width + 1)
        found = []
        for (part, groups), vectors in zip(self.parts, self.vectors, strict=True):
            with self._backend():
                own = part.own() if self.inserting else part.norms(vectors)
                values = own.new_zeros(self.slots, width + 1)
                values[: len(own), width] = own
                if width:
                    dots = part.dots(width) if self.inserting else part.dots_with(vectors, width)
                    values[: len(own), :width] = dots
            flags = values.new_zeros(len(self.members))
            for piece, flag in zip(part.pieces, _flags(vectors), strict=True):
                flags[piece.member] += flag
            found.append((torch.cat([values.view(-1), flags]), groups))
        shape = (total + len(self.members),)
        both = yield from self._over_processes(found, shape)
        values, flags = both[:total].view(self.slots, width + 1), both[total:]
        return values[:, :width], values[:, width], flags

    def _write(self, good: list[int], dots: Tensor, own: Tensor) -> None:
        """Store the new rows and their Gram rows, and count."""
        for i in good:
            self.problems[i].home["counts"] += torch.tensor([1, int(self.inserting)])
        if not self.inserting:
            return
        slots = {slot for slot, owner in enumerate(self.owners) if owner in good}
        for part, _ in self.parts:
            part.write(self.index, slots)
        row = dots.new_zeros(self.slots, self.after)
        row[:, : self.live] = dots
        row[:, self.index] = own
        for i in good:
            home, first = self.problems[i].home, self.first_slots[i]
            mine = row[first : first + home["gram"].shape[0]]
            home["gram"][:, self.index, : self.after] = mine
            home["gram"][:, : self.after, self.index] = mine
        if self.scales is not None:
            self._write_scales(good)

    def _write_scales(self, good: list[int]) -> None:
        assert self.scales is not None
        new = row_scale(self.factors)
        for i in good:
            home, first = self.problems[i].home, self.first_slots[i]
            home["window_scale"][:, self.index] = new[first : first + home["gram"].shape[0]]
        self.scales = torch.cat([p.home["window_scale"] for p in self.problems])
        for part, _ in self.parts:
            part.scales = self.scales[: part.top].to(part.rows[0].device)

    def _directions(self, good: list[int], dots: Tensor, own: Tensor) -> Steps[dict[int, list[Tensor]]]:
        """F^-1 of the new rows (or gradients); plain gradients while warming up, scaled ones between solutions."""
        figures = torch.cat([p.home["figures"] for p in self.problems])
        coefficients: Tensor | None = None
        along: Tensor | None = None  # how much of the gradient itself is added, per slot
        momentum = self.settings["momentum_on"] == "gradient"
        if self.warm and momentum:
            coefficients = self._ages()
        elif self.warm:
            along = own.new_ones(self.slots)
        elif not self.solving:
            along = figures[:, _RATIO].clone()
        elif self.from_row:
            coefficients = self._solve_rows(good, figures)
        else:
            if self.inserting:  # its dots with the rows as they are now
                dots, own = yield from self._second_look()
            coefficients, along = self._solve_any(good, figures, dots, own)
        self._clip(figures, coefficients, along, dots, own)
        for i in good:
            kept = self.problems[i].home["figures"]
            kept.copy_(figures[self.first_slots[i] : self.first_slots[i] + len(kept)])
        return self._combine(good, coefficients, along)

    def _second_look(self) -> Steps[tuple[Tensor, Tensor]]:
        """Dots [G, n] of the gradients, as they came, with all rows, and their squared norms [G]."""
        found = []
        for (part, groups), vectors in zip(self.parts, self.vectors, strict=True):
            with self._backend():
                own = part.norms(vectors)
                values = own.new_zeros(self.slots, self.after + 1)
                values[: len(own), self.after] = own
                values[: len(own), : self.after] = part.dots_with(vectors, self.after)
            found.append((values, groups))
        both = yield from self._over_processes(found, (self.slots, self.after + 1))
        return both[:, : self.after], both[:, self.after]

    def _grams(self) -> Tensor:
        """K of the rows in use, [G, n, n]."""
        return torch.cat([p.home["gram"][:, : self.after, : self.after] for p in self.problems])

    def _denominator(self) -> int:
        return self.window if self.settings["scaling"] == "window" else self.after

    def _ages(self) -> Tensor:
        """Weights [G, n] of the rows in the average of the gradients: (1 - momentum) * momentum ** age."""
        momentum = self.settings["momentum"]
        places = torch.arange(self.after, dtype=torch.float64)
        ages = (self.index - places) % self.window if self.rows_done >= self.window else self.index - places
        weights = (1.0 - momentum) * momentum**ages
        return weights.to(self.device).expand(self.slots, -1).contiguous()

    def _solve_rows(self, good: list[int], figures: Tensor) -> Tensor:
        """Coefficients [G, n] for the newest row, or for the average of the rows."""
        grams = self._grams()
        damping = damping_at(self.settings, self.steps_done, self.problems[0].rate)
        target: int | Tensor = self.index
        if self.settings["momentum_on"] == "gradient":
            target = self._ages()
        chosen = self._slots_of(good)
        right = target if isinstance(target, int) else target[chosen]
        solved = window_coefficients(grams[chosen], damping, self._denominator(), right)
        coefficients = grams.new_zeros(self.slots, self.after)
        coefficients[chosen] = solved.values
        image = (grams @ coefficients.unsqueeze(-1)).squeeze(-1)
        against = image[:, target] if isinstance(target, int) else (image * target).sum(dim=-1)
        norms = grams[:, self.index, self.index]
        self._record(figures, chosen, solved.status, against, norms, (image * coefficients).sum(dim=-1))
        return coefficients

    def _solve_any(self, good: list[int], figures: Tensor, dots: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [G, n] of the rows and factors [G] of the gradient itself, by Woodbury's identity."""
        grams = self._grams()
        damping = damping_at(self.settings, self.steps_done, self.problems[0].rate)
        chosen = self._slots_of(good)
        solved = woodbury_coefficients(grams[chosen], dots[chosen], damping, self._denominator())
        coefficients = grams.new_zeros(self.slots, self.after)
        coefficients[chosen] = solved.values
        along = torch.full_like(own, 1.0 / damping)
        against = own / damping + (dots * coefficients).sum(dim=-1)
        image = (grams @ coefficients.unsqueeze(-1)).squeeze(-1)
        squares = own / damping**2 + ((2.0 / damping * dots + image) * coefficients).sum(dim=-1)
        self._record(figures, chosen, solved.status, against, own, squares)
        return coefficients, along

    def _slots_of(self, good: list[int]) -> list[int]:
        return [slot for slot, owner in enumerate(self.owners) if owner in good]

    def _record(
        self, figures: Tensor, chosen: list[int], status: Tensor, against: Tensor, own: Tensor, squares: Tensor
    ) -> None:
        """Count failed factorizations; keep g.u, the ratio g.u / g.g and |u|^2 of every slot."""
        figures[chosen, _JITTERED] += ((status > OK) & (status < EIGEN)).to(figures)
        figures[chosen, _EIGEN] += (status >= EIGEN).to(figures)
        figures[:, _DECREASE] = against
        figures[:, _RATIO] = torch.where(own > 0, against / own, figures[:, _RATIO]).clamp_min(0.0)
        figures[:, _NORM] = squares.clamp_min(0.0).sqrt()

    def _clip(
        self, figures: Tensor, coefficients: Tensor | None, along: Tensor | None, dots: Tensor, own: Tensor
    ) -> None:
        """Shorten updates that are longer than ``max_update_norm``: their factors, before anything large is touched."""
        if coefficients is None and along is not None:
            figures[:, _NORM] = along.abs() * own.clamp_min(0.0).sqrt()
            figures[:, _DECREASE] = along * own
        elif self.warm and coefficients is not None:
            image = (self._grams() @ coefficients.unsqueeze(-1)).squeeze(-1)
            figures[:, _NORM] = (image * coefficients).sum(dim=-1).clamp_min(0.0).sqrt()
            figures[:, _DECREASE] = image[:, self.index]
        limit = self.settings["max_update_norm"]
        if limit is None:
            return
        long = figures[:, _NORM] > limit
        factor = torch.where(long, limit / figures[:, _NORM], 1.0)
        figures[:, _CLIPPED] += long
        figures[:, _NORM] *= factor
        figures[:, _DECREASE] *= factor
        if coefficients is not None:
            coefficients *= factor.unsqueeze(-1)
        if along is not None:
            along *= factor

    def _combine(self, good: list[int], coefficients: Tensor | None, along: Tensor | None) -> dict[int, list[Tensor]]:
        """The updates of the members: a combination of rows, and of the gradients themselves."""
        updates: dict[int, Tensor] = {}
        for (part, _), vectors in zip(self.parts, self.vectors, strict=True):
            out = []
            for piece, vector in zip(part.pieces, vectors, strict=True):
                i, k = self.members[piece.member]
                whole = updates.get(piece.member)
                if whole is None:
                    held = math.prod(self.problems[i].columns[k].shape)
                    whole = torch.empty(held, dtype=_wide(piece.state), device=vector.device)
                    updates[piece.member] = whole
                out.append(whole if piece.span is None else whole[piece.span[0] : piece.span[1]])
            if coefficients is not None:
                with self._backend():
                    part.combine(coefficients.to(out[0].device), out)
            if along is not None:
                factors = along.to(out[0].device, out[0].dtype)
                for piece, result, vector in zip(part.pieces, out, vectors, strict=True):
                    scaled = piece.scaled(vector.to(result.dtype), factors)
                    result.copy_(scaled) if coefficients is None else result.add_(scaled)
        empty = torch.empty(0)
        found: dict[int, list[Tensor]] = {i: [] for i in good}
        for number, (i, k) in enumerate(self.members):
            if i in found:
                vector = self.problems[i].vectors[k]
                found[i].append(updates.get(number, empty.to(vector.device, wide_dtype(vector.dtype))))
        return found

    def _over_processes(
        self,
        found: list[tuple[Tensor, tuple[Any, ...]]],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
        op: str = "sum",
    ) -> Steps[Tensor]:
        """Sum (or maximum) of parts' values, each over the processes that the part is cut over."""
        combine = torch.maximum if op == "max" else torch.add
        sets = {groups: torch.zeros(shape, dtype=dtype, device=self.device) for groups in self.group_sets}
        for value, groups in found:
            place = sets[groups][: value.shape[0]]
            place.copy_(combine(place, value.to(self.device, dtype)))
        for level in range(max(map(len, sets), default=0)):
            yield [Reduction(total, groups[level], op) for groups, total in sets.items() if len(groups) > level]
        result = torch.zeros(shape, dtype=dtype, device=self.device)
        for total in sets.values():
            result = combine(result, total)
        return result

    def _backend(self) -> AbstractContextManager[object]:
        """The backend that is asked for. Never held while a rule waits: others run meanwhile."""
        return use_backend("reference") if self.settings["foreach"] is False else nullcontext()


def _wide(state: dict[str, Any]) -> torch.dtype:
    """The dtype of combinations of a parameter's rows."""
    return wide_dtype(next(state[key].dtype for key in ("window", "window_values", "window_left") if key in state))


def _flags(vectors: list[Tensor]) -> Tensor:
    return nonfinite_flags(vectors).to(torch.float64)
