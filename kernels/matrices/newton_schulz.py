"""Polar factors and nuclear norms of lists of matrices by Newton-Schulz iterations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leanstep._torch import uses_instructions
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
    scales_of,
    singles_of,
)
from leanstep.kernels.op import PRODUCTS, op, triton_module
from leanstep.kernels.reference.matrices import newton_schulz as reference
from leanstep.kernels.reference.matrices import nuclear_sketch
from leanstep.kernels.reference.matrices.newton_schulz import COEFFICIENTS, Triple

METHODS = ("auto", "standard", "gram")
ESTIMATORS = ("auto", "sketch", "polar", "svd", "frobenius")


def newton_schulz(
    matrices: Sequence[Tensor],
    *,
    steps: int = 5,
    coefficients: str | Sequence[Triple] = "jordan",
    method: str = "auto",
    dtype: torch.dtype | None = None,
    eps: float = 0.0,
) -> list[Tensor]:
    """Approximate the polar factor U V^T of every matrix M = U S V^T.

    From X = M / max(||M||_F, eps), each step is ``X <- a X + (b A + c A^2) X``, A = X X^T on the smaller side. The
    coefficients decide how close the singular values come to 1. With "jordan", those above 0.2 % of the Frobenius norm
    end between 0.68 and 1.21. With "polar_express" and the classic ones, they converge to 1. Singular values of zero
    stay zero. The scale of M does not change the result unless ``eps`` is set.

    Args:
        matrices: [m, n] or stacks [..., m, n] of one device, of any sizes, strides and floating dtypes; never written.
        steps: number of steps, 0 or more (0: only the division by the norm).
        coefficients: a name in :data:`COEFFICIENTS`, or the steps' triples (a, b, c). The last triple is repeated.
        method: "standard" iterates on X. "gram" iterates on A, with products of the smaller side only, and multiplies X
            after a few steps; it is cheaper unless matrices are nearly square. "auto" uses the method with fewer
            operations (:func:`flops`). In float64 and on the backend "reference", "auto" is "standard".
        dtype: dtype of the products and the result. None: fp64 if a matrix is in fp64. Otherwise bf16 on GPUs that have
            it and on CPUs that multiply it (AMX, AVX512-BF16), and fp32 elsewhere.
        eps: smallest norm to divide by, >= 0. Results of matrices with a smaller norm shrink in proportion. Muon uses
            1e-7. With 0, the limit is 1e-38 (1e-300 for fp64 matrices).

    Returns:
        One contiguous tensor per matrix, of its shape. A matrix with a non-finite entry gives NaN. Results of matrices
        of one shape may share a buffer.

    Raises:
        ValueError: for an unknown name, a negative ``steps`` or ``eps``, or a tensor of fewer than two dimensions.
        TypeError: for a tensor that is not of a floating dtype.
        BackendError: the requested backend cannot run here.

    Notes:
        Memory: the results and, for one batch, up to three copies and five Gram matrices.
        Matrices of one shape are multiplied in batches: on a CPU many small ones, or one large one per thread. On a GPU
        with Triton, 16-bit products with a symmetric result (A, A^2 and all of "gram") compute half of their tiles and
        mirror them, with fp32 sums. fp32 products are torch's and follow ``torch.backends.cuda.matmul``.
        Both methods compute the same polynomial. For random matrices in fp32, the results differ by 1e-5 of their size;
        in bf16, both have about the same error.

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
        return _op(list(matrices), flat, method, dtype, eps)
    return _run(list(matrices), flat, method, dtype, eps)


def nuclear_norm(
    matrices: Sequence[Tensor],
    *,
    estimator: str = "polar",
    steps: int = 3,
    coefficients: str | Sequence[Triple] = "nuclear",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the sum of the singular values of every matrix, exactly or by an estimate.

    Args:
        matrices: [m, n] or stacks [..., m, n] of one device, of any sizes, strides and floating dtypes; never written.
        estimator: "sketch": from the eigenvalues of a Gram matrix. If the smaller side is above 256, of a sketch of
            half its rows, by which it extrapolates. "polar": <M, P(M)>_F with Newton-Schulz's approximate polar factor
            P(M). "svd": exact and slow. "frobenius": ||M||_F, which is too small by a factor between 1 and sqrt(rank).
            "auto": "sketch" on a CPU, "polar" elsewhere, where eigenvalues are slow.
        steps, coefficients, dtype: as for :func:`newton_schulz`; "polar" reads them.

    Returns:
        fp32 (fp64 if a matrix is in fp64), 1-D: one entry per matrix, in order, and one per matrix of a stack. NaN for
        a matrix with a non-finite entry, 0 for a matrix without entries.

    Raises:
        ValueError, TypeError, BackendError: as for :func:`newton_schulz`.

    Notes:
        With the Gram matrix A of X on the smaller side, <X, P(X)> = tr(A q(A)) for a polynomial q. In fp32 no product
        after A has X's size. In bf16 the iteration returns to X after a few steps, as in :func:`newton_schulz`. "polar"
        divides A by ||A||_F, so the largest singular value is at most 1 and close to it, and three steps suffice. After
        division by ||X||_F, it would need five.
        The polynomial biases the estimate, by about the same factor for matrices of similar spectra. By default it
        multiplies singular values above 1.5 % of ||A||_F^0.5 by 0.83 to 1.16, and smaller ones by less. The error is
        1 % for Gaussian matrices, and -16 to +1 % for low-rank, power-law and exponential spectra of 512 rows. With
        coefficients="polar_express" and steps=5, it is -9 to +3 % at nearly twice the cost
        (benchmarks/optimizers/newton_schulz.py prints the table). Differences of gradients have spectra that fall
        faster: on SmolLM2, "polar" is too small by 7 % on average and by up to 44 %, "sketch" by 1 % and up to 3 %
        (docs/measured/optimizers.md).
        "sketch" computes in fp32 (fp64 for fp64 matrices), in a quarter of the time of "polar" for matrices of 512
        rows. Up to 256 rows its error is that of squaring: a few 1e-4.
        Homogeneous: nuclear_norm(c M) = |c| nuclear_norm(M), for entries of any size.
    """
    triples = _triples(coefficients, steps)
    _check(matrices, "auto", "nuclear_norm")
    if estimator not in ESTIMATORS:
        raise ValueError(f"nuclear_norm: expected estimator in {ESTIMATORS}, got {estimator!r}")
    if not matrices:
        return torch.zeros(0, dtype=torch.float32, device="cpu")
    flat = [number for triple in triples for number in triple]
    return _run_nuclear(list(matrices), estimator, flat, dtype)


def flops(shape: Sequence[int], steps: int = 5, method: str = "auto") -> int:
    """Count the multiplications and additions in the products of :func:`newton_schulz` on one tensor.

    Assumes bf16 and the coefficients "jordan". For sides m <= n, a step of "standard" takes ``4 m^2 n + 2 m^3``. A run
    of "gram", k steps and one product with X, takes ``4 m^2 n + (8 k - 6) m^3``.

    Raises:
        ValueError: as for :func:`newton_schulz`.
    """
    if method not in METHODS:
        raise ValueError(f"flops: expected method in {METHODS}, got {method!r}")
    m, n = shape[-2:]
    runs = plan(_triples("jordan", steps), torch.bfloat16, method, m, n)
    return torch.Size(shape[:-2]).numel() * operations(m, n, runs)


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


def compute_dtype(dtype: torch.dtype | None, matrices: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of the matrices' products, for the argument ``dtype`` of :func:`newton_schulz`."""
    if dtype is not None:
        if dtype not in GROWTH:
            raise ValueError(f"Newton-Schulz: expected dtype in {[str(d) for d in GROWTH]}, got {dtype}")
        return dtype
    if _sums_dtype(matrices) == torch.float64:
        return torch.float64
    device = matrices[0].device.type
    if device == "cpu":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device == "xpu" else torch.float32


def _sums_dtype(matrices: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in [mat.dtype for mat in matrices] else torch.float32


def _multiplies_bf16() -> bool:
    return uses_instructions("amx_bf16") or uses_instructions("avx512_bf16")


def _products(backend: str, dtype: torch.dtype) -> Products:
    if backend == "triton" and dtype in (torch.bfloat16, torch.float16):
        triton = triton_module(__name__)
        return Products(triton.gram, triton.multiply, triton.add_product)
    return TORCH_PRODUCTS


@torch.no_grad()
def _run(
    matrices: list[Tensor], coefficients: list[float], method: str, dtype: torch.dtype | None, eps: float
) -> list[Tensor]:
    triples = _regrouped(coefficients)
    compute = compute_dtype(dtype, matrices)
    backend = choose("newton_schulz", matrices[0].device, compute).backend
    if _wants_definition(compute) and method != "gram":
        return [_definition(mat, triples, eps, compute) for mat in matrices]
    singles = singles_of(matrices)
    factors = [torch.empty(0, device="cpu") for _ in singles]
    scales = scales_of(singles, norms_of(singles, compute), eps)
    products, scratch = _products(backend, compute), Scratch(compute, matrices[0].device)
    for job in jobs_of(singles):
        out = torch.empty(job.shape(), dtype=compute, device=matrices[0].device)
        if triples:
            x = scaled(singles, scales, job, scratch.take("x", job.shape()))
            iterate(x, triples, plan(triples, compute, method, job.m, job.n), products, scratch, out)
        else:
            scaled(singles, scales, job, out)
        for i, factor in zip(job.indices, out.view(-1, job.m, job.n), strict=True):
            factors[i] = factor
    return _as_given(matrices, factors, compute)


def _wants_definition(compute: torch.dtype) -> bool:
    """Whether to run the definition: in float64 and on request. Otherwise plain torch runs in batches, too."""
    return compute == torch.float64 or requested_backend() == "reference"


def _definition(mat: Tensor, triples: Sequence[Triple], eps: float, dtype: torch.dtype) -> Tensor:
    batch = mat.reshape(-1, *mat.shape[-2:]) if mat.numel() else mat.new_zeros(0, 1, 1)
    return reference.newton_schulz(batch, triples, eps, dtype).reshape(mat.shape).contiguous()


def _as_given(matrices: Sequence[Tensor], factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return one result per tensor of the caller; stack the results of a stack's matrices."""
    results, position = [], 0
    for mat in matrices:
        stack = list(factors[position : position + mat.shape[:-2].numel()])
        position += len(stack)
        if mat.numel() == 0:
            results.append(torch.empty(mat.shape, dtype=dtype, device=mat.device))
        else:
            results.append(stack[0] if mat.dim() == 2 else torch.stack(stack).view(mat.shape))
    return results


def _fake_norms(matrices, estimator, coefficients, dtype):
    count = sum(mat.shape[:-2].numel() for mat in matrices)
    return matrices[0].new_empty(count, dtype=_sums_dtype(matrices))


@op("nuclear_norm", PRODUCTS, fake=_fake_norms)
@torch.no_grad()
def _run_nuclear(
    matrices: list[Tensor], estimator: str, coefficients: list[float], dtype: torch.dtype | None
) -> Tensor:
    triples = _regrouped(coefficients)
    compute = compute_dtype(dtype, matrices)
    backend = choose("nuclear_norm", matrices[0].device, compute).backend
    singles = singles_of(matrices)
    wide = _sums_dtype(matrices)
    if estimator == "auto":
        estimator = "sketch" if matrices[0].device.type == "cpu" else "polar"
    values = [torch.zeros((), dtype=wide, device=matrices[0].device)] * len(singles)
    filled = [i for i, mat in enumerate(singles) if mat.numel()]
    if estimator == "svd":
        for i in filled:
            values[i] = _sum_of_singular_values(singles[i]).to(wide)
    elif estimator == "sketch":
        for job in jobs_of(singles):
            norms = _sketched_norms([singles[i] for i in job.indices])
            for i, value in zip(job.indices, norms, strict=True):
                values[i] = value.to(wide)
    elif estimator == "polar" and _wants_definition(compute):
        for i in filled:
            values[i] = reference.nuclear_norm(singles[i].unsqueeze(0), triples, compute)[0].to(wide)
    elif estimator == "frobenius":
        for i, norm in enumerate(norms_of(singles, compute)):
            # torch.tensor without a dtype would round a Python float to fp32
            values[i] = norm.to(wide) if isinstance(norm, Tensor) else torch.tensor(norm, dtype=wide, device="cpu")
    else:
        products, scratch = _products(backend, compute), Scratch(compute, matrices[0].device)
        for job in jobs_of(singles):
            estimates = nuclear_norms([singles[i] for i in job.indices], triples, products, scratch, compute)
            for i, value in zip(job.indices, estimates.to(wide), strict=True):
                values[i] = value
    return torch.stack(values) if values else torch.zeros(0, dtype=wide, device=matrices[0].device)


def _sketched_norms(mats: list[Tensor]) -> Tensor:
    """Return nuclear norms of matrices of one shape, [B]."""
    batch = reference.widen(mats[0].unsqueeze(0) if len(mats) == 1 else torch.stack(mats))
    if batch.device.type == "cpu" and batch.dtype == torch.float32:
        grams = nuclear_sketch.gram(batch)
        sizes = grams.diagonal(dim1=-2, dim2=-1).sum(-1)
        if all(1e-24 < size < 1e30 for size in sizes.tolist()):  # squaring needs no scaling
            rows = min(batch.shape[-2:])
            return nuclear_sketch.from_gram(grams / sizes.view(-1, 1, 1), rows) * sizes.sqrt()
    return nuclear_sketch.nuclear_norm(batch)


def _sum_of_singular_values(mat: Tensor) -> Tensor:
    wide = reference.widen(mat)
    # LAPACK raises for non-finite entries: remove them here and add NaN to the sum
    return torch.linalg.svdvals(torch.nan_to_num(wide)).sum() + (wide - wide).sum()


def _regrouped(coefficients: list[float]) -> list[Triple]:
    numbers = iter(coefficients)
    return list(zip(numbers, numbers, numbers, strict=True))


def _fake_factors(matrices, coefficients, method, dtype, eps):
    compute = compute_dtype(dtype, matrices)
    return [mat.new_empty(mat.shape, dtype=compute) for mat in matrices]


@op("newton_schulz", PRODUCTS, fake=_fake_factors)
def _op(
    matrices: list[Tensor], coefficients: list[float], method: str, dtype: torch.dtype | None, eps: float
) -> list[Tensor]:
    results = _run(matrices, coefficients, method, dtype, eps)
    # results of one batch share memory, which a registered op does not allow
    storages = [result.untyped_storage().data_ptr() for result in results]
    return [
        result.clone() if storage in storages[:i] else result
        for i, (result, storage) in enumerate(zip(results, storages, strict=True))
    ]
