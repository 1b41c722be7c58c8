"""Device functions that the Triton kernels share, and the map from torch to Triton dtypes.

Arithmetic is fp32. bfloat16 conversions go through `.to` on a device, where they are one instruction that rounds to
nearest even; Triton's interpreter truncates instead and loses subnormals, so there the same conversion is written
in bits. Everything else is one code path for both.
"""

import torch
import triton
import triton.language as tl

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROUNDINGS = ("nearest", "stochastic", "kahan", "master")

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_tile(ptr, mask):
    """A tile, zero where the mask is off; without a mask (None) the access can be as wide as its alignment allows."""
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=mask, other=0.0)
    return x


@triton.jit
def to_float(x):
    """Exact fp32 value of a float block."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 block in DTYPE, rounded to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        y = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def random_bits(index, seed):
    """32 random bits per element from its index in the whole tensor (uint32 block) and the seed (uint32 scalar).

    The mixing function is "lowbias32" from Christopher Wellons' hash-prospector.
    """
    x = index ^ seed
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def stochastic_bfloat16(x, random):
    """fp32 block in bfloat16, rounded up in magnitude with the probability of the discarded fraction; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    # a NaN whose payload is all ones, as CUDA makes them, would carry over into a zero
    bits = tl.where(x == x, bits + (random & 0xFFFF), 0x7FC00000)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def parameter_value(p, state, ROUNDING: tl.constexpr):
    """fp32 value of the parameter: with its Kahan remainder, or that of its fp32 master copy."""
    if ROUNDING == "master":
        value = to_float(state)
    elif ROUNDING == "kahan":
        value = to_float(p) + to_float(state)
    else:
        value = to_float(p)
    return value


@triton.jit
def rounded_parameter(value, random, P_DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """fp32 block in the parameter's dtype."""
    if ROUNDING == "stochastic":
        p = stochastic_bfloat16(value, random)
    else:
        p = round_to(value, P_DTYPE)
    return p


@triton.jit
def remainder(value, p, E_DTYPE: tl.constexpr, ROUNDING: tl.constexpr):
    """The rounding state of the rounded parameter: the rounding error (kahan) or the value itself (master)."""
    if ROUNDING == "kahan":
        state = round_to(value - to_float(p), E_DTYPE)
    else:
        state = value
    return state


@triton.jit
def aligned_pointer(address, DTYPE: tl.constexpr):
    """Pointer to a 16-byte aligned tensor.

    The hint is attached to this cast, not to the address: other branches use the address without that promise.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
