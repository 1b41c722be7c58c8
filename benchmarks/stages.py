"""What the stages of ``gpu`` share: the command line, the device, the results file, and the loop over a stage's cases.

A stage is a benchmark made of named cases, and a case returns rows of the stage's table. ``OUT/STAGE.json`` is replaced
after every case. A stage that is killed loses the case it is at, and the next call runs only cases without rows.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import command_line, commit, print_table

from leanstep._files import format_bytes, one_line, write_text

ROOT = Path(__file__).parents[1]
PEERS = ("bitsandbytes", "dion", "lion-pytorch", "peft", "pytorch-optimizer", "transformers")
Row = dict[str, Any]
Cases = Mapping[str, Callable[[], list[Row]]]
# exit codes of a stage besides argparse's 2
DONE, WITH_PROBLEMS, DEVICE_LOST = 0, 1, 3


def stage_parser(documentation: str | None) -> argparse.ArgumentParser:
    """The command line of a stage."""
    parser = command_line(
        documentation, dry_run=(False, "tiny sizes on the CPU: tries the code, measures nothing"),
        seconds=(600.0, "time for the stage, which training fills; default 600"),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the results file; default: print only")
    return parser


@dataclass
class Stage:
    """One call of a stage: where it runs, its sizes, and when it must end."""

    device: Any
    sizes: SimpleNamespace
    dry_run: bool
    out: Path | None
    end: float

    def seconds_left(self) -> float:
        """Seconds until the stage is killed."""
        return self.end - time.monotonic()


# -- machine ----------------------------------------------------------------------------------------------------------


def find_device(dry_run: bool) -> Any:
    """The first CUDA or ROCm device, or the CPU for a dry run. Ends the process where there is no device."""
    import torch

    if dry_run:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = f"torch {torch.__version__} sees none here" if built else f"torch {torch.__version__} is built without"
        raise SystemExit(
            f"expected a CUDA or ROCm device, {reason}; install a torch for the device and check its driver, or try "
            "the command on the CPU with --dry-run"
        )
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def machine_of(device: Any) -> dict[str, str]:
    """What all results of one folder have in common: card, commit, code, and versions."""
    import torch

    # a changed page is no other code, which has a hash of its own
    name = commit().removesuffix("-dirty")
    machine = {"device": "CPU, a dry run", "commit": name, "code": code_digest(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["device"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
        machine["runtime"] = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return machine | {"triton": installed("triton")}


def installed(name: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def code_digest() -> str:
    """Hash of the package's and the benchmarks' code, which a commit's name does not tell where files are changed."""
    sha = hashlib.sha256()
    folders = ("benchmarks", "kernels", "leanstep", "lora", "optimizers", "pruning", "recipes", "sparsity")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".yaml"):
            sha.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:12]


def clocks(device: Any) -> str:
    """Clocks, power, temperature and driver that nvidia-smi reports for the device now, and its free memory."""
    import torch

    if device.type != "cuda":
        return "no device"
    free, total = torch.cuda.mem_get_info(device)
    memory = f"{format_bytes(free)} of {format_bytes(total)} free"
    query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu,driver_version"
    # by its UUID: nvidia-smi ignores CUDA_VISIBLE_DEVICES
    identifier = f"GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', '')}"
    command = ["nvidia-smi", "-i", identifier, f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"unknown (no report of nvidia-smi), {memory}"
    labels = ("SM", "memory", "SM at most", "power", "power limit", "degrees C", "driver")
    return ", ".join([*(f"{a} {b.strip()}" for a, b in zip(labels, result.stdout.split(","), strict=False)), memory])


def busy_bytes(device: Any) -> int:
    """Bytes of the device's memory that are taken, this process's context included."""
    import torch

    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


# -- results ----------------------------------------------------------------------------------------------------------


class Results:
    """The results file of a stage: replaced as a whole at every change; without a path, in memory only."""

    def __init__(self, name: str, machine: dict[str, str], path: Path | None) -> None:
        self.path, self.lock = path, threading.Lock()
        self.content: dict[str, Any] = {"stage": name, "machine": machine, "clocks": [], "packages": {}, "cases": {}}
        if path is not None and path.exists():
            self.content = read_results(path, machine)

    def waiting(self, names: Iterable[str]) -> list[str]:
        """Cases without rows: first those that were never started, then those that failed or were killed."""
        cases = self.content["cases"]
        for name in names:
            cases.setdefault(name, {})
        return sorted((name for name in names if "rows" not in cases[name]), key=lambda name: bool(cases[name]))

    def put(self, case: str, **fields: Any) -> None:
        """Replace what is stored of a case."""
        with self.lock:
            self.content["cases"][case] = fields
            self.write()

    def write(self) -> None:
        """Replace the file."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def read_results(path: Path, machine: dict[str, str] | None = None) -> dict[str, Any]:
    """Read a stage's results. Ends the process for a damaged file, and for one of another machine, if given."""
    try:
        content = json.loads(path.read_text("utf-8"))
        before = dict(content["machine"])
        machine = before if machine is None else machine
        assert all(isinstance(content[key], dict) for key in ("packages", "cases"))
        assert isinstance(content["clocks"], list) and content["stage"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise SystemExit(f"{path}: expected the results of a stage, got {one_line(error)}; remove the file") from None
    different = [
        f"{key} {before.get(key)!r}, now {machine.get(key)!r}"
        for key in {**before, **machine}
        if before.get(key) != machine.get(key)
    ]
    if different:
        raise SystemExit(
            f"{path}: measured elsewhere ({'; '.join(different)}); choose another --out, or return to that state. "
            "Results of one folder are of one card, commit and version"
        )
    return content


def columns_of(rows: Iterable[Row]) -> list[str]:
    """All columns, in the order of their first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def cell(value: Any) -> str:
    """A table's cell: three digits, words for checks."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "\\|")


def rows_of(content: dict[str, Any]) -> list[Row]:
    """All rows of a stage."""
    return [row for case in content["cases"].values() for row in case.get("rows", ())]


def problems_of(content: dict[str, Any]) -> list[str]:
    """Cases that failed, were cut short, or wait, in words."""
    problems = []
    for name, case in content["cases"].items():
        if "problem" in case:
            problems.append(f"{name}: {case['problem']}")
        elif "rows" not in case:
            problems.append(f"{name}: {'ended before its result' if case else 'not started'}")
    return problems


# -- the loop ---------------------------------------------------------------------------------------------------------


def run_stage(
    name: str,
    parser: argparse.ArgumentParser,
    cases_of: Callable[[Stage], Cases],
    full: dict[str, Any],
    dry: dict[str, Any],
    workers: int = 1,
) -> int:
    """Run the cases of a stage that have no rows yet, and print its table. Returns the exit code.

    ``full`` and ``dry`` are the sizes on a device and in a dry run. With ``workers``, cases run in threads.
    """
    options = parser.parse_args()
    device = find_device(options.dry_run)
    machine = machine_of(device)
    results = Results(name, machine, options.out and options.out / f"{name}.json")
    sizes = SimpleNamespace(**(dry if options.dry_run else full))
    stage = Stage(device, sizes, options.dry_run, options.out, time.monotonic() + options.seconds)
    cases = cases_of(stage)
    waiting = results.waiting(cases)
    results.content["clocks"].append(clocks(device))
    results.content["packages"] = {name: installed(name) for name in PEERS}
    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda case: run_case(case, cases[case], results), waiting))
    else:
        for case in waiting:
            if not run_case(case, cases[case], results):
                return DEVICE_LOST
            release_memory(device)
    results.content["clocks"].append(clocks(device))
    results.write()
    rows, problems = rows_of(results.content), problems_of(results.content)
    head = columns_of(rows)
    print_table(head, ([cell(row.get(column)) for column in head] for row in rows))
    print("\n".join(["", *problems]))
    return WITH_PROBLEMS if problems or any(row.get("ok") is False for row in rows) else DONE


def run_case(name: str, case: Callable[[], list[Row]], results: Results) -> bool:
    """Run a case and store its rows, or why there are none. False if the device takes no more work."""
    results.put(name, started=True)
    begin = time.monotonic()
    try:
        rows = case()
    except (Exception, SystemExit) as error:
        results.put(name, problem=describe(error))
        return not is_device_lost(error)
    results.put(name, seconds=round(time.monotonic() - begin, 1), rows=rows)
    return True


def without_folders(text: str) -> str:
    """Text in a line, absolute paths without their folders, which are those of one machine."""
    return re.sub(r"(?<![\w.:/`])/(?:[\w.+@-]+/)+", "", one_line(text))


def describe(error: BaseException) -> str:
    """An error in a line, with what to do about too little memory."""
    import torch

    line = without_folders(str(error))[:600] or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of device memory: close other programs on the device, or take a larger one ({line})"
    return line if isinstance(error, SystemExit) else f"{type(error).__name__}: {line}"


def is_device_lost(error: BaseException) -> bool:
    """Whether every later operation of this process would fail too."""
    text = str(error)
    return "CUDA error" in text or "HIP error" in text


def release_memory(device: Any) -> None:
    """Give what a case has used back to the device."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
