"""Newton-Schulz on batches of matrices of one shape, in the standard form and in the Gram form.

The public functions in ``leanstep.kernels.matrices.newton_schulz`` check arguments, choose a backend and collect the
results. This module plans and runs the products, and reuses their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.reference.matrices import newton_schulz as reference
from leanstep.kernels.reference.matrices.newton_schulz import Triple

# The Gram form updates A = X X^T from step to step. Each step multiplies A's rounding errors by the square of its slope
# a. When the product of the slopes exceeds this limit, the form computes A from X again. The limit of bf16 allows two
# steps with low slopes (Jordan's, and the later ones of other tables), with the errors of the standard form. After
# three steps, a singular value far above the others may leave the interval of convergence; after five, all digits may
# be lost.
GROWTH = {torch.bfloat16: 3.5, torch.float16: 10.0, torch.float32: 150.0, torch.float64: 1e4}

# smallest norms with a finite inverse, by the dtype in which matrices are scaled
_SMALLEST_NORM = {torch.float32: 1e-38, torch.float64: 1e-300}

# Elements of a batch. On a CPU, batches of small matrices save calls. A batch of larger matrices has one per thread,
# because a bf16 product of a few hundred rows uses only one thread. A product of a few thousand rows uses all.
_CPU_SMALL, _CPU_CHUNK = 1 << 16, 1 << 24
_GPU_CHUNK = 1 << 25
_GPU_MATRICES = 65535  # most programs along the second dimension of a launch, one for each matrix


def lengths_of_runs(triples: Sequence[Triple], dtype: torch.dtype) -> list[int]:
    """Return the lengths of the Gram form's runs of steps; each run starts from X."""
    runs: list[int] = []
    slope = 1.0
    for a, _, _ in triples:
        if not runs or slope > GROWTH[dtype]:
            runs.append(0)
            slope = 1.0
        runs[-1] += 1
        slope *= a
    return runs


def operations(m: int, n: int, runs: Sequence[int]) -> int:
    """Count the multiplications and additions in the products of these runs on one matrix."""
    small, large = sorted((m, n))
    return sum(4 * small**2 * large + (8 * run - 6) * small**3 for run in runs)


def plan(triples: Sequence[Triple], dtype: torch.dtype, method: str, m: int, n: int) -> list[int]:
    """Return the lengths of the runs for matrices [m, n]; runs of one step are the standard form."""
    forms = {"standard": [1] * len(triples), "gram": lengths_of_runs(triples, dtype)}
    if method == "auto":
        return min(forms.values(), key=lambda runs: operations(m, n, runs))
    return forms[method]


class Products(NamedTuple):
    """A backend's products of batches with symmetric results, written to ``out``."""

    gram: Callable[[Tensor, Tensor], Tensor]  # (x, out): x x^T
    multiply: Callable[[Tensor, Tensor, Tensor], Tensor]  # (left, right, out), of symmetric matrices that commute
    # (base, left, right, beta, alpha, out): beta base + alpha left right, of symmetric matrices that commute
    add: Callable[[Tensor, Tensor, Tensor, float, float, Tensor], Tensor]


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left right, of batches or of single matrices, to ``out``."""
    return torch.mm(left, right, out=out) if out.dim() == 2 else torch.bmm(left, right, out=out)


def add_product(base: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, out: Tensor) -> Tensor:
    """Write beta base + alpha left right, of batches or of single matrices, to ``out``."""
    add = torch.addmm if out.dim() == 2 else torch.baddbmm
    return add(base, left, right, beta=beta, alpha=alpha, out=out)


# torch computes every entry: no BLAS has a batched product that fills one triangle, and blocks of half the work gain
# nothing on matrices of a few hundred rows
TORCH_PRODUCTS = Products(lambda x, out: multiply(x, x.mT, out), multiply, add_product)


class Scratch:
    """Named buffers, reused because fresh memory would cost as much as a product. They grow to the largest size."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, torch.Size], Tensor] = {}
        self._dtype, self._device = dtype, device

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return the buffer of this name, in this shape."""
        view = self._views.get((name, shape))
        if view is None:
            size = shape.numel()
            if name not in self._buffers or self._buffers[name].numel() < size:
                self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
                self._views = {key: view for key, view in self._views.items() if key[0] != name}
            view = self._views[name, shape] = self._buffers[name][:size].view(shape)
        return view

    def others(self, shape: torch.Size, taken: Tensor | None) -> list[Tensor]:
        """Return three buffers of this shape other than ``taken``."""
        return [t for name in ("0", "1", "2", "3") if (t := self.take(name, shape)) is not taken][:3]


class Job(NamedTuple):
    """A batch of matrices of one shape: their indices in the list of all matrices, and their size."""

    indices: list[int]
    m: int
    n: int

    def shape(self) -> torch.Size:
        """Shape of the batch. A single matrix has no batch dimension, which saves calls on a CPU."""
        return torch.Size((self.m, self.n) if len(self.indices) == 1 else (len(self.indices), self.m, self.n))


def gram_shape(shape: torch.Size) -> torch.Size:
    """Shape of the Gram matrices on the smaller side."""
    small = min(shape[-2:])
    return torch.Size((*shape[:-2], small, small))


def jobs_of(singles: Sequence[Tensor]) -> Iterator[Job]:
    """Yield batches of matrices [m, n] of one shape; skip matrices without entries."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, mat in enumerate(singles):
        if mat.numel():
            by_shape.setdefault((mat.shape[0], mat.shape[1]), []).append(i)
    for (m, n), indices in by_shape.items():
        if singles[0].device.type == "cpu":
            count = max(_CPU_SMALL // (m * n), min(torch.get_num_threads(), _CPU_CHUNK // (m * n)), 1)
        else:
            count = min(max(_GPU_CHUNK // (m * n), 1), _GPU_MATRICES)
        for start in range(0, len(indices), count):
            yield Job(indices[start : start + count], m, n)


def singles_of(matrices: Sequence[Tensor]) -> list[Tensor]:
    """List all matrices [m, n], with stacks split into theirs."""
    return [one for mat in matrices for one in (mat.reshape(-1, *mat.shape[-2:]).unbind() if mat.dim() > 2 else [mat])]


def norms_of(singles: Sequence[Tensor], compute: torch.dtype) -> list[float] | list[Tensor]:
    """Frobenius norms: Python numbers on a CPU; fp64 tensors on other devices (fp32 on MPS), so that nothing waits.

    A CPU sums squares in fp32, which is five times as fast as fp64, unless they might leave its range. Entries of fp64
    matrices are scaled before they are squared.
    """
    if singles and singles[0].device.type != "cpu":
        if any(mat.dtype == torch.float64 for mat in singles):
            return [reference.frobenius(mat.double().unsqueeze(0)).view(()) for mat in singles]
        wide = torch.float32 if singles[0].device.type == "mps" else torch.float64
        return list(torch._foreach_norm(list(singles), 2, dtype=wide))
    norms = []
    for mat in singles:
        if mat.dtype == torch.float64:
            norms.append(reference.frobenius(mat.unsqueeze(0)).item())
            continue
        wide = torch.float64 if compute == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(mat, dtype=wide).item()
        if not 1e-15 < norm < 1e18:
            norm = torch.linalg.vector_norm(mat, dtype=torch.float64).item()
        norms.append(norm)
    return norms


def scales_of(singles: Sequence[Tensor], norms: Sequence[float | Tensor], eps: float) -> Sequence[float | Tensor]:
    """1 / max(norm, eps) of each matrix, NaN for one that is not finite; tensors where the norms are tensors."""
    wide = torch.float64 if torch.float64 in [mat.dtype for mat in singles] else torch.float32
    floor = max(eps, _SMALLEST_NORM[wide])
    on_device = [norm for norm in norms if isinstance(norm, Tensor)]
    if not on_device:
        return [1.0 / max(norm, floor) if norm < float("inf") else float("nan") for norm in norms]
    sizes = torch.stack(on_device)
    scales = sizes.clamp(min=floor).reciprocal().masked_fill_(sizes == float("inf"), float("nan"))
    return scales.to(wide).unbind()


def scaled(singles: Sequence[Tensor], scales: Sequence[float | Tensor], job: Job, out: Tensor) -> Tensor:
    """Multiply each matrix of a job by its scale, into ``out``."""
    targets = out.unbind() if out.dim() == 3 else [out]
    on_device = [scale for i in job.indices if isinstance(scale := scales[i], Tensor)]
    if on_device:
        mats = [singles[i] for i in job.indices]
        if out.dim() == 2:
            return torch.mul(reference.widen(mats[0]), on_device[0], out=out)
        return torch.mul(reference.widen(torch.stack(mats)), torch.stack(on_device).view(-1, 1, 1), out=out)
    for i, target in zip(job.indices, targets, strict=True):
        scale, mat = scales[i], singles[i]
        if mat.dtype == target.dtype:
            torch.mul(mat, scale, out=target)
        elif target.dtype == torch.float16 or mat.dtype == torch.float64:
            torch.mul(reference.widen(mat), scale, out=target)  # unscaled entries may not fit the target's dtype
        else:
            target.copy_(mat).mul_(scale)  # faster than one torch.mul with two dtypes
    return out


def iterate(
    x: Tensor,
    triples: Sequence[Triple],
    runs: Sequence[int],
    products: Products,
    scratch: Scratch,
    out: Tensor,
    gram: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Run the steps on normalised matrices [B, m, n] or [m, n], into ``out``; ``x`` is not written.

    ``gram``: the Gram matrices of the normalised matrices, if the caller has them; overwritten. ``scale``: a factor
    [B, 1, 1] or [1, 1] that normalises ``x``, if the caller has not applied it.
    """
    tall = x.shape[-2] > x.shape[-1]
    shape = gram_shape(x.shape)
    remaining = iter(triples)
    for number, length in enumerate(runs):
        last = number == len(runs) - 1
        result = out if last else scratch.take(f"x{number % 2}", x.shape)
        if gram is None or number:
            gram = products.gram(x.mT if tall else x, scratch.take("gram", shape))
        factor, slope = _run_of_steps(gram, [next(remaining) for _ in range(length)], tall, products, scratch)
        if scale is not None and number == 0:
            if length == 1:
                x = torch.mul(x, scale, out=scratch.take("x1", x.shape))
            else:
                factor.mul_(scale)
        left, right = (x, factor) if tall else (factor, x)
        x = add_product(x, left, right, slope, 1.0, result) if length == 1 else multiply(left, right, result)
    return x


def _run_of_steps(
    gram: Tensor, triples: Sequence[Triple], tall: bool, products: Products, scratch: Scratch
) -> tuple[Tensor, float]:
    """Return (Q, slope) such that the steps map X to slope X + Q X (X Q if tall). Overwrites ``gram``, their A.

    With q = a I + b A + c A^2, a step maps A to q A q and Q to q Q. Both use the same rounded q, so A stays the Gram
    matrix of Q X. A single step leaves a X to the caller, which is more exact than a rounded diagonal.
    """
    total: Tensor | None = None
    for number, (a, b, c) in enumerate(triples):
        first, second, *_ = scratch.others(gram.shape, total)
        q = products.add(gram, gram, gram, b, c, first)
        if len(triples) == 1:
            return q, a
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        if number < len(triples) - 1:
            products.multiply(q, products.multiply(gram, q, second), gram)
        if total is None:
            total = q
        else:
            # rounded factors do not commute exactly: the later factor must be on the side away from X
            left, right = (total, q) if tall else (q, total)
            total = products.multiply(left, right, second)
    assert total is not None
    return total, 0.0


def _trace_of_polar(gram: Tensor, triples: Sequence[Triple], products: Products, scratch: Scratch) -> Tensor:
    """tr(A Q) for Q X the iterate that the steps make of X, as [B]; writes over ``gram``, which is A = X X^T.

    Y = A Q is carried along. The last step needs no product of its own: tr(q Y) = a tr Y + <A, b Y + c A Y>.
    """
    y = gram
    for a, b, c in triples[:-1]:
        first, second, third = scratch.others(gram.shape, y)
        q = products.add(gram, gram, gram, b, c, first)
        half = products.add(gram, gram, q, a, 1.0, second)
        y = half if y is gram else products.add(y, q, y, a, 1.0, third)
        products.add(half, half, q, a, 1.0, gram)
    trace = y.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide_of(gram))
    if not triples:
        return trace
    a, b, c = triples[-1]
    first, second, _ = scratch.others(gram.shape, y)
    return a * trace + _inner(gram, products.add(y, gram, y, b, c, first), second)


def _inner(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """<X, Y> of every matrix, as [B]. Overwrites ``out``."""
    # rows are summed in their own dtype, because another one copies all entries; their rounding errors average out
    return torch.mul(x, y, out=out).sum(-1).view(-1, x.shape[-2]).sum(-1, dtype=wide_of(x))


def wide_of(x: Tensor) -> torch.dtype:
    """The dtype of sums: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def nuclear_norms(
    mats: list[Tensor], triples: Sequence[Triple], products: Products, scratch: Scratch, compute: torch.dtype
) -> Tensor:
    """Estimates for matrices of one shape, [B]."""
    job = Job(list(range(len(mats))), *mats[0].shape)
    if mats[0].device.type == "cpu" and compute in (torch.bfloat16, torch.float32):
        estimates = _estimate(_in_compute_dtype(mats, job, scratch, compute), triples, products, scratch, ordinary=True)
        if estimates is not None:
            return estimates
    norms = norms_of(mats, compute)
    x = scaled(mats, scales_of(mats, norms, 0.0), job, scratch.take("x", job.shape()))
    estimates = _estimate(x, triples, products, scratch)
    assert estimates is not None
    sizes = [
        norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64, device="cpu") for norm in norms
    ]
    return estimates * torch.stack(sizes)


def _in_compute_dtype(mats: list[Tensor], job: Job, scratch: Scratch, compute: torch.dtype) -> Tensor:
    """The matrices of a job in dtype ``compute``. Do not write to them."""
    if len(mats) == 1 and mats[0].dtype == compute:
        return mats[0]
    x = scratch.take("x", job.shape())
    for mat, target in zip(mats, x.unbind() if x.dim() == 3 else [x], strict=True):
        target.copy_(mat)
    return x


def _estimate(
    x: Tensor, triples: Sequence[Triple], products: Products, scratch: Scratch, ordinary: bool = False
) -> Tensor | None:
    """<X, P(X)> of matrices [B, m, n] or [m, n], as [B]; ``x`` is not written.

    With ``ordinary``, return None if the entries of a matrix are so large or small that squaring needs scaling first.
    """
    tall = x.shape[-2] > x.shape[-1]
    gram = products.gram(x.mT if tall else x, scratch.take("gram", gram_shape(x.shape)))
    # The Frobenius norm of A is the square of the singular values' 4-norm. On a CPU, norms of a list are five times as
    # fast as norms along dimensions of a batch.
    grams = list(gram.unbind()) if gram.dim() == 3 else [gram]
    sizes = torch.stack(torch._foreach_norm(grams, 2, dtype=wide_of(x)))
    if ordinary and not all(1e-12 < size < 1e12 for size in sizes.tolist()):
        return None
    squares = sizes.view(-1, 1, 1) if gram.dim() == 3 else sizes.view(1, 1)
    inverse = squares.reciprocal().masked_fill_(squares == 0, 0.0)
    # in the matrices' dtype, because products of two dtypes are slow
    scale = inverse.to(x.dtype)
    gram.mul_(scale)
    if len(lengths_of_runs(triples, x.dtype)) <= 1:
        # divided by the rounded scale, not the exact one
        used = scale.to(wide_of(x)).sqrt().flatten()
        trace = _trace_of_polar(gram, triples, products, scratch)
        return (trace / used).masked_fill_(used == 0, 0.0)
    polar = scratch.take("polar", x.shape)
    runs = plan(triples, x.dtype, "auto", *x.shape[-2:])
    iterate(x, triples, runs, products, scratch, polar, gram, inverse.sqrt().to(x.dtype))
    return _inner(x, polar, polar)
