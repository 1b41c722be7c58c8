"""Choose what ``pytest`` without arguments runs: every test function, and a sample of the cases of each.

The whole suite has thousands of cases that differ in a dtype, a shape or an option. A default run is to end in minutes.
It leaves out tests marked ``slow`` and, of every parametrized test, all but ``CASES`` of its cases, or as many as its
mark ``sample(n)`` says. Those left out are marked ``exhaustive`` here. ``pytest FILE`` and
``pytest -m "slow or not slow"`` run everything.
"""

import zlib
from collections import defaultdict

import pytest

CASES = 1
EXPRESSION = "not slow and not exhaustive"


def shorten_default_run(config: pytest.Config) -> None:
    """Deselect the slow and the exhaustive where neither tests nor markers are named."""
    default = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if default and not config.option.markexpr and not config.option.keyword:
        config.option.markexpr = EXPRESSION


def mark_exhaustive(items: list[pytest.Item]) -> None:
    """Mark all cases of a test but a few, which a checksum of their names draws: the same ones in every run.

    Every second or tenth case would not do: where dtypes alternate, all cases drawn could have the same one.
    """
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            cases[item.nodeid.split("[", 1)[0]].append(item)
        elif item.get_closest_marker("sample"):  # a module whose methods torch's tools multiply by device and dtype
            cases[item.nodeid.split("::", 1)[0]].append(item)
    for tests in cases.values():
        sample = tests[0].get_closest_marker("sample")
        count = sample.args[0] if sample else CASES
        for item in sorted(tests, key=lambda test: zlib.crc32(test.nodeid.encode()))[count:]:
            item.add_marker(pytest.mark.exhaustive)
