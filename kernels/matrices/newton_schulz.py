"""Polar factors and nuclear norms of lists of matrices by Newton-Schulz iterations."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep.kernels._backend import choose, requested_backend
from leanstep.kernels.matrices.newton_schulz_batched import (
    GROWTH,
    TORCH_PRODUCTS,
    Products,
    Scratch,
    iterate,
    jobs_of,
    norms_of,
    nuclear_norms,
    operations,
    plan,
    scaled,
    singles_of,
)
from leanstep.kernels.reference.matrices import newton_schulz as reference
from leanstep.kernels.reference.matrices.newton_schulz import COEFFICIENTS, Triple

METHODS = ("auto", "standard", "gram")
ESTIMATORS = ("polar", "svd", "frobenius")


def newton_schulz(
    matrices: Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "jordan",
    method: str = "auto",
    dtype: torch.dtype | None = None,
    eps: float = 0.0,
) -> list[Tensor]:
    """Approximate polar factors: for M = U S V^T, close to U V^T.

    With X = M / max(||M||_F, eps), each step is ``X <- a X + (b A + c A^2) X``, A = X X^T on the smaller side. How
    close the singular values come to 1 depends on the coefficients: with "jordan", those above 0.2 % of the
    Frobenius norm end between 0.68 and 1.21; "polar_express" and the classic ones converge to 1. Directions in which M
    is zero stay zero, and so does a matrix of zeros. The scale of M does not change the result, unless ``eps`` is set.

    Args:
        matrices: [m, n] or stacks [..., m, n] of one device, of any sizes, strides and floating dtypes; never written.
        steps: number of steps, 0 or more (0: only the division by the norm).
        coefficients: a name in :data:`COEFFICIENTS`, or the triples (a, b, c) of the steps, of which the last one is
            repeated.
        method: "standard" iterates on X. "gram" carries A from step to step, in products of the smaller side only, and
            meets X at the end of a few steps: cheaper for matrices that are not nearly square. "auto": whichever has
            fewer operations (:func:`flops`); the definition, in float64 or on request, is "standard".
        dtype: what products are computed in, and the dtype of the result. None: fp64 for fp64 matrices; else bf16 on
            GPUs that have it and on CPUs that multiply it (AMX, AVX512-BF16), and fp32 on all others.
        eps: smallest norm to divide by; not negative. Matrices of a smaller norm come out smaller in proportion; Muon
            has 1e-7. With 0 the limit is 1e-38 (1e-300 for fp64 matrices).

    Returns:
        One tensor per matrix, of its shape, contiguous. A matrix with a non-finite entry gives NaN. Results of
        matrices of one shape may be parts of one buffer.

    Raises:
        ValueError: for an unknown name, a negative ``steps`` or ``eps``, or a tensor of fewer than two dimensions.
        TypeError: for a tensor that is not of a floating dtype.
        BackendError: the requested backend cannot run here.

    Notes:
        Memory: the results; for the matrices of one batch, up to three copies and five Gram matrices. The inputs are
        never written (torch 2.13's Muon divides a bf16 momentum in place if Nesterov is off).
        Matrices of one shape are multiplied in batches: on a CPU small ones, and as many large ones as there are
        threads. On a GPU with Triton, products with a symmetric result (A, A^2 and all of the Gram form) compute half
        of their tiles and mirror them, with fp32 sums. fp32 products there are torch's and follow
        ``torch.backends.cuda.matmul``.
        Both forms compute the same polynomial. For random matrices they differ by 1e-5 of the result in fp32; in bf16
        they differ from fp64 by about the same amount.

    References:
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); Amsel et al., "The Polar
        Express", arXiv 2505.16932.
    """
    triples = _triples(coefficients, steps)
    _check(matrices, method, "newton_schulz")
    if eps < 0:
        raise ValueError(f"newton_schulz: expected eps >= 0, got {eps}")
    if not matrices:
        return []
    flat = [number for triple in triples for number in triple]
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.newton_schulz(list(matrices), flat, method, dtype, eps)
    return _run(list(matrices), flat, method, dtype, eps)


def nuclear_norm(
    matrices: Sequence[Tensor],
    *,
    estimator: str = "polar",
    steps: int = 3,
    coefficients: str | Sequence[Triple] = "nuclear",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sums of the singular values, exactly or estimated.

    Args:
        matrices: [m, n] or stacks [..., m, n] of one device, of any sizes, strides and floating dtypes; never written.
        estimator: "polar": <M, P(M)>_F with P the Newton-Schulz iteration, which is sum(s p(s)) for the polynomial p
            that approximates 1. "svd": exact, and slow. "frobenius": ||M||_F, a lower bound by a factor between 1
            and sqrt(rank).
        steps, coefficients, dtype: as for :func:`newton_schulz`, of "polar".

    Returns:
        fp32 (fp64 for fp64 matrices), 1-D: one entry per matrix, in order; a stack has one for each of its matrices.
        NaN for a matrix with a non-finite entry, 0 for one without entries.

    Raises:
        ValueError, TypeError, BackendError: as for :func:`newton_schulz`.

    Notes:
        With A the Gram matrix of X on the smaller side, <X, P(X)> = tr(A q(A)). In fp32 no product after A has X's
        size; in bf16 the Gram form starts again from X as in :func:`newton_schulz`. "polar" divides A by ||A||_F: the
        largest singular value is then at most 1 and close to it, so that three steps suffice. After division by
        ||X||_F it takes five.
        The polynomial biases the estimate, by about the same factor for matrices of similar spectra. By default,
        singular values above 1.5 % of ||A||_F^0.5 count by a factor between 0.83 and 1.16, smaller ones by less. The
        estimate is right to 1 % for Gaussian matrices, and off by -16 to +1 % for low-rank, power-law and exponential
        spectra of 512 rows. With coefficients="polar_express" and steps=5 it is off by -9 to +3 %, at nearly twice the
        cost (benchmarks/newton_schulz.py prints the table).
        Homogeneous: nuclear_norm(c M) = |c| nuclear_norm(M), for any size of the entries.
    """
    triples = _triples(coefficients, steps)
    _check(matrices, "auto", "nuclear_norm")
    if estimator not in ESTIMATORS:
        raise ValueError(f"nuclear_norm: expected estimator in {ESTIMATORS}, got {estimator!r}")
    if not matrices:
        return torch.zeros(0)
    flat = [number for triple in triples for number in triple]
    if torch.compiler.is_compiling():
        return torch.ops.leanstep.nuclear_norm(list(matrices), estimator, flat, dtype)
    return _run_nuclear(list(matrices), estimator, flat, dtype)


def flops(
    shape: Sequence[int],
    steps: int = 5,
    method: str = "auto",
    *,
    coefficients: str | Sequence[Triple] = "jordan",
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Multiplications and additions in the products of :func:`newton_schulz` on one tensor; all entries counted.

    With m <= n the sides, a step is ``4 m^2 n + 2 m^3`` in the standard form. A run of k steps of the Gram form is
    ``4 m^2 n + (8 k - 6) m^3``; how many steps make a run depends on the coefficients and on ``dtype``.

    Raises:
        ValueError: as for :func:`newton_schulz`.
    """
    if method not in METHODS:
        raise ValueError(f"flops: expected method in {METHODS}, got {method!r}")
    triples = _triples(coefficients, steps)
    m, n = shape[-2:]
    return torch.Size(shape[:-2]).numel() * operations(m, n, plan(triples, dtype, method, m, n))


def _triples(coefficients: str | Sequence[Triple], steps: int) -> list[Triple]:
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"Newton-Schulz: expected coefficients in {sorted(COEFFICIENTS)}, got {coefficients!r}")
        coefficients = COEFFICIENTS[coefficients]
    table = [(float(a), float(b), float(c)) for a, b, c in coefficients]
    if steps < 0 or not table:
        raise ValueError(f"Newton-Schulz: expected steps >= 0 and at least one triple, got {steps} and {len(table)}")
    return (table + [table[-1]] * max(0, steps - len(table)))[:steps]


def _check(matrices: Sequence[Tensor], method: str, op: str) -> None:
    if method not in METHODS:
        raise ValueError(f"{op}: expected method in {METHODS}, got {method!r}")
    for i, mat in enumerate(matrices):
        if mat.dim() < 2:
            raise ValueError(f"{op}: expected matrices [..., m, n], got shape {tuple(mat.shape)} at {i}")
        if not mat.is_floating_point():
            raise TypeError(f"{op}: expected floating-point matrices, got {mat.dtype} at {i}")


def compute_dtype(dtype: torch.dtype | None, mat: Tensor) -> torch.dtype:
    """What ``dtype`` means for a matrix: see :func:`newton_schulz`."""
    if dtype is not None:
        if dtype not in GROWTH:
            raise ValueError(f"Newton-Schulz: expected dtype in {[str(d) for d in GROWTH]}, got {dtype}")
        return dtype
    if mat.dtype == torch.float64:
        return torch.float64
    if mat.device.type == "cpu":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    if mat.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if mat.device.type == "xpu" else torch.float32


@functools.cache
def _multiplies_bf16() -> bool:
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def _products(backend: str, dtype: torch.dtype) -> Products:
    if backend == "triton" and dtype in (torch.bfloat16, torch.float16):
        from leanstep.kernels.triton_impl.matrices import newton_schulz as triton_newton_schulz

        return Products(triton_newton_schulz.gram, triton_newton_schulz.multiply, triton_newton_schulz.add_product)
    return TORCH_PRODUCTS


@torch.no_grad()
def _run(
    matrices: list[Tensor], coefficients: list[float], method: str, dtype: torch.dtype | None, eps: float
) -> list[Tensor]:
    triples = _regrouped(coefficients)
    compute = compute_dtype(dtype, matrices[0])
    backend = choose("newton_schulz", matrices[0].device, compute).backend
    if _wants_definition(compute) and method != "gram":
        return [_definition(mat, triples, eps, compute) for mat in matrices]
    singles = singles_of(matrices)
    factors = [torch.empty(0) for _ in singles]
    norms = norms_of(singles, compute)
    products, scratch = _products(backend, compute), Scratch(compute, matrices[0].device)
    for job in jobs_of(singles):
        out = torch.empty(job.shape(), dtype=compute, device=matrices[0].device)
        if triples:
            x = scaled(singles, norms, job, eps, scratch.take("x", job.shape()))
            iterate(x, triples, plan(triples, compute, method, job.m, job.n), products, scratch, out)
        else:
            scaled(singles, norms, job, eps, out)
        for i, factor in zip(job.indices, out.view(-1, job.m, job.n), strict=True):
            factors[i] = factor
    return _as_given(matrices, factors, compute)


def _wants_definition(compute: torch.dtype) -> bool:
    """True in float64 and on request; otherwise plain torch takes matrices of one shape in batches, too."""
    return compute == torch.float64 or requested_backend() == "reference"


def _definition(mat: Tensor, triples: Sequence[Triple], eps: float, dtype: torch.dtype) -> Tensor:
    batch = mat.reshape(-1, *mat.shape[-2:]) if mat.numel() else mat.new_zeros(0, 1, 1)
    return reference.newton_schulz(batch, triples, eps, dtype).reshape(mat.shape).contiguous()


def _as_given(matrices: Sequence[Tensor], factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """One result per tensor of the caller: the results of single matrices, stacked for a stack."""
    results, position = [], 0
    for mat in matrices:
        count = mat.shape[:-2].numel()
        results_of_stack = factors[position : position + count]
        position += count
        if mat.numel() == 0:
            results.append(torch.empty(mat.shape, dtype=dtype, device=mat.device))
        else:
            results.append(
                results_of_stack[0] if mat.dim() == 2 else torch.stack(list(results_of_stack)).view(mat.shape)
            )
    return results


@torch.no_grad()
def _run_nuclear(
    matrices: list[Tensor], estimator: str, coefficients: list[float], dtype: torch.dtype | None
) -> Tensor:
    triples = _regrouped(coefficients)
    compute = compute_dtype(dtype, matrices[0])
    backend = choose("nuclear_norm", matrices[0].device, compute).backend
    singles = singles_of(matrices)
    wide = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    values = [torch.zeros((), dtype=wide, device=matrices[0].device)] * len(singles)
    filled = [i for i, mat in enumerate(singles) if mat.numel()]
    if estimator == "svd":
        for i in filled:
            values[i] = _sum_of_singular_values(singles[i]).to(wide)
    elif estimator == "polar" and _wants_definition(compute):
        for i in filled:
            values[i] = reference.nuclear_norm(singles[i].unsqueeze(0), triples, compute)[0].to(wide)
    elif estimator == "frobenius":
        for i, norm in enumerate(norms_of(singles, compute)):
            # a Python float would become fp32, whatever its size
            values[i] = norm.to(wide) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=wide)
    else:
        products, scratch = _products(backend, compute), Scratch(compute, matrices[0].device)
        for job in jobs_of(singles):
            estimates = nuclear_norms([singles[i] for i in job.indices], triples, products, scratch, compute)
            for i, value in zip(job.indices, estimates, strict=True):
                values[i] = value.to(wide)
    return torch.stack(values) if values else torch.zeros(0, dtype=wide, device=matrices[0].device)


def _sum_of_singular_values(mat: Tensor) -> Tensor:
    wide = reference.widen(mat)
    # LAPACK refuses what is not finite: NaN is added afterwards
    return torch.linalg.svdvals(torch.nan_to_num(wide)).sum() + (wide - wide).sum()


def _regrouped(coefficients: list[float]) -> list[Triple]:
    numbers = iter(coefficients)
    return list(zip(numbers, numbers, numbers, strict=True))


def _op(
    matrices: list[Tensor], coefficients: list[float], method: str, dtype: torch.dtype | None, eps: float
) -> list[Tensor]:
    results = _run(matrices, coefficients, method, dtype, eps)
    # an operator's results may not share memory, as those of one batch do
    storages = [result.untyped_storage().data_ptr() for result in results]
    return [
        result.clone() if storage in storages[:i] else result
        for i, (result, storage) in enumerate(zip(results, storages, strict=True))
    ]


_newton_schulz_op = torch.library.custom_op("leanstep::newton_schulz", _op, mutates_args=())
_nuclear_norm_op = torch.library.custom_op("leanstep::nuclear_norm", _run_nuclear, mutates_args=())


@_newton_schulz_op.register_fake
def _(matrices, coefficients, method, dtype, eps):
    compute = compute_dtype(dtype, matrices[0])
    return [mat.new_empty(mat.shape, dtype=compute) for mat in matrices]


@_nuclear_norm_op.register_fake
def _(matrices, estimator, coefficients, dtype):
    wide = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
    return matrices[0].new_empty(sum(mat.shape[:-2].numel() for mat in matrices), dtype=wide)
