"""What a step computes: the loss and gradient of one big batch, on any number of processes, at the scheduled rate."""

import json
import math
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from faults import compile_without_a_compiler, on_backend, with_a_tracker
from safetensors.torch import load_file
from training import numbers, read_log, run, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from leanstep.optimizers import Lion, release_gradients
from leanstep.recipes.config.schema import ExpectConfig, ScheduleConfig
from leanstep.recipes.data.batches import MicroBatches, count_targets
from leanstep.recipes.data.sequences import IGNORED, as_sequence, shuffled
from leanstep.recipes.report.formatting import flat_scalars, format_duration, format_line, format_live, format_rate
from leanstep.recipes.report.samples import held_out_prompts, sample, word_starts
from leanstep.recipes.training.build import build_schedule, schedule_factor
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.logger import Clock, Progress
from leanstep.recipes.training.saver import compare
from leanstep.recipes.training.step import NonFinite, backward, gradient_norm


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def tiny(family: str) -> torch.nn.Module:
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def sequences_with_unequal_targets(count: int) -> dict[str, torch.Tensor]:
    """Sequences of 16 tokens of which 3, 5, 7, ... are real and the rest is padding."""
    input_ids = torch.randint(50, (count, 16))
    labels = input_ids.clone()
    for row in range(count):
        labels[row, 3 + 2 * row :] = -100
    return {"input_ids": input_ids, "labels": labels}


def part(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {key: value[rows] for key, value in batch.items()}


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_accumulation_over_unequal_batches_equals_one_big_batch(family, fresh_accelerate):
    model, batch = tiny(family), sequences_with_unequal_targets(6)
    total = int((batch["labels"][:, 1:] != -100).sum())
    logits = model(input_ids=batch["input_ids"]).logits
    targets = batch["labels"][:, 1:].reshape(-1)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 50), targets, reduction="none")
    expected = losses.sum() / total
    expected.backward()
    losses, expected = losses.detach(), expected.detach()
    expected_gradients = gradients(model)

    plugin = GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = accelerator.prepare(model)
    model.zero_grad()
    window = [part(batch, slice(first, first + 2)) for first in (0, 2, 4)]
    loss, seen = backward(accelerator, model, window)
    assert seen == total == int(count_targets(window))
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(model), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # the mean of the micro batches' means is another number: this test can tell
    means = [losses.view(6, -1)[2 * i : 2 * i + 2].sum() / count_targets([window[i]]) for i in range(3)]
    assert abs(float(sum(means) / 3 - expected)) > 1e-3

    norm = gradient_norm(accelerator, model, None)
    together = torch.cat([gradient.flatten() for gradient in expected_gradients])
    torch.testing.assert_close(norm, together.norm(), rtol=1e-5, atol=0)
    before = gradients(model)
    assert gradient_norm(accelerator, model, limit=1e-3) == norm
    torch.testing.assert_close(gradient_norm(accelerator, model, None), torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert not torch.equal(before[0], gradients(model)[0])


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_half_of_a_window_is_marked_with_the_gradient_of_that_half(passes, fresh_accelerate):
    batch = sequences_with_unequal_targets(6)
    window = [part(batch, slice(first, first + 6 // passes)) for first in range(0, 6, 6 // passes)]
    plugin = GradientAccumulationPlugin(num_steps=passes, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model, marks = accelerator.prepare(tiny("llama")), []
    backward(accelerator, model, window, after_half=lambda share: marks.append((share, gradients(model))))
    whole = gradients(model)
    if passes == 1:
        assert marks == []
        return
    (share, half) = marks.pop()
    assert share == (passes // 2) / passes and marks == []
    model.zero_grad()
    targets = count_targets(window)
    for piece in window[: passes // 2]:
        model(**piece, num_items_in_batch=targets).loss.backward()
    for found, wanted, both in zip(half, gradients(model), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        assert not torch.equal(found, both)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_lanton_takes_its_noise_from_the_halves_of_a_step(recipe, tmp_path, world):
    lanton = "optimizer={name: lanton, lr: 1e-3, args: {noise: halves}}"
    options = ["steps=2", "checkpoint.every=0", lanton, "max_grad_norm=0.1", f"batch.micro_batch_size={4 // world}"]
    training = run(recipe, options, tmp_path / "run", world=world)
    assert training.codes == [0] * world, training.text()
    first = next(entry for entry in read_log(tmp_path / "run") if entry["kind"] == "train")["optimizer"]
    # no gradient but the first step's has been seen: what is known is from its halves
    assert first["noise/transformer.h.0.attn.c_attn.weight"] > 0
    refused = run(recipe, [lanton, f"batch.micro_batch_size={8 // world}"], tmp_path / "one", world=world)
    assert refused.codes == [2] * world and "lower batch.micro_batch_size, or take noise: previous" in refused.text()


def test_a_non_finite_loss_can_be_caught_before_backward(fresh_accelerate):
    accelerator = Accelerator(cpu=True)
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model = accelerator.prepare(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    release = release_gradients(model, Lion(model.parameters(), lr=1e-3))
    with pytest.raises(NonFinite):
        backward(accelerator, model, [sequences_with_unequal_targets(2)], release=release)
    for parameter, weight in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(recipe, tmp_path):
    # without packing, each document is cut or padded: 8 documents a step with unequal numbers of tokens
    documents = recipe.parent / "documents.jsonl"
    words = (recipe.parent / "text.txt").read_text().split()
    with documents.open("w") as file:
        for index in range(90):
            text = " ".join(words[7 * index : 7 * index + 2 + index % 11])
            file.write(json.dumps({"text": text}) + "\n")
    options = ["data.source=json", f"data.path={documents}", "data.packing=false", "data.val_tokens=150", "steps=12"]
    one = run(recipe, [*options, "batch.micro_batch_size=8"], tmp_path / "one")
    assert one.codes == [0], one.text()
    two = run(recipe, [*options, "batch.micro_batch_size=2"], tmp_path / "two", world=2)
    assert two.codes == [0, 0], two.text()
    left, right = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    # kind, step, loss, lr, gradient norm, tokens, perplexity; the sample at the end depends on every bit
    for a, b in zip(left[:-1], right[:-1], strict=True):
        assert a[:2] == b[:2] and a[3] == b[3] and a[5] == b[5]
        assert a[2] == pytest.approx(b[2], rel=1e-5)
        assert a[4] is None or a[4] == pytest.approx(b[4], rel=1e-3)
    tokens = [entry["tokens"] for entry in read_log(tmp_path / "one") if entry["kind"] == "train"]
    steps = {after - before for before, after in zip(tokens, tokens[1:], strict=False)}
    assert len(steps) > 3, "the steps were to have unequal numbers of targets"


@pytest.mark.slow
def test_the_rate_follows_the_schedule_whatever_the_processes(recipe, tmp_path):
    options = ["steps=10", "schedule={name: cosine, warmup_steps: 3, final_fraction: 0.2}", "batch.micro_batch_size=1"]
    assert run(recipe, options, tmp_path / "run", world=2).codes == [0, 0]
    rates = [entry["lr"] for entry in read_log(tmp_path / "run") if entry["kind"] == "train"]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * place / 6)) / 2 for place in range(7)]
    assert rates == pytest.approx([1e-3 * factor for factor in [0.25, 0.5, 0.75, *cosine]])


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_shapes(name):
    factor = schedule_factor(ScheduleConfig(name=name, warmup_fraction=0.1, final_fraction=0.1), 100)
    values = [factor(made) for made in range(100)]
    assert values[:11] == pytest.approx([(made + 1) / 11 for made in range(11)])
    assert values[99] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(0 < value <= 1 for value in values)
    if name == "linear":
        assert values[10] - values[50] == pytest.approx(40 * (values[50] - values[51]))
    if name == "wsd":
        assert values[10:80] == [1.0] * 70  # 20 steps of decay: 80 to 99
        assert values[79:] == pytest.approx([1 - 0.9 * made / 20 for made in range(21)])
    # all warm-up, and none
    assert schedule_factor(ScheduleConfig(warmup_fraction=1.0), 4)(3) == pytest.approx(4 / 5)
    assert schedule_factor(ScheduleConfig(warmup_fraction=0.0), 4)(0) == 1
    assert schedule_factor(ScheduleConfig(warmup_fraction=0.0), 1)(0) == 1


def test_decay_after_warmup_and_over_all_steps():
    def rates(warmup, decay):
        schedule = ScheduleConfig(name="wsd", warmup_steps=warmup, decay_fraction=decay, final_fraction=0.0)
        return [schedule_factor(schedule, 5)(made) for made in range(5)]

    assert rates(0, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert rates(3, 1.0) == pytest.approx([0.25, 0.5, 0.75, 1, 0])  # decays after the warm-up
    assert rates(0, 0.0) == [1.0] * 5


@pytest.mark.parametrize("settings", [{"decay_fraction": 0.0}, {"warmup_steps": 4}, {"decay_fraction": 0.09}], ids=str)
def test_a_schedule_without_a_step_of_decay_is_asked_after_the_last_step_too(settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(ScheduleConfig(name="wsd", **{"warmup_fraction": 0.0, **settings}), optimizer, 5)
    for _ in range(5):
        optimizer.step()
        assert 0 < schedule.get_last_lr()[0] <= 1
        schedule.step()


def test_the_order_is_a_function_of_the_position():
    whole = [index for batch in MicroBatches(10, seed=3, batch_size=4, start=0, count=10) for index in batch]
    assert whole[:10] == shuffled(10, 3, 0).tolist() and whole[10:20] == shuffled(10, 3, 1).tolist()
    assert sorted(whole[30:40]) == list(range(10))
    later = [index for batch in MicroBatches(10, seed=3, batch_size=2, start=14, count=5) for index in batch]
    assert later == whole[14:24]


# -- the result ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def finished(request, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    llama = "{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}"
    model = [f"model={{family: llama, config: {llama}}}"] if request.param == "llama" else []
    training = run(recipe, ["steps=10", "precision=bf16", "expect={val_loss: 1.0, tolerance: 0.1}", *model], out)
    assert training.codes == [0], training.text()
    return training


def test_the_result_opens_in_transformers_with_the_same_logits(finished):
    folder = finished.out / "final"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the state of the union", return_tensors="pt").input_ids
    found = model(input_ids=ids).logits
    # built by hand from the configuration and the weights of the last checkpoint
    family = type(model)
    other = family(family.config_class.from_pretrained(folder))
    missing = other.load_state_dict(load_file(finished.out / "last" / "hf" / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    other.tie_weights()
    assert torch.equal(found, other.eval()(input_ids=ids).logits)
    assert found.shape[-1] == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.config.bos_token_id
    assert tokenizer.decode(ids[0]) == "the state of the union"


def test_samples_are_reproducible_and_logged(finished):
    logged = read_log(finished.out)[-1]
    paragraphs = logged["text"].split("\n\n")
    assert logged["kind"] == "sample" and len(paragraphs) == 3
    # one line each on the console, whatever they hold
    assert "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) in finished.text()
    assert all(re.match(r"\[[^]]+\].{10}", paragraph, re.DOTALL) for paragraph in paragraphs)
    tokenizer = AutoTokenizer.from_pretrained(finished.out / "final")
    prompts = [tokenizer("the state of")["input_ids"], tokenizer("the union")["input_ids"]]
    state = torch.get_rng_state()
    texts = [list(sample(finished.out / "final", prompts, seed, torch.device("cpu"))) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state), "it draws from generators of its own"
    assert texts[0] == texts[1] != texts[2]


def test_a_sample_is_never_blank(finished, tmp_path):
    """A model that ends every text at once still has to continue it."""
    folder = tmp_path / "final"
    model = AutoModelForCausalLM.from_pretrained(finished.out / "final")
    tokenizer = AutoTokenizer.from_pretrained(finished.out / "final")
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding[tokenizer.eos_token_id].expand_as(embedding))
        embedding[tokenizer.eos_token_id] *= 1000
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = [tokenizer("the state of the")["input_ids"], [tokenizer.eos_token_id]]
    for paragraph in sample(folder, prompts, 0, torch.device("cpu")):
        assert len(paragraph.split("]")[-1].strip()) > 10
        assert tokenizer.eos_token not in paragraph


def test_prompts_are_the_first_tokens_of_held_out_sequences():
    sequences = [as_sequence(np.array([9, *range(row, row + 30)]), 40, 0) for row in range(10, 17)]
    assert held_out_prompts(sequences, end_of_text=9) == [list(range(row, row + 16)) for row in (10, 12, 14)]
    assert held_out_prompts(sequences[:2], end_of_text=9) == [list(range(row, row + 16)) for row in (10, 11)]
    assert held_out_prompts([as_sequence(np.array([9]), 4, 0)], end_of_text=9) == [[9]]
    assert held_out_prompts([], end_of_text=9) == [[9]]


def test_prompts_begin_as_the_sequences_do():
    sequence = as_sequence(np.arange(20, 50), 40, 0, begin=(7, 8))
    assert held_out_prompts([sequence], end_of_text=9, begin=(7, 8)) == [[7, 8, *range(20, 36)]]
    asked = {**sequence, "labels": torch.where(torch.arange(40) < 5, IGNORED, sequence["labels"])}
    assert held_out_prompts([asked], end_of_text=9, begin=(7, 8)) == [[7, 8, 20, 21, 22]]


def test_prompts_begin_and_end_with_whole_words():
    long, short = (as_sequence(np.array([99, *range(length)]), 40, 0) for length in (30, 9))
    assert held_out_prompts([long], 99, lambda token: token % 5 == 3) == [list(range(3, 18))]
    assert held_out_prompts([long], 99, lambda token: False) == [list(range(16))]
    assert held_out_prompts([short], 99, lambda token: token % 5 == 3) == [list(range(3, 9))]
    tokens = ["\u0120the", "ory", "\u2581of", ".", " a"]
    starts = word_starts(SimpleNamespace(convert_ids_to_tokens=tokens.__getitem__))
    assert list(map(starts, range(5))) == [True, False, True, False, True]


def test_what_was_expected_is_compared_and_never_fatal(finished):
    assert "NOT within the expected 1.0000 +- 0.1, difference +" in finished.text()
    assert compare(2.0, ExpectConfig()) == "validation loss 2.0000, perplexity 7.39"
    inside = compare(2.05, ExpectConfig(val_loss=2.0, tolerance=0.1, source="seed 0"))
    assert inside.endswith("perplexity 7.77: within the expected 2.0000 +- 0.1 (seed 0), difference +0.0500")


@pytest.mark.slow
def test_a_changed_recipe_is_not_compared(recipe, tmp_path):
    text = recipe.read_text().replace("steps: 24", "steps: 3\nexpect: {val_loss: 5.0, tolerance: 9.0, source: seed 0}")
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("checkpoint: {every: 3}", "checkpoint: {every: 0}"))
    same = run(own, ["seed=3", "log.every=2"], tmp_path / "same")
    assert same.codes == [0] and "within the expected 5.0000 +- 9 (seed 0)" in same.text(), same.text()
    shorter = run(own, ["steps=2", "optimizer.lr=2e-3"], tmp_path / "shorter")
    assert shorter.codes == [0] and "within" not in shorter.text(), shorter.text()
    assert "(not compared: the recipe expects 5 without these changes: optimizer.lr, steps)" in shorter.text()
    assert "expected" not in (tmp_path / "shorter" / "report.html").read_text().split("Configuration")[0]
    # the run's own recipe says so too, whoever loads it
    assert "val_loss: null" in (tmp_path / "shorter" / "config.yaml").read_text()


def test_the_report_was_written(finished):
    page = (finished.out / "report.html").read_text()
    assert "<svg" in page and len(page) < 300_000


def test_the_console_and_train_log_tell_the_same(finished):
    printed = finished.text().splitlines()
    assert re.match(r"leanstep \S+: tiny, world size 1, backend none, device cpu, wrapping none", printed[0])
    assert (finished.out / "train.log").read_text().splitlines() == printed
    line = next(line for line in printed if line.startswith("step 5/10"))
    assert re.fullmatch(r"step 5/10  loss \d\.\d{4}  lr \S+  gnorm \S+  \S+ tok/s  eta \d+:\d\d", line)


def test_validation_in_the_run_is_that_of_the_evaluator(finished, recipe):
    from leanstep.recipes.config.loader import load
    from leanstep.recipes.data.sequences import load_data
    from leanstep.recipes.training.validation import evaluate

    data = load_data(load(str(recipe)).data, seed=0)
    model = AutoModelForCausalLM.from_pretrained(finished.out / "final")
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate(model, data.validation, bytes_per_token=data.bytes_per_token)
    logged = [entry for entry in read_log(finished.out) if entry["kind"] == "eval"][-1]
    assert logged["tokens"] == expected.tokens
    # the batches differ, and with them the rounding of bf16
    assert logged["loss"] == pytest.approx(expected.loss, rel=2e-3)
    assert logged["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=2e-3)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert run(recipe, ["steps=4", "checkpoint.every=0"], out).codes == [0]
    return numbers(out)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["activation_checkpointing=true", "max_grad_norm=1e9", "compile=true"])
def test_options_that_must_not_change_the_numbers(recipe, straight, tmp_path, option):
    training = run(
        recipe, ["steps=4", "checkpoint.every=0", option], tmp_path / "run", prepare=compile_without_a_compiler
    )
    assert training.codes == [0], training.text()
    assert ("graph captured" in training.text()) == (option == "compile=true")
    left, right = straight[:-1], numbers(tmp_path / "run")[:-1]
    assert [entry[2] for entry in left] == pytest.approx([entry[2] for entry in right], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["lion", "sinkgd"])
def test_released_gradients_change_nothing_but_memory(recipe, tmp_path, optimizer):
    options = ["steps=4", f"optimizer.name={optimizer}", "checkpoint.every=0", "batch.micro_batch_size=8"]
    backend = partial(on_backend, "reference")
    kept = run(recipe, options, tmp_path / "kept", prepare=backend)
    released = run(recipe, [*options, "release_gradients=true"], tmp_path / "released", prepare=backend)
    assert kept.codes == released.codes == [0], released.text()
    left, right = numbers(tmp_path / "kept"), numbers(tmp_path / "released")
    assert [entry[:4] for entry in left] == [entry[:4] for entry in right]
    assert all(entry[4] is None for entry in right) and left[0][4] is not None


@pytest.mark.slow
def test_released_gradients_of_several_passes_are_summed_in_the_momentum(recipe, tmp_path):
    options = ["steps=4", "optimizer={name: sinkgd, lr: 1e-2, args: {momentum: 0.9}}", "checkpoint.every=0"]
    options += ["batch.micro_batch_size=4"]
    kept, released = (run(recipe, [*options, *more], tmp_path / name) for name, more in
                      (("kept", []), ("released", ["release_gradients=true"])))  # fmt: skip
    assert kept.codes == released.codes == [0], released.text()
    left, right = ([entry[2] for entry in numbers(tmp_path / name) if entry[2]] for name in ("kept", "released"))
    assert len(left) == len(right) > 3 and right == pytest.approx(left, rel=1e-4)


def test_released_gradients_are_refused_where_they_cannot_work(recipe, tmp_path):
    options = ["release_gradients=true", "batch.micro_batch_size=8"]
    refused = run(recipe, options, tmp_path / "adamw")
    assert refused.codes == [2] and "release_gradients" in refused.text() and "AdamW" in refused.text()
    options = ["release_gradients=true", "batch.micro_batch_size=4", "optimizer.name=lion"]
    refused = run(recipe, options, tmp_path / "two", world=2)
    assert refused.codes == [2, 2] and "needs one process and this run has 2" in refused.text()


def test_eval_at_start_and_on_fewer_batches(recipe, tmp_path):
    options = ["steps=2", "eval={every: 0, at_start: true, batches: 1}", "checkpoint.every=0"]
    assert run(recipe, options, tmp_path / "run").codes == [0]
    evaluations = [entry for entry in read_log(tmp_path / "run") if entry["kind"] == "eval"]
    assert [entry["step"] for entry in evaluations] == [0, 2]
    assert evaluations[0]["tokens"] == 4 * 31


# -- what is shown -------------------------------------------------------------------------------------------------


def test_numbers_for_people():
    assert [format_rate(rate) for rate in (850, 12_400, 1_200_000)] == ["850 tok/s", "12.4k tok/s", "1.20M tok/s"]
    assert [format_duration(s) for s in (42, 760, 4360, 263_560)] == ["0:42", "12:40", "1:12:40", "3d 1:12:40"]
    entry = {"step": 3, "loss": 3.4121, "lr": 9.1e-4, "grad_norm": None, "tokens_per_s": None, "nonfinite": 2}
    assert (
        format_line(entry, 10, None, ["disk full"]) == "step 3/10  loss 3.4121  lr 9.10e-04  nonfinite 2  [disk full]"
    )


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("leanstep.recipes.training.logger.time.perf_counter", lambda: now[0])
    clock = Clock(elapsed_s=100.0)
    assert clock.eta(5, 1, 1) is None
    for _ in range(2):
        now[0] += 2.0
        clock.stepped(1000)
    with clock.pause("eval"):
        now[0] += 50.0
    with clock.pause("save") as spent:
        now[0] += 7.0
    clock.measure()
    assert clock.rate_now == 500.0 and spent() == 7.0
    assert clock.eta(steps=10, evals=2, saves=1) == 10 * 2.0 + 2 * 50.0 + 7.0
    assert clock.elapsed_s == 161.0 and clock.here_s == 61.0


def test_the_live_line_follows_every_step(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    with Progress(folder, 10, active=True, live=True) as progress:
        progress.line(1, "step 1/10  loss 4.0000", is_logged=True)
        progress.line(2, "step 2/10  loss 3.9000", is_logged=False)
        progress.say("[brackets] are not markup")
    assert (tmp_path / "train.log").read_text() == "step 1/10  loss 4.0000\n[brackets] are not markup\n"
    printed = capsys.readouterr().out
    assert "[brackets] are not markup" in printed and "step 2/10  loss 3.9000" in printed


def test_loss_rate_and_time_left_fit_beside_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    entry = {"step": 123456, "loss": 4.0, "lr": 1e-3, "grad_norm": 1.25, "tokens_per_s": 123456.7, "mfu": 0.4}
    with Progress(RunFolder(tmp_path), 200000, active=True, live=True) as progress:
        facts = entry, 200000, 3 * 86400.0, []
        progress.line(123456, format_line(*facts), is_logged=False, live=format_live(*facts))
    printed = capsys.readouterr().out
    assert "123456/200000  loss 4.0000  123.5k tok/s  eta 3d 0:00:00" in printed


def test_other_processes_are_silent(tmp_path, capsys):
    with Progress(RunFolder(tmp_path), 10, active=False) as progress:
        progress.say("nothing")
        progress.line(1, "nothing", is_logged=True)
    assert capsys.readouterr().out == "" and not (tmp_path / "train.log").exists()


def test_log_lines_wait_for_room(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1})
    monkeypatch.setattr("pathlib.Path.open", lambda *arguments, **options: (_ for _ in ()).throw(OSError(28, "full")))
    folder.log({"step": 2})
    monkeypatch.undo()
    folder.log({"step": 3})
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3]


def test_rewinding_the_log_drops_what_is_computed_again(tmp_path):
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    folder.rewind_log(2)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_the_recipe_for_trackers_is_flat():
    tree = {"a": {"b": {"c": 1.5}}, "d": None, "e": [1, 2], "f": True, "g": {}}
    assert flat_scalars(tree) == {"a.b.c": 1.5, "d": "None", "e": "[1, 2]", "f": True}


def test_trackers_get_the_recipe_and_the_numbers(recipe, tmp_path):
    out = tmp_path / "run"
    training = run(recipe, ["steps=4", "log={every: 2, trackers: [notebook]}"], out, prepare=with_a_tracker)
    assert training.codes == [0], training.text()
    kept = [json.loads(line) for line in (out / "notebook.jsonl").read_text().splitlines()]
    assert kept[0]["config"]["optimizer.lr"] == 1e-3 and kept[0]["config"]["model.family"] == "gpt2"
    logged = {entry["step"]: entry for entry in read_log(out) if entry["kind"] == "train"}
    for entry in kept[1:-1]:
        if "loss" in entry["values"]:
            assert entry["values"]["loss"] == logged[entry["step"]]["loss"]
    assert any("val_loss" in entry["values"] for entry in kept[1:-1]) and kept[-1] == {"end": True}


def test_a_tracker_that_is_not_installed_is_an_error(recipe, tmp_path):
    refused = run(recipe, ["log.trackers=[comet_ml]"], tmp_path / "run")
    assert refused.codes == [2] and "pip install comet_ml" in refused.text()
    unknown = run(recipe, ["log.trackers=[tensorbord]"], tmp_path / "run")
    assert unknown.codes == [2] and "tensorboard" in unknown.text()
