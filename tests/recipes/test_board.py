"""``leanstep board``: what its page is given, what its server gives out and refuses, and the file that it writes."""

import json
import math
import os
import re
import shutil
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import quote

import faults
import pytest
from run_folders import write_run
from training import read_log, run, write_recipe

from leanstep.cli import main
from leanstep.recipes.report.board import Board, write_board
from leanstep.recipes.report.board_server import BoardServer

REPORT = "<!doctype html><title>final pruned to 50 &amp; more</title><script>alert(1)</script>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two real runs, the first as if on a terminal, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder)
    (folder / "runs" / "deep").mkdir(parents=True)
    first = run(recipe, ["steps=8", "name=first"], folder / "runs" / "first", prepare=faults.on_a_terminal)
    second = run(recipe, ["steps=8", "name=second", "optimizer.lr=2e-3"], folder / "runs" / "deep" / "second")
    assert first.codes == second.codes == [0], first.text() + second.text()
    return folder / "runs", first.text(), second.text()


@pytest.fixture
def made(tmp_path):
    """A folder with two made-up runs and a report, beside a file that is nobody's business."""
    root = tmp_path / "runs"
    for name, optimizer in (("a", "lion"), ("b", "sinkgd")):
        write_run(root / name, name, optimizer=optimizer)
    (root / "pruned").mkdir()
    (root / "pruned" / "report.html").write_text(REPORT)
    (root / "pruned" / "sparsity.json").write_text("{}")
    (tmp_path / "secret.html").write_text("secret")
    return root


def test_curves_and_settings_are_those_of_the_runs(trained):
    root, _, _ = trained
    content = Board(root).content()
    json.dumps(content, allow_nan=False)
    second, first = content["runs"]
    assert [second["name"], first["name"]] == ["deep/second", "first"] and first["recipe"] == "first"
    log = read_log(root / "first")
    train, evals = ([line for line in log if line["kind"] == kind] for kind in ("train", "eval"))
    shown = first["curves"]["train"]
    assert shown["step"] == [line["step"] for line in train] and len(shown["step"]) == 8
    assert shown["tokens"] == [line["tokens"] for line in train]
    assert shown["hours"] == pytest.approx([line["elapsed_s"] / 3600 for line in train], rel=1e-6)
    for key in ("loss", "lr", "grad_norm", "process_gib"):
        assert shown["values"][key] == pytest.approx([line[key] for line in train], rel=1e-6)
    shown = first["curves"]["eval"]
    assert shown["step"] == [6, 8] and shown["tokens"] == [first["curves"]["train"]["tokens"][at - 1] for at in (6, 8)]
    assert shown["values"]["val_loss"] == pytest.approx([line["loss"] for line in evals], rel=1e-6)
    assert (
        first["val_loss"] == evals[-1]["loss"] and first["state"] == "done" and first["report"] == "first/report.html"
    )
    assert content["settings"] == [("optimizer.lr", ["0.002", "0.001"])]


def test_a_run_on_a_terminal_says_where_to_look_once(trained):
    root, first, second = trained
    assert first.count(f"watch: leanstep board {root}\n") == 1
    assert "watch:" not in second and "watch:" not in (root / "deep" / "second" / "train.log").read_text()


def test_numbers_of_a_section_and_those_that_are_not_finite(tmp_path):
    folder = write_run(tmp_path / "a")
    lines = [
        {"step": 1, "kind": "train", "loss": 5.0, "optimizer": {"factor/q": 0.5, "name": "x"}},
        {"step": 2, "kind": "train", "loss": float("nan"), "tokens": 7},
        {"step": 2, "kind": "eval", "loss": 10**400},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    content = Board(tmp_path).content()
    curves = content["runs"][0]["curves"]
    assert content["problems"] == ["a: 1 line of log.jsonl could not be read and is left out"]
    assert curves["train"]["values"] == {"loss": [5.0, None], "optimizer/factor/q": [0.5, None]}
    assert curves["train"]["tokens"] == [None, 7.0] and curves["eval"]["values"] == {"val_loss": [None]}


def test_a_long_log_is_thinned(tmp_path):
    write_run(tmp_path / "a", steps=9000, every=3)
    curves = Board(tmp_path).content()["runs"][0]["curves"]
    assert len(curves["train"]["step"]) == len(curves["train"]["values"]["loss"]) == 1501
    assert len(curves["eval"]["step"]) == 90


def test_a_log_is_followed_and_its_torn_line_waits(tmp_path):
    folder = write_run(tmp_path / "a", made=20, status="running")
    log, board = folder / "log.jsonl", Board(tmp_path)
    before = log.read_bytes()

    def losses():
        content = board.content()
        assert content["problems"] == [] and content["runs"][0]["step"] == max(
            20, content["runs"][0]["curves"]["train"]["step"][-1]
        )
        return content["runs"][0]["curves"]["train"]["values"]["loss"]

    logged = losses()
    line = json.dumps({"step": 30, "kind": "train", "loss": 1.25, "note": "ü"}, ensure_ascii=False).encode() + b"\n"
    cut = line.index("ü".encode()) + 1  # within a character
    for written, expected in ((line[:cut], logged), (line, [*logged, 1.25]), (line + b'{"step"', [*logged, 1.25])):
        with log.open("r+b") as file:
            file.seek(len(before))
            file.write(written)
        assert losses() == expected
    # a resumed run writes the lines that it keeps into a new file
    (tmp_path / "new").write_bytes(before + line.replace(b"1.25", b"2.25"))
    os.replace(tmp_path / "new", log)
    assert losses() == [*logged, 2.25]


def test_states_and_settings_are_read_again_and_vanished_runs_leave(made):
    board = Board(made)
    assert [run["state"] for run in board.content()["runs"]] == ["done", "done"]
    (made / "a" / "status.json").write_text(json.dumps({"status": "failed:nan", "step": 3, "steps": 9}))
    shutil.rmtree(made / "b")
    (run,) = board.content()["runs"]
    assert run["state"] == "failed:nan" and run["step"] == 600 and len(run["curves"]["train"]["step"]) == 61


def test_a_log_that_is_a_link_is_not_followed(made, tmp_path):
    (made / "a" / "log.jsonl").unlink()
    (made / "a" / "log.jsonl").symlink_to(made / "b" / "log.jsonl")
    content = Board(made).content()
    assert content["problems"] == ["a: log.jsonl cannot be read: is a symbolic link, expected a regular file"]
    assert content["runs"][0]["curves"]["train"]["step"] == []


@contextmanager
def served(root):
    """A function that asks the server of ``root`` for a path, as it stands, and returns status, headers and body."""
    with BoardServer(root, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def ask(path, host=None):
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            connection.request("GET", path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

        ask.server = server
        try:
            yield ask
        finally:
            server.shutdown()
            thread.join()


def test_the_server_gives_the_page_its_data_and_reports(made):
    with served(made) as ask:
        assert ask.server.server_address[0] == "127.0.0.1"
        status, headers, page = ask("/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8" and b"Runs in" in page
        status, headers, data = ask("/data.json?x")
        content = json.loads(data)
        assert status == 200 and [run["name"] for run in content["runs"]] == ["a", "b"]
        (report,) = content["reports"]
        assert report["title"] == "final pruned to 50 & more"
        status, headers, page = ask(f"/{content['base']}/{quote(report['file'])}")
        assert status == 200 and page.decode() == REPORT and headers["Content-Security-Policy"].endswith("; sandbox")
        assert headers["X-Content-Type-Options"] == "nosniff"
        shutil.rmtree(made)
        assert ask("/data.json")[0] == 404


def test_the_server_refuses_what_is_outside_and_what_is_no_page(made, tmp_path):
    (made / "link.html").symlink_to(tmp_path / "secret.html")
    (made / "folder").symlink_to(tmp_path)
    (made / "large.html").write_bytes(b" " * ((1 << 22) + 1))
    os.mkfifo(made / "pipe.html")
    outside = [
        "/../secret.html", "/files/../secret.html", "/files/%2e%2e/secret.html", "/files/a/..%2f..%2fsecret.html",
        f"/files/{tmp_path}/secret.html", "/files//etc/passwd", f"/{tmp_path}/secret.html", "/secret.html",
        "/files/link.html", "/files/folder/secret.html", f"/files/folder/{made.name}/pipe.html",
    ]  # fmt: skip
    other = [
        "/files/a/config.yaml", "/files/a/env.json", "/files/a", "/files/", "/files/none.html", "/files/%00.html",
        f"/files/{'x' * 5000}.html", "/a/report.html", "/files/large.html", "/files/pipe.html", "/data.json/",
    ]  # fmt: skip
    with served(made) as ask:
        for path in (*outside, *other):
            status, _, body = ask(path)
            assert status == 404 and b"secret" not in body, path
        assert ask("/files/a/../pruned/report.html")[0] == 200
        for host in ("attacker.test", "attacker.test:8765", "127.0.0.1.attacker.test", ":", "[::"):
            assert ask("/data.json", host)[0] in (400, 403), host
        assert ask("/data.json", "localhost:9000")[0] == 200


def test_mistakes_are_told_in_one_line_and_nothing_is_written(made, tmp_path, capsys):
    for name in ("empty", "empty.html"):
        (tmp_path / name).mkdir()
    out = tmp_path / "board.html"
    with BoardServer(made, 0) as server:
        port = str(server.server_port)
        for words, message in (
            ([str(made), "--port", port], f"port {port} of 127.0.0.1 cannot be used (Address already in use); choose"),
            ([str(made), "--port", "65536"], "expected a whole number from 0 to 65535, got '65536'"),
            ([str(made), "--port", "0", "--out", str(out)], "--out: not allowed with argument --port"),
            ([str(tmp_path / "none")], "none is not a folder; expected one that holds runs"),
            ([str(tmp_path / "none"), "--out", str(out)], "none is not a folder"),
            ([str(tmp_path / "empty"), "--out", str(out)], "no run and no report below"),
            ([str(made), "--out", str(tmp_path / "empty.html")], "is a folder"),
            ([str(made), "--out", str(tmp_path / "board")], "expected a name that ends in .html, got"),
            ([str(made), "--out", str(tmp_path / "no" / "board.html")], "no of board.html does not exist"),
            ([str(made), "more"], "unexpected argument 'more'"),
        ):
            try:
                code = main(["board", *words])
            except SystemExit as ended:
                code = ended.code
            said = capsys.readouterr()
            assert code == 2 and not said.out, words
            assert message in said.err and said.err.count("\n") == 1, said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "empty.html", "runs", "secret.html"]


def test_the_command_serves_until_it_is_interrupted(made, capsys, monkeypatch):
    def interrupted(server):
        assert server.board.root == made and server.server_port
        raise KeyboardInterrupt

    monkeypatch.setattr(BoardServer, "serve_forever", interrupted)
    assert main(["board", str(made), "--port", "0"]) == 130
    assert re.fullmatch(
        rf"http://127\.0\.0\.1:\d+/ shows the runs below {made}; Ctrl-C ends it\n", capsys.readouterr().out
    )


def test_the_file_holds_all_that_it_shows(made, tmp_path, capsys):
    name = "</script><script>x</script>"
    write_run(made / "c", name)
    out = tmp_path / "out" / "board.html"
    out.parent.mkdir()
    assert main(["board", str(made), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} written\n"
    page = out.read_text("utf-8")
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    content = json.loads(text)
    assert [run["recipe"] for run in content["runs"]] == ["a", "b", name] and content["base"] == "../runs"
    assert set(content["files"]) == {"pruned/report.html"}
    assert all(address.startswith("data:") for address in content["files"].values())
    # the library's own text aside
    rest = re.sub(r"<script nonce[^>]*>/\*\*.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(rest) < 100_000 and not re.search(r"\b(src|href)\s*=\s*[\"'](?!data:)", rest) and "://" not in rest
    assert [file.name for file in out.parent.iterdir()] == ["board.html"]


def test_a_file_has_the_addresses_of_reports_for_which_it_has_no_room(made, tmp_path, monkeypatch):
    monkeypatch.setattr("leanstep.recipes.report.board._MOST_EMBEDDED", len(REPORT))
    page = write_board(made, tmp_path / "board.html").read_text("utf-8")
    content = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert content["files"] == {} and content["reports"][0]["file"] == "pruned/report.html"
    assert math.isfinite(content["runs"][0]["curves"]["train"]["values"]["loss"][0])
