"""The model of `python benchmarks device/costs`: occupancy by hand, and the row of one kernel."""

from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from device import costs

    return costs


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps"),
    [
        # 100 registers of a lane are 104: 512 // 104 = 4 warps per scheduler, 16 in all, two blocks of 8
        ("sm_90", 100, 0, 256, 16),
        # 228 KiB hold two blocks of 100 + 1 KiB
        ("sm_90", 32, 100 * 1024, 256, 16),
        # 164 KiB hold one block of 100 + 1 KiB
        ("sm_80", 32, 100 * 1024, 256, 8),
        # as many as on sm_90: the limits are the same
        ("sm_100", 100, 100 * 1024, 256, 16),
        # 512 // 64 = 8 waves per SIMD, 32 in all; 64 KiB hold two blocks of 24 KiB, of 4 waves each
        ("gfx942", 64, 24 * 1024, 256, 8),
    ],
)
def test_occupancy_is_that_of_the_published_limits(costs, target, registers, shared, threads, warps):
    assert costs.occupancy(target, registers, shared, threads) == warps


def test_a_kernel_has_its_row(costs):
    from leanstep.kernels.triton_impl import _compile

    case = next(c for c in _compile.largest(_compile.cases()) if c.kernel.__name__ == "swiglu_kernel")
    name, label, target, moved, count, part, *_, roofline = costs.row(case, "sm_90")
    assert (name, label, target, moved, part, roofline) == (
        "swiglu_kernel", "bfloat16", "sm_90", "6.00", "kernel", "100%"
    )  # fmt: skip
    # two loads, a store, an exponential and a division: at least these, and far from the code of both tiles twice
    assert 5 < float(count) < 40
