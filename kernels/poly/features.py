"""All monomials of a vector up to a degree: features whose inner products are a Taylor sum of exp."""

import torch
from torch import Tensor

from leanstep.kernels._backend import choose
from leanstep.kernels.cpp_impl._build import call
from leanstep.kernels.op import EVERYWHERE, declare, triton_module
from leanstep.kernels.poly.tables import MAX_FEATURES, PolyTables, feature_count, poly_tables
from leanstep.kernels.reference.poly import features as reference

# columns that a thread of features.cpp takes at a time
LANES = 64

declare("poly_features", EVERYWHERE)
declare("poly_features_backward", EVERYWHERE)


def poly_features(x: Tensor, degree: int) -> Tensor:
    """Features of every column of x: all monomials ``x^a / sqrt(a!)`` up to ``degree``.

    ``f(x) . f(y) = sum over t <= degree of (x . y)^t / t!``

    Args:
        x: [n, d, c], floating; a column is a vector. Not written.
        degree: g >= 0.

    Returns:
        [n, k, c] of x's dtype with ``k = C(d + g, g)``, ordered by degree. In this layout, sums over features and sums
        over columns are both matrix products.

    Raises:
        ValueError: for another shape or dtype, a negative degree, or more than 2^20 features.
        BackendError: the requested backend cannot run here.

    Notes:
        Computed in fp32 or wider and rounded once. Writes every feature once, and reads every feature below the highest
        degree once. Reads x once per feature, from the cache.
    """
    dim = _check(x, degree, "poly_features")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tables = poly_tables(dim, degree, x.device)
    if not x.numel():
        return x.new_ones(x.shape[0], feature_count(dim, degree), x.shape[2])
    backend = choose("poly_features", x.device, wide.dtype).backend
    if backend == "cpp":
        return _cpp_features(wide.contiguous(), tables).to(x.dtype)
    if backend == "triton":
        return triton_module(__name__).poly_features(wide, tables).to(x.dtype)
    return reference.poly_features(wide, tables).to(x.dtype)


def poly_features_backward(grad: Tensor, x: Tensor, degree: int) -> Tensor:
    """Gradient of x from the gradient of its features: the transposed Jacobian times ``grad``.

    ``dx[i] = sum of sqrt(b_i + 1) f[b] grad[b + e_i]`` over features b below the highest degree, where b_i is the
    exponent of x_i in b.

    Args:
        grad: [n, k, c] of x's dtype; not written.
        x: [n, d, c], as given to :func:`poly_features`; not written.
        degree: as given to :func:`poly_features`.

    Returns:
        [n, d, c] of x's dtype.

    Raises:
        ValueError, BackendError: as :func:`poly_features`, and for a gradient of another shape or dtype.

    Notes:
        Computes the features below the highest degree again. Reads a row of ``grad`` once per variable of its monomial.
        The kernels make no large temporary; the definition makes some of ``d C(d + g - 1, g - 1) c`` elements.
    """
    dim = _check(x, degree, "poly_features_backward")
    expected = (x.shape[0], feature_count(dim, degree), x.shape[2])
    if tuple(grad.shape) != expected or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"poly_features_backward: expected a gradient {expected} of {x.dtype} on {x.device}, got "
            f"{tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )
    if not x.numel() or degree == 0:
        return torch.zeros_like(x)
    wide_dtype = torch.promote_types(x.dtype, torch.float32)
    wide, wide_grad, tables = x.to(wide_dtype), grad.to(wide_dtype), poly_tables(dim, degree, x.device)
    backend = choose("poly_features_backward", x.device, wide_dtype).backend
    if backend == "cpp":
        return _cpp_features_backward(wide_grad.contiguous(), wide.contiguous(), tables).to(x.dtype)
    if backend == "triton":
        return triton_module(__name__).poly_features_backward(wide_grad, wide, tables).to(x.dtype)
    return reference.poly_features_backward(wide_grad, wide, tables).to(x.dtype)


def _cpp_features(x: Tensor, tables: PolyTables) -> Tensor:
    """Features [n, k, c] of contiguous x [n, d, c], fp32."""
    n, dim, columns = x.shape
    features = len(tables.parent)
    out = x.new_empty(n, features, columns)
    maps = (tables.parent, tables.last, tables.weight32)
    call("poly/features", "poly_features", {}, x, *maps, out, n, dim, features, columns)
    return out


def _cpp_features_backward(grad: Tensor, x: Tensor, tables: PolyTables) -> Tensor:
    """The gradient of x [n, d, c], fp32; both tensors contiguous."""
    n, dim, columns = x.shape
    lower = len(tables.up)
    scratch, out = x.new_empty(torch.get_num_threads(), lower, LANES), torch.empty_like(x)
    maps = (tables.parent, tables.last, tables.weight32, tables.up, tables.lift32)
    sizes = (n, dim, len(tables.parent), lower, columns)
    call("poly/features", "poly_features_backward", {}, grad, x, *maps, scratch, out, *sizes)
    return out


def _check(x: Tensor, degree: int, name: str) -> int:
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating x [n, d, c], got {tuple(x.shape)} of {x.dtype}")
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
        raise ValueError(f"{name}: expected a whole degree >= 0, got {degree!r}")
    features = feature_count(x.shape[1], degree)
    if features > MAX_FEATURES:
        raise ValueError(
            f"{name}: degree {degree} of {x.shape[1]} variables has {features:,} features, more than "
            f"{MAX_FEATURES:,}; take a lower degree"
        )
    return x.shape[1]
