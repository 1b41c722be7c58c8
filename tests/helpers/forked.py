"""The server that processes of tests are forked from: it has imported what they need, and a fork costs milliseconds."""

import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import tempfile
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


def start_code(code: str, *arguments: object, output: str | None = None) -> multiprocessing.process.BaseProcess:
    """Run code in a process of its own, with the environment variables that this one has now.

    It reads the arguments in ``sys.argv``; all that it prints goes to the file ``output``.
    """
    start_server()
    process = CONTEXT.Process(target=_run_code, args=(code, [*map(str, arguments)], output, dict(os.environ)))
    process.start()
    return process


def run_code(code: str) -> None:
    """Run code in a process of its own, and expect that it ends without an error."""
    ended = finish_code(code)
    assert ended.returncode == 0, ended.stdout


def finish_code(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in a process of its own to its end; ``stdout`` is all that it printed, errors included."""
    with tempfile.NamedTemporaryFile("r") as output:
        (process := start_code(code, *arguments, output=output.name)).join(600)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, output.read())


def _run_code(code: str, arguments: list[str], output: str | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    if output:
        file = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    exec(code, {})
