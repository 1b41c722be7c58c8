"""What the benchmarks share: command lines, the machine's line, interleaved timing, tables, figures, runs of recipes.

Nothing heavy is imported at the top: ``prune_memory.py`` measures processes whose parent must stay small.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
Runs = Mapping[str, Callable[[], Any]]
Clock = Callable[[], float]
TRAIN = (sys.executable, "-P", "-m", "leanstep", "train")


# -- command lines ----------------------------------------------------------------------------------------------------


def command_line(documentation: str | None, **options: Any) -> argparse.ArgumentParser:
    """A parser with one option per keyword: a default, or a pair of a default and a help text.

    The default decides the type. False makes a flag; a list makes an option that takes several values. ``dtype`` takes
    names of torch's floating types, ``threads=0`` leaves the number of threads to torch.
    """
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in options.items():
        default, text = value if isinstance(value, tuple) else (value, "default: %(default)s")
        settings: dict[str, Any] = {"default": default, "help": text}
        if default is False:
            settings["action"] = "store_true"
        elif isinstance(default, list):
            settings |= {"nargs": "+", "type": type(default[0]), "choices": DTYPES if name == "dtype" else None}
        else:
            settings["type"] = type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    return parser


def add_tables(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add positional arguments that choose tables, all by default; ``choices`` refuses an empty list of them."""

    def table(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"the tables are {', '.join(names)}, not {name!r}")
        return name

    parser.add_argument("tables", nargs="*", type=table, default=list(names), help=f"{', '.join(names)}; default: all")


def start(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set the number of threads and print the machine's line."""
    import torch

    options = parser.parse_args()
    if getattr(options, "threads", 0):
        torch.set_num_threads(options.threads)
    print(machine_line(getattr(options, "device", "cpu")), flush=True)
    return options


def required(name: str) -> Any:
    """Import a module of the ``bench`` extra; where it is missing, end with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; it comes with pip install -e '.[bench]'") from None


def processor_name(device: str = "cpu") -> str:
    """Name of the processor or accelerator."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    from leanstep import _process

    return _process.processor_name()


def commit() -> str:
    """Short commit of this repository, with "-dirty" where files differ from it."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_line(device: str = "cpu") -> str:
    """Processor or accelerator, threads, version of torch and commit, for a table's caption."""
    import torch

    name, threads = processor_name(device), torch.get_num_threads()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}, torch {torch.__version__}, commit {commit()}"


def machine_state(device: str = "cpu") -> dict[str, Any]:
    """The machine's line, its load and number of processors now, for a line of results."""
    return {"machine": machine_line(device), "load": round(os.getloadavg()[0], 1), "processors": os.cpu_count()}


def machines(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a table's caption: machine, commits and load of lines that have :func:`machine_state`."""
    parts = [row["machine"].rpartition(", commit ") for row in rows]
    lines, commits = (", ".join(dict.fromkeys(column)) for column in zip(*((p[0], p[2]) for p in parts), strict=True))
    loads, several = [row["load"] for row in rows], "commits" if "," in commits else "commit"
    return f"{lines}, {several} {commits}; load {min(loads)} to {max(loads)} on {rows[0]['processors']} processors"


# -- timing -----------------------------------------------------------------------------------------------------------


def wall_clock() -> float:
    """Seconds, after the accelerator has finished what was started on it."""
    from torch.utils.benchmark import timer

    return timer()


def clock_of(options: argparse.Namespace) -> Clock:
    """The clock that ``--cpu-time`` asks for: processor time of this process, or the wall clock."""
    return time.process_time if options.cpu_time else wall_clock


def timed(run: Callable[[], Any], clock: Clock = wall_clock) -> tuple[float, Any]:
    """Seconds that a call takes, and its result."""
    begin = clock()
    result = run()
    return clock() - begin, result


def interleaved(runs: Runs, rounds: int, warmup: int = 1) -> dict[str, list[Any]]:
    """Results of every run in every round, each in shuffled order, after warm-up rounds in the order given.

    ``torch.utils.benchmark.Timer`` measures one candidate after the other. Here they take turns, so that a change of
    the machine's speed meets all of them.
    """
    for _ in range(warmup):
        for run in runs.values():
            run()
    results: dict[str, list[Any]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            results[name].append(runs[name]())
    return results


def interleaved_seconds(runs: Runs, rounds: int, clock: Clock = wall_clock, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every run in every round, interleaved."""
    return interleaved({name: lambda run=run: timed(run, clock)[0] for name, run in runs.items()}, rounds, warmup)


def interleaved_medians(runs: Runs, rounds: int, clock: Clock = wall_clock, warmup: int = 1) -> dict[str, float]:
    """Median seconds of every run, interleaved."""
    times = interleaved_seconds(runs, rounds, clock, warmup)
    return {name: statistics.median(values) for name, values in times.items()}


# -- memory ------------------------------------------------------------------------------------------------------------


def reset_peak_memory() -> None:
    """Forget the process's peak memory so far, on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident bytes since :func:`reset_peak_memory`; now resident ones where the system has no such number."""
    import psutil

    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match:
            return int(match[1]) * 1024
    return psutil.Process().memory_info().rss


def timed_and_peak(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result of a call, with its processor seconds and peak memory."""
    reset_peak_memory()
    begin = time.process_time()
    result = run()
    return result, {"seconds": time.process_time() - begin, "gib": peak_memory() / 2**30}


# -- output -----------------------------------------------------------------------------------------------------------


def print_table(head: Sequence[str], rows: Iterable[Iterable[Any]], left: Iterable[int] = (0,)) -> None:
    """Print a markdown table, each row as soon as it is there; columns ``left`` are aligned to the left."""
    aligned = set(left)
    rules = ["---" if column in aligned else "---:" for column in range(len(head))]
    for row in (head, rules):
        print(f"| {' | '.join(row)} |")
    for row in rows:
        print(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |", flush=True)


def pyplot() -> Any:
    """Matplotlib's pyplot for SVG files: text stays text, and the same numbers give the same file."""
    matplotlib = required("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "leanstep", "svg.fonttype": "none"}
    return importlib.import_module("matplotlib.pyplot")


def save_svg(figure: Any, path: Path, *, description: str | None = None, **settings: Any) -> None:
    """Write a figure without a date; ``description`` is in its metadata."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": description}, **settings)


# -- files and runs of recipes ----------------------------------------------------------------------------------------


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file with one JSON object per line; none where there is no file.

    A last line without an end is one that its writer, killed, cut off, and does not count. Ends the process with a
    message for any other line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
            assert isinstance(rows[-1], dict)
        except (ValueError, AssertionError):
            raise SystemExit(
                f"{path}:{number}: expected a JSON object; remove the line, it is measured again"
            ) from None
    return rows


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file with one JSON object per line; removes a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row) + "\n").encode())


def train_once(recipe: str, out: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Train a recipe in a process of its own, unless ``out`` holds the finished run, and return its status."""
    status = out / "status.json"
    if not (status.exists() and json.loads(status.read_text())["status"] in ("done", "failed:nan")):
        command = [*TRAIN, recipe, f"out={out}", *settings]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if result.returncode not in (0, 3):  # 3: the loss became NaN
            raise RuntimeError(f"{' '.join(command)} exited {result.returncode}:\n{result.stderr[-2000:]}")
    return json.loads(status.read_text())
