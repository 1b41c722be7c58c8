"""Break one line of the package at a time, and see whether the tests that stand for it notice.

    python -P tests/helpers/mutants.py [WORD]

``tests/mutants.json`` lists, for each file, the tests and the changes: what stands there once, and what to put in its
place. Each change is made in a copy of the repository, whose tests run in a process that is forked from one with
torch. Prints what became of the changes whose file or text has WORD, and fails if one survived.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_tests(copy: Path, tests: list[str]) -> int:
    """Run tests of a copy of the repository, in a process of their own; return pytest's exit status."""
    child = os.fork()
    if child == 0:
        # the bytecode of a file that changes within a second would not be made anew
        sys.dont_write_bytecode = True
        os.chdir(copy)
        # where the editable installation finds the folders of the package
        (finder,) = (module for name, module in sys.modules.items() if name.startswith("__editable___leanstep"))
        finder.MAPPING.update({name: path.replace(str(ROOT), str(copy)) for name, path in finder.MAPPING.items()})
        os.dup2(os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        import pytest

        code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not slow and not interpret", *tests])
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def survivors(word: str, copy: Path) -> list[str]:
    """Make each change; return those that no test noticed."""
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "runs"), dirs_exist_ok=True)
    survived = []
    for name, entry in json.loads((ROOT / "tests" / "mutants.json").read_text("utf-8")).items():
        path = copy / name
        whole = path.read_text("utf-8")
        changes = [change for change in entry["changes"] if word in name or word in change[0]]
        if changes and (code := run_tests(copy, entry["tests"])):
            end = (copy / "log.txt").read_text()[-2000:]
            raise SystemExit(f"{end}\n{name}: its tests end with {code} before anything is changed")
        for before, after in changes:
            if whole.count(before) != 1:
                raise SystemExit(f"{name}: expected {before!r} once, found it {whole.count(before)} times")
            path.write_text(whole.replace(before, after), "utf-8")
            code = run_tests(copy, entry["tests"])
            print("killed  " if code else "SURVIVED", f"{name}: {before} -> {after}", flush=True)
            survived += [] if code else [f"{name}: {before}"]
        path.write_text(whole, "utf-8")
    return survived


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(bool(survivors(sys.argv[1] if len(sys.argv) > 1 else "", Path(temporary))))
