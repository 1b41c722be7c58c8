"""The check of kernels' accesses in Triton's interpreter (`interpreter_accesses.py`) finds what it is there for."""

import interpreter_accesses
import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.interpret


@triton.jit
def copy_kernel(x_ptr, out_ptr, numel, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < numel), mask=offs < numel)


@triton.jit
def table_kernel(table, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x_ptr = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(x_ptr + offs, tl.zeros([BLOCK], tl.float32), mask=offs < tl.load(table + 1))


@triton.jit
def flag_kernel(flags, value):
    tl.store(flags, tl.program_id(0) * value + 1)


def test_a_copy_is_clean_and_counted():
    before = interpreter_accesses.launches["copy_kernel"]
    x, out = torch.arange(10.0), torch.empty(10)
    copy_kernel[(3,)](x, out, 10, 4, BLOCK=4)
    assert torch.equal(x, out) and interpreter_accesses.launches["copy_kernel"] == before + 1


@pytest.mark.parametrize(
    ("numel", "step", "message"), [(11, 4, "outside"), (10, 3, "store by program 0 and store by program 1")]
)
def test_an_access_outside_and_an_overlap_are_found(numel, step, message):
    with pytest.raises(interpreter_accesses.AccessError if "store" in message else Exception, match=message):
        copy_kernel[(3,)](torch.arange(10.0), torch.empty(10), numel, step, BLOCK=4)


def test_a_program_that_reads_what_another_stores_is_found():
    x = torch.arange(16.0)
    with pytest.raises(interpreter_accesses.AccessError, match="store by program 0 and load by program 1"):
        copy_kernel[(2,)](x, x[4:], 8, 4, BLOCK=4)


@pytest.mark.parametrize(("size", "fits"), [(6, True), (7, False)])
def test_tensors_behind_a_table_have_their_own_end(size, fits):
    x = torch.ones(6)
    table = torch.tensor([x.data_ptr(), size])
    if fits:
        table_kernel[(1,)](table, BLOCK=8)
        assert not x.any()
    else:
        with pytest.raises(Exception, match="store of 4 bytes outside"):
            table_kernel[(1,)](table, BLOCK=8)


def test_an_address_inside_of_a_tensor_is_not_that_of_a_freed_one_which_lay_there():
    memory = np.ones(16, np.float32)
    torch.from_numpy(memory[4:6]).data_ptr()
    x = torch.from_numpy(memory)
    table_kernel[(1,)](torch.tensor([x.data_ptr() + 16, 6]), BLOCK=8)
    assert x.tolist() == [1] * 4 + [0] * 6 + [1] * 6


def test_programs_may_agree_on_a_flag_and_not_differ():
    flags = torch.zeros(1, dtype=torch.int32)
    flag_kernel[(3,)](flags, 0)
    assert flags.item() == 1
    with pytest.raises(Exception, match="programs store 1 and 2"):
        flag_kernel[(3,)](flags, 1)
