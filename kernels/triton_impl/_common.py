"""Device functions that the Triton kernels share, and the map from torch to Triton dtypes.

Arithmetic is fp32. On a device, bfloat16 conversions are `.to`, one instruction that rounds to nearest even. Triton's
interpreter truncates instead and loses subnormals, so it runs the same conversion written in bits. All other code is
the same for both.
"""

import torch
import triton
import triton.language as tl

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROUNDINGS = ("nearest", "stochastic", "kahan", "master", "split")
# rounding states may be differences of one byte, too
STATE_DTYPE = {**TL_DTYPE, torch.int8: tl.int8}


def has_state(rounding: str) -> bool:
    """Whether a rounding has a state tensor."""
    return rounding in ("kahan", "master", "split")


def zero_states(param: torch.Tensor, rounding: str) -> list[torch.Tensor]:
    """The rounding state of a parameter of zeros, as a list of one tensor or none."""
    dtypes = {"kahan": param.dtype, "master": torch.float32, "split": torch.int8}
    return [torch.zeros_like(param, dtype=dtypes[rounding])] if has_state(rounding) else []


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_tile(ptr, mask):
    """Load a tile, zero where the mask is False. With mask None, accesses are as wide as the alignment allows."""
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=mask, other=0)
    return x


@triton.jit
def to_float(x):
    """Convert a float block to fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Convert an fp32 block to DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def random_bits(index, seed):
    """32 random bits per element: a hash of its index in the whole tensor (uint32 block) and the seed (uint32).

    The mixing function is "lowbias32" from Christopher Wellons' hash-prospector.
    """
    x = index ^ seed
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def run_numbers(all_runs, i, RUNS: tl.constexpr):
    """The four numbers of tensor i of `StepOptions.runs`."""
    if RUNS:
        runs = all_runs + 4 * i
        return tl.load(runs), tl.load(runs + 1), tl.load(runs + 2), tl.load(runs + 3)
    else:
        return 1, 1, 1, 1


@triton.jit
def index_in_whole(start, offs, elements, distance, count, slab):
    """Indices of a shard's elements `start + offs` in the whole tensor, less the first's, modulo 2**32 (uint32 block).

    The numbers are those of `run_numbers`. `start` is int64. Divisions of the block `offs` are 32-bit, because runs and
    their counts are below 2**31.
    """
    run = start // elements
    position = (start % elements).to(tl.uint32) + offs.to(tl.uint32)
    local_run = (run % count).to(tl.uint32) + position // elements.to(tl.uint32)
    slabs = (run // count).to(tl.uint32) + local_run // count.to(tl.uint32)
    index = slabs * slab.to(tl.uint32) + (local_run % count.to(tl.uint32)) * distance.to(tl.uint32)
    return index + position % elements.to(tl.uint32)


@triton.jit
def stochastic_bfloat16(x, random):
    """Round an fp32 block to bfloat16, up in magnitude with the probability of the dropped fraction. NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    # the sum would overflow CUDA's NaN, whose payload is all ones, into a zero
    bits = tl.where(x == x, bits + (random & 0xFFFF), 0x7FC00000)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def parameter_value(p, state, ROUNDING: tl.constexpr):
    """fp32 value of the parameter: plus its Kahan remainder, of its fp32 master copy, or of a split weight.

    The parameter's alone where the remainder or master does not round to it: it was written between two steps.
    """
    value = to_float(p)
    if ROUNDING == "master":
        stored = to_float(state)
        value = tl.where(to_float(round_to(stored, p.dtype)) == value, stored, value)
    elif ROUNDING == "kahan":
        stored = to_float(state)
        # a rounding error, at most half the distance to the next number, changes no rounding if shrunk a little
        rounded = round_to(value + stored * 0.9921875, p.dtype)
        value += tl.where(to_float(rounded) - value == 0, stored, -0.0)  # -0.0 changes no value
    elif ROUNDING == "split":
        joined = (value.to(tl.int32, bitcast=True) + (state.to(tl.int32) << 8)).to(tl.float32, bitcast=True)
        value = tl.where((tl.abs(value) < float("inf")) & (value != 0), joined, value)
    return value


@triton.jit
def rounded_to_24(x):
    """Pattern of an fp32 block rounded to 24 bits: bits 8 to 15 are the difference to the nearest bf16 number."""
    # the largest payload of a NaN would overflow
    return tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000) + 0x80


@triton.jit
def rounded_parameter(value, random, P_DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """Round an fp32 block to the parameter's dtype."""
    if ROUNDING == "stochastic":
        p = stochastic_bfloat16(value, random)
    elif ROUNDING == "split":
        p = ((rounded_to_24(value) + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        p = round_to(value, P_DTYPE)
    return p


@triton.jit
def remainder(value, p, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """The new rounding state: the rounding error (kahan), the difference of patterns (split) or the value (master)."""
    if ROUNDING == "kahan":
        state = round_to(value - to_float(p), E_DTYPE)
    elif ROUNDING == "split":
        state = (rounded_to_24(value) >> 8).to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        state = value
    return state


@triton.jit
def aligned_pointer(address, DTYPE: tl.constexpr):
    """Pointer to a 16-byte aligned tensor.

    The hint belongs to this cast, not to the address, because other branches use the address without that promise.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a tensor; 16-byte aligned with ALIGNED."""
    if ALIGNED:
        ptr = aligned_pointer(address, DTYPE)
    else:
        ptr = address.to(tl.pointer_type(DTYPE))
    return ptr
