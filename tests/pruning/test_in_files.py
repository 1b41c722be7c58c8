"""Searches and corrections with pruners and gradients in files: the bits of those in memory."""

import pytest
import torch
from pruned_models import make_gpt2, make_llama, make_mixtral, tokens

from leanstep._checkpoint.mapped import Scratch
from leanstep.pruning import Refinement, find_targets, prune
from leanstep.pruning.allocate.allocation import allocate
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import as_batches
from leanstep.pruning.measure.checks import Trial
from leanstep.pruning.score.calibration import Pruning
from leanstep.pruning.score.in_files import GradientSums, PrunersInFiles, gradients_to
from leanstep.pruning.score.targets import WeightSnapshot, make_groups


def weights_of(model):
    return {target.name: target.weight.clone() for target in find_targets(model)}


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt", "alps", "mfac"])
def test_a_pruner_made_anew_is_that_in_memory(score, inputs, tmp_path):
    pruned = []
    for scratch in (None, Scratch(tmp_path)):
        model = make_llama(2)
        cache = ActivationCache(model, as_batches(tokens(6), model), scratch=scratch)
        groups, targets = make_groups(find_targets(model)), find_targets(model)
        trial = Trial(groups, Pruning(cache, score), WeightSnapshot(targets), inputs)
        start = allocate([group.layer for group in groups], 0.6, method="uniform")
        pruners = {} if scratch is None else PrunersInFiles(trial.pruning, trial.snapshot, scratch)
        trial.apply(start, pruners)
        levels = (targets[0].weight.numel() // 3, "2:4")
        pruned.append(
            [pruners[t.name].prune(level).weight for t in targets for level in levels] + [*weights_of(model).values()]
        )
        assert len(pruners) == len(targets) == len({*pruners})
    assert all(map(torch.equal, *pruned))


@pytest.mark.parametrize(
    "make, settings",
    [
        (make_llama, {"refine": 6}),
        (make_llama, {"refine": 6, "score": "sparsegpt", "granularity": "block"}),
        (make_llama, {"refine": 3, "score": "alps", "curve_score": "sparsegpt", "inputs": "dense"}),
        (make_gpt2, {"refine": 4, "pattern": "N:4"}),
        (make_mixtral, {"refine": 3, "score": "sparsegpt"}),
        (make_llama, {"correction": "relinearise", "curves": "fisher"}),
        (make_llama, {"correction": "relinearise", "score": "sparsegpt"}),
    ],
)
def test_files_give_the_bits_of_the_memory(make, settings, tmp_path):
    settings = {
        "sparsity": 0.6,
        "levels": (0.3, 0.6, 0.8),
        "curves": "measured",
        "held_out": tokens(4, seed=2),
    } | settings
    if evaluations := settings.pop("refine", None):
        settings["refine"] = Refinement(evaluations=evaluations, data=tokens(8, seed=1))
    if settings.get("pattern"):
        del settings["levels"]
    results = []
    for scratch in (None, tmp_path):
        model = make()
        result = prune(model, tokens(6), scratch=scratch, **settings)
        results.append((weights_of(model), result.allocation.counts, result.compared))
    (memory, counts, compared), (files, *others) = results
    assert [counts, compared] == others
    assert all(torch.equal(weight, files[name]) for name, weight in memory.items())
    assert not list(tmp_path.iterdir())


def test_gradients_reach_their_receiver_and_leave_those_of_the_parameters():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = torch.nn.Parameter(torch.zeros(1))
    weight.grad, given = torch.full((2,), 7.0), []
    for _ in range(2):
        with gradients_to(lambda name, gradient: given.append((name, gradient)), {"w": weight, "u": unused}):
            (3 * weight.square().sum()).backward(inputs=[weight, unused])
    assert [(name, gradient.tolist()) for name, gradient in given] == [("w", [6.0, 12.0])] * 2
    assert weight.grad.tolist() == [7.0, 7.0] and unused.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_files_round_as_those_in_memory(dtype, tmp_path):
    targets = find_targets(make_llama(1))
    sums = [GradientSums(targets, torch.device("cpu"), scratch) for scratch in (None, Scratch(tmp_path))]
    torch.manual_seed(0)
    for _ in range(3):
        for target in targets[1:]:
            gradient = torch.randn_like(target.weight).to(dtype)
            for one in sums:
                one.add(target.parameter, gradient.clone())
    memory, files = sums
    assert memory.is_finite and files.is_finite and not memory[targets[0].name].any()
    assert all(torch.equal(memory[name], files[name]) and memory[name].dtype == torch.float32 for name in memory)
