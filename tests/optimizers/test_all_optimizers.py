"""The torch.optim contract, for every row of the table in tests/helpers/optimizer_cases.py."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from covering import covering
from optimizer_cases import CASES, SMALL_SHAPES, OptimizerCase, assert_same, fill_grads, run, snapshot
from torch.optim.optimizer import register_optimizer_step_pre_hook
from wrapped_tensor import Uncopyable, WrappedTensor

import leanstep.optimizers
from leanstep import use_backend
from leanstep.optimizers import NonFiniteGradientError
from leanstep.optimizers.common.rounding import STATE_KEY
from leanstep.optimizers.mfac.state import SCOPE_KEYS

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

_ROWS = [
    {k: v for k, v in case.kwargs.items() if k not in ("lr", "weight_decay", "seed")}
    | {"class": case.cls.__name__, "dtype": case.dtype, "groups": case.groups.__name__, "stateless": not case.state}
    | {f"state {key}": dtype for key, dtype in case.state.items()}
    for case in CASES
]
# for what the classes share: cases in which every setting and every kind of state occurs
SETTINGS = [CASES[i] for i in sorted(covering(_ROWS, together=1))]
every_setting = pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case.name)


def test_every_exported_optimizer_has_a_row():
    exported = {name: getattr(leanstep.optimizers, name) for name in leanstep.optimizers.__all__}
    optimizers = {c for c in exported.values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert optimizers == {case.cls for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.slow
@every_case
def test_loss_falls(case: OptimizerCase):
    params = case.params(((6, 5), (2, 3, 4), (7,), ()))
    optimizer = case.build(params, lr=case.kwargs.get("lr", 2e-2) * 3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sum((p.float() - 0.3).square().sum() for p in params)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]
    assert all(after < before + 1e-3 for before, after in zip(losses, losses[1:], strict=False))


@every_setting
def test_default_dtype_and_device_change_nothing(case: OptimizerCase):
    """A default device without memory stands for any other than the parameters'."""
    results = []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
        params = case.params(case.shapes)
        optimizer = case.build(params)
        for step in range(2):
            fill_grads(params, step)
            torch.set_default_dtype(dtype)
            with torch.device(device):
                optimizer.step()
            torch.set_default_dtype(torch.float32)
        results.append(snapshot(optimizer))
    for other in results[1:]:
        assert_same(results[0], other)


@every_setting
def test_closure(case: OptimizerCase):
    with_closure, without = case.params(), case.params()
    a, b = case.build(with_closure), case.build(without)
    seen = []

    def closure():
        assert torch.is_grad_enabled()
        fill_grads(with_closure, 0)
        seen.append(1)
        return torch.tensor(2.5)

    assert a.step(closure) == 2.5 and seen == [1]
    run(b, without, range(1))
    assert_same(snapshot(a), snapshot(b))
    assert b.step() is None


@every_case
def test_add_param_group_and_overrides(case: OptimizerCase):
    first, second = case.params(((6, 5),)), case.params(((4, 3),), seed=1)
    lr = case.kwargs.get("lr", 2e-2)
    together = case.build(first)
    algorithm = {k: v for k, v in together.param_groups[0].items() if k == "algorithm"}
    together.add_param_group({"params": second, "lr": lr / 2, "maximize": True, **algorithm})
    twice = r"more than one parameter group: parameter 0 .*\(4, 3\) is in group 1 already"
    with pytest.raises(ValueError, match=twice):
        together.add_param_group({"params": second, **algorithm})
    with pytest.raises(ValueError, match="[Ii]nvalid learning rate"):
        together.add_param_group({"params": case.params(((2, 2),)), "lr": -1.0, **algorithm})
    assert len(together.param_groups) == 2
    run(together, [*first, *second], range(3))

    if case.coupled or "seed" in case.kwargs or case.kwargs.get("rounding") == "stochastic":
        return  # the other tensors, or the place in the list as part of the random numbers, matter
    alone_first, alone_second = case.params(((6, 5),)), case.params(((4, 3),), seed=1)
    a, b = case.build(alone_first), case.build(alone_second, lr=lr / 2, maximize=True)
    for step in range(3):
        fill_grads([*alone_first, *alone_second], step)
        a.step()
        b.step()
    assert_same([*first, *second], [*alone_first, *alone_second])


@every_setting
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_learning_rate_schedulers(case: OptimizerCase, tensor_lr: bool):
    lr = case.kwargs.get("lr", 2e-2)
    scheduled, by_hand = case.params(), case.params()
    a = case.build(scheduled, lr=torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr)
    b = case.build(by_hand, lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(a, lambda step: 1 / (1 + step))
    for step in range(4):
        for group in b.param_groups:
            group["lr"] = lr * (1 / (1 + step))
        run(a, scheduled, range(step, step + 1))
        run(b, by_hand, range(step, step + 1))
        schedule.step()
    assert isinstance(a.param_groups[0]["lr"], torch.Tensor) == tensor_lr
    # torch's AdamW itself computes with a tensor lr in another order
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if case.dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(scheduled, by_hand, **(tolerance if tensor_lr else {"rtol": 0, "atol": 0}))


@every_setting
def test_schedulers_that_move_more_than_the_rate(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for step in range(4):
        run(optimizer, params, range(step, step + 1))
        schedule.step()
        plateau.step(1.0)
    assert all(torch.isfinite(p).all() for p in params)


@every_case
def test_maximize_is_minimize_of_the_negative(case: OptimizerCase):
    up, down = case.params(), case.params()
    a, b = case.build(up, maximize=True), case.build(down)
    for step in range(3):
        fill_grads(up, step)
        fill_grads(down, step)
        for param in down:
            param.grad.neg_()
        a.step()
        b.step()
    assert_same(up, down)


@every_case
def test_lists_loops_and_the_definition_agree(case: OptimizerCase):
    results = []
    for foreach, backend in ((None, "reference"), (False, "auto"), (True, "auto"), (None, "auto")):
        params = case.params(case.shapes)
        # torch's AdamW differs from itself in the last bit between its loops; fused=False pins one of them
        fused = {"fused": False} if "fused" in case.build(case.params()).defaults else {}
        optimizer = case.build(params, foreach=foreach, **fused)
        with use_backend(backend):
            run(optimizer, params, range(3))
        results.append(params)
    for other in results[1:]:
        if case.exact_foreach:
            assert_same(results[0], other)
        else:
            unit = torch.finfo(case.dtype).eps
            torch.testing.assert_close(results[0], other, rtol=4 * unit, atol=8 * unit)


@every_setting
def test_hooks(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    everywhere = register_optimizer_step_pre_hook(lambda *_: calls.append("first"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    run(optimizer, params, range(1))
    everywhere.remove()
    saved = optimizer.state_dict()
    assert calls == ["first", "before", "after", "saving"] and saved["note"] == 1

    other = case.build(case.params())
    other.register_load_state_dict_pre_hook(lambda _, state: calls.append("loading"))

    def look(loaded):
        """A user's hook sees the state as it will be, not as torch cast it on the way."""
        matrix = loaded.param_groups[0]["params"][0]
        assert {k: v.dtype for k, v in loaded.state.get(matrix, {}).items()} == case.state
        calls.append("loaded")

    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(saved)
    assert calls[4:] == ["loading", "loaded"]


@every_case
def test_state_is_as_the_table_says(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    assert not optimizer.state
    run(optimizer, params, range(1))
    state = optimizer.state[params[0]]
    assert {key: value.dtype for key, value in state.items()} == case.state
    for param, kept in optimizer.state.items():
        for value in kept.values():
            assert isinstance(value, torch.Tensor) and not value.requires_grad
            assert value.device == param.device


@every_case
def test_zero_grad_and_missing_gradients(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(before, snapshot(optimizer))

    idle, busy = case.params(((6, 5),)), case.params(((4, 3),))
    optimizer = case.build([*idle, *busy])
    old = idle[0].detach().clone()
    fill_grads(busy, 0)
    optimizer.step()
    # the first parameter of M-FAC's scope has the state that its parameters share
    assert optimizer.state.get(idle[0], {}).keys() <= set(SCOPE_KEYS) and idle[0].grad is None
    assert torch.equal(idle[0], old)


@every_setting
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_alike(case: OptimizerCase, duplicate):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    twin = duplicate(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    assert {k for k in vars(optimizer) if k[0] != "_"} == {k for k in vars(twin) if k[0] != "_"}
    assert all(p is not q for p, q in zip(params, twin_params, strict=True))
    own_order = [p for group in optimizer.param_groups for p in group["params"]]
    run(optimizer, own_order, range(2, 4))
    run(twin, twin_params, range(2, 4))
    assert_same(snapshot(optimizer), snapshot(twin))


@every_case
def test_state_dict_round_trip_is_exact(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(3))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)

    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = case.build(resumed_params, lr=1.0)
    resumed.load_state_dict(loaded)
    assert_same(snapshot(optimizer), snapshot(resumed))
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    run(optimizer, params, range(3, 6))
    run(resumed, resumed_params, range(3, 6))
    assert_same(snapshot(optimizer), snapshot(resumed))


@every_setting
def test_the_state_of_another_optimizer_is_refused(case: OptimizerCase):
    """By its mark, through torch.save too; an unmarked one by its settings; and nothing is changed."""
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    for other in {c.cls: c for c in CASES if c.cls is not case.cls}.values():
        others = other.params()
        source = other.build(others)
        run(source, others, range(1))
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        buffer.seek(0)
        marked = torch.load(buffer, weights_only=True)
        with pytest.raises(ValueError, match=f"{case.cls.__name__}: .* saved by {other.cls.__name__}, "):
            optimizer.load_state_dict(marked)
        for group in marked["param_groups"]:
            del group["optimizer"]
        # where the two share most settings, the missing entries tell
        with pytest.raises(ValueError, match=f"{case.cls.__name__}: .* (saved by another optimizer|has no exp_avg)"):
            optimizer.load_state_dict(marked)
    adamw = torch.optim.AdamW(case.params(), lr=1e-3)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    assert_same(before, snapshot(optimizer))
    assert optimizer.state_dict()["param_groups"] == groups


@every_setting
def test_the_state_of_parameters_in_another_order_is_refused(case: OptimizerCase):
    """It would be taken for the state of others, and be found out at the next step at best."""
    names, shapes = ("first", "second", "bias", "gain"), ((6, 5), (5, 6), (7,), (3,))
    straight, turned = (list(zip(names, case.params(shapes), strict=True)) for _ in range(2))
    turned.reverse()
    source, target = case.build(straight), case.build(turned)
    run(source, [p for _, p in straight], range(1))
    run(target, [p for _, p in turned], range(1))
    before = snapshot(target)
    with pytest.raises(ValueError, match="(?s)(first|second|bias|gain).*nothing was changed"):
        target.load_state_dict(source.state_dict())
    assert_same(before, snapshot(target))


@every_setting
def test_parameters_of_one_shape_in_another_order_are_told_apart_by_their_names(case: OptimizerCase):
    shapes = ((6, 5), (6, 5), (7,), (7,))
    straight = list(zip(("first", "second", "bias", "gain"), case.params(shapes), strict=True))
    source, target = case.build(straight), case.build([straight[i] for i in (1, 0, 3, 2)])
    run(source, [p for _, p in straight], range(1))
    before = snapshot(target)
    with pytest.raises(ValueError, match="another order .'first' where 'second' is here.*nothing was changed"):
        target.load_state_dict(source.state_dict())
    assert_same(before, snapshot(target))
    if case.cls.__name__ == "MFAC":
        return  # takes no other names at all: a window is of no use under a wrong parameter
    # a model whose names changed is the same model
    renamed = case.build([(f"module.{name}", p) for name, p in straight])
    renamed.load_state_dict(source.state_dict())


@every_setting
def test_own_states_without_the_mark_and_of_derived_classes_are_taken(case: OptimizerCase):
    class Derived(case.cls):
        pass

    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(1))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["optimizer"]
    fresh = case.build(case.params())
    fresh.load_state_dict(old)
    assert fresh.state_dict()["param_groups"][0]["optimizer"] == case.cls.__name__
    derived = dataclasses.replace(case, cls=Derived).build(case.params())
    derived.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(derived.state_dict())


@every_setting
def test_the_groups_given_are_not_changed(case: OptimizerCase):
    """One list of groups serves several optimizers, and still prints after that."""
    groups = case.groups([(f"layer{i}", p) for i, p in enumerate(case.params())])
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    before = [dict(group) for group in groups]
    case.build_from(groups)
    case.build_from(groups)
    assert groups == before


@every_case
def test_state_moves_into_parameters_of_another_dtype_and_steps(case: OptimizerCase):
    """State keeps its dtype and every bit; only AdamW's moments follow the parameters, as torch needs them to."""
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    other_dtype = torch.float32 if case.dtype == torch.bfloat16 else torch.bfloat16
    others = [p.detach().to(other_dtype).requires_grad_() for p in params]
    other = case.build(others)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            follows = "exp_avg_sq" in a and key.startswith("exp_avg") and b[key].dtype == other_dtype
            assert_same([a[key].to(other_dtype) if follows else a[key]], [b[key]])
    run(other, others, range(2, 4))
    assert all(torch.isfinite(p).all() for p in others)


class _Model(torch.nn.Module):
    """The parameters of a case under names."""

    def __init__(self, params):
        super().__init__()
        self.items = torch.nn.ParameterList(params)


@every_setting
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint_state_dict(case: OptimizerCase, flat: bool, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = _Model(case.params())
    optimizer = case.build(list(model.items))
    run(optimizer, list(model.items), range(2))
    model.items[0].grad.fill_(float("nan"))
    optimizer.step()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)

    resumed_model = copy.deepcopy(model)
    resumed_model.zero_grad()
    resumed = case.build(list(resumed_model.items), lr=1.0)
    target = {"optimizer": get_optimizer_state_dict(resumed_model, resumed, options=options)}
    assert_same(list(model.items), list(resumed_model.items), "asking for the state moved the parameters")
    dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed_model, resumed, target["optimizer"], options=options)
    assert resumed.nonfinite_count() == optimizer.nonfinite_count() == 1
    assert_same(snapshot(optimizer), snapshot(resumed))
    run(optimizer, list(model.items), range(3, 5))
    run(resumed, list(resumed_model.items), range(3, 5))
    assert_same(snapshot(optimizer), snapshot(resumed))


@every_setting
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_full_state_dict_takes_every_setting(case: OptimizerCase):
    """What Accelerate saves under FSDP2: torch gathers numbers, strings and tensors, and fails on anything else."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = _Model(case.params())
    optimizer = case.build(list(model.items))
    run(optimizer, list(model.items), range(2))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    resumed_model = copy.deepcopy(model)
    resumed = case.build(list(resumed_model.items))
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    assert_same(snapshot(optimizer), snapshot(resumed))


@every_setting
def test_dtypes_in_groups_are_names(case: OptimizerCase):
    """States and pickles of old versions, which held the dtypes themselves, are taken."""
    params = case.params()
    optimizer = case.build(params)
    given = {key: value for key, value in case.kwargs.items() if isinstance(value, torch.dtype)}
    run(optimizer, params, range(2))
    for group in optimizer.param_groups:
        assert not any(isinstance(value, torch.dtype) for value in group.values())
        assert all(f"torch.{group[key]}" == str(value) for key, value in given.items())
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group.update(given)
    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = case.build(resumed_params)
    resumed.load_state_dict(old)
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    for group in optimizer.param_groups:
        group.update(given)
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == resumed.state_dict()["param_groups"]
    run(optimizer, params, range(2, 3))
    run(resumed, resumed_params, range(2, 3))
    assert_same(snapshot(optimizer), snapshot(resumed))


@every_setting
def test_grad_scaler_skips_an_overflow(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = snapshot(optimizer)
    for step, finite in ((1, False), (2, True)):
        scaler.scale(torch.tensor(0.0))
        fill_grads(params, step)
        for param in params:
            param.grad.mul_(scaler.get_scale())
        if not finite:
            params[0].grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if not finite:
            assert_same(before, snapshot(optimizer))
    assert scaler.get_scale() == 512.0
    assert not torch.equal(params[0], before[0])


@every_case
def test_layouts_do_not_matter(case: OptimizerCase):
    """Transposed, sliced, expanded and channels-last parameters and gradients step as contiguous ones do."""
    rows, columns = (66, 128) if case.large else (6, 8)
    plain = case.params(((6, columns), (rows, columns), (4, 2, 3, 3), (9,)))
    odd = [
        plain[0].detach().t().contiguous().t(),
        torch.zeros(rows, 2 * columns, dtype=case.dtype)[:, ::2].copy_(plain[1].detach()),
        plain[2].detach().to(memory_format=torch.channels_last),
        torch.zeros(18, dtype=case.dtype)[::2].copy_(plain[3].detach()),
    ]
    for param in odd:
        param.requires_grad_()
    a, b = case.build(plain), case.build(odd)
    for step in range(3):
        fill_grads(plain, step)
        for p, o in zip(plain, odd, strict=True):
            o.grad = p.grad.mT.contiguous().mT if p.dim() > 1 and step else p.grad.clone()
        a.step()
        b.step()
    unit = 0 if case.exact_foreach else torch.finfo(case.dtype).eps
    torch.testing.assert_close(odd, plain, rtol=4 * unit, atol=8 * unit)

    expanded = case.params(((6, 5),))
    optimizer = case.build(expanded)
    expanded[0].grad = torch.randn(6, 1).to(case.dtype).expand(6, 5)
    optimizer.step()
    assert torch.isfinite(expanded[0]).all()


@every_setting
@pytest.mark.parametrize("wrap_grads", [False, True], ids=["parameters", "gradients-too"])
def test_tensors_without_memory_of_their_own(case: OptimizerCase, wrap_grads: bool):
    """Parameters of classes such as quantized weights step as plain ones do; their address is never asked for."""
    plain = case.params(case.shapes)
    wrapped = [torch.nn.Parameter(WrappedTensor(p.detach().clone())) for p in plain]
    a, b = case.build(plain), case.build(wrapped)
    for step in range(3):
        fill_grads(plain, step)
        for p, w in zip(plain, wrapped, strict=True):
            w.grad = WrappedTensor(p.grad.clone()) if wrap_grads else p.grad.clone()
        a.step()
        b.step()
    assert_same(plain, [w.inner for w in wrapped])
    for p, w in zip(plain, wrapped, strict=True):
        assert_same(a.state.get(p, {}).values(), b.state.get(w, {}).values())
        assert all(type(value) is torch.Tensor for value in b.state.get(w, {}).values())


@every_setting
def test_tensors_that_cannot_be_copied_are_refused(case: OptimizerCase):
    params = case.params(((6, 5), (5, 4)))
    odd = torch.nn.Parameter(Uncopyable(torch.ones(4, 3, dtype=case.dtype)))
    optimizer = case.build([("first", params[0]), ("odd", odd), ("last", params[1])])
    fill_grads([*params, odd], 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(TypeError, match=r"odd \(4, 3\) is a Uncopyable.*has no copy_.*Nothing was updated"):
        optimizer.step()
    assert_same(before, params)


@every_case
def test_a_whole_non_finite_gradient_leaves_no_trace(case: OptimizerCase):
    for value in (float("nan"), float("inf"), float("-inf")):
        hit, spared = case.params(case.shapes), case.params(case.shapes)
        a, b = case.build(hit), case.build(spared)
        run(a, hit, range(2))
        run(b, spared, range(2))
        before = [p.detach().clone() for p in hit]
        for param in hit:
            param.grad.fill_(value)
        a.step()
        assert_same(before, hit)
        assert a.nonfinite_count() == sum(p.numel() > 0 for p in hit)
        assert all(torch.isfinite(t).all() for t in snapshot(a))
        run(a, hit, range(2, 4))
        run(b, spared, range(2, 4))
        if case.replayable:
            assert_same(snapshot(a), snapshot(b))


@every_case
def test_one_non_finite_entry(case: OptimizerCase):
    """What it touches is left alone and counted; the other tensors step as if nothing had been."""
    hit, spared = case.params(case.shapes[:2]), case.params(case.shapes[:2])
    a, b = case.build(hit), case.build(spared)
    run(a, hit, range(2))
    run(b, spared, range(2))
    before = snapshot(a)
    fill_grads(hit, 2)
    fill_grads(spared, 2)
    hit[0].grad[3, 4] = float("nan")
    a.step()
    b.step()
    assert a.nonfinite_count() == 1
    assert all(torch.isfinite(t).all() for t in snapshot(a))
    assert case.coupled or torch.equal(hit[1], spared[1])
    assert torch.equal(hit[1], before[1]) == case.skips_together
    assert torch.equal(hit[0][3, 4], before[0][3, 4])
    if not case.elementwise:
        return
    others = torch.ones(hit[0].shape, dtype=torch.bool)
    others[3, 4] = False
    assert torch.equal(hit[0][others], spared[0][others])
    for key in case.state:
        if key != "step":
            assert torch.equal(a.state[hit[0]][key][others], b.state[spared[0]][key][others])


@every_case
def test_raise_changes_nothing(case: OptimizerCase):
    params = case.params()
    optimizer = case.build([(f"layer{i}", p) for i, p in enumerate(params)], nonfinite="raise")
    run(optimizer, params, range(2))
    before = snapshot(optimizer)
    fill_grads(params, 2)
    params[3].grad[2] = float("inf")
    with pytest.raises(NonFiniteGradientError, match="layer3"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    run(optimizer, params, range(2, 3))
    assert not torch.equal(before[0], snapshot(optimizer)[0])


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(case: OptimizerCase, dtype: torch.dtype):
    if case.kwargs.get("rounding") in ("stochastic", "split") and dtype == torch.float16:
        params = [p.detach().to(dtype).requires_grad_() for p in case.params()]
        optimizer = case.build(params)
        fill_grads(params, 0)
        with pytest.raises(ValueError, match="bfloat16.*float16"):
            optimizer.step()
        return
    base = [p.detach().to(dtype) for p in case.params(case.shapes)]
    params, wide = [p.clone().requires_grad_() for p in base], [p.double().requires_grad_() for p in base]
    a, b = case.build(params), case.build(wide)
    chance = torch.Generator().manual_seed(0)
    for p, w in zip(params, wide, strict=True):
        p.grad = torch.randn(p.shape, generator=chance).to(dtype)
        w.grad = p.grad.double()
    a.step()
    b.step()
    unit = torch.finfo(dtype).eps
    for p, w in zip(params, wide, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=unit, atol=2 * unit)


@every_case
def test_gradients_are_never_written(case: OptimizerCase):
    for kwargs in ({}, {"maximize": True}):
        params = case.params(case.shapes)
        optimizer = case.build(params, **kwargs)
        run(optimizer, params, range(1))
        fill_grads(params, 1)
        params[0].grad[0, 0] = float("nan")
        grads = [p.grad for p in params]
        before = [(g.clone(), g._version) for g in grads]
        optimizer.step()
        for param, grad, (old, version) in zip(params, grads, before, strict=True):
            assert param.grad is grad and grad._version == version
            assert_same([grad], [old])


@every_case
def test_parameters_know_that_they_changed(case: OptimizerCase):
    """autograd must refuse a backward pass through values that the step overwrote."""
    params = case.params(case.shapes)
    optimizer = case.build(params)
    run(optimizer, params, range(1))
    versions = [p._version for p in params]
    run(optimizer, params, range(1, 2))
    for param, version in zip(params, versions, strict=True):
        assert param._version > version or param.numel() == 0


@every_case
def test_state_on_another_device_than_the_parameter_is_refused(case: OptimizerCase):
    """Kernels take addresses, which are of one device. The device without memory stands for a GPU."""
    params = case.params()
    optimizer = case.build([(f"layer{i}.weight", p) for i, p in enumerate(params)])
    run(optimizer, params, range(2))
    fill_grads(params, 2)
    state = optimizer.state[params[0]]
    for key in case.state.keys() - {"step", "counters", "power_warm"}:  # the host may read these
        on_cpu, before = state[key], [p.detach().clone() for p in params]
        state[key] = on_cpu.to("meta")
        with pytest.raises(ValueError, match=f"layer0.weight .* is on cpu, and its state '{key}' on meta: .*moved"):
            optimizer.step()
        assert_same(params, before)
        state[key] = on_cpu
    optimizer.step()


@pytest.mark.gpu
@every_setting
def test_a_gradient_that_a_move_left_behind_is_refused(case: OptimizerCase):
    params = case.params()
    optimizer = case.build([(f"layer{i}.weight", p) for i, p in enumerate(params)])
    fill_grads(params, 0)
    params[0].data = params[0].data.cuda()
    with pytest.raises(ValueError, match="layer0.weight .* is on cuda:0, and its gradient on cpu"):
        optimizer.step()


RESIZED = {"grown": (0, (9, 5)), "shrunk": (0, (2, 5)), "reshaped": (0, (5, 6)), "grown vector": (3, (9,))}


def _transposed(param):
    return param.mT.contiguous().mT if param.dim() > 1 else param


def _rewrite(params, change):
    for param in params:
        param.grad, param.data = None, change(param.data)


def _rewrite_state(optimizer, change):
    for param, state in optimizer.state.items():
        optimizer.state[param] = {key: change(value) for key, value in state.items()}


# what may change between steps
CHANGED = {
    "nothing": lambda optimizer, params: None,
    "memory of parameters": lambda optimizer, params: _rewrite(params, torch.clone),
    "strides of parameters": lambda optimizer, params: _rewrite(params, _transposed),
    "dtype of parameters": lambda optimizer, params: _rewrite(
        params, lambda p: p.to(torch.bfloat16 if p.dtype == torch.float32 else torch.float32)
    ),
    "memory of state": lambda optimizer, params: _rewrite_state(optimizer, torch.clone),
    "strides of state": lambda optimizer, params: _rewrite_state(optimizer, _transposed),
    "a dropped state": lambda optimizer, params: optimizer.state.pop(params[0], None),
    "a loaded state": lambda optimizer, params: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "an added group": lambda optimizer, params: optimizer.add_param_group({"params": [torch.zeros(2)]}),
    "rounding": lambda optimizer, params: [group.update(rounding="kahan") for group in optimizer.param_groups],
    "maximize": lambda optimizer, params: [group.update(maximize=True) for group in optimizer.param_groups],
    "dtype of the momentum": lambda optimizer, params: [
        group.update(momentum_dtype="float16") for group in optimizer.param_groups if "momentum_dtype" in group
    ],
}


@every_setting
@pytest.mark.parametrize("change", CHANGED)
def test_a_step_after_a_change_is_that_of_an_optimizer_without_a_past(case: OptimizerCase, change):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    CHANGED[change](optimizer, params)
    fresh = copy.deepcopy(optimizer)
    twins = [param for group in fresh.param_groups for param in group["params"]]
    outcomes = []
    for each, its_params in ((optimizer, params), (fresh, twins[: len(params)])):
        fill_grads(its_params, 2)
        its_params[0].grad = _transposed(its_params[0].grad)
        try:
            each.step()
            outcomes.append(snapshot(each))
        except (ValueError, RuntimeError) as error:  # the optimizer does not take the change
            outcomes.append([torch.tensor(bytearray(str(error).encode()))])
    assert_same(*outcomes)


@every_setting
def test_a_gradient_that_becomes_sparse_and_a_state_that_loses_its_shape_are_refused(case: OptimizerCase):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(3))
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse.*SparseAdam"):
        optimizer.step()
    params[0].grad = None
    fill_grads(params, 3)
    shaped = ("exp_avg", "momentum_buffer", "window")
    for state, key in [(s, key) for s in optimizer.state.values() for key in shaped if key in s][:1]:
        state[key].resize_(*state[key].shape[:-1], state[key].shape[-1] + 1)
        with pytest.raises(ValueError, match=rf"expected the state '{key}' of .* to have shape"):
            optimizer.step()


@every_setting
@pytest.mark.parametrize("change", RESIZED)
def test_a_resized_parameter_is_refused_if_its_state_has_a_shape(case: OptimizerCase, change):
    position, shape = RESIZED[change]
    params = case.params()
    optimizer = case.build([(f"layer{i}.weight", p) for i, p in enumerate(params)])
    run(optimizer, params, range(3))
    params[position].data = torch.full(shape, 0.01, dtype=case.dtype)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"layer{position}.weight .* has a gradient of shape .*Set parameter.grad"):
        optimizer.step()
    params[position].grad = None
    fill_grads(params, 3)
    shaped = case.state.keys() - {"step", "power_warm"} - ({"power_vector"} if shape[1:] == (5,) else set())
    if shaped or position == 3:
        sizes = ", ".join(map(str, shape))
        expected = (
            rf"'\w+' of layer{position}.weight .* to have shape \((\d, )?{sizes}.*, got .*resized.*Nothing was changed"
        )
        if case.state.keys() == {"power_vector", "power_warm"} and position == 0:
            expected = "'power_vector' of layer0.weight .* to have shape .6,., got .5,.:"
        with pytest.raises(ValueError, match=expected) as raised:
            optimizer.step()
        assert_same(snapshot(optimizer), before)
        if "optimizer.state.clear()" in str(raised.value):
            optimizer.state.clear()
        else:
            del optimizer.state[params[position]]
    optimizer.step()
    assert all(p.isfinite().all() for p in params) and not torch.equal(params[position], before[position])


@every_setting
def test_sparse_and_complex_are_refused(case: OptimizerCase):
    param = case.params(((6, 5),))[0]
    optimizer = case.build([("table", param)])
    param.grad = torch.ones(6, 5, dtype=case.dtype).to_sparse()
    with pytest.raises(RuntimeError, match="table.*sparse.*SparseAdam"):
        optimizer.step()
    number = torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(ValueError, match="number.*complex64.*view_as_real"):
        case.build([("number", number)])


@every_setting
def test_named_parameters(case: OptimizerCase):
    named, plain = case.params(), case.params()
    a = case.build([(f"layer{i}.weight", p) for i, p in enumerate(named)])
    b = case.build(plain)
    run(a, named, range(2))
    run(b, plain, range(2))
    assert_same(snapshot(a), snapshot(b))
    saved = a.state_dict()
    assert saved["param_groups"][0]["param_names"][0] == "layer0.weight"
    b.load_state_dict(saved)
    assert_same(snapshot(a), snapshot(b))


@every_setting
def test_frozen_parameters_and_empty_groups(case: OptimizerCase):
    params = case.params()
    params[0].requires_grad_(False)
    optimizer = case.build(params)
    old = params[0].detach().clone()
    fill_grads(params[1:], 0)
    optimizer.step()
    assert torch.equal(params[0], old) and params[0] not in optimizer.state
    optimizer.add_param_group({"params": []})
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@every_case
def test_bad_settings_are_errors(case: OptimizerCase):
    settings = case.build(case.params()).defaults.keys()
    assert {"lr", "weight_decay", "rounding", "nonfinite", "seed"} <= settings
    for bad, message in (
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": 1e39}, r"Invalid learning rate: 1e\+39; .* expects it in \[0.0, 3.4\d*e\+38\)"),
        ({"weight_decay": -0.1}, "Invalid weight.decay value: -0.1"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"rounding": "up"}, "Invalid rounding: 'up'.*stochastic"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite: 'ignore'.*skip"),
        ({"seed": -1}, "Invalid seed"),
    ):
        if bad.keys() <= settings:
            with pytest.raises(ValueError, match=message):
                case.build(case.params(SMALL_SHAPES[:1]), **bad)
    for bad in ({"lr": "1e-3"}, {"weight_decay": None}, {"momentum_dtype": "bf16"}, {"momentum_dtype": torch.int16}):
        if bad.keys() <= settings:
            with pytest.raises(TypeError, match=next(iter(bad)).replace("lr", "learning rate").replace("_", ".")):
                case.build(case.params(SMALL_SHAPES[:1]), **bad)
    with pytest.raises(ValueError, match="empty parameter list"):
        case.cls([], **case.kwargs)


@every_case
def test_peak_memory_of_a_step(case: OptimizerCase):
    """By torch's own record of its allocations; what is known as a small vector is a twentieth of a matrix here."""
    params = case.params(((256, 512), (256, 512), (9,)))
    optimizer = case.build(params)
    run(optimizer, params, range(2))
    extra = peak_of(optimizer.step)
    matrix = 256 * 512 * 4
    assert extra <= (case.extra_fp32 + 0.05) * matrix, f"{extra / matrix:.2f} fp32 matrices"


def peak_of(call) -> int:
    """Largest number of bytes allocated at once during a call, beyond what was there before."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


class CountedGraphs:
    """A backend of torch.compile that counts the graphs which another one compiles."""

    def __init__(self, backend: str):
        self.compile_graph, self.graphs = torch._dynamo.lookup_backend(backend), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.compile_graph(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    # every setting, and the classes' defaults; what writes a rounding is one function, which Lion's rows compile
    [
        pytest.param(case, "aot_eager", id=f"{case.name}-aot_eager")
        for case in CASES
        if case.name == case.cls.__name__
        or (case in SETTINGS and case.kwargs.get("rounding") in (None, "stochastic") and case.dtype == torch.float32)
        or (case.cls.__name__ == "Lion" and "rounding" in case.kwargs)
    ]
    # code generation takes half a minute a row; AdamW's 8-bit moments are read and written as Lion's is
    + [
        pytest.param(case, "inductor", id=f"{case.name}-inductor")
        for case in CASES
        if case.large and case.dtype == torch.float32 and case.name != "Lion-int8"
    ],
)
def test_compiled_steps_equal_eager_ones(case: OptimizerCase, backend: str):
    """fullgraph from the first step on, over two groups, and few graphs in the steps of a schedule.

    Parameters and all state: what a step writes in place must survive functionalization and code generation.
    """
    torch._dynamo.reset()
    counted, generates_code = CountedGraphs(backend), backend == "inductor"
    # tracing takes seconds a tensor: every kind of tensor in the rows whose steps the others vary
    others = ((2, 3, 4), (), (0, 3)) if case.name == case.cls.__name__ and not generates_code else ()
    shapes = ((6, 5), (7,), *others)
    (compiled_params, plain_params), lr = (case.params(shapes), case.params(shapes)), case.kwargs.get("lr", 2e-2)
    compiled = case.build(compiled_params, lr=torch.tensor(lr))
    plain = case.build(plain_params, lr=torch.tensor(lr), **({"fused": False} if "fused" in compiled.defaults else {}))
    for optimizer, params in ((compiled, compiled_params), (plain, plain_params)):
        added = case.params(((3,),), seed=1)
        optimizer.add_param_group({"params": added, "lr": torch.tensor(lr)})
        params += added
    fill_grads(compiled_params, 0)
    step = torch.compile(compiled.step, fullgraph=True, backend=counted)
    for i in range(3 if generates_code else 5):
        for group in (*compiled.param_groups, *plain.param_groups):
            group["lr"].fill_(lr / (1 + i))
        fill_grads(compiled_params, i)
        step()
        run(plain, plain_params, range(i, i + 1))
    assert 0 < counted.graphs <= case.graphs
    unit = torch.finfo(case.dtype).eps
    for a, b in zip(snapshot(compiled), snapshot(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=64 * unit, atol=64 * unit)
    if not generates_code:
        torch.testing.assert_close(compiled_params, plain_params, rtol=8 * unit, atol=8 * unit)
    torch._dynamo.reset()


# ---- parameters written from outside


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("write", ["load_state_dict", "data", "set", "one row"])
@pytest.mark.parametrize("case", [c for c in CASES if c.kwargs.get("rounding") == "master"], ids=lambda case: case.name)
def test_a_written_parameter_replaces_its_master(case: OptimizerCase, write, backend):
    """The next step is that of a state whose master was replaced by hand; other entries keep their master."""
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(3))
    other_params, other = copy.deepcopy((params, optimizer))
    for p, q in zip(params, other_params, strict=True):
        new = p.detach() * 0.5 + 3
        if write == "load_state_dict":
            module = torch.nn.Module()
            module.register_buffer("weight", p)
            module.load_state_dict({"weight": new})
        elif write == "data":
            p.data.copy_(new)
        elif write == "set":
            p.data = new.clone()
        elif p.dim() and len(p):
            p.data[0] = new[0]
        q.data.copy_(p)
        master = other.state[q]["master_param"]
        if write != "one row":
            master.copy_(new)
        elif p.dim() and len(p):
            master[0] = new[0]
    with use_backend(backend):
        for o, ps in ((optimizer, params), (other, other_params)):
            run(o, ps, range(3, 5))
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [c for c in CASES if c.kwargs.get("rounding") == "kahan"], ids=lambda case: case.name)
def test_a_written_parameter_drops_its_compensation(case: OptimizerCase, backend):
    """Without gradients' help, a compensation of large weights would move the zeros that were loaded."""
    params = [(100 * p.detach()).requires_grad_() for p in case.params()]
    optimizer = case.build(params, lr=1.0)
    run(optimizer, params, range(3))
    other_params, other = copy.deepcopy((params, optimizer))
    assert any(other.state[q]["kahan_compensation"].any() for q in other_params)
    for p, q in zip(params, other_params, strict=True):
        p.data.zero_()
        q.data.zero_()
        other.state[q]["kahan_compensation"].zero_()
    with use_backend(backend):
        for o, ps in ((optimizer, params), (other, other_params)):
            run(o, ps, range(3, 5))
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.kwargs.get("rounding") in STATE_KEY], ids=lambda case: case.name
)
def test_rolling_model_and_optimizer_back_is_exact(case: OptimizerCase, order):
    params = case.params()
    optimizer = case.build(params)
    run(optimizer, params, range(3))
    saved = {"model": [p.detach().clone() for p in params], "optimizer": copy.deepcopy(optimizer.state_dict())}
    run(optimizer, params, range(3, 6))
    expected = snapshot(optimizer)
    for which in order:
        if which == "optimizer":
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        else:
            with torch.no_grad():
                torch._foreach_copy_(params, saved["model"])
    run(optimizer, params, range(3, 6))
    assert_same(snapshot(optimizer), expected)
