"""A step on a device launches what the page says, uploads nothing that did not move, and does not wait."""

from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        from device import host

        parameters = host.llama(layers=2, width=64, inner=96, vocabulary=100)
        yield {name: host.measured(make, repeats=1) for name, make in host.optimizers(*parameters).items()}


@pytest.mark.parametrize(("name", "launches"), [("Lion", 1), ("Lion, int8 momentum", 2), ("SinkGD, matrices", 12)])
def test_a_step_is_few_launches_that_upload_and_wait_for_nothing(rows, name, launches):
    count, _, first, second, waits, *_ = rows[name]
    assert (count, second, waits) == (launches, 0, "no") and first > 0


def test_lanton_uploads_and_waits_for_nothing(rows):
    _, operations, first, second, waits, *_ = rows["LANTON"]
    assert (second, waits) == (0, "no") and first > 0
    # of 21 tensors; one more for each is noticed
    assert operations < 503 + 21


@pytest.mark.parametrize("name", ['Lion nonfinite="raise"', "M-FAC, 8 rows"])
def test_steps_that_read_the_device_are_seen_to_wait(rows, name):
    assert rows[name][4] == "yes"
