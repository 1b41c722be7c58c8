"""``leanstep prune --recover``: the pruned folder first, then the recovered one in its place, and nothing lost."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from forked import finish_code
from pruned_models import make_llama, save_model, snapshot
from safetensors import safe_open
from texts import sentences
from transformers import AutoModelForCausalLM

from leanstep import _files
from leanstep.cli import main
from leanstep.pruning import CalibrationText, Recovery, find_targets, prune_checkpoint, recover_checkpoint
from leanstep.pruning.folder import recovery as folder_recovery
from leanstep.pruning.folder.checkpoint import stored_hash
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.measure.products import products_of
from leanstep.pruning.training import recovery, recovery_file
from leanstep.sparsity import verify

SMALL = [
    "--samples",
    "12",
    "--batch-size",
    "4",
    "--held-out",
    "4",
    "--seq-len",
    "24",
    "--sparsity",
    "0.6",
    "--allocation",
    "uniform",
]
RECOVER = ["--recover", "6", "--recover-lr", "1e-2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(make_llama(2), folder / "model", max_shard_size="12KB")
    (folder / "text.txt").write_text(sentences(60))
    return folder


def arguments(base, out, *more):
    return ["prune", str(base / "model"), "--out", str(out), "--data", str(base / "text.txt"), *SMALL, *more]


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    assert main(arguments(base, out, "--eval")) == 0
    return out


@pytest.fixture(scope="module")
def recovered(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("recovered") / "out"
    assert main(arguments(base, out, "--eval", *RECOVER)) == 0
    return out


def tensors(folder):
    values = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            values |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return values


def content_of(folder):
    return json.loads((folder / "sparsity.json").read_text())


def test_the_folder_has_the_zeros_of_the_pruned_one_and_says_what_recovery_did(base, pruned, recovered):
    before, after = tensors(pruned), tensors(recovered)
    assert {path.name for path in recovered.parent.iterdir()} == {"out"}
    assert set(snapshot(recovered)) == set(snapshot(pruned))
    targets = {target.name for target in find_targets(AutoModelForCausalLM.from_pretrained(recovered))}
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor == 0, after[name] == 0), name
        assert torch.equal(tensor, after[name]) != (name in targets), name
    content = content_of(recovered)
    recovery = content["recovery"]
    assert recovery["applied"] and recovery["metric"] == "kl" and len(recovery["losses"]) == 6
    assert recovery["settings"] == {
        "steps": 6, "lr": 1e-2, "rank": None, "batch_size": 4, "distill": True, "seed": 0,
    }  # fmt: skip
    assert recovery["after"]["mean"] < recovery["before"]["mean"]
    # the same sequences and the same metric as of the comparison of allocations
    assert recovery["before"]["mean"] == pytest.approx(content["held_out"]["joint"], rel=1e-5)
    perplexity = content["perplexity"]
    assert perplexity["after"] == content_of(pruned)["perplexity"]["after"] != perplexity["recovered"] > 1
    assert content["tensors"] == content_of(pruned)["tensors"]
    assert verify(recovered).tensors
    page = (recovered / "report.html").read_text()
    for text in ("Perplexity recovered", "<h2>Recovery</h2>", "Training loss of recovery"):
        assert text in page and text not in (pruned / "report.html").read_text()


def test_recovery_on_other_text_compares_perplexities_of_that_text_alone(base, pruned, tmp_path):
    out = shutil.copytree(pruned, tmp_path / "out")
    (tmp_path / "other.txt").write_text(sentences(60)[::-1])
    command = arguments(base, out, "--eval", *RECOVER, "--resume")
    command[command.index(str(base / "text.txt"))] = str(tmp_path / "other.txt")
    assert main(command) == 0
    before, after = content_of(pruned), content_of(out)
    assert set(after["perplexity"]) == {"after", "after_stderr", "recovered", "recovered_stderr", "tokens"}
    assert after["perplexity"]["after"] != before["perplexity"]["after"]
    assert after["held_out_data"] != before["held_out_data"]
    assert any("not on those of pruning" in note for note in after["notes"])


def test_adapters_are_merged_and_next_tokens_need_no_teacher(base, pruned, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folder_recovery, "free_memory", lambda device: 10)
    assert main(arguments(base, tmp_path / "out", *RECOVER, "--recover-rank", "2", "--json")) == 0
    printed = json.loads(capsys.readouterr().out)["recovery"]
    assert printed == content_of(tmp_path / "out")["recovery"]
    assert printed["settings"]["rank"] == 2 and printed["settings"]["distill"] is False
    assert printed["metric"] == "cross_entropy"
    assert any("learnt the next tokens" in note for note in printed["notes"])
    before, after = tensors(pruned), tensors(tmp_path / "out")
    assert all(torch.equal(tensor == 0, after[name] == 0) for name, tensor in before.items())
    assert list(after) == list(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype, base, tmp_path):
    save_model(make_llama(2).to(dtype), tmp_path / "model")
    text = CalibrationText((sentences(60),), samples=12, curve_samples=3, held_out=4, seq_len=24)
    prune_checkpoint(
        tmp_path / "model",
        tmp_path / "out",
        text,
        sparsity=0.6,
        allocation="uniform",
        recovery=Recovery(6, lr=1e-2, batch_size=4),
    )
    assert content_of(tmp_path / "out")["recovery"]["applied"]
    dense, after = tensors(tmp_path / "model"), tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    rows = content_of(tmp_path / "out")["tensors"]
    assert all(float((after[name] == 0).double().mean()) >= row["sparsity"] > 0.5 for name, row in rows.items())
    assert set(dense) == set(after)


def test_the_perplexity_after_recovery_has_the_products_of_those_before(base, tmp_path, monkeypatch):
    dtypes, measure = [], folder_recovery.perplexity_of
    monkeypatch.setattr(
        folder_recovery, "perplexity_of", lambda of, *more: dtypes.append(products_of(of)) or measure(of, *more)
    )
    assert main(arguments(base, tmp_path / "out", "--eval", "--products", "bf16", *RECOVER)) == 0
    assert dtypes == ["bf16"] and content_of(tmp_path / "out")["settings"]["products"] == "bf16"


KILLED = """
import os, signal, sys
from leanstep import pruning
from leanstep.cli import main
from leanstep.pruning.training import recovery
step, count = recovery._step, []
def dying(*given):
    count.append(1)
    if len(count) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*given)
recovery._step = dying
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_in_recovery_leaves_the_pruned_folder_and_goes_on(base, pruned, recovered, tmp_path, capsys):
    out = tmp_path / "out"
    assert finish_code(KILLED, *arguments(base, out, "--eval", *RECOVER)).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}
    assert snapshot(out) == snapshot(pruned)
    assert main(arguments(base, out, "--eval", *RECOVER)) == 2
    assert "exists already" in capsys.readouterr().err
    assert snapshot(out) == snapshot(pruned)
    assert main(arguments(base, out, "--eval", *RECOVER, "--resume")) == 0
    assert "recovery       6 steps, applied; held out, KL" in capsys.readouterr().out
    again = tensors(out)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors(recovered).items())
    assert content_of(out)["recovery"] == content_of(recovered)["recovery"]
    assert main(arguments(base, out, "--eval", *RECOVER, "--resume")) == 2
    assert "was recovered before" in capsys.readouterr().err


KILLED_WITH_A_STATE = """
import sys
from leanstep.pruning.training import recovery_file
recovery_file._SECONDS = recovery_file._SHARE = 0
""" + KILLED.replace("== 4", "== 5")


@pytest.mark.slow
def test_a_killed_recovery_goes_on_from_its_last_state(base, recovered, tmp_path, capsys, monkeypatch):
    out, state = tmp_path / "out", tmp_path / "out.recovery.pt"
    assert finish_code(KILLED_WITH_A_STATE, *arguments(base, out, "--eval", *RECOVER)).returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.recovery.pt", ".out.lock"}
    before = snapshot(out)
    assert main(arguments(base, out, "--eval", "--recover", "7", "--recover-lr", "1e-2", "--resume")) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert "out.recovery.pt was measured under other circumstances" in error
    assert snapshot(out) == before and state.exists()
    step, taken = recovery._step, []
    monkeypatch.setattr(recovery, "_step", lambda *given: taken.append(step(*given)) or taken[-1])
    # now too little for the dense model, which the interrupted run has decided on
    monkeypatch.setattr(folder_recovery, "free_memory", lambda device: 1)
    assert main(arguments(base, out, "--eval", *RECOVER, "--resume")) == 0
    # killed in its fifth step, after the state of the fourth
    assert len(taken) == 2 and content_of(out)["recovery"] == content_of(recovered)["recovery"]
    again = tensors(out)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors(recovered).items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_state_stays_until_the_recovered_folder_has_its_name(base, recovered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recovery_file, "_SECONDS", 0.0)
    out, state = tmp_path / "out", tmp_path / "out.recovery.pt"
    publish = _files.publish_folder

    def full(staged, target):
        if target.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(staged, target)

    monkeypatch.setattr(_files, "publish_folder", full)
    assert main(arguments(base, out, "--eval", *RECOVER)) == 1
    assert "the disk is full. It is what it was" in capsys.readouterr().err and state.exists()
    stored = state.read_bytes()
    monkeypatch.setattr(_files, "publish_folder", publish)
    assert main(arguments(base, out, "--eval", *RECOVER, "--resume")) == 0
    assert content_of(out)["recovery"] == content_of(recovered)["recovery"] and not state.exists()
    # as if a kill had come before the state was removed
    state.write_bytes(stored)
    assert main(arguments(base, out, "--eval", *RECOVER, "--resume")) == 2
    assert "was recovered before" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_a_killed_run_left_beside_its_folder_go(base, pruned, tmp_path):
    out = copied(pruned, tmp_path / "out")
    for name in ("out.curves.jsonl", "out.refine.json"):
        (tmp_path / name).write_text("{}")
    assert main(arguments(base, out, *RECOVER, "--resume")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def copied(folder, out):
    return shutil.copytree(folder, out)


def test_a_recovery_that_was_not_applied_can_be_tried_again(base, pruned, tmp_path, capsys):
    out = copied(pruned, tmp_path / "out")
    assert main(arguments(base, out, "--eval", "--recover", "3", "--recover-lr", "5", "--resume")) == 0
    assert "not applied" in capsys.readouterr().out
    assert not content_of(out)["recovery"]["applied"] and "recovered" in content_of(out)["perplexity"]
    before, after = tensors(pruned), tensors(out)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert main(arguments(base, out, *RECOVER, "--resume")) == 0
    assert content_of(out)["recovery"]["applied"]
    assert content_of(out)["perplexity"] == content_of(pruned)["perplexity"]


@pytest.mark.parametrize(
    ("option", "written", "asked"),
    [
        ("--sparsity", "0.6", "0.7"),
        ("--score", "wanda", "magnitude"),
        ("--inputs", "pruned", "dense"),
        ("--allocation", "uniform", "erk"),
        ("--granularity", "matrix", "block"),
        ("--exclude", "left out", "*.0.*"),
        ("--include", "left out", "*.mlp.*"),
        ("--budget", "params", "flops"),
        ("--levels", "left out", "0.5,0.7"),
        ("--curves", "left out", "fisher"),
        ("--correction", "none", "relinearise"),
        ("--metric", "left out", "mse_logits"),
        ("--seed", "0", "7"),
        ("--samples", "12", "13"),
        ("--held-out", "4", "5"),
        ("--refine", "left out", "given"),
    ],
)
def test_other_settings_of_pruning_are_refused_with_resume(option, written, asked, base, pruned, tmp_path, capsys):
    out = copied(pruned, tmp_path / "out")
    assert main(arguments(base, out, *RECOVER, "--resume", option, asked.replace("given", "2"))) == 2
    error = capsys.readouterr().err
    assert f"was pruned with {option} {written}" in error and f"the command has {option} {asked}" in error
    assert snapshot(out) == snapshot(pruned)


def test_a_folder_that_does_not_say_all_its_settings_is_compared_by_those_it_has(base, pruned, tmp_path):
    out = copied(pruned, tmp_path / "out")
    content = content_of(out)
    content["settings"] = {"allocation": "uniform", "granularity": "matrix"}
    (out / "sparsity.json").write_text(json.dumps(content))
    assert main(arguments(base, out, *RECOVER, "--resume", "--held-out", "3")) == 0
    assert content_of(out)["recovery"]["applied"]


@pytest.mark.parametrize("shards", ["12KB", "5GB"])
def test_dense_weights_that_changed_after_pruning_are_refused(shards, base, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "out"
    dense = make_llama(2)
    save_model(dense, model, max_shard_size="12KB")
    text = ["--data", str(base / "text.txt"), *SMALL]
    assert main(["prune", str(model), "--out", str(out), *text]) == 0
    before = snapshot(out)
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_model(make_llama(2, seed=1), model, max_shard_size=shards)
    command = ["prune", str(model), "--out", str(out), *text, *RECOVER]
    capsys.readouterr()  # bars of transformers
    for more in ([], ["--no-distill"]):
        assert main([*command, *more, "--resume"]) == 2
        (error,) = capsys.readouterr().err.splitlines()[-1:]
        assert f"the weights in {model} changed since {out} was pruned from them" in error
    given = CalibrationText((sentences(60),), samples=12, curve_samples=3, held_out=4, seq_len=24)
    with pytest.raises(ValueError, match=r"Put the former weights back, or prune into another folder"):
        recover_checkpoint(model, out, given, Recovery(2))
    assert snapshot(out) == before
    # the same weights, in other files
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_model(dense, model, max_shard_size=shards)
    assert main([*command, "--resume"]) == 0
    assert content_of(out)["recovery"]["applied"]


def test_a_configuration_that_changed_after_pruning_is_refused(base, pruned, tmp_path, capsys):
    model, out = copied(base / "model", tmp_path / "model"), copied(pruned, tmp_path / "out")
    content = content_of(out) | {"source": str(model)}
    (out / "sparsity.json").write_text(json.dumps(content))
    config, before = json.loads((model / "config.json").read_text()), snapshot(out)
    changed = config | {"rms_norm_eps": 0.25, "transformers_version": "5.99.0", "extra": [1]}
    (model / "config.json").write_text(json.dumps(changed))
    command = ["prune", str(model), "--out", str(out), "--data", str(base / "text.txt"), *SMALL, *RECOVER, "--resume"]
    assert main(command) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"config.json in {model} differs in extra, rms_norm_eps from that of" in error
    assert snapshot(out) == before
    (model / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}))
    assert main(command) == 0
    assert content_of(out)["recovery"]["applied"]


def test_a_folder_that_does_not_name_the_dense_weights_is_recovered(base, pruned, tmp_path):
    out = copied(pruned, tmp_path / "out")
    content = content_of(out)
    del content["source_weights"]
    (out / "sparsity.json").write_text(json.dumps(content))
    assert main(arguments(base, out, *RECOVER, "--resume")) == 0
    assert content_of(out)["recovery"]["applied"]


def test_the_hash_of_dense_weights_is_that_of_all_kinds_of_files(tmp_path):
    model = make_llama(2)
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "shards", max_shard_size="12KB")
    (tmp_path / "bin").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "bin" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert len({stored_hash(open_checkpoint(tmp_path / name)) for name in ("whole", "shards", "bin")}) == 1
    save_model(make_llama(2, seed=1), tmp_path / "other")
    assert stored_hash(open_checkpoint(tmp_path / "other")) != stored_hash(open_checkpoint(tmp_path / "whole"))


def test_a_folder_below_the_home_is_found_again(base, pruned, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    copied(pruned, tmp_path / "out")
    assert main(arguments(base, "~/out", *RECOVER, "--resume")) == 0
    assert content_of(tmp_path / "out")["recovery"]["applied"]


def test_a_run_killed_while_it_replaces_the_folder_loses_neither(base, pruned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    replace = os.replace

    def dying(old, new):
        if str(new) == str(out.absolute()):
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(_files.os, "replace", dying)
        assert main(arguments(base, out, *RECOVER, "--resume")) == 130
    assert [path.name for path in tmp_path.iterdir()] == [".replaced-out"]
    assert main(arguments(base, out, *RECOVER, "--resume")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content_of(out)["recovery"]["applied"]


def test_a_disk_that_fills_leaves_the_pruned_folder(base, pruned, tmp_path, monkeypatch, capsys):
    from leanstep.pruning.folder import checkpoint

    copy, calls = checkpoint.shutil.copyfile, []

    def full(*given, **options):
        calls.append(given)
        if ".writing-" in str(given[1]) and (tmp_path / "out").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(*given, **options)

    monkeypatch.setattr(checkpoint.shutil, "copyfile", full)
    assert main(arguments(base, tmp_path / "out", "--eval", *RECOVER)) == 1
    error = capsys.readouterr().err
    assert "the disk is full. It is what it was" in error and "with --resume goes on with out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(tmp_path / "out") == snapshot(pruned)


REFUSED = {
    "steps": (["--recover", "0"], "recovery takes positive steps"),
    "rate without steps": (["--recover-lr", "1e-3"], "--recover-lr goes with --recover STEPS"),
    "rank without steps": (["--recover-rank", "4"], "--recover-rank goes with --recover STEPS"),
    "distillation without steps": (["--no-distill"], "go with --recover STEPS"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_written(case, base, tmp_path, capsys):
    more, message = REFUSED[case]
    assert main(arguments(base, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_data_there_is_nothing_to_train_on(base, tmp_path, capsys):
    command = ["prune", str(base / "model"), "--out", str(tmp_path / "out"), "--sparsity", "0.5", "--recover", "3"]
    assert main([*command, "--score", "magnitude", "--allocation", "uniform"]) == 2
    assert "--recover trains on --data" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_with_room_for_one_folder_only_is_refused_at_the_start(base, tmp_path, monkeypatch, capsys):
    from leanstep._checkpoint import files

    size = sum(path.stat().st_size for path in (base / "model").glob("*.safetensors"))
    monkeypatch.setattr(files, "free_bytes", lambda path: int(1.5 * size))
    assert main(arguments(base, tmp_path / "out", *RECOVER)) == 2
    assert "make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_the_pruned_one_is_refused(base, pruned, tmp_path):
    text = CalibrationText((sentences(60),), samples=12, curve_samples=3, held_out=4, seq_len=24)
    with pytest.raises(ValueError, match=r"is no folder of leanstep prune: its sparsity\.json cannot be read"):
        recover_checkpoint(base / "model", base / "model", text, Recovery(2))
    with pytest.raises(ValueError, match="was pruned from .*, not from elsewhere"):
        recover_checkpoint("elsewhere", pruned, text, Recovery(2))
    out = shutil.copytree(pruned, tmp_path / "out")
    content = content_of(out)
    content["layers"][3]["nonzero"] -= 1
    (out / "sparsity.json").write_text(json.dumps(content))
    before = snapshot(out)
    with pytest.raises(ValueError, match="changed since it was pruned"):
        recover_checkpoint(str(base / "model"), out, text, Recovery(2))
    assert snapshot(out) == before
