"""References between the values of a recipe and to environment variables, whose values no file of a run shows."""

import json
import os
import re
from dataclasses import replace
from functools import partial

import faults
import pytest
from training import numbers, run, write_recipe

from leanstep.recipes.config.differences import config_differences
from leanstep.recipes.config.loader import ConfigError, dump, load
from leanstep.recipes.config.values import recorded

SECRET = "s3cr3t-value-of-a-variable"
FROM = "model: {init_from: x}"


@pytest.fixture
def recipe(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.setenv("STEPS", "17")
    monkeypatch.setenv("ODD", "${name}")
    monkeypatch.setenv("HALF", os.fsdecode(b"\xff"))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("description: a ${name} b ${seed} ${compile}", "description", "a mine b 0 False"),
        ("description: ${oc.env:SECRET}", "description", SECRET),
        ("description: ${oc.env:NONE,other}", "description", "other"),
        ("description: ${oc.env:NONE,'other'}", "description", "other"),
        ("description: ${oc.env:ODD}", "description", "${name}"),
        ("description: '\\${name}'", "description", "${name}"),
        ("description: ${data.${data.source}}\ndata: {source: text, path: name, text: 1}", None, None),
        ("description: ${data.${oc.env:NONE,source}}", "description", "sotu"),
        ("steps: ${oc.decode:${oc.env:STEPS}}", "steps", 17),
        ("eval: {every: '${..steps}'}", "eval.every", 600),
        ("eval: {every: '${.batches}', batches: 7}", "eval.every", 7),
        (
            f"lora: {{target_modules: [a], modules_to_save: '${{.target_modules}}'}}\n{FROM}",
            "lora.modules_to_save",
            ["a"],
        ),
        (f"lora: {{target_modules: [a, '${{name}}', '${{.0}}']}}\n{FROM}", "lora.target_modules", ["a", "mine", "a"]),
        (f"lora: {{target_modules: [a], save: '${{lora.target_modules[0]}}'}}\n{FROM}", None, None),
    ],
)
def test_references_become_values(text, key, value, recipe):
    if key is None:
        with pytest.raises(ConfigError):
            load(recipe(text))
        return
    config = load(recipe(text))
    for step in key.split("."):
        config = getattr(config, step)
    assert config == value


CHAIN = "".join(f"  k{i}: '${{model.config.k{i - 1}}}${{model.config.k{i - 1}}}'\n" for i in range(1, 60))
DEEP = "".join(f"  k{i}: {'[' * 40}'${{model.config.k{i - 1}}}'{']' * 40}\n" for i in range(1, 16))
LISTS = "".join(f"  k{i}: ['${{model.config.k{i - 1}}}', '${{model.config.k{i - 1}}}']\n" for i in range(1, 19))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("out: runs/${nam}", "Interpolation key 'nam' not found"),
        ("out: ${oc.env:NONE}", "Environment variable 'NONE' not found"),
        ("out: ${oc.env:HALF}", "environment variable 'HALF' is not UTF-8 text"),
        ("out: ${out}", "out refers to itself"),
        ("out: ${name}\nname: ${out}", "refers to itself"),
        ("out: ${name", "expected a closing brace"),
        ("out: ${oc.create:x}", "expected ${key.path} or ${oc.env:NAME}"),
        ("out: a ${model}", "must name a text or number"),
        ("out: " + "${" * 2000 + "}" * 2000, "more than 20 references lie inside each other"),
        ("model:\n config:\n  k0: x\n" + DEEP, "nested more than 50 deep"),
        ("model:\n config:\n  k0: xxxxxxxx\n" + CHAIN, "more than 20 references"),
        ("model:\n config:\n  k0: " + "x" * 9000 + "\n  k1: ${model.config.k0}${model.config.k0}", "more than 10,000"),
        ("model:\n config:\n  k0: x\n" + LISTS, "more than 5,000 values"),
    ],
)
def test_references_that_cannot_be_resolved(text, reason, recipe):
    with pytest.raises(ConfigError) as refused:
        load(recipe(text))
    assert any(reason in problem for problem in refused.value.problems), refused.value.problems
    assert all("\n" not in problem and len(problem) < 500 for problem in refused.value.problems)


def test_environment_variables_are_recorded_by_name(recipe):
    text = "out: runs/${oc.env:SECRET}\nname: n\ndata: {source: text, path: '${out}/${name}', tokenizer: train:300}\n"
    path = recipe(
        text + "lora: {target_modules: [a, '${oc.env:SECRET}']}\nsteps: ${oc.decode:${oc.env:STEPS}}\n" + FROM
    )
    config = load(path)
    assert config.out == f"runs/{SECRET}" and config.data.path == f"runs/{SECRET}/n"
    written = dump(config)
    assert SECRET not in written and "out: runs/${oc.env:SECRET}" in written and "steps: 17" in written
    assert recorded(config)["data"]["path"] == "${out}/${name}" and recorded(config)["lora"]["target_modules"][0] == "a"
    again = load(recipe(written, "again.yaml"))
    assert replace(again, source_file="") == replace(config, source_file="")


def test_the_same_reference_is_no_change(recipe, monkeypatch):
    path = recipe("data: {source: text, path: '${oc.env:SECRET}', tokenizer: train:300}\nout: x\n")
    config = load(path)
    resolved = json.loads(json.dumps(recorded(config)))
    resolved["data"]["path"] = SECRET
    for saved in (recorded(config), resolved):
        assert config_differences(saved, config) == ([], [])
    saved = recorded(config)
    monkeypatch.setenv("SECRET", "elsewhere")
    assert config_differences(saved, load(path)) == ([], [])
    assert config_differences(saved, load(path, ["data.path=other"]))[0]


def test_no_file_of_a_run_shows_the_value(tmp_path):
    folder = tmp_path / SECRET
    folder.mkdir()
    text = write_recipe(tmp_path).read_text()
    (tmp_path / "text.txt").rename(folder / "text.txt")
    text = re.sub(r"path: \S+text.txt", 'path: "${oc.env:FOLDER}/text.txt"', text)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    out = tmp_path / "run"
    # the value is also a part of the run folder's name
    options = ["steps=4", "log.trackers=[notebook]", "out=${oc.env:FOLDER}-run"]
    prepare = partial(faults.with_a_variable, "FOLDER", str(folder))
    first = run(recipe, options, out, prepare=prepare)
    assert first.codes == [0], first.text()
    written = [path for path in (tmp_path / f"{SECRET}-run").rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"config.yaml", "train.log", "report.html", "env.json", "state.json", "notebook.jsonl"} <= {
        p.name for p in written
    }
    shown = [path.name for path in written if SECRET.encode() in path.read_bytes() and path.name != "command.txt"]
    assert shown == []
    again = run(recipe, [*options, "eval.every=2"], out, prepare=prepare)
    assert again.codes == [0] and "this run is done" in again.text()
    assert numbers(tmp_path / f"{SECRET}-run")
