"""Print at the end of `pytest tests/fuzz` how many inputs each parser got, and how it answered."""

import fuzzing
import pytest


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Hand the counts of a worker of pytest-xdist to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = {name: dict(counts) for name, counts in fuzzing.COUNTS.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Add the counts of a worker of pytest-xdist."""
    for name, counts in getattr(node, "workeroutput", {}).get("counts", {}).items():
        fuzzing.COUNTS[name].update(counts)


def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    if fuzzing.COUNTS:
        terminalreporter.section("damaged and hostile input")
        terminalreporter.write_line(fuzzing.count_table())
