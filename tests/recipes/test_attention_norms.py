"""Runs that watch their attention or let it run low-rank: numbers at log steps, and a report at the end."""

import json

import pytest
from training import read_log, run, write_recipe

from leanstep.lora.norms import STATUSES
from leanstep.recipes.loader import ConfigError, load
from leanstep.recipes.report import write_report

ON = "log.attention_norms=true"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


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
