"""The settings of pruning, each declared once.

From :class:`PruneConfig` come the options of ``leanstep prune``, the arguments of :func:`leanstep.pruning.prune`, the
checks, the settings in ``sparsity.json``, and those of a dry run. A new setting is a field here, and the code that
reads it. Imports nothing large: the command reads its options before torch is loaded.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from leanstep._checkpoint.mapped import Scratch
    from leanstep._processes import Processes
    from leanstep.pruning.allocate.budgets import Budget
    from leanstep.pruning.allocate.latency import LatencyTable
    from leanstep.pruning.measure.curves import Curve
    from leanstep.pruning.measure.metrics import Metric
    from leanstep.sparsity import NM

# called with what is done, what there is in all, and the name of a matrix or a phase; with 0 and 0 where a phase begins
Progress = Callable[[int, int, str], Any]
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

SCORES = ("magnitude", "wanda", "sparsegpt", "alps", "mfac")
# patterns whose levels are of a menu, and how a matrix is rounded to them
MENUS = ("ggml", "sparse")
ROUNDINGS = ("gptq", "nearest")


def _setting(
    default: Any, help: str, group: str, /, *, choices: Sequence[str] = (), recorded: bool = True, **option: Any
) -> Any:
    """A field of :class:`PruneConfig`.

    Args:
        default, choices: of the setting. Other values than texts are not compared with the choices.
        help, group: of its option of the command, whose further arguments are ``option``.
        recorded: whether ``sparsity.json`` has it among its settings; of the others it has the result.
    """
    return field(
        default=default,
        metadata={"help": help, "group": group, "choices": tuple(choices), "recorded": recorded, "option": option},
    )


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sparsities with commas between them, got {text!r}") from None
    if not all(0 < level < 1 for level in levels):
        raise argparse.ArgumentTypeError(f"levels are above 0, which is always one, and below 1, got {text!r}")
    return levels


@dataclass(frozen=True)
class Refinement:
    """Settings of the search on joint distortion that follows dynamic programming.

    Attributes:
        minutes: time after which no exchange is judged; None: no limit.
        evaluations: exchanges to judge at most; None: no limit. With this limit alone, the result depends on the seed
            and not on the speed of the machine.
        data: calibration data that judges, disjoint from the data for the scores and from the held-out data; see
            :func:`leanstep.pruning.measure.batches.as_batches`. None sets aside the last quarter of the calibration
            data.
        seed: of the exchanges that are drawn at random.
        noise: standard errors by which an exchange must be better.
        state: file of the search, replaced as it goes on; a file of the same search is continued. None keeps none.

    Raises:
        ValueError: for no limit, or limits, seed and noise out of range.
    """

    minutes: float | None = None
    evaluations: int | None = None
    data: Any = None
    seed: int = 0
    noise: float = 1.0
    state: str | Path | None = None

    def __post_init__(self) -> None:
        if self.minutes is None and self.evaluations is None:
            raise ValueError("Refinement: give minutes, evaluations or both, else it would not end")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"Refinement: minutes must be positive, got {self.minutes:g}")
        if self.evaluations is not None and (type(self.evaluations) is not int or self.evaluations < 1):
            raise ValueError(f"Refinement: evaluations must be a whole number from 1 on, got {self.evaluations}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"Refinement: seed must be a whole number from 0 on, got {self.seed}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"Refinement: noise must be a number from 0 on, got {self.noise}")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """What :func:`leanstep.pruning.prune` does; ``leanstep prune`` has an option for every field but the last two.

    Attributes:
        sparsity: fraction of zeros over all pruned matrices, in (0, 1). With a ``budget`` by name or a table, fraction
            of the dense cost to remove. None with a :class:`Budget` or a fixed pattern.
        allocation: ``dp``, ``uniform``, ``global``, ``lamp``, ``erk``, ``owl`` or ``atp``. For ``atp``, up to 9 slopes
            are tried; the one with the smallest joint distortion on ``curve_data`` is taken.
        budget: with ``dp``, a constraint other than the number of weights. ``"flops"``, ``"bytes"`` or a
            :class:`leanstep.pruning.LatencyTable` limits that cost to ``1 - sparsity`` of the dense model's. A
            :class:`leanstep.pruning.Budget` has its own target. With a table, curves are measured at its levels.
        granularity: ``matrix``, ``role`` or ``block``: which matrices share a level, with ``dp``.
        levels: sparsities at which curves are measured; None: a grid around ``sparsity``.
        metric: distortion: ``kl`` (default for language models and classifiers), ``kl_topk``, which stores less,
            ``cosine``: 1 - cosine of the embeddings (default for embedding models), or ``mse_logits`` (default for
            others); or a :class:`leanstep.pruning.measure.metrics.Metric`.
        curves: how curves are obtained with ``dp``: ``measured``, ``fisher`` (to second order, in the time of a few
            passes) or ``anchored`` (Fisher curves scaled to a few measurements); see :func:`measure_curves`. None:
            ``measured`` where that takes less than ``minutes``, else ``anchored``. Or curves measured earlier.
        curve_score: score by which matrices are pruned for curves, for the slopes of ``atp`` and for ``refine``; None:
            ``score``. ``sparsegpt`` takes a tenth of the time of ``alps`` for a level, or less. Of ``score_options``,
            another score takes those that ALPS and SparseGPT share.
        minutes: time after the Fisher curves at which ``anchored`` begins no measurement any more. It measures on as
            many of the first samples as let it measure all matrices in four fifths of that time, with 128 outputs
            (tokens, or samples of a classifier) or more: shuffle samples whose order means something. See
            :mod:`leanstep.pruning.measure.fisher.sampling`. Curves of matrices that were not reached are scaled as
            those of the same kind that were, with the median of all. On held-out data, matrices are pruned one by one
            as long as that takes no longer, first for the allocation that was asked for.
        correction: ``none``; or ``relinearise``, which takes curves again around the uniformly pruned model, and once
            more around the new allocation if that is better: measured ones where all curves are measured, else to
            second order, first-order terms included. The allocation with the smallest joint distortion on
            ``curve_data`` is taken.
        score: ``magnitude``, ``wanda``, or one that updates the remaining weights: ``sparsegpt``, ``alps``, ``mfac``.
        pattern: ``unstructured``; ``N:8`` (any M), which chooses n for each matrix, from a quarter of M on; or a fixed
            one such as ``2:4``.
        inputs: on which a block is pruned: ``pruned``, those that the pruned blocks before it produce; or ``dense``,
            those of the dense model. Curves are of one matrix in the dense model with either.
        include, exclude: see :func:`find_targets`.
        batch_size: samples per pass, if the data is a tensor; and of a step of ``reconstruct``.
        reconstruct: steps in which each block, after it is pruned, is trained to the dense model's outputs of the
            block, on the inputs that the pruned and trained blocks before it produce. Zeros stay. See
            :func:`leanstep.pruning.training.reconstruction.reconstruct_block`. None: no training.
        reconstruct_lr: the highest rate of these steps; None: 5e-4, with a menu 3e-4.
        products: dtype of the model's products: ``stored``, that of the weights; ``bf16``; or ``auto``: ``stored``,
            except for a 16-bit dtype in which this CPU is slow: its products are computed in bf16 where that is fast,
            else in fp32. See :func:`leanstep.pruning.measure.products.product_dtype`. Weights keep their dtype.
        score_options: further arguments of :func:`leanstep.pruning.layer_pruner`.
        refine: with ``dp``, limits of a search from its allocation: exchanges of weights between matrices within the
            budget, each judged by the joint distortion on data of its own. None: no search.
    """

    sparsity: float | None = _setting(
        None, "fraction of zeros over all pruned matrices, such as 0.6", "", recorded=False, type=float, metavar="S"
    )
    allocation: str = _setting(
        "dp",
        "rule for the sparsity of each matrix; default dp, by dynamic programming on curves",
        "allocation",
        choices=("dp", "uniform", "global", "lamp", "erk", "owl", "atp"),
    )
    budget: Budget | LatencyTable | str | None = _setting(
        None,
        "unit of --sparsity, the fraction to remove: weights (default), operations, bytes, or seconds",
        "allocation",
        default="params",
        choices=("params", "flops", "bytes", "latency"),
    )
    granularity: str = _setting(
        "matrix", "matrices that share a level", "allocation", choices=("matrix", "role", "block")
    )
    levels: Sequence[float] | None = _setting(
        None, "sparsities to measure; default: a grid around --sparsity", "allocation", type=_levels, metavar="S,S,..."
    )
    metric: str | Metric | None = _setting(
        None,
        "kl (default for language models and classifiers), kl_topk, cosine (for embedding models) or mse_logits",
        "allocation",
        choices=("kl", "kl_topk", "mse_logits", "cosine"),
        metavar="NAME",
    )
    curves: Mapping[str, Curve] | str | None = _setting(
        None,
        "measured; to second order, in the time of a few passes; or that, scaled to a few measurements. Default: "
        "measured where that takes less than --minutes, else anchored",
        "allocation",
        choices=("measured", "fisher", "anchored"),
    )
    curve_score: str | None = _setting(
        None,
        "score of curves, slopes of atp and --refine; default: --score",
        "allocation",
        choices=(*SCORES, *ROUNDINGS),
    )
    minutes: float = _setting(
        10.0, "time for measurements, besides Fisher's; default 10", "allocation", type=float, metavar="M"
    )
    correction: str = _setting("none", "for curves that do not add up", "allocation", choices=("none", "relinearise"))
    score: str = _setting(
        "wanda",
        "which weights of a matrix become zero; default wanda",
        "weights",
        choices=(*SCORES, *ROUNDINGS),
        recorded=False,
    )
    pattern: str = _setting(
        "unstructured", "N:8: n of 8 by matrix; or 2:4 for all", "weights", recorded=False, metavar="unstructured|N:M"
    )
    inputs: str = _setting(
        "pruned",
        "change a block on the inputs that the changed blocks before it produce (default), or on the dense model's",
        "weights",
        choices=("pruned", "dense"),
        recorded=False,
    )
    include: Iterable[str] | None = _setting(
        None, "wildcards over parameter names: change these only", "weights", action="append", metavar="NAMES"
    )
    exclude: Iterable[str] = _setting(
        (), "wildcards: leave these out", "weights", action="append", default=[], metavar="NAMES"
    )
    batch_size: int = _setting(
        8, "sequences or images at once; default 8", "resources", recorded=False, type=int, metavar="N"
    )
    reconstruct: int | None = _setting(
        None,
        "train each block, once it is changed, to the dense block's outputs; zeros stay, and bits stay on their grids",
        "afterwards",
        type=int,
        metavar="STEPS",
    )
    reconstruct_lr: float | None = _setting(
        None,
        "rms change of an entry in a step of a block; default 5e-4, of codes 3e-4",
        "afterwards",
        type=float,
        metavar="LR",
    )
    products: str = _setting(
        "auto",
        "dtype of the model's products: that of the weights, or bf16; auto (default): the first, unless this CPU "
        "is slow in it, as most are in fp16",
        "resources",
        choices=("auto", "stored", "bf16"),
    )
    score_options: Mapping[str, Any] | None = None
    refine: Refinement | None = None

    def __post_init__(self) -> None:
        # an iterator serves once, and these are read again
        object.__setattr__(self, "include", None if self.include is None else tuple(self.include))
        object.__setattr__(self, "exclude", tuple(self.exclude or ()))

    @classmethod
    def add_options(cls, parser: argparse._ActionsContainer, group: str, *, only: Sequence[str] = ()) -> None:
        """Add the options of a group of settings to a parser; of all, or of ``only`` some names."""
        for setting in _declared():
            if setting.metadata["group"] == group and (not only or setting.name in only):
                option = {"default": setting.default, "help": setting.metadata["help"], **setting.metadata["option"]}
                if setting.metadata["choices"] and "metavar" not in option:
                    option["choices"] = tuple(one for one in setting.metadata["choices"] if one not in ROUNDINGS)
                parser.add_argument(f"--{setting.name.replace('_', '-')}", **option)

    @classmethod
    def of_options(cls, options: argparse.Namespace, **others: Any) -> PruneConfig:
        """The settings among the options of a command, and others that no option has as it is."""
        given: dict[str, Any] = {one.name: getattr(options, one.name, one.default) for one in _declared()}
        return cls(**given | others)

    @property
    def fixed(self) -> NM | None:
        """The pattern that all matrices share, such as 2:4; None for ``unstructured``, ``N:8`` and a menu."""
        from leanstep.sparsity import NM

        chooses = self.pattern == "unstructured" or self.pattern.startswith("N:") or self.menu
        return None if chooses else NM.parse(self.pattern)

    @property
    def menu(self) -> str | None:
        """The menu whose levels matrices have; None for counts of weights and N:M patterns."""
        return self.pattern if self.pattern in MENUS else None

    @property
    def method(self) -> str:
        """The allocation; uniform for a fixed pattern, which leaves nothing to allocate."""
        return self.allocation if self.fixed is None else "uniform"

    @property
    def reconstruction_rate(self) -> float:
        """The rate of ``reconstruct``, with the default filled in."""
        default = 5e-4 if self.menu is None else 3e-4
        return default if self.reconstruct_lr is None else self.reconstruct_lr

    @property
    def plans(self) -> bool:
        """Whether distortions of single changes, or of candidates, are measured on the data for curves."""
        return self.method in ("dp", "atp")

    @property
    def corrects(self) -> bool:
        """Whether curves are taken again around a pruned model."""
        return self.method == "dp" and self.correction != "none"

    @property
    def planning_score(self) -> str:
        """The score of the curves, of the slopes of ATP, and of the search."""
        return self.curve_score or self.score

    @property
    def scores(self) -> tuple[str, ...]:
        """Those whose statistics are collected."""
        return (self.score, self.planning_score) if self.plans else (self.score,)

    @property
    def curve_method(self) -> str | None:
        """How curves are obtained; None: as time allows."""
        return self.curves if isinstance(self.curves, str) else None

    @property
    def given_curves(self) -> Mapping[str, Curve] | None:
        """Curves that were measured earlier."""
        return None if isinstance(self.curves, str) else self.curves

    @property
    def counts_operations(self) -> bool:
        """Whether the budget is of operations, which a pass over the data counts."""
        return "flops" in (self.budget, getattr(self.budget, "kind", None))

    @property
    def requested_sparsity(self) -> float | None:
        """The sparsity, or that of a fixed pattern."""
        return self.fixed.sparsity if self.sparsity is None and self.fixed is not None else self.sparsity

    @property
    def effective_levels(self) -> Sequence[float] | None:
        """The levels to measure: those of a table of latencies, if none are named; None: a grid."""
        from leanstep.pruning.allocate.latency import LatencyTable

        if isinstance(self.budget, LatencyTable) and self.levels is None and self.pattern == "unstructured":
            return self.budget.levels[1:]
        return self.levels

    def recorded(self) -> dict[str, Any]:
        """The settings that a result does not show, in plain values for JSON."""
        values = {setting.name: getattr(self, setting.name) for setting in _declared() if setting.metadata["recorded"]}
        if not isinstance(self.budget, str):
            is_table = type(self.budget).__name__ == "LatencyTable"
            values["budget"] = "latency" if is_table else getattr(self.budget, "kind", "params")
        for name, given in (("metric", "custom"), ("curves", "given")):
            if not isinstance(values[name], (str, NoneType)):
                values[name] = given
        return values | {name: list(values[name] or ()) for name in ("include", "exclude", "levels")}

    def check(self, *, has_data: bool, alone: bool = True) -> None:
        """Raise ValueError for unknown or contradictory settings, before anything is loaded.

        ``alone``: whether one process prunes the model.
        """
        if isinstance(self.budget, str) and self.budget not in ("params", "flops", "bytes"):
            raise ValueError(
                f"budget must be params, flops, bytes, a Budget or, for latencies, a LatencyTable; got {self.budget!r}"
            )
        for setting in _declared():
            value, known = getattr(self, setting.name), setting.metadata["choices"]
            if known and value not in known and (isinstance(value, str) or setting.default is not None):
                raise ValueError(f"{setting.name} must be one of {', '.join(known)}, got {value!r}")
        self._check_minutes(has_data)
        self._check_menu(has_data, alone)
        self._check_target()
        self._check_planning()
        self._check_curves()
        self._check_reconstruction(has_data, alone)
        from leanstep.pruning.score.base import NEEDS

        if not has_data and (NEEDS[self.score] or self.method in ("dp", "owl", "atp")):
            raise ValueError(
                f"allocation={self.allocation!r} with score={self.score!r} needs data; without data, use "
                "score='magnitude' and one of uniform, global, lamp, erk"
            )

    def _check_minutes(self, has_data: bool) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes is the time for measurements and must be positive, got {self.minutes:g}")
        if self.minutes != PruneConfig.minutes and not has_data:
            raise ValueError(f"minutes={self.minutes:g} is the time for measurements on data, which is missing")

    def _check_menu(self, has_data: bool, alone: bool) -> None:
        """A menu and a rounding go together, and each matrix has a level of its own."""
        for name in ("score", "curve_score"):
            value = getattr(self, name)
            if value is not None and (value in ROUNDINGS) != (self.menu is not None):
                known = ROUNDINGS if self.menu else SCORES
                raise ValueError(f"{name} with pattern {self.pattern} must be one of {', '.join(known)}, got {value!r}")
        if (self.menu is not None) != (getattr(self.budget, "kind", None) == "size"):
            raise ValueError(
                "a Budget of the kind 'size', as leanstep.pruning.compress makes, goes with pattern "
                f"{' or '.join(MENUS)}; got pattern {self.pattern}"
            )
        if self.menu and not alone:
            raise ValueError(f"pattern {self.menu}: one process writes the bytes of all matrices; leave out --nproc")
        if self.menu and not has_data:
            raise ValueError("compressing measures what each matrix costs: give data (--data FILE)")
        if self.menu and (self.granularity != "matrix" or self.allocation != "dp"):
            raise ValueError(
                f"pattern {self.menu} has levels of single matrices, by dynamic programming: leave granularity and "
                "allocation out"
            )

    def _check_reconstruction(self, has_data: bool, alone: bool) -> None:
        steps, lr = self.reconstruct, self.reconstruction_rate
        if steps is None:
            if self.reconstruct_lr is not None:
                raise ValueError(f"reconstruct_lr={lr:g} goes with a number of steps (--reconstruct STEPS)")
            return
        if type(steps) is not int or steps < 1 or not 0 < lr < math.inf:
            raise ValueError(f"reconstruct takes 1 step or more and a positive rate, got {steps} steps, rate {lr:g}")
        if not has_data:
            raise ValueError("reconstruct trains blocks on the calibration data, which is missing")
        if self.inputs == "dense":
            raise ValueError(
                "reconstruct trains a block on what the pruned blocks before it produce, and inputs='dense' writes no "
                "block before all are pruned: leave one of them out"
            )
        if not alone:
            raise ValueError("reconstruct trains one block after another in one process: leave out --nproc")

    def _check_target(self) -> None:
        """Exactly one of a sparsity, a fixed pattern and a Budget says how much is pruned."""
        from leanstep.pruning.allocate.budgets import Budget

        by_weights = self.budget in (None, "params")
        if self.fixed is not None:
            self._check_fixed(self.fixed, by_weights)
        elif (self.sparsity is None) != isinstance(self.budget, Budget):
            got = "neither" if self.sparsity is None else f"sparsity={self.sparsity:g} and a Budget"
            raise ValueError(
                "expected a sparsity, such as 0.6 (--sparsity 0.6), alone or with the name of a budget; or a fixed "
                f"pattern, such as 2:4 (--pattern 2:4); or, in Python, a Budget alone; got {got}"
            )
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            near = f"; did you mean {self.sparsity / 100:g}?" if 1 < self.sparsity < 100 else ""
            raise ValueError(
                f"sparsity is the fraction of zeros and must lie between 0 and 1, got {self.sparsity:g}{near}"
            )
        if not by_weights and self.allocation != "dp":
            raise ValueError(f"a budget other than a number of weights needs allocation='dp', got {self.allocation!r}")

    def _check_fixed(self, fixed: NM, by_weights: bool) -> None:
        if self.sparsity is not None and abs(self.sparsity - fixed.sparsity) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} has a sparsity of {fixed.sparsity:g}, got sparsity={self.sparsity:g}; leave "
                f"sparsity out, or use the pattern N:{fixed.m}, which chooses n for each matrix"
            )
        if self.allocation not in ("uniform", "dp"):
            raise ValueError(
                f"pattern {self.pattern} is the same for every matrix, which leaves {self.allocation!r} nothing to "
                "allocate"
            )
        if not by_weights:
            raise ValueError(
                f"pattern {self.pattern} is the same for every matrix, whatever the budget; leave that out"
            )
        if not 0 < fixed.sparsity < 1:
            raise ValueError(
                f"pattern {self.pattern} has a sparsity of {fixed.sparsity:g}, and must lie between 0 and 1, such as "
                "2:4"
            )

    def _check_planning(self) -> None:
        if self.curve_score is not None and not self.plans:
            raise ValueError(
                f"curve_score={self.curve_score!r} is the score of curves, and of the slopes that ATP tries: expected "
                "allocation='dp' or 'atp', and a pattern that leaves a choice, unstructured or N:M with a number for "
                f"M; got allocation={self.allocation!r}, pattern={self.pattern!r}"
            )
        if self.refine is not None and self.method != "dp":
            problem = f"got {self.allocation!r}"
            if (fixed := self.fixed) is not None:
                problem = f"got the pattern {fixed}, by which every matrix keeps {fixed.n} of {fixed.m} weights"
            raise ValueError(
                "refine exchanges weights between matrices: expected allocation='dp', and a pattern that leaves a "
                f"choice, unstructured or N:M with a number for M, such as N:8; {problem}. Leave out refine (--refine, "
                "--refine-evaluations), or take another --allocation or --pattern"
            )

    def _check_curves(self) -> None:
        """Refuse settings of curves, other than the defaults, where no curve is measured."""
        for name in ("granularity", "correction", "curves", "levels"):
            value = getattr(self, name)
            if value == getattr(PruneConfig, name) or self.method == "dp":
                continue
            what = f"{name}={value!r}" if isinstance(value, str) else name
            if self.allocation != "dp":
                verb = "are" if name.endswith("s") else "is"
                raise ValueError(f"{what} {verb} for allocation='dp' only, got {self.allocation!r}")
            raise ValueError(
                f"pattern {self.pattern} is the same for every matrix, so that {what} would have no effect; leave "
                f"{name} out"
            )
        if self.levels is not None:
            from leanstep.pruning.allocate.levels import check_levels

            check_levels(self)


def _declared() -> list[Field[Any]]:
    # those with an option of the command
    return [setting for setting in fields(PruneConfig) if setting.metadata]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How :func:`leanstep.pruning.prune` runs, which changes no bit of its result on one process.

    Attributes:
        resume: file to which measured points are appended; points already in it are not measured again. For the same
            ``sparsity``, what ``minutes`` chose holds: the method, and the samples on which ``anchored`` measures; and
            after the end of ``anchored`` no point is added.
            It is locked: of two runs with one file, the second is refused.
        progress: called with (points measured, points in all, name of the matrix); and by ``prune`` with (done, in all,
            name of a phase), 0 of 0 where a phase begins: ``statistics``, ``curves``, ``refinement``, ``comparison``,
            ``pruning`` or ``reconstruction``.
        stored: function from a parameter's name to its original values, or None. Parameters with such values are read
            again on restoring, not copied before pruning.
        scratch: folder on a disk for the dense outputs and cached activations; None: they are kept in memory.
        processes: those that prune this model together, each with all of it and all data. The calibration batches, and
            the points of curves, the samples that judge an exchange and the matrices of a block are spread over them.
            The result is that of one process with as many threads: bit for bit, but for sums of Gram matrices, which
            are added in another order. None: this one.
    """

    resume: str | Path | None = None
    progress: Progress | None = None
    stored: Callable[[str], Tensor | None] | None = None
    scratch: str | Path | Scratch | None = None
    processes: Processes | None = None


def begin(progress: Progress | None, phase: str) -> None:
    """Tell a function that a phase begins of which nothing is counted yet."""
    if progress is not None:
        progress(0, 0, phase)


def takes_fields(*tables: type) -> Callable[[F], F]:
    """Decorator: ``**options`` of a function are the fields of these dataclasses, and its signature shows them."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        taken = {one.name for one in parameters}
        parameters += [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for table in tables
            for one in fields(table)
            if one.name not in taken
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return show


def read_fields(table: type[T], options: dict[str, Any]) -> T:
    """Take the fields of a dataclass out of the options of a function."""
    return table(**{one.name: options.pop(one.name) for one in fields(table) if one.name in options})  # type: ignore[arg-type]


def read_config(caller: str, config: PruneConfig | None, options: Mapping[str, Any]) -> PruneConfig:
    """The settings of a call, given as one object, as arguments, or as an object with changes. TypeError for others."""
    for name in options:
        if name not in PruneConfig.__dataclass_fields__:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
    return replace(config or PruneConfig(), **options)
