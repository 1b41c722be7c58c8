"""The report: every number it shows is in the log, nothing in it runs or loads, and it survives dead runs."""

import errno
import json
import math
import os
import random
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from report_pages import Page
from run_folders import write_run

from leanstep import cli
from leanstep._pages.charts import Events, Series, chart, compact, heat_map, smooth
from leanstep.recipes.report.report import MOST_BYTES, _results, write_report
from leanstep.recipes.report.runlog import duration, read_run
from leanstep.recipes.training.folder import RunFolder


def report(tmp_path, *folders):
    out = write_report(list(folders), tmp_path / "out" / "report.html")
    assert out == tmp_path / "out" / "report.html"
    assert [file.name for file in out.parent.iterdir()] == ["report.html"], "left something beside it"
    raw = out.read_bytes()
    assert len(raw) < MOST_BYTES
    html = raw.decode()
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    return html, Page(html)


def final_loss(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "eval"][-1]


def test_one_run(tmp_path):
    run = write_run(tmp_path / "run")
    html, page = report(tmp_path, run)
    loss = final_loss(run)
    for text in (
        "llama-nano-sinkgd",
        "done",
        f"{loss:.4f}",
        f"{math.exp(loss):.2f}",
        f"{loss / math.log(2) / 3.03:.4f}",
        "expected 4.45 ± 0.1: met",
        "The Congress of the United States.",
        "tokens_per_step: 4096",
        "versions.torch",
        "2.13.0",
        "leanstep train llama-nano-sinkgd",
        "1,050,000 parameters",
        "1 min 42 s",
    ):
        assert text in page.text, text
    for title in ("Loss", "Training loss over tokens", "Training loss over time", "Validation bits per byte"):
        assert f"<h3>{title}</h3>" in html
    for title in ("Learning rate", "Gradient norm", "Tokens per second"):
        assert f"<h3>{title}</h3>" in html
    assert "Peak device memory" not in html, "nothing was logged about it"
    assert 'class="notes' not in html, "a clean run has no warnings"


def test_nothing_runs_and_nothing_is_loaded(tmp_path):
    html, page = report(tmp_path, write_run(tmp_path / "run"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href"} & names
    assert not [name for name in names if name.startswith("on")]
    assert "@import" not in html
    assert [url for url in re.findall(r"url\((.*?)\)", html) if not url.startswith("#")] == []
    assert "default-src 'none'" in html


def test_light_dark_and_print(tmp_path):
    html, _ = report(tmp_path, write_run(tmp_path / "run"))
    assert "@media screen and (prefers-color-scheme:dark)" in html, "dark is for screens, print stays light"
    assert "@media print" in html
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    light, dark = (html.split(":root{")[i].split("}")[0] for i in (1, 2))
    for variable in used:
        assert f"{variable}:" in light and f"{variable}:" in dark, variable


def test_everything_is_escaped(tmp_path):
    attack = "<script>alert('x')</script> & \"quotes\" </style></pre>"
    run = write_run(tmp_path / "run", sample=attack)
    config = (run / "config.yaml").read_text() + f"note: |\n  {attack}\n"
    (run / "config.yaml").write_text(config.replace("description: 1M", f"description: {attack} 1M"))
    (run / "env.json").write_text(json.dumps({"device": attack, "started": attack}))
    (run / "train.log").write_text(f"WARNING: {attack}\n")
    (run / "command.txt").write_text(attack)
    (run / "status.json").write_text(json.dumps({"status": f"failed:{attack}", "step": 1, "steps": 2}))
    other = write_run(tmp_path / "<b>other", name="'<i>name'")
    for folders in ([run], [run, other]):
        html, page = report(tmp_path, *folders)
        assert "<script" not in html
        assert attack in page.text
        assert html.count("</style>") == 1
        assert "<i>name" not in html


def test_comparison(tmp_path):
    runs = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", "llama-nano-lion", optimizer="lion", lr=4e-4, floor=4.6, expect="null", seed=1),
        write_run(tmp_path / "c", "llama-nano-adamw", optimizer="adamw", lr=4e-3, floor=4.3, expect="null", seed=2),
    ]
    html, page = report(tmp_path, *runs)
    assert "Comparison of 3 runs" in page.text
    losses = [final_loss(run) for run in runs]
    found = [page.text.index(f"{loss:.4f}") for loss in sorted(losses)]
    assert found == sorted(found), "sorted by validation loss"
    assert re.search(rf'class="n best">{min(losses):.4f}<', html)
    assert html.count('class="n best"') == 1
    for name in ("llama-nano-sinkgd", "llama-nano-lion", "llama-nano-adamw"):
        assert name in page.text
    # what differs is shown, what does not is not
    differs = html.split("<h2>Differences</h2>")[1].split("<h2>Environments</h2>")[0]
    assert "optimizer.lr" in differs
    assert "tokens_per_step" not in differs
    validation = re.search(r"<h3>Validation loss</h3>.*?</figure>", html, re.DOTALL)[0]
    assert len(re.findall("<path", validation)) == 3
    assert {f"c{i}" for i in range(3)} <= set(re.findall(r'path class="(c\d)', validation))


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / where / "run") for where in ("first", "second")]
    _, page = report(tmp_path, *runs)
    assert "first/run" in page.text and "second/run" in page.text


def test_a_failed_run_says_what_happened(tmp_path):
    run = write_run(tmp_path / "run", made=420, status="failed:nan", nonfinite=3, expect="3.0", sample=None)
    (run / "nan_dump").mkdir()
    (run / "train.log").write_text("step 400\nWARNING: the disk is full\nWARNING: the disk is full\n")
    _, page = report(tmp_path, run)
    for text in (
        "failed: nan",
        "The run failed (nan) at step 420 of 600.",
        "nan_dump",
        "3 steps with a loss or gradient that was not finite.",
        "is not the expected 3 ± 0.1",
        "WARNING: the disk is full",
    ):
        assert page.text.count(text) == 1, text
    assert "sample" not in page.text


def test_a_run_that_says_it_runs_but_is_dead(tmp_path):
    run = write_run(tmp_path / "run", made=200, status="running")
    (run / ".lock").touch()
    _, page = report(tmp_path, run)
    assert "crashed" in page.text and "no process holds the folder. It was killed after step 200 of 600" in page.text
    folder = RunFolder(run)
    folder.claim()
    _, page = report(tmp_path, run)
    assert "crashed" not in page.text and "The run is not done (running): step 200 of 600." in page.text
    folder.release()
    assert read_run(run).state == "crashed"


def test_interrupted_and_overfitted_runs(tmp_path):
    run = write_run(tmp_path / "run", made=200, status="interrupted")
    first = json.dumps({"step": 0, "kind": "eval", "loss": math.nan}) + "\n"
    last = json.dumps({"step": 200, "kind": "eval", "loss": 9.0, "perplexity": 8103.1, "bits_per_byte": 4.3})
    (run / "log.jsonl").write_text(first + (run / "log.jsonl").read_text() + last)
    _, page = report(tmp_path, run)
    assert "The run is not done (interrupted): step 200 of 600." in page.text
    assert re.search(r"The validation loss rose from 4\.\d+ at step 200 to 9\.0000", page.text)


def test_runs_without_a_validation_loss_are_not_best(tmp_path):
    runs = [write_run(tmp_path / name, made=50) for name in ("one", "two")]
    assert not any(row["best"] for row in _results([read_run(run) for run in runs]))
    runs.append(write_run(tmp_path / "three"))
    assert [row["best"] for row in _results([read_run(run) for run in runs])] == [True, False, False]


def test_nonfinite_numbers_break_the_curve(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "log.jsonl").read_text().splitlines()
    entry = {"kind": "train", "loss": math.nan, "lr": 0.1, "grad_norm": math.inf, "tokens_per_s": 1, "tokens": 9}
    lines += [json.dumps({**entry, "step": 601, "elapsed_s": 100}), json.dumps({"step": 602, "kind": "train"})]
    (run / "log.jsonl").write_text("\n".join(lines))
    html, page = report(tmp_path, run)
    assert "The training loss is not finite in 2 logged steps." in page.text
    assert not re.search(r'd="[^"]*(nan|inf)', html)


def test_a_run_just_begun_and_damaged_files(tmp_path):
    run = write_run(tmp_path / "run")
    log = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text('[1]\n{"kind": "train"}\n\n' + log[: len(log) // 2])
    (run / "status.json").write_text("{broken")
    (run / "env.json").unlink()
    (run / "config.yaml").write_text("a: [1\nb: }")
    _, page = report(tmp_path, run)
    assert "3 lines of log.jsonl could not be read and are left out" in page.text
    assert "status.json cannot be understood" in page.text
    assert "env.json is missing" in page.text
    assert "config.yaml cannot be understood" in page.text
    (run / "log.jsonl").write_text("")
    _, page = report(tmp_path, run)
    assert "Nothing was logged yet." in page.text
    report(tmp_path, run, write_run(tmp_path / "other"))


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="'.*' is not a folder; expected a run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="is not a run folder: it has neither log.jsonl nor config.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")


@pytest.mark.slow
def test_long_and_many_runs_stay_small(tmp_path):
    run = write_run(tmp_path / "run", steps=20_000, every=1)
    with open(run / "config.yaml", "a") as config:
        config.write("".join(f"extra_{i}: {'x' * 50}\n" for i in range(5000)))
    report(tmp_path, run)
    short = write_run(tmp_path / "short", sample="words " * 5000, steps=1000, every=1)
    folders = []
    for number in range(30):
        folders.append(shutil.copytree(short, tmp_path / f"run-{number}"))
    report(tmp_path, *folders)


def test_an_older_report_is_replaced_whole(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    out = write_report([run], tmp_path / "out" / "report.html")
    before = out.read_bytes()

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_report([run], out)
    assert out.read_bytes() == before
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


# -- the pieces -----------------------------------------------------------------------------------------------------


def path_points(html, color=0):
    data = re.search(rf'<path class="c{color} line" d="([^"]*)"', html)[1]
    return [tuple(map(float, point.removesuffix("h.1").split())) for point in re.split("[ML]", data) if point], data


def test_curve_coordinates_follow_the_axes():
    html = chart([Series("y", [0, 5, 10], [1.0, 3.0, 2.0])], title="t", x_label="x")
    points, _ = path_points(html)
    # linear in both directions, upside down as drawings are
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.11)
    assert (points[0][1] - points[2][1]) * 2 == pytest.approx(points[0][1] - points[1][1], abs=0.31)
    assert points[0][1] > points[2][1] > points[1][1]
    # ticks sit on the same scale
    ticks = {float(t): float(y) - 4 for y, t in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', html)}
    assert ticks[1.0] == pytest.approx(points[0][1], abs=0.11)
    assert ticks[3.0] == pytest.approx(points[1][1], abs=0.11)


def event_lines(html):
    return re.findall(r'<line class="event" x1="([\d.]+)" x2="\1" [^>]*><title>([^<]*)</title>', html)


def test_events_are_vertical_lines_of_the_same_axis():
    events = Events("moves", [-1, 5, 10, 11, math.nan], ["before", "a <b>", "last", "after", "nowhere"])
    html = chart([Series("y", [0, 5, 10], [1.0, 3.0, 2.0])], title="t", x_label="x", events=events)
    points, _ = path_points(html)
    assert event_lines(html) == [(f"{points[1][0]}", "a &lt;b&gt;"), (f"{points[2][0]}", "last")]
    assert "</i>moves<" in html
    assert "event" not in chart(
        [Series("y", [0, 5], [1.0, 3.0])], title="t", x_label="x", events=Events("moves", [], [])
    )


def test_steps_that_spikes_left_out_are_marked_in_the_loss_chart(tmp_path):
    run = write_run(tmp_path / "run")
    spikes = [("skip", 30, 30, 9.5), ("rollback", 20, 24, math.nan), ("rollback", 20, 24, 8.0), ("stop", 50, 50, 9.0)]
    with (run / "log.jsonl").open("a") as log:
        for action, step, spike_step, loss in spikes:
            entry = {"kind": "spike", "step": step, "action": action, "spike_step": spike_step, "loss": loss}
            log.write(json.dumps(entry | {"threshold": 7.0}) + "\n")
    html, _ = report(tmp_path, run)
    texts = ["step 30, loss 9.500: skipped"]
    texts += ["step 24, loss nan: rolled back to step 20; step 24, loss 8.000: rolled back to step 20"]
    # in the drawing for screens and in the one for phones
    assert [text for _, text in event_lines(html)] == 2 * texts and html.count("</i>loss spikes<") == 2
    several, _ = report(tmp_path, run, write_run(tmp_path / "other"))
    assert not event_lines(several)


def test_logarithmic_axis_is_logarithmic():
    html = chart([Series("y", [0, 1, 2, 3], [1.0, 10.0, 100.0, 0.0])], title="t", x_label="x", log_y=True)
    points, _ = path_points(html)
    assert len(points) == 3, "what is not positive is left out"
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1], abs=0.11)


def test_gaps_single_points_and_nothing():
    _, data = path_points(chart([Series("y", [0, 1, 2, 3], [1.0, None, 2.0, math.nan])], title="t", x_label="x"))
    assert data.count("M") == 2 and data.count("L") == 0
    assert data.count("h.1") == 2, "points alone are dots"
    assert path_points(chart([Series("y", [7], [1.0])], title="t", x_label="x"))[1].endswith("h.1")
    for x in (1e16, -1e17, 1e100):
        assert "nan" not in (html := chart([Series("y", [x], [1.0])], title="t", x_label="x")) and "<path" in html
    assert chart([Series("y", [0], [5e-324])], title="t", x_label="x", log_y=True) == ""
    assert chart([Series("y", [], [])], title="t", x_label="x") == ""
    assert chart([Series("y", [1], [None])], title="t", x_label="x") == ""
    assert "<path" in chart([Series("y", [0, 1], [0.0, 0.0])], title="t", x_label="x")


def test_thinning_keeps_spikes():
    ys = [1.0 + 0.001 * (i % 7) for i in range(10_000)]
    ys[5003] = 1.5
    html = chart([Series("y", range(10_000), ys)], title="t", x_label="x", most_points=100)
    points, _ = path_points(html)
    assert len(points) <= 102
    top = min(y for _, y in points)
    assert sum(y == top for _, y in points) == 1


def test_a_rare_outlier_does_not_flatten_the_rest():
    ys = [5.0 - 0.01 * i for i in range(100)]
    calm, _ = path_points(chart([Series("y", range(100), ys)], title="t", x_label="x"))
    ys[50] = 1e6
    wild, _ = path_points(chart([Series("y", range(100), ys)], title="t", x_label="x"))
    assert wild[0][1] - wild[-1][1] != 0
    assert abs(wild[0][1] - wild[-1][1]) > 0.5 * abs(calm[0][1] - calm[-1][1])
    assert min(y for _, y in wild) < 0, "it leaves the picture"


def test_smoothing_has_no_lag_and_keeps_gaps():
    line = [float(i) for i in range(20)]
    assert smooth(line, 4) == pytest.approx(line)
    assert smooth([1.0, None, 3.0], 1) == [1.0, None, 3.0]
    assert smooth([1.0, math.nan, math.inf, 1e30, 3.0], 2) == [1.0, None, None, None, 3.0]
    assert smooth([1.0, 4.0, 1.0], 1)[1] == 2.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.5"), (1250, "1250"), (12_500, "12.5K"), (1.25e6, "1.25M"), (3e9, "3B"), (4e-5, "4e-5")],
)
def test_compact_numbers(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.25, "4.2 s"), (59.94, "59.9 s"), (102, "1 min 42 s"), (7500, "2 h 05 min"), (None, "-"), (math.nan, "-")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_yaml_numbers_written_as_text_are_numbers(tmp_path):
    run = write_run(tmp_path / "run", expect="445e-2")
    assert read_run(run).expectation() == (4.45, 0.1, True)


ODD = [
    None, True, -1, 0, 1e308, -1e308, 10**400, math.nan, math.inf, -math.inf, 1e-320, "", "x" * 100_000, "<script>",
    "\ud800", "\x00\x1b[31m", "1e5", "9" * 5000, [], [1, [2]], {}, {"a": {"b": 1}}, {str(i): i for i in range(3000)},
    list(range(3000)), 2**63,
]  # fmt: skip
KEYS = ("loss", "step", "kind", "optimizer", "sparsity", "status", "<b>", "\ud800")


def mutate(chance, value):
    """The value with one key, element or leaf removed, added or replaced by an odd one."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {other: item for other, item in value.items() if other != key}
        if chance.random() < 0.1:
            return {**value, chance.choice(KEYS): chance.choice(ODD)}
        return {**value, key: mutate(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        return [*value[:index], mutate(chance, value[index]), *value[index + 1 :]]
    return chance.choice(ODD)


def damage(chance, path):
    """Flip bytes of a file of a run, empty it, nest it, or give it odd values."""
    way, content = chance.random(), path.read_bytes()
    if way < 0.15 and content:
        flipped = bytearray(content)
        for _ in range(chance.choice([1, 10, 100])):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        path.write_bytes(flipped)
    elif way < 0.3 or path.suffix in (".log", ".txt"):
        path.write_bytes(chance.choice([b"", b"[" * 100_000, b"\xff\xfe" * 1000, b"a: " * 5000, b"WARNING\x00" * 99]))
    elif path.suffix == ".jsonl":
        lines = content.decode().splitlines()
        for _ in range(chance.choice([1, 3, 10])):
            index = chance.randrange(len(lines))
            lines[index] = json.dumps(mutate(chance, json.loads(lines[index])))
        path.write_text("\n".join(lines))
    else:
        # JSON is YAML
        read = yaml.safe_load if path.suffix == ".yaml" else json.loads
        path.write_text(json.dumps(mutate(chance, read(content))))


@pytest.mark.slow
def test_hostile_values_make_a_right_page(tmp_path):
    sound = write_run(tmp_path / "sound", steps=200)
    log = [json.loads(line) for line in (sound / "log.jsonl").read_text().splitlines()]
    extra = {"optimizer": {"H/a": 1.0, "H/b": 2.0}, "tflops": 1.0, "mfu": 0.1, "memory_gib": 1.0}
    log = [line | extra if line["kind"] == "train" else line for line in log]
    log += [{"kind": "spike", "step": 20, "action": "rollback", "spike_step": 24, "loss": 9.0}] * 20
    (sound / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (sound / "optimizer_report.json").write_text(json.dumps([{"name": "layer", "H": 0.5}]))
    (sound / "gate_report.json").write_text(json.dumps([{"layer": "layer", "calls": 3}]))
    operations = {"dense": 10, "theoretical": 5.0}
    (sound / "sparsity_report.json").write_text(json.dumps({"layers": [{"name": "layer"}], "operations": operations}))
    (sound / "train.log").write_text("WARNING: the disk is nearly full\n")
    names = sorted(path.name for path in sound.iterdir())
    chance = random.Random(0)
    for _ in range(75):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = shutil.copytree(sound, tmp_path / "run")
        for name in {chance.choice(names) for _ in range(chance.choice([1, 1, 3]))}:
            damage(chance, run / name)
        for folders in ([run], [sound, run]):
            html = write_report(folders, tmp_path / "page.html").read_bytes().decode()
            assert len(html.encode()) < MOST_BYTES and "<script" not in html
            Page(html)
            for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
                ElementTree.fromstring(svg)


def test_hostile_names_are_cut(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "status.json").write_text(json.dumps({"status": "s" * 10**6, "step": "1" * 10**6, "steps": {}}))
    (run / "env.json").write_text(
        json.dumps({"k" * 10**6: 1, "device": "d" * 10**6} | {str(i): i for i in range(9999)})
    )
    (run / "config.yaml").write_text(
        f"name: {'n' * 50_000}\ndescription: {'d' * 10_000}\noptimizer: {{name: [1, 2]}}\n"
    )
    for folders in ([run], [run, run]):
        report(tmp_path, *folders)


def test_a_report_that_cannot_be_written_is_told_in_a_line(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "null.html").symlink_to("/dev/null")
    for out in (tmp_path / "folder.html", tmp_path / "file" / "page.html", tmp_path / "null.html"):
        assert cli.main(["report", str(run), "--out", str(out)]) == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and "could not be written" in told.err
    assert not Path("/dev/null").is_file()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main(["report", str(run)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(run.glob("*.html")) and not list(run.glob("*.tmp"))


def test_a_map_shows_a_number_of_every_layer_over_the_blocks(tmp_path):
    run = write_run(tmp_path / "run")
    layers = [
        {"name": f"model.layers.{block}.{kind}.weight", "sparsity": block / 10 + index / 100}
        for block in range(4)
        for index, kind in enumerate(("self_attn.q_proj", "mlp.up_proj"))
    ]
    odd = [{"name": "lm_head.weight", "sparsity": 0.9}, {"name": "model.layers.x.q_proj", "sparsity": 0.9}, "text"]
    odd += [{"name": "model.layers.0.k_proj.weight", "sparsity": None}]
    (run / "sparsity_report.json").write_text(json.dumps({"layers": [*layers, *odd], "operations": {}}))
    noise = [{"name": f"h.0.mlp.c_fc.weight[{expert}]", "factor": factor} for expert, factor in enumerate((0.2, 0.4))]
    (run / "optimizer_report.json").write_text(json.dumps(noise))
    html, _ = report(tmp_path, run)
    titles = re.findall(r'<rect class="cell"[^>]*><title>([^<]*)</title>', html)
    assert titles[:2] == ["q_proj, block 0: 0", "up_proj, block 0: 0.01"] and len(titles) == 9
    assert titles[-1] == "c_fc, block 0: 0.3", "the mean of the two matrices of a stack"


def test_shades_of_a_map_grow_with_the_value_and_are_equal_where_the_texts_are():
    def shades(*values, **options):
        drawn = heat_map([("row", i, v) for i, v in enumerate(values)], title="t", x_label="block", **options)
        return [float(text) for text in re.findall(r'fill-opacity="([^"]*)"', drawn)]

    assert shades(1.0, 3.0, 2.0) == [0.08, 1.0, 0.54]
    assert shades(0.60001, 0.60002, text="{:.3f}".format) == [0.54, 0.54]
    assert shades(1.0, math.nan, math.inf) == [0.54]
    assert heat_map([], title="t", x_label="block") == ""
    assert heat_map([(f"{i}", 0, 1.0) for i in range(40)], title="t", x_label="block") == "", "too many rows"
    assert heat_map([("row", i, 1.0) for i in range(900)], title="t", x_label="block") == "", "too many cells"


def test_ticks_of_steps_are_whole_and_labels_of_nearly_equal_values_differ():
    both = chart([Series("x", [0, 1, 2, 3], [0.6, 0.60001, 0.6, 0.6])], title="t", x_label="step", wide=True)
    drawn, _, _ = both.partition("</figure>")
    assert both.count("<figure") == 2
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert [text for text in labels if text.isdigit()] == ["0", "1", "2", "3"]
    heights = [text for text in labels if text.startswith("0.")]
    assert len(heights) >= 2 and len(set(heights)) == len(heights)
