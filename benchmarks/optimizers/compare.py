"""Compare optimizers on a nano model against a tuned AdamW: the same search for all, judged on other seeds.

    python benchmarks optimizers/compare [key=value ...] --out runs/compare [--family llama] [--size nano] \
        [--workers 2] [--minutes 30] [--budget 20] [--half] [--double adamw] \
        [--other-warmup adamw] [--methods adamw sinkgd]
    python benchmarks optimizers/compare --carry docs/results/llama-nano.jsonl --precision fp32 --judge-steps 100
    python benchmarks optimizers/compare --report docs/results/llama-nano.jsonl [--write | --between lanton muon]

docs/protocol.md has the rules. The first command makes the runs that its file (OUT/FAMILY-SIZE.jsonl) does not have yet
and prints the tables; it can be killed at any moment and goes on where it stopped. ``--minutes`` ends it in time.
``--size nano-lora`` compares them on the adapters of a pretrained nano. ``--half`` judges with half of the steps too,
``--double`` judges these methods with twice the hidden rate that shorter tuning runs chose, ``--other-warmup`` with the
warm-up that they did not choose.
``--carry FILE`` tunes nothing: AdamW has the settings that its search in FILE chose, and the others have them by
``like_adamw``, beside the defaults of the classes (OUT/FAMILY-SIZE-carried.jsonl). ``--family digits`` does so with
docs/results/sparse-digits.jsonl (OUT/digits-carried.jsonl).
Further ``key=value`` pairs are settings of the recipe FAMILY-SIZE-adamw (of llama-nano-lora itself), for all runs. The
second command prints the tables of a file; ``--write`` puts them into docs/, with the figure.
Exit codes: 0 complete, 1 a problem, 2 bad settings, 3 time is up.
"""

from __future__ import annotations

import sys
from pathlib import Path

from common import command_line
from comparison.growth import differences
from comparison.methods import METHODS
from comparison.protocol import ComparisonError, Protocol
from comparison.results import read, writing
from comparison.search import Search, grid_size
from comparison.summary import BASELINE, summarise
from comparison.tables import blocks, write, write_block
from digits.carried import make_carried, table

from leanstep.recipes.config.loader import ConfigError

_DEFAULTS = Protocol()
PARSER = command_line(
    __doc__,
    size=("nano", "the recipe's size; default: %(default)s"),
    budget=(20, "tuning runs of every method; default: %(default)s"),
    workers=(1, "processes, of one thread each; default: %(default)s"),
    minutes=(0.0, "stop after this time; default: never"),
    tune_steps=_DEFAULTS.tune_steps,
    judge_steps=_DEFAULTS.judge_steps,
    eval_every=(_DEFAULTS.eval_every, "steps between evaluations of judged runs; default: %(default)s"),
    precision=(_DEFAULTS.precision, "fp32, or bf16 for products; default: %(default)s"),
    judge_seeds=list(_DEFAULTS.judge_seeds),
    half=(False, "judge with half of the steps too, and compare the orders"),
    write=(False, "with --report: write tables and figure into docs/"),
)
PARSER.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder; default: %(default)s")
PARSER.add_argument("--carry", type=Path, metavar="FILE", help="take AdamW's settings from a file of results")
PARSER.add_argument("--report", type=Path, help="a file of results whose tables to print")
PARSER.add_argument(
    "--between", nargs=2, metavar="METHOD", help="with --report: print the paired difference of two methods instead"
)
PARSER.add_argument("--family", default="llama", choices=["llama", "gpt", "mixtral", "digits"])
PARSER.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
_TUNED = [name for name, method in METHODS.items() if method.start]
for _name, _help in (("--double", "twice the chosen hidden rate"), ("--other-warmup", "the warm-up not chosen")):
    PARSER.add_argument(_name, nargs="+", default=[], choices=_TUNED, help=f"judge these methods with {_help}, too")
PARSER.add_argument("settings", nargs="*", metavar="key=value", help="settings of the recipe, for all runs")
ROOT = Path(__file__).parents[2]
CARRIED_DIGITS = "digits-carried"


def main() -> int:
    """Make the runs, or read them; print the tables."""
    options = PARSER.parse_intermixed_args()
    try:
        if options.between and options.report is None:
            raise ComparisonError("--between needs --report FILE: the results to read")
        if options.between and options.between[0] == options.between[1]:
            raise ComparisonError(f"--between: expected two methods, got {options.between[0]} twice")
        if options.between:
            results = read(options.report)
            print("\n".join(differences(results, summarise(results)[0], *options.between)))
            return 0
        if options.report is not None:
            return report(options.report, options.write)
        if options.write:
            raise ComparisonError("--write needs --report FILE: only a file of results decides what the pages say")
        if options.workers < 1 or options.minutes < 0 or options.eval_every < 1:
            raise ComparisonError("expected --workers and --eval-every of at least 1, and --minutes of at least 0")
        if len(set(options.judge_seeds)) < max(2, len(options.judge_seeds)):
            raise ComparisonError(f"expected two or more different --judge-seeds, not {options.judge_seeds}")
        if options.family == "digits":
            path = options.out / f"{CARRIED_DIGITS}.jsonl"
            make_carried(
                options.carry or ROOT / "docs" / "results" / "sparse-digits.jsonl", path, len(options.judge_seeds)
            )
            return report(path, False)
        return compare(options)
    except (ComparisonError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def compare(options) -> int:
    """Make all missing runs."""
    # imports transformers, which --report does not need
    from comparison.schedule import Scheduler, Stopped

    model = f"{options.family}-{options.size}"
    carried, search = {}, Search.of_this_version(options.budget, model)
    if options.carry:
        carried, search = tuned_adamw(options.carry)
    protocol = Protocol(
        model=model, overrides=tuple(options.settings), precision=options.precision,
        tune_steps=options.tune_steps, judge_steps=options.judge_steps, eval_every=options.eval_every,
        judge_seeds=tuple(options.judge_seeds), **carried,
    )  # fmt: skip
    if not search.carries:
        grid_size(protocol, search.budget)
    # differences are to tuned AdamW
    methods = list(dict.fromkeys([BASELINE, *(m for m in METHODS if m in options.methods and search.takes(m))]))
    again = {"half": methods if options.half else [], "double": options.double, "warmup": options.other_warmup}
    if lacking := sorted({*options.double, *options.other_warmup} - {*methods}):
        raise ComparisonError(f"--double and --other-warmup judge methods of --methods; add {', '.join(lacking)} there")
    for method in methods:
        METHODS[method].optimizer_class()
    path, code = options.out / f"{model}{'-carried' if options.carry else ''}.jsonl", 0
    with writing(path, protocol) as (results, writer):
        scheduler = Scheduler(results, writer, methods, search, options.workers, options.minutes, again)
        try:
            scheduler.go()
        except Stopped as stop:
            print(f"stopped: {stop}", flush=True)
            code = 3
        except KeyboardInterrupt:
            print(f"interrupted; finished runs are in {path}, the same command goes on", flush=True)
            return 130
    report(path, False)
    return 1 if scheduler.edges else code


def tuned_adamw(path: Path) -> tuple[dict[str, tuple[float, ...]], Search]:
    """Weight decay and warm-up of the protocol, and the rates, that the search of a file chose for AdamW."""
    for row in summarise(read(path))[0]:
        if row.method == BASELINE and row.chosen.hidden_lr is not None:
            fixed = {"weight_decays": (row.chosen.weight_decay,), "warmups": (row.chosen.warmup,)}
            return fixed, Search(0, {BASELINE: (row.chosen.hidden_lr, row.chosen.other_lr)})
    raise ComparisonError(f"--carry: {path} has no complete search of AdamW")


def report(path: Path, into_pages: bool) -> int:
    """Print the tables of a file, and write them into the documentation if asked to."""
    if path.stem == CARRIED_DIGITS:
        print(table(path))
        if into_pages:
            write_block(path.stem, table(path), ROOT)
        return 0
    if read(path).unfinished:
        print(f"note: the last line of {path} is cut off and does not count; its run is made again", file=sys.stderr)
    print("\n\n".join(blocks(path).values()))
    if into_pages:
        for changed in write(path, ROOT):
            print(f"wrote {changed.relative_to(ROOT)}")
    return 0
