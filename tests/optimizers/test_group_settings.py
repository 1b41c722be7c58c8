"""Settings of groups: names, options of torch's optimizers, and numbers as tensors, which a CUDA graph reads anew."""

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, create, release_gradients
from leanstep.optimizers.common.saved_tensors import StateRule
from leanstep.optimizers.common.sharding import new_vectors
from leanstep.optimizers.common.state import Entry

pytestmark = pytest.mark.filterwarnings("ignore:(SinkGD|LANTON). .* taken as")

CLASSES = {"Lion": Lion, "SinkGD": SinkGD, "LANTON": LANTON, "MFAC": MFAC}
every_class = pytest.mark.parametrize("name", CLASSES)
VARIANTS = {
    "Lion": (Lion, {}),
    "SinkGD": (SinkGD, {}),
    "SinkGD, momentum": (SinkGD, {"momentum": 0.9}),
    "SinkGD, matrices": (SinkGD, {}),
    "SinkGD, matrices, momentum": (SinkGD, {"momentum": 0.9}),
    "SinkGD, matrices, balanced": (SinkGD, {"momentum": 0.9, "algorithm": "balanced"}),
    "SinkGD, AdamW": (SinkGD, {"algorithm": "adamw", "fused": False}),
    "SinkGD, fused AdamW": (SinkGD, {"algorithm": "adamw", "fused": True}),
    "LANTON": (LANTON, {}),
    "MFAC": (MFAC, {"window": 3}),
    "MFAC, coupled": (MFAC, {"window": 3, "decay": "coupled"}),
}


@every_class
def test_a_group_without_names_after_one_with_names_is_refused_with_advice(name):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    for had, gets, form in (
        (first.named_parameters, second.parameters, "expected .name, parameter. pairs, as model.named_parameters"),
        (first.parameters, second.named_parameters, "expected parameters without names"),
    ):
        optimizer = CLASSES[name](list(had()))
        with pytest.raises(ValueError, match=f"{name}: .*{form}.* in group 'late'.*not added"):
            optimizer.add_param_group({"params": list(gets()), "name": "late"})
        assert len(optimizer.param_groups) == 1


@every_class
def test_switches_of_torch_are_taken_at_its_defaults_and_refused_where_they_would_be_ignored(name):
    """Where AdamW(..., fused=True) stood."""
    model = torch.nn.Linear(3, 3)
    defaults = {"amsgrad": False, "capturable": False, "differentiable": False, "maximize": False, "foreach": None}
    for fused in (True, None, False):
        optimizer = CLASSES[name](model.parameters(), fused=fused, **defaults)
        assert optimizer.defaults.keys() == CLASSES[name](model.parameters()).defaults.keys()
        create(model, name.lower(), say=None, fused=fused, **defaults)
    for option, value in (("capturable", True), ("differentiable", True), ("amsgrad", True), ("fused", "yes")):
        if (name, option) == ("SinkGD", "fused"):  # an option of its own
            continue
        for refused in (
            lambda option=option, value=value: CLASSES[name](model.parameters(), **{option: value}),
            lambda option=option, value=value: CLASSES[name]([{"params": model.parameters(), option: value}]),
            lambda option=option, value=value: create(model, name.lower(), say=None, **{option: value}),
        ):
            with pytest.raises(ValueError, match=f"{name}.*{option}={value!r}.*leave it out, or give .*False"):
                refused()
    CLASSES[name]([{"params": model.parameters(), "amsgrad": False}])


@pytest.mark.parametrize(
    ("name", "option", "advice"),
    [
        ("Lion", "state_dtype", "take momentum_dtype"),
        ("SinkGD", "state_dtype", "take momentum_dtype"),
        ("LANTON", "state_dtype", "take momentum_dtype or noise_dtype"),
        ("MFAC", "state_dtype", "take storage"),
        ("Lion", "beta1", "take betas"),
        ("SinkGD", "momentum_dtyp", "take momentum_dtype"),
        ("LANTON", "blocs", "take blocks"),
        ("MFAC", "windows", "take window"),
        ("Lion", "xyz", "it has betas"),
        ("MFAC", "learning_rate", "take lr;"),
    ],
)
def test_an_unknown_option_is_refused_in_one_line_that_names_the_nearest(name, option, advice):
    model = torch.nn.Linear(3, 3)
    message = f"{name} has no option {option}; .*{advice}"
    for refused in (
        lambda: CLASSES[name](model.parameters(), **{option: "int8"}),
        lambda: create(model, name.lower(), say=None, **{option: "int8"}),
    ):
        with pytest.raises(TypeError, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)


@every_class
def test_a_group_with_the_state_dtype_of_others_is_refused(name):
    first, late = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    optimizer = CLASSES[name](first.parameters())
    with pytest.raises(TypeError, match=f"{name} has no option state_dtype; take .*not added"):
        optimizer.add_param_group({"params": list(late.parameters()), "state_dtype": "int8"})
    with pytest.raises(ValueError, match=f"{name}: expected 'params' in a group, got only 'lr'.*not added"):
        optimizer.add_param_group({"lr": 1.0})
    assert len(optimizer.param_groups) == 1


@every_class
def test_the_constructor_keeps_its_signature(name):
    parameters = inspect.signature(CLASSES[name]).parameters
    assert {"params", "lr", "weight_decay", "rounding"} <= parameters.keys()
    dtypes = [p.annotation for key, p in parameters.items() if key.endswith("_dtype")]  # also by name: "fp8"
    assert set(dtypes) <= {"torch.dtype | str | None"}

    class Subclass(CLASSES[name]):
        def __init__(self, params, extra, **options):
            super().__init__(params, **options)
            self.extra = extra

    params = list(torch.nn.Linear(3, 3).parameters())
    assert Subclass(params, extra=2, lr=1e-3).extra == 2
    with pytest.raises(TypeError, match=f"{name} has no option lrs; take lr"):
        Subclass(params, extra=2, lrs=1e-3)


# settings that no step can use -> the classes that have them
WRONG = [
    ("lr", math.nan, tuple(CLASSES)),
    ("lr", "1e-3", tuple(CLASSES)),
    ("lr", torch.ones(2), tuple(CLASSES)),
    ("weight_decay", "x", tuple(CLASSES)),
    ("weight_decay", -1.0, tuple(CLASSES)),
    ("rounding", "up", tuple(CLASSES)),
    ("seed", -1, tuple(CLASSES)),
    ("nonfinite", "ignore", tuple(CLASSES)),
    ("maximize", "no", tuple(CLASSES)),
    ("betas", (0.9, 1.0), ("Lion", "SinkGD", "LANTON")),
    ("momentum_dtype", "int4", ("Lion", "SinkGD", "LANTON")),
    ("blocks", (2, 3), ("SinkGD", "LANTON")),
    ("algorithm", "muon", ("SinkGD",)),
    ("momentum", 1.0, ("SinkGD", "MFAC")),
    ("num_iters", 0, ("SinkGD",)),
    ("nesterov", True, ("SinkGD",)),
    ("spectral", "mup", ("SinkGD",)),
    ("norm", "l7", ("LANTON",)),
    ("variance", "columns", ("LANTON",)),
    ("noise_dtype", "int4", ("LANTON",)),
    ("scope", "x", ("MFAC",)),
    ("storage", "int8", ("MFAC",)),
    ("damping", 0.0, ("MFAC",)),
    ("cautious", 1, ("Lion",)),
]


def values_of(optimizer):
    """Copies of the parameters and of all state."""
    state = {i: dict(entries) for i, entries in enumerate(optimizer.state.values())}
    return copy.deepcopy(([p.detach() for group in optimizer.param_groups for p in group["params"]], state))


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for key, value, names in WRONG for name in names],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_a_group_that_is_changed_to_what_no_step_can_use_is_refused_before_the_step(name, key, value):
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = CLASSES[name]([{"params": params[:1]}, {"params": params[1:], "name": "second"}])
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(4, 3)
        optimizer.step()
    before = values_of(optimizer)
    first, second = optimizer.param_groups
    first["weight_decay"] = 0.5  # a change that is right does not hide the wrong one
    right, second[key] = second[key], value
    for _ in range(2):  # every step, not the first one alone
        with pytest.raises((ValueError, TypeError), match="(?=.*second)(?=.*nothing was updated)") as caught:
            optimizer.step()
        assert "\n" not in str(caught.value)
        torch.testing.assert_close(values_of(optimizer), before, rtol=0, atol=0)
    second[key] = right
    optimizer.step()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(values_of(optimizer)[0], before[0], rtol=0, atol=0)


def test_a_changed_group_is_checked_before_a_released_gradient_updates():
    model = torch.nn.Linear(4, 3)
    optimizer = Lion(model.parameters(), lr=1e-2)
    release_gradients(model, optimizer)
    optimizer.param_groups[0]["betas"] = (2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="beta parameter at index 0: 2"):
        model(torch.randn(2, 4)).sum().backward()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@every_class
def test_a_rate_that_a_scheduler_rounds_below_zero_and_copied_and_loaded_optimizers_step(name):
    param = torch.nn.Parameter(torch.ones(4, 3))
    param.grad = torch.ones(4, 3)
    optimizer = CLASSES[name]([param])
    optimizer.param_groups[0]["lr"] = -1e-20
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    twin.step()
    twin.param_groups[0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match="weight_decay.*nothing was updated"):
        twin.step()


@every_class
def test_numbers_of_numpy_are_numbers(name):
    number = pytest.importorskip("numpy").float32(0.125)
    param = torch.nn.Parameter(torch.ones(4, 3))
    keys = {"scale", "momentum", "eps", "alpha", "radius", "damping", "shrinkage"}
    options = dict.fromkeys(keys & inspect.signature(CLASSES[name]).parameters.keys(), number)
    optimizer = CLASSES[name]([param], lr=number, weight_decay=number, **options)
    twin = CLASSES[name]([copy.deepcopy(param)], lr=0.125, weight_decay=0.125, **dict.fromkeys(options, 0.125))
    for each in (optimizer, twin):
        each.param_groups[0]["params"][0].grad = torch.ones(4, 3)
        each.step()
    torch.testing.assert_close(values_of(optimizer), values_of(twin), rtol=0, atol=0)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.param_groups[0]["lr"] == number


def trained(variant, lr, weight_decay, device="cpu", steps=4, capture=False):
    """The parameters after steps whose rate and decay change; a captured step is replayed for all but the first two."""
    cls, options = VARIANTS[variant]
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4, bias="matrices" not in variant).to(device)
    optimizer = cls(model.parameters(), lr=lr, weight_decay=weight_decay, **options)
    (group,) = optimizer.param_groups
    data = torch.randn(steps, 8, 5, generator=torch.Generator().manual_seed(1)).to(device)
    step = optimizer.step
    for i in range(steps):
        for key, value in (("lr", 1e-2 / (1 + i)), ("weight_decay", 0.1 * (1 + i))):
            if isinstance(group[key], torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
        optimizer.zero_grad(set_to_none=False)
        model(data[i]).square().mean().backward()
        if capture and i == 2:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rate_and_decay_as_tensors_are_the_numbers(variant, shape):
    numbers = trained(variant, 1e-2, 0.1)
    tensors = trained(variant, torch.full(shape, 1e-2), torch.full(shape, 0.1))
    torch.testing.assert_close(tensors, numbers, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["Lion", "LANTON", *(name for name in VARIANTS if "SinkGD, matrices" in name)])
def test_a_captured_step_reads_rate_and_decay_anew(variant):
    """docs/gpu.md: the tensors of a graph are read at each replay."""
    device = torch.device("cuda")
    captured = trained(variant, *(torch.tensor(v, device=device) for v in (1e-2, 0.1)), device, 6, capture=True)
    eager = trained(variant, 1e-2, 0.1, device, 6)
    torch.testing.assert_close(captured, eager, rtol=1e-6, atol=1e-7)


def test_the_row_of_a_state_that_contributors_are_shown_is_all_that_a_tensor_needs():
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    example = page.split('while `group["columns"]` is true:\n\n```python\n')[1].split("```")[0]
    names = {"torch": torch, "Entry": Entry, "StateRule": StateRule, "new_vectors": new_vectors}
    exec(example, names)
    shown = type("Shown", (Lion,), {"_state_entries": names["_state_entries"]})
    matrix, scalar = (torch.ones(shape, requires_grad=True) for shape in ((4, 130), ()))
    matrix.grad, scalar.grad = torch.ones(4, 130), torch.ones(())
    groups = [{"params": [matrix, scalar], "columns": True}]
    first, second = shown(groups, momentum_dtype="int8"), shown(groups)
    first.step()
    assert first.state[matrix]["column_rms"].shape == (130,) and first.state[matrix]["exp_avg_scale"].shape == (4, 2)
    assert first.state[scalar].keys() == {"exp_avg"}
    saved = first.state_dict()
    second.load_state_dict(saved)
    assert second.state[matrix].keys() == first.state[matrix].keys()
    lost, damaged, other = (copy.deepcopy(saved) for _ in range(3))
    del lost["state"][0]["column_rms"]
    damaged["state"][0]["column_rms"][5] = -1.0
    other["state"][0]["column_rms"] = torch.ones(4)
    for state, said in ((lost, "has no column_rms"), (damaged, "'column_rms'.*got -1"), (other, "expected shape .130")):
        with pytest.raises(ValueError, match=f"{said}.*nothing was changed"):
            second.load_state_dict(state)
    lost["param_groups"][0]["columns"] = False
    second.load_state_dict(lost)
