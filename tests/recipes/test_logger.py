"""What a run writes about itself: the work done, by formula, and what its optimizer reports."""

import json
from functools import partial
from types import SimpleNamespace

import faults
import pytest
from accelerate import Accelerator, tracking
from run_folders import write_run
from training import read_log, run, status, write_recipe
from transformers import MixtralConfig, MixtralForCausalLM

from leanstep.recipes.check.costs import flops_per_token, peak_flops
from leanstep.recipes.config.schema import ModelConfig
from leanstep.recipes.report.formatting import format_line
from leanstep.recipes.report.report import write_report
from leanstep.recipes.report.trackers import Trackers
from leanstep.recipes.training.build import build_model


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_operations_follow_the_formula(family, tied):
    vocabulary, width, layers, mlp, positions, sequence = 300, 32, 2, 64, 48, 16
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": 2, "n_inner": mlp, "n_positions": positions}
        layer = 4 * width * width + 2 * width * mlp + 9 * width + mlp
        rest = 2 * width
    else:
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": mlp}
        layer = 4 * width * width + 3 * width * mlp + 2 * width
        rest = width
    model = build_model(ModelConfig(family=family, config={**sizes, "tie_word_embeddings": tied}), vocabulary)
    # the head multiplies whether it shares its table or not; looking a token or a position up does not
    weights = vocabulary * width + layers * layer + rest
    assert flops_per_token(model, sequence) == 6 * weights + 12 * layers * width * sequence


def test_operations_of_frozen_weights_and_of_experts():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = build_model(ModelConfig(config=sizes), 300)
    before, frozen = flops_per_token(model, 8), model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert before - flops_per_token(model, 8) == 2 * frozen.numel()
    routed = dict(num_local_experts=4, num_experts_per_tok=2, vocab_size=300, **sizes, tie_word_embeddings=False)
    model = MixtralForCausalLM(MixtralConfig(**routed, num_key_value_heads=2))
    attention, router, expert, norms, head = 4 * 32 * 32, 4 * 32, 3 * 32 * 64, 3 * 32, 300 * 32
    weights = attention + router + 2 * expert + norms + head
    assert flops_per_token(model, 8) == 6 * weights + 12 * 32 * 8


def test_attention_counts_the_width_of_the_heads():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 64}
    model = build_model(ModelConfig(config=sizes), 300)
    assert flops_per_token(model, 20) - flops_per_token(model, 10) == 12 * 1 * 128 * 10


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("cuda:0 (NVIDIA H100 80GB HBM3)", "bf16", 989e12),
        ("cuda:1 (NVIDIA H100 PCIe)", "bf16-pure", 756e12),
        ("cuda:0 (NVIDIA L40S)", "fp16", 362e12),
        ("cuda:0 (NVIDIA H100 80GB HBM3)", "fp32", None),
        ("cuda:0 (NVIDIA H100 80GB HBM3 MIG 1g.10gb)", "bf16", None),
        ("cuda:0 (Some Card 9000)", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_peaks_are_of_known_devices_only(device, precision, peak):
    assert peak_flops(device, precision) == peak


def test_utilisation_is_shown_where_it_is_known():
    entry = {"step": 3, "loss": 3.4, "lr": 1e-3, "tokens_per_s": 12_400.0, "tflops": 1.2}
    assert "mfu" not in format_line(entry, 10, None, [])
    assert "12.4k tok/s  mfu 41.3%" in format_line({**entry, "mfu": 0.413}, 10, None, [])


@pytest.fixture(scope="module", params=[1, 2])
def talking(request, recipe, tmp_path_factory):
    """A run whose optimizer reports on itself, with a tracker."""
    out = tmp_path_factory.mktemp("talking") / "run"
    options = ["steps=5", "log={every: 2, trackers: [notebook]}", f"batch.micro_batch_size={8 // request.param}"]
    prepare = partial(faults.with_a_talking_optimizer, faults.with_a_tracker)
    training = run(recipe, options, out, world=request.param, prepare=prepare)
    assert training.codes == [0] * request.param, training.text()
    training.world = request.param
    return training


def test_the_work_done_is_logged(talking):
    facts = json.loads((talking.out / "env.json").read_text())
    assert facts["flops_per_token"] > 6 * 25_000 and "6 N + 12 L h s" in facts["flops_formula"]
    entries = [entry for entry in read_log(talking.out) if entry["kind"] == "train"]
    for entry in entries:
        assert entry["tflops"] > 0 and "mfu" not in entry, "no peak is known of a CPU"
        assert 0.1 < entry["process_gib"] < 100 and "memory_gib" not in entry
        # 256 positions a step of which 248 are targets
        expected = facts["flops_per_token"] * entry["tokens_per_s"] * 256 / 248 / 1e12
        assert entry["tflops"] == pytest.approx(expected, rel=2e-3)
    assert status(talking.out)["tflops"] == entries[-1]["tflops"]
    assert "mfu" not in talking.text()
    begun = talking.text().splitlines()
    assert [begun.count(line) for line in ("reading the text; a new one is tokenised once", "evaluating")] == [1, 1]


def test_what_the_optimizer_reports_is_logged_at_log_steps_only(talking):
    entries = [entry for entry in read_log(talking.out) if entry["kind"] == "train"]
    assert [entry["step"] for entry in entries] == [1, 2, 4, 5]
    assert [entry["optimizer"]["asked"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0]["optimizer"] == {"noise/layer.0": talking.world, "noise/layer.1": 0.5, "asked": 1}
    kept = [json.loads(line) for line in (talking.out / "notebook.jsonl").read_text().splitlines()]
    tracked = [entry["values"] for entry in kept if "loss" in entry.get("values", {})]
    assert [values["optimizer/noise/layer.0"] for values in tracked] == [talking.world] * 4
    assert all("optimizer" not in values for values in tracked)


def test_what_the_optimizer_reports_at_the_end_is_kept_and_shown(talking):
    rows = json.loads((talking.out / "optimizer_report.json").read_text())
    assert rows[0] == {"name": "layer.0", "H": 0.25, "lr": 1e-3} and rows[1]["group"] == "hidden"
    page = (talking.out / "report.html").read_text()
    assert "<h3>Optimizer: noise</h3>" in page and "<h3>Optimizer: asked</h3>" in page
    assert "<h2>Optimizer</h2>" in page and "<th>layer.1</th>" in page


def test_optimizers_that_say_nothing_leave_nothing(recipe, tmp_path):
    training = run(recipe, ["steps=2", "checkpoint.every=0"], tmp_path / "run")
    assert training.codes == [0], training.text()
    assert all("optimizer" not in entry for entry in read_log(tmp_path / "run"))
    assert not (tmp_path / "run" / "optimizer_report.json").exists()
    assert "Optimizer: " not in (tmp_path / "run" / "report.html").read_text()


def test_many_layers_and_damaged_reports(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["optimizer"] = {f"H/layer.{i}": i / line["step"] for i in range(60)} | {"lonely": None, "odd": "text"}
    lines[0]["optimizer"] = "damaged"
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "optimizer_report.json").write_text("{broken")
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "<h3>Optimizer: H (16 of 60)</h3>" in page
    assert "Optimizer: lonely" not in page and "Optimizer: odd" not in page
    assert "optimizer_report.json cannot be understood" in page
    (folder / "optimizer_report.json").write_text(json.dumps([{"name": f"<u>{i}", "H": i} for i in range(3)] + [7]))
    page = write_report([folder], tmp_path / "report.html").read_text()
    assert "&lt;u&gt;2" in page and "<u>" not in page


def test_a_tracker_whose_folder_vanishes_is_told_once_and_ends_no_run(tmp_path, capfd):
    pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    said = []
    trackers = Trackers(Accelerator(log_with="tensorboard", project_dir=str(tmp_path / "run"), cpu=True), said.append)
    trackers.open("group", "run", {"lr": 1e-3}, tmp_path, is_new=True)
    trackers.log({"loss": 1.0, "mfu": None}, step=1)
    assert said == [] and list((tmp_path / "run" / "group").glob("events.*"))
    (tmp_path / "run").rename(tmp_path / "away")
    for step in (2, 3, 4):
        trackers.log({"loss": 1.0}, step)
    trackers.close()
    assert len(said) == 1 and said[0].startswith("WARNING: tracker tensorboard: [Errno 2] No such file"), said
    assert capfd.readouterr().err == "", "its thread printed a traceback"


@pytest.fixture
def services(monkeypatch):
    """Trackers of these packages' interfaces in Accelerate's table: what each was made with, and given."""
    made = []

    def service(kind):
        class Service(tracking.GeneralTracker):
            name, requires_logging_directory = kind, False

            def __init__(self, project, **arguments):
                super().__init__()
                made.append([kind, project, arguments])
                record = arguments.get("run_id", arguments.get("id", f"{kind}-{len(made)}"))
                self.run = SimpleNamespace(id=record, name=arguments.get("name"))
                self.active_run = SimpleNamespace(info=SimpleNamespace(run_id=record))

            @property
            def tracker(self):
                return self

            def start(self):
                if kind == "aim":
                    raise RuntimeError("no key\nfor aim")

            def store_init_configuration(self, values):
                made[-1].append(values)

            def log(self, values, step=None, **options):
                if kind == "swanlab":
                    raise ConnectionError("gone")

        return Service

    for kind in ("wandb", "mlflow", "trackio", "swanlab", "aim"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind, service(kind))
    return made


def test_a_resumed_run_goes_on_in_its_records_and_a_tracker_that_fails_ends_no_run(services, tmp_path):
    said, settings = [], {"lr": 1e-3}
    for is_new in (True, False):
        accelerator = Accelerator(cpu=True)
        accelerator.log_with = ["wandb", "aim", "mlflow", "trackio", "swanlab"]
        trackers = Trackers(accelerator, said.append)
        trackers.open("group", "name", settings, tmp_path, is_new=is_new)
        trackers.log({"loss": 1.0}, 1)
        trackers.log({"loss": 1.0}, 2)
        trackers.close()
    assert services == [
        ["wandb", "group", {"name": "name"}, settings],
        ["aim", "group", {}],
        ["mlflow", "group", {"run_name": "name"}, settings],
        ["trackio", "group", {"name": "name"}, settings],
        ["swanlab", "group", {}, settings],
        ["wandb", "group", {"id": "wandb-1", "resume": "allow"}],
        ["aim", "group", {}],
        ["mlflow", "group", {"run_id": "mlflow-3"}],
        ["trackio", "group", {"name": "name", "resume": "allow"}],
        ["swanlab", "group", {}, settings],
    ]
    assert (
        said
        == [f"WARNING: tracker {why}; it gets nothing more" for why in ("aim: no key for aim", "swanlab: gone")] * 2
    )
