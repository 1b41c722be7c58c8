"""Seconds from the command to the first loss line of a nano run.

    python benchmarks/first_loss.py [RECIPE] [--cold]

``--cold`` uses an empty cache: the tokenizer is trained and the text tokenised, as on a machine's first run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time


def main() -> None:
    """Start the run, wait for the line, stop the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="llama-nano-sinkgd")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if options.cold:
            environment |= {"LEANSTEP_CACHE": f"{folder}/cache", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        begin = time.perf_counter()
        command = [sys.executable, "-m", "leanstep", "train", options.recipe, f"out={folder}/run"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step") and " loss " in line and "validation" not in line:
                print(f"{options.recipe}: first loss line after {time.perf_counter() - begin:.1f} s: {line.strip()}")
                break
        else:
            print(f"{options.recipe}: ended without a loss line")
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
