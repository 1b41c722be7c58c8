"""Train a recipe in this process, alone or as one of several started by torchrun or Accelerate.

``python -m leanstep.recipes.training.train RECIPE key=value ...``; the same arguments work after ``accelerate launch
-m`` and ``torchrun --standalone --nproc_per_node N -m``, on a CPU too.

``train`` runs :class:`leanstep.recipes.training.run.Run` and tells how it ended.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from leanstep._process import EXIT_CODES, end_with_parent, open_standard_streams, quiet_imports, wrong_launcher_variable

if __name__ == "__main__":
    # before the imports that warn; the garbage collector would take long, and they leave little garbage
    quiet_imports()
    gc.disable()

from transformers.utils.logging import disable_progress_bar

from leanstep._processes import is_first_to_fail
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.config.schema import RunConfig
from leanstep.recipes.config.values import hidden_texts
from leanstep.recipes.data.sources import StreamError
from leanstep.recipes.launch import LAUNCHER_VARIABLE
from leanstep.recipes.training.build import build_accelerator
from leanstep.recipes.training.checkpoint import how_to_continue
from leanstep.recipes.training.failures import (
    EXIT_FAILED,
    RunFailure,
    lost_process,
    memory_failures,
    of_process,
    refuse,
)
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.logger import Progress
from leanstep.recipes.training.run import Run

if __name__ == "__main__":
    gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Read a recipe and train it in this process; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m leanstep.recipes.training.train", description=__doc__)
    parser.add_argument("recipe", help="name of a shipped recipe, or a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe")
    open_standard_streams()
    if problem := wrong_launcher_variable():
        return refuse(ValueError(problem))
    options = parser.parse_args(argv)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.environ.get(LAUNCHER_VARIABLE)
        end_with_parent(int(launcher) if launcher else None)
    try:
        config = load(options.recipe, options.overrides)
    except ConfigError as error:
        return refuse(error)
    return train(config)


def train(config: RunConfig) -> int:
    """Run ``config`` in this process, alone or as one of several. Returns the exit code.

    0: done, now or before. 1: the final model could not be written, or another process of the run ended or did not
    connect. 2: the run cannot start. 3: a non-finite loss or gradient, a loss above ``stop.loss_above``, or a spike
    (``stop.on_spike``). 4: out of memory. 130, 143: ended by a signal or after ``stop.max_hours``, with a checkpoint to
    resume from; 130 also by Ctrl-C before training.
    """
    try:
        accelerator = build_accelerator(config)
    except ValueError as error:
        return refuse(error)
    except ConnectionError as error:
        # the first process may be the lost one
        print(f"error: process {os.environ.get('RANK', '0')}: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    # transformers draws a bar for every file
    disable_progress_bar()
    folder = RunFolder(Path(config.out), hidden_texts(config))
    with Progress(folder, config.steps, active=accelerator.is_main_process) as progress:
        run = Run(config, accelerator, folder, progress)
        try:
            with memory_failures(run):
                return run.go()
        except RunFailure as failure:
            if run.begun:
                run.logger.status(f"failed:{failure.reason}", run.state, any_process=True)
            if not failure.alone:
                progress.say(str(failure), error=True)
            elif is_first_to_fail():
                _tell(progress, str(failure))
            return failure.exit_code
        except KeyboardInterrupt:
            if run.begun:
                run.leave()
            if accelerator.is_main_process:
                print(f"interrupted, {run.stop.lost}", file=sys.stderr)
            return EXIT_CODES[signal.SIGINT]
        except StreamError as error:
            run.logger.status("failed:data", run.state, any_process=True)
            _tell(progress, f"{error}. Once that is repaired, {how_to_continue(config, 'the run')}", begin="error: ")
            return EXIT_FAILED
        except Exception as error:
            lost = lost_process(error, accelerator.num_processes)
            reason = lost[0] if lost else type(error).__name__
            # the lost process may have written why it ended
            told = lost and str(folder.read_status().get("status")).startswith("failed:")
            if run.begun and not told:
                run.logger.status(f"failed:{reason}", run.state, any_process=True)
            if lost is None:
                raise
            message = f"{reason} after step {run.state.step} ({lost[1]}); {how_to_continue(config, 'the run')}"
            _tell(progress, message, begin="error: ")
            return EXIT_FAILED
        finally:
            folder.release()


def _tell(progress: Progress, message: str, begin: str = "") -> None:
    """Print a message of any process: the first one may be the lost one, or know nothing of it."""
    progress.say(f"{begin}{message}", error=True)
    if of_process():
        print(f"{begin}{of_process()}{message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    from leanstep.recipes.launch import exit_worker

    exit_worker(main())
