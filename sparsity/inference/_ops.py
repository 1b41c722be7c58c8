"""Temporary definition of the bitmask operations."""

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bitmask_pack(weight):
    rows, columns = weight.shape
    keep = weight.contiguous().view(_BITS[weight.element_size()]) != 0
    padded = torch.nn.functional.pad(keep, (0, -columns % 32)).view(rows, -1, 32)
    mask = (padded.to(torch.int64) << torch.arange(32)).sum(-1)
    mask = torch.where(mask >= 2**31, mask - 2**32, mask).to(torch.int32)
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[1:] = keep.sum(1).cumsum(0)
    return weight[keep], mask, offsets


def _keep(mask, columns):
    return ((mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten(1)[:, :columns]


def bitmask_quantize(values, offsets):
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    top = torch.zeros(len(offsets) - 1).scatter_reduce(0, rows, values.float().abs(), "amax")
    scales = top / 127
    codes = torch.where(scales[rows] > 0, (values.float() / scales[rows]).round(), 0.0).clamp(-127, 127).to(torch.int8)
    return codes, scales


def bitmask_validate(values, mask, offsets, shape, scales=None):
    rows, columns = shape
    if offsets[0] != 0 or offsets[-1] != len(values) or (offsets.diff() < 0).any():
        raise ValueError("bitmask_validate: offsets out of order")
    keep = ((mask.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten(1)
    if keep[:, columns:].any():
        raise ValueError("bitmask_validate: unused bits are set")
    if not torch.equal(keep.sum(1), offsets.diff()):
        raise ValueError("bitmask_validate: the mask's counts differ from the offsets")
    if scales is not None and not bool((scales.isfinite() & (scales >= 0)).all()):
        raise ValueError("bitmask_validate: scales negative or not finite")


def bitmask_unpack(values, mask, offsets, shape, scales=None, dtype=None):
    bitmask_validate(values, mask, offsets, shape, scales)
    if scales is not None:
        rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
        values = (values.float() * scales[rows]).to(dtype or torch.float32)
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[_keep(mask, shape[1])] = values
    return weight


def bitmask_linear(x: Tensor, values, mask, offsets, columns, bias=None, scales=None):
    weight = bitmask_unpack(values, mask, offsets, (len(mask), columns), scales, x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)
