"""``leanstep runs``: which runs are listed, in which order, and what hostile files do to it."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from run_folders import write_run

from leanstep.cli import main


@pytest.fixture
def listed(tmp_path, capsys):
    """Four runs at three depths, a folder of a checkpoint in one of them, and what the command says of them."""
    runs = {"a": ("lion", 4.5, 1), "b": ("sinkgd", 4.25, 2), "sweep/runs/c": ("lion", None, 3), "d": ("muon", 5.0, 0)}
    for number, (name, (optimizer, loss, days)) in enumerate(runs.items()):
        folder = write_run(tmp_path / "runs" / name, name, optimizer=optimizer, lr=10.0**-number)
        facts = {"status": "done" if loss else "failed:nan", "step": 600, "steps": 600, "val_loss": loss}
        facts["updated"] = (datetime.now(UTC) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%S%z")
        (folder / "status.json").write_text(json.dumps(facts if loss else {**facts, "val_loss": float("nan")}))
        (folder / "final").mkdir()
        (folder / "final" / "weights").write_bytes(b"x" * 1000 * number)
    write_run(tmp_path / "runs" / "a" / "checkpoints" / "inside")

    def run(*words):
        code = main(["runs", str(tmp_path / "runs"), *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def names(output):
    return [line.split()[0] for line in output.splitlines()[1:]]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["d", "a", "b", "sweep/runs/c"]),
        (["--sort", "loss"], ["b", "a", "d", "sweep/runs/c"]),
        (["--sort", "name"], ["a", "b", "d", "sweep/runs/c"]),
        (["--sort", "size"], ["a", "d", "sweep/runs/c", "b"]),
        (["--where", "optimizer.name=lion"], ["a", "sweep/runs/c"]),
        (["--where", "optimizer.name=lion", "--where", "state=done"], ["a"]),
        (["--where", "lr=0.1"], ["b"]),
        (["--where", "optimizer.lr=1e-2"], ["sweep/runs/c"]),
        (["--where", "state=failed*"], ["sweep/runs/c"]),
        (["--where", "state=running"], []),
    ],
)
def test_runs_are_chosen_and_ordered(listed, words, expected):
    code, output, _ = listed(*words)
    assert code == 0 and names(output) == expected


def test_the_table_and_its_json(listed):
    _, output, _ = listed()
    header, first, second, _, last = output.splitlines()
    assert header.split() == ["RUN", "STATE", "STEP", "LOSS", "OPTIMIZER", "LR", "AGE", "SIZE"]
    assert second.split()[:6] == ["a", "done", "600/600", "4.5000", "lion", "1"] and "24 h" in second
    assert last.split()[:4] == ["sweep/runs/c", "failed:nan", "600/600", "-"] and "3 days" in last
    runs = json.loads(listed("--json")[1], parse_constant=pytest.fail)
    assert [run["name"] for run in runs] == ["d", "a", "b", "sweep/runs/c"]
    assert runs[1]["settings"]["model.config.hidden_size"] == 128 and runs[1]["val_loss"] == 4.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "lion"], "expected KEY=TEXT"),
        (["--where", "optimizer.nam=lion"], "no run has 'optimizer.nam'"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_mistakes_are_told_in_one_line(listed, words, message):
    code, output, error = listed(*words)
    assert code == 2 and not output and message in error and error.count("\n") == 1


def test_damaged_files_are_listed_as_far_as_they_are_known(tmp_path, capsys):
    for name, status, config in (
        ("torn", '{"status": "do', "name: torn\n"),
        (
            "hostile",
            '{"status": "done\\u001b[2J", "step": [], "val_loss": "x", "updated": 3}',
            "optimizer: {name: [1]}\n",
        ),
    ):
        folder = write_run(tmp_path / name)
        (folder / "status.json").write_text(status)
        (folder / "config.yaml").write_text(config)
    assert main(["runs", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert set(names(output)) == {"torn", "hostile"} and "\x1b" not in output
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
