"""Curves may be those of another score than the one that prunes; Fisher curves of ALPS are SparseGPT's."""

import json
import math

import pytest
import torch
from pruned_models import make_llama, tokens

from leanstep.pruning import Refinement, prune
from leanstep.recipes.report.prune_output import summary_of

SETTINGS = {"sparsity": 0.6, "levels": (0.4, 0.5, 0.6, 0.7, 0.8), "curves": "measured", "held_out": False}


def counts_of(result) -> dict[str, int]:
    return dict(result.allocation.counts)


def distortions(result) -> dict[str, list[float]]:
    return {name: list(curve.distortion) for name, curve in result.curves.items()}


def pruned(score, **settings):
    return prune(make_llama(), tokens(6, seed=3), score=score, **{**SETTINGS, **settings})


def test_alps_can_prune_by_the_curves_of_sparsegpt():
    given, sparsegpt, alone = pruned("alps", curve_score="sparsegpt"), pruned("sparsegpt"), pruned("alps")
    assert (given.curve_score, alone.curve_score) == ("sparsegpt", "alps")
    assert distortions(given) == distortions(sparsegpt)
    assert counts_of(given) == counts_of(sparsegpt)
    weights = [[t.weight for g in r.groups for t in g.targets] for r in (given, sparsegpt)]
    assert not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), "the weights are ALPS's"
    lower = [alone.curves[name].distortion[3] < curve.distortion[3] for name, curve in sparsegpt.curves.items()]
    assert sum(lower) > 0.7 * len(lower), "ALPS's own curves are lower"


def test_fisher_curves_of_alps_are_those_of_sparsegpt_and_measurements_scale_them(tmp_path):
    fisher = [pruned(score, curves="fisher") for score in ("alps", "sparsegpt")]
    assert distortions(fisher[0]) == distortions(fisher[1])
    measured, anchored = pruned("alps"), pruned("alps", curves="anchored", minutes=5, resume=tmp_path / "curves.jsonl")
    assert {curve.source for curve in anchored.curves.values()} == {"anchored"}
    assert "score of Fisher curves" in (tmp_path / "curves.jsonl").read_text("utf-8").splitlines()[0]

    def apart(curves, name) -> list[float]:
        pairs = zip(curves[name].distortion[1:], measured.curves[name].distortion[1:], strict=True)
        return [abs(math.log(a / b)) for a, b in pairs]

    assert all(min(apart(anchored.curves, name)) < 0.02 for name in measured.curves), "as measured where it is scaled"
    errors = [
        sum(sum(apart(curves, name)) for name in measured.curves) for curves in (anchored.curves, fisher[0].curves)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_options_that_both_scores_have_are_those_of_the_curves():
    given = pruned("alps", curve_score="sparsegpt", score_options={"damping": 0.5, "scope": "row"})
    expected = pruned("sparsegpt", score_options={"damping": 0.5})
    assert counts_of(given) == counts_of(expected) != counts_of(pruned("sparsegpt"))


def test_magnitude_can_prune_by_curves_that_need_statistics():
    given, expected = pruned("magnitude", curve_score="wanda"), pruned("wanda")
    assert counts_of(given) == counts_of(expected)
    assert given.curve_score == "wanda" and given.score == "magnitude"


def test_slopes_of_atp_and_exchanges_are_judged_by_the_score_of_the_curves():
    atp = {"allocation": "atp", "levels": None, "curves": None}
    assert counts_of(pruned("alps", curve_score="sparsegpt", **atp)) == counts_of(pruned("sparsegpt", **atp))
    search = Refinement(evaluations=12, data=tokens(6, seed=4))
    results = [pruned(score, curve_score="sparsegpt", refine=search) for score in ("alps", "sparsegpt")]
    assert counts_of(results[0]) == counts_of(results[1])
    assert results[0].refinement["points"][0][2] == results[1].refinement["points"][0][2]


def test_the_result_names_the_score_of_its_curves(tmp_path):
    result = pruned("alps", curve_score="sparsegpt")
    assert "score alps (curves: sparsegpt)" in summary_of(result, result.layers(), tmp_path)
    assert json.loads(json.dumps(result.to_dict()))["curve_score"] == "sparsegpt"
    assert pruned("alps", allocation="uniform", levels=None, curves=None).curve_score is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"curve_score": "taylor"}, "curve_score must be one of magnitude.*got 'taylor'"),
        ({"curve_score": "wanda", "allocation": "owl"}, "expected allocation='dp' or 'atp'.*got allocation='owl'"),
        ({"curve_score": "wanda", "pattern": "2:4", "sparsity": None}, "a pattern that leaves a choice"),
    ],
)
def test_a_score_of_curves_that_would_have_no_use_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        prune(make_llama(), tokens(6), **{"sparsity": 0.5, "score": "sparsegpt", **settings})
