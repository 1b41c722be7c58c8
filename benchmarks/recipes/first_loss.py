"""Seconds from the command to the first loss line of a nano run.

    python benchmarks recipes/first_loss [RECIPE] [--cold]

``--cold`` uses an empty cache: the tokenizer is trained and the text tokenised, as on a machine's first run.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time

from common import TRAIN, command_line

PARSER = command_line(__doc__, cold=(False, "start with empty caches"))
PARSER.add_argument("recipe", nargs="?", default="llama-nano-sinkgd")


def main() -> None:
    """Start the run, wait for the line, stop the run."""
    options = PARSER.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if options.cold:
            environment |= {"LEANSTEP_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        begin = time.perf_counter()
        command, pipe = [*TRAIN, options.recipe, f"out={folder}/run"], subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment)
        for line in process.stdout or ():
            if line.startswith("step") and " loss " in line and "validation" not in line:
                print(f"{options.recipe}: first loss line after {time.perf_counter() - begin:.1f} s: {line.strip()}")
                break
        else:
            print(f"{options.recipe}: ended without a loss line")
        process.kill()
        process.wait()
