import numpy as np
import pytest
import torch

multi_tensor = pytest.importorskip("leanstep.kernels.triton_impl._multi_tensor")

CPU = torch.device("cpu")


def test_the_map_gives_every_piece_of_every_tensor_one_program():
    programs = multi_tensor.device_programs([2, 0, 3, 1], CPU)
    assert [(int(p) >> 32, int(p) & 0xFFFFFFFF) for p in programs] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0)]


def test_nothing_to_launch_is_none():
    assert multi_tensor.device_programs([], CPU) is None
    assert multi_tensor.device_programs([0, 0], CPU) is None


def test_the_map_holds_more_pieces_than_an_int32_shift_would():
    tensor, piece = 70_000, 3
    programs = multi_tensor.device_programs([0] * tensor + [piece], CPU)
    assert programs.tolist() == [(tensor << 32) + k for k in range(piece)]


def test_equal_content_is_uploaded_once_and_the_least_recent_goes_first():
    cache = multi_tensor._UploadCache(capacity=64)

    def get(key):
        return cache.get(key, lambda: np.full(4, key), CPU)

    first = get(1)
    assert get(1) is first and cache.uploads == 1
    get(2)
    assert get(1) is first and cache.uploads == 2
    get(3)  # 96 bytes: 2, the least recently used, goes
    assert get(1) is first and cache.uploads == 3
    assert get(2).tolist() == [2] * 4 and cache.uploads == 4


def test_an_entry_larger_than_the_cache_still_works():
    cache = multi_tensor._UploadCache(capacity=8)
    assert cache.get("big", lambda: np.arange(100), CPU).tolist() == list(range(100))


def test_staging_copies_only_what_is_not_dense_and_writes_it_back():
    staging = multi_tensor.Staging()
    dense, strided = torch.zeros(3, 4), torch.zeros(4, 3).t()
    assert staging.write(dense).data_ptr() == dense.data_ptr()
    copy = staging.write(strided)
    assert copy.is_contiguous() and copy.data_ptr() != strided.data_ptr()
    copy.fill_(2)
    half = torch.zeros(5, dtype=torch.float16)
    staging.write(half, torch.float32).fill_(1 + 2**-12)
    staging.finish()
    assert (strided == 2).all() and (half == 1).all() and (dense == 0).all()


@pytest.mark.parametrize("rounding", ["kahan", "master"])
def test_fp32_parameters_keep_nothing_beside_them(rounding):
    staging = multi_tensor.Staging()
    param, extra = torch.tensor([1.0]), torch.tensor([2.0])
    target, beside, rounds = staging.rounded(param, extra, rounding)
    assert beside is None and rounds == "nearest"
    target.mul_(10)
    staging.finish()
    # kahan: (1 + 2) * 10 with nothing left over; master: 1 * 10 in both, as the parameter was written in between
    assert (param.item(), extra.item()) == ((30.0, 0.0) if rounding == "kahan" else (10.0, 10.0))


def test_alignment_of_rows():
    base = torch.zeros(2, 8, 16, dtype=torch.bfloat16)
    assert multi_tensor.is_aligned(base, None)
    assert multi_tensor.has_aligned_rows(base)
    assert not multi_tensor.has_aligned_rows(base[:, :, 1:])
    assert not multi_tensor.has_aligned_rows(base[:, :, :12])
    assert not multi_tensor.has_aligned_rows(base.transpose(1, 2))
    assert not multi_tensor.has_aligned_rows(torch.zeros(1, 4, 13))


def test_launches_are_grouped_in_order_of_first_appearance():
    launches = multi_tensor.launches(["b", "a", "b"], [1, 1, 2], torch.device("cpu"))
    assert {key: programs.tolist() for key, programs in launches} == {"b": [0, 2 << 32, 2 << 32 | 1], "a": [1 << 32]}


@pytest.mark.gpu
def test_steady_state_uploads_nothing_on_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [(1, 2), (3, 4)]
    first = multi_tensor.device_rows(rows, device)
    uploads = multi_tensor._uploads.uploads
    with torch.cuda.stream(torch.cuda.Stream()):
        again = multi_tensor.device_rows(rows, device)
    assert again is first and multi_tensor._uploads.uploads == uploads
    assert first.tolist() == [1, 2, 3, 4]
