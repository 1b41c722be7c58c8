"""A model whose distortions add up exactly: there the dynamic program must find the true optimum."""

import itertools

import pytest
import torch

from leanstep.pruning import Curve, Layer, LayerStatistics, allocate, layer_pruner, nm_levels


def oracle(seed, score, pattern):
    """f(x) = sum_g A_g W_g x with orthogonal ranges of A_g: pruned copies and curves of four matrices of two sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 16, generator=generator, dtype=torch.float64) @ torch.randn(
        16, 16, generator=generator, dtype=torch.float64
    )
    rows = [4, 8, 4, 6]
    ranges = torch.linalg.qr(torch.randn(22, 22, generator=generator, dtype=torch.float64))[0].split(rows, dim=1)
    weights = [torch.randn(r, 16, generator=generator, dtype=torch.float64) * 3**i for i, r in enumerate(rows)]
    gram = x.T @ x
    statistics = LayerStatistics(len(x), gram.diagonal().clone(), gram)

    def output(matrices):
        return sum(x @ w.T @ a.T for w, a in zip(matrices, ranges, strict=True))

    def distortion(matrices):
        return float((output(matrices) - output(weights)).square().mean())

    layers, curves, copies = [], {}, []
    for i, weight in enumerate(weights):
        layer = Layer(f"{i}", tuple(weight.shape))
        if pattern:
            kept, patterns = nm_levels(layer.numel, 8, 3)
        else:
            kept, patterns = tuple(layer.numel * k // 8 for k in (8, 7, 6, 5, 4, 3)), ()
        pruner = layer_pruner(weight, score, statistics)
        copies.append([pruner.prune(level).weight for level in patterns or kept])
        found = [distortion([*weights[:i], copy, *weights[i + 1 :]]) for copy in copies[-1]]
        assert found[0] == 0.0 and found == sorted(found)
        layers.append(layer)
        curves[layer.name] = Curve(layer.name, layer.numel, kept, found, (0.0,) * 6, "mse_logits", patterns)
    return layers, curves, copies, distortion


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [True, False])
def test_distortions_add_up_and_the_allocation_is_the_best_of_all(score, pattern):
    layers, curves, copies, distortion = oracle(0, score, pattern)
    choices = list(itertools.product(range(6), repeat=4))
    joint = {ks: distortion([copy[k] for copy, k in zip(copies, ks, strict=True)]) for ks in choices[::7]}
    for ks, together in joint.items():
        summed = sum(curves[f"{g}"].distortion[k] for g, k in enumerate(ks))
        assert summed == pytest.approx(together, rel=1e-6, abs=1e-12)
    for sparsity in (0.2, 0.4, 0.5):
        target = sum(layer.numel for layer in layers) * (1 - sparsity)
        best = min(
            sum(curves[f"{g}"].distortion[k] for g, k in enumerate(ks))
            for ks in choices
            if sum(curves[f"{g}"].counts[k] for g, k in enumerate(ks)) <= target
        )
        found = allocate(layers, sparsity, curves=curves)
        if not pattern:
            # any count may be kept: at least as good as the best of the levels, up to the fit between them
            assert found.predicted <= best * 1.01
            continue
        chosen = [curves[layer.name].counts.index(found.counts[layer.name]) for layer in layers]
        assert found.predicted == pytest.approx(best, rel=1e-9)
        assert distortion([copy[k] for copy, k in zip(copies, chosen, strict=True)]) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_the_allocation_beats_uniform_where_layers_differ(seed):
    layers, curves, copies, distortion = oracle(seed, "wanda", True)
    found = allocate(layers, 0.5, curves=curves)
    chosen = [curves[layer.name].counts.index(found.counts[layer.name]) for layer in layers]
    uniform = distortion([copy[4] for copy in copies])
    assert distortion([copy[k] for copy, k in zip(copies, chosen, strict=True)]) < 0.5 * uniform
