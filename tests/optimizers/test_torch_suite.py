"""The generic tests that torch runs over its own optimizers, through torch's own machinery.

OptimizerInfo, @optims, the generic error inputs, the expansion of keyword arguments, TensorTracker and the device
instantiation are torch's (torch.testing._internal), unchanged. The bodies are written here, after the names and the
intent of TestOptimRenewed in torch's test/test_optim.py, which torch does not ship. torch.optim.AdamW goes through the
same tests, as a control: what it passes is what is asked of ours.

Of that class, these are not here:

* complex parameters and sparse gradients: refused, which the battery asserts, and test_edge_gradients.py that a sparse
  gradient anywhere changes nothing;
* grads_are_never_inplaced_into, step_is_noop_when_params_have_no_grad, param_groups_override, step_hooks and
  set_default_dtype_works_with_foreach: the battery asserts them;
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
import warnings

import pytest
import torch
from torch.optim import AdamW
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optims
from torch.testing._internal.common_utils import parametrize
from torch_suite import ADAMW, COUPLED, INFOS, SINKGD, STEPS, GenericTestCase, all_inputs, problem

# notes on how bare parameters are routed, wanted once by users and not by every test here
pytestmark = [
    pytest.mark.filterwarnings("ignore:(SinkGD|LANTON). .* taken as (hidden )?matrices"),
    pytest.mark.sample(24),
]


class GenericOptimizerTests(GenericTestCase):
    """One test a promise; each runs for every optimizer and every configuration of it."""

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
            kwargs = optim_info.optim_inputs_func(device=device)[0].kwargs
            optimizer = optim_info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **kwargs)
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

    @optims(INFOS, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self.agree(device, dtype, optim_info, "foreach")

    @optims([SINKGD, ADAMW], dtypes=[torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        unit = torch.finfo(dtype).eps
        self.agree(device, dtype, optim_info, "fused", rtol=4 * unit, atol=4 * unit)

    @optims([SINKGD, ADAMW], dtypes=[torch.float32])
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
                # where tensors share a step, the roundings of the coarsest are in all
                unit = max(torch.finfo(ours.dtype).eps, 1e-3 if optim_info in COUPLED else 0.0)
                self.assertEqual(ours, theirs, rtol=5 * unit, atol=5 * unit)
                self.assertEqual(state, other, rtol=5 * max(unit, 1e-6), atol=5 * max(unit, 1e-6))

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


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    instantiate_device_type_tests(GenericOptimizerTests, globals(), only_for="cpu")

# pytest would collect what is shared, and the template if torch left it, beside what was made from it
del GenericTestCase
globals().pop("GenericOptimizerTests", None)
