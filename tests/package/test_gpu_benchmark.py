"""``python benchmarks gpu``: every stage in a dry run, its resumption and time limits, and the page in docs/."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from leanstep.kernels.triton_impl._checks.results import bits_equal, kernels, measure
from leanstep.recipes.config import loader

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
MODULES = ("gpu", "stages", "events", "device.kernels", "device.lora", "device.training", "device.bandwidth")


@pytest.fixture(scope="module")
def modules():
    """Modules of the benchmarks by their last name; their names are free again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        before = set(sys.modules)
        loaded = {name.split(".")[-1]: importlib.import_module(name) for name in MODULES}
        yield SimpleNamespace(**loaded)
        for name in set(sys.modules) - before:
            if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or str(FOLDER)):
                del sys.modules[name]


# -- a dry run --------------------------------------------------------------------------------------------------------


def run_gpu(*options):
    command = [sys.executable, FOLDER, "gpu", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_dry_run_of_every_stage_and_its_resumption(modules, tmp_path):
    pytest.importorskip("triton")
    pytest.importorskip("peft")
    # more than its ten minutes: a busy machine is no fault
    first = run_gpu("--dry-run", "--minutes", "60", "--out", tmp_path)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert first.returncode == 0, first.stdout + first.stderr + logs
    assert set(results) == set(modules.gpu.STAGES)
    for content in results.values():
        assert modules.stages.problems_of(content) == []
        assert modules.stages.rows_of(content)
    # the comparisons run every kernel that the audit compiles
    launched = [row["kernels"].split(", ") for row in modules.stages.rows_of(results["kernels"])]
    assert {name for names in launched for name in names} == set(kernels())
    assert all(f"### {name}" in (tmp_path / "results.md").read_text() for name in modules.gpu.STAGES)
    # nothing is measured twice; of an unfinished stage, only what is missing
    content = results["bandwidth"]
    missing = list(content["cases"])[-1]
    content["cases"][missing] = {"started": True}
    (tmp_path / "bandwidth.json").write_text(json.dumps(content))
    second = run_gpu("--dry-run", "--minutes", "60", "--out", tmp_path)
    assert second.returncode == 0 and second.stdout.count("done before") == len(results) - 1
    again = json.loads((tmp_path / "bandwidth.json").read_text())["cases"]
    assert again[missing]["rows"] and all(again[name] == content["cases"][name] for name in again if name != missing)
    with pytest.raises(SystemExit, match="dry run"):
        modules.gpu.publish(tmp_path)


# -- time limits and crashes ------------------------------------------------------------------------------------------

# stands for a stage: arguments are what it does, and then those of the driver
STAGE = """
import json, os, subprocess, sys, time
from pathlib import Path
name, what, out = sys.argv[1], sys.argv[2], Path(sys.argv[sys.argv.index("--out") + 1])
path = out / f"{name}.json"
content = {"stage": name, "machine": {}, "clocks": [], "packages": {}, "cases": {"a": {}, "b": {}, "c": {}}}
if path.exists():
    content = json.loads(path.read_text())
for case, result in content["cases"].items():
    if result:
        continue
    content["cases"][case] = {"started": True}
    path.write_text(json.dumps(content))
    if what == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (out / "child").write_text(str(child.pid))
        time.sleep(60)
    if what == "crash" and case == "b":
        os.abort()
    content["cases"][case] = {"rows": [{"ok": True}]}
    path.write_text(json.dumps(content))
if what == "crash at exit":
    os.abort()
"""


@pytest.fixture
def run_stages(modules, tmp_path, monkeypatch):
    """Run stages that do as they are told: a stage's name -> what it does."""
    monkeypatch.setattr(modules.gpu, "LEAST_S", 0.2)

    def run(seconds, **stages):
        commands = {name: [sys.executable, "-c", STAGE, name, what] for name, what in stages.items()}
        run.crashed = modules.gpu.run_stages(commands, tmp_path, seconds)
        return {content["stage"]: content["cases"] for content in modules.gpu.stored(tmp_path)}

    return run


def ends(pid, seconds=60.0):
    """Wait until a process has ended; False if it does not."""
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_stage_that_hangs_is_killed_with_its_children_and_the_next_one_runs(
    modules, run_stages, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(modules.gpu, "STAGES", {"tests": 1, "kernels": 29})
    cases = run_stages(120.0, tests="hang", kernels="work")
    assert all("rows" in case for case in cases["kernels"].values())
    assert cases["tests"] == {"a": {"started": True}, "b": {}, "c": {}}
    assert ends(int((tmp_path / "child").read_text()), 20.0)
    assert "stopped at its time limit" in capsys.readouterr().out
    # a call without time starts nothing
    run_stages(0.1, tests="work", kernels="work")
    output = capsys.readouterr().out
    assert "tests: not started" in output and "kernels: done before" in output


def test_a_stage_that_crashes_goes_on_with_the_cases_that_never_started(run_stages, capsys):
    cases = run_stages(60.0, steps="crash", lora="work")
    assert cases["steps"] == {"a": {"rows": [{"ok": True}]}, "b": {"started": True}, "c": {"rows": [{"ok": True}]}}
    assert "2 of 3 cases" in capsys.readouterr().out and run_stages.crashed == []
    cases = run_stages(60.0, kernels="crash at exit")
    assert all("rows" in case for case in cases["kernels"].values()) and run_stages.crashed == ["kernels"]


@pytest.mark.slow
def test_ctrl_c_ends_the_stage_too(modules, tmp_path):
    script = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import gpu; from pathlib import Path; "
    script += (
        f"gpu.run_stages({{'tests': [sys.executable, '-c', {STAGE!r}, 'tests', 'hang']}}, Path(sys.argv[1]), 60.0)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert ends(int((tmp_path / "child").read_text()), 20.0)


@pytest.mark.slow
def test_sigterm_ends_the_stage_too_and_a_folder_has_one_writer(tmp_path):
    command = [sys.executable, FOLDER, "gpu", "--dry-run", "--only", "training", "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while (
        not (children := psutil.Process(process.pid).children(recursive=True))
        or not (tmp_path / "training.log").exists()
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode and "another process measures into it" in second.stderr
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert all(ends(child.pid, 20.0) for child in children)


def test_a_folder_that_cannot_be_is_said_and_a_path_is_made_safe(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, FOLDER, "gpu", "--dry-run", "--out", tmp_path / "file"]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    assert result.returncode == 1 and "expected a folder that can be written" in result.stderr.splitlines()[-1]


# -- cases and results ------------------------------------------------------------------------------------------------


def run_cases(modules, monkeypatch, tmp_path, cases, **settings):
    """Run a stage of these cases as a dry run in this process."""
    monkeypatch.setattr(sys, "argv", ["stage", "--dry-run", "--out", str(tmp_path)])
    parser = modules.stages.stage_parser("A stage.")
    code = modules.stages.run_stage("stage", parser, lambda stage: cases, {}, {}, **settings)
    return code, json.loads((tmp_path / "stage.json").read_text())["cases"]


@pytest.mark.slow
def test_a_case_that_fails_says_why_and_is_tried_again_after_the_others(modules, monkeypatch, tmp_path, capsys):
    calls = []

    def case(name, error=None):
        def run():
            calls.append(name)
            if error is not None:
                raise error
            return [{"name": name, "value": 1234.5678, "ok": True}]

        return run

    memory, broken = torch.OutOfMemoryError("CUDA out of memory"), ValueError("no file /home/someone/data/x.bin")
    cases = {"large": case("large", memory), "broken": case("broken", broken), "good": case("good")}
    code, stored = run_cases(modules, monkeypatch, tmp_path, cases)
    assert code == modules.stages.WITH_PROBLEMS and calls == ["large", "broken", "good"]
    assert stored["large"]["problem"].startswith("out of device memory: close other programs")
    assert stored["broken"] == {"problem": "ValueError: no file x.bin"}
    assert "| good | 1235 | yes |" in capsys.readouterr().out
    code, stored = run_cases(modules, monkeypatch, tmp_path, {name: case(name) for name in (*cases, "new")})
    assert code == modules.stages.DONE and calls[3:] == ["new", "large", "broken"]
    assert all("rows" in result for result in stored.values())


def test_a_lost_device_ends_the_stage(modules, monkeypatch, tmp_path):
    def lose():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    code, stored = run_cases(modules, monkeypatch, tmp_path, {"a": lose, "b": list})
    assert code == modules.stages.DEVICE_LOST and "illegal" in stored["a"]["problem"] and stored["b"] == {}


def test_cases_in_threads_are_all_stored(modules, monkeypatch, tmp_path):
    cases = {str(number): lambda number=number: [{"number": number}] for number in range(20)}
    code, stored = run_cases(modules, monkeypatch, tmp_path, cases, workers=4)
    assert code == 0 and [stored[name]["rows"] for name in cases] == [[{"number": number}] for number in range(20)]


@pytest.mark.parametrize("key", ["device", "commit", "code", "torch", "triton"])
def test_results_of_elsewhere_are_refused(modules, tmp_path, key):
    machine = modules.stages.machine_of(torch.device("cpu"))
    modules.stages.Results("steps", machine, tmp_path / "steps.json").write()
    assert modules.stages.Results("steps", machine, tmp_path / "steps.json").content["stage"] == "steps"
    with pytest.raises(SystemExit, match="choose another --out") as refusal:
        modules.gpu.check_folder(tmp_path, machine | {key: "another"}, dry_run=True)
    assert f"{key} {machine[key]!r}, now 'another'" in str(refusal.value)


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"machine": {}}', '{"machine": {}, "cases": []}', '{"machine": {}, "cases": {}}',
])  # fmt: skip
def test_damaged_results_are_refused(modules, tmp_path, text):
    (tmp_path / "lora.json").write_text(text)
    for use in (lambda: modules.gpu.check_folder(tmp_path, {}, dry_run=True), lambda: modules.gpu.publish(tmp_path)):
        with pytest.raises(SystemExit, match="lora.json: expected the results of a stage"):
            use()


def test_kernels_of_the_stages_are_not_interpreted(modules, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in modules.gpu.first_device_only()


def test_training_has_time_for_each_optimizer_where_earlier_stages_use_theirs(modules):
    training = importlib.import_module("device.training")
    share = 600 * modules.gpu.STAGES["training"] / sum(modules.gpu.STAGES.values())
    least = training._LEAST_S + training._ENDING_S
    # a stage imports torch first
    assert (share - 10) / len(training.FULL["optimizers"]) > least


def test_a_full_disk_is_refused(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.gpu, "free_bytes", lambda path: 1 << 20)
    with pytest.raises(SystemExit, match="free some, or choose another --out"):
        modules.gpu.check_folder(tmp_path, {}, dry_run=False)


def test_without_a_device_the_error_names_the_dry_run(modules, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA or ROCm device, .* --dry-run"):
        modules.stages.find_device(dry_run=False)


def test_pytest_reports_become_rows(modules):
    tests = importlib.import_module("device.tests")
    report = """<testsuites><testsuite>
        <testcase name="test_a" time="1.5"/><testcase name="test_b" time="0.5"><skipped/></testcase>
        <testcase name="test_c"><failure message="assert 1 == 2 in /home/someone/x.py">text</failure></testcase>
    </testsuite></testsuites>"""
    row = tests.row_of("tests/x.py", tests.ElementTree.fromstring(report), dry_run=False)
    assert row == {
        "file": "tests/x.py", "passed": 1, "failed": 1, "skipped": 1, "seconds": 2.0, "ok": False,
        "first failure": "test_c: assert 1 == 2 in x.py",
    }  # fmt: skip
    # tests that are all skipped prove nothing on a device
    skipped = tests.ElementTree.fromstring('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert [tests.row_of("x", skipped, dry_run)["ok"] for dry_run in (False, True)] == [False, True]


def test_a_wrong_kernel_is_noticed():
    exact = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    definition = exact.float()
    assert measure(definition.clone(), definition, exact).sound
    for damage in (1e-5, float("nan"), float("inf")):
        actual = definition.clone()
        actual[7] += damage
        assert not measure(actual, definition, exact).sound, damage
        assert not bits_equal(actual, definition)


def dry_stage(module):
    return SimpleNamespace(device=torch.device("cpu"), sizes=SimpleNamespace(**module.DRY), dry_run=True)


def test_a_captured_step_that_differs_or_cannot_be_captured_is_a_failed_check(modules, monkeypatch):
    graphs = importlib.import_module("device.graphs")
    stage, case = dry_stage(graphs), graphs.DRY["variants"][0]
    assert graphs.compare_captured(stage, case)[0]["ok"]
    monkeypatch.setattr(graphs, "capture", lambda stage, step: lambda: None)
    (row,) = graphs.compare_captured(stage, case)
    assert row["same bits"] is False and row["ok"] is False

    def refuse(stage, step):
        raise RuntimeError(message)

    monkeypatch.setattr(graphs, "capture", refuse)
    message = "CUDA error: operation not permitted when stream is capturing"
    (row,) = graphs.compare_captured(stage, case)
    assert row["ok"] is False and row["note"].startswith("not captured: RuntimeError: CUDA error")
    # that of M-FAC is expected
    (mfac,) = (case for case in graphs.DRY["variants"] if case.cls.__name__ == "MFAC")
    (row,) = graphs.compare_captured(stage, mfac)
    assert "ok" not in row and row["note"].startswith("not captured")
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        graphs.compare_captured(stage, case)


@pytest.mark.slow
def test_an_optimizer_that_does_not_run_leaves_the_others(modules, monkeypatch):
    steps = importlib.import_module("device.steps")

    def fail():
        raise ValueError("not on this device")

    made = {name: (lambda: fail, 0) for name in ("leanstep Lion", "dion Muon + AdamW")}
    monkeypatch.setattr(steps, "candidates", lambda *_: {steps.BASE: (lambda: lambda: None, 7), **made})
    monkeypatch.setattr(steps, "lanton_makers", lambda *_: {})
    monkeypatch.setattr(steps, "missing_peers", lambda: ["bitsandbytes"])
    rows = steps.measure(dry_stage(steps), *steps.DRY["lists"][0])
    base, ours, theirs, missing = rows
    assert base["÷ AdamW"] == 1 and ours["ok"] is False and "ok" not in theirs
    assert ours["note"] == theirs["note"] == "ValueError: not on this device"
    assert (missing["optimizer"], missing["note"]) == ("bitsandbytes Lion8bit", "not installed")


@pytest.mark.slow
def test_bytes_moved_are_those_that_the_audit_finds_in_the_kernels(modules):
    pytest.importorskip("triton")
    # in a process of its own: Triton's recorded launches would live until this one ends
    script = """
import json
from leanstep.kernels.triton_impl import _compile
print(json.dumps({f"{case.kernel.__name__} {case.label}": case.read + case.written for case in _compile.cases()}))
"""
    promised = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    runs, size = modules.bandwidth.steps("llama-nano-sinkgd", dry_stage(modules.bandwidth))
    elements = size // 2
    for rounding in ("nearest", "stochastic", "kahan", "master", "split"):
        kernel = f"lion_step_kernel p bfloat16 g bfloat16 m bfloat16 {rounding}"
        assert runs[f"Lion, {rounding}"][1] == promised[kernel] * elements
    assert runs["Lion, agreement"][1] == promised["lion_agreement_kernel g bfloat16 m bfloat16"] * elements
    # G, and G with W
    matrices = runs["SinkGD, one pass"][1] // 2
    assert promised["sinkhorn_tile_kernel g bfloat16 aligned 512"] == 2
    assert runs["SinkGD, update"][1] == promised["scaled_step_kernel p bfloat16 g bfloat16 nearest aligned"] * matrices
    assert runs["SinkGD, five passes and the update"][1] == (5 * 2 + 6) * matrices


# -- code that only a device reaches ----------------------------------------------------------------------------------


class Event:
    """Stands for a CUDA event: notes when it is recorded."""

    def __init__(self, calls):
        self.calls = calls

    def record(self):
        self.calls.append("event")

    def synchronize(self):
        self.calls.append("wait")

    def elapsed_time(self, other):
        return 2.0


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device "cuda" whose operations run on the CPU and are noted."""
    calls = []
    properties = SimpleNamespace(name="Card", total_memory=80 << 30, L2_cache_size=50, uuid="0-1")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, device, dtype: empty(8, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(calls))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("sleep"))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 170)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return calls


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("3,1", "3"), ("GPU-0-1", "GPU-0-1"), ("", "")])
def test_stages_see_one_of_several_devices(modules, monkeypatch, visible, first):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert modules.gpu.first_device_only()["CUDA_VISIBLE_DEVICES"] == first
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2,5")
    assert modules.gpu.first_device_only()["HIP_VISIBLE_DEVICES"] == "2"


def test_events_enclose_the_run_alone(modules, fake_cuda):
    timer = modules.events.Timer(torch.device("cuda"))
    assert timer.seconds(lambda: fake_cuda.append("run")) == 2e-3
    assert fake_cuda == ["sleep", "event", "run", "event", "wait"]
    assert timer.medians({"a": lambda: None}, rounds=3) == {"a": 2e-3}
    assert modules.events.peak_bytes(torch.device("cuda"), lambda: None) == 70


def test_the_card_and_its_clocks_are_named(modules, fake_cuda, monkeypatch):
    machine = modules.stages.machine_of(torch.device("cuda", 0))
    assert machine["device"] == "Card, 80.0 GiB" and machine["runtime"] == "CUDA 13.0"

    def query(command, **settings):
        assert command[:3] == ["nvidia-smi", "-i", "GPU-0-1"]
        return SimpleNamespace(stdout="1980 MHz, 2619 MHz, 1980 MHz, 80 W, 700 W, 33, 580.95\n")

    monkeypatch.setattr(modules.stages.subprocess, "run", query)
    clocks = modules.stages.clocks(torch.device("cuda"))
    assert clocks.startswith("SM 1980 MHz, memory 2619 MHz") and clocks.endswith("30.0 GiB of 80.0 GiB free")
    assert modules.stages.busy_bytes(torch.device("cuda")) == 50 << 30
    monkeypatch.setattr(modules.stages.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert modules.stages.clocks(torch.device("cuda")).startswith("unknown")


def test_a_captured_step_is_the_replay_of_its_graph(modules, fake_cuda, monkeypatch):
    graphs = importlib.import_module("device.graphs")
    graph = SimpleNamespace(replay=lambda: fake_cuda.append("replay"))

    @contextmanager
    def capturing(which):
        assert which is graph
        fake_cuda.append("capture")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    replay = graphs.capture(SimpleNamespace(device=torch.device("cuda")), lambda: fake_cuda.append("step"))
    replay()
    assert fake_cuda == ["wait", "capture", "step", "replay"]


def test_the_full_sizes_are_those_of_the_recipes_and_of_a_3b_model(modules):
    training = modules.training
    for optimizer in training.FULL["optimizers"]:
        config = loader.load(f"llama-60m-{optimizer}", [*training.COMMON, *training.FULL["settings"], "out=x"])
        assert config.batch.tokens_per_step == 131072 and config.model.config["vocab_size"] == 32000
    for recipe in modules.bandwidth.FULL["recipes"]:
        assert loader.load(recipe, []).precision == "bf16-pure"
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**modules.lora.SHAPE))
    # meta-llama/Llama-3.2-3B
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_212_749_824


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_that_of_the_results(modules):
    page = modules.gpu.PAGE.read_text("utf-8")
    between = page.split(modules.gpu.BEGIN)[1].split(modules.gpu.END)[0]
    assert between.strip() == modules.gpu.published().strip()
    assert all(f"| `{name}` |" in page for name in modules.gpu.STAGES)


def test_publishing_writes_results_and_page(modules, tmp_path, monkeypatch):
    page, file = tmp_path / "gpu.md", tmp_path / "gpu.json"
    page.write_text(f"before\n{modules.gpu.BEGIN}\nold\n{modules.gpu.END}\nafter\n")
    monkeypatch.setattr(modules.gpu, "PAGE", page)
    monkeypatch.setattr(modules.gpu, "PUBLISHED", file)
    with pytest.raises(SystemExit, match="expected results of a device, got none"):
        modules.gpu.publish(tmp_path / "empty")
    results = modules.stages.Results("steps", {"device": "Card", "torch": "2"}, tmp_path / "out" / "steps.json")
    results.content["clocks"] = ["SM 1 MHz", "SM 2 MHz"]
    results.put("good", rows=[{"optimizer": "Lion", "ms": 1.5, "ok": True}, {"optimizer": "a|b", "ok": False}])
    results.put("bad", problem="ValueError: why")
    assert modules.gpu.publish(tmp_path / "out") == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = ["| Lion | 1.5 | yes |", "| a\\|b |  | **no** |", "- bad: ValueError: why", "device Card, torch 2"]
    assert all(row in text for row in rows), text
    assert "Not measured: tests, kernels, bandwidth, lora, graphs, training." in text
    assert modules.gpu.published() in text
