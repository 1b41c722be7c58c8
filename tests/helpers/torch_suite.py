"""Optimizers as torch's own generic tests want them described, and what those tests share.

OptimizerInfo, the generic error inputs and the expansion of keyword arguments are torch's (torch.testing._internal).
"""

import copy

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
)
from torch.testing._internal.common_utils import TestCase

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD

SCHEDULES = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
)


def _inputs(*rows):
    """What every optimizer takes, and its own."""
    kinds = ({}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"weight_decay": 0.1})
    rows = *((kwargs, str(kwargs)) for kwargs in kinds), *rows
    return lambda device, dtype=None: [OptimizerInput(params=None, kwargs=k, desc=d) for k, d in rows]


def _errors(*rows):
    def errors(device, dtype):
        own = [
            ErrorOptimizerInput(OptimizerInput(None, kwargs, str(kwargs)), error_type=kind, error_regex=message)
            for kwargs, kind, message in rows
        ]
        return get_error_inputs_for_all_optims(device, dtype) + own

    return errors


def _same(kwargs, message):
    return kwargs, ValueError, message


LION = OptimizerInfo(
    Lion,
    optim_inputs_func=_inputs(
        ({"weight_decay": 0.1, "maximize": True}, "maximize, weight_decay"),
        ({"betas": (0.95, 0.98)}, "betas"),
        ({"cautious": True, "cautious_decay": True, "weight_decay": 0.1}, "cautious"),
    ),
    optim_error_inputs_func=_errors(
        _same({"lr": -0.5}, "Invalid learning rate: -0.5"),
        _same({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        _same({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        _same({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ),
    scheduler_inputs=SCHEDULES,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize"),
    supports_complex=False,
)
SINKGD = OptimizerInfo(
    SinkGD,
    optim_inputs_func=_inputs(
        ({"weight_decay": 0.1, "maximize": True}, "maximize, weight_decay"),
        ({"weight_decay": 0.1, "cautious_decay": True}, "cautious decay"),
        ({"momentum": 0.9, "nesterov": True}, "momentum, nesterov"),
        ({"momentum": 0.9, "momentum_order": "post"}, "momentum of normalised gradients"),
        ({"spectral": "unit"}, "spectral"),
        ({"base_width": 8, "num_iters": 2, "scale": 0.2}, "width, iterations, scale"),
    ),
    optim_error_inputs_func=_errors(
        _same({"lr": -0.5}, "Invalid learning rate: -0.5"),
        _same({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        _same({"momentum": 1.0}, "Invalid momentum: 1.0"),
        _same({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        _same({"num_iters": 0}, "Invalid num_iters: 0"),
        _same({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        _same({"nesterov": True}, "nesterov needs momentum"),
        _same({"spectral": "muon", "base_width": 8}, "choose one"),
        _same({"spectral": "unit", "base_width": 8}, "choose one"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be True together"),
    ),
    scheduler_inputs=SCHEDULES,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize", "fused"),
    supports_complex=False,
)
LANTON_INFO = OptimizerInfo(
    LANTON,
    optim_inputs_func=_inputs(
        ({"weight_decay": 0.1, "maximize": True}, "maximize, weight_decay"),
        ({"weight_decay": 0.1, "cautious_decay": True}, "cautious decay"),
        ({"noise_adaptive": False, "scaling": "muon", "nesterov": True}, "Muon"),
        ({"alpha": "auto", "noise_every": 2}, "noise every second step"),
    ),
    optim_error_inputs_func=_errors(
        _same({"lr": -0.5}, "Invalid learning rate: -0.5"),
        _same({"betas": (1.0, 0.0)}, "Invalid beta parameter at index 0: 1.0"),
        _same({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        _same({"noise_every": 0}, "Invalid noise_every: 0"),
        _same({"noise": "next"}, "Invalid noise: 'next'"),
    ),
    scheduler_inputs=SCHEDULES,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize"),
    supports_complex=False,
)
MFAC_INFO = OptimizerInfo(
    MFAC,
    optim_inputs_func=_inputs(
        ({"weight_decay": 0.1, "decay": "coupled", "maximize": True}, "maximize, coupled decay"),
        ({"window": 4, "momentum": 0.9, "scope": "layer", "scaling": "count"}, "momentum, layers"),
        ({"compression": "topk", "density": 0.5}, "sparse rows"),
    ),
    optim_error_inputs_func=_errors(
        _same({"lr": -0.5}, "Invalid learning rate: -0.5"),
        _same({"window": 0}, "Invalid window: 0"),
        _same({"damping": 0.0}, "Invalid damping: 0"),
        _same({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        _same({"momentum": 1.0}, "Invalid momentum value: 1.0"),
    ),
    scheduler_inputs=SCHEDULES,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize"),
    supports_complex=False,
)
OURS = [LION, SINKGD, LANTON_INFO, MFAC_INFO]
COUPLED = [LANTON_INFO, MFAC_INFO]  # the step of a tensor depends on the others
ADAMW = next(info for info in optim_db if info.optim_cls is AdamW)
INFOS = [*OURS, ADAMW]
STEPS = 7


def all_inputs(device, dtype, info, skip=("differentiable",)):
    """Every configuration, with each of foreach and fused; fresh tensors where lr is one."""
    for item in _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info, skip=skip):
        if info.optim_cls is AdamW and item.kwargs.get("capturable"):
            continue
        yield OptimizerInput(item.params, copy.deepcopy(item.kwargs), item.desc)


def problem(device, dtype, *, contiguous=True):
    """(weight, bias, input) of a small regression."""
    chance = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=chance, dtype=dtype).to(device)

    weight, bias, x = normal(10, 5), normal(10), normal(5)
    if not contiguous:
        weight, bias = normal(10, 5, 2)[..., 0], normal(10, 2)[..., 0]
        assert not weight.is_contiguous() and not bias.is_contiguous()
    return torch.nn.Parameter(weight), torch.nn.Parameter(bias), x


class GenericTestCase(TestCase):
    """What the tests of every optimizer share."""

    def closure_of(self, optimizer, weight, bias, x, maximize=False):
        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss = -loss if maximize else loss
            loss.backward()
            return loss

        return closure

    def descends(self, optimizer, weight, bias, x, schedulers=(), steps=20):
        maximize = optimizer.defaults.get("maximize", False)
        closure = self.closure_of(optimizer, weight, bias, x)
        first = closure().detach().item()
        for _ in range(steps):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step(loss.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
        last = closure().detach().item()
        (self.assertGreater if maximize else self.assertLess)(last, first)

    def agree(self, device, dtype, optim_info, flag, step_dtype=None, **tolerance):
        """Seven steps of a small network, with ``flag`` False and True: a layer is frozen for two of them, gradients
        are None in one, and there are a parameter of no dimension and one that never gets a gradient."""
        of_torch = optim_info.optim_cls is AdamW
        for item in optim_info.optim_inputs_func(device=device, dtype=dtype):
            # torch's loops compute with a tensor as rate in another order
            skip_tensor = of_torch or flag == "fused"
            if item.kwargs.get("capturable") or (skip_tensor and isinstance(item.kwargs.get("lr"), torch.Tensor)):
                continue
            tracker = TensorTracker(tolerance or None)
            for value in (False, True):
                torch.manual_seed(1)
                layers = [torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()]
                model = torch.nn.Sequential(*layers).to(dtype=dtype, device=device)
                scalar = torch.nn.Parameter(torch.tensor(1.5, dtype=dtype, device=device))
                idle = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype, device=device))
                params = [*model.parameters(), scalar, idle]
                optimizer = optim_info.optim_cls(params, **{**copy.deepcopy(item.kwargs), flag: value})
                x = torch.linspace(-1, 1, 6, dtype=dtype, device=device).view(3, 2)
                for step in range(STEPS):
                    optimizer.zero_grad()
                    model[2].requires_grad_(step not in (3, 4))
                    if step != 2:
                        (model(x) * scalar).sum().backward()
                    optimizer.step()
                    for param in params:
                        tracker.pop_check_set(param, self) if value else tracker.add(param)
                for param in params:
                    for key, kept in sorted(optimizer.state.get(param, {}).items()):
                        tracker.pop_check_set(kept, self) if value else tracker.add(kept)
                        if key == "step" and step_dtype is not None and not of_torch:
                            self.assertEqual(kept.dtype, step_dtype)
            self.assertTrue(tracker.all_popped())
