"""The memory estimate against what real tensors of a real step take."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from leanstep.kernels import use_backend
from leanstep.recipes.check import costs
from leanstep.recipes.check.costs import estimate, meta_model, optimizer_state_bytes, saved_storages, unique_bytes
from leanstep.recipes.config.loader import load
from leanstep.recipes.config.schema import EmaConfig
from leanstep.recipes.training.build import build_model, build_optimizer

SMALL = {
    "llama": (
        "llama-nano-adamw",
        "model.config={hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 2}",
    ),
    "llama tied": ("llama-nano-adamw", "model.config.num_hidden_layers=2"),
    "gpt2": ("gpt-nano-adamw", "model.config={n_embd: 64, n_layer: 2, n_head: 2, n_positions: 64}"),
}
SHORT = ["data.seq_len=64", "batch.tokens_per_step=256", "batch.micro_batch_size=4"]


def recipe(model="llama", *overrides, optimizer="adamw"):
    name, change = SMALL[model]
    return load(name, [*SHORT, change, f"optimizer={{name: {optimizer}, lr: 1e-3}}", *overrides])


def real_step(config, vocab_size=2048):
    """Bytes of weights, gradients, optimizer state and saved activations of a step with real tensors."""
    dtype = torch.bfloat16 if config.precision == "bf16-pure" else torch.float32
    model = build_model(config.model, vocab_size, dtype).train()
    if config.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = build_optimizer(config.optimizer, model)
    ids = torch.randint(vocab_size, (config.batch.micro_batch_size, config.data.seq_len))
    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()
    with saved_storages(model) as saved, autocast:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    with use_backend("reference"):  # the state is the same for all backends, and compiling one takes its time
        optimizer.step()
    state = [tensor for values in optimizer.state.values() for tensor in values.values() if torch.is_tensor(tensor)]
    activations = sum(storage.nbytes() for storage in saved.values())
    return unique_bytes(model.parameters()), unique_bytes(gradients), unique_bytes(state), activations


@pytest.mark.parametrize(
    ("model", "precision", "optimizer"),
    [
        ("llama", "fp32", "adamw"),
        ("llama", "bf16-pure", "sinkgd"),
        ("llama tied", "bf16", "lion"),
        ("llama tied", "fp32", "sinkgd"),
        ("gpt2", "bf16-pure", "adamw"),
        ("gpt2", "bf16", "sinkgd"),
        ("gpt2", "fp32", "lion"),
        ("gpt2", "bf16-pure", "lanton"),
        ("llama", "fp32", "mfac, args: {window: 8}"),
        ("llama tied", "bf16-pure", "muon"),
        ("gpt2", "fp32", "sgd, args: {momentum: 0.9}"),
        ("gpt2", "fp32", "scale"),
    ],
)
def test_weights_gradients_and_state_are_exact_and_activations_close(model, precision, optimizer):
    config = recipe(model, f"precision={precision}", optimizer=optimizer)
    found = estimate(config, 2048)
    weights, gradients, state, activations = real_step(config)
    assert (found.weights, found.gradients, found.optimizer_state) == (weights, gradients, state)
    # the same operations save the same tensors, except where a real one is a view and the fake one a copy
    assert found.activations == pytest.approx(activations, rel=0.05)


DEEP = {
    "llama": ("llama", "model.config={hidden_size: 32, num_hidden_layers: 20, num_attention_heads: 2}"),
    "checkpointing": ("gpt2", "model.config={n_embd: 32, n_layer: 20, n_head: 2}", "activation_checkpointing=true"),
    "sparse": ("llama", "model.config.num_hidden_layers=20", "sparsity={patterns: {'*.mlp.*': '2:4'}}"),
    "a group": (
        "llama",
        "model.config.num_hidden_layers=20",
        "optimizer.groups=[{match: 'layers.19.', lr: 1e-4}]",
        "optimizer.name=sinkgd",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DEEP)
def test_a_deep_model_takes_what_its_layers_take_whether_or_not_it_is_built(case):
    config = recipe(*DEEP[case])
    assert estimate(config, 2048) == costs._measured(config, 2048, 1, "cpu")
    assert (costs._equal_layers(config) is None) == (case == "a group")


def test_a_thousand_layers_are_estimated_from_a_few(monkeypatch):
    built = []
    monkeypatch.setattr(costs, "_measured", lambda config, *_: built.append(config) or costs.MemoryEstimate(*range(7)))
    estimate(recipe("llama", "model.config.num_hidden_layers=1000"), 2048)
    assert [config.model.config["num_hidden_layers"] for config in built] == [4, 8]


def test_an_average_takes_four_bytes_a_weight():
    plain = recipe("llama", "precision=bf16-pure", optimizer="sinkgd")
    averaged = replace(plain, ema=EmaConfig(decay=0.9))
    assert estimate(averaged, 2048) == replace(estimate(plain, 2048), average=2 * estimate(plain, 2048).weights)


def test_halves_of_a_step_are_a_copy_of_the_gradients_and_no_state():
    halves = "lanton, args: {noise: halves, noise_dtype: bfloat16}"
    config = recipe("llama", "batch.micro_batch_size=2", optimizer=halves)
    found = estimate(config, 2048)
    previous = estimate(recipe("llama", "batch.micro_batch_size=2", optimizer="lanton"), 2048)
    assert found.gradients == previous.gradients + previous.gradients // 2
    assert found.weights == previous.weights < found.optimizer_state < previous.optimizer_state
    fp32 = estimate(recipe("llama", "batch.micro_batch_size=2", optimizer="lanton, args: {noise: halves}"), 2048)
    assert fp32.gradients == 2 * previous.gradients and fp32.optimizer_state == found.optimizer_state


def test_a_state_that_cannot_be_told_is_an_error(monkeypatch):
    class Late(torch.optim.Optimizer):
        """Looks at a gradient before it makes its state."""

        def __init__(self, params, lr, weight_decay):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        def step(self):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad.sum().item() > 0:
                        self.state[parameter]["late"] = torch.zeros_like(parameter)

    monkeypatch.setattr("leanstep.recipes.training.build.optimizer_class", lambda name: Late)
    with pytest.raises(ValueError, match="the state of Late is not known before a step with real numbers"):
        estimate(recipe(optimizer="sgd"), 2048)


def test_checkpointing_keeps_less_and_the_estimate_knows():
    config = recipe("llama tied", "activation_checkpointing=true")
    found = estimate(config, 2048)
    assert found.activations == pytest.approx(real_step(config)[3], rel=0.05)
    assert found.activations < estimate(recipe("llama tied"), 2048).activations / 2


def test_the_peak_holds_for_real_allocations():
    """Count every byte that torch's CPU allocator hands out and takes back during a step."""
    config = recipe("llama tied", "batch.micro_batch_size=4")
    found = estimate(config, 2048)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        real_step(config)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert found.peak * 0.6 < peak < found.peak * 1.15


def test_parts_that_are_divided_shared_or_released():
    one = estimate(recipe(), 2048)
    two = estimate(recipe("llama", "batch.micro_batch_size=2"), 2048, world_size=2)
    assert (one.exchange, two.exchange) == (0, one.gradients)
    assert two.weights == one.weights
    sharded = estimate(recipe("llama", "batch.micro_batch_size=2", "distributed.strategy=fsdp2"), 2048, world_size=2)
    assert sharded.exchange == 0
    assert sharded.weights == -(-one.weights // 2)
    assert sharded.optimizer_state == -(-one.optimizer_state // 2)
    released = estimate(recipe("llama", "release_gradients=true", optimizer="sinkgd"), 2048)
    assert released.gradients == 4 * 2048 * 64  # the largest weight
    assert dict(one.rows())["peak, with a margin of 10 %"] == one.peak
    assert one.logits == 4 * 4 * 64 * 2048


@pytest.mark.parametrize(
    ("optimizer", "gigabytes"),
    [("adamw", {"60m": 0.35, "1b": 8.03}), ("lion", {"60m": 0.23, "1b": 5.36}), ("sinkgd", {"60m": 0.25, "1b": 3.20})],
)
@pytest.mark.parametrize("size", ["60m", "1b"])
def test_published_sizes_take_the_expected_memory(size, optimizer, gigabytes):
    """bf16 weights and state: 2 bytes a weight, and 4 (AdamW), 2 (Lion) or 0 (SinkGD's matrices) of state."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from leanstep.recipes.check.costs import fake_model

    config = load(f"llama-{size}-{optimizer}" if optimizer != "lion" else f"llama-{size}-adamw")
    if optimizer == "lion":
        config = load(f"llama-{size}-adamw", ["optimizer={name: lion, lr: 1e-4}"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_model(config, 32000)
        total = unique_bytes(model.parameters()) + optimizer_state_bytes(build_optimizer(config.optimizer, model))
    # step counters are a few bytes a tensor
    assert total / 1e9 == pytest.approx(gigabytes[size], abs=0.0055)


def test_the_meta_model_has_names_and_shapes_and_no_data():
    model = meta_model(load("llama-60m"), 32000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 58_073_600
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_folder_to_continue_from_is_read_for_its_config_only(tmp_path):
    config = recipe()
    model = build_model(config.model, 2048)
    model.save_pretrained(tmp_path)
    expected = estimate(config, 2048)
    (tmp_path / "model.safetensors").unlink()
    continued = recipe("llama", "model.config={}", f"model.init_from={tmp_path}")
    assert estimate(continued, 2048) == expected


def test_the_estimate_allocates_nothing_of_the_models_size():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = estimate(load("llama-60m", ["batch.micro_batch_size=8"]), 32000)
    allocated = sum(
        max(0, event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    assert found.weights == 2 * 58_073_600
    assert allocated < 10e6
