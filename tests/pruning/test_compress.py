"""Compressing to a size: rounding on ggml's grids, the budget in bytes, and the model that comes out."""

import sys
from types import SimpleNamespace

import pytest
import torch
from pruned_models import make_gpt2, make_llama, tokens

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp_py_sync")
from leanstep._gguf import ggml  # noqa: E402
from leanstep._gguf.ggml import TYPES, dequantize, quantize  # noqa: E402
from leanstep.pruning import Curve, InfeasibleBudget, Refinement, compress  # noqa: E402
from leanstep.pruning.compress import menu  # noqa: E402
from leanstep.pruning.compress.grids import grid_of  # noqa: E402
from leanstep.pruning.compress.rounding import rounded  # noqa: E402
from leanstep.pruning.measure.curve_file import weights_hash  # noqa: E402
from leanstep.pruning.score.base import LayerStatistics  # noqa: E402
from leanstep.pruning.score.sparsegpt import damped_gram, inverse_factor  # noqa: E402

# ggml makes large tables for the smallest types
FEW, ALL = ("Q8_0", "Q5_0", "Q4_0"), menu._TYPES
SCALAR = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")


@pytest.fixture(autouse=True)
def few_types(monkeypatch):
    monkeypatch.setattr(menu, "_TYPES", FEW)


def small(layers: int, **settings):
    return make_llama(layers, hidden_size=32, intermediate_size=64, **settings)


def matrix_and_gram(columns: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed
    return torch.randn(24, columns, generator=generator) * 0.02, inputs.T @ inputs


@pytest.mark.parametrize("type", SCALAR)
def test_any_codes_of_a_block_can_be_written(type):
    grid, block = grid_of(type), TYPES[type].block
    data = quantize(torch.randn(8, block), type, torch.ones(block))
    levels = torch.randint(len(grid.shares), (8, block))
    low, span = grid.ends(data)
    written = grid.filled(data, grid.codes[levels])
    values = torch.from_numpy(gguf.quants.dequantize(written.numpy(), gguf.GGMLQuantizationType[type]).copy())
    torch.testing.assert_close(values, low + span * grid.shares[levels], rtol=1e-5, atol=1e-6)
    # the codes that ggml chose are among them
    again = dequantize(data, type, block)
    nearest = (low + span * grid.shares[:, None, None] - again).abs().amin(dim=0)
    assert nearest.max() < 1e-5


def test_types_whose_codes_are_of_several_values_have_no_grid():
    assert grid_of("IQ3_XXS") is None


@pytest.mark.parametrize("type", ["Q4_0", "Q4_K", "IQ3_XXS"])
def test_compensated_errors_cost_less_at_the_output(type):
    weight, gram = matrix_and_gram()
    importance = gram.diagonal() / 2048
    factor = inverse_factor(gram, 0.01).float()
    errors = []
    for given in (None, factor):
        values, data = rounded(weight, type, importance, given)
        other = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type])
        assert torch.equal(values, torch.from_numpy(other.copy()))
        errors.append(float(((values - weight) @ gram * (values - weight)).sum()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "types", [("Q5_K", "Q5_0"), ("Q4_K", "IQ4_NL", "Q4_0"), ("IQ4_XS", "MXFP4"), ("Q3_K", "IQ3_S")]
)
def test_the_menu_has_the_best_of_the_types_with_as_many_bits(types):
    weight, gram = matrix_and_gram()
    factor, importance = inverse_factor(gram, 0.01).float(), gram.diagonal() / 2048
    changes = {type: rounded(weight, type, importance, factor)[0] - weight for type in types}
    errors = {type: float((change @ gram * change).sum()) for type, change in changes.items()}
    assert len({TYPES[type].bits for type in types}) == 1
    # the first of the menu stays, where a row can have several
    assert min(errors, key=errors.__getitem__) == next(type for type in ALL if type in types)


def test_the_sweep_is_gptq_by_its_definition():
    """Each weight in turn to its nearest value; the others move so that the quadratic error is least (OBQ)."""
    weight, gram = matrix_and_gram(64)
    values, data = rounded(weight, "Q4_1", None, inverse_factor(gram, 0.01).float())
    grid, hessian = grid_of("Q4_1"), damped_gram(gram, 0.01)
    current, expected = weight.double(), torch.empty_like(weight, dtype=torch.float64)
    for start in (0, 32):
        low, span = grid.ends(quantize(current[:, start : start + 32].float(), "Q4_1"))
        for j in range(start, start + 32):
            levels = low[:, j - start, None] + span[:, j - start, None] * grid.shares
            nearest = (levels - current[:, j, None]).abs().argmin(dim=1)
            expected[:, j] = levels[torch.arange(len(levels)), nearest]
            # least of d^T H d over the columns from j on, for the given change of column j
            inverse = torch.linalg.inv(hessian[j:, j:])
            error = (current[:, j] - expected[:, j]) / inverse[0, 0]
            current[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
    assert (values - expected).abs().gt(1e-6).sum() <= 2  # ties


@pytest.fixture(scope="module")
def compressed():
    model = small(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(menu, "_TYPES", FEW)
        return model, compress(model, tokens(10), bits_per_weight=6.0, curves="measured")


def test_the_bits_of_all_matrices_are_within_the_budget_and_cost_less_than_one_format(compressed):
    model, result = compressed
    names = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert set(result.encoded) == set(result.allocation.patterns) == names
    sizes = {name: data.numel() for name, (_, data) in result.encoded.items()}
    assert sizes == result.allocation.counts
    weights = sum(model.get_parameter(name).numel() for name in names)
    assert 5.5 < 8 * sum(sizes.values()) / weights <= 6.0
    by_curves, uniform = result.compared
    assert (by_curves.method, uniform.method) == ("dp", "uniform") and by_curves.joint < uniform.joint
    assert {type for type, _ in result.encoded.values()} <= {"F16", *FEW}
    assert 8 * result.budget["after"] / weights <= 6.0


def test_the_model_has_the_values_of_the_bytes_and_nothing_else_changes(compressed):
    model, result = compressed
    dense = small(2)
    for name, parameter in model.named_parameters():
        if name not in result.encoded:
            assert torch.equal(parameter, dense.get_parameter(name))
            continue
        type, data = result.encoded[name]
        assert torch.equal(parameter, dequantize(data, type, parameter.shape[1]).to(parameter.dtype))


def test_a_tied_embedding_is_one_matrix_and_others_are_two():
    for tied, count in ((True, 1), (False, 2)):
        model = small(1, tie_word_embeddings=tied)
        result = compress(model, tokens(6), bits_per_weight=6.0, curves="fisher", held_out=False, score="nearest")
        ends = [name for name in result.encoded if "layers" not in name]
        assert len(ends) == count
        assert {result.curves[name].source for name in ends} == {"measured"}


def test_a_search_stays_within_the_bytes():
    model = small(1)
    result = compress(
        model, tokens(12), bits_per_weight=6.0, score="nearest", curves="fisher", refine=Refinement(evaluations=4)
    )
    assert result.refinement["evaluations"] == 4
    assert sum(data.numel() for _, data in result.encoded.values()) <= result.budget["target"]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"bits_per_weight": 3.0}, "3.00 bits per weight.*out of reach: from .*4.50 bits.* to below .*16.00 bits"),
        ({"size": 100}, "out of reach"),
        ({"bytes": 0.9999}, "out of reach"),
        ({}, "expected one size: .*got none"),
        ({"bytes": 0.5, "size": 10**6}, "got bytes=0.5, size=1e"),
        ({"bytes": 25}, "fraction of the dense size"),
        ({"bits_per_weight": float("inf")}, "expected one size"),
        (
            {"bits_per_weight": 5.0, "pattern": "unstructured", "score": "wanda"},
            "pattern must be ggml or sparse, got unstructured",
        ),
        ({"bits_per_weight": 5.0, "score": "wanda"}, "score with pattern ggml must be one of gptq, nearest"),
        ({"bits_per_weight": 5.0, "processes": SimpleNamespace(size=2)}, "one process writes the bytes"),
        ({"bits_per_weight": 5.0, "granularity": "block"}, "leave granularity and allocation out"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(size, message):
    model = small(1)
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        compress(model, tokens(4), **size)
    assert weights_hash(model) == before


@pytest.mark.parametrize("tied", [True, False])
def test_curves_of_second_order_are_corrected_with_those_of_embedding_and_head(tied):
    model = small(1, tie_word_embeddings=tied)
    settings = {"bits_per_weight": 6.0, "score": "nearest", "curves": "fisher"}
    result = compress(model, tokens(12), correction="relinearise", **settings)
    assert sum(data.numel() for _, data in result.encoded.values()) <= result.budget["target"]


def test_a_model_that_has_no_input_embedding_is_compressed():
    class Images(torch.nn.Sequential):
        def get_input_embeddings(self):
            raise NotImplementedError

    model = Images(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    data = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert len(compress(model, data, bits_per_weight=6.0, held_out=data[:2]).encoded) == 2


def test_an_expert_without_a_token_has_a_level_that_needs_importance(monkeypatch):
    pruner = menu.LayerCompressor(torch.randn(4, 256), LayerStatistics())
    assert pruner.prune("IQ2_XXS").weight.isfinite().all()


def test_a_missing_library_is_said_before_anything_is_measured(monkeypatch):
    ggml.ggml_library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp_py_sync", None)
    with pytest.raises(ImportError, match="llama-cpp-py-sync"):
        compress(small(1), iter(()), bits_per_weight=6.0)


def test_curves_of_another_ggml_are_refused(monkeypatch, tmp_path):
    settings = {"bits_per_weight": 6.0, "score": "nearest", "curves": "fisher", "held_out": False}
    compress(small(1), tokens(6), resume=tmp_path / "curves.jsonl", **settings)
    monkeypatch.setattr(ggml, "ggml_version", lambda: "another")
    with pytest.raises(ValueError, match="ggml"):
        compress(small(1), tokens(6), resume=tmp_path / "curves.jsonl", **settings)


def test_a_size_out_of_reach_tells_the_range():
    with pytest.raises(InfeasibleBudget) as error:
        compress(small(1), tokens(4), bits_per_weight=2.0)
    assert 0 < error.value.lowest < error.value.highest


def test_levels_that_a_smaller_one_beats_are_left_out():
    curve = Curve(
        "a", 100, (100, 80, 60, 40), (0.0, 0.3, 0.1, 0.2), (0.0,) * 4, "kl", patterns=("F16", "Q8_0", "Q5_0", "Q4_0")
    )
    clean = curve.cleaned()
    assert (clean.counts, clean.patterns) == ((100, 60, 40), ("F16", "Q5_0", "Q4_0"))
    assert clean.distortion == (0.0, 0.1, 0.2)


@pytest.mark.parametrize("make", [small, lambda layers: make_gpt2(n_embd=32)], ids=["llama", "gpt2"])
def test_reconstruction_trains_codes_and_leaves_them_on_their_grids(make):
    settings = {"bits_per_weight": 5.0, "score": "nearest", "curves": "fisher", "batch_size": 2}
    plain, model = make(2), make(2)
    before = compress(plain, tokens(48), **settings)
    after = compress(model, tokens(48), reconstruct=60, **settings)
    assert before.allocation.patterns == after.allocation.patterns
    trained = [block["name"] for block in after.reconstruction["blocks"] if block["applied"]]
    assert any(name.endswith(".1") for name in trained)
    assert after.reconstruction["held_out"]["mean"] < 0.9 * before.held_out.joint
    changed = {name for name, (_, data) in after.encoded.items() if not torch.equal(data, before.encoded[name][1])}
    assert len(changed) > 3
    for name, (type, data) in after.encoded.items():
        values = dequantize(data, type, data.shape[1] // TYPES[type].size * TYPES[type].block)
        assert torch.equal(model.get_parameter(name), values.T if "c_" in name else values)
