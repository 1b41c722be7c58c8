"""Settings of groups: names, options of torch's optimizers, and numbers as tensors, which a CUDA graph reads anew."""

import pytest
import torch

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD

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
@pytest.mark.parametrize("option", ["capturable", "differentiable", "amsgrad"])
def test_options_of_torch_are_refused_where_they_would_be_ignored(name, option):
    params = list(torch.nn.Linear(3, 3).parameters())
    with pytest.raises(ValueError, match=f"{name}: a group has {option}=True.*leave it out"):
        CLASSES[name]([{"params": params, option: True}])
    CLASSES[name]([{"params": params, option: False}])
    with pytest.raises(TypeError, match=option):
        CLASSES[name](params, **{option: True})


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
