"""Steps that M-FAC and SGD need on a quadratic and on logistic regressions over real data, both with tuned settings.

    python benchmarks optimizers/mfac_quadratic [--figure docs/mfac-steps.svg] [--seeds 5] [--steps 1000]
    python benchmarks optimizers/mfac_quadratic --shrinkage [--seeds 3] [--steps 200]

Problems, all convex, trained on mini-batches of 64 and judged by their whole loss:

* ``quadratic``: least squares on 4096 Gaussian rows of 60 features whose variances fall from 1 to 1e-3; noise of
  variance 1, half as large again as what there is to learn.
* ``breast cancer``: logistic regression, scikit-learn's 569 x 30 data as they come, divided by one number (the standard
  deviation of all entries), and an L2 term of 1e-3.
* ``digits``: softmax regression, scikit-learn's 1797 x 64 data in ten classes, scaled to [0, 1], the same L2 term.

A run counts the steps until the loss is within a fraction of the way from the start to the minimum (found by Newton's
method): ``loss <= minimum + fraction * (start - minimum)``, looked at every 5 steps. Every setting of a grid is tried
on one seed (SGD: rates; SGD with momentum 0.9: rates; M-FAC as published: rates and dampings, window 256); the one with
the fewest steps to the smallest fraction then runs with the other seeds. A setting at the edge of its grid is reported
as such.

``--shrinkage`` compares M-FAC with its shrinkage to the published one instead, at the best settings of the latter and
at the defaults of the class: the largest loss above the minimum in a run, and the last one, the start being 1.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import scipy.optimize
import torch
from common import command_line, print_table, pyplot, required, save_svg
from torch import Tensor

from leanstep.optimizers import MFAC

BATCH, EVERY, L2, WINDOW = 64, 5, 1e-3, 256
RATES = tuple(2.0**k for k in range(-6, 4))
MFAC_RATES = tuple(2.0**k for k in range(-11, -2))
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PARSER = command_line(__doc__, seeds=5, steps=(1000, "the most steps of a run"))
PARSER.add_argument("--shrinkage", action="store_true", help="compare M-FAC with its shrinkage and as published")
PARSER.add_argument("--figure", type=Path, help="where the figure goes, as SVG")


class Problem(NamedTuple):
    """A convex loss of one weight tensor over rows of data, the fractions to reach, and the minimum of the loss."""

    name: str
    data: Tensor
    target: Tensor
    shape: tuple[int, ...]
    loss: Loss
    fractions: tuple[float, ...]
    minimum: float

    def excess(self, weight: Tensor) -> float:
        """The loss over all data, less the minimum."""
        return float(self.loss(weight.detach(), self.data, self.target)) - self.minimum


def squares(weight: Tensor, data: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error."""
    return 0.5 * (data @ weight - target).square().mean()


def logistic(weight: Tensor, data: Tensor, target: Tensor) -> Tensor:
    """Mean log loss of two classes, with the L2 term."""
    penalty = 0.5 * L2 * weight.square().sum()
    return torch.nn.functional.binary_cross_entropy_with_logits(data @ weight, target) + penalty


def softmax(weight: Tensor, data: Tensor, target: Tensor) -> Tensor:
    """Mean log loss of several classes, with the L2 term."""
    return torch.nn.functional.cross_entropy(data @ weight, target) + 0.5 * L2 * weight.square().sum()


def problems() -> Iterator[Problem]:
    """The three problems, with their minima."""
    datasets, bias = required("sklearn.datasets"), torch.nn.ConstantPad1d((0, 1), 1.0)  # a column of ones
    chance = torch.Generator().manual_seed(0)
    data = torch.randn(4096, 60, generator=chance, dtype=torch.float64) * torch.logspace(0, -1.5, 60)
    solution = torch.randn(60, generator=chance, dtype=torch.float64) / torch.logspace(1, -0.5, 60)
    target = data @ solution + torch.randn(4096, generator=chance, dtype=torch.float64)
    yield with_minimum("quadratic", data, target, (60,), squares, (0.3, 0.1, 0.05))
    data, target = map(torch.from_numpy, datasets.load_breast_cancer(return_X_y=True))
    target = target.double()
    yield with_minimum("breast cancer", bias(data / data.std()), target, (31,), logistic, (0.1, 0.01, 0.003))
    data, target = map(torch.from_numpy, datasets.load_digits(return_X_y=True))
    yield with_minimum("digits", bias(data / 16), target, (65, 10), softmax, (0.1, 0.01, 0.005))


def with_minimum(
    name: str, data: Tensor, target: Tensor, shape: tuple[int, ...], loss: Loss, fractions: Any
) -> Problem:
    """The problem, solved by Newton's method in a trust region until the gradient is gone."""

    def flat_loss(weight: Tensor) -> Tensor:
        return loss(weight.view(shape), data, target)

    def numpy_function(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
        return lambda x: function(torch.from_numpy(x)).numpy()

    solution = scipy.optimize.minimize(
        numpy_function(flat_loss),
        torch.zeros(shape).flatten().numpy(),
        jac=numpy_function(torch.func.grad(flat_loss)),
        hess=numpy_function(torch.func.hessian(flat_loss)),
        method="trust-exact",
        options={"gtol": 1e-9},
    )
    if not solution.success:
        raise RuntimeError(f"{name}: Newton's method has not converged: {solution.message}")
    return Problem(name, data, target, shape, loss, fractions, float(solution.fun))


class Setting(NamedTuple):
    """An optimizer and its tuned settings."""

    method: str
    lr: float
    damping: float = 0.0

    def build(self, weight: Tensor) -> torch.optim.Optimizer:
        """The optimizer over one weight."""
        if self.method == "M-FAC":
            return MFAC([weight], lr=self.lr, window=WINDOW, damping=self.damping, shrinkage=0.0)
        return torch.optim.SGD([weight], lr=self.lr, momentum=0.9 if "momentum" in self.method else 0.0)

    def text(self) -> str:
        """For the table."""
        return f"lr {self.lr:.3g}" + (f", damping {self.damping:g}" if self.damping else "")


GRIDS = {
    "SGD": [Setting("SGD", lr) for lr in RATES],
    "SGD, momentum 0.9": [Setting("SGD, momentum 0.9", lr) for lr in RATES],
    "M-FAC": [Setting("M-FAC", lr, damping) for lr, damping in itertools.product(MFAC_RATES, DAMPINGS)],
}


def run(problem: Problem, setting: Setting, seed: int, steps: int) -> list[float]:
    """Excess of the whole loss, as a fraction of the first, every ``EVERY`` steps until the smallest is reached."""
    weight = torch.zeros(problem.shape, requires_grad=True)
    optimizer = setting.build(weight)
    chance = torch.Generator().manual_seed(seed)
    first = problem.excess(weight)
    excess = [1.0]
    for step in range(1, steps + 1):
        rows = torch.randint(len(problem.data), (BATCH,), generator=chance)
        optimizer.zero_grad()
        problem.loss(weight, problem.data[rows], problem.target[rows]).backward()
        optimizer.step()
        if step % EVERY == 0:
            excess.append(problem.excess(weight) / first)
            if not excess[-1] < 100 or excess[-1] <= problem.fractions[-1]:
                break
    return excess


def steps_to(excess: list[float], fraction: float) -> float:
    """Steps until the excess has fallen to ``fraction``; inf where it has not."""
    return next((EVERY * i for i, value in enumerate(excess) if value <= fraction), float("inf"))


def tune(problem: Problem, method: str, steps: int) -> Setting:
    """The best setting of a method's grid on one seed."""
    best, least = GRIDS[method][0], (float("inf"), float("inf"))
    for setting in GRIDS[method]:
        # a setting slower than the best so far is stopped there
        excess = run(problem, setting, 1000, int(min(steps, least[0])))
        score = steps_to(excess, problem.fractions[-1]), min(excess)
        if score < least:
            best, least = setting, score
    for name in ("lr", "damping") if method == "M-FAC" else ("lr",):
        values, value = [getattr(setting, name) for setting in GRIDS[method]], getattr(best, name)
        if value in (min(values), max(values)):
            print(f"note: {problem.name}, {method}: the best {name}, {value:g}, is at the edge of its grid")
    return best


def plot(curves: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Excess loss against steps, one panel a problem, one line a seed."""
    figure, panels = pyplot().subplots(1, len(curves), figsize=(3.6 * len(curves), 3.4), sharey=True)
    for axes, (name, methods) in zip(panels, curves.items(), strict=True):
        for colour, (method, runs) in zip(("#4c72b0", "#dd8452", "#55a868"), methods.items(), strict=True):
            for i, excess in enumerate(runs):
                steps = [max(EVERY * k, 1) for k in range(len(excess))]
                axes.plot(steps, excess, color=colour, linewidth=1, alpha=0.7, label=method if i == 0 else None)
        axes.set(title=name, xlabel="steps", xscale="log", yscale="log", ylim=(2e-3, 2))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss above the minimum, start = 1")
    panels[0].legend(frameon=False)
    save_svg(figure, path)


def row(problem: Problem, setting: Setting, runs: list[list[float]]) -> list[str]:
    """A row of the table: median steps of the seeds to every fraction, and the range for the smallest."""
    cells = []
    for fraction in problem.fractions:
        counts = sorted(steps_to(excess, fraction) for excess in runs)
        middle = statistics.median(counts)
        missed = sum(count == float("inf") for count in counts)
        text = "not reached" if middle == float("inf") else f"{middle:g} ({counts[0]:g} to {counts[-1]:g})"
        cells.append(f"{fraction:g}: " + text.replace("inf", f"not by {missed} of {len(counts)}"))
    return [problem.name, setting.method, setting.text(), *cells]


# the settings that this program chooses for the published M-FAC
TUNED = {
    "quadratic": {"lr": 2.0**-10, "damping": 1e-4, "window": WINDOW},
    "breast cancer": {"lr": 2.0**-5, "damping": 1e-3, "window": WINDOW},
    "digits": {"lr": 2.0**-4, "damping": 1e-2, "window": WINDOW},
}


def shrinkage_rows(seeds: int, steps: int) -> Iterator[list[str]]:
    """Rows of the table of ``--shrinkage``."""
    for problem in problems():
        for name, settings in (("tuned", TUNED[problem.name]), ("defaults", {})):
            for shrinkage in (0.0, 1.0):
                options = {**settings, "shrinkage": shrinkage}
                runs = [excess_of_steps(problem, options, seed, steps) for seed in range(seeds)]
                yield [problem.name, name, f"{shrinkage:g}", *(f"{max(run):.3g}, {run[-1]:.3g}" for run in runs)]


def excess_of_steps(problem: Problem, options: dict[str, Any], seed: int, steps: int) -> list[float]:
    """The loss above the minimum after every step of M-FAC, as a fraction of the first."""
    weight = torch.zeros(problem.shape, requires_grad=True)
    optimizer = MFAC([weight], **options)
    chance, first, excess = torch.Generator().manual_seed(seed), problem.excess(weight), []
    for _ in range(steps):
        rows = torch.randint(len(problem.data), (BATCH,), generator=chance)
        optimizer.zero_grad()
        problem.loss(weight, problem.data[rows], problem.target[rows]).backward()
        optimizer.step()
        excess.append(problem.excess(weight) / first)
    return excess


def main() -> None:
    """Tune, run, print, plot."""
    options = PARSER.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.shrinkage:
        head = ["problem", "settings", "shrinkage", *(f"seed {seed}: largest, last" for seed in range(options.seeds))]
        print_table(head, shrinkage_rows(options.seeds, options.steps), left=(0, 1))
        return
    curves: dict[str, dict[str, list[list[float]]]] = {}
    rows = []
    for problem in problems():
        curves[problem.name] = {}
        for method in GRIDS:
            setting = tune(problem, method, options.steps)
            runs = [run(problem, setting, seed, options.steps) for seed in range(options.seeds)]
            curves[problem.name][method] = runs
            rows.append(row(problem, setting, runs))
            print(*rows[-1], sep=" | ", flush=True)
    print()
    head = ["problem", "method", "setting", "median steps to a fraction (seeds' range)", "", ""]
    print_table(head, rows, left=range(6))
    if options.figure:
        plot(curves, options.figure)
