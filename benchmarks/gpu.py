"""Measure one GPU: correctness, bandwidth, optimizer steps, LoRA, CUDA graphs and training, in ten minutes.

    python benchmarks gpu --out runs/gpu [--minutes 10] [--only STAGE ...]
    python benchmarks gpu --out runs/gpu --publish
    python benchmarks gpu --out runs/dry --dry-run

Seven stages, the most valuable first: tests, kernels, bandwidth, steps, lora, graphs, training. Each is a benchmark of
its own (``python benchmarks device/STAGE``) and runs in a process of its own, which is killed at its limit, a share
of the time that is left. A stage that fails does not stop the next. ``OUT/STAGE.json`` has the results, replaced after
every case, ``OUT/STAGE.log`` what the stage printed, ``OUT/results.md`` all tables. The same command continues where an
earlier one stopped: results are never measured twice. Results of another card, commit or version are refused.

The first device is measured. ``--publish`` measures nothing: it writes the results to docs/gpu.json and their tables
to docs/gpu.md. ``--dry-run`` runs everything with tiny sizes on the CPU, to try the code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common import command_line
from stages import DEVICE_LOST, DONE, ROOT, WITH_PROBLEMS, cell, columns_of, problems_of, read_results, rows_of

from leanstep._files import format_bytes, free_bytes, lock_file, write_text

# stage -> its share of the time
STAGES = {"tests": 8, "kernels": 5, "bandwidth": 2, "steps": 3, "lora": 4, "graphs": 6, "training": 10}
PARSER = command_line(
    __doc__, minutes=(10.0, "time for all stages; default 10"), dry_run=(False, "tiny sizes on the CPU"),
    publish=(False, "write docs/gpu.json and docs/gpu.md from the results"),
)  # fmt: skip
PARSER.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the results")
PARSER.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help="these stages")
PAGE, PUBLISHED = ROOT / "docs" / "gpu.md", ROOT / "docs" / "gpu.json"
BEGIN, END = "<!-- table:gpu -->", "<!-- /table:gpu -->"
NOT_MEASURED = "No device has been measured yet: there are no results of `python benchmarks gpu --out runs/gpu`."
# a stage imports torch before it begins
LEAST_S = 5.0
DISK = 3 << 30
# of device memory: a process that has only started takes less
BUSY = 2 << 30


def main() -> int:
    """Measure, or publish what was measured."""
    options = PARSER.parse_args()
    if options.publish:
        return publish(options.out)
    if options.minutes <= 0:
        PARSER.error(f"--minutes: expected more than 0, got {options.minutes:g}")
    # as Ctrl-C does: the stage that runs is ended, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    machine = ask_for_machine(options.dry_run)
    with locked(options.out):
        return measure(options, machine)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder of the results, and keep other processes from measuring into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
    except OSError as error:
        raise SystemExit(f"--out: expected a folder that can be written, got {out}: {error.strerror}") from None
    with file:
        try:
            lock_file(file.fileno())
        except BlockingIOError:
            raise SystemExit(f"{out}: another process measures into it; wait for it, or choose another --out") from None
        yield


def measure(options: argparse.Namespace, machine: dict[str, str]) -> int:
    """Run the stages that are not done, and write the tables; 1 if something is missing or wrong."""
    check_folder(options.out, machine, options.dry_run)
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    commands = {name: [sys.executable, str(Path(__file__).parent), f"device/{name}"] for name in STAGES}
    if options.dry_run:
        commands = {name: [*command, "--dry-run"] for name, command in commands.items()}
    wanted = {name: commands[name] for name in STAGES if name in options.only}
    crashed = run_stages(wanted, options.out, options.minutes * 60)
    stages = stored(options.out)
    write_text(options.out / "results.md", tables(stages))
    print(f"tables in {options.out / 'results.md'}")
    missing = [name for name in options.only if name not in [stage["stage"] for stage in stages]]
    wrong = any(problems_of(stage) or any(row.get("ok") is False for row in rows_of(stage)) for stage in stages)
    return WITH_PROBLEMS if missing or wrong or crashed else DONE


def first_device_only() -> dict[str, str]:
    """The environment of stages: of several visible devices they see the first, and kernels run on it."""
    name = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
    first = os.environ.get(name, "0").split(",")[0]
    # unbuffered: what a killed stage has printed is in its log
    environment = os.environ | {name: first, "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return environment


def ask_for_machine(dry_run: bool) -> dict[str, str]:
    """What the results of the folder must have in common; warns of a device that others use.

    Another process answers, because one that has used the device holds some of its memory.
    """
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import stages
device = stages.find_device({dry_run})
print(json.dumps([stages.machine_of(device), stages.busy_bytes(device)]))"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=first_device_only(), capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr.strip().splitlines()[-1] if result.stderr else "python ended without a reason")
    machine, busy = json.loads(result.stdout.splitlines()[-1])
    if busy > BUSY:
        print(
            f"WARNING: {format_bytes(busy)} of the device's memory are taken: other programs disturb the times, and "
            "stages may run out of memory; end them, or choose another device by CUDA_VISIBLE_DEVICES"
        )
    return machine


def check_folder(out: Path, machine: dict[str, str], dry_run: bool) -> None:
    """End the process where the folder cannot take the results: results of elsewhere, or a full disk."""
    for path in stage_files(out):
        read_results(path, machine)
    if free_bytes(out) < DISK and not dry_run:
        raise SystemExit(
            f"{out}: expected {format_bytes(DISK)} free for compiled kernels and a checkpoint, got "
            f"{format_bytes(free_bytes(out))}; free some, or choose another --out"
        )


def stage_files(out: Path) -> list[Path]:
    """Results files that exist, in the order of the stages."""
    return [path for name in STAGES if (path := out / f"{name}.json").exists()]


def stored(out: Path) -> list[dict[str, Any]]:
    """Results of all stages that have some."""
    return [read_results(path) for path in stage_files(out)]


# -- running ----------------------------------------------------------------------------------------------------------


def run_stages(commands: Mapping[str, Sequence[str]], out: Path, seconds: float) -> list[str]:
    """Run each stage's command with its share of the seconds that are left, unless it is done.

    Returns the stages that crashed, be it after their last case.
    """
    crashed = []
    end = time.monotonic() + seconds
    shares = {name: STAGES[name] for name in commands if not is_done(out / f"{name}.json")}
    for name, command in commands.items():
        if name not in shares:
            print(f"{name}: done before", flush=True)
            continue
        limit = (end - time.monotonic()) * shares[name] / sum(shares.values())
        del shares[name]
        if limit < LEAST_S:
            outcome = f"not started, {max(limit, 0):.0f} s are left for it; the same command runs it"
        else:
            code, outcome = run_until(name, command, out, time.monotonic() + limit)
            crashed += [name] if code not in (DONE, WITH_PROBLEMS, None) else []
        print(f"{name}: {outcome}", flush=True)
    return crashed


def is_done(path: Path) -> bool:
    """Whether every case of a stage has rows."""
    if not path.exists():
        return False
    cases = json.loads(path.read_text("utf-8"))["cases"]
    return bool(cases) and all("rows" in case for case in cases.values())


def run_until(name: str, command: Sequence[str], out: Path, end: float) -> tuple[int | None, str]:
    """Run a stage, again as long as it crashes and cases wait that never started: the last exit code, and a summary."""
    path, waiting = out / f"{name}.json", -1
    with (out / f"{name}.log").open("a", encoding="utf-8") as log:
        while True:
            left = end - time.monotonic()
            code = run_process([*command, "--out", str(out), "--seconds", f"{left:.1f}"], log, left)
            before, waiting = waiting, never_started(path)
            if code in (DONE, WITH_PROBLEMS, None) or not waiting or waiting == before:
                return code, summary(path, code, log.name)


def never_started(path: Path) -> int:
    """Number of cases that wait and were never started."""
    return sum(not case for case in json.loads(path.read_text("utf-8"))["cases"].values()) if path.exists() else 0


def run_process(command: Sequence[str], log: Any, seconds: float) -> int | None:
    """Run a command in a session of its own and kill all of its processes at the end. None: out of time."""
    process = subprocess.Popen(command, stdout=log, stderr=log, env=first_device_only(), start_new_session=True)
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        # also where Ctrl-C ends this process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summary(path: Path, code: int | None, log: str) -> str:
    """What a stage has achieved, in a line."""
    if not path.exists():
        return f"no results (exit code {code}); see {log}"
    content = json.loads(path.read_text("utf-8"))
    done = sum("rows" in case for case in content["cases"].values())
    wrong = sum(row.get("ok") is False for row in rows_of(content))
    text = f"{done} of {len(content['cases'])} cases, {wrong} checks failed"
    if code is None:
        return f"{text}; stopped at its time limit, the same command continues it"
    if code not in (DONE, WITH_PROBLEMS):
        return f"{text}; {'the device was lost' if code == DEVICE_LOST else f'exit code {code}'}, see {log}"
    return text


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(stages: list[dict[str, Any]]) -> str:
    """Markdown of all results: the machine, a table per stage, and what is missing."""
    if not stages:
        return NOT_MEASURED + "\n"
    machine = ", ".join(f"{key} {value}" for key, value in stages[0]["machine"].items())
    parts = [f"`python benchmarks gpu --out runs/gpu` on {machine}."]
    packages = {name: version for stage in stages for name, version in stage["packages"].items()}
    if packages:
        parts.append("Packages: " + ", ".join(f"{name} {version}" for name, version in packages.items()) + ".")
    for stage in stages:
        parts.append(f"### {stage['stage']}")
        rows, problems = rows_of(stage), problems_of(stage)
        if rows:
            parts.append(table(rows))
        if problems:
            parts.append("Without a result:\n\n" + "\n".join(f"- {problem}" for problem in problems))
        if stage["clocks"]:
            parts.append(f"Clocks before: {stage['clocks'][0]}. After: {stage['clocks'][-1]}.")
    absent = [name for name in STAGES if name not in [stage["stage"] for stage in stages]]
    if absent:
        parts.append(f"Not measured: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table, columns of numbers to the right."""
    columns = columns_of(rows)
    numeric = [all(not isinstance(row.get(name), str | bool) for row in rows) for name in columns]
    lines = [columns, ["---:" if right else "---" for right in numeric]]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def published() -> str:
    """The part of the page between its markers, from the results in docs/ if there are any."""
    return tables(json.loads(PUBLISHED.read_text("utf-8")) if PUBLISHED.exists() else [])


def publish(out: Path) -> int:
    """Write the results of a device to docs/, and the page's part from them."""
    stages = stored(out)
    if not stages or any("dry run" in stage["machine"]["device"] for stage in stages):
        raise SystemExit(f"{out}: expected results of a device, got {'those of a dry run' if stages else 'none'}")
    for path in stage_files(out):
        read_results(path, stages[0]["machine"])
    write_text(PUBLISHED, json.dumps(stages, indent=1) + "\n")
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{published()}{END}{rest.split(END)[1]}")
    print(f"wrote {PUBLISHED} and {PAGE}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
