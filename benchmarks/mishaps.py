"""Trials of ``faults`` beside the kills: full disks, lost folders, lost and stopped processes, memory over many runs.

A trial is survived if the run says what happened in a line, without a traceback, and the same command then continues to
the bits of the undisturbed run.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forks
from common import append_json_line, print_table, read_json_lines
from forks import Job

if TYPE_CHECKING:
    import random

    from faults import Files

_DISK = 6 * 2**20
_TIMEOUT_S = 6.0
Trial = dict[str, Any]


# -- what trials do ---------------------------------------------------------------------------------------------------


def _mount(folder: Path, options: str) -> bool:
    """Mount a tmpfs; False where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def _steps(out: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def _train(job: Job, files: Files, out: Path, *settings: str, world: int = 1) -> list[int]:
    batch = f"batch.micro_batch_size={4 // world}"
    return forks.start_training(job, [files.recipe, f"out={out}", batch, *settings], world)


def _wait_for_step(job: Job, out: Path, step: int) -> None:
    job.wait(until=lambda: _steps(out) >= step)


def _told(job: Job, codes: set[int], *signs: str) -> str:
    """What is wrong with how a run ended: its codes, a traceback, or a message that is missing."""
    text = job.text()
    if not set(job.codes.values()) <= codes:
        return f"exit codes {sorted(job.codes.values())}, expected {sorted(codes)}: {text[-300:]}"
    if "Traceback" in text:
        return f"a traceback: {text.strip().splitlines()[-1][:300]}"
    if signs and not any(sign in text for sign in signs):
        return f"none of {signs} in: {text[-300:]}"
    return ""


def _continued(files: Files, folder: Path, out: Path, expected: dict[str, Any], world: int = 1) -> str:
    """Run the same command again and compare; returns what went wrong."""
    job = Job(folder / "console-last.txt")
    _train(job, files, out, world=world)
    job.wait()
    if any(job.codes.values()):
        return f"continued, exit codes {sorted(job.codes.values())}: {job.text()[-300:]}"
    wrong = forks.differences(expected, forks.in_fork(lambda: forks.run_digest(out), folder))
    return f"not the undisturbed run: {wrong}" if wrong else ""


def full_disk(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """Leave a random part of 3 MB on a disk of 6 MB; make room afterwards."""
    disk = folder / "disk"
    job, out = Job(folder / "console.txt"), disk / "run"
    if _mount(disk, f"size={_DISK}"):
        try:
            ballast = disk / "ballast"
            ballast.write_bytes(b"x" * (_DISK - chance.randrange(3 * 2**20)))
            _train(job, files, out)
            job.wait()
            problem = _told(job, {0, 1, 2}, "disk", "report:")
            ballast.unlink()
            problem = problem or _continued(files, folder, out, expected)
        finally:
            _unmount(disk)
        return {"how": "tmpfs of 6 MB", "problem": problem}
    limit = chance.randrange(2**12, 2**19)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return forks.train_in([files.recipe, f"out={out}"])

    job.fork(limited)
    job.wait()
    problem = _told(job, {0, 1, 2}, "cannot write", "written", "report:")
    return {"how": "RLIMIT_FSIZE", "problem": problem or _continued(files, folder, out, expected)}


def read_only(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """A folder that is read-only from the start; or checkpoints that become read-only."""
    job, out = Job(folder / "console.txt"), folder / "disk"
    if chance.random() < 0.5:
        if not _mount(out, "ro"):
            return {"how": "not tried: mount is not allowed", "problem": ""}
        try:
            _train(job, files, out)
            job.wait()
            problem = _told(job, {2}, "cannot be written")
        finally:
            _unmount(out)
        return {"how": "from the start", "problem": problem or _continued(files, folder, out, expected)}
    _train(job, files, out)
    _wait_for_step(job, out, chance.randrange(1, 8))
    if not _mount(out / "checkpoints", "ro"):
        job.kill()
        job.wait()
        return {"how": "not tried: mount is not allowed", "problem": ""}
    try:
        job.wait()
        problem = _told(job, {0, 1}, "Read-only file system", "report:")
    finally:
        _unmount(out / "checkpoints")
    # training went on; only the checkpoints are missing
    actual = forks.in_fork(lambda: forks.log_and_weights(out), folder)
    wrong = forks.differences({key: expected[key] for key in actual}, actual)
    return {"how": "checkpoints, during the run", "problem": problem or (wrong and f"not the undisturbed run: {wrong}")}


def vanished(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """Move the folder away while a run writes into it, and back afterwards."""
    job, out = Job(folder / "console.txt"), folder / "run"
    _train(job, files, out)
    _wait_for_step(job, out, chance.randrange(1, 12))
    with suppress(FileNotFoundError):
        out.rename(folder / "away")
    job.wait()
    problem = _told(job, {0, 1}, "No such file", "report:", "does not exist")
    shutil.rmtree(out, ignore_errors=True)
    with suppress(FileNotFoundError):
        (folder / "away").rename(out)
    return {"how": "moved away", "problem": problem or _continued(files, folder, out, expected)}


def killed_rank(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """Kill one of two processes: the other ends by itself."""
    job, out = Job(folder / "console.txt"), folder / "run"
    pids = _train(job, files, out, world=2)
    _wait_for_step(job, out, chance.randrange(1, 10))
    victim = chance.randrange(2)
    job.kill(pids[victim])
    begin = time.monotonic()
    job.wait(60)
    seconds = time.monotonic() - begin
    problem = _told(job, {1, -9}, "another process ended")
    return {
        "how": f"rank {victim}",
        "told_s": seconds,
        "problem": problem or _continued(files, folder, out, expected, 2),
    }


def stopped_rank(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """Stop one of two processes with SIGSTOP: the other ends after ``distributed.timeout_minutes``, here 6 s."""
    job, out = Job(folder / "console.txt"), folder / "run"
    pids = _train(job, files, out, f"distributed.timeout_minutes={_TIMEOUT_S / 60}", world=2)
    _wait_for_step(job, out, chance.randrange(1, 8))
    victim = chance.randrange(2)
    os.kill(pids[victim], signal.SIGSTOP)
    begin = time.monotonic()
    job.wait(60, until=lambda: job.running() == [pids[victim]])
    seconds = time.monotonic() - begin
    job.kill(pids[victim])
    job.wait()
    problem = _told(job, {1, -9}, "another process did not answer")
    return {
        "how": f"rank {victim}",
        "told_s": seconds,
        "problem": problem or _continued(files, folder, out, expected, 2),
    }


def torchrun_restarts(files: Files, folder: Path, chance: random.Random, expected: dict[str, Any]) -> Trial:
    """Kill one of two processes of torchrun with ``--max-restarts``: torchrun starts them again, and the run ends."""
    job, out = Job(folder / "console.txt"), folder / "run"

    def torchrun() -> int:
        from torch.distributed.run import main

        os.environ["ACCELERATE_USE_CPU"] = "true"
        # torch 2.13's shared store gives the addresses of the first start to the second
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
        main(
            [*options, "-m", "leanstep.recipes.training.train", files.recipe, f"out={out}", "batch.micro_batch_size=2"]
        )
        return 0

    agent = job.fork(torchrun)
    _wait_for_step(job, out, chance.randrange(1, 8))
    workers = [int(pid) for pid in _children(agent) if "leanstep.recipes" in _command(pid)]
    victim = chance.choice(workers)
    os.kill(victim, signal.SIGKILL)
    job.wait()
    forks.reap_orphans()
    problem = _told(job, {0})
    if not problem and "resuming from" not in job.text() and "beginning again" not in job.text():
        problem = "it was not started again"
    if not problem:
        wrong = forks.differences(expected, forks.in_fork(lambda: forks.run_digest(out), folder))
        problem = wrong and f"not the undisturbed run: {wrong}"
    return {"how": "torchrun --max-restarts 2", "problem": problem}


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


# name -> the trial, processes of the undisturbed run, and the divisor of --kills
_TRIALS: dict[str, tuple[Callable[..., Trial], int, int]] = {
    "full-disk": (full_disk, 1, 2),
    "read-only": (read_only, 1, 5),
    "vanished": (vanished, 1, 5),
    "killed-rank": (killed_rank, 2, 5),
    "stopped-rank": (stopped_rank, 2, 5),
    "torchrun": (torchrun_restarts, 2, 10),
}
NAMES = tuple(_TRIALS)


def run(names: list[str], options: Any, files: Files, results: Path) -> None:
    """Run the missing trials of these kinds."""
    digests: dict[int, dict[str, Any]] = {}
    for name in names:
        trial, world, divisor = _TRIALS[name]
        done = {row["trial"] for row in read_json_lines(results) if row["kind"] == name and row["seed"] == options.seed}
        for number in sorted(set(range(max(1, options.kills // divisor))) - done):
            if world not in digests:
                folder = forks.cleared(files.root / f"undisturbed-{world}")
                job = Job(folder / "console.txt")
                _train(job, files, folder / "run", world=world)
                if any(job.wait()):
                    raise RuntimeError(job.text())
                digests[world] = forks.in_fork(lambda path=folder / "run": forks.run_digest(path), folder)
            folder = forks.cleared(files.root / f"{name}-{number}")
            begin = time.monotonic()
            try:
                row = trial(files, folder, forks.chance_of(options.seed, name, number), digests[world])
            except (TimeoutError, RuntimeError, OSError) as error:
                row = {"how": "", "problem": str(error)[-500:]}
            row |= {"kind": name, "trial": number, "seed": options.seed, "seconds": time.monotonic() - begin}
            append_json_line(results, row)
            print(f"{name} {number}: {row['how']}: {row['problem'] or 'survived'}", flush=True)
            if row["problem"]:
                shutil.copytree(folder, options.out / folder.name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


# -- the soak ---------------------------------------------------------------------------------------------------------


def soak(minutes: float, files: Files, results: Path) -> None:
    """Train again and again in one process; note resident memory and open files after every run."""
    folder = forks.cleared(files.root / "soak")

    def work() -> list[list[float]]:
        samples, end, number = [], time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end or number < 10:
            out = folder / f"run-{number % 2}"
            shutil.rmtree(out, ignore_errors=True)
            if forks.train_in([files.recipe, f"out={out}"]):
                raise RuntimeError(f"run {number} failed")
            # what waits in cycles for the collector, a file a run, is no leak
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            samples.append([pages * resource.getpagesize() / 1024, len(os.listdir("/proc/self/fd"))])
            number += 1
        return samples

    samples = forks.in_fork(work, folder, 60 * minutes + 10 * forks.PATIENCE)
    append_json_line(results, {"kind": "soak", "minutes": minutes, "seed": 0, "samples": samples})


def slope(values: list[float]) -> float:
    """Theil-Sen: the median of the slopes of all pairs, per sample."""
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))


# -- tables -----------------------------------------------------------------------------------------------------------


def print_tables(results: list[dict[str, Any]]) -> None:
    """Print the further trials by kind and the way they were made, and the soak."""
    rows = []
    for name, (trial, _, _) in _TRIALS.items():
        mine = [row for row in results if row["kind"] == name]
        about = (trial.__doc__ or "").splitlines()[0].split(":")[0].rstrip(".")
        for how in sorted({row["how"] for row in mine}):
            group = [row for row in mine if row["how"] == how]
            lost = sum(bool(row["problem"]) for row in group)
            told = [row["told_s"] for row in group if "told_s" in row]
            after = f"{max(told):.1f}" if told else ""
            tried = 0 if how.startswith("not tried") else len(group)
            rows.append([name, about, how, tried, tried - lost, lost, after])
    if rows:
        print_table(["kind", "what happens", "how", "tried", "survived", "lost", "ends after, s"], rows, (0, 1, 2))
        print()
    soaks = []
    for row in (row for row in results if row["kind"] == "soak"):
        # the first runs fill caches
        memory, files = zip(*row["samples"][len(row["samples"]) // 3 :], strict=True)
        change = [f"{slope(list(memory)):+.1f}", f"{slope(list(files)):+.2f}"]
        soaks.append(
            [row["minutes"], len(row["samples"]), f"{memory[0] / 1024:.0f}", f"{memory[-1] / 1024:.0f}", *change]
        )
    if soaks:
        print_table(
            ["minutes", "runs", "MiB after a third", "MiB at the end", "KiB per run", "open files per run"], soaks
        )
