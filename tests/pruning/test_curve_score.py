"""Curves may be those of another score than the one that prunes; ALPS takes SparseGPT's."""

import json

import pytest
import torch
from pruned_models import make_llama, tokens

from leanstep.pruning import Refinement, prune
from leanstep.pruning.choices import score_of_curves
from leanstep.recipes.prune_output import summary_of

SETTINGS = {"sparsity": 0.6, "levels": (0.4, 0.5, 0.6, 0.7, 0.8), "curves": "measured", "held_out": False}


def counts_of(result) -> dict[str, int]:
    return dict(result.allocation.counts)


def pruned(score, **settings):
    return prune(make_llama(), tokens(6, seed=3), score=score, **{**SETTINGS, **settings})


def test_alps_prunes_by_the_curves_of_sparsegpt_unless_it_is_told_otherwise():
    by_default, sparsegpt = pruned("alps"), pruned("sparsegpt")
    assert by_default.curve_score == "sparsegpt"
    assert {n: c.distortion for n, c in by_default.curves.items()} == {
        n: c.distortion for n, c in sparsegpt.curves.items()
    }
    assert counts_of(by_default) == counts_of(sparsegpt)
    weights = [[t.weight for g in r.groups for t in g.targets] for r in (by_default, sparsegpt)]
    assert not all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), "the weights are ALPS's"
    by_itself = pruned("alps", curve_score="alps")
    lower = [by_itself.curves[name].distortion[3] < curve.distortion[3] for name, curve in sparsegpt.curves.items()]
    assert sum(lower) > 0.7 * len(lower), "ALPS's own curves are lower"


def test_options_that_both_scores_have_are_those_of_the_curves():
    given = pruned("alps", score_options={"damping": 0.5, "scope": "row"})
    expected = pruned("sparsegpt", score_options={"damping": 0.5})
    assert counts_of(given) == counts_of(expected) != counts_of(pruned("sparsegpt"))


def test_magnitude_can_prune_by_curves_that_need_statistics():
    given, expected = pruned("magnitude", curve_score="wanda"), pruned("wanda")
    assert counts_of(given) == counts_of(expected)
    assert given.curve_score == "wanda" and given.score == "magnitude"


def test_slopes_of_atp_and_exchanges_are_judged_by_the_score_of_the_curves():
    atp = {"allocation": "atp", "levels": None, "curves": None}
    assert counts_of(pruned("alps", **atp)) == counts_of(pruned("sparsegpt", **atp))
    results = [pruned(s, refine=Refinement(evaluations=12, data=tokens(6, seed=4))) for s in ("alps", "sparsegpt")]
    assert counts_of(results[0]) == counts_of(results[1])
    assert results[0].refinement["points"][0][2] == results[1].refinement["points"][0][2]


def test_the_result_names_the_score_of_its_curves(tmp_path):
    result = pruned("alps")
    assert "score alps (curves: sparsegpt)" in summary_of(result, tmp_path)
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


def test_every_score_but_alps_has_its_own_curves():
    assert [score_of_curves(s) for s in ("magnitude", "wanda", "sparsegpt", "mfac")] == [
        "magnitude",
        "wanda",
        "sparsegpt",
        "mfac",
    ]
