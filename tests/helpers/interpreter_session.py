"""Run the ``interpret`` tests in a process of their own and report them as tests of this one.

Triton decides when a kernel is defined whether it is interpreted, from ``TRITON_INTERPRET``, for the whole process:
the variable must be there before the first import of Triton and would turn every other Triton test into an
interpreter test. So one pytest process with the variable runs those tests, started when collection is done and at
work beside the main process; its reports, one JSON line each, are played back here under the same names.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

_REPORTS = "LEANSTEP_INTERPRETER_REPORTS"


def in_interpreter() -> bool:
    """Say whether this process interprets Triton kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class ReportWriter:
    """Pytest plugin of the child: append each report to a file as it comes."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(data, default=str) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Make this module a plugin (``-p interpreter_session``) that records the child's reports."""
    if _REPORTS in os.environ and in_interpreter():
        config.pluginmanager.register(ReportWriter(config, os.environ[_REPORTS]))


class InterpreterSession:
    """The child process and what it has reported so far."""

    def __init__(self, config: pytest.Config, nodeids: list[str], folder: Path) -> None:
        self.config = config
        self._offset, self._reports = 0, {}
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"interpreter-{uuid.uuid4().hex}"
        self.reports_file, self.log_file, tests_file = (stem.with_suffix(s) for s in (".jsonl", ".log", ".tests"))
        tests_file.write_text("\n".join(nodeids), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "pytest", "-n0", "-p", "interpreter_session", "-p", "no:cacheprovider"]
        helpers = str(Path(__file__).parent)
        paths = [helpers, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            _REPORTS: str(self.reports_file),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        # variables by which pytest and xdist would take the child for a part of this run
        for name in ("PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            environment.pop(name, None)
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                [*command, f"@{tests_file}"],
                cwd=config.rootpath,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _collect(self) -> None:
        """Take in the reports written since the last call; a line not yet finished waits for the next."""
        if not self.reports_file.exists():
            return
        with open(self.reports_file, "rb") as file:
            file.seek(self._offset)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(lines) + len(newline)
        for line in lines.splitlines():
            data = json.loads(line)
            if isinstance(data["longrepr"], list):  # where a test was skipped: a tuple before JSON had it
                data["longrepr"] = tuple(data["longrepr"])
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            self._reports.setdefault(report.nodeid, []).append(report)

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Wait for a test of the child to end; return its reports, or a failure that shows why there are none."""
        while True:
            running = self.process.poll() is None  # before reading, so that a last report is not missed
            self._collect()
            found = self._reports.get(item.nodeid, [])
            if any(report.when == "teardown" for report in found):
                return found
            if not running:
                return [*found, self._lost(item)]
            time.sleep(0.1)

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        tail = self.log_file.read_text(encoding="utf-8", errors="replace")[-4000:]
        reason = f"the interpreter process ended (exit code {self.process.returncode}) without this test:\n{tail}"
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call")

    def close(self) -> None:
        """End the child if it is still at work."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
