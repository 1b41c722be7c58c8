"""Every option of a run that takes memory or time has a term in the estimate, or is named as not counted."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import make
from pruned_models import make_llama, save_model, tokens
from texts import sentences

from leanstep.cli import main
from leanstep.pruning import LayerStatistics, Recovery, Workload, estimate_pruning, find_targets, layer_pruner, prune
from leanstep.pruning.allocate.closed_form import atp_betas
from leanstep.pruning.folder import estimate as module
from leanstep.pruning.folder.duration import _UPDATE_PASSES, Duration, Rates, Sizes
from leanstep.pruning.folder.files import open_checkpoint
from leanstep.pruning.folder.search_size import pruner_bytes
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.measure.curves import level_grid, levels_of
from leanstep.pruning.measure.metrics import Distortion
from leanstep.pruning.score.targets import make_groups
from leanstep.recipes.report.prune_output import estimate_lines

NONE = {name: 0.0 for name in ("operation", "ranked", "call", "logit", "copied", "hashed")}
SIZES = Sizes([(8, 8)] * 14, blocks=2, active=1000, outputs=64, tokens=16, size=10000)


@pytest.fixture
def checkpoint(tmp_path):
    save_model(make("llama"), tmp_path / "in")
    return open_checkpoint(tmp_path / "in")


def logits(**settings):
    """Seconds by use where a logit of a compared token takes one second."""
    settings = {"samples": 4, "curve_samples": 2, "held_out": 0, "batch_size": 2, "levels": None} | settings
    duration = Duration(SIZES, Workload(**settings), Rates(**NONE | {"logit": 1.0}))
    return duration.seconds(), duration.curves


def held_bytes(value, seen):
    """Bytes of the tensors that an object holds, each storage once, those of closures too."""
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, (list, tuple)):
        for one in value:
            held_bytes(one, seen)
    elif callable(value) and getattr(value, "__closure__", None):
        held_bytes([cell.cell_contents for cell in value.__closure__], seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("leanstep"):
        held_bytes(list(vars(value).values()), seen)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "alps", "mfac"])
def test_a_pruner_holds_what_is_counted(score, dtype):
    torch.manual_seed(0)
    weight, samples = torch.randn(96, 128).to(dtype), 24
    statistics = LayerStatistics.empty(("square_sum", "gram"), 128)
    statistics.add(torch.randn(400, 128))
    if score == "mfac":
        statistics = LayerStatistics(gradients=torch.randn(samples, weight.numel()))
    pruner = layer_pruner(weight, score, statistics)
    del statistics
    pruner.prune(weight.numel() // 2)
    held = held_bytes(pruner, {})
    if score in ("magnitude", "wanda"):
        held -= 4 * 128**2  # collected here for all scores
    counted = pruner_bytes((96, 128), score, weight.element_size(), samples=samples)
    assert 0.9 * held < counted < 1.25 * held


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_a_search_takes_pruners_gradients_and_dense_outputs_of_its_own(score, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 10**12)
    settings = {"tokens": 16, "score": score, "curves": "measured"}
    plain = estimate_pruning(checkpoint, tmp_path / "o", Workload(**settings))
    searched = estimate_pruning(checkpoint, tmp_path / "o", Workload(refine_samples=64, refine_minutes=3.0, **settings))
    matrices = [target.weight for target in find_targets(make("llama"))]
    weights = sum(weight.numel() for weight in matrices)
    new = set(searched.memory) - set(plain.memory)
    assert new == {"pruners of all matrices", "gradients of all matrices", "inputs of blocks"}
    assert searched.memory["gradients of all matrices"] == 8 * weights
    least = 4 * weights + (sum(4 * weight.shape[1] ** 2 for weight in matrices) if score == "sparsegpt" else 0)
    assert least <= searched.memory["pruners of all matrices"] <= 2 * least
    assert searched.memory["dense outputs"] == 64 / 16 * plain.memory["dense outputs"]
    assert 180 < searched.seconds["search"] < 190
    assert searched.not_counted == []
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    full = estimate_pruning(checkpoint, tmp_path / "o", Workload(refine_samples=64, **settings))
    assert "inputs of blocks" not in full.memory and full.memory["gradients of all matrices"] == 8 * weights


def test_a_search_on_a_gpu_has_all_weights_there(checkpoint, tmp_path):
    estimate = estimate_pruning(checkpoint, tmp_path / "o", Workload(tokens=16, refine_samples=16, device="cuda"))
    assert estimate.device_memory["all weights"] == checkpoint.size
    assert "gradients of all matrices" in estimate.device_memory and "all weights" not in estimate.memory


def test_a_fixed_pattern_measures_no_curves(checkpoint, tmp_path):
    seconds, curves = logits(pattern="2:4")
    assert curves == "" and not any("curves" in use for use in seconds)
    fixed, uniform = (
        estimate_pruning(checkpoint, tmp_path / "o", Workload(tokens=16, held_out=4, **settings))
        for settings in ({"pattern": "2:4"}, {"allocation": "uniform"})
    )
    assert set(fixed.seconds) == set(uniform.seconds)
    assert {**fixed.memory, "libraries": 0} == {**uniform.memory, "libraries": 0}


@pytest.mark.parametrize("pattern", ["N:4", "N:8", "N:16"])
def test_a_pattern_has_the_levels_of_its_grid(pattern):
    groups = make_groups(find_targets(make_llama(1, hidden_size=32, intermediate_size=64)), "matrix")
    counts, _ = levels_of(groups, 0.5, pattern)[groups[0].name]
    seconds, _ = logits(pattern=pattern, curves="measured")
    assert seconds["curves, measured"] == 14 * (len(counts) - 1) / 2 * 2 * 16 * 64


def test_the_slopes_of_atp_are_counted(monkeypatch):
    tried = []
    monkeypatch.setattr(Trial, "joint", lambda *given: tried.append(1) or Distortion(1.0, 0.1))
    prune(make_llama(2), tokens(6), sparsity=0.6, allocation="atp", held_out=False)
    seconds, _ = logits(allocation="atp", sparsity=0.6)
    # the dense outputs, compared once, and those of each slope; statistics of each compare nothing
    assert len(tried) == 9 < len(atp_betas(0.6, 2))
    assert seconds["slopes of ATP, 9"] == (2 + len(tried)) * 2 * 16 * 64
    calls = Duration(SIZES, Workload(samples=4, held_out=0, allocation="atp"), Rates(**NONE | {"call": 1.0})).seconds()
    assert calls["slopes of ATP, 9"] > 9 * calls["statistics and pruning"]


def test_a_correction_of_curves_is_counted(checkpoint, tmp_path):
    levels = len(level_grid(10**6, 0.5)) - 1
    seconds, _ = logits(curves="measured", correction="relinearise")
    assert seconds["correction of curves, at most"] == (3 + 2 * 14 * (levels + 1) / 2) * 2 * 16 * 64
    settings = {"tokens": 16, "score": "sparsegpt", "curves": "measured"}
    plain, corrected = (
        estimate_pruning(checkpoint, tmp_path / "o", Workload(correction=correction, **settings))
        for correction in ("none", "relinearise")
    )
    new = set(corrected.memory) - set(plain.memory)
    assert new == {"pruners of all matrices", "statistics of all matrices"}
    fisher = estimate_pruning(
        checkpoint, tmp_path / "o", Workload(correction="relinearise", **settings | {"curves": "fisher"})
    )
    more = set(fisher.memory) - set(corrected.memory)
    assert more == {"gradients of all matrices", "x and g of Fisher curves"}
    measured, second = (e.seconds["correction of curves, at most"] for e in (corrected, fisher))
    assert 0 < second < measured
    squares = sum(4 * target.weight.shape[1] ** 2 for target in find_targets(make("llama")))
    assert corrected.memory["statistics of all matrices"] == squares


def test_processes_share_the_points_and_the_choice_of_curves():
    one, _ = logits(curves="measured", levels=3)
    four, _ = logits(curves="measured", levels=3, processes=4)
    assert one["curves, measured"] == 4 * four["curves, measured"] > 0
    minutes = one["curves, measured"] / 60
    for processes, part, curves in ((1, 1.01, "measured"), (1, 0.9, "anchored"), (4, 0.26, "measured")):
        assert logits(levels=3, processes=processes, minutes=part * minutes)[1] == curves
    assert logits(levels=3, processes=4, minutes=0.24 * minutes)[1] == "anchored"


@pytest.mark.parametrize(("score", "curves"), [("wanda", "measured"), ("sparsegpt", "anchored"), ("alps", "anchored")])
def test_the_choice_of_curves_is_by_their_passes_and_by_the_levels_of_scores_that_update(score, curves):
    """As the run decides; statistics and Wanda's rankings come on top of the minutes."""
    workload = Workload(samples=4, curve_samples=2, held_out=0, batch_size=2, levels=3, minutes=1.0, score=score)
    duration = Duration(SIZES, workload, Rates(**NONE | {"ranked": 1.0}))
    assert duration.seconds()[f"curves, {curves}"] > 60


def test_rates_are_those_of_the_threads_of_a_process(monkeypatch):
    threads = []
    monkeypatch.setattr(Rates, "_measured", classmethod(lambda cls, dtype: threads.append(torch.get_num_threads())))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    before = torch.get_num_threads()
    Rates.measured(torch.float32)
    Rates.measured(torch.float32, 3)
    assert threads == [before, 2] and torch.get_num_threads() == before


def test_recovery_is_counted(checkpoint, tmp_path, capsys):
    workload = Workload(tokens=16)
    plain = estimate_pruning(checkpoint, tmp_path / "o", workload)
    recovered = estimate_pruning(checkpoint, tmp_path / "o", workload, recovery=Recovery(2))
    assert plain.recovery == {} and set(recovered.seconds) - set(plain.seconds) == {"recovery"}
    assert recovered.recovery["dense model"] == checkpoint.size
    assert recovered.recovery["pruned model"] == sum(4 * p.numel() for p in make("llama").parameters())
    alone = estimate_pruning(checkpoint, tmp_path / "o", workload, recovery=Recovery(2, distill=False))
    assert recovered.recovery.pop("libraries") > 10**8 and alone.recovery.pop("libraries")
    assert recovered.recovery.items() - alone.recovery.items() == {("dense model", checkpoint.size)}
    assert alone.seconds["recovery"] < recovered.seconds["recovery"]
    save_model(make_llama(1, max_position_embeddings=128), tmp_path / "model")
    (text := tmp_path / "text.txt").write_text(sentences(400))
    command = ["prune", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--sparsity", "0.5", "--dry-run"]
    command += ["--data", str(text), "--recover", "5", "--refine", "2", "--correction", "relinearise"]
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["not_counted"] == []
    assert 120 < content["seconds"]["search"] < 180 and content["seconds"]["correction of curves, at most"] > 0
    assert content["seconds"]["recovery"] > 0 and content["recovery"]["activations"] > 0
    assert content["memory"]["gradients of all matrices"] > 0
    assert content["distills"] is True and content["recovery"]["libraries"] == content["memory"]["libraries"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "memory of recovery" in printed and "it learns the dense model's outputs" in printed
    assert main([*command, "--no-distill"]) == 0
    assert "it learns the data's next tokens\n" in capsys.readouterr().out


def test_a_step_of_recovery_is_four_passes_or_three_without_the_dense_model():
    workload = Workload(samples=4, held_out=3)
    duration = Duration(SIZES, workload, Rates(**NONE | {"logit": 1.0}))
    compared = 2 * 2 * 3 * 16 * 64
    for distill, models in ((None, 4), (True, 4), (False, 3)):
        assert duration.recovery(Recovery(5, batch_size=2, distill=distill)) == 5 * models * 2 * 16 * 64 + compared
    # a step has no more samples than there are
    assert duration.recovery(Recovery(1, batch_size=8)) == 4 * 4 * 16 * 64 + compared
    update = Duration(SIZES, workload, Rates(**NONE | {"copied": 1.0}))
    steps = [update.recovery(Recovery(count)) for count in (1, 2)]
    assert steps[1] - steps[0] == 4 * _UPDATE_PASSES * 14 * 64
    assert update.recovery(Recovery(2, rank=1)) == update.recovery(Recovery(1, rank=1))


def test_too_little_memory_for_recovery(checkpoint, tmp_path, monkeypatch):
    def estimated(free, **settings):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
        recovery = Recovery(2, **settings)
        return estimate_pruning(checkpoint, tmp_path / "o", Workload(tokens=16), recovery=recovery)

    libraries = 1000  # less than the dense model
    monkeypatch.setattr("psutil.Process.memory_info", lambda self: SimpleNamespace(rss=libraries))
    uses = estimated(10**12).recovery
    total, teacher = sum(uses.values()), uses["dense model"]
    # the run decides with its libraries in memory; the peak that has to be free has them, too
    for free, distill, distills, is_problem in (
        (total, None, True, False),
        (total - libraries - 1, None, False, False),
        (total - 1, True, True, True),
        (total - teacher - 1, None, False, True),
        (total - teacher, False, False, False),
    ):
        estimate = estimated(free, distill=distill)
        assert estimate.distills is distills
        (line,) = [line for line in estimate_lines(estimate) if "it learns" in line]
        assert ("the dense model does not fit" in line) == (not distills and distill is None)
        problems = [problem for problem in estimate.problems() if problem.startswith("recovery")]
        assert len(problems) == is_problem


def test_a_model_that_does_not_run_without_values_is_named(tmp_path):
    save_model(make("mixtral"), tmp_path / "in")
    estimate = estimate_pruning(
        open_checkpoint(tmp_path / "in"), tmp_path / "o", Workload(tokens=16), recovery=Recovery(2)
    )
    assert estimate.recovery == {} and estimate.seconds["recovery"] > 0
    (reason,) = estimate.not_counted
    assert reason.startswith("memory of recovery, since the model does not run without values")
    assert f"not in the estimate: {reason}" in estimate_lines(estimate)
