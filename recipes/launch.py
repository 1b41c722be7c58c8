"""``leanstep train`` in several processes by torchrun's API, ``--dry-run``, and the end of a process."""

import atexit
import contextlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from leanstep.recipes.config.loader import dump
from leanstep.recipes.config.schema import RunConfig, accumulation_steps, targets_note
from leanstep.recipes.data.sources import look

_MODULE = "leanstep.recipes.training.train"
# seconds that workers get after a signal to finish their step and save (torchrun: 30)
_SHUTDOWN_S = 300
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
LAUNCHER_VARIABLE = "LEANSTEP_LAUNCHER"


def dry_run(config: RunConfig, recipe: str, overrides: Sequence[str], world: int) -> int:
    """Print the resolved recipe, equivalent commands and a check of the text, without training.

    ``config`` was loaded from ``recipe`` and ``overrides``. Returns 2 if the text cannot be used, else 0.
    """
    passes, tokens = accumulation_steps(config, world), config.batch.tokens_per_step
    print(f"{dump(config).rstrip()}\n")
    print("".join(f"# {note}\n" for note in config.notes), end="")
    print(f"# {config.steps} steps of {tokens:,} tokens, {config.steps * tokens:,} in all")
    print(
        f"# a step: {tokens // config.data.seq_len} sequences of {config.data.seq_len} = {world} processes x {passes} "
        f"passes x {config.batch.micro_batch_size} sequences"
    )
    print(f"# targets: {targets_note(config.data)}\n# output: {Path(config.out)}\n# the same by hand:")
    print("\n".join(f"#   {command}" for command in equivalent_commands(recipe, overrides, world)))
    try:
        print("\n".join(f"# {line}" for line in look(config.data)))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def equivalent_commands(recipe: str, overrides: Sequence[str], world: int) -> list[str]:
    """Equivalent torchrun and accelerate command lines for this machine's kind of device."""
    tail = shlex.join([recipe, *overrides])
    torchrun = f"torchrun --standalone --nproc_per_node {world} -m {_MODULE} {tail}"
    accelerate = f"accelerate launch --num_processes {world} -m {_MODULE} {tail}"
    if world > 1:
        accelerate = accelerate.replace("launch ", "launch --multi_gpu ")
    if not _has_gpu():
        return [torchrun, f"ACCELERATE_USE_CPU=true {accelerate}"]
    return [torchrun, accelerate]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def launch(recipe: str, overrides: Sequence[str], world: int) -> int:
    """Train in ``world`` processes. Returns the exit code."""
    return run_workers(_MODULE, [recipe, *overrides], world, "the same command")


def run_workers(module: str, arguments: Sequence[str], world: int, continued_by: str) -> int:
    """Start the workers of a module by torchrun's API and wait for them. Returns the exit code.

    A worker that a signal ended is named in one line, with ``continued_by``, what continues the run.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    if not _has_gpu():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        # torchrun would give each worker one thread
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    os.environ["LEANSTEP_NPROC"] = str(world)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SHUTDOWN_S))
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    # the agent forwards these to the workers and waits; one that is ignored stays so (nohup)
    names = [name for name in _FORWARDED if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
    launcher = ["--standalone", "--nproc-per-node", str(world), "--signals-to-handle", ",".join(names)]
    options = get_args_parser().parse_args([*launcher, "-m", module])
    options.training_script_args = list(arguments)  # not parsed: it would take --nproc for an abbreviation of its own
    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # the workers, or a line below, say why they ended
    try:
        torchrun(options)
    except SignalException as ended:
        return 130 if ended.sigval == signal.SIGINT else 143
    except ChildFailedError as failed:
        for rank, failure in failed.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                print(f"error: process {rank} was ended by {name}; {continued_by} continues the run", file=sys.stderr)
        return _worst(failure.exitcode for failure in failed.failures.values())
    finally:
        for variable in ("LEANSTEP_NPROC", LAUNCHER_VARIABLE):
            os.environ.pop(variable, None)
    return 0


def _worst(codes: Iterable[int]) -> int:
    """Return the first of our exit codes, else 1. Workers killed after another's failure have negative codes."""
    return next((code for code in codes if code in (2, 3, 4, 130, 143)), 1)


def exit_worker(code: int) -> NoReturn:
    """End this process with an exit code; one of several processes skips the C++ destructors.

    Without that, a process that trained on the CPU sometimes aborts at its end ("terminate called without an active
    exception": torch's threads meet its destroyed global objects), and the launcher reports a failed run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
