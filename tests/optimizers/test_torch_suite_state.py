"""The generic tests that torch runs over its own optimizers: state dicts, hooks and copies. See test_torch_suite.py."""

import copy
import pickle
import tempfile
import warnings

import pytest
import torch
from torch.optim import AdamW
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import optims
from torch.testing._internal.common_utils import parametrize
from torch_suite import INFOS, SINKGD, STEPS, GenericTestCase, all_inputs, problem

# notes on how bare parameters are routed, wanted once by users and not by every test here
pytestmark = [
    pytest.mark.filterwarnings("ignore:(SinkGD|LANTON). .* taken as (hidden )?matrices"),
    pytest.mark.sample(16),
]


class GenericStateTests(GenericTestCase):
    """One test a promise; each runs for every optimizer and every configuration of it."""

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
            if names_to == "named" and item.kwargs.get("scope") == "layer":
                # without names every parameter had a window of its own; with them a module has one
                with self.assertRaisesRegex(ValueError, "saved with names"):
                    target.load_state_dict(source.state_dict())
                continue
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
    instantiate_device_type_tests(GenericStateTests, globals(), only_for="cpu")

# pytest would collect what is shared, and the template if torch left it, beside what was made from it
del GenericTestCase
globals().pop("GenericStateTests", None)
