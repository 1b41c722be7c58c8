"""Runs that watch their attention or let it run low-rank: numbers at log steps, and a report at the end."""

import json
import signal
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from faults import add_documented_part, held_at, low_rank_takes, signal_in_evaluation
from safetensors.torch import load_file
from training import Training, numbers, read_log, run, write_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from leanstep.lora import LowRankGate
from leanstep.lora.attention.monitor import STATUSES
from leanstep.recipes.check.costs import check_layers
from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.methods.gate import Gate
from leanstep.recipes.report.report import write_report
from leanstep.recipes.training.checkpoint import CheckpointError

ON = "log.attention_norms=true"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_a_new_part_of_training_is_one_file(recipe, tmp_path):
    done = run(recipe, ["steps=2", "log.every=1", ON], tmp_path / "run", prepare=add_documented_part)
    assert done.codes == [0], done.text()
    first, second = (row["head"]["norm"] for row in read_log(done.out) if row["kind"] == "train")
    assert 0 < first != second


def losses(folder):
    return {row["step"]: row["loss"] for row in read_log(folder) if row["kind"] == "train"}


def test_a_run_logs_where_its_heads_stand_and_trains_the_same(recipe, tmp_path):
    settings = ("steps=4", "log.every=2", "eval.every=0", "checkpoint.every=0")
    run(recipe, settings, tmp_path / "plain")
    run(recipe, [*settings, ON], tmp_path / "watched")
    assert losses(tmp_path / "plain") == losses(tmp_path / "watched")
    rows = [row for row in read_log(tmp_path / "watched") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 4]
    for row in rows:
        numbers = row["attention"]
        heads = sum(numbers[f"heads/{status}"] for status in STATUSES)
        layers = [key for key in numbers if key.startswith("sampled logit/")]
        assert layers and heads % len(layers) == 0 and all(numbers[key] > 0 for key in layers)
    # weights move, and so do the norms
    assert rows[0]["attention"] != rows[-1]["attention"]
    reported = json.loads((tmp_path / "watched" / "attention_report.json").read_text())
    assert len(reported) == heads and {row["status"] for row in reported} <= set(STATUSES)
    assert not (tmp_path / "plain" / "attention_report.json").exists()
    page = write_report([tmp_path / "watched"], tmp_path / "report.html").read_text()
    assert "Attention norms" in page and "Attention: sampled logit" in page and reported[0]["status"] in page
    assert "Attention norms" not in write_report([tmp_path / "plain"], tmp_path / "plain.html").read_text()


def test_a_run_clips_the_heads_that_pass_the_threshold(recipe, tmp_path):
    """Its losses change, its log says which logits were clipped, and a resumed run is the same bit for bit."""
    settings = ["steps=4", "log.every=1", "eval.every=0", "checkpoint.every=2", "qk_clip.threshold=1e-4"]
    run(recipe, settings, tmp_path / "whole")
    run(recipe, [*settings, "qk_clip.threshold=null"], tmp_path / "plain")
    whole, plain = losses(tmp_path / "whole"), losses(tmp_path / "plain")
    assert whole[1] == plain[1] and whole[2] != plain[2]
    rows = [row["qk_clip"] for row in read_log(tmp_path / "whole") if row["kind"] == "train"]
    assert len(rows) == 4 and rows[0]["heads"] > 0
    assert any(key.startswith("logit/transformer.h.0") for key in rows[0])
    assert not (tmp_path / "whole" / "attention_report.json").exists()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    run(recipe, [*settings, f"checkpoint.resume={checkpoint}"], tmp_path / "again")
    assert losses(tmp_path / "again") == {step: loss for step, loss in whole.items() if step > 2}


def test_compiled_models_are_refused_before_anything_is_built():
    with pytest.raises(ConfigError) as caught:
        load("llama-nano-adamw", [ON, "compile=true"])
    assert "which compile hides" in "".join(caught.value.problems)


def test_a_run_lets_layers_run_low_rank_only_where_that_pays(recipe, tmp_path):
    base = tmp_path / "base"
    run(recipe, ("steps=1", "eval.every=0", "checkpoint.every=0"), base)
    settings = [
        f"model.init_from={base}/final", "model.config={}", f"data.tokenizer={base}/final", "eval.every=0",
        "lora.target_modules=[c_attn]", "steps=6", "log.every=1", "checkpoint.every=0",
    ]  # fmt: skip
    auto = [*settings, "lora.attention=auto", "lora.attention_tolerance=0.5"]
    run(recipe, settings, tmp_path / "exact")
    run(recipe, auto, tmp_path / "short")
    # so short sequences do not pay, and everything is as it was
    assert losses(tmp_path / "short") == losses(tmp_path / "exact")
    rows = json.loads((tmp_path / "short" / "gate_report.json").read_text())
    assert rows and all(not row["low_rank_calls"] and "predicted to cost" in row["reason"] for row in rows)
    assert not (tmp_path / "exact" / "gate_report.json").exists()
    logged = [row["gate"] for row in read_log(tmp_path / "short") if row["kind"] == "train"]
    assert all(numbers["low-rank calls"] == 0 for numbers in logged)
    assert {key for numbers in logged for key in numbers} >= {f"gate error/{row['layer']}" for row in rows}
    said = (tmp_path / "short" / "train.log").read_text()
    assert f"0 of {len(rows)} layers ran low-rank; close enough, but predicted" in said
    page = write_report([tmp_path / "short"], tmp_path / "report.html").read_text()
    assert "<h2>Low-rank attention</h2>" in page and "largest_error" in page


@pytest.fixture(scope="module")
def gated(recipe, tmp_path_factory):
    """The settings of a run in which layers go low-rank, and that run."""
    folder = tmp_path_factory.mktemp("gated")
    run(recipe, ("steps=1", "eval.every=0", "checkpoint.every=0"), folder / "base")
    settings = [
        f"model.init_from={folder}/base/final", "model.config={}", f"data.tokenizer={folder}/base/final",
        "lora.target_modules=[c_attn, c_fc]", "optimizer.lr=1e-2", "steps=12", "lora.attention=auto",
        "lora.attention_tolerance=0.5",
    ]  # fmt: skip
    whole = run(recipe, settings, folder / "whole", prepare=partial(low_rank_takes, 1e-3))
    assert whole.codes == [0], whole.text()
    return settings, whole.out


def gate_report(out):
    return json.loads((out / "gate_report.json").read_text())


def assert_the_same_run(out, whole):
    assert numbers(out) == numbers(whole) and gate_report(out) == gate_report(whole)
    files = [folder / "final" / "adapter" / "adapter_model.safetensors" for folder in (out, whole)]
    found, wanted = map(load_file, files)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_a_killed_run_with_low_rank_layers_continues_as_if_it_had_not_been(recipe, gated, tmp_path):
    settings, whole = gated
    assert all(row["low_rank"] and row["low_rank_calls"] > 20 for row in gate_report(whole))
    prepare = partial(held_at, 11, partial(low_rank_takes, 1e-3))
    broken = Training(recipe, settings, tmp_path / "broken", prepare=prepare)
    broken.wait_for(lambda training: training.last_step() >= 10)
    broken.kill()
    assert broken.wait() == [-9]
    # on this machine it would not pay, and the layers would be judged in other calls
    again = run(recipe, settings, tmp_path / "broken", prepare=partial(low_rank_takes, 1e3))
    assert again.codes == [0] and "resuming from" in again.text() and "WARNING" not in again.text(), again.text()
    assert_the_same_run(tmp_path / "broken", whole)


@pytest.mark.slow
def test_each_process_takes_over_its_own_decisions(recipe, gated, tmp_path):
    settings, _ = gated
    pays, other = partial(low_rank_takes, 1e-3), partial(low_rank_takes, 1e3)
    whole = run(recipe, settings, tmp_path / "whole", world=2, prepare=pays)
    assert whole.codes == [0, 0], whole.text()
    broken = Training(recipe, settings, tmp_path / "broken", world=2, prepare=partial(held_at, 9, pays))
    broken.wait_for(lambda training: training.last_step() >= 8)
    broken.kill()
    broken.wait()
    last = tmp_path / "broken" / "last" / "trainer"
    states = [torch.load(last / f"gate_{rank}.pt", weights_only=True) for rank in range(2)]
    centers = [next(iter(state["layers"].values()))["center"] for state in states]
    assert not torch.equal(*centers), "they saw other batches"
    again = run(recipe, settings, tmp_path / "broken", world=2, prepare=other)
    assert again.codes == [0, 0] and "WARNING" not in again.text(), again.text()
    assert_the_same_run(tmp_path / "broken", whole.out)


@pytest.mark.slow
def test_an_evaluation_that_is_made_again_is_judged_once(recipe, gated, tmp_path):
    settings, whole = gated
    prepare = partial(low_rank_takes, 1e-3, partial(signal_in_evaluation, signal.SIGTERM))
    stopped = run(recipe, settings, tmp_path / "stopped", prepare=prepare)
    assert stopped.codes == [143], stopped.text()
    again = run(recipe, settings, tmp_path / "stopped", prepare=partial(low_rank_takes, 1e3))
    assert again.codes == [0], again.text()
    assert_the_same_run(tmp_path / "stopped", whole)


def test_decisions_of_other_layers_or_processes_are_not_taken(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    accelerator = SimpleNamespace(process_index=0, num_processes=1)
    gate = Gate(SimpleNamespace(accelerator=accelerator))
    (tmp_path / "trainer").mkdir()
    with LowRankGate(model, "auto") as gate.source:
        # as checkpoints of before there were any
        assert "decisions of 0 processes, not of 1: layers are judged anew" in gate.load(tmp_path)
        gate.save(tmp_path / "trainer")
        assert gate.load(tmp_path) is None
        accelerator.num_processes = 2
        assert "decisions of 1 processes, not of 2" in gate.load(tmp_path)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=1, bos_token_id=0, eos_token_id=0))
    accelerator.num_processes = 1
    with LowRankGate(model, "auto") as gate.source, pytest.raises(CheckpointError) as caught:
        gate.load(tmp_path)
    assert "gate_0.pt cannot be loaded" in str(caught.value)
    assert "LowRankGate: the state is of other attention layers" in str(caught.value)


def test_attention_that_cannot_be_gated_is_refused_before_anything_is_built():
    for settings, message in (
        (["lora.attention=auto", "compile=true"], "which compile hides"),
        (["lora.attention=auto", "lora.target_modules=[]"], "goes with adapters"),
        (["lora.attention=fast"], "lora.attention"),
        (["lora.attention_tolerance=0"], "must be greater than 0, got 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            load("llama-nano-lora", settings)
        assert message in "".join(caught.value.problems)


@pytest.mark.parametrize("key", ["log.attention_norms", "lora.attention"])
def test_attention_that_cannot_be_looked_into_is_told_before_the_text_is_read(recipe, monkeypatch, key):
    def refuse(model):
        raise ValueError("attention implementation 'fast' has no mask function in transformers; take 'sdpa'")

    for module in ("monitor", "gate"):
        monkeypatch.setattr(f"leanstep.lora.attention.{module}.attach", refuse)
    config = load(str(recipe), [ON] if key == "log.attention_norms" else [])
    if key == "lora.attention":
        config = replace(config, lora=replace(config.lora, attention="auto"))
    with pytest.raises(ValueError, match=f"^{key}: attention implementation 'fast' has no mask function"):
        check_layers(config)
