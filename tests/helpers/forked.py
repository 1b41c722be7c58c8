"""The server that processes of tests are forked from: it has imported what they need, and a fork costs milliseconds."""

import multiprocessing
import multiprocessing.forkserver
import os
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Have the server import modules too, those of this folder included; without effect once it runs."""
    wishes = [*multiprocessing.forkserver._forkserver._preload_modules, *modules]
    CONTEXT.set_forkserver_preload(list(dict.fromkeys(wishes)))


def start_server() -> None:
    """Start the server if it does not run."""
    preload("frozen_heap")
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 to 3.13 do not give it this process's search path; warm_process takes the folder away again
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def start_code(code: str) -> multiprocessing.process.BaseProcess:
    """Run code in a process of its own, with the environment variables that this one has now."""
    start_server()
    process = CONTEXT.Process(target=_run_code, args=(code, dict(os.environ)))
    process.start()
    return process


def run_code(code: str) -> None:
    """Run code in a process of its own, and expect that it ends without an error."""
    (process := start_code(code)).join(120)
    assert process.exitcode == 0


def _run_code(code: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {})
