"""Runs that watch their attention: numbers at log steps, a report at the end, and training as if nobody looked."""

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
