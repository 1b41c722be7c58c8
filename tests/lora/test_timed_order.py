"""``order="time"``: what is measured, how often, and what follows from it."""

import itertools

import pytest
import torch
from lora_models import LLAMA_TARGETS, loss_and_gradients, randomise, relative_error, tiny_llama, tokens
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from leanstep.lora import LoraConfig, accelerate_peft, apply_lora
from leanstep.lora.layers import timed_order
from leanstep.lora.layers.contraction import Order, choose_order
from leanstep.lora.layers.timed_order import row_bucket

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Clock:
    """Stands still but for the products, whose seconds it is told."""

    def __init__(self, forward=(1.0, 1.0), backward=(1.0, 1.0)):
        self.now, self.costs = 0.0, {"forward": forward, "backward": backward}
        self.runs = []

    def __call__(self):
        return self.now

    def spend(self, which, through_sum):
        self.runs.append((which, through_sum))
        self.now += self.costs[which][through_sum]


@pytest.fixture
def clock(monkeypatch):
    """A clock, nothing measured so far, and passes that take what the clock says."""
    clock = Clock()
    project, backward = timed_order.project, timed_order.layers_backward
    monkeypatch.setattr(timed_order, "_measured", {})
    monkeypatch.setattr(timed_order, "perf_counter", clock)

    def timed_project(x, setting, *rest):
        clock.spend("forward", setting.order.forward)
        return project(x, setting, *rest)

    def timed_backward(x, parts, wants_dx):
        clock.spend("backward", parts[0].setting.order.backward)
        return backward(x, parts, wants_dx)

    monkeypatch.setattr(timed_order, "project", timed_project)
    monkeypatch.setattr(timed_order, "layers_backward", timed_backward)
    return clock


def measured():
    return dict(timed_order._measured)


def ask(rows=8, n=6, m=5, r=2, **settings):
    return timed_order.timed_order(torch.zeros(rows, n, **settings), n, m, r)


def adapted(dtype=torch.float64, layers=1, **settings):
    config = LoraConfig(**{"r": 4, "target_modules": LLAMA_TARGETS, "order": "time", **settings})
    return randomise(apply_lora(tiny_llama(dtype, layers=layers), config)).train()


def test_rows_are_counted_in_powers_of_two():
    assert [row_bucket(rows) for rows in (0, 1, 2, 3, 4, 1023, 1024, 1025)] == [1, 1, 2, 2, 4, 512, 1024, 1024]


def test_each_kind_is_measured_once(clock):
    for _ in range(2):
        for rows in (8, 15):
            ask(rows)
    assert list(measured()) == [(8, 6, 5, 2, "torch.float32", "cpu")]
    # 2 to warm up and 5 that count, of each pass in each order, in turns
    turn = list(itertools.product(("forward", "backward"), (False, True)))
    assert clock.runs == turn * 7
    others = [{"rows": 16}, {"n": 7}, {"m": 6}, {"r": 3}, {"dtype": torch.float64}]
    for i, other in enumerate(others):
        ask(**other)
        assert len(measured()) == 2 + i
    assert timed_order.timed_order(torch.zeros(2, 4, 6), 6, 5, 2) is not None
    assert len(measured()) == 1 + len(others), "leading dimensions are rows"


@pytest.mark.parametrize("faster", list(itertools.product([False, True], repeat=2)), ids=str)
def test_the_faster_order_is_taken_in_each_pass(clock, faster):
    clock.costs = {which: (2.0, 1.0) if sums else (1.0, 2.0) for which, sums in zip(clock.costs, faster, strict=True)}
    assert ask() == Order(*faster)


def test_a_gain_below_three_percent_is_not_worth_the_memory(clock):
    clock.costs = {"forward": (1.0, 0.98), "backward": (1.0, 0.96)}
    assert ask() == Order(False, True)


def test_one_slow_repetition_decides_nothing(clock):
    clock.costs = {"forward": (1.0, 0.5), "backward": (1.0, 2.0)}
    spend = clock.spend

    def with_a_pause(which, through_sum):
        spend(which, through_sum)
        # the third run of the sum, which is the first that counts
        if clock.runs.count(("forward", True)) == 3 and (which, through_sum) == ("forward", True):
            clock.now += 100

    clock.spend = with_a_pause
    assert ask() == Order(True, False)


@pytest.mark.parametrize("faster", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("save", ["min", "full"])
def test_results_are_those_of_the_other_orders(clock, faster, save):
    clock.costs = {which: (2.0, 1.0) if sums else (1.0, 2.0) for which, sums in zip(clock.costs, faster, strict=True)}
    found = loss_and_gradients(adapted(save=save), tokens())
    # q and o, k and v, gate and up have their shapes in common
    assert len(measured()) == 4 and set(measured().values()) == {Order(*faster)}
    for other in ("factors", "sum", "auto"):
        wanted = loss_and_gradients(adapted(save=save, order=other), tokens())
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)
        for name, gradient in wanted[1].items():
            assert relative_error(found[1][name], gradient) < 1e-11, (other, name)
            if faster == ((other == "sum"),) * 2 and other != "auto":
                assert torch.equal(found[1][name], gradient), (other, name)


def test_the_real_clock_gives_an_order_and_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(timed_order, "_measured", {})
    before = torch.get_rng_state()
    order = ask(rows=64, n=32, m=16, r=8)
    assert isinstance(order, Order) and all(isinstance(through_sum, bool) for through_sum in order)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode():
        assert ask(rows=128, n=32, m=16, r=8) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_factors_are_taken(clock, dtype):
    clock.costs = {"forward": (2.0, 1.0), "backward": (2.0, 1.0)}
    layer = adapted(dtype).model.layers[0].mlp.up_proj
    setting, _ = layer.operands(torch.zeros(3, 32, dtype=dtype))
    assert setting.order == Order() and not measured()
    layer = adapted(torch.float32).model.layers[0].mlp.up_proj
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.zeros(3, 32))
    assert not measured()


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"save": "lora_fa"}], ids=str)
def test_what_excludes_the_sum_is_not_measured(clock, settings):
    clock.costs = {"forward": (2.0, 1.0), "backward": (2.0, 1.0)}
    model = adapted(**settings)
    found = loss_and_gradients(model, tokens())
    assert not measured()
    wanted = loss_and_gradients(adapted(**settings, order="factors"), tokens())
    assert all(torch.equal(gradient, wanted[1][name]) for name, gradient in found[1].items())


def test_without_numbers_the_rule_of_auto_stands_in(clock):
    """Until there is a measurement, which is then taken."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = adapted(torch.float32).model.layers[0].mlp.up_proj

    def order(x):
        return layer.operands(x)[0].order

    rule = {rows: choose_order(rows, 32, 48, 4, dtype=torch.float32, plain=True) for rows in (2, 256)}
    # so that the two can be told apart
    assert rule == {2: Order(), 256: Order(True, True)}
    clock.costs = {"forward": (1.0, 2.0), "backward": (2.0, 1.0)}
    for rows in rule:
        assert order(torch.empty(rows, 32, device="meta")) == rule[rows]
        with FakeTensorMode() as mode:
            assert order(torch.empty(rows, 32)) == rule[rows]
            assert order(mode.from_tensor(torch.empty(rows, 32))) == rule[rows]
    assert order(torch.empty(0, 32)) == Order()
    assert not measured() and not clock.runs
    assert order(torch.zeros(256, 32)) == Order(False, True)
    with FakeTensorMode():
        # on the device that was measured
        assert order(torch.empty(256, 32)) == Order(False, True)


def test_modes_that_count_or_replay_operations_see_no_measurement(clock):
    model, ids = adapted(torch.float32), tokens()
    factors = adapted(torch.float32, order="auto")
    counts = []
    for each in (model, factors):
        with FlopCounterMode(display=False) as counter:
            each(ids)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] and not measured()
    layer = model.model.layers[0].self_attn.o_proj

    def contexts():
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)

    x = torch.randn(4, 32, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert not measured()


@pytest.mark.parametrize("known", [False, True])
def test_compiled_layers_take_what_is_known_and_measure_nothing(clock, known):
    torch.compiler.reset()
    clock.costs = {"forward": (2.0, 1.0), "backward": (2.0, 1.0)}
    layer = adapted().model.layers[0].mlp.down_proj
    x = torch.randn(4, 48, dtype=torch.float64, requires_grad=True)
    if known:
        layer(x)
    runs, before = len(clock.runs), measured()
    graphs = []

    def seen(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(layer, backend=seen, fullgraph=True)
    y = function(x)
    assert len(clock.runs) == runs and measured() == before and len(graphs) == 1
    gradient = torch.autograd.grad(y.square().sum(), layer.lora_A.weight)[0]
    # of so few rows, operations speak for the factors, and the clock for the sum
    layer.lora.order = "sum" if known else "factors"
    wanted = layer(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), layer.lora_A.weight)[0])
    assert torch.equal(y, wanted)
    layer.lora.order = "time"
    # what is measured of other layers compiles nothing again
    ask(rows=64)
    function(x)
    assert len(graphs) == 1


def test_peft_models_are_timed_too(clock):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(layers=1), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    accelerate_peft(model, order="time")
    model(tokens())
    assert list(measured()) == [(16, 32, 48, 4, "torch.float32", "cpu")]
    with pytest.raises(ValueError, match="order must be one of 'auto', 'factors', 'sum', 'time', got 'clock'"):
        accelerate_peft(model, order="clock")


@pytest.mark.gpu
def test_a_gpu_is_measured_by_its_own_clock(monkeypatch):
    monkeypatch.setattr(timed_order, "_measured", {})
    # through the sum it is half the operations, and in the other case four times as many
    assert ask(rows=16384, n=1024, m=1024, r=512, device="cuda").forward
    assert not ask(rows=16, n=4096, m=4096, r=64, device="cuda").forward
    assert {device for *_, device in measured()} == {str(torch.zeros(0, device="cuda").device)}
