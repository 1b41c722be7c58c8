"""Break one line of the package at a time, and see whether the tests that stand for it notice.

    python -P tests/helpers/mutants.py [WORD]

``tests/mutants.json`` lists, for each file, the tests and the changes: what stands there once, and what to put in its
place. Each change is made in a copy of the package, in a process that is forked from one with torch. Prints what
survived, of the changes whose file or text has WORD, and fails if any did.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "lora", "optimizers", "pruning", "recipes", "sparsity")


def run_tests(package: Path, tests: list[str]) -> int:
    """Run tests on the copy in a folder, in a process of their own; return pytest's exit status."""
    child = os.fork()
    if child == 0:
        # the bytecode of a file that changes within a second would not be made anew
        sys.dont_write_bytecode = True
        os.chdir(ROOT)
        sys.path.insert(0, str(package))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import pytest

        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow and not interpret"]
        code = pytest.main([*options, *tests])
        import leanstep

        os._exit(code if leanstep.__file__.startswith(str(package)) else 99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survivors(word: str, folder: Path) -> list[str]:
    """Make each change; return those that no test noticed."""
    package = folder / "leanstep"
    shutil.copytree(ROOT / "leanstep", package)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, package / name)
    survived = []
    for name, entry in json.loads((ROOT / "tests" / "mutants.json").read_text("utf-8")).items():
        path = package / name
        whole = path.read_text("utf-8")
        changes = [change for change in entry["changes"] if word in name or word in change[0]]
        if changes and (code := run_tests(folder, entry["tests"])):
            raise SystemExit(f"{name}: its tests end with {code} before anything is changed")
        for before, after in changes:
            if whole.count(before) != 1:
                raise SystemExit(f"{name}: expected {before!r} once, found it {whole.count(before)} times")
            path.write_text(whole.replace(before, after), "utf-8")
            code = run_tests(folder, entry["tests"])
            print("killed  " if code else "SURVIVED", f"{name}: {before} -> {after}", flush=True)
            survived += [] if code else [f"{name}: {before}"]
        path.write_text(whole, "utf-8")
    return survived


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(bool(survivors(sys.argv[1] if len(sys.argv) > 1 else "", Path(temporary))))
