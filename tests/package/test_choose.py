"""The generated tables of docs/choose.md and docs/recipe-keys.md."""

import importlib
from pathlib import Path

from architectures import CAUSAL, ENCODER_DECODER, IMAGE, MASKED, WITHOUT_HEAD

from leanstep.cli import main
from leanstep.recipes.config.catalog import recipe_keys

ROOT = Path(__file__).parents[2]
KINDS = {
    "causal language models": CAUSAL,
    "masked language models": MASKED,
    "encoders with decoders": ENCODER_DECODER,
    "image classifiers": IMAGE,
    "without a head": WITHOUT_HEAD,
}


def block(page, name):
    return (ROOT / "docs" / page).read_text("utf-8").split(f"<!-- table:{name} -->\n")[1].split("\n<!-- /table")[0]


def test_the_page_lists_the_architectures_that_the_suite_prunes():
    rows = [f"| {kind} | {', '.join(sorted(c for c, _ in some.values()))} |" for kind, some in KINDS.items()]
    caption = "`pytest tests/pruning/test_architectures.py`, written by `leanstep prune`:"
    expected = "\n".join([caption, "", "| | classes |", "|---|---|", *rows])
    assert block("choose.md", "architectures") == expected


def test_the_page_lists_the_keys_that_the_command_prints(capsys):
    rows = "\n".join(f"| `{key}` | `{default}` | {values} |" for key, default, values in recipe_keys())
    head = "`leanstep recipes keys`:\n\n| key | default | values |\n| --- | --- | --- |"
    assert block("recipe-keys.md", "recipe-keys") == f"{head}\n{rows}"
    assert main(["recipes", "keys"]) == 0
    printed = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [words[0] for words in printed[1:]] == [key for key, _, _ in recipe_keys()]
    assert ["lora.r", "8", "whole number at least 1"] in printed


def test_the_table_of_sizes_is_what_check_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sizes = importlib.import_module("recipes.sizes")
    cells = [line.strip("| ").split(" | ") for line in block("choose.md", "sizes").splitlines()]
    rows = {name: numbers for name, *numbers in cells}
    for optimizer in ("AdamW", "SinkGD, gradients released"):
        assert rows[optimizer][0] == sizes.gigabytes("60m", optimizer)
        assert rows[optimizer][-1] == sizes.gigabytes("1b", optimizer)
    assert [rows[name][-1] for name in rows if name.startswith(("tokens", "hours"))] == list(sizes.hours("1b"))
    row = "the same on 4 bits"
    assert sizes.tuned((row,)).splitlines()[-1] in block("choose.md", "tuned").splitlines()
