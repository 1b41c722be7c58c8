"""The table of optimizers: one row a variant. The battery of tests/optimizers/test_all_optimizers.py runs over it.

An optimizer joins with one row in CASES; what its rule changes about the battery's expectations is in the row.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD

# every kind of tensor: matrices of many vectors (with and without a tail), small ones, a stack of
# matrices, a convolution, a vector, a scalar, one element, none
SHAPES = ((66, 128), (9, 70), (5, 3), (2, 4, 6), (4, 2, 3, 3), (7,), (), (1,), (0, 3), (1, 1))
SMALL_SHAPES = ((6, 5), (2, 3, 4), (4, 2, 3, 3), (7,), (), (1,), (0, 3))


def _one_group(params: list[Any]) -> list[Any]:
    return params


def _balanced_groups(params: list[Any]) -> list[dict[str, Any]]:
    """Matrices to the balanced rule, the rest to AdamW; ``params`` may be (name, parameter) pairs."""
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    tables = [p for p, t in zip(params, tensors, strict=True) if t.dim() == 2]
    rest = [p for p, t in zip(params, tensors, strict=True) if t.dim() != 2]
    groups = [{"params": tables, "algorithm": "balanced"}, {"params": rest, "algorithm": "auto"}]
    return [g for g in groups if g["params"]]


def _norm_groups(params: list[Any]) -> list[dict[str, Any]]:
    """Two-dimensional parameters to LANTON's rule for embeddings, the rest to those for matrices and vectors."""
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    tables = [p for p, t in zip(params, tensors, strict=True) if t.dim() == 2]
    rest = [p for p, t in zip(params, tensors, strict=True) if t.dim() != 2]
    groups = [{"params": tables, "norm": "sign"}, {"params": rest, "norm": "auto"}]
    return [g for g in groups if g["params"]]


@dataclass(frozen=True, kw_only=True)
class OptimizerCase:
    """One optimizer with one set of options, and what may be expected of it.

    Attributes:
        name: the test's id.
        cls, kwargs: how it is built; ``groups`` sorts parameters into the groups it needs.
        dtype: of the parameters and gradients.
        state: names of the state tensors of a matrix, with their dtypes.
        elementwise: a non-finite gradient entry touches that entry alone; otherwise its whole tensor.
        replayable: a skipped step leaves no trace at all, not even in a counter that seeds random rounding.
        exact_foreach: ``foreach`` True and False agree bit for bit; otherwise to the order of sums.
        coupled: the step of a tensor depends on the other tensors; otherwise they may be stepped apart.
        skips_together: a non-finite gradient of one tensor stops the step of all; otherwise that tensor's alone.
        graphs: how many torch.compile makes of six steps: with and without state, and more where steps differ in kind.
        large: the battery gives it matrices of many vectors, too.
        extra_fp32: extra memory of a step, in fp32 copies of the largest matrix, beyond small vectors.
    """

    name: str
    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any] = field(default_factory=dict)
    groups: Callable[[list[Any]], Any] = _one_group
    dtype: torch.dtype = torch.float32
    state: dict[str, torch.dtype] = field(default_factory=dict)
    elementwise: bool = False
    replayable: bool = True
    exact_foreach: bool = True
    coupled: bool = False
    graphs: int = 2
    skips_together: bool = False
    large: bool = False
    extra_fp32: float = 0.0

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters of tests that look at every kind of tensor."""
        return SHAPES if self.large else SMALL_SHAPES

    def build(self, params: list[Any], **overrides: Any) -> Any:
        """The optimizer over the parameters (or named ones), without the note on automatic routing."""
        return self.build_from(self.groups(params), **overrides)

    def build_from(self, groups: list[Any], **overrides: Any) -> Any:
        """The optimizer over groups as they are, without the note on automatic routing."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(SinkGD|LANTON): .* taken as (hidden )?matrices")
            return self.cls(groups, **{**self.kwargs, **overrides})

    def params(self, shapes: tuple[tuple[int, ...], ...] = SMALL_SHAPES, seed: int = 0) -> list[Tensor]:
        """Parameters with normal entries, the same for the same seed."""
        chance = torch.Generator().manual_seed(seed)
        return [torch.randn(s, generator=chance).to(self.dtype).requires_grad_() for s in shapes]


def fill_grads(params: list[Tensor], step: int) -> None:
    """Normal gradients, the same for the same step number."""
    chance = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=chance).to(param.dtype)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    """Step through the gradients of the given step numbers."""
    for step in steps:
        fill_grads(params, step)
        optimizer.step()


def assert_same(left: Iterable[Any], right: Iterable[Any], message: str = "") -> None:
    """Bit for bit, NaN included."""
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{message} [{i}]: {m}")


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters and all state tensors, in a fixed order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in params for _, v in sorted(optimizer.state.get(p, {}).items())]
    tensors = [t.detach().clone() for t in (*params, *state)]
    # numbers in fp8 by their bits: torch knows little arithmetic of them
    return [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]


_BF16 = torch.bfloat16
_LION = {"exp_avg": torch.float32}
_LION_BF16 = {"exp_avg": _BF16}
_LION_INT8 = {"exp_avg": torch.int8, "exp_avg_scale": torch.float32, "step": torch.float32}
_LANTON = {"momentum_buffer": torch.float32, "previous_grad": torch.float32}
_LANTON_BF16 = {"momentum_buffer": _BF16, "previous_grad": _BF16}
_LANTON_INT8 = {
    key + suffix: dtype for key in _LANTON for suffix, dtype in (("", torch.int8), ("_scale", torch.float32))
}
_NOISE = {"noise": torch.float64, "noise_steps": torch.float32}
_MFAC_SCOPE = {"gram": torch.float64, "counters": torch.float64, "stats": torch.float64}
_MFAC = {"window": torch.float32, **_MFAC_SCOPE}

CASES = (
    OptimizerCase(
        name="Lion", cls=Lion, kwargs={"lr": 1e-2, "weight_decay": 0.1}, state=_LION, elementwise=True, large=True
    ),
    OptimizerCase(
        name="Lion-cautious",
        cls=Lion,
        kwargs={"lr": 1e-2, "weight_decay": 0.1, "cautious": True, "cautious_decay": True},
        state=_LION,
    ),
    OptimizerCase(
        name="Lion-bf16", cls=Lion, kwargs={"lr": 1e-2}, dtype=_BF16, state=_LION_BF16, elementwise=True, large=True
    ),
    OptimizerCase(
        name="Lion-bf16-fp32-momentum",
        cls=Lion,
        kwargs={"lr": 1e-2, "weight_decay": 0.1, "momentum_dtype": torch.float32},
        dtype=_BF16,
        state=_LION,
        elementwise=True,
    ),
    OptimizerCase(
        name="Lion-stochastic",
        cls=Lion,
        kwargs={"lr": 1e-3, "rounding": "stochastic", "seed": 3},
        dtype=_BF16,
        state={**_LION_BF16, "step": torch.float32},
        elementwise=True,
        replayable=False,
    ),
    OptimizerCase(
        name="Lion-kahan",
        cls=Lion,
        kwargs={"lr": 1e-3, "rounding": "kahan"},
        dtype=_BF16,
        state={**_LION_BF16, "kahan_compensation": _BF16},
        elementwise=True,
    ),
    OptimizerCase(
        name="Lion-master",
        cls=Lion,
        kwargs={"lr": 1e-3, "rounding": "master", "weight_decay": 0.1},
        dtype=_BF16,
        state={**_LION_BF16, "master_param": torch.float32},
        elementwise=True,
    ),
    OptimizerCase(
        name="Lion-split",
        cls=Lion,
        kwargs={"lr": 1e-3, "rounding": "split", "weight_decay": 0.1},
        dtype=_BF16,
        state={**_LION_BF16, "split_difference": torch.int8},
        elementwise=True,
    ),
    OptimizerCase(
        name="Lion-int8",
        cls=Lion,
        kwargs={"lr": 1e-2, "weight_decay": 0.1, "cautious": True, "momentum_dtype": torch.int8, "seed": 3},
        state=_LION_INT8,
        replayable=False,
        large=True,
    ),
    OptimizerCase(
        name="Lion-fp8",
        cls=Lion,
        kwargs={"lr": 1e-2, "weight_decay": 0.1, "momentum_dtype": "fp8", "seed": 3},
        state={**_LION_INT8, "exp_avg": torch.float8_e4m3fn},
        replayable=False,
        large=True,
    ),
    OptimizerCase(
        name="Lion-int8-split",
        cls=Lion,
        kwargs={"lr": 1e-3, "rounding": "split", "momentum_dtype": torch.int8, "seed": 3},
        dtype=_BF16,
        state={**_LION_INT8, "split_difference": torch.int8},
        replayable=False,
    ),
    OptimizerCase(
        name="SinkGD", cls=SinkGD, kwargs={"weight_decay": 0.1}, exact_foreach=False, extra_fp32=1, large=True
    ),
    OptimizerCase(
        name="SinkGD-momentum",
        cls=SinkGD,
        kwargs={"momentum": 0.9, "nesterov": True},
        state={"momentum_buffer": torch.float32},
        exact_foreach=False,
        extra_fp32=4,
    ),
    OptimizerCase(
        name="SinkGD-momentum-after",
        cls=SinkGD,
        kwargs={"momentum": 0.9, "momentum_order": "post", "base_width": 4},
        state={"momentum_buffer": torch.float32},
        exact_foreach=False,
        extra_fp32=5,
    ),
    OptimizerCase(
        name="SinkGD-int8",
        cls=SinkGD,
        kwargs={"momentum": 0.9, "nesterov": True, "momentum_dtype": torch.int8, "seed": 3},
        state={"momentum_buffer": torch.int8, "momentum_buffer_scale": torch.float32, "step": torch.float32},
        exact_foreach=False,
        replayable=False,
        extra_fp32=16,
    ),
    OptimizerCase(
        name="SinkGD-adamw-int8",
        cls=SinkGD,
        kwargs={"algorithm": "adamw", "lr": 1e-2, "momentum_dtype": torch.int8, "seed": 3},
        state={**_LION_INT8, "exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32},
        coupled=True,
        skips_together=True,
        replayable=False,
        large=True,
    ),
    OptimizerCase(
        name="SinkGD-spectral",
        cls=SinkGD,
        kwargs={"spectral": "muon"},
        state={"power_vector": torch.float32, "power_warm": torch.bool},
        exact_foreach=False,
        extra_fp32=4,
    ),
    OptimizerCase(
        name="SinkGD-balanced",
        cls=SinkGD,
        kwargs={"momentum": 0.95},
        groups=_balanced_groups,
        state={"momentum_buffer": torch.float32},
        exact_foreach=False,
        extra_fp32=5,
    ),
    OptimizerCase(
        name="SinkGD-bf16",
        cls=SinkGD,
        kwargs={"weight_decay": 0.1},
        dtype=_BF16,
        exact_foreach=False,
        extra_fp32=1,
        large=True,
    ),
    OptimizerCase(
        name="SinkGD-stochastic",
        cls=SinkGD,
        kwargs={"lr": 2e-3, "rounding": "stochastic"},
        dtype=_BF16,
        state={"step": torch.float32},
        exact_foreach=False,
        replayable=False,
        extra_fp32=1,
    ),
    OptimizerCase(
        name="SinkGD-kahan",
        cls=SinkGD,
        kwargs={"lr": 2e-3, "rounding": "kahan", "weight_decay": 0.1, "cautious_decay": True},
        dtype=_BF16,
        state={"kahan_compensation": _BF16},
        exact_foreach=False,
        extra_fp32=1,
    ),
    OptimizerCase(
        name="SinkGD-master",
        cls=SinkGD,
        kwargs={"lr": 2e-3, "rounding": "master"},
        dtype=_BF16,
        state={"master_param": torch.float32},
        exact_foreach=False,
        extra_fp32=1,
    ),
    OptimizerCase(
        name="SinkGD-split",
        cls=SinkGD,
        kwargs={"lr": 2e-3, "rounding": "split"},
        dtype=_BF16,
        state={"split_difference": torch.int8},
        exact_foreach=False,
        extra_fp32=1,
    ),
    OptimizerCase(
        name="LANTON",
        cls=LANTON,
        kwargs={"lr": 5e-3, "weight_decay": 0.1},
        state={**_LANTON, **_NOISE},
        exact_foreach=False,
        coupled=True,
        large=True,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-base",
        cls=LANTON,
        kwargs={"lr": 5e-3, "weight_decay": 0.1, "noise_adaptive": False},
        state={"momentum_buffer": torch.float32},
        exact_foreach=False,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-embeddings",
        cls=LANTON,
        kwargs={"lr": 5e-3, "alpha": "auto", "weight_decay": 0.1},
        groups=_norm_groups,
        state={**_LANTON, **_NOISE},
        exact_foreach=False,
        coupled=True,
        extra_fp32=3,
    ),
    OptimizerCase(
        name="LANTON-muon",
        cls=LANTON,
        kwargs={
            "lr": 5e-3,
            "scaling": "muon",
            "nesterov": True,
            "weight_decay": 0.1,
            "cautious_decay": True,
            "noise_every": 2,
        },
        state={**_LANTON, **_NOISE},
        exact_foreach=False,
        coupled=True,
        replayable=False,
        graphs=3,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-rows",
        cls=LANTON,
        kwargs={"lr": 5e-3, "variance": "rows", "noise_adaptive": False},
        state={"momentum_buffer": torch.float32, "row_mean_sq": torch.float32},
        exact_foreach=False,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-bf16",
        cls=LANTON,
        kwargs={"lr": 5e-3, "weight_decay": 0.1},
        dtype=_BF16,
        state={**_LANTON_BF16, **_NOISE},
        exact_foreach=False,
        coupled=True,
        large=True,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-stochastic",
        cls=LANTON,
        kwargs={"lr": 5e-3, "rounding": "stochastic", "momentum_dtype": torch.float32},
        dtype=_BF16,
        state={"momentum_buffer": torch.float32, "previous_grad": _BF16, **_NOISE, "step": torch.float32},
        exact_foreach=False,
        coupled=True,
        replayable=False,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-kahan",
        cls=LANTON,
        kwargs={"lr": 5e-3, "rounding": "kahan", "noise_dtype": torch.float32, "nuclear": "svd"},
        dtype=_BF16,
        state={"momentum_buffer": _BF16, "previous_grad": torch.float32, **_NOISE, "kahan_compensation": _BF16},
        exact_foreach=False,
        coupled=True,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-master",
        cls=LANTON,
        kwargs={"lr": 5e-3, "rounding": "master", "weight_decay": 0.1, "nuclear": "frobenius"},
        dtype=_BF16,
        state={**_LANTON_BF16, **_NOISE, "master_param": torch.float32},
        exact_foreach=False,
        coupled=True,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="LANTON-int8",
        cls=LANTON,
        kwargs={"lr": 5e-3, "momentum_dtype": torch.int8, "noise_dtype": torch.int8, "seed": 3},
        dtype=_BF16,
        state={**_LANTON_INT8, **_NOISE, "step": torch.float32},
        exact_foreach=False,
        coupled=True,
        replayable=False,
        extra_fp32=16,
    ),
    OptimizerCase(
        name="LANTON-split",
        cls=LANTON,
        kwargs={"lr": 5e-3, "rounding": "split", "weight_decay": 0.1, "nuclear": "frobenius"},
        dtype=_BF16,
        state={**_LANTON_BF16, **_NOISE, "split_difference": torch.int8},
        exact_foreach=False,
        coupled=True,
        extra_fp32=12,
    ),
    OptimizerCase(
        name="MFAC",
        cls=MFAC,
        kwargs={"lr": 2e-2, "window": 4, "damping": 1.0, "weight_decay": 0.1},
        state=_MFAC,
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        large=True,
        extra_fp32=5,
    ),
    OptimizerCase(
        name="MFAC-layers",
        cls=MFAC,
        kwargs={"lr": 2e-2, "window": 3, "damping": 1.0, "scope": "layer", "momentum": 0.9, "scaling": "count"},
        state={**_MFAC, "momentum_buffer": torch.float32},
        exact_foreach=False,
        extra_fp32=6,
    ),
    OptimizerCase(
        name="MFAC-blocks",
        cls=MFAC,
        kwargs={"lr": 2e-2, "window": 3, "damping": 1.0, "scope": 20, "storage": "fp16"},
        state={**_MFAC, "window": torch.float16, "window_scale": torch.float32},
        exact_foreach=False,
        extra_fp32=14,
    ),
    OptimizerCase(
        name="MFAC-topk",
        cls=MFAC,
        kwargs={"lr": 6e-2, "window": 4, "damping": 1.0, "compression": "topk", "density": 0.4},
        state={"window_values": _BF16, "window_indices": torch.uint8, "error": torch.float32, **_MFAC_SCOPE},
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        extra_fp32=14,
    ),
    OptimizerCase(
        name="MFAC-bf16",
        cls=MFAC,
        kwargs={"lr": 0.5, "window": 4, "damping": 30.0},
        dtype=_BF16,
        state=_MFAC,
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        extra_fp32=6,
    ),
    OptimizerCase(
        name="MFAC-stochastic",
        cls=MFAC,
        kwargs={"lr": 0.5, "window": 4, "damping": 30.0, "rounding": "stochastic", "storage": "bf16"},
        dtype=_BF16,
        state={**_MFAC, "window": _BF16, "step": torch.float32},
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        replayable=False,
        extra_fp32=6,
    ),
    OptimizerCase(
        name="MFAC-kahan",
        cls=MFAC,
        kwargs={"lr": 0.5, "window": 4, "damping": 30.0, "rounding": "kahan"},
        dtype=_BF16,
        state={**_MFAC, "kahan_compensation": _BF16},
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        extra_fp32=8,
    ),
    OptimizerCase(
        name="MFAC-master",
        cls=MFAC,
        kwargs={"lr": 0.5, "window": 4, "damping": 30.0, "rounding": "master", "decay": "coupled", "weight_decay": 0.1},
        dtype=_BF16,
        state={**_MFAC, "master_param": torch.float32},
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        extra_fp32=8,
    ),
    OptimizerCase(
        name="MFAC-split",
        cls=MFAC,
        kwargs={"lr": 0.5, "window": 4, "damping": 30.0, "rounding": "split"},
        dtype=_BF16,
        state={**_MFAC, "split_difference": torch.int8},
        coupled=True,
        skips_together=True,
        exact_foreach=False,
        extra_fp32=8,
    ),
)
