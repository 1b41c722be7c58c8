"""The operations that have Triton kernels, each on inputs of a given size, dtype and device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from leanstep.kernels import (
    StepOptions,
    bitmask_linear,
    bitmask_pack,
    bitmask_quantize,
    linear_combination,
    lion_agreement,
    lion_agreement_int8,
    lion_step,
    lion_step_int8,
    lora_down,
    lora_down_backward,
    lora_dropout,
    lora_norms,
    lora_scale_,
    lora_scale_backward,
    lora_up_,
    newton_schulz,
    nm_apply,
    nm_compress,
    nm_mask,
    nm_matmul,
    nuclear_norm,
    poly_features,
    poly_features_backward,
    row_dots,
    scaled_step,
    sinkhorn,
    sparse_layout,
    sparse_linear_combination,
    sparse_row_dots,
    swiglu,
    swiglu_backward_,
    top_k,
)
from leanstep.kernels.nm.mask import MAX_FAST_M
from leanstep.kernels.reference.quantization import BLOCK
from leanstep.kernels.steps.adamw_int8 import adamw_step_int8
from leanstep.kernels.steps.average_int8 import average_step_int8

HALF = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALF)
# what a kernel promises of its results
BITS, CLOSE = "bits of the definition", "close to float64"
DROPOUT, RANKS = 0.1, (16, 32)


class Inputs:
    """Random tensors, the same for every instance of one dtype; ``wide``: the same numbers in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype, wide: bool, sizes: SimpleNamespace) -> None:
        self.device, self.dtype, self.wide, self.sizes = device, dtype, wide, sizes
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, rounded to a dtype: by default the one under test."""
        return self.widened(torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype))

    def widened(self, tensor: Tensor) -> Tensor:
        """The tensor, in float64 where that is asked for."""
        return tensor.double() if self.wide else tensor

    def normal_matrices(self) -> list[Tensor]:
        """Matrices of all sizes."""
        return [self.normal(*shape) for shape in self.sizes.matrices]

    def scalars(self, *values: float) -> Tensor:
        """Numbers of a step's rule: fp32, widened."""
        return self.widened(torch.tensor(values, device=self.device))

    def activations(self) -> Tensor:
        """A matrix [tokens, width]."""
        return self.normal(self.sizes.tokens, self.sizes.width)

    def options(self, rounding: str, *scalars: float) -> StepOptions:
        """Options of a step on :meth:`normal_matrices`."""
        seeds = torch.arange(1, 1 + len(self.sizes.matrices), device=self.device) * 0x9E3779B1 % 2**32
        # float64 needs no rounding
        name = "nearest" if self.wide else rounding
        return StepOptions(self.scalars(*scalars), name, seeds=seeds, offsets=torch.zeros_like(seeds))

    def rounding_state(self, params: list[Tensor], rounding: str) -> list[Tensor]:
        """Kahan remainders, masters or split differences of parameters."""
        dtypes = {"kahan": self.dtype, "master": torch.float32, "split": torch.int8}
        if self.wide or rounding not in dtypes:
            return []
        return [(p if rounding == "master" else torch.zeros_like(p)).to(dtypes[rounding]) for p in params]


def _lion(rounding: str, inputs: Inputs) -> list[Tensor]:
    params, grads, momenta = (inputs.normal_matrices() for _ in range(3))
    state = inputs.rounding_state(params, rounding)
    grads[0].view(-1)[0] = float("inf")
    flags = lion_step(params, grads, momenta, state, inputs.options(rounding, 1e-2, 0.999, 0.9, 0.1, 0.99, 0.01))
    return [flags, *params, *momenta, *state]


def _agreement(inputs: Inputs) -> list[Tensor]:
    grads, momenta = inputs.normal_matrices(), inputs.normal_matrices()
    return [lion_agreement(grads, momenta, inputs.options("nearest", 1e-2, 0.999, 0.9, 0.1, 0.99, 0.01))]


def _int8_momenta(inputs: Inputs) -> tuple[list[Tensor], list[Tensor]]:
    generator, device = inputs.generator, inputs.device
    codes = [
        torch.randint(-127, 128, shape, generator=generator, device=device, dtype=torch.int8)
        for shape in inputs.sizes.matrices
    ]
    return codes, [torch.rand(len(c), -(-c.shape[1] // BLOCK), generator=generator, device=device) for c in codes]


def _lion_int8(rounding: str, inputs: Inputs, *, fp8: bool = False) -> list[Tensor]:
    params, grads = inputs.normal_matrices(), inputs.normal_matrices()
    codes, scales = _int8_momenta(inputs)
    if fp8:  # 127 is NaN
        codes = [(code % 127 | code & -128).view(torch.float8_e4m3fn) for code in codes]
    state = inputs.rounding_state(params, rounding)
    options = inputs.options(rounding, 1e-2, 0.999, 0.9, 0.1, 0.99, 0.01)
    grads[0].view(-1)[0] = float("inf")
    flags = lion_step_int8(params, grads, codes, scales, state, options)
    return [flags, *params, *(code.view(torch.int8) for code in codes), *scales, *state]


def _adamw_int8(rounding: str, inputs: Inputs) -> list[Tensor]:
    params, grads = inputs.normal_matrices(), inputs.normal_matrices()
    (codes, scales), (square_codes, square_scales) = _int8_momenta(inputs), _int8_momenta(inputs)
    square_codes = [c.view(torch.uint8) for c in square_codes]
    state = inputs.rounding_state(params, rounding)
    corrections = inputs.scalars(1e-2, 3.0).expand(len(params), 2)
    options = inputs.options(rounding, 0.999, 0.9, 0.1, 0.999, 0.001, 1e-8)
    adamw_step_int8(params, grads, codes, scales, square_codes, square_scales, corrections, state, options)
    return [*params, *codes, *scales, *square_codes, *square_scales, *state]


def _average_int8(nesterov: bool, inputs: Inputs) -> list[Tensor]:
    grads, (codes, scales) = inputs.normal_matrices(), _int8_momenta(inputs)
    options = inputs.options("stochastic", 0.9, 0.1)
    outputs = [torch.empty_like(g, dtype=options.scalars.dtype) for g in grads]
    average_step_int8(grads, codes, scales, outputs, options, nesterov=nesterov)
    return [*codes, *scales, *outputs]


def _agreement_int8(inputs: Inputs) -> list[Tensor]:
    codes, scales = _int8_momenta(inputs)
    options = inputs.options("nearest", 1e-2, 0.999, 0.9, 0.1, 0.99, 0.01)
    return [lion_agreement_int8(inputs.normal_matrices(), codes, scales, options)]


def _sinkhorn(inputs: Inputs) -> list[Tensor]:
    shapes = (*inputs.sizes.balanced, (9, 4104), (3, 5, 8200), (2, 9, 40))
    scales = sinkhorn([inputs.normal(*shape) for shape in shapes], inputs.sizes.iterations)
    return [*scales.rows, *scales.cols]


def _scaled(rounding: str, inputs: Inputs) -> list[Tensor]:
    """Besides matrices, a stack of which one matrix is left alone."""
    params, mats = ([*inputs.normal_matrices(), inputs.normal(3, 40, 24)] for _ in range(2))
    rows = [inputs.normal(*mat.shape[:-1], dtype=torch.float32) for mat in mats]
    cols = [inputs.normal(*mat.shape[:-2], mat.shape[-1], dtype=torch.float32) for mat in mats]
    cols[-1][1, 2] = float("nan")
    state, options = inputs.rounding_state(params, rounding), inputs.options(rounding, 1e-2, 0.999)
    seeds, offsets = (torch.cat([numbers, numbers[:1]]) for numbers in (options.seeds, options.offsets))
    flags = scaled_step(params, mats, rows, cols, state, options._replace(seeds=seeds, offsets=offsets))
    return [flags, *params, *state]


def _newton_schulz(inputs: Inputs) -> list[Tensor]:
    dtype = None if inputs.wide else inputs.dtype
    matrices = [inputs.normal(*shape) for shape in inputs.sizes.products]
    # A^2 X: the rounding of each product shows
    once = newton_schulz(matrices, dtype=dtype, steps=1, coefficients=[(0.0, 0.0, 1.0)])
    return [*once, *newton_schulz(matrices, dtype=dtype), nuclear_norm(matrices, dtype=dtype)]


def _dots(inputs: Inputs) -> list[Tensor]:
    return [row_dots([inputs.normal(inputs.sizes.window, inputs.sizes.columns)], [inputs.normal(inputs.sizes.columns)])]


def _coefficients(inputs: Inputs) -> Tensor:
    return torch.linspace(-1, 1, inputs.sizes.window, dtype=torch.float64, device=inputs.device)


def _combination(inputs: Inputs) -> list[Tensor]:
    return linear_combination([inputs.normal(inputs.sizes.window, inputs.sizes.columns)], _coefficients(inputs))


def _sparse(inputs: Inputs) -> list[Tensor]:
    """Rows that start anywhere, and aligned rows with long blocks."""
    columns, generator, device = inputs.sizes.columns, inputs.generator, inputs.device
    layouts = [sparse_layout(columns, 0.02), sparse_layout(-(-columns // 2048) * 2048, 0.25, 2048)]
    values, indices, vectors = [], [], []
    for layout in layouts:
        rows = (torch.randn(layout.numel, generator=generator, device=device) for _ in range(inputs.sizes.window))
        value, index = map(torch.stack, zip(*(top_k(row, layout, inputs.dtype) for row in rows), strict=True))
        values.append(inputs.widened(value))
        indices.append(index)
        vectors.append(inputs.normal(layout.numel, dtype=torch.float32))
    dots = sparse_row_dots(values, indices, vectors, layouts)
    return [dots, *sparse_linear_combination(values, indices, _coefficients(inputs), layouts)]


def _masks(inputs: Inputs) -> list[Tensor]:
    rows, columns = 4 * inputs.sizes.tokens, MAX_FAST_M * 5
    scores = inputs.normal(rows, columns)
    across = [mask for n, m in ((2, 4), (1, 8), (5, 16), (64, 128), (2, 5)) for mask in nm_mask([scores], n, m)]
    wide = scores.float()  # exact, also of float64, in which the numbers of a narrower dtype lie
    return [*across, *nm_mask([scores], 2, 4, dim=0), *nm_mask([wide], 1, 2), *nm_mask([wide], 2, 4, dim=0)]


def _apply(inputs: Inputs) -> list[Tensor]:
    weight = inputs.activations()
    (mask,) = nm_mask([weight], 1, 4)
    return [nm_apply(weight, mask, inputs.scalars(0.3).squeeze())]


def _compressed(inputs: Inputs) -> list[Tensor]:
    weight = inputs.activations()
    weight = weight * nm_mask([weight], 1, 8)[0]
    values, indices = nm_compress(weight, 1, 8)
    return [nm_matmul(inputs.normal(tokens, weight.shape[1]), values, indices, 8) for tokens in (1, 6)]


def _bitmask(inputs: Inputs) -> list[Tensor]:
    weight = inputs.activations()
    weight = torch.where(weight > 0.25, weight, torch.zeros_like(weight))
    (values, mask, offsets), columns = bitmask_pack(weight), weight.shape[1]
    codes, scales = bitmask_quantize(values.to(inputs.dtype), offsets, mask)
    products = [bitmask_linear(inputs.normal(n, columns), values, mask, offsets, columns) for n in (1, 6, 20)]
    # rows of the identity show how each code was rounded
    rows = inputs.widened(torch.eye(20, columns, dtype=inputs.dtype, device=inputs.device))
    for x in (inputs.normal(1, columns), inputs.normal(6, columns), rows):
        products.append(bitmask_linear(x, codes, mask, offsets, columns, scales=scales))
    return products


def _dropout(inputs: Inputs) -> list[Tensor]:
    return [lora_dropout(inputs.activations(), DROPOUT, torch.tensor(2**40 + 5))]


def _products(inputs: Inputs) -> list[Tensor]:
    tokens, width, settings = inputs.sizes.tokens, inputs.sizes.width, {"p": DROPOUT, "seed": torch.tensor(7)}
    results = []
    for rank in RANKS:
        x, y, e = inputs.activations(), inputs.activations(), inputs.normal(tokens, rank)
        a, b = inputs.normal(rank, width), inputs.normal(width, rank).t()
        results += [lora_down(x, a, **settings), *lora_down_backward(x, e, a, **settings)]
        results.append(lora_up_(y, e, b, 0.5, **settings))
    return results


def _norms(inputs: Inputs) -> list[Tensor]:
    weight, a = inputs.activations(), inputs.normal(RANKS[-1], inputs.sizes.width, dtype=torch.float32)
    b = inputs.normal(len(weight), RANKS[-1], dtype=torch.float32)
    squares = weight.to(b.dtype).square().sum(1)
    return [lora_norms(weight, a, b, 0.5, squares)]


def _scale(inputs: Inputs) -> list[Tensor]:
    y, g = inputs.activations(), inputs.activations()
    factors, bias = inputs.normal(y.shape[1], dtype=torch.float32), inputs.normal(y.shape[1])
    return [*lora_scale_backward(g, y, factors), lora_scale_(y, factors, bias), lora_scale_(g, factors)]


def _swiglu(inputs: Inputs) -> list[Tensor]:
    e, u, grad = (inputs.activations() for _ in range(3))
    return [swiglu(e, u), *swiglu_backward_(grad, e, u)]


def _polynomials(inputs: Inputs) -> list[Tensor]:
    x = inputs.normal(2, inputs.sizes.variables, inputs.sizes.tokens) * 0.5
    features = poly_features(x, 3)
    grad = inputs.normal(*features.shape)
    return [features, poly_features_backward(grad, x, 3)]


@dataclass(frozen=True)
class Operation:
    """A call of an operation or two: its results, the dtypes that have a kernel, and what the kernel promises.

    ``rounded_inside``: intermediate results have the dtype of the inputs, whatever that of the result is.
    """

    run: Callable[[Inputs], list[Tensor]]
    dtypes: tuple[torch.dtype, ...] = ALL
    promise: str = CLOSE
    rounded_inside: bool = False


OPERATIONS = {
    "lion_step": Operation(partial(_lion, "nearest"), ALL, BITS),
    "lion_step, stochastic": Operation(partial(_lion, "stochastic"), (torch.bfloat16,), BITS),
    "lion_step, kahan": Operation(partial(_lion, "kahan"), HALF, BITS),
    "lion_step, master": Operation(partial(_lion, "master"), HALF, BITS),
    "lion_step, split": Operation(partial(_lion, "split"), (torch.bfloat16,), BITS),
    "lion_agreement": Operation(_agreement, ALL, BITS),
    "lion_step_int8": Operation(partial(_lion_int8, "nearest"), ALL, BITS),
    "lion_step_int8, stochastic": Operation(partial(_lion_int8, "stochastic"), (torch.bfloat16,), BITS),
    "lion_step_int8, split": Operation(partial(_lion_int8, "split"), (torch.bfloat16,), BITS),
    "lion_step_int8, fp8": Operation(partial(_lion_int8, "nearest", fp8=True), (torch.bfloat16,), BITS),
    "lion_agreement_int8": Operation(_agreement_int8, ALL, BITS),
    "adamw_step_int8": Operation(partial(_adamw_int8, "nearest"), ALL, BITS),
    "adamw_step_int8, split": Operation(partial(_adamw_int8, "split"), (torch.bfloat16,), BITS),
    "average_step_int8": Operation(partial(_average_int8, False), ALL, BITS),
    "average_step_int8, nesterov": Operation(partial(_average_int8, True), ALL, BITS),
    "sinkhorn": Operation(_sinkhorn),
    "scaled_step": Operation(partial(_scaled, "nearest"), ALL, BITS),
    "scaled_step, stochastic": Operation(partial(_scaled, "stochastic"), (torch.bfloat16,), BITS),
    "scaled_step, kahan": Operation(partial(_scaled, "kahan"), HALF, BITS),
    "scaled_step, master": Operation(partial(_scaled, "master"), HALF, BITS),
    "scaled_step, split": Operation(partial(_scaled, "split"), (torch.bfloat16,), BITS),
    "newton_schulz, nuclear_norm": Operation(_newton_schulz, HALF, rounded_inside=True),
    "row_dots": Operation(_dots),
    "linear_combination": Operation(_combination),
    "sparse_row_dots, sparse_linear_combination": Operation(_sparse),
    "nm_mask": Operation(_masks, ALL, BITS),
    "nm_apply": Operation(_apply, ALL, BITS),
    "nm_matmul": Operation(_compressed),
    "bitmask_linear": Operation(_bitmask),
    "lora_dropout": Operation(_dropout, ALL, BITS),
    "lora_down, lora_down_backward, lora_up": Operation(_products, HALF),
    "lora_norms": Operation(_norms, HALF),
    "lora_scale": Operation(_scale),
    "swiglu": Operation(_swiglu),
    "poly_features": Operation(_polynomials, (torch.float32,)),
}

# the operations that run the kernels of a module
MODULES = {
    "steps.lion_step": (
        "lion_step", "lion_step, stochastic", "lion_step, kahan", "lion_step, master", "lion_step, split",
        "lion_agreement",
    ),
    "steps.lion_int8": (
        "lion_step_int8", "lion_step_int8, stochastic", "lion_step_int8, split", "lion_step_int8, fp8",
        "lion_agreement_int8",
    ),
    "steps.adamw_int8": ("adamw_step_int8", "adamw_step_int8, split"),
    "steps.average_int8": ("average_step_int8", "average_step_int8, nesterov"),
    "steps.scaled_step": (
        "scaled_step", "scaled_step, stochastic", "scaled_step, kahan", "scaled_step, master", "scaled_step, split",
    ),
    "matrices.sinkhorn": ("sinkhorn",),
    "matrices.newton_schulz": ("newton_schulz, nuclear_norm",),
    "fisher.gradient_window": ("row_dots", "linear_combination"),
    "fisher.sparse_window": ("sparse_row_dots, sparse_linear_combination",),
    "nm.mask": ("nm_mask",),
    "nm.apply": ("nm_apply",),
    "nm.matmul": ("nm_matmul",),
    "sparse.linear": ("bitmask_linear",),
    "lora.norms": ("lora_norms",),
    "lora.products": ("lora_dropout", "lora_down, lora_down_backward, lora_up"),
    "lora.scale": ("lora_scale",),
    "lora.swiglu": ("swiglu",),
    "poly.features": ("poly_features",),
}  # fmt: skip
# enough for several programs of each kernel
SIZES = SimpleNamespace(
    matrices=((70, 264), (5, 7), (40, 300)), balanced=((70, 40), (66, 8200), (3, 8195)), iterations=2, tokens=70,
    width=192, products=((70, 66), (136, 144)), window=41, columns=9000, variables=9,
)  # fmt: skip
