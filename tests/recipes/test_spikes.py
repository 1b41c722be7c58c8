"""Poisoned text makes the loss spike: a run stops, leaves out the step, or returns to its last checkpoint."""

import json
import random
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import texts
import torch
from faults import die_around_the_rollback, fp16_on_cpu, fsdp2_on_cpu, record_windows, save_weights
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training import numbers, read_log, run, status, write_recipe, write_text

from leanstep.recipes.config.loader import ConfigError, load
from leanstep.recipes.config.schema import DataConfig, StopConfig
from leanstep.recipes.data.sequences import load_data, shuffled
from leanstep.recipes.methods.sparse import schedule_of
from leanstep.recipes.methods.spikes import SpikeDetector, spike_threshold
from leanstep.recipes.report.runlog import read_run
from leanstep.recipes.training.checkpoint import SpikeRecord, TrainState, write_state
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.run import Run
from leanstep.recipes.training.step import StepResult
from leanstep.sparsity import NM
from leanstep.sparsity.verify import PATTERNS_FILE

DOCUMENTS, A_STEP = 8 * 30, 8
# windows of data, counted from 0: steps 16 and 17 of a run that nothing disturbs
POISONED = (15, 16)
MODEL = "n_embd: 32, n_layer: 1, n_head: 2, n_positions: 32, resid_pdrop: 0.1, attn_pdrop: 0.1, embd_pdrop: 0.1"
SPIKES = "spike_window: 5, spike_threshold: 3.5"


def garbage(chance: random.Random) -> str:
    return "".join(chance.choice("qzxjkv#%&@") for _ in range(60))


def sentence(chance: random.Random, words: list[str]) -> str:
    return " ".join(chance.choices(words, k=24))


def settings(*more: str) -> list[str]:
    return [
        "steps=20",
        f"model.config={{{MODEL}}}",
        # the rate tells the step of the schedule, and a longer run has the same rates
        "schedule={name: constant, warmup_steps: 18}",
        "optimizer.lr=1e-2",
        "checkpoint={every: 7, keep_last: 9}",
        "eval.every=0",
        *more,
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Documents in random order, of which two windows read nothing but garbage."""
    folder = tmp_path_factory.mktemp("spikes")
    order = shuffled(DOCUMENTS, 0, 0).tolist()
    poisoned = {index for window in POISONED for index in order[window * A_STEP : (window + 1) * A_STEP]}
    words = write_text(folder / "words.txt", 4000).read_text().split()
    chance = random.Random(0)
    lines = []
    for index in range(DOCUMENTS):
        text = garbage(chance) if index in poisoned else sentence(chance, words)
        lines.append(json.dumps({"text": text}))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    file = write_recipe(folder)
    line = f'data: {{source: json, path: {folder / "text.jsonl"}, tokenizer: "train:300", seq_len: 32, '
    line += "val_tokens: 0, packing: false}"
    kept = [line if old.startswith("data:") else old for old in file.read_text().splitlines()]
    file.write_text("\n".join(kept) + "\n")
    return file


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    training = run(recipe, settings("steps=23"), out, prepare=partial(record_windows, out.parent / "windows"))
    assert training.codes == [0], training.text()
    return out


def windows(path: Path) -> list[str]:
    return path.read_text().splitlines()


def losses(out: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in read_log(out) if entry["kind"] == "train"}


def events(out: Path) -> list[tuple]:
    keys = ("action", "spike_step", "step")
    return [tuple(entry[key] for key in keys) for entry in read_log(out) if entry["kind"] == "spike"]


def test_nothing_changes_by_default(undisturbed):
    assert len(losses(undisturbed)) == 23 and events(undisturbed) == []
    assert losses(undisturbed)[16] > losses(undisturbed)[15] + 1, losses(undisturbed)
    assert "spikes" not in status(undisturbed) and "spikes" not in read_log(undisturbed)[0]


def test_stop_ends_before_the_update_and_skip_continues_the_run(recipe, undisturbed, tmp_path):
    out = tmp_path / "run"
    failed = run(recipe, settings(f"stop={{on_spike: stop, {SPIKES}}}"), out)
    assert failed.codes == [3], failed.text()
    assert status(out)["status"] == "failed:spike" and status(out)["step"] == 15
    text = failed.text()
    assert "step 16: loss " in text and " is a spike, above " in text and "weights were not updated" in text
    assert "last good checkpoint" in text and "step-000014" in text and "stop.on_spike=skip" in text
    assert json.loads((out / "nan_dump" / "report.json").read_text())["sequences"] == [120, 127]
    assert events(out) == [("stop", 16, 16)]

    # the same command with another action
    again = run(recipe, settings(f"stop={{on_spike: skip, {SPIKES}}}", "checkpoint={every: 1, keep_last: 9}"), out)
    assert again.codes == [0], again.text()
    assert "step 16: loss " in again.text() and "; step skipped\n" in again.text()
    assert events(out) == [("skip", 16, 16), ("skip", 17, 17)]
    assert "spikes      2 steps skipped, 0 rollbacks (steps 16, 17)" in again.text()
    assert {step: losses(out)[step] for step in range(1, 17)} == {
        step: losses(undisturbed)[step] for step in range(1, 17)
    }
    rates = {entry["step"]: (entry["lr"], entry["spikes"]) for entry in read_log(out) if entry["kind"] == "train"}
    assert [spikes for _, spikes in rates.values()] == [0] * 15 + [1] + [2] * 4
    assert [rate for rate, _ in rates.values()] == pytest.approx([1e-2 * min(step, 19) / 19 for step in range(1, 21)])
    report = (out / "report.html").read_text()
    assert "Loss spikes" in report and "2 skipped, 0 rolled back" in report
    assert read_run(out).spikes() == (2, 0, [16, 17])


def test_skip_leaves_weights_and_optimizer_as_they_were(recipe, tmp_path):
    """No checkpoint to roll back to: the step is skipped. The next spike is beyond the limit."""
    out = tmp_path / "run"
    options = settings(f"stop={{on_spike: rollback, spike_limit: 1, {SPIKES}}}", "checkpoint={every: 18}")
    failed = run(recipe, options, out, prepare=partial(save_weights, out))
    assert failed.codes == [3], failed.text()
    text = failed.text()
    assert "step skipped, because there is no checkpoint yet to roll back to" in text
    assert "step 17: loss" in text and "after 1 skipped step in a row (stop.spike_limit)" in text
    assert "last good checkpoint: none yet" in text and "stop.spike_limit=2" in text
    assert events(out) == [("skip", 16, 16), ("stop", 17, 17)]
    before, after, other = (torch.load(out / f"{step}.pt") for step in (15, 16, 14))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(before[name], other[name]) for name in before)


@pytest.fixture(scope="module")
def rolled_back(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("rolled-back") / "run"
    options = settings(f"stop={{on_spike: rollback, {SPIKES}}}")
    training = run(recipe, options, out, prepare=partial(record_windows, out.parent / "windows"))
    assert training.codes == [0], training.text()
    return out


def test_rollback_reads_on_after_the_spike(undisturbed, rolled_back):
    """Step 16 spikes and the run returns to step 14. Then step 15 reads the second poisoned window and spikes too."""
    read = windows(rolled_back.parent / "windows.0")
    assert read == windows(undisturbed.parent / "windows.0"), "no window twice, none left out of the reading"
    assert len(read) == 20 + 2 + 1
    assert events(rolled_back) == [("rollback", 16, 14), ("rollback", 15, 14)]
    assert list(losses(rolled_back)) == list(range(1, 21))
    assert all(losses(rolled_back)[step] < 4.5 for step in range(15, 21)), losses(rolled_back)
    state = json.loads((rolled_back / "last" / "trainer" / "state.json").read_text())
    assert state["step"] == 20 and state["spikes"]["windows_ahead"] == 3 and state["spikes"]["rollbacks"] == 2
    console = (rolled_back.parent / "run.console").read_text()
    assert "step 16: loss " in console and "rolled back to step 14" in console
    assert "(2 steps of data left out), rollback 1 of at most 10" in console
    assert "(1 step of data left out), rollback 2 of at most 10" in console
    assert "spikes      0 steps skipped, 2 rollbacks (steps 16, 15)" in console
    assert read_run(rolled_back).spikes() == (0, 2, [16, 15])


def test_rollback_restores_everything_of_the_checkpoint(recipe, undisturbed, rolled_back, tmp_path):
    """A new process that starts from the undisturbed checkpoint, with the data moved on, makes the same steps."""
    checkpoint = moved_on(undisturbed / "checkpoints" / "step-000014", 3, tmp_path)
    training = run(recipe, settings(f"checkpoint.resume={checkpoint}"), tmp_path / "run")
    assert training.codes == [0], training.text()
    steps = [entry for entry in numbers(rolled_back) if entry[1] > 14 and entry[0] == "train"]
    assert [entry for entry in numbers(tmp_path / "run") if entry[0] == "train"] == steps and len(steps) == 6
    assert_same_weights(tmp_path / "run", rolled_back)


@pytest.mark.slow
def test_a_rollback_to_a_checkpoint_of_fewer_processes(recipe, tmp_path):
    stop, back = (settings(f"stop={{on_spike: {action}, {SPIKES}}}") for action in ("stop", "rollback"))
    assert run(recipe, stop, tmp_path / "run").codes == [3]
    rolled = run(recipe, [*back, "batch.micro_batch_size=2"], tmp_path / "run", world=2)
    assert rolled.codes == [0, 0], rolled.text()
    assert "2 processes go on where 1 stopped" in rolled.text() and ("rollback", 16, 14) in events(tmp_path / "run")


LLAMA = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
DECAY = 'sparsity={patterns: {"*.mlp.*": "1:4"}, method: mdgf-linear, finetune: 0.2}'
# name -> settings, processes, what runs in each before it trains
VARIANTS = {
    "fp16": ([], 1, fp16_on_cpu),
    "sparse": ([f"model={{family: llama, config: {{{LLAMA}}}}}", DECAY], 1, None),
    "fsdp2": (["batch.micro_batch_size=2", "distributed.strategy=fsdp2"], 2, fsdp2_on_cpu),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_rolled_back_is_one_that_never_read_the_spike(recipe, tmp_path, variant):
    more, world, prepare = VARIANTS[variant]
    stop, back = (settings(f"stop={{on_spike: {action}, {SPIKES}}}", *more) for action in ("stop", "rollback"))
    stopped = run(recipe, stop, tmp_path / "stopped", world=world, prepare=prepare)
    assert stopped.codes == [3] * world, stopped.text()
    rolled = run(recipe, back, tmp_path / "rolled", world=world, prepare=prepare)
    assert rolled.codes == [0] * world, rolled.text()
    returns = events(tmp_path / "rolled")
    assert returns and returns[0] == ("rollback", 16, 14)
    assert {(action, step) for action, _, step in returns} == {("rollback", 14)}

    # the checkpoint from before the spike, with the data after it next
    left_out = sum(spike_step - step for _, spike_step, step in returns)
    checkpoint = moved_on(tmp_path / "stopped" / "checkpoints" / "step-000014", left_out, tmp_path)
    straight = run(
        recipe, [*back, f"checkpoint.resume={checkpoint}"], tmp_path / "straight", world=world, prepare=prepare
    )
    assert straight.codes == [0] * world and not events(tmp_path / "straight"), straight.text()
    steps = [entry for entry in numbers(tmp_path / "rolled") if entry[1] > 14 and entry[0] == "train"]
    assert [entry for entry in numbers(tmp_path / "straight") if entry[0] == "train"] == steps and len(steps) == 6
    assert_same_weights(tmp_path / "straight", tmp_path / "rolled")
    states = [trainer_state(tmp_path / name / "last" / "trainer") for name in ("straight", "rolled")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def trainer_state(trainer: Path) -> dict[str, torch.Tensor]:
    """Optimizer, scaler and sparse state of a checkpoint, which may be in shards."""
    state: dict[str, torch.Tensor] = {}
    for file in trainer.glob("*.safetensors"):
        state |= load_file(file)
    for name in ("optimizer.bin", "scaler.pt"):
        if (trainer / name).exists():
            leaves = torch.utils._pytree.tree_leaves_with_path(torch.load(trainer / name, weights_only=True))
            numbers_in = [(path, value) for path, value in leaves if isinstance(value, (torch.Tensor, int, float))]
            state |= {f"{name}{path}": torch.as_tensor(value) for path, value in numbers_in}
    return state


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_skipped_step_changes_no_weight(recipe, tmp_path, variant):
    more, world, prepare = VARIANTS[variant]
    skip = [f"stop={{on_spike: skip, {SPIKES}}}", "checkpoint={every: 1, keep_last: 9}"]
    out = tmp_path / "run"
    skipped = run(recipe, settings(*skip, *more), out, world=world, prepare=prepare)
    assert skipped.codes == [0] * world and "step 16: loss" in skipped.text(), skipped.text()
    checkpoints = [out / "checkpoints" / f"step-{step:06d}" for step in (14, 15, 16)]
    weights = [load_file(path / "hf" / "model.safetensors") for path in checkpoints]
    if variant == "sparse":
        # hf/ has the masked weights, whose decay goes on
        weights = [load_file(path / "trainer" / "sparsity.safetensors") for path in checkpoints]
    names = [name for name, tensor in weights[0].items() if tensor.is_floating_point() and tensor.numel() > 1]
    assert names and all(torch.equal(weights[1][name], weights[2][name]) for name in names)
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_the_decay_of_pruned_weights_follows_the_steps_of_the_run(recipe, tmp_path, action):
    more, *_ = VARIANTS["sparse"]
    options = settings(f"stop={{on_spike: {action}, {SPIKES}}}", *more)
    training = run(recipe, options, tmp_path / "run")
    assert training.codes == [0] and events(tmp_path / "run")[0][0] == action, training.text()
    schedule = schedule_of(load(str(recipe), options))
    train = [entry for entry in read_log(tmp_path / "run") if entry["kind"] == "train"]
    alphas = [entry["sparsity"]["alpha/1:4"] for entry in train]
    assert alphas == [schedule.at(step, NM(1, 4)).alpha for step in range(1, 21)] and alphas[-1] == 0.0
    assert (tmp_path / "run" / "final" / PATTERNS_FILE).exists()


@pytest.mark.slow
def test_kill_9_before_a_rollback_is_saved_repeats_it(recipe, rolled_back, tmp_path):
    out = tmp_path / "run"
    options = settings(f"stop={{on_spike: rollback, {SPIKES}}}")
    assert run(recipe, options, out, prepare=partial(die_around_the_rollback, "before")).codes == [-9]
    again = run(recipe, options, out)
    assert again.codes == [0] and "resuming from" in again.text(), again.text()
    assert numbers(out) == numbers(rolled_back)
    assert_same_weights(out, rolled_back)


@pytest.mark.slow
def test_two_processes_roll_back_a_stream_and_survive_kill_9(tmp_path):
    """Each process reads the rows of a shard in blocks of 16, or 4 steps. The fifth block is garbage."""
    chance = random.Random(1)
    words = write_text(tmp_path / "words.txt", 4000).read_text().split()
    rows = [garbage(chance) if 64 <= row // 4 < 80 else sentence(chance, words) for row in range(4 * 96)]
    c4 = texts.write_c4(tmp_path / "en", rows, 4)
    recipe = write_recipe(tmp_path)
    options = settings(
        f"data={{source: local_c4, path: {c4}, streaming: true, packing: false, tokenizer: 'train:300', seq_len: 32, "
        f"val_tokens: 0, cache_dir: {tmp_path / 'cache'}}}",
        "batch.micro_batch_size=2",
        f"stop={{on_spike: rollback, {SPIKES}}}",
    )
    prepare = partial(record_windows, tmp_path / "windows", texts.small_blocks)
    whole = run(recipe, options, tmp_path / "whole", world=2, prepare=prepare)
    assert whole.codes == [0, 0], whole.text()
    returns = [event for event in events(tmp_path / "whole") if event[0] == "rollback"]
    assert returns == [("rollback", 17, 14), *[("rollback", 15, 14)] * 3], losses(tmp_path / "whole")
    left_out = 3 + 1 + 1 + 1
    data = load(str(recipe), options).data
    for rank in (0, 1):
        stream = streamed(data, rank)
        read = windows(tmp_path / f"windows.{rank}")
        assert len(read) == 20 + left_out and read == [json.dumps(next(stream)) for _ in read]

    out = tmp_path / "killed"
    prepare = partial(die_around_the_rollback, "after", texts.small_blocks)
    assert run(recipe, options, out, world=2, prepare=prepare).codes == [-9, -9]
    again = run(recipe, options, out, world=2, prepare=texts.small_blocks)
    assert again.codes == [0, 0] and "resuming from" in again.text(), again.text()
    assert numbers(out) == numbers(tmp_path / "whole") and events(out) == events(tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


def moved_on(checkpoint: Path, windows: int, folder: Path) -> Path:
    """A copy of a checkpoint in ``folder`` that continues so many windows of data later."""
    copy = shutil.copytree(checkpoint, folder / checkpoint.name)
    file = copy / "trainer" / "state.json"
    content = json.loads(file.read_text())
    content["spikes"]["windows_ahead"] = windows
    file.write_text(json.dumps(content))
    list_state(copy)
    return copy


def list_state(checkpoint: Path) -> None:
    """Let the marker of a checkpoint list the ``state.json`` that is there."""
    marker = checkpoint / "COMPLETE"
    content = json.loads(marker.read_text()) if marker.exists() else {"files": {}}
    content["files"]["trainer/state.json"] = {"size": (checkpoint / "trainer" / "state.json").stat().st_size}
    marker.write_text(json.dumps(content))


def streamed(data: DataConfig, rank: int) -> Iterator[list[int]]:
    """The windows of one of two processes, read without a run."""
    stream = load_data(data, seed=0, rank=rank, world_size=2).train
    stream.block_documents = 16
    batches = iter(DataLoader(stream, batch_size=2, drop_last=True))
    while True:
        yield [zlib.crc32(next(batches)["input_ids"].numpy().tobytes()) for _ in range(2)]


def assert_same_weights(one: Path, other: Path) -> None:
    weights = [load_file(out / "final" / "model.safetensors") for out in (one, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.fixture
def detector(tmp_path):
    """A detector beside a checkpoint of step 10, at most one rollback to it."""
    checkpoint = tmp_path / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer").mkdir()
    write_state(checkpoint, TrainState(step=10))
    list_state(checkpoint)
    alone = SimpleNamespace(is_main_process=True, num_processes=1)
    logger = SimpleNamespace(main=True, say=print, status=lambda *facts: None)
    stop = StopConfig(on_spike="rollback", spike_limit=1, spike_window=5)
    return SpikeDetector(stop, alone, RunFolder(tmp_path), logger)


def test_rollbacks_without_progress_end_the_run(detector):
    state = TrainState(step=11, spikes=SpikeRecord(losses=[1.0] * 5))
    first = detector.judge(state, StepResult(9.0, 1.0, 100, 0), True)
    assert (first.action, first.step, first.checkpoint.name) == ("rollback", 12, "step-000010")
    detector.restore(first, state)
    assert (state.step, state.spikes.windows_ahead, state.spikes.losses) == (10, 2, [])
    state.spikes.losses = [1.0] * 5
    second = detector.judge(state, StepResult(9.0, 1.0, 100, 0), True)
    assert second.action == "stop" and second.advice == ("go on: stop.spike_limit=2, then the same command",)
    assert second.event == "loss 9.0000 is a spike, above 1.1000, after 1 rollback to step-000010 (stop.spike_limit)"
    # a later checkpoint is progress
    state.spikes.returned_to = 9
    assert detector.judge(state, StepResult(9.0, 1.0, 100, 0), True).action == "rollback"


def test_a_non_finite_step_is_a_spike_from_the_first_step_on(detector):
    spike = detector.judge(TrainState(step=2), StepResult(float("nan"), 1.0, 100, 0), False)
    assert spike.action == "rollback" and spike.event == "loss is nan, a spike" and spike.threshold is None


def test_dropped_gradients_end_the_step_of_a_gradient_scaler():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    run = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler), optimizer=optimizer)
    for value, scale in ((1.0, 8.0), (float("inf"), 4.0), (1.0, 4.0)):
        scaler.scale((weight * value).sum()).backward()
        scaler.unscale_(optimizer)
        Run.drop_gradients(run, unscaled=True)
        assert weight.grad is None and torch.equal(weight.detach(), torch.ones(2)) and scaler.get_scale() == scale


def test_the_threshold():
    stop = StopConfig(spike_window=5, spike_threshold=10.0)
    assert spike_threshold([1.0, 2.0, 3.0, 4.0], stop) is None
    # median 3, median absolute deviation 1
    assert spike_threshold([1.0, 2.0, 3.0, 4.0, 50.0], stop) == 3 + 10 * 1.4826
    assert spike_threshold([2.0] * 5, stop) == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        (["stop.on_spike=rewind"], "stop.on_spike", "'stop', 'skip' or 'rollback'"),
        (["stop.spike_window=4"], "stop.spike_window", "at least 5"),
        (["stop.spike_threshold=0"], "stop.spike_threshold", "greater than 0"),
        (["stop.spike_limit=0"], "stop.spike_limit", "at least 1"),
        (["stop.on_spike=rollback", "checkpoint.every=0"], "stop.on_spike", "checkpoint.every 0 writes one at the end"),
        (["stop.on_spike=skip", "release_gradients=true"], "stop.on_spike", "take on_spike=stop"),
    ],
)
def test_bad_values(recipe, options, key, expected):
    with pytest.raises(ConfigError) as error:
        load(str(recipe), options)
    assert key in str(error.value) and expected in str(error.value)
