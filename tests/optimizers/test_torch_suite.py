"""The generic tests that torch runs over its own optimizers, through torch's own machinery.

OptimizerInfo, @optims, the generic error inputs, the expansion of keyword arguments, TensorTracker and the device
instantiation are torch's (torch.testing._internal), unchanged. The bodies are written here, after the names and the
intent of TestOptimRenewed in torch's test/test_optim.py, which torch does not ship. torch.optim.AdamW goes through the
same tests, as a control: what it passes is what is asked of ours.

Of that class, these are not here:

* complex parameters and sparse gradients: refused, which test_complex_is_refused and test_sparse_is_refused assert;
* differentiable steps and capturable: flags that ours do not have (a step waits for no device as it is);
* found_inf handed to a fused kernel (fused_does_not_step_if_foundinf): ours leave overflows to GradScaler, which skips
  the step; the battery tests it;
* what needs a GPU, or two: the multigpu runs, large_tensor (72 GB), state_dict_with_cuda_params, cpu_load_state_dict,
  fused_cpu_matches_cuda, defaults_changed_to_foreach (which looks for torch's own functions), and peak_memory_foreach,
  which reads the CUDA allocator: the battery measures the peak on a CPU instead. mixed_device_dtype runs here with one
  device and all dtypes;
* second_order_optims_return_consistent_types: of optimizers that need a closure.
"""

import copy
import pickle
import tempfile
import unittest
import warnings

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
    optim_db,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize

from leanstep.optimizers import Lion, SinkGD

# SinkGD's note on how it routes bare parameters, wanted once by users and not by every test here
pytestmark = pytest.mark.filterwarnings("ignore:SinkGD. .* taken as matrices")

SCHEDULES = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: ExponentialLR(opt, gamma=0.99), lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
)


def _inputs(*rows):
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
        ({}, "default"),
        ({"lr": 0.01}, "non-default lr"),
        ({"lr": torch.tensor(0.001)}, "Tensor lr"),
        ({"weight_decay": 0.1}, "nonzero weight_decay"),
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
        ({}, "default"),
        ({"lr": 0.01}, "non-default lr"),
        ({"lr": torch.tensor(0.001)}, "Tensor lr"),
        ({"weight_decay": 0.1}, "nonzero weight_decay"),
        ({"weight_decay": 0.1, "maximize": True}, "maximize, weight_decay"),
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
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be True together"),
    ),
    scheduler_inputs=SCHEDULES,
    supported_impls=("foreach",),
    not_og_supported_flags=("foreach", "maximize", "fused"),
    supports_complex=False,
)
INFOS = [LION, SINKGD, next(info for info in optim_db if info.optim_cls is AdamW)]
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


class GenericOptimizerTests(TestCase):
    """One test a promise; each runs for every optimizer and every configuration of it."""

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

    @optims(INFOS)
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for item in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & item.kwargs.keys())

    @optims(INFOS)
    def test_errors(self, device, dtype, optim_info):
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            item = case.optimizer_error_input
            params = item.params
            if params is None:
                params = [torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))]
            self.assertIs(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **item.kwargs)
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **item.kwargs)

    @parametrize("contiguous", [True, False])
    @parametrize("with_schedule", [True, False])
    @optims(INFOS)
    def test_goes_right_direction(self, device, dtype, optim_info, contiguous, with_schedule):
        for item in all_inputs(device, dtype, optim_info):
            if not contiguous and item.kwargs.get("fused"):
                continue  # torch's fused AdamW reads past strided parameters on a CPU
            for makers in optim_info.scheduler_inputs if with_schedule else ((),):
                weight, bias, x = problem(device, dtype, contiguous=contiguous)
                optimizer = optim_info.optim_cls([weight, bias], **copy.deepcopy(item.kwargs))
                self.descends(optimizer, weight, bias, x, [make(optimizer) for make in makers])

    @optims(INFOS)
    def test_param_group_with_schedule_goes_right_direction(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=1e-3)
            self.descends(optimizer, weight, bias, x, [make(optimizer) for make in makers])

    @parametrize("lr_shape", [(), (1,), (1, 1)])
    @optims(INFOS, dtypes=[torch.float64])
    def test_tensor_lr(self, device, dtype, optim_info, lr_shape):
        for item in all_inputs(device, dtype, optim_info):
            if optim_info.optim_cls is AdamW and item.kwargs.get("foreach"):
                continue  # refused by torch without capturable
            if optim_info.optim_cls is AdamW and lr_shape != ():
                continue
            weight, bias, x = problem(device, dtype)
            twins = [torch.nn.Parameter(p.detach().clone()) for p in (weight, bias)]
            kwargs = {**item.kwargs, "lr": 1e-3}
            number = optim_info.optim_cls(twins, **kwargs)
            kwargs["lr"] = torch.full(lr_shape, 1e-3, dtype=torch.float64)
            tensor = optim_info.optim_cls([weight, bias], **kwargs)
            tensor.param_groups[0]["lr"].mul_(1.0)
            for _ in range(STEPS):
                tensor.step(self.closure_of(tensor, weight, bias, x))
                number.step(self.closure_of(number, *twins, x))
            self.assertEqual(weight, twins[0])
            self.assertEqual(bias, twins[1])

    @parametrize("key", ["lr", "weight_decay"])
    @optims(INFOS)
    def test_param_groups_override(self, device, dtype, optim_info, key):
        """A group's own value acts on that group alone; nothing of the inputs is left in the others."""
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            irrelevant = torch.nn.Parameter(torch.randn(2, 2, device=device, dtype=dtype))
            untouched = irrelevant.detach().clone()
            kwargs = {k: v for k, v in item.kwargs.items() if k != key}
            groups = [{"params": [weight, irrelevant]}, {"params": [bias], key: 0.02}]
            optimizer = optim_info.optim_cls(groups, **kwargs)
            self.assertEqual(optimizer.param_groups[1][key], 0.02)
            self.assertEqual(optimizer.param_groups[0][key], optimizer.defaults[key])
            self.descends(optimizer, weight, bias, x)
            self.assertEqual(irrelevant, untouched)
            self.assertIsNone(irrelevant.grad)

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

    @optims(INFOS, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self.agree(device, dtype, optim_info, "foreach")

    @optims(INFOS, dtypes=[torch.float64])
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        """Step counts are fp32 whatever the default dtype (torch's own follow it to fp64)."""
        before = torch.get_default_dtype()
        for default in (torch.float64, torch.float16):
            torch.set_default_dtype(default)
            try:
                self.agree(device, dtype, optim_info, "foreach", torch.float32, rtol=1e-4, atol=1e-5)
            finally:
                torch.set_default_dtype(before)

    @optims([SINKGD, INFOS[-1]], dtypes=[torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        unit = torch.finfo(dtype).eps
        self.agree(device, dtype, optim_info, "fused", rtol=4 * unit, atol=4 * unit)

    @optims([SINKGD, INFOS[-1]], dtypes=[torch.float32])
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        with torch.device("meta"):
            model = torch.nn.Linear(2, 3, dtype=dtype)
        optimizer = optim_info.optim_cls(model.parameters(), fused=True)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        with self.assertRaisesRegex(RuntimeError, "`fused=True` requires all the params to be floating point Tensors"):
            optimizer.step()
        optimizer.zero_grad()
        model.to_empty(device=device)
        for param in model.parameters():
            torch.nn.init.ones_(param)
            param.grad = torch.rand_like(param)
        optimizer.step()
        self.assertTrue(all(torch.isfinite(p).all() for p in model.parameters()))

    @optims(INFOS)
    def test_mixed_device_dtype(self, device, dtype, optim_info):
        """Parameters of four dtypes in one group; foreach and loop agree on each to a few of its units."""
        for item in optim_info.optim_inputs_func(device=device):
            of_torch = optim_info.optim_cls is AdamW
            if item.kwargs.get("capturable") or (of_torch and isinstance(item.kwargs.get("lr"), torch.Tensor)):
                continue
            results = []
            for foreach in (False, True):
                chance = torch.Generator().manual_seed(0)
                params = []
                for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16) * 2:
                    param = torch.nn.Parameter(torch.rand(2, 3, generator=chance).to(device, kind))
                    param.grad = torch.rand(2, 3, generator=chance).to(device, kind)
                    params.append(param)
                kwargs = {**copy.deepcopy(item.kwargs), "foreach": foreach}
                optimizer = optim_info.optim_cls(params, **kwargs)
                for _ in range(STEPS):
                    optimizer.step()
                results.append((params, [optimizer.state[p] for p in params]))
            for ours, state, theirs, other in zip(*results[0], *results[1], strict=True):
                unit = torch.finfo(ours.dtype).eps
                self.assertEqual(ours, theirs, rtol=5 * unit, atol=5 * unit)
                self.assertEqual(state, other, rtol=5 * max(unit, 1e-6), atol=5 * max(unit, 1e-6))

    @optims(INFOS)
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info):
            if optim_info.optim_cls is AdamW and item.kwargs.get("fused"):
                continue
            params = [torch.nn.Parameter(torch.rand(3, 4, device=device, dtype=dtype)) for _ in range(2)]
            params.append(torch.nn.Parameter(torch.rand(4, device=device, dtype=dtype)))
            optimizer = optim_info.optim_cls(params, **item.kwargs)
            for param in params:
                param.grad = torch.rand_like(param)
            before = [(p.grad, p.grad._version, p.grad.clone()) for p in params]
            optimizer.step()
            for param, (grad, version, values) in zip(params, before, strict=True):
                self.assertIs(param.grad, grad)
                self.assertEqual(grad._version, version)
                self.assertEqual(grad, values, rtol=0, atol=0)

    @optims(INFOS)
    def test_non_empty_state(self, device, dtype, optim_info):
        """Every stepped parameter has an entry; only SinkGD's matrices have nothing in it, and that is its point."""
        for item in optim_info.optim_inputs_func(device=device):
            if item.kwargs.get("capturable"):
                continue
            model = torch.nn.Linear(5, 5).to(dtype=dtype, device=device)
            optimizer = optim_info.optim_cls(model.parameters(), **item.kwargs)
            model(torch.rand(2, 5, dtype=dtype, device=device)).sum().backward()
            optimizer.step()
            self.assertEqual(set(optimizer.state), set(model.parameters()))
            stateless = optim_info is SINKGD and not {"momentum", "spectral"} & item.kwargs.keys()
            self.assertEqual([len(state) > 0 for state in optimizer.state.values()], [not stateless, True])

    @optims([LION, SINKGD])
    def test_complex_is_refused(self, device, dtype, optim_info):
        real = torch.nn.Parameter(torch.randn(10, 5, device=device, dtype=dtype))
        for shape in ((10, 5), (10,)):
            imaginary = torch.nn.Parameter(torch.randn(shape, device=device, dtype=torch.complex64))
            for item in all_inputs(device, dtype, optim_info):
                with self.assertRaisesRegex(ValueError, "complex64.*view_as_real"):
                    optim_info.optim_cls([real, imaginary], **item.kwargs)

    @optims([LION, SINKGD])
    def test_sparse_is_refused(self, device, dtype, optim_info):
        """Before anything is changed. (Other sparse layouts torch does not let be a gradient of a dense tensor.)"""
        for item in all_inputs(device, dtype, optim_info):
            dense, table = (torch.nn.Parameter(torch.randn(4, 6, device=device, dtype=dtype)) for _ in range(2))
            before = dense.detach().clone()
            optimizer = optim_info.optim_cls([dense, table], **item.kwargs)
            dense.grad = torch.rand_like(dense)
            table.grad = torch.rand_like(table).to_sparse()
            with self.assertRaisesRegex(RuntimeError, "sparse.*SparseAdam"):
                optimizer.step()
            self.assertEqual(dense, before, rtol=0, atol=0)

    @optims(INFOS)
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        """Also of tensors that ask for none, and with a closure that makes none."""
        for item in all_inputs(device, dtype, optim_info):
            for wanted in (True, False):
                params = [torch.randn(2, 3, device=device, dtype=dtype, requires_grad=wanted) for _ in range(2)]
                before = [p.detach().clone() for p in params]
                optimizer = optim_info.optim_cls(params, **item.kwargs)
                loss = torch.ones(1, device=device, dtype=dtype)
                self.assertIs(optimizer.step(lambda loss=loss: loss), loss)
                optimizer.step()
                self.assertEqual(before, [p.detach() for p in params], rtol=0, atol=0)
                self.assertEqual(len(optimizer.state), 0)

    @optims(INFOS)
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info):
            if item.kwargs.get("weight_decay", optim_info.optim_cls is AdamW):
                item.kwargs["weight_decay"] = 0.0
            param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
            before = param.detach().clone()
            optimizer = optim_info.optim_cls([param], **item.kwargs)
            param.grad = torch.zeros_like(param)
            optimizer.step()
            self.assertEqual(before, param.detach())

    @optims(INFOS)
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **item.kwargs)
            for _ in range(2):
                text = repr(optimizer)
                self.assertIn(optim_info.optim_cls.__name__, text)
                self.assertIn("Parameter Group 0", text)
                optimizer.step(self.closure_of(optimizer, weight, bias, x))

    @parametrize("named", [True, False])
    @optims(INFOS)
    def test_state_dict_deterministic(self, device, dtype, optim_info, named):
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            maximize = item.kwargs.get("maximize", False)
            pairs = [("weight", weight), ("bias", bias)]
            optimizer = optim_info.optim_cls(pairs if named else [weight, bias], **item.kwargs)
            for _ in range(STEPS):
                optimizer.step(self.closure_of(optimizer, weight, bias, x, maximize))
            twins = [torch.nn.Parameter(p.detach().clone()) for p in (weight, bias)]
            pairs = list(zip(("weight", "bias"), twins, strict=True))
            other = optim_info.optim_cls(pairs if named else twins, **copy.deepcopy(item.kwargs))
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for _ in range(STEPS):
                optimizer.step(self.closure_of(optimizer, weight, bias, x, maximize))
                other.step(self.closure_of(other, *twins, x, maximize))
                self.assertEqual([weight, bias], twins, rtol=0, atol=0)
            self.assertEqual(optimizer.state_dict(), other.state_dict())
            # a state dict lists its parameters by position: the same for a fresh copy
            self.assertEqual(copy.deepcopy(optimizer).state_dict(), optimizer.state_dict())
            if named:
                self.assertEqual(other.state_dict()["param_groups"][0]["param_names"], ["weight", "bias"])
            # a group that comes twice reads the same twice
            other.param_groups.extend(other.param_groups)
            self.assertEqual(other.state_dict()["param_groups"][-1], optimizer.state_dict()["param_groups"][-1])

    @optims(INFOS)
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info, skip=("differentiable", "fused")):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **item.kwargs)
            for _ in range(3):
                optimizer.step(self.closure_of(optimizer, weight, bias, x))
            old = copy.deepcopy(optimizer.state_dict())
            for group in old["param_groups"]:
                for flag in optim_info.not_og_supported_flags:
                    group.pop(flag, None)
                group.pop("nonfinite_count", None)
            optimizer.load_state_dict(old)
            for flag in optim_info.not_og_supported_flags:
                self.assertIn(flag, optimizer.param_groups[0])
            optimizer.step(self.closure_of(optimizer, weight, bias, x))
            optimizer.state_dict()

    @parametrize("names_to", ["named", "unnamed"])
    @optims(INFOS)
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, names_to):
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            pairs = [("weight", weight), ("bias", bias)]
            source = optim_info.optim_cls([weight, bias] if names_to == "named" else pairs, **item.kwargs)
            source.step(self.closure_of(source, weight, bias, x))
            target = optim_info.optim_cls(pairs if names_to == "named" else [weight, bias], **item.kwargs)
            target.load_state_dict(source.state_dict())
            if names_to == "named":
                self.assertEqual(target.param_groups[0]["param_names"], ["weight", "bias"])
            target.step(self.closure_of(target, weight, bias, x))

    @optims(INFOS)
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **item.kwargs)
            for _ in range(3):
                optimizer.step(self.closure_of(optimizer, weight, bias, x))
            saved = optimizer.state_dict()
            with tempfile.TemporaryFile() as file:
                torch.save(saved, file)
                file.seek(0)
                loaded = torch.load(file, weights_only=True)
            self.assertEqual(saved, loaded)

    @optims(INFOS)
    def test_load_nontensor_step(self, device, dtype, optim_info):
        """Step counts of old checkpoints are Python numbers."""
        for item in all_inputs(device, dtype, optim_info):
            params = [torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype)) for _ in range(2)]
            params.append(torch.nn.Parameter(torch.randn(3, device=device, dtype=dtype)))
            for param in params:
                param.grad = torch.rand_like(param)
            optimizer = optim_info.optim_cls(params, **item.kwargs)
            for _ in range(3):
                optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
            for kept in state["state"].values():
                if torch.is_tensor(kept.get("step")):
                    kept["step"] = kept["step"].item()
            optimizer.load_state_dict(state)
            optimizer.step()
            for kept in optimizer.state.values():
                if "step" in kept:
                    self.assertTrue(torch.is_tensor(kept["step"]))
                    self.assertEqual(kept["step"].item(), 4)

    @optims(INFOS)
    def test_state_dict_hooks(self, device, dtype, optim_info):
        param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
        optimizer = optim_info.optim_cls([param], lr=1e-3)
        order = []
        optimizer.register_state_dict_pre_hook(lambda opt: order.append("second"))
        optimizer.register_state_dict_pre_hook(lambda opt: order.append("first"), prepend=True)

        def mark(opt, state):
            state["marked"] = True

        handle = optimizer.register_state_dict_post_hook(mark)
        self.assertTrue(optimizer.state_dict()["marked"])
        self.assertEqual(order, ["first", "second"])
        handle.remove()
        self.assertNotIn("marked", optimizer.state_dict())

        def double(opt, state):
            state = copy.deepcopy(state)
            state["param_groups"][0]["lr"] = 2e-3
            return state

        optimizer.register_load_state_dict_pre_hook(double)
        optimizer.register_load_state_dict_post_hook(lambda opt: order.append("loaded later"))
        optimizer.register_load_state_dict_post_hook(lambda opt: order.append("loaded"), prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(optimizer.param_groups[0]["lr"], 2e-3)
        self.assertEqual(order[-2:], ["loaded", "loaded later"])

    @optims(INFOS)
    def test_hooks_may_leave_values_in_the_state(self, device, dtype, optim_info):
        """As torch's own tests of these hooks do: under names, beside the parameters."""
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **item.kwargs)
            optimizer.step(self.closure_of(optimizer, weight, bias, x))
            optimizer.register_state_dict_pre_hook(lambda opt: opt.state.update(test=1))
            optimizer.register_load_state_dict_post_hook(lambda opt: opt.state.update(loaded=True))
            saved = optimizer.state_dict()
            self.assertEqual(saved["state"]["test"], 1)
            for _ in range(2):
                optimizer.load_state_dict(optimizer.state_dict())
                self.assertEqual((optimizer.state["test"], optimizer.state["loaded"]), (1, True))
            if optim_info.optim_cls is not AdamW:
                self.assertGreater(optimizer.state_bytes(), 0)
            optimizer.step(self.closure_of(optimizer, weight, bias, x))
            self.assertEqual(pickle.loads(pickle.dumps(optimizer.state_dict())), optimizer.state_dict())

    @optims(INFOS)
    def test_step_hooks(self, device, dtype, optim_info):
        param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
        optimizer = optim_info.optim_cls([param], lr=1e-3)
        order = []
        handles = [
            optimizer.register_step_pre_hook(lambda *_: order.append("own before")),
            optimizer.register_step_post_hook(lambda *_: order.append("own after")),
            register_optimizer_step_pre_hook(lambda *_: order.append("all before")),
            register_optimizer_step_post_hook(lambda *_: order.append("all after")),
        ]
        try:
            optimizer.step()
        finally:
            for handle in handles:
                handle.remove()
        self.assertEqual(order, ["all before", "own before", "own after", "all after"])
        optimizer.step()
        self.assertEqual(len(order), 4)

    @optims(INFOS)
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        for item in all_inputs(device, dtype, optim_info):
            weight, bias, x = problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **item.kwargs)
            optimizer.step(self.closure_of(optimizer, weight, bias, x))

            def public(opt):
                return {k for k in opt.__dict__ if not k.startswith("_")}

            self.assertEqual(public(optimizer), public(copy.deepcopy(optimizer)))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    instantiate_device_type_tests(GenericOptimizerTests, globals(), only_for="cpu")

# pytest would collect the template beside what was made from it
if issubclass(GenericOptimizerTests if "GenericOptimizerTests" in globals() else TestCase, unittest.TestCase):
    globals().pop("GenericOptimizerTests", None)
