"""Options of earlier versions: each is refused with what to write instead, and states with their defaults load."""

import copy
import re

import pytest
import torch
from torch import nn

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD, create, from_parameters
from leanstep.optimizers.common.checks import REMOVED
from leanstep.recipes.config import loader

CLASSES = {cls.__name__: cls for cls in (LANTON, MFAC, Lion, SinkGD)}
OPTIONS = [(name, option) for name, options in REMOVED.items() for option in options if "=" not in option]
FP16 = REMOVED["MFAC"]["storage='fp16'"]
# every group of an earlier version had these
DEFAULTS = {
    "LANTON": {"grouping": "norm", "ns_steps": 5, "ns_dtype": None},
    "MFAC": {"damping_schedule": None, "max_update_norm": None, "rank": 4, "shard_window": False, "masks": None},
    "SinkGD": {"row_mask_tau": 0.0, "clip_threshold": None},
}  # fmt: skip


def built(name):
    options = {"window": 3, "damping": 0.1} if name == "MFAC" else {}
    params = [(f"layer.{key}", nn.Parameter(torch.ones(shape))) for key, shape in (("weight", (4, 3)), ("bias", (4,)))]
    key, kinds = {"LANTON": ("norm", ("rms", "vector")), "SinkGD": ("algorithm", ("balanced", "adamw"))}.get(
        name, ("name", ("weights", "biases"))
    )
    groups = [{"params": [param], key: kind} for param, kind in zip(params, kinds, strict=True)]
    return CLASSES[name](groups, lr=0.1, **options)


def step(optimizer, count):
    for number in range(count):
        chance = torch.Generator().manual_seed(number)
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            param.grad = torch.randn(param.shape, generator=chance)
        optimizer.step()


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=" ".join)
def test_a_removed_option_says_what_to_write_instead(name, option):
    message = re.escape(f"{option} was removed: {REMOVED[name][option].instead}")
    weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(TypeError, match=message):
        CLASSES[name]([weight], **{option: 1})
    with pytest.raises(TypeError, match=f"{message}.*not added"):
        CLASSES[name]([{"params": [weight], option: 1}])
    with pytest.raises(TypeError, match=message):
        create(nn.Linear(2, 3), name.lower(), say=None, **{option: 1})
    with pytest.raises(TypeError, match=message):
        from_parameters([weight], name.lower(), vocab_size=0, **{option: 1})


def test_a_recipe_with_removed_options_says_what_to_write_instead(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for name, options in REMOVED.items():
        parts = [option.partition("=") for option in options]
        given = "".join(f"    {option}: {value or 1}\n" for option, _, value in parts)
        group = f"    - role: embedding\n      {next(iter(options))}: 1\n"
        recipe.write_text(
            f"base: gpt-nano-adamw\noptimizer:\n  name: {name.lower()}\n  args:\n{given}  groups:\n{group}",
            encoding="utf-8",
        )
        with pytest.raises(loader.ConfigError) as refused:
            loader.load(str(recipe))
        for option, entry in options.items():
            assert f"{option} was removed: {entry.instead}" in str(refused.value)
        assert str(refused.value).count(f"{next(iter(options))} was removed") == 2  # and in the group


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_state_of_an_earlier_version_goes_on_bit_for_bit(name):
    optimizer, resumed = built(name), built(name)
    step(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        assert DEFAULTS[name].keys() & group.keys() <= {"masks"}  # an entry of sparse groups
        group.update(DEFAULTS[name])
        if group.get("algorithm") == "balanced":
            group["row_mask_tau"] = 1e-3  # as param_groups set it
    for mine, other in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        for param, value in zip(mine["params"], other["params"], strict=True):
            param.data.copy_(value.data)
    resumed.load_state_dict(saved)
    assert all(DEFAULTS[name].keys() & group.keys() <= {"masks"} for group in resumed.param_groups)
    for each in (optimizer, resumed):
        step(each, 4)
    for mine, other in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(mine["params"], other["params"], strict=True))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("LANTON", "grouping", "role"), ("LANTON", "ns_steps", 6), ("LANTON", "ns_dtype", "float32"),
        ("SinkGD", "row_mask_tau", 0.1), ("SinkGD", "row_mask_tau", 1e-3), ("SinkGD", "clip_threshold", 1.0),
        ("MFAC", "damping_schedule", ["linear", 10, 0.1]), ("MFAC", "max_update_norm", 1.0),
        ("MFAC", "shard_window", True), ("MFAC", "masks", [torch.ones(4, dtype=torch.bool)]),
    ],
)  # fmt: skip
def test_a_state_that_used_a_removed_option_is_refused(name, option, value):
    optimizer = built(name)
    step(optimizer, 2)
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][option] = value
    with pytest.raises(ValueError, match=re.escape(f"saved with {option}={value!r}, which no longer exists")):
        optimizer.load_state_dict(saved)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


@pytest.mark.parametrize("scope", ["model", "layer", 5])
def test_a_window_in_fp16_goes_on_as_the_same_rows_in_fp32(scope):
    def grown(count):
        weights = {f"layer{i}.weight": nn.Parameter(torch.ones(shape)) for i, shape in enumerate(((4, 3), (2, 6)))}
        optimizer = MFAC(list(weights.items()), lr=0.1, window=3, damping=0.1, scope=scope)
        for number in range(count):
            chance = torch.Generator().manual_seed(number)
            for weight in weights.values():
                weight.grad = torch.randint(-9, 9, weight.shape, generator=chance).float()
            optimizer.step()
        return list(weights.values()), optimizer

    with pytest.raises(ValueError, match=re.escape(f"MFAC: storage='fp16' was removed: {FP16.instead}")):
        MFAC([nn.Parameter(torch.ones(2))], storage="fp16")
    (weights, optimizer), (_, resumed) = grown(5), grown(0)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["storage"] = "fp16"
    holders = [state for state in saved["state"].values() if "gram" in state]
    for number, state in enumerate(saved["state"].values()):
        blocks = len(state.get("gram", holders[0]["gram"]))
        scales = 2.0 ** (torch.arange(3 * blocks).view(blocks, 3) - (0 if scope == "model" else number))
        if "gram" in state:
            state["window_scale"] = scales
        of_entries = scales.repeat_interleave(5 if scope == 5 else 12, dim=0)[:12].T.reshape(state["window"].shape)
        state["window"] = (state["window"] / of_entries).half()
    resumed.load_state_dict(copy.deepcopy(saved))
    for param, weight in zip(resumed.param_groups[0]["params"], weights, strict=True):
        assert torch.equal(resumed.state[param]["window"], optimizer.state[weight]["window"])
    torch.testing.assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert resumed.param_groups[0]["storage"] is None
    for state in holders:
        del state["window_scale"]
    with pytest.raises(ValueError, match="need their window_scale, which torch.distributed.checkpoint leaves out"):
        resumed.load_state_dict(saved)
