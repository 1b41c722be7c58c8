"""``leanstep prune`` and ``prune_checkpoint``: from a folder to a folder, or to an error that leaves nothing behind."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from forked import finish_code
from pruned_models import images, make_llama, make_vit, save_model, snapshot
from texts import sentences
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanstep import _memory
from leanstep._files import exclusive_lock
from leanstep.cli import main
from leanstep.pruning import CalibrationText, Recovery, find_targets, prune_checkpoint, recover_checkpoint
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.text import sequences_of
from leanstep.pruning.result import PruneResult
from leanstep.recipes.report.progress import ProgressBar
from leanstep.recipes.shrink import prune as command
from leanstep.sparsity import verify

SMALL = ["--samples", "6", "--curve-samples", "3", "--held-out", "2", "--seq-len", "24", "--levels", "0.4,0.6,0.8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a checkpoint in shards and a text."""
    folder = tmp_path_factory.mktemp("base")
    save_model(make_llama(2), folder / "model", max_shard_size="12KB")
    (folder / "text.txt").write_text(sentences(60))
    (folder / "short.txt").write_text("Too short.")
    return folder


def leanstep_prune(base, out, *more, data="text.txt"):
    return main(["prune", str(base / "model"), "--out", str(out), "--data", str(base / data), *SMALL, *more])


@pytest.fixture(scope="module")
def pruned(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    before = snapshot(base / "model")
    assert leanstep_prune(base, out, "--sparsity", "0.6", "--eval") == 0
    assert snapshot(base / "model") == before
    return out


def test_a_run_that_is_not_small_begins_with_its_time(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_SMALL", 0)
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6") == 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == "loading torch and transformers" and second.startswith("time about ")


def test_the_folder_opens_everywhere_and_says_what_was_done(base, pruned):
    assert {path.name for path in pruned.iterdir()} == {path.name for path in (base / "model").iterdir()} | {
        "sparsity.json",
        "report.html",
        "README.md",
    }
    content = json.loads((pruned / "sparsity.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(pruned)
    targets = find_targets(model)
    assert content["sparsity"] == pytest.approx(0.6, abs=1e-3)
    for target in targets:
        zeros = float((target.weight == 0).float().mean())
        assert content["tensors"][target.name]["sparsity"] == pytest.approx(zeros)
    assert set(content["tensors"]) == {target.name for target in targets}
    perplexity, card = content["perplexity"], (pruned / "README.md").read_text()
    assert perplexity["before"] > 1 and perplexity["tokens"] == 2 * 23
    text = CalibrationText(((base / "text.txt").read_text(),), samples=6, curve_samples=3, held_out=2, seq_len=24)
    _, held_out, _ = sequences_of(open_checkpoint(pruned), text)
    losses = torch.stack([model(input_ids=one[None], labels=one[None]).loss.detach() for one in held_out])
    assert perplexity["after"] == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert perplexity["after_stderr"] == pytest.approx(float(losses.mean().exp() * losses.std() / 2**0.5), rel=1e-3)
    assert f"| Perplexity after | {perplexity['after']:.2f} ± " in card
    assert re.search(r"\| Speed of reading \| [\d.]+K? tokens/s on .+, \d+ threads \(in torch\) \|", card)
    assert content["held_out"]["ratio"] == pytest.approx(content["held_out"]["joint"] / content["held_out"]["summed"])
    assert {one["method"] for one in content["compared"]} == {"dp", "uniform"}
    config = json.loads((pruned / "config.json").read_text())
    assert "sparsity_config" not in config and "quantization_config" not in config
    assert AutoTokenizer.from_pretrained(pruned)("hello")["input_ids"]
    assert len(verify(pruned).tensors) > 14


def test_its_logits_are_those_of_the_pruned_model_bit_for_bit(base, tmp_path):
    from leanstep.pruning.folder import run

    seen = {}
    write = run.write_weights

    def noting(checkpoint, values, folder):
        seen.update({name: tensor.clone() for name, tensor in values.items()})
        return write(checkpoint, values, folder)

    run.write_weights = noting
    try:
        text = CalibrationText(((base / "text.txt").read_text(),), samples=6, curve_samples=3, held_out=2, seq_len=24)
        prune_checkpoint(base / "model", tmp_path / "out", text, sparsity=0.5, score="sparsegpt", allocation="uniform")
    finally:
        run.write_weights = write
    model = make_llama(2)
    model.load_state_dict(seen)
    tokens = torch.arange(20)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_calibration_begins_as_the_tokenizer_begins_a_text(base, tmp_path):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    text = CalibrationText(((base / "text.txt").read_text(),), samples=6, curve_samples=3, held_out=2, seq_len=24)
    sequences, held_out, _ = sequences_of(open_checkpoint(folder), text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="b $A", special_tokens=[("b", begin := tokenizer.convert_tokens_to_ids("b"))]
    )
    tokenizer.save_pretrained(folder)
    longer = sequences_of(open_checkpoint(folder), replace(text, seq_len=25))
    for plain, whole in zip((sequences, held_out), longer, strict=False):
        assert (whole[:, 0] == begin).all()
        assert torch.equal(whole[:, 1:], plain)


@pytest.mark.parametrize("shown", [[], ["--json"]])
def test_the_command_counts_zeros_once_while_its_weights_are_bounded_in_memory(
    shown, base, tmp_path, monkeypatch, capsys
):
    counted = []
    layers = PruneResult.layers
    monkeypatch.setattr(PruneResult, "layers", lambda self: counted.append(layers(self)) or counted[-1])
    out = tmp_path / "out"
    assert leanstep_prune(base, out, "--sparsity", "0.6", *shown) == 0
    content, printed = json.loads((out / "sparsity.json").read_text()), capsys.readouterr().out
    assert len(counted) == 1 and content["layers"] == counted[0]
    if shown:
        assert {name: content[name] for name in json.loads(printed)} == json.loads(printed)
    else:
        weights = sum(row["numel"] for row in content["layers"])
        assert f"sparsity       {content['sparsity']:.4f} of {weights:,} weights" in printed


def test_the_report_is_one_page_without_scripts(pruned):
    page = (pruned / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    for text in ("Perplexity after", "Additivity ratio", "uniform", "dp (applied)", "up_proj", "zeros alone"):
        assert text in page


def test_vision_checkpoints_take_images(tmp_path):
    make_vit().save_pretrained(tmp_path / "vit")
    result = prune_checkpoint(tmp_path / "vit", tmp_path / "out", images(10), sparsity=0.5, allocation="erk")
    assert result.metric == "kl"
    assert result.held_out.joint > 0
    again = type(make_vit()).from_pretrained(tmp_path / "out")
    assert sum(int((target.weight == 0).sum()) for target in find_targets(again)) == result.sparsity * sum(
        target.layer.numel for target in find_targets(again)
    )


def test_a_command_without_data_measures_nothing(base, tmp_path, capsys):
    arguments = ["prune", str(base / "model"), "--out", str(tmp_path / "out"), "--score", "magnitude"]
    assert main([*arguments, "--allocation", "uniform", "--sparsity", "0.5"]) == 0
    assert "was not measured" in capsys.readouterr().out
    assert main([*arguments, "--allocation", "dp", "--sparsity", "0.5", "--out", str(tmp_path / "two")]) == 2
    assert "needs data" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["fisher", "anchored"])
def test_the_report_says_which_curves_were_used(method, base, tmp_path, capsys):
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6", "--curves", method) == 0
    assert f"curves         14 {method}" in capsys.readouterr().out
    assert f"curves {method}" in (tmp_path / "out" / "report.html").read_text()


REFUSED = {
    "minutes": (["--sparsity", "0.5", "--minutes", "0"], {}, "minutes .* must be positive, got 0"),
    "no checkpoint": (["--sparsity", "0.5"], {"checkpoint": "nothing/../here"}, "does not exist"),
    "text too short": (["--sparsity", "0.5"], {"data": "short.txt"}, "the text is too short: 8 sequences of 24 tokens"),
    "no text": (["--sparsity", "0.5"], {"data": "none.txt"}, "--data.*none.txt"),
    "sparsity": (["--sparsity", "60"], {}, "must lie between 0 and 1"),
    "out of reach": (
        ["--sparsity", "0.9", "--pattern", "N:8"],
        {},
        "sparsity of 0.9 is out of reach: .* from 0 to 0.75; ask for less .--sparsity., or no pattern .--pattern.",
    ),
    "levels of a pattern": (["--sparsity", "0.5", "--pattern", "N:8", "--levels", "0.4,0.6"], {}, "leave levels out"),
    "levels": (
        ["--sparsity", "0.5", "--levels", "0.2,0.4"],
        {},
        "of 0.5 is out of reach: .* from 0 to 0.39.*, or other levels .--levels.",
    ),
    "sequence": (["--sparsity", "0.5", "--seq-len", "100"], {}, "seq_len must be from 2 to the model's 64 positions"),
    "no sequence": (["--sparsity", "0.5", "--samples", "0"], {}, "--samples, .* and --held-out must be at least 1"),
    "empty sequence": (["--sparsity", "0.5", "--seq-len", "0"], {}, "seq_len must be from 2 to"),
    "batch size": (["--sparsity", "0.5", "--batch-size", "0"], {}, "batch_size must be at least 1, got 0"),
    "device": (["--sparsity", "0.5", "--device", "nowhere"], {}, "the device 'nowhere' is not available"),
    "device without values": (
        ["--sparsity", "0.5", "--device", "meta"],
        {},
        "'meta' is not available: it holds no val",
    ),
    "metric": (["--sparsity", "0.5", "--metric", "kll"], {}, "metric must be one of kl, .*, got 'kll'"),
    "names": (["--sparsity", "0.5", "--exclude", "*.ffn.*"], {}, "matches no matrix"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_with_nothing_written(case, base, tmp_path, capsys):
    more, changes, message = REFUSED[case]
    before = snapshot(base / "model")
    arguments = ["prune", changes.get("checkpoint", str(base / "model")), "--out", str(tmp_path / "out")]
    small = SMALL[:-2] if "--pattern" in more else SMALL  # levels are those of the pattern
    assert main([*arguments, "--data", str(base / changes.get("data", "text.txt")), *small, *more]) == 2
    (error,) = capsys.readouterr().err.splitlines()[-1:]
    assert error.startswith("error: ")
    import re

    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []
    assert snapshot(base / "model") == before


@pytest.mark.parametrize("option", ["--samples", "--curve-samples", "--held-out", "--seq-len", "--text-key"])
def test_options_of_data_are_refused_without_it(option, base, tmp_path, capsys):
    rule = ["--sparsity", "0.5", "--score", "magnitude", "--allocation", "erk"]
    assert main(["prune", str(base / "model"), "--out", str(tmp_path / "out"), *rule, option, "3"]) == 2
    assert f"error: {option} goes with --data, which is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("file", "holds"), [("out.curves.jsonl", "curves"), ("out.refine.json", "a search")])
def test_files_that_a_resumed_run_would_not_read_are_not_removed(file, holds, base, tmp_path, capsys):
    (tmp_path / file).write_text("{}")
    settings = ["--sparsity", "0.5", "--allocation", "owl"] if holds == "curves" else ["--sparsity", "0.5"]
    small = SMALL[:-2] if holds == "curves" else SMALL  # levels are those of the allocation
    command = ["prune", str(base / "model"), "--out", str(tmp_path / "out"), "--data", str(base / "text.txt"), *small]
    assert main([*command, *settings, "--resume"]) == 2
    assert f"{file} holds {holds} of an interrupted run with" in capsys.readouterr().err
    assert (tmp_path / file).read_text() == "{}"


def test_further_modules_of_sentence_transformers_are_copied(base, tmp_path):
    folder = shutil.copytree(base / "model", tmp_path / "model")
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": ".."}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "checkpoint-7"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    prune_checkpoint(folder, tmp_path / "out", sparsity=0.5, score="magnitude", allocation="uniform")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "checkpoint-7").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--out", ".", "expected the name of a folder to create, got '.'"),
        ("--out", "..", "expected the name of a folder to create, got '..'"),
        ("--seed", "9" * 20, "expected a whole number from 0 to 2^63 - 1, got '9"),
        ("--seed", "one", "expected a whole number from 0 to 2^63 - 1, got 'one'"),
    ],
)
def test_an_option_that_means_nothing_is_refused_before_anything_is_read(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["prune", "nothing", "--out", str(tmp_path / "out"), "--sparsity", "0.5", option, value])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected the name of a folder to create, got"):
        prune_checkpoint(tmp_path, ".", sparsity=0.5, score="magnitude", allocation="uniform")
    with pytest.raises(ValueError, match=r"expected a seed from 0 to 2\^63 - 1, got 1000"):
        CalibrationText(("a",), seed=10**20)


def test_a_perplexity_beyond_fp64_is_infinite_and_written_as_none(base, tmp_path):
    import math

    folder = tmp_path / "model"
    model = make_llama(1)
    model.lm_head.weight.data.mul_(1e6)
    save_model(model, folder)
    text = CalibrationText(((base / "text.txt").read_text(),), samples=4, curve_samples=2, held_out=2, seq_len=16)
    settings = {"sparsity": 0.5, "allocation": "uniform", "score": "magnitude"}
    result = prune_checkpoint(folder, tmp_path / "out", text, evaluate=True, **settings)
    assert result.perplexity["before"] == math.inf
    written = json.loads((tmp_path / "out" / "sparsity.json").read_text(), parse_constant=pytest.fail)
    assert written["perplexity"]["before"] is None


def test_an_unknown_metric_is_told_before_anything_is_opened(tmp_path):
    with pytest.raises(ValueError, match="metric must be one of kl, kl_topk, mse_logits, cosine, got 'kll'"):
        prune_checkpoint(tmp_path / "nothing", tmp_path / "out", CalibrationText(("a",)), sparsity=0.5, metric="kll")


def test_an_output_that_exists_is_refused_before_anything_is_done(base, pruned, capsys):
    before = snapshot(pruned)
    assert leanstep_prune(base, pruned, "--sparsity", "0.6") == 2
    assert "exists already" in capsys.readouterr().err
    assert snapshot(pruned) == before


def test_a_disk_that_fills_leaves_the_curves_and_no_folder(base, tmp_path, monkeypatch, capsys):
    from leanstep.pruning.folder import checkpoint, run

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    # while the weights are copied, before anything is measured; and while the last files are written
    for module, name, left in ((checkpoint.shutil, "copyfile", []), (run, "write_report", ["out.curves.jsonl"])):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6") == 1
        error = capsys.readouterr().err
        assert "the disk is full" in error
        assert ("The same command with --resume goes on with out.curves.jsonl" in error) == bool(left)
        assert [path.name for path in tmp_path.iterdir()] == left
    assert [path.name for path in tmp_path.iterdir()] == ["out.curves.jsonl"]
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6") == 2
    assert "go on with it (--resume)" in capsys.readouterr().err
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6", "--resume") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't start new thread")]
)
def test_a_lack_of_memory_is_told_with_what_to_do(error, base, tmp_path, monkeypatch, capsys):
    def full(*arguments, **options):
        raise error

    monkeypatch.setattr("leanstep.pruning.prune_checkpoint", full)
    assert leanstep_prune(base, tmp_path / "out", "--sparsity", "0.6") == 1
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert told.startswith("error: out of memory; take fewer or shorter sequences")
    assert f"({str(error) or 'MemoryError'})" in told and "--resume" not in told
    assert told.endswith("out was not created, and nothing else was saved: the same command begins anew")


def test_a_model_that_is_missing_is_told_before_settings_that_are(tmp_path, capsys):
    assert main(["prune", "nosuch", "--recover", "3", "--out", str(tmp_path / "out")]) == 2
    assert "error: nosuch does not exist: expected a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--resume"], ["--recover", "2", "--resume"]])
def test_of_two_runs_of_one_folder_the_second_is_refused(options, base, pruned, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    before = snapshot(out)
    with exclusive_lock(out):
        assert leanstep_prune(base, out, "--sparsity", "0.6", "--eval", *options) == 2
        assert f"another run writes {out}: wait for it, stop it, or name another folder" in capsys.readouterr().err
        with pytest.raises(ValueError, match="another run writes"):
            prune_checkpoint(base / "model", out, sparsity=0.6, allocation="uniform", score="magnitude")
        with pytest.raises(ValueError, match="another run writes"):
            recover_checkpoint(base / "model", out, torch.zeros(4, 8, dtype=torch.int64), Recovery(1))
    assert snapshot(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from leanstep.pruning.measure import curve_file as curves
from leanstep.cli import main
add = curves.PartialCurves.add
def dying(self, name, kept, point):
    if len(self.points) == 9:
        with self.path.open("a") as file:
            file.write('["model.laye')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    add(self, name, kept, point)
curves.PartialCurves.add = dying
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_folder(base, pruned, tmp_path):
    out = tmp_path / "out"
    arguments = ["prune", str(base / "model"), "--out", str(out), "--data", str(base / "text.txt"), *SMALL]
    assert finish_code(KILLED, *arguments, "--sparsity", "0.6", "--eval").returncode == -signal.SIGKILL
    # the half-written folder, which the next run removes, is hidden
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["out.curves.jsonl"]
    measured = (tmp_path / "out.curves.jsonl").read_text()
    # its identity, the method, and nine points
    assert measured.count("\n") == 11 and measured.endswith('["model.laye')
    assert main([*arguments, "--sparsity", "0.6", "--eval", "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert snapshot(out) == snapshot(pruned)


@pytest.mark.slow
def test_a_run_killed_after_its_folder_was_written_leaves_no_curves(base, tmp_path, capsys):
    dying = """
import os, signal, sys
from leanstep.cli import main
from leanstep.pruning.folder import run
def die(path): os.kill(os.getpid(), signal.SIGKILL)
run.Path.unlink = lambda path, missing_ok=False: "curves" in path.name and die(path)
main(sys.argv[1:])
"""
    out = tmp_path / "out"
    arguments = ["prune", str(base / "model"), "--out", str(out), "--data", str(base / "text.txt"), *SMALL]
    assert finish_code(dying, *arguments, "--sparsity", "0.6").returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.curves.jsonl", ".out.lock"}
    before = snapshot(out)
    assert main([*arguments, "--sparsity", "0.6", "--resume"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and snapshot(out) == before


def test_where_nothing_tells_the_memory_the_rest_is_told(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(_memory, "PROCESS_STATUS", tmp_path / "none")
    quick = ["--allocation", "uniform", "--score", "magnitude", "--sparsity", "0.5"]
    assert main(["prune", str(base / "model"), "--out", str(tmp_path / "out"), *quick]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("took ") and "memory" not in last


MAGNITUDE = ["--allocation", "uniform", "--score", "magnitude", "--sparsity", "0.5"]


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        (
            ["--allocation", "uniform", "--recover", "2"],
            "comparison on|pruning:|writing|reading the dense|recovery|writing",
        ),
        (["--allocation", "owl"], "statistics|comparison on|pruning:|writing"),
        (["--refine-evaluations", "2", "--eval"], "perplexity:|curves|search|pruning:|comparison on|pruning:|perpl"),
    ],
)
def test_every_phase_is_told(options, phases, base, tmp_path, capsys):
    curves = SMALL if "--eval" in options else SMALL[:-2]  # levels are of curves
    command = ["prune", str(base / "model"), "--out", str(tmp_path / "out"), "--data", str(base / "text.txt"), *curves]
    assert main([*command, "--sparsity", "0.5", *options]) == 0
    lines = iter(capsys.readouterr().err.splitlines())
    for phase in f"loading torch|reading the ch|preparing|reading the ch|{phases}".split("|"):
        assert any(line.startswith(phase) for line in lines), phase


PRUNE = "prune org/model --out nowhere"
EXITS_AT_TORCH = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "torch": sys.exit(9)
sys.meta_path.insert(0, Finder())
from leanstep import cli
cli.open_standard_streams, sys.stderr.isatty = str, lambda: "--dry-run" in sys.argv
sys.exit(cli.main(sys.argv[1:]))
"""


def run_until_torch(command, folder):
    program = [sys.executable, "-P", "-c", EXITS_AT_TORCH, *command.split()]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [PRUNE, f"{PRUNE} --dry-run", "eval . --data nothing", "check llama-nano-adamw"])
def test_the_first_line_comes_before_torch(command, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    ended = run_until_torch(command, tmp_path)
    assert ended.returncode == 9 and ended.stderr == "loading torch and transformers\n"


@pytest.mark.parametrize("command", ["prune model --out nowhere", "eval model --data nothing", "generate model Hello"])
def test_a_mistyped_folder_is_refused_before_torch(command, tmp_path):
    ended = run_until_torch(command, tmp_path)
    assert ended.returncode == 2 and "model" in ended.stderr.splitlines()[-1]


def test_a_phase_in_which_nothing_is_counted_is_told_again(monkeypatch, capsys):
    monkeypatch.setattr("leanstep.recipes.report.progress._INTERVAL", 0.01)
    told = ""
    with ProgressBar() as bar:
        bar(0, 0, "writing")
        while told.count("writing") < 3:
            told += capsys.readouterr().err
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_a_terminal_has_one_bar_for_all_phases(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as bar:
        bar(0, 0, "checkpoint")
        bar(3, 4, "pruning")
        bar(7, 9, "model.layers.0.mlp.up_proj.weight")
    shown = capsys.readouterr()
    assert "curves" in shown.err and "7/9 points" in shown.err and not shown.out


@pytest.mark.parametrize(
    ("broken", "options", "state"),
    [
        ("leanstep.pruning.folder.run.prune", [], "was not created, and nothing else was saved: the same command"),
        ("leanstep.pruning.folder.run.remove_search_files", [], "holds the pruned model, complete, with its report"),
        ("leanstep.pruning.folder.run.recover_model", ["--recover", "1"], "Add --resume to the command to recover it"),
        ("leanstep.pruning.folder.recovery._remove_state", ["--recover", "1"], "holds the recovered model, complete"),
    ],
)
def test_an_interrupted_command_says_what_it_left(broken, options, state, base, tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, interrupt)
    out = tmp_path / "out"
    command = ["prune", str(base / "model"), "--out", str(out), "--data", str(base / "text.txt"), *SMALL[:-2]]
    assert main([*command, *MAGNITUDE, *options]) == 130
    (told,) = capsys.readouterr().err.splitlines()[-1:]
    assert told.startswith(f"interrupted; {out} ") and state in told
    assert ("--resume" in told) == ("Add" in state) and "Traceback" not in told
    assert out.exists() == (out / "report.html").exists() == ("created" not in state)


def test_a_run_folder_is_pruned_by_its_model(base, tmp_path, capsys):
    shutil.copytree(base / "model", tmp_path / "run" / "final")
    command = ["prune", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *MAGNITUDE]
    assert main([*command, "--dry-run"]) == 0 and main(command) == 0
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert content["source"] == str(tmp_path / "run" / "final")
    command[1:4] = [str(tmp_path), "--out", str(tmp_path / "out 2")]
    assert main(command) == 2 and "is no checkpoint: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "eval", "generate", "bench"])
def test_the_device_has_one_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "cpu, cuda, ...; default: cuda where there is one" in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_checkpoint(capsys):
    with pytest.raises(SystemExit) as left:
        main(["prune", "--help"])
    assert left.value.code == 0
    assert "--allocation" in capsys.readouterr().out
