"""What ``faults`` and ``mishaps`` share: forked processes, kills at chosen moments, digests of what a run wrote.

The parent imports torch and leanstep, runs no tensor operation and starts no thread, so that a fork is sound and costs
no import. Everything that touches a tensor runs in a fork.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# seconds after which a process that should end is taken to hang
PATIENCE = 300.0
_SUBREAPER = 36
# what Python reports of a process's use of files (sys.audit)
_FILE_EVENTS = ("open", "os.", "shutil.")


def prepare() -> None:
    """Import what trials need, and check that no thread runs. Orphans of killed processes become children here."""
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import leanstep.recipes.launch
    import leanstep.recipes.report.report
    import leanstep.recipes.shrink.prune
    import leanstep.recipes.training.train
    import leanstep.sparsity  # noqa: F401

    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"expected one thread before the first fork, got {threads}")


@dataclass
class Moment:
    """When a process is killed: ``fraction`` of the way through its file operations, or of its time."""

    by: str
    fraction: float

    def __str__(self) -> str:
        return f"{self.by} {self.fraction:.3f}"


@dataclass
class Job:
    """Forked processes that work together; ``console`` has what they print."""

    console: Path
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def fork(
        self, work: Callable[[], int | None], kill_at: int = 0, count_to: Path | None = None, **environ: str
    ) -> int:
        """Run ``work`` in a new process, which kills itself with SIGKILL before its file operation ``kill_at``."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            code = 70
            try:
                os.environ.update(environ)
                code = _child(work, self.console, parent, kill_at, count_to)
            finally:
                os._exit(code)
        self.pids.append(pid)
        return pid

    def running(self) -> list[int]:
        """Processes that have not ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def wait(self, limit: float = PATIENCE, until: Callable[[], bool] | None = None) -> list[int]:
        """Wait until all have ended, or ``until()``. Returns the exit codes; raises TimeoutError after ``limit`` s."""
        # on a busy machine, looking often takes time from the processes
        end, pause = time.monotonic() + limit, 0.05 if until is None else 0.005
        while self.running() and not (until is not None and until()):
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {limit:.0f} s")
            time.sleep(pause)
        return [self.codes[pid] for pid in self.pids if pid in self.codes]

    def kill(self, *pids: int) -> None:
        """SIGKILL to some processes, or to all."""
        for pid in pids or self.running():
            if pid in self.running():
                os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        """What the processes printed."""
        return self.console.read_text("utf-8", errors="replace") if self.console.exists() else ""


def _child(work: Callable[[], int | None], console: Path, parent: int, kill_at: int, count_to: Path | None) -> int:
    import torch

    from leanstep._process import end_with_parent

    end_with_parent(parent)
    descriptor = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    count = _count_file_events(kill_at) if kill_at or count_to else [0]
    try:
        code = work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    if count_to is not None:
        count_to.write_text(str(count[0]))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _count_file_events(kill_at: int) -> list[int]:
    """Count this process's file operations from now on, and kill it before number ``kill_at``."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FILE_EVENTS):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def reap_orphans(limit: float = PATIENCE) -> None:
    """Wait until no descendant of this process is left. Raises TimeoutError, after SIGKILL to what is left."""
    end = time.monotonic() + limit
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if time.monotonic() > end:
                    left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                    for pid in left:
                        os.kill(int(pid), signal.SIGKILL)
                    raise TimeoutError(f"processes are left after {limit:.0f} s")
                time.sleep(0.01)
        except ChildProcessError:
            return


def in_fork(work: Callable[[], Any], folder: Path, limit: float = PATIENCE) -> Any:
    """Run ``work`` in a fork and return its result, by way of JSON. Raises RuntimeError with what it printed."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    job = Job(folder / "answer.txt")
    job.fork(lambda: answer.write_text(json.dumps(work())) and 0)
    if job.wait(limit) != [0]:
        raise RuntimeError(job.text()[-2000:])
    job.console.unlink()
    return json.loads(answer.read_text())


def ranks(world: int) -> list[dict[str, str]]:
    """Environment of every process of a run, as torchrun sets it."""
    if world == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world)]


def train_in(arguments: Sequence[str]) -> int:
    """Train in this process."""
    from leanstep.recipes.training.train import main

    return main(list(arguments))


def start_training(job: Job, arguments: Sequence[str], world: int = 1, **of_victim: Any) -> list[int]:
    """Fork the processes of a run; ``of_victim`` are the rank ``victim`` and its options of :meth:`Job.fork`."""
    victim = of_victim.pop("victim", 0)
    return [
        job.fork(lambda: train_in(arguments), **(of_victim if rank == victim else {}), **environ)
        for rank, environ in enumerate(ranks(world))
    ]


# -- what a run wrote -------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> list[str]:
    """All names below a folder, sorted; links with their targets."""
    lock = {".lock"}
    return sorted(
        f"{path.relative_to(folder)}" + (f" -> {os.readlink(path)}" if path.is_symlink() else "")
        for path in folder.rglob("*")
        if path.name not in lock
    )


def log_and_weights(out: Path) -> dict[str, Any]:
    """Logged numbers, and a hash of the final weights."""
    from models import digest
    from safetensors.torch import load_file

    keys = ("kind", "step", "loss", "lr", "grad_norm", "tokens", "perplexity", "text")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "log": [[row.get(key) for key in keys] for row in rows],
        "final weights": digest(weight for _, weight in sorted(load_file(out / "final" / "model.safetensors").items())),
    }


def run_digest(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions: weights, optimizer state, logged numbers, names of all files."""
    import torch
    from models import digest, tensors_of
    from safetensors.torch import load_file

    trainer = out / "last" / "trainer"
    state = torch.load(trainer / "optimizer.bin", weights_only=True, map_location="cpu")
    progress = json.loads((trainer / "state.json").read_text())
    weights = sorted(load_file(out / "last" / "hf" / "model.safetensors").items())
    return {
        **log_and_weights(out),
        "weights of the last checkpoint": digest(weight for _, weight in weights),
        "optimizer state": digest(tensors_of(state["state"])),
        "schedule": repr(sorted(torch.load(trainer / "scheduler.bin", weights_only=True).items())),
        "progress": [progress[key] for key in ("step", "tokens", "val_loss", "best_loss", "best_step", "nonfinite")],
        "status": json.loads((out / "status.json").read_text())["status"],
        "files": names_in(out),
    }


def folder_digest(folder: Path) -> dict[str, Any]:
    """SHA-256 of every file."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() if (folder / name).is_file() else ""
        for name in names_in(folder)
    }


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """The keys of two digests that differ; empty for equal ones."""
    different = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    if "files" in different:
        one, other = set(expected["files"]), set(actual["files"])
        names = [f"missing {name}" for name in sorted(one - other)] + [f"extra {name}" for name in sorted(other - one)]
        different[different.index("files")] = f"files ({'; '.join(names[:5])})"
    return ", ".join(different)


def chance_of(seed: int, *names: Any) -> random.Random:
    """The generator of one trial."""
    return random.Random(" ".join(map(str, (seed, *names))))


def cleared(folder: Path) -> Path:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
