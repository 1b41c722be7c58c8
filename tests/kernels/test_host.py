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


@pytest.mark.parametrize(
    ("name", "launches"), [("Lion", 1), ("Lion, int8 momentum", 2), ("SinkGD, matrices", 12), ("SinkGD", 12)]
)
def test_a_step_is_few_launches_that_upload_and_read_nothing(rows, name, launches):
    count, each, _, first, second, reads, *_ = rows[name]
    assert (count, second, reads) == (launches, 0, 0) and first > 0 and float(each) > 0


def test_lanton_uploads_and_reads_nothing(rows):
    _, _, operations, first, second, reads, *_ = rows["LANTON"]
    assert (second, reads) == (0, 0) and first > 0
    # of 21 tensors; one more for each is noticed
    assert operations < 503 + 21


@pytest.mark.parametrize(("name", "launches", "most"), [('Lion nonfinite="raise"', 1, 1), ("M-FAC, 8 rows", 6, 2)])
def test_steps_that_read_the_device_are_seen_to_wait(rows, name, launches, most):
    count, _, _, _, second, reads, *_, milliseconds = rows[name]
    assert (count, second, milliseconds) == (launches, 0, "-") and 0 < reads <= most


def test_torch_s_fused_adamw_is_beside_them(rows):
    count, _, operations, *_ = rows["torch AdamW fused"]
    assert count == 0 and 0 < operations < rows["torch AdamW foreach"][2]
