"""What holds for every declared step: schema, fake and versions, any layout, shards, empty lists, refused scales."""

import itertools

import pytest
import torch
from kernel_cases import normal, rounding_states

from leanstep.kernels import StepOptions, use_backend
from leanstep.kernels.reference.quantization import quantize
from leanstep.kernels.steps import adamw_int8, average_int8  # noqa: F401  registers their ops

LION = (0.01, 0.999, 0.9, 0.1, 0.99, 0.01)
# the rule's numbers, and the arguments that are neither lists nor options
STEPS = {
    "lion_step": (LION, {}),
    "lion_agreement": (LION, {}),
    "lion_step_int8": (LION, {}),
    "lion_agreement_int8": (LION, {}),
    "adamw_step_int8": ((0.999, 0.9, 0.1, 0.999, 0.001, 1e-8), {"corrections": torch.tensor([[1e-3, 2.0]])}),
    "average_step_int8": ((0.9, 0.1), {"skip": None, "nesterov": True, "update": True}),
    "scaled_step": ((1e-2, 0.999), {}),
}
SHAPE = (65, 77)
BACKENDS = ["reference", "cpp"]


def operation(name):
    return getattr(torch.ops.leanstep, name).default


def arguments(name, shape=SHAPE, dtype=torch.bfloat16, rounding="nearest"):
    """By name, each list with one tensor."""
    scalars, extras = STEPS[name]
    moment = normal(shape, seed=3)
    codes, squares = quantize(moment, 4), quantize(moment.square(), 4, dtype=torch.uint8)
    values = {
        **{"params": normal(shape, dtype, 1), "grads": normal(shape, dtype, 2), "mats": normal(shape, dtype, 2)},
        **{"codes": codes[0], "scales": codes[1], "square_codes": squares[0], "square_scales": squares[1]},
        **{"exp_avgs": moment, "outputs": torch.empty(shape), "rows": moment[:, 0].exp(), "cols": moment[0].exp()},
    }
    lists = {key: [value] for key, value in values.items()}
    lists["rounding_state"] = rounding_states(lists["params"], rounding)
    seeds, offsets = torch.tensor([3]), torch.tensor([0])
    options = StepOptions(torch.tensor(scalars), rounding, seeds=seeds, offsets=offsets)
    given = lists | options._asdict() | extras
    return {argument.name: given[argument.name] for argument in operation(name)._schema.arguments}


def written(name, values):
    """The tensors that a step writes, list by list."""
    marked = [a.name for a in operation(name)._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [values[key] for key in marked]


def changes(name, values):
    """The tensors that a step has written, beside what they were."""
    return [
        (ts[0], old[0]) for ts, old in zip(written(name, values), written(name, arguments(name)), strict=True) if ts
    ]


ROUNDED = [name for name in STEPS if "rounding" in arguments(name)]


@pytest.mark.parametrize(
    ("name", "rounding"), [*itertools.product(STEPS, ["nearest"]), *itertools.product(ROUNDED, ["stochastic", "kahan"])]
)
def test_opcheck(name, rounding):
    values = arguments(name, (3, 5), rounding=rounding)
    if "runs" in values and rounding == "stochastic":
        values["runs"] = torch.tensor([[5, 7, 3, 0]])
    torch.library.opcheck(operation(name), tuple(values.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", STEPS)
def test_layouts(name, backend):
    """Transposed, strided and unaligned tensors, alike and mixed, give what contiguous ones give."""

    def transposed(t):
        return t.t().contiguous().t()

    def strided(t):
        return t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)

    def unaligned(t):
        return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)

    whole = arguments(name)
    with use_backend(backend):
        result = operation(name)(*whole.values())
        assert all(not torch.equal(*pair) for pair in changes(name, whole))
        for kinds in ([transposed], [strided], [unaligned], [transposed, unaligned, strided]):
            odd, kind = arguments(name), itertools.cycle(kinds)
            for ts in [ts for ts in odd.values() if isinstance(ts, list) and ts]:
                ts[0] = next(kind)(ts[0])
            other = operation(name)(*odd.values())
            assert result is other or torch.equal(result, other)
            for one, other in zip(written(name, whole), written(name, odd), strict=True):
                assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in STEPS if "agreement" not in name])
def test_shards_step_as_the_whole(name, backend):
    """Rows of a tensor with the offset of their first entry, bit for bit."""
    whole, parts = arguments(name, rounding="stochastic"), arguments(name, rounding="stochastic")
    cuts = ((0, 22), (22, 44), (44, 65))
    for key, ts in parts.items():
        if isinstance(ts, list) and ts:
            parts[key] = [ts[0].clone() if key == "cols" else ts[0][a:b].clone() for a, b in cuts]
    parts |= {
        key: parts[key].expand(3, *parts[key].shape[1:]).clone() for key in ("seeds", "corrections") if key in parts
    }
    parts["offsets"] = torch.tensor([a for a, _ in cuts]) * SHAPE[1]
    with use_backend(backend):
        for values in (whole, parts):
            operation(name)(*values.values())
    for one, several in zip(written(name, whole), written(name, parts), strict=True):
        assert not one or torch.equal(torch.cat(several), one[0])


@pytest.mark.parametrize("name", STEPS)
def test_empty_lists_and_scales_of_another_shape(name):
    values = arguments(name)
    result = operation(name)(*({**values, **{key: [] for key, ts in values.items() if isinstance(ts, list)}}.values()))
    assert result is None or result.numel() == 0
    for key in [key for key in values if key.endswith("scales")]:
        wrong = {**values, key: [torch.ones(65, 2)]}
        with pytest.raises(ValueError, match=rf"{name}: expected scales of shape \(65, 1\) for codes of \(65, 77\)"):
            operation(name)(*wrong.values())
