"""The command ``leanstep lr``: the two learning rates of a recipe, by rounds of short runs; each round is a sweep."""

import argparse
import json
import math
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanstep._arguments import OneLineParser, positive
from leanstep._files import table_lines
from leanstep._process import EXIT_CODES
from leanstep.recipes.config.loader import ConfigError, find_recipe, load
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.sweep.command import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    not_written,
    overrides_of,
    run_options,
    say,
)
from leanstep.recipes.sweep.grid import Plan, plan_runs, read_words
from leanstep.recipes.sweep.ledger import DONE, Ledger
from leanstep.recipes.sweep.page import write_pages
from leanstep.recipes.sweep.results import summarize, table
from leanstep.recipes.sweep.runner import Runner, is_finished

if TYPE_CHECKING:
    from leanstep.optimizers.rates.search import Powers

_FEWEST_STEPS = 60
_WEIGHTS = ("checkpoints", "final", "final-ema")  # of a run, which no one reads after its loss


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep lr``. Exit codes are those of ``leanstep sweep``; 1 also when the best rates are not bracketed."""
    options, words = overrides_of(parser(), argv)
    if words is None:
        return EXIT_BAD_INPUT
    try:
        return _search(_prepare(options, words), words, options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        return not_written(error)


def parser() -> OneLineParser:
    """The options of the command."""
    text = (
        "Choose the learning rates of a recipe, that of matrices and that of the rest, by short runs in factors of "
        "two. The same command continues a search."
    )
    made = OneLineParser(prog="leanstep lr", description=text, allow_abbrev=False)
    run_options(made, "key.path=value", "changes of the recipe; optimizer.lr=RATE is the start")
    made.add_argument(
        "--steps", type=positive, metavar="N", help="of a run; default a tenth of the recipe's, and at least 60"
    )
    made.add_argument("--runs", type=positive, default=17, metavar="N", help="at most so many; default 17")
    return made


@dataclass
class _Search:
    """What is searched, and the runs so far.

    Attributes:
        plan: of all rounds together.
        roles: of the model, by the rate that they have (:func:`roles_by_rate`).
        losses: validation loss at powers of two of the recipe's rates; inf where a run diverged.
        ends: of the ledgers of all rounds.
    """

    plan: Plan
    config: RunConfig
    roles: dict[str, list[str]]
    losses: "dict[Powers, float]" = field(default_factory=dict)
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rates(self, powers: "Powers") -> tuple[list[str], dict[str, str]]:
        """The overrides that set the rates, and the rates as texts."""
        from leanstep.optimizers.rates.search import scaled_rates

        section = self.config.optimizer
        of_roles = {entry["role"]: entry for entry in section.groups if "role" in entry}
        scaled, rates = scaled_rates({"lr": section.lr, "settings": of_roles}, section.lr, self.roles, powers)
        settings = scaled.get("settings", {})
        groups = [settings.pop(entry["role"]) if "role" in entry else entry for entry in section.groups]
        groups += [{"role": role, **values} for role, values in settings.items()]
        words = [f"optimizer.lr={scaled['lr']!r}", *([f"optimizer.groups={json.dumps(groups)}"] if groups else [])]
        return words, {f"lr of {kind}": f"{rate:.4g}" for kind, rate in rates.items()}


def _prepare(options: argparse.Namespace, words: list[str]) -> _Search:
    find_recipe(options.recipe)
    fixed, grid = read_words(words)
    if grid:
        raise ConfigError([f"{next(iter(grid))}: give one value; leanstep lr chooses the learning rates alone"])
    steps = options.steps
    if steps is None:
        whole = load(options.recipe, fixed, world_size=options.nproc).steps
        steps = min(whole, max(_FEWEST_STEPS, whole // 10))
    # a run is validated at its end, and needs no checkpoint before it
    fixed = ["eval.every=0", "checkpoint.every=0", *fixed, f"steps={steps}"]
    config = load(options.recipe, fixed, world_size=options.nproc)
    from leanstep.optimizers.rates.search import roles_by_rate
    from leanstep.recipes.check.costs import meta_model

    folder = options.out if options.out is not None else Path("runs") / f"{config.name}-lr"
    plan = Plan(str(options.recipe), config.name, tuple(fixed), {}, folder, [])
    return _Search(plan, config, roles_by_rate(meta_model(config)))


def _search(search: _Search, words: Sequence[str], options: argparse.Namespace) -> int:
    from leanstep.optimizers.rates.search import best_powers, next_powers

    say(f"learning rates of {search.plan.title}: runs of {search.config.steps} steps; in {search.plan.folder}")
    number = 0
    while waiting := next_powers(search.losses, len(search.roles)):
        number += 1
        if len(search.losses) + len(waiting) > options.runs:
            break
        if code := _round(search, number, waiting, options):
            return code
    best = best_powers(search.losses)
    command, texts = search.rates(best)
    results = summarize(search.plan, search.ends)
    # another setting may have a lower loss by less than runs of other seeds differ
    results = replace(results, best=next(row for row in results.rows if row.values == texts), level=[], edges=[])
    print("\n".join(table_lines(table(results))))
    print(f"{write_pages(search.plan, results, search.ends)} written")
    if math.isinf(search.losses[best]):
        print("every run diverged; give a lower optimizer.lr as the start", file=sys.stderr)
        return EXIT_FAILED
    command = ["leanstep", "train", options.recipe, *words, *command]
    print(f"best, loss {search.losses[best]:.4f}: {shlex.join(command)}")
    if waiting:
        print(f"{len(search.losses)} runs did not bracket the best rates; give --runs a larger number", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _round(search: _Search, number: int, waiting: "Sequence[Powers]", options: argparse.Namespace) -> int:
    """Run what a round needs, as a sweep of its own; return an exit code, 0 if all runs have a loss."""
    made = [search.rates(powers) for powers in waiting]
    settings = [texts for _, texts in made]
    grid = {key: list(dict.fromkeys(texts[key] for texts in settings)) for key in settings[0]}
    begun = replace(search.plan, grid=grid, folder=search.plan.folder / "runs" / f"round-{number}")
    plan = plan_runs(begun, settings, [words for words, _ in made], options.nproc)
    ledger = Ledger(plan)
    try:
        stopped = Runner(plan, ledger, jobs=options.jobs, processes=options.nproc, say=say).go()
    finally:
        ledger.close()
    if stopped:
        print("stopped; the same command continues the search", file=sys.stderr)
        return EXIT_CODES[signal.Signals(stopped)]
    for powers, run in zip(waiting, plan.runs, strict=True):
        end = ledger.ends.get(run.name, {})
        if not is_finished(end):
            print(f"{run}: {end.get('reason', 'it has not ended')}. The same command tries it again", file=sys.stderr)
            return EXIT_FAILED
        for folder in _WEIGHTS:
            shutil.rmtree(plan.folder / "runs" / run.name / folder, ignore_errors=True)
        search.losses[powers] = end["val_loss"] if end["status"] == DONE else math.inf
        name = f"round-{number}/runs/{run.name}"
        search.ends[name] = end
        search.plan.runs.append(replace(run, name=name))
        for key, text in run.values.items():
            texts = search.plan.grid.setdefault(key, [])
            texts.extend({text} - set(texts))
    return 0
