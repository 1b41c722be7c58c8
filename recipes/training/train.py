"""Train a recipe in this process, one of those that torchrun or Accelerate started or the only one.

``python -m leanstep.recipes.training.train RECIPE key=value ...``; the same line works behind
``accelerate launch -m`` and ``torchrun --standalone --nproc_per_node N -m``, on a CPU too.
"""

import argparse
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from transformers.utils.logging import disable_progress_bar

from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.training.build import build_accelerator
from leanstep.recipes.training.failures import RunFailure
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.progress import Progress
from leanstep.recipes.training.run import Run, refuse
from leanstep.recipes.training.world import asked_world_size, check_world

__all__ = ["leave", "main", "train"]


def main(argv: Sequence[str] | None = None) -> int:
    """Read a recipe and train it in this process; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m leanstep.recipes.training.train", description=__doc__)
    parser.add_argument("recipe", help="name of a shipped recipe, or a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="auto|never|PATH", help="where to continue from")
    options = parser.parse_args(argv)
    overrides = list(options.overrides)
    if options.resume is not None:
        overrides.append(f"checkpoint.resume={options.resume}")
    try:
        config = load(options.recipe, overrides, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        return refuse(error)
    return train(config)


def train(config: RunConfig) -> int:
    """Run ``config`` in this process, the only one or one of those that torchrun started. Returns the exit code.

    0: done, or nothing left to do. 1: the result could not be written. 2: it cannot start as asked. 3: a loss or a
    gradient was not finite, or the loss passed its limit. 4: out of memory. 130, 143: ended by a signal or after
    ``stop.max_hours``, with a checkpoint to continue from.
    """
    try:
        accelerator = build_accelerator(config)
        check_world(accelerator.num_processes, asked_world_size())
    except ValueError as error:
        return refuse(error)
    # transformers would draw a bar for every file it reads or writes
    disable_progress_bar()
    folder = RunFolder(Path(config.out))
    with Progress(folder, config.steps, active=accelerator.is_main_process) as progress:
        run = Run(config, accelerator, folder, progress)
        try:
            return run.go()
        except RunFailure as failure:
            run.journal.status(f"failed:{failure.reason}", run.state, any_process=True)
            progress.say(str(failure), error=True)
            return failure.exit_code
        except Exception as error:
            if run.begun:
                run.journal.status(f"failed:{type(error).__name__}", run.state, any_process=True)
            raise
        finally:
            folder.release()


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    Of several processes that trained on the CPU, now and then one aborts when it is all over: torch's threads do not
    outlast its global objects ("terminate called without an active exception"), and the launcher calls the run failed.
    So all that Python does at its end is done, and the destructors are not run.
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


if __name__ == "__main__":
    leave(main())
