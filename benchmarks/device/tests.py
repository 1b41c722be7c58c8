"""The test suite's GPU tests, by file.

    python benchmarks device/tests [--dry-run] [--out FOLDER]

Runs ``pytest -m gpu`` on every file that has such tests, several files at a time, because most of the time goes into
compiling kernels. On a CPU the tests are skipped: the dry run collects one file. Needs the extra ``dev``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from stages import ROOT, Cases, Row, Stage, run_stage, stage_parser, without_folders

PARSER = stage_parser(__doc__)
FULL = {"files": None}
DRY = {"files": 1}
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))


def main() -> int:
    """Run the tests, and print the table."""
    return run_stage("tests", PARSER, cases_of, FULL, DRY, workers=WORKERS)


def cases_of(stage: Stage) -> Cases:
    """One case per file with GPU tests."""
    marked = [path for path in sorted(ROOT.glob("tests/*/test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    names = [path.relative_to(ROOT).as_posix() for path in marked]
    return {name: partial(run_file, stage, name) for name in names[: stage.sizes.files]}


def run_file(stage: Stage, name: str) -> list[Row]:
    """Outcomes of the GPU tests of a file, and the first failure."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed; it comes with pip install -e '.[dev]'")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    if stage.out is not None:
        # kernels compiled for a call that was cut short serve the next one
        environment.setdefault("LEANSTEP_TEST_CACHE", str(stage.out.absolute() / "cache"))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", name]
        command = [sys.executable, "-P", "-m", "pytest", *options]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest exited {result.returncode}: {(result.stdout + result.stderr)[-500:]}")
        return [row_of(name, ElementTree.parse(report).getroot(), stage.dry_run)]


def row_of(name: str, root: ElementTree.Element, dry_run: bool) -> Row:
    """A file's row, by pytest's report."""
    cases = list(root.iter("testcase"))
    broken = [case for case in cases if any(child.tag in ("failure", "error") for child in case)]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(broken) - skipped
    row = {"file": name, "passed": passed, "failed": len(broken), "skipped": skipped}
    row |= {"seconds": round(sum(float(case.get("time", 0)) for case in cases), 1)}
    row["ok"] = not broken and (passed > 0 or dry_run)
    for case in broken[:1]:
        outcome = next(child for child in case if child.tag in ("failure", "error"))
        row["first failure"] = f"{case.get('name')}: {without_folders(outcome.get('message', ''))[:300]}"
    return row
