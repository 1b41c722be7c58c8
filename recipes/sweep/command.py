"""The command ``leanstep sweep``: train a grid of settings and seeds, and show which setting is best."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from leanstep._arguments import OneLineParser, positive
from leanstep._files import one_line, table_lines
from leanstep._process import EXIT_CODES
from leanstep.recipes.config.loader import ConfigError
from leanstep.recipes.config.values import unknown_option
from leanstep.recipes.sweep.grid import Plan, make_plan
from leanstep.recipes.sweep.ledger import Ledger, LedgerError
from leanstep.recipes.sweep.page import write_pages
from leanstep.recipes.sweep.results import Results, summarize, table
from leanstep.recipes.sweep.runner import Runner, is_finished

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``leanstep sweep``.

    Returns 0 when every run is done or has diverged, 1 when runs failed or a file could not be written, 2 for bad
    input, 130 or 143 after a signal.
    """
    options, words = overrides_of(parser(), argv)
    if words is None:
        return EXIT_BAD_INPUT
    try:
        plan = make_plan(options.recipe, words, options.out, processes=options.nproc)
        print("".join(f"{note}\n" for note in plan.notes), end="", flush=True)
        if options.dry_run:
            _show_plan(plan)
            return EXIT_DONE
        ledger = Ledger(plan)
    except (ConfigError, LedgerError) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        return not_written(error)
    try:
        return _sweep(plan, ledger, options)
    except OSError as error:
        return not_written(error)
    finally:
        ledger.close()


def parser() -> OneLineParser:
    """The options of the command."""
    text = "Train a grid of settings and seeds, and show which setting is best. The same command continues a sweep."
    made = OneLineParser(prog="leanstep sweep", description=text, allow_abbrev=False)
    run_options(
        made,
        "key.path=value,value",
        "values to try, as in optimizer.lr=1e-3,2e-3 seed=0,1,2; a single value is set in all runs",
    )
    made.add_argument("--dry-run", action="store_true", help="list the runs and train nothing")
    return made


def run_options(made: OneLineParser, word: str, explanation: str) -> None:
    """Add the recipe, its overrides and where the runs go: what all commands have that train several runs."""
    made.add_argument("recipe", metavar="RECIPE", help="a recipe of `leanstep recipes list`, or a file")
    made.add_argument("values", metavar=word, nargs="*", help=explanation)
    made.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at once; default 1")
    made.add_argument("--nproc", type=positive, default=1, metavar="N", help="processes of each run; default 1")
    folder = f"runs/NAME-{made.prog.split()[-1]}"
    made.add_argument("--out", type=_folder, metavar="DIR", help=f"folder of all runs; default {folder}")


def overrides_of(made: OneLineParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str] | None]:
    """Parse a command line with overrides anywhere; None in their place, and a message, for an unknown option."""
    options, rest = made.parse_known_intermixed_args(argv)
    if flags := [word for word in rest if word.startswith("-")]:
        print(unknown_option(flags[0], made.option_names(), made.prog), file=sys.stderr)
        return options, None
    return options, [*options.values, *rest]


def _folder(text: str) -> Path:
    # the runs expand ~ in their own folders, and the sweep must find them there
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # a user without a home
        raise argparse.ArgumentTypeError(f"{text!r} names no folder: {error}") from None


def _sweep(plan: Plan, ledger: Ledger, options: argparse.Namespace) -> int:
    finished = sum(is_finished(ledger.ends.get(run.name)) for run in plan.runs)
    print(f"sweep of {plan.title}: {len(plan.runs)} runs, {finished} of them finished; in {plan.folder}", flush=True)
    runner = Runner(plan, ledger, jobs=options.jobs, processes=options.nproc, say=say)
    number = runner.go()
    results = summarize(plan, ledger.ends)
    _show(results)
    print(f"{write_pages(plan, results, ledger.ends)} written")
    if number:
        print("stopped; the same command continues the sweep", file=sys.stderr)
        return EXIT_CODES[signal.Signals(number)]
    unfinished = [run for run in plan.runs if not is_finished(ledger.ends.get(run.name))]
    if unfinished:
        reason = ledger.ends.get(unfinished[0].name, {}).get("reason", "it has not ended")
        print(
            f"{len(unfinished)} of {len(plan.runs)} runs have no result; the first: {unfinished[0]}: {reason}. "
            "The same command tries them again",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return EXIT_DONE


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _show_plan(plan: Plan) -> None:
    for run in plan.runs:
        print(f"{plan.folder / 'runs' / run.name}: {run}")
    print(f"{len(plan.runs)} runs of {plan.title}")


def _show(results: Results) -> None:
    print("\n".join(table_lines(table(results))))
    for sentence in results.edges:
        print(f"edge: {sentence}")


def not_written(error: OSError) -> int:
    """Say what could not be written; return the exit code."""
    reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"error: the sweep could not go on: {one_line(reason)}", file=sys.stderr)
    return EXIT_FAILED
