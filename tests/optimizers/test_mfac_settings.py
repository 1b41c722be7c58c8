"""What M-FAC refuses, with words that help, and what it saves and loads."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dense_fisher import new_params, set_grads
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from leanstep.optimizers import MFAC
from leanstep.optimizers.mfac import memory

SHAPES = ((4, 3), (5,))


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"window": 0}, ValueError, "Invalid window: 0.*at least 1"),
        ({"window": -3}, ValueError, "Invalid window: -3"),
        ({"window": 2.5}, TypeError, "window must be an int, got 2.5"),
        ({"damping": 0.0}, ValueError, "Invalid damping: 0.*greater than 0"),
        ({"damping": -1e-5}, ValueError, "Invalid damping: -1e-05"),
        ({"damping": float("nan")}, ValueError, "Invalid damping: nan"),
        ({"damping": torch.tensor(0.1)}, TypeError, "damping must be a number"),
        ({"scaling": "rows"}, ValueError, "Invalid scaling: 'rows'.*window.*count"),
        ({"scope": "tensor"}, ValueError, "Invalid scope: 'tensor'.*model.*layer"),
        ({"scope": 0}, ValueError, "Invalid scope: 0"),
        ({"storage": "int8"}, ValueError, "Invalid storage: 'int8'.*bf16"),
        ({"compression": "random"}, ValueError, "Invalid compression: 'random'.*topk"),
        ({"compression": "lowrank"}, ValueError, "Invalid compression: 'lowrank'.*topk"),
        ({"density": 0.0}, ValueError, "Invalid density: 0"),
        ({"density": 1.5}, ValueError, "Invalid density: 1.5"),
        ({"momentum": 1.0}, ValueError, "Invalid momentum value: 1.0"),
        ({"decay": "l2"}, ValueError, "Invalid decay: 'l2'"),
        ({"density": torch.tensor(0.5)}, TypeError, "density must be a number"),
        ({"shrinkage": -1.0}, ValueError, "Invalid shrinkage: -1"),
        ({"compression": "topk", "scope": 7}, ValueError, "scope=7.*uncompressed rows"),
        ({"sparse": "yes"}, TypeError, "sparse must be True or False"),
    ],
)  # fmt: skip
def test_settings_out_of_range(bad, kind, message):
    with pytest.raises(kind, match=message):
        MFAC(new_params(SHAPES), **{"lr": 0.1, "window": 8, **bad})


def test_saved_masks_must_fit():
    params = new_params(SHAPES)
    optimizer = MFAC([{"params": params}], window=2, sparse=True)
    saved = optimizer.state_dict()
    for masks, said in (
        ([None], "one entry per parameter"),
        ([None, torch.ones(4, dtype=torch.bool)], "parameter 1.*must be a bool tensor of its shape"),
        ([None, torch.ones(5)], "parameter 1.*got .5,. of torch.float32"),
    ):
        saved["param_groups"][0]["masks"] = masks
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("saved_and_loaded", [False, True])
def test_excluded_weights_never_change_also_after_the_state_is_dropped(saved_and_loaded):
    params = new_params(SHAPES)
    with torch.no_grad():
        params[0][:, 1] = 0.0
        params[1][[1, 4]] = 0.0
    settings = {"lr": 0.1, "window": 2, "damping": 0.1, "weight_decay": 0.1, "decay": "coupled", "sparse": True}
    optimizer = MFAC(params, **settings)
    early, masks = optimizer.state_dict(), [p != 0 for p in params]
    assert all(torch.equal(*pair) for pair in zip(early["param_groups"][0]["masks"], masks, strict=True))
    before = [p.detach().clone() for p in params]
    set_grads(params, 0)
    optimizer.step()
    if saved_and_loaded:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = MFAC(params, **settings)
        optimizer.load_state_dict(torch.load(file))
    assert optimizer.state_dict()["param_groups"][0]["masks"] == [None, None]  # saved once, in the states
    optimizer.state.clear()
    for step in range(1, 3):
        set_grads(params, step)
        optimizer.step()
    for param, start, mask in zip(params, before, masks, strict=True):
        assert torch.equal(param != start, mask)


def test_groups_of_one_window_must_agree():
    params = new_params(SHAPES)
    with pytest.raises(ValueError, match="share a window .scope='model'. need one damping, got 1e-05 and 0.001"):
        MFAC([{"params": params[:1]}, {"params": params[1:], "damping": 1e-3}], window=4)
    apart = MFAC(
        [{"params": params[:1]}, {"params": params[1:], "damping": 1e-3, "window": 2}], window=4, scope="group"
    )
    set_grads(params, 0)
    apart.step()
    assert [apart.state[p]["window"].shape[0] for p in params] == [4, 2]
    optimizer = MFAC(params[:1], window=4)
    with pytest.raises(ValueError, match="need one window, got 4 and 2"):
        optimizer.add_param_group({"params": params[1:], "window": 2})
    assert len(optimizer.param_groups) == 1


# ---- memory


def test_a_window_that_the_device_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 2**30)
    param = torch.zeros(1000, 1100, requires_grad=True)
    with pytest.raises(ValueError) as error:
        MFAC([param], window=1024)
    text = str(error.value)
    needed = 1024 * 1_100_000 * 4 + 8 * 1024**2
    assert f"a window of 1024 gradients of 1,100,000 parameters takes {needed / 2**30:.1f} GiB on cpu" in text
    assert "has 2.0 GiB left" in text
    assert f"storage='bf16' takes {(needed - 1024 * 2_200_000) / 2**30:.1f} GiB" in text
    assert "compression='topk' takes" in text and "window=128 takes" in text and "fully_shard divides it" in text
    for smaller in ({"compression": "topk"}, {"window": 128}):
        MFAC([param], **{"window": 1024, **smaller})
    # the processes of a machine share its memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="has 0.2 GiB left"):
        MFAC([param], window=128)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 2**30)
    with pytest.raises(ValueError, match="scope='model' takes"):
        MFAC([torch.zeros(3, requires_grad=True) for _ in range(400)], window=1024, scope="layer")


@pytest.mark.parametrize(
    "options",
    [
        {}, {"storage": "bf16"}, {"scope": 7}, {"compression": "topk", "density": 0.2}, {"scope": "layer"},
    ],
)  # fmt: skip
def test_the_memory_that_is_announced_is_the_memory_that_is_held(options):
    params = new_params(((6, 20), (5,), (), (3, 4, 2, 2), (2, 3, 10)), torch.float32)
    optimizer = MFAC(params, window=6, **options)
    announced = memory.needed_bytes(optimizer.param_groups)
    set_grads(params, 0)
    optimizer.step()
    on_the_host = sum(s["counters"].nbytes for s in optimizer.state.values() if "counters" in s)
    assert announced == {torch.device("cpu"): optimizer.state_bytes() - on_the_host}


def test_adding_a_group_counts_what_is_held_already(monkeypatch):
    params = [torch.zeros(100, 100, requires_grad=True) for _ in range(2)]
    optimizer = MFAC(params[:1], window=10)
    params[0].grad = torch.ones(100, 100)
    optimizer.step()
    monkeypatch.setattr(memory, "free_memory", lambda device: 500_000)  # for one more window of 400 000 bytes
    optimizer.add_param_group({"params": params[1:]})
    monkeypatch.setattr(memory, "free_memory", lambda device: 300_000)
    with pytest.raises(ValueError, match="window of 10 gradients"):
        optimizer.add_param_group({"params": [torch.zeros(100, 100, requires_grad=True)]})
    assert len(optimizer.param_groups) == 2


# ---- saving and loading


def trained(options=None, shapes=SHAPES, names=("a", "b"), steps=3):
    params = new_params(shapes, torch.float32)
    optimizer = MFAC(list(zip(names, params, strict=True)), lr=0.1, **{"window": 2, "damping": 0.1, **(options or {})})
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("options", "shapes", "names", "message"),
    [
        ({"window": 3}, SHAPES, ("a", "b"), "saved with window=2, here it is 3"),
        ({"scope": "layer"}, SHAPES, ("a", "b"), "saved with scope='model', here it is 'layer'"),
        ({"storage": "bf16"}, SHAPES, ("a", "b"), "saved with storage=None, here it is 'bf16'"),
        ({"compression": "topk"}, SHAPES, ("a", "b"), "saved with compression=None, here it is 'topk'"),
        ({}, SHAPES, ("b", "a"), "parameters in another order .'a' where 'b' is here."),
        ({}, SHAPES, ("a", "c"), "'b' where 'c' is here"),
        (
            {},
            ((3, 4), (5,)),
            ("a", "b"),
            "'window' of the state of a .3, 4.: expected shape .2, 3, 4., got .2, 4, 3.; are the parameters",
        ),
    ],
)
def test_another_window_or_other_parameters_are_refused_and_nothing_changes(options, shapes, names, message):
    _, source = trained()
    params, optimizer = trained(options, shapes, names)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"MFAC: .*{message}.*nothing was changed"):
        optimizer.load_state_dict(source.state_dict())
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][number][key])


def test_another_order_without_names_is_seen_by_the_shapes():
    params, swapped = new_params(SHAPES), new_params(SHAPES[::-1])
    source, optimizer = MFAC(params, window=2), MFAC(swapped, window=2)
    set_grads(params, 0)
    source.step()
    with pytest.raises(
        ValueError,
        match="'window' of the state of parameter 0 .*: expected shape .2, 5., got .2, 4, 3.; .* in the order",
    ):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    "options",
    [
        {}, {"storage": "bf16"}, {"compression": "topk", "density": 0.4}, {"scope": 5}, {"momentum": 0.9},
        {"sparse": True},
    ],
)  # fmt: skip
def test_ten_steps_after_loading_are_the_same_bit_for_bit(options):
    """From the middle of the ring, and through it three times."""
    params, optimizer = trained({"window": 4, **options}, steps=6)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = MFAC(list(zip("ab", twins, strict=True)), lr=1.0, **{"window": 4, "damping": 0.1, **options})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(6, 16):
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        resumed.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert optimizer.diagnostics() == resumed.diagnostics()


OLD_NAMES = {"stats": "figures", "counters": "counts"}
OLD_SETTINGS = {
    "momentum_on": "update", "precondition": "row", "precondition_every": 1, "window_every": 1, "warmup_steps": 0,
}  # fmt: skip


def as_saved_by_an_older_version(state_dict, **settings):
    state_dict = copy.deepcopy(state_dict)
    for number, state in state_dict["state"].items():
        whole = {"counters": state["counters"].long()} if "counters" in state else {}
        state_dict["state"][number] = {OLD_NAMES.get(key, key): value for key, value in {**state, **whole}.items()}
    for group in state_dict["param_groups"]:
        group.update(OLD_SETTINGS | settings)
    return state_dict


def test_a_state_under_older_names_is_continued_bit_for_bit():
    params, optimizer = trained(steps=3)
    twins = [p.detach().clone().requires_grad_() for p in params]
    resumed = MFAC(list(zip("ab", twins, strict=True)), lr=1.0, window=2, damping=0.1)
    old = as_saved_by_an_older_version(optimizer.state_dict())
    kept = copy.deepcopy(old)
    resumed.load_state_dict(old)
    torch.testing.assert_close(old["state"], kept["state"], rtol=0, atol=0)  # the given dict is not changed
    assert old["param_groups"] == kept["param_groups"]
    state = resumed.state[twins[0]]
    assert not OLD_NAMES.keys() - state.keys() and not set(OLD_NAMES.values()) & state.keys()
    assert not OLD_SETTINGS.keys() & resumed.param_groups[0].keys()
    assert state["stats"].dtype == state["counters"].dtype == torch.float64 and state["counters"].device.type == "cpu"
    for step in range(3, 7):
        set_grads(params, step)
        set_grads(twins, step)
        optimizer.step()
        resumed.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_a_state_that_used_an_option_that_is_gone_is_refused():
    params, optimizer = trained(steps=3)
    old = as_saved_by_an_older_version(optimizer.state_dict(), window_every=2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="saved with window_every=2, which no longer exists .*nothing was changed"):
        optimizer.load_state_dict(old)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_the_first_trained_parameter_holds_the_gram_matrix():
    """Also before it has a gradient, and of a state where another one does."""
    keys = ["counters", "gram", "stats"]
    params = new_params(SHAPES)
    optimizer = MFAC(list(zip("ab", params, strict=True)), lr=1.0, window=2, damping=0.1)
    for step in range(2):
        set_grads(params, step)
        params[0].grad = None
        optimizer.step()
    assert sorted(optimizer.state[params[0]]) == keys and sorted(optimizer.state[params[1]]) == ["window"]
    saved = copy.deepcopy(optimizer.state_dict())
    older = copy.deepcopy(saved)
    older["state"][1] |= older["state"].pop(0)
    for state in (saved, older):
        twins = [p.detach().clone().requires_grad_() for p in params]
        resumed = MFAC(list(zip("ab", twins, strict=True)), lr=1.0, window=2, damping=0.1)
        resumed.load_state_dict(copy.deepcopy(state))
        copied = copy.deepcopy(optimizer)
        originals = copied.param_groups[0]["params"]
        for step in range(2, 5):
            for weights, each in ((originals, copied), (twins, resumed)):
                set_grads(weights, step)
                each.step()
            assert all(torch.equal(p, q) for p, q in zip(originals, twins, strict=True))
        assert sorted(resumed.state[twins[0]]) == [*keys, "window"] and list(resumed.state[twins[1]]) == ["window"]
        twins[0].requires_grad_(False)
        resumed.step()
        assert list(resumed.state[twins[0]]) == ["window"] and sorted(resumed.state[twins[1]]) == [*keys, "window"]


def test_saved_counters_are_where_the_gram_matrix_is():
    """torch.distributed.checkpoint loads no whole state with tensors of one or more dimensions on two devices."""
    params, optimizer = trained(steps=3)
    state = optimizer.state[params[0]]
    assert optimizer.state_dict()["state"][0]["counters"].tolist() == [3, 3]
    state["gram"] = state["gram"].to("meta")
    assert optimizer.state_dict()["state"][0]["counters"].device.type == "meta"
    assert state["counters"].tolist() == [3, 3]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("settings", [{"storage": "bf16"}, {"scope": 4}, {"momentum": 0.9}], ids=str)
def test_a_state_of_dense_rows_goes_into_one_file_of_safetensors(settings, tmp_path):
    """The writer that joins shards takes floating tensors alone."""
    model = torch.nn.Linear(3, 2)
    optimizer = MFAC(model.named_parameters(), lr=0.1, window=2, damping=0.1, **settings)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True, enable_consolidation=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    read = load_file(next(tmp_path.glob("*.safetensors")))
    torch.testing.assert_close(read, tensors, rtol=0, atol=0)


def test_diagnostics_are_flat_numbers():
    params, optimizer = trained(steps=0)
    assert optimizer.diagnostics()["window_rows"] == 0
    params, optimizer = trained(steps=3)
    figures = optimizer.diagnostics()
    assert all(isinstance(name, str) and type(value) is float for name, value in figures.items())
    assert figures["window_rows"] == 2 and figures["damping"] == 0.1
    assert figures["update_norm"] > 0 and figures["decrease"] > 0
    assert not optimizer.state[params[0]]["stats"][:, 2:4].any()  # of older states
    assert figures["jittered"] == figures["eigen"] == figures["nonfinite"] == 0


def _without_gram(states):
    for key in ("gram", "counters", "stats"):
        del states[0][key]


def _with_two_grams(states):
    states[1].update({key: states[0][key] for key in ("gram", "counters", "stats")})


def _without_counters(states):
    del states[0]["counters"]


def _with_negative_rows(states):
    states[0]["counters"][1] = -1


def _with_an_infinite_row(states):
    states[0]["window"][0, 0] = float("inf")


def _without_mask(states):
    del states[1]["mask"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_gram, "expected one Gram matrix for the window of a .*, got 0 .none."),
        (_with_two_grams, "expected one Gram matrix for the window of a .*, got 2 .a .*, b .*."),
        (_without_counters, "the saved state of a .* has no counters"),
        (_with_negative_rows, "'counters' of the state of a .*: expected whole numbers in .0, .*, got -1"),
        (_with_an_infinite_row, "'window' of the state of a .*: expected finite numbers"),
        (_without_mask, "the saved state of b .* has no mask, which sparse=True needs"),
    ],
)
def test_damaged_windows_are_refused_and_nothing_changes(damage, message):
    params, optimizer = trained({"sparse": True}, steps=3)
    before, damaged = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    damage(damaged["state"])
    with pytest.raises(ValueError, match=f"MFAC: .*{message}.*nothing was changed"):
        optimizer.load_state_dict(damaged)
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_a_loaded_mask_of_other_bytes_than_0_and_1_is_a_mask():
    params, optimizer = trained({"sparse": True}, steps=3)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["mask"].view(torch.uint8)[saved["state"][0]["mask"]] = 6
    optimizer.load_state_dict(saved)
    mask = optimizer.state[params[0]]["mask"]
    assert mask.any() and mask.view(torch.uint8).max() == 1
