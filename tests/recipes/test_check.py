"""``leanstep check``: what it reports of a run that can start, and what stops one that cannot."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from leanstep import _memory
from leanstep.pruning.folder.loading import begin_tokens
from leanstep.recipes.check import check as check_module
from leanstep.recipes.check.check import Check, Section, check, routing_rows
from leanstep.recipes.check.costs import MemoryEstimate, disk_need, flops_per_token, meta_model
from leanstep.recipes.config.catalog import describe
from leanstep.recipes.config.loader import dump, load, recipe_names
from leanstep.recipes.config.values import recorded
from leanstep.recipes.data.tokens import vocabulary_size
from leanstep.recipes.report.formatting import format_duration
from leanstep.recipes.report.progress import ProgressBar
from leanstep.recipes.training.checkpoint import TrainState, commit, staging, write_state
from leanstep.recipes.training.folder import RunFolder

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 300


@pytest.fixture
def run(tmp_path):
    """A small recipe over a text file; its overrides as keyword text."""
    (tmp_path / "text.txt").write_text(TEXT)

    def load_with(*overrides, name="llama-nano-adamw"):
        small = [
            "data.source=text",
            f"data.path={tmp_path / 'text.txt'}",
            "data.tokenizer=train:300",
            "data.seq_len=32",
            "data.val_tokens=300",
            f"data.cache_dir={tmp_path / 'cache'}",
            "batch={tokens_per_step: 128, micro_batch_size: 4}",
            f"out={tmp_path / 'out'}",
        ]
        return load(name, [*small, *overrides])

    return load_with


def section(config, title, **options):
    return next(part for part in Check(config, **options).sections() if part.title == title)


def write_checkpoint(config, step):
    """Write a checkpoint without weights, as far as a start reads it."""
    folder = Path(config.out) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    staged = staging(folder, step)
    write_state(staged, TrainState(step=step, config=recorded(config)))
    return commit(staged)


def output(config):
    found = Section("Output")
    Check(config).output(found)
    return found


def problems(config, **options):
    return [f"{part.title}: {problem}" for part in Check(config, **options).sections() for problem in part.problems]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-nano-adamw", "gpt-nano-lion", "llama-nano-sinkgd"])
def test_a_run_that_can_start(run, name, capsys, tmp_path):
    config = run(name=name)
    assert check(config) == 0
    out = capsys.readouterr().out
    for title in ("Recipe", "Device", "Data", "Length", "Parameter groups", "Memory", "Disk", "Output"):
        assert f"\n{title}\n" in out
    assert "tokens_per_step: 128" in out
    assert "76,800 (128 a step)" in out
    assert "optimizer state" in out and "MiB" in out
    assert "ready to train" in out
    assert not (tmp_path / "out").exists()


def test_epochs_count_the_sequences_of_the_text(run):
    from leanstep.recipes.data.sequences import load_data

    config = run()
    sequences = len(load_data(config.data, seed=0).train)
    lines = section(config, "Length").lines
    assert "all tokens of a sequence but its first: 31 of 32" in lines[-2]
    assert lines[-1].split() == ["epochs", f"{600 * 4 / sequences:.2f}"]
    assert any(
        "4 sequences of 32: 2 processes x 1 passes x 2 sequences" in line
        for line in section(run("batch.micro_batch_size=2"), "Length", world_size=2).lines
    )


def test_the_routing_table_accounts_for_every_weight(run):
    from leanstep.recipes.check.costs import meta_model
    from leanstep.recipes.training.build import build_optimizer

    config = run("optimizer.groups=[{match: 'layers.0', lr: 0.5, weight_decay: 0.25}]")
    model = meta_model(config, 300)
    header, *rows = routing_rows(build_optimizer(config.optimizer, model))
    assert header[:4] == ("group", "algorithm", "tensors", "elements")
    assert sum(int(row[3].replace(",", "")) for row in rows) == sum(p.numel() for p in model.parameters())
    assert sum(int(row[2]) for row in rows) == len(list(model.parameters()))
    chosen = [row for row in rows if row[4:6] == ("0.5", "0.25")]
    assert chosen and all(row[6].startswith("model.layers.0") for row in chosen)
    assert any("embed" in row[6] for row in rows)


def test_sinkgd_shows_which_parameters_go_to_the_fallback(run):
    lines = section(run(name="llama-nano-sinkgd"), "Parameter groups").lines
    matrices = [line for line in lines if "q_proj" in line]
    embedding = [line for line in lines if "embed_tokens" in line]
    assert len(matrices) == len(embedding) == 1
    assert "sinkgd" in matrices[0] and "adamw" in embedding[0]


def bad_text(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return f"data.path={path}"


def test_texts_that_are_not_there_or_no_text(run, tmp_path):
    for override, message in (
        (f"data.path={tmp_path / 'texd.txt'}", "does not exist; did you mean"),
        (bad_text(tmp_path, "nothing.txt", b""), "empty"),
        (bad_text(tmp_path, "bytes.txt", bytes(range(256)) * 50), "binary"),
        ("data.val_tokens=1000000", "cannot be held out"),
        (f"data.val_path={tmp_path / 'no.txt'}", "no.txt"),
        ("data.tokenizer=nowhere/at-all", "nowhere/at-all (data.tokenizer)"),
    ):
        found = [problem for problem in problems(run(override)) if problem.startswith(("Data: ", "Network: "))]
        assert len(found) == 1 and message in found[0], (override, found)


def test_a_step_that_repeats_a_short_text_is_a_note_since_it_trains(run):
    config = run("batch={tokens_per_step: 65536, micro_batch_size: 4}")
    assert not problems(config)
    assert "one step takes 2048 sequences, the text has " in "\n".join(section(config, "Length").lines)


def test_an_unexpected_error_of_one_section_is_a_problem_and_the_others_go_on(run, monkeypatch):
    def fail(*arguments, **settings):
        raise KeyError("rope")

    monkeypatch.setattr(check_module, "estimate", fail)
    parts = {part.title: part for part in Check(run()).sections()}
    assert parts["Memory"].problems == ["'rope'"] and parts["Output"].lines


@pytest.mark.slow
def test_a_hub_recipe_offline_names_those_that_need_no_network():
    # one sequence at a time: the estimate is not what is tested
    small = ["batch={tokens_per_step: 256, micro_batch_size: 1}"]
    (found,) = problems(load("llama-60m", small))
    assert found.startswith("Network: needs the network: allenai/c4 (data.name), t5-base (data.tokenizer); offline ")
    assert "llama-nano-sinkgd" in found
    (found,) = problems(load("llama-60m", [*small, "data.tokenizer=train:300"]))
    assert "needs the network: allenai/c4 (data.name); offline recipes: " in found and "t5-base" not in found


def test_a_vocabulary_that_does_not_fit(run, tmp_path):
    from leanstep.recipes.data.sequences import load_data

    folder = tmp_path / "tokenizer"
    load_data(run().data, seed=0).tokenizer.save_pretrained(folder)
    config = run(f"data.tokenizer={folder}", "model.config.vocab_size=290")
    found = problems(config)
    assert any("produces 300 tokens, model.config.vocab_size is 290" in problem for problem in found)
    assert problems(run(f"data.tokenizer={folder}", "model.config.vocab_size=300")) == []


def test_sentinels_that_text_never_produces_need_no_weights(run):
    from leanstep.recipes.data.sequences import load_data

    tokenizer = load_data(run().data, seed=0).tokenizer
    assert vocabulary_size(tokenizer) == len(tokenizer) == 300
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]})
    assert len(tokenizer) == 400
    assert vocabulary_size(tokenizer) == 300
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert vocabulary_size(tokenizer) == 401
    # one that is before every text, as GLM's, is in every sequence
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] $A", special_tokens=[("[gMASK]", len(tokenizer) - 1)]
    )
    begin_tokens.cache_clear()  # the tokenizer is another one in the test alone
    assert vocabulary_size(tokenizer) == len(tokenizer) == 402


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(run):
    (found,) = problems(run("device=cuda"))
    assert found.startswith("Device: device: 'cuda' was asked for")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
def test_what_a_cpu_cannot_do(run):
    assert any("fp16 needs a GPU" in problem for problem in problems(run("precision=fp16")))
    assert any("fsdp2 needs GPUs" in problem for problem in problems(run("distributed.strategy=fsdp2")))


def test_trackers_are_looked_for(run, monkeypatch):
    from accelerate import tracking

    (found,) = problems(run("log.trackers=[wandbb]"))
    assert found.startswith("Device: log.trackers: 'wandbb' is not available here (Accelerate knows ")
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["trackio"])
    assert problems(run("log.trackers=[trackio]")) == []
    (found,) = problems(run("log.trackers=[wandb]"))
    assert "'wandb' is not available here (pip install wandb)" in found


def test_an_optimizer_that_refuses_its_arguments_is_a_problem(run):
    found = problems(run("optimizer.groups=[{match: nothing_like_it, lr: 1}]"))
    assert any(problem.startswith("Parameter groups: ") and "selects no parameter" in problem for problem in found)


def test_disk_need_counts_what_a_run_keeps_at_once(run, monkeypatch):
    config = run("checkpoint.keep_last=3", "checkpoint.keep_best=true")
    one = MemoryEstimate(weights=100, gradients=0, optimizer_state=200, activations=0, logits=0)
    assert disk_need(config, one) == (300, 5 * 300 + 100)
    assert disk_need(config, one, world_size=4) == (300, 5 * 300 + 100), "replicated: one process writes"
    sharded = run("checkpoint.keep_last=3", "checkpoint.keep_best=true", "distributed.strategy=fsdp2")
    assert disk_need(sharded, one, world_size=4) == (1200, 5 * 1200 + 400)
    monkeypatch.setattr(check_module, "disk_need", lambda config, memory, world_size: (world_size * 2**30, 0))
    assert any("4.0 GiB" in line for line in section(sharded, "Disk", world_size=4).lines)
    monkeypatch.undo()
    memory = section(config, "Memory")
    assert memory.problems == []
    full = shutil.disk_usage(".")._replace(free=1_000_000)
    monkeypatch.setattr(check_module.shutil, "disk_usage", lambda path: full)
    (found,) = problems(config)
    assert found.startswith("Disk: the run needs ") and "lower checkpoint.keep_last" in found


def test_memory_that_is_not_there(run, monkeypatch):
    monkeypatch.setattr(check_module, "free_memory", lambda device: 2_000_000)
    (found,) = problems(run())
    assert found.startswith("Memory: ") and "batch.micro_batch_size=2 (same maths)" in found


def test_memory_that_a_control_group_does_not_allow(run, monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1000000")
    (tmp_path / "memory.stat").write_text("inactive_file 0")
    (tmp_path / "self").write_text("0::/")
    monkeypatch.setattr(_memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(_memory, "PROCESS_CGROUPS", tmp_path / "self")
    (found,) = problems(run())
    assert found.startswith("Memory: ") and "do not fit the 1.9 MiB that are free on cpu" in found


def test_output_folders(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert output(run()).problems == []
    (out / "notes.txt").write_text("mine")
    (found,) = output(run()).problems
    assert "is not empty and holds no run" in found
    (out / "config.yaml").write_text(dump(run()))
    assert output(run()).problems == []
    found = output(run()).lines[-1]
    assert "without a complete checkpoint: `train` begins it again at step 0" in found
    (out / "checkpoints" / "step-000004").mkdir(parents=True)
    assert "without a complete checkpoint" in output(run()).lines[-1]
    write_checkpoint(run(), 4)
    (out / "status.json").write_text('{"status": "running", "step": 6}')
    found = output(run()).lines[-1]
    assert "a run at step 6 (crashed: " in found and found.endswith("newest complete checkpoint, step-000004")
    folder = RunFolder(out)
    folder.claim()
    (found,) = output(run()).problems
    assert found.startswith("another process is training in ")
    folder.release()
    (out / "status.json").write_text('{"status": "done", "step": 6}')
    assert "a run that is done (step 6)" in output(run()).lines[-1]
    (problem,) = output(run("optimizer.lr=7e-3")).problems
    assert "1 key of the recipe changed" in problem and "optimizer.lr" in problem
    (out / "checkpoints" / "step-000006").mkdir()
    (out / "checkpoints" / "step-000006" / "COMPLETE").write_text("{")
    section = output(run())
    assert section.problems == [] and any("going back to an older checkpoint" in line for line in section.lines)
    assert (out / "checkpoints" / "step-000006").is_dir()
    (found,) = output(run("checkpoint.resume=never")).problems
    assert "already holds a run" in found
    shutil.rmtree(out)
    out.write_text("a file")
    (found,) = output(run()).problems
    assert "is a file" in found


def test_a_checkpoint_to_begin_from_is_looked_for(run, tmp_path):
    (problem,) = output(run(f"checkpoint.resume={tmp_path / 'nowhere'}")).problems
    assert problem.startswith("checkpoint.resume: ") and problem.endswith("does not exist")
    checkpoint = write_checkpoint(run(f"out={tmp_path / 'other'}"), 4)
    section = output(run(f"checkpoint.resume={checkpoint}"))
    assert section.problems == [] and any("resuming from" in line for line in section.lines)
    assert not (tmp_path / "out").exists()


def test_a_stream_needs_validation_text_that_is_there(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)))
    stream = ["data.source=json", f"data.path={tmp_path / 'rows.jsonl'}", "data.streaming=true"]
    (problem,) = problems(run(*stream))
    assert problem.startswith("Data: data.streaming: no validation text is held out from a stream")
    (problem,) = problems(run(*stream, f"data.val_path={tmp_path / 'missing.txt'}"))
    assert problem.startswith("Data: data.val_path: ")
    assert problems(run(*stream, f"data.val_path={tmp_path / 'text.txt'}")) == []
    assert problems(run(*stream, "data.val_tokens=0")) == []


def test_what_a_failed_start_leaves_is_no_foreign_folder(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "train.log", "status.json"):
        (out / name).write_text("")
    assert problems(run()) == []
    assert "a new one begins" in output(run()).lines[-1]


def test_a_small_text_gives_the_vocabulary_that_it_gives(run):
    config = run("data.tokenizer=train:5000")
    made, found = Check(config), Section("Data")
    made.data(found)
    assert 257 < made.vocabulary < 400
    assert any("at most 5,000 tokens" in line for line in found.lines)
    assert any(f"{made.vocabulary:,} tokens: the text gives no more" in line for line in found.lines)
    full = Check(run("data.tokenizer=train:5000", "model.config.vocab_size=5000")).sections()
    assert [part.problems for part in full if part.problems] == []


def test_an_unreachable_hub_is_asked_once_and_the_answer_comes_early(no_network, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert check(load("llama-60m", ["batch={tokens_per_step: 256, micro_batch_size: 1}"])) == 1
    assert len(no_network) == 1 and not waits, "no retries"
    no_network.clear()
    out, error = capsys.readouterr()
    assert error == "" and not constants.HF_HUB_OFFLINE
    assert out.index("1 problem\n") < out.index("cannot be reached") < out.index("\nData\n")
    assert "\nTime\n  at least        " in out, "the size of the model is known without the hub"


def test_a_tokenizer_of_the_hub_is_not_waited_for_either(no_network, monkeypatch, tmp_path):
    from huggingface_hub import constants

    from leanstep.recipes.data.tokens import open_tokenizer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(ValueError, match="could not open the hub's 'gpt2'"):
        open_tokenizer("gpt2")
    assert len(no_network) == 1
    no_network.clear()


def test_the_time_is_that_of_the_products_of_matrices(run, monkeypatch):
    monkeypatch.setattr(check_module, "Timer", (timer := Mock()))
    timer().blocked_autorange.return_value = Mock(times=[3e-3, 1e-3, 2e-3], median=2e-3)
    model, rows = meta_model(run(), 300), run().batch.micro_batch_size * run().data.seq_len
    work, fastest = flops_per_token(model, 32) * 128 * 600, 2 * rows * model.config.hidden_size**2 / 1e-3
    for processes in (1, 2):  # which share a CPU
        lines = section(run("steps=600", "device=cpu"), "Time", world_size=processes).lines
        assert lines[0].split()[:3] == ["at", "least", format_duration(work / fastest)] and lines[-1].startswith("note")


def test_another_optimizer_is_one_change_and_goes_by_another_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(load("llama-nano-sinkgd"), 4)
    (problem,) = output(load("llama-nano-sinkgd", ["optimizer.name=lion"])).problems
    assert problem.startswith("1 key of the recipe changed") and "optimizer.args" not in problem
    assert "optimizer.name: was 'sinkgd', is 'lion' now" in problem and "elsewhere with name=ANOTHER_NAME" in problem
    assert "name=" not in output(load("llama-nano-sinkgd", ["steps=7", "out=runs/llama-nano-sinkgd/"])).problems[0]


def test_problems_begin_the_report_and_decide_the_exit_code(run, capsys):
    with ProgressBar() as bar:
        assert check(run("log.trackers=[wandbb]", "optimizer.groups=[{match: zzz, lr: 1}]"), progress=bar) == 1
    out, shown = capsys.readouterr()
    assert "checking the recipe: 0/13 sections\n" in shown
    assert out.startswith("llama-nano-adamw: 2 problems\n") and out.index("\nOutput\n") < out.index("\nRecipe\n")
    listed = out[: out.index("\nDevice\n")]
    assert "- device: log.trackers: 'wandbb'" in listed and "- parameter groups: " in listed
    assert "ready" not in out


FINE_TUNING = [name for name in recipe_names() if load(name).model.init_from]


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in FINE_TUNING])
def test_every_shipped_recipe_can_be_built_and_estimated_offline(name):
    # one sequence at a time: what is checked is that model and optimizer can be built and stepped
    config = load(name, [f"batch.tokens_per_step={load(name).data.seq_len}", "batch.micro_batch_size=1"])
    made = Check(config, vocabulary=config.model.config.get("vocab_size", 2048))
    groups, memory = Section("groups"), Section("memory")
    made.groups(groups)
    assert len(groups.lines) > 2
    if describe(config).parameters < 100e6:  # the larger ones differ in size only
        made.memory(memory)
        assert made.estimate.weights > 1_000_000


def test_a_state_that_does_not_fit_is_what_the_advice_begins_with(run, monkeypatch):
    monkeypatch.setattr(check_module, "free_memory", lambda device: 2_000_000_000)
    args = "optimizer.args={window: 20000, damping: 1e-4}"
    (told,) = section(run(args, name="gpt-nano-mfac"), "Memory").problems
    assert (
        "in this order: optimizer.args.storage=bf16 (the window at half the size), optimizer.args.compression" in told
    )
    monkeypatch.setattr(check_module, "free_memory", lambda device: 2_000_000)
    (told,) = section(run(), "Memory").problems
    assert "optimizer.name=lion or sinkgd" in told


def test_a_base_in_a_folder_that_is_not_there_is_said_to_be_so(monkeypatch, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, " * 400)
    monkeypatch.chdir(tmp_path)
    assert check(load("llama-nano-lora", [f"data.path={text}"])) == 1
    out = capsys.readouterr().out
    assert "model.init_from: the folder 'runs/llama-nano-sinkgd/final' does not exist; `leanstep recipes show" in out
    assert "data.tokenizer: the folder 'runs/llama-nano-sinkgd/final' does not exist" in out
    assert "Repo id" not in out
