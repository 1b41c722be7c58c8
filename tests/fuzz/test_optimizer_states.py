"""Damaged optimizer states: refused before anything changes, or loaded as what they say, and then stepped exactly so.

A step after loading must equal, bit for bit, that of an optimizer whose state was copied entry by entry into clean
memory, and that of the definitions (backend "reference").
"""

import copy
import functools
import io
import warnings

import pytest
import torch
from fuzzing import VALUES, damaged, fuzz, said
from hypothesis import assume, given
from hypothesis import strategies as st
from optimizer_cases import CASES, SMALL_SHAPES, assert_same, fill_grads, run, snapshot
from wrapped_tensor import WrappedTensor

from leanstep import use_backend
from leanstep.kernels.matrices import newton_schulz

pytestmark = pytest.mark.filterwarnings("ignore")
BY_NAME = {case.name: case for case in CASES}
NAMES = st.sampled_from(sorted(BY_NAME))


@pytest.fixture(scope="module", autouse=True)
def products_in_fp32():
    """Where Newton-Schulz multiplies in bf16, its results depend on how the matrices lie in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(newton_schulz, "_multiplies_bf16", lambda: False)
        yield


@functools.cache
def saved(name):
    """Parameters after two steps, and the state."""
    case = BY_NAME[name]
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())


def built(name):
    params = [p.clone().requires_grad_() for p in saved(name)[0]]
    return params, BY_NAME[name].build(params)


def twin_of(name, optimizer):
    """Another optimizer with the same parameters, settings, and state, every tensor in clean memory."""
    params, twin = built(name)
    for group, other in zip(twin.param_groups, optimizer.param_groups, strict=True):
        others = group["params"]
        group.clear()
        group.update(copy.deepcopy({k: v for k, v in other.items() if k != "params"}), params=others)
    old = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for group in twin.param_groups for p in group["params"]]
    for p, q in zip(old, new, strict=True):
        if p in optimizer.state:
            twin.state[q] = {k: torch.empty_like(v).copy_(v) for k, v in optimizer.state[p].items()}
    return params, twin


def check(name, state_dict, exact=True):
    """Load a mutated state; if it loads, compare it with what the file says, and the next step with the twins'."""
    params, optimizer = built(name)
    fill_grads(params, 7)
    optimizer.step()
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    given_state = state_dict if isinstance(state_dict, dict) else {}
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError as error:
        text = said(error)
        assert "nothing was changed" in text or "Nothing was changed" in text, text
        assert_same(snapshot(optimizer), before)
        assert optimizer.state_dict()["param_groups"] == groups
        return False
    ids = [i for group in given_state["param_groups"] for i in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(ids, own, strict=True):
        entries = given_state["state"].get(i, {})
        assert entries.keys() == optimizer.state.get(p, {}).keys()
        for key, value in entries.items():
            loaded = optimizer.state[p][key]
            value = torch.as_tensor(value).detach().to(loaded.dtype).reshape(loaded.shape)
            assert_same([loaded], [torch.empty_like(loaded).copy_(value)], f"{key} of {i}")
    with torch.no_grad():
        torch._foreach_copy_(params, saved(name)[0])
    (same_params, same), (defined_params, defined) = twin_of(name, optimizer), twin_of(name, optimizer)
    for ps in (params, same_params, defined_params):
        fill_grads(ps, 8)
    stepped = refusal(optimizer)
    assert refusal(same) == stepped
    assert_same(snapshot(optimizer), snapshot(same))
    with use_backend("reference"):
        assert refusal(defined) == stepped
    if exact and stepped is None:
        unit = 0 if name.startswith("Lion") else 64 * torch.finfo(params[0].dtype).eps
        for a, b in zip(params, defined_params, strict=True):
            largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0
            torch.testing.assert_close(a, b, equal_nan=True, rtol=unit, atol=unit * max(1, largest))
    return True


def refusal(optimizer):
    """What a step raises: only that the halves of a batch were not marked."""
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "mark_half" in str(error), error
        return str(error)
    return None


class Mutant:
    """A mutated state. Its text is what was done: to print a tensor without memory would end the process."""

    def __init__(self, state_dict, changes):
        self.state_dict, self.changes = state_dict, changes

    def __repr__(self):
        return f"Mutant({self.changes!r})"


# ---- tensors


def _of_other_memory(tensor, kind, place):
    """The tensor's values, or some of them, in memory that no kernel should see as it is."""
    if kind == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if kind == "permuted":
        dims = tuple(reversed(range(tensor.dim())))
        return tensor.permute(dims).contiguous().permute(dims)
    if kind == "expanded":
        return tensor.flatten()[place % max(1, tensor.numel()) :][:1].expand(tensor.numel()).view(tensor.shape)
    if kind == "overlapping":
        return tensor.clone().as_strided(tensor.shape, (1,) * tensor.dim())
    if kind == "shifted":
        memory = torch.cat([tensor.flatten()[:1], tensor.flatten()])
        return memory[1:].view(tensor.shape) if tensor.numel() else tensor
    if kind == "misaligned":
        raw = bytearray(1) + bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape) if len(raw) > 1 else tensor
    if kind == "negated":
        return torch._neg_view(tensor) if tensor.dtype.is_floating_point else tensor
    if kind == "inference":
        with torch.inference_mode():
            return tensor.clone()
    return torch.nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point)


MEMORIES = ("strided", "permuted", "expanded", "overlapping", "shifted", "misaligned", "negated", "inference", "leaf")
DTYPES = st.sampled_from((
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
))  # fmt: skip


def _truncated(tensor, place):
    changed = tensor.clone()
    changed.untyped_storage().resize_(changed.untyped_storage().nbytes() * (place % 4) // 4)
    return changed


def _reshaped(tensor, place):
    flat, turned = tensor.flatten(), tensor.permute(tuple(reversed(range(tensor.dim()))))
    choices = (flat, tensor[None], tensor[..., None], turned, torch.cat([flat, flat]), flat[:1], flat[:0], flat.any())
    return choices[place % len(choices)]


def _odd(tensor, place):
    kinds = (
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([tensor]),
        lambda: WrappedTensor(tensor),
        lambda: torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype),
    )
    return kinds[place % len(kinds)]()


def _revalued(tensor, place):
    values = (float("nan"), float("inf"), -float("inf"), -1, 0.5, 3, 1000, 0)
    changed = tensor.clone()
    if changed.numel():
        value = torch.tensor(values[place % len(values)], dtype=torch.float64)
        changed.view(-1)[place % changed.numel()] = value
    return changed


TENSOR_CHANGES = ("memory", "memory", "dtype", "shape", "cut", "odd", "value", "shared", "python")


@st.composite
def changed_tensors(draw, name):
    """A state with one to three tensors replaced."""
    state_dict = copy.deepcopy(saved(name)[1])
    places = [(i, key) for i, state in state_dict["state"].items() for key in state]
    assume(places)
    changes = []
    for i, key in draw(st.lists(st.sampled_from(places), min_size=1, max_size=3, unique=True)):
        tensor, place = saved(name)[1]["state"][i][key], draw(st.integers(0, 10_000))
        action = draw(st.sampled_from(TENSOR_CHANGES))
        detail = draw({"memory": st.sampled_from(MEMORIES), "dtype": DTYPES, "python": VALUES}.get(action, st.none()))
        if action == "memory":
            value = _of_other_memory(tensor.clone(), detail, place)
        elif action == "dtype":
            value = tensor.to(detail)
        elif action == "shared":
            alike = [v for s in state_dict["state"].values() for v in s.values() if _alike(v, tensor)]
            value = alike[place % len(alike)]
        elif action == "python":
            value = detail
        else:
            change = {"shape": _reshaped, "cut": _truncated, "odd": _odd, "value": _revalued}[action]
            value = change(tensor, place)
        state_dict["state"][i][key] = value
        changes.append((i, key, action, detail, place))
    return Mutant(state_dict, changes)


def _alike(value, tensor):
    return isinstance(value, torch.Tensor) and not value.is_nested and value.shape == tensor.shape


@pytest.mark.slow
@given(data=st.data())
@fuzz(250)
def test_changed_tensors(data):
    name = data.draw(NAMES)
    check(name, data.draw(changed_tensors(name)).state_dict)


# ---- keys, settings, groups and files


ENTRY_CHANGES = ("setting", "setting", "setting", "drop", "key", "state", "ids", "groups", "top")

# the work of a step grows with these
COSTLY = ("num_iters", "window")


@st.composite
def changed_entries(draw, name):
    """A state with one to three keys, settings, ids or whole entries changed."""
    state_dict = copy.deepcopy(saved(name)[1])
    ids, changes = list(state_dict["state"]), []
    for _ in range(draw(st.integers(1, 3))):
        group = draw(st.sampled_from(state_dict["param_groups"]))
        state = state_dict["state"].get(draw(st.sampled_from(ids)))
        action = draw(st.sampled_from(ENTRY_CHANGES))
        changes.append(action)
        if action in ("setting", "drop"):
            key = draw(st.sampled_from(sorted(group)))
            if action == "drop":
                changes.append((key, group.pop(key)))
            else:
                others = [c.kwargs[key] for c in CASES if key in c.kwargs]
                tensors = st.sampled_from((torch.tensor(0.01), torch.ones(3), torch.tensor(1.0, device="meta")))
                group[key] = draw(VALUES | tensors | (st.sampled_from(others) if others else st.just(0.01)))
                changes.append((key, group[key]))
                assume(key not in COSTLY or not isinstance(group[key], int) or not 20 < group[key] < 2**31)
        elif action == "key" and isinstance(state, dict) and state:
            key = draw(st.sampled_from(sorted(state, key=str)))
            changes.append(key)
            value = state.pop(key) if draw(st.booleans()) else state[key]
            if draw(st.booleans()):
                state[draw(st.sampled_from(("momentum_buffer", "step", "exp_avg", "noise", "mask", "x", 3)))] = value
        elif action == "state":
            change = draw(st.sampled_from(("remove", "empty", "swap", "value")))
            i, j = draw(st.sampled_from(ids)), draw(st.sampled_from(ids))
            changes.append((change, i, j))
            if change == "remove":
                state_dict["state"].pop(i, None)
            elif change == "swap" and i in state_dict["state"] and j in state_dict["state"]:
                states = state_dict["state"]
                states[i], states[j] = states[j], states[i]
            else:
                state_dict["state"][i] = {} if change == "empty" else draw(VALUES)
        elif action == "ids" and isinstance(group.get("params"), list) and group["params"]:
            place = draw(st.integers(0, len(group["params"]) - 1))
            group["params"][place] = draw(st.sampled_from((0, 1, 99, -1, "x", None, 1.5)))
            changes.append(group["params"])
        elif action == "groups":
            groups = state_dict["param_groups"]
            state_dict["param_groups"] = draw(st.sampled_from((groups * 2, groups[:-1], groups[::-1])))
            if not state_dict["param_groups"]:
                break
        elif action == "top":
            state_dict[draw(st.sampled_from(("state", "note", "extra")))] = draw(VALUES)
            if not isinstance(state_dict["state"], dict):
                break
    return Mutant(state_dict, changes)


@pytest.mark.slow
@given(data=st.data())
@fuzz(250)
def test_changed_entries(data):
    name = data.draw(NAMES)
    check(name, data.draw(changed_entries(name)).state_dict)


@functools.cache
def file_of(name):
    file = io.BytesIO()
    torch.save(saved(name)[1], file)
    return file.getvalue()


@given(data=st.data())
@fuzz(150)
def test_damaged_files(data):
    """What torch reads of them without running code is loaded or refused."""
    name = data.draw(
        st.sampled_from(("Lion-kahan", "SinkGD-spectral", "SinkGD-balanced", "LANTON-master", "MFAC-topk"))
    )
    raw = data.draw(damaged(file_of(name)))
    try:
        with warnings.catch_warnings(action="ignore"):
            state_dict = torch.load(io.BytesIO(raw), weights_only=True)
    except Exception:  # torch's own, of any class
        return
    check(name, state_dict, exact=False)


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_legal_state_loads(name):
    """In other memory, under torch's older form of counts, and with parameters that have no state yet."""
    params, state_dict = saved(name)
    for kind in ("strided", "permuted", "shifted", "misaligned", "inference", "leaf"):
        other = copy.deepcopy(state_dict)
        for state in other["state"].values():
            state.update({k: _of_other_memory(v, kind, 0) for k, v in state.items()})
        assert check(name, other), kind
    older = copy.deepcopy(state_dict)
    for state in older["state"].values():
        state.update({k: v.item() for k, v in state.items() if k == "step"})
    assert check(name, older)
    assert len(params) == len(SMALL_SHAPES)
