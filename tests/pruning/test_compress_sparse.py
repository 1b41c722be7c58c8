"""Compressing to sparse files: zeros and codes in one sweep, and folders that read back as the model that was left."""

import pytest
import torch
from pruned_models import make_gpt2, make_llama, make_mixtral, save_model, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from leanstep.kernels import bitmask_pack, bitmask_quantize, bitmask_unpack
from leanstep.pruning import compress, compress_checkpoint, layer_pruner
from leanstep.pruning.compress import files, sparse
from leanstep.pruning.compress.menu import LayerCompressor
from leanstep.pruning.score.base import LayerStatistics
from leanstep.pruning.score.sparsegpt import damped_gram
from leanstep.sparsity import export_folder, load_sparse


def statistics_and_weight(columns: int, rows: int = 24) -> tuple[LayerStatistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed
    statistics = LayerStatistics(len(inputs), gram=inputs.T @ inputs)
    return statistics, torch.randn(rows, columns, generator=generator) * 0.02


def scale_of_each(scales: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return (scales[:, None] if scales.dim() == 1 else scales.float().repeat_interleave(64, 1)[:, : shape[1]]).expand(
        shape
    )


def output_error(change: torch.Tensor, statistics: LayerStatistics) -> float:
    return float(((change @ statistics.gram) * change).sum())


@pytest.mark.parametrize("is_transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("level", ["int8 30%", "int4 0%", "int4 50%"])
def test_the_sweep_is_that_of_sparsegpt_by_its_definition(level, is_transposed):
    """Each weight in turn becomes zero or its nearest value; the others move so that the quadratic error is least."""
    statistics, weight = statistics_and_weight(128)
    pruner = LayerCompressor(weight, statistics, is_transposed=is_transposed)
    values, (name, scales) = pruner.prune(level).weight, pruner.encoded
    codes, zeros = level.split()
    most, count = {"int8": 127, "int4": 7}[codes], weight.numel() * int(zeros.removesuffix("%")) // 100
    stored_shape = weight.T.shape if is_transposed else weight.shape
    scale = scale_of_each(scales, tuple(stored_shape))
    scale = scale.T if is_transposed else scale
    hessian = damped_gram(statistics.gram, 0.01)
    errors = weight.double().square() / torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal().square()
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[errors.flatten().argsort(stable=True)[:count]] = False
    mask, current = mask.view_as(weight), weight.double()
    expected = torch.empty_like(current)
    for j in range(weight.shape[1]):
        rounded = (current[:, j] / scale[:, j]).round().clamp(-most, most) * scale[:, j]
        expected[:, j] = rounded * mask[:, j]
        # least of d^T H d over the columns from j on, for the given change of column j
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = (current[:, j] - expected[:, j]) / inverse[0, 0]
        current[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
    # ties of scores and of roundings
    assert name == level and (values - expected).abs().gt(1e-6).float().mean() < 0.01
    assert int(values.count_nonzero()) <= weight.numel() - count
    assert not values[values == 0].signbit().any()


def test_zeros_and_codes_in_one_sweep_cost_less_than_one_after_the_other():
    statistics, weight = statistics_and_weight(256)
    pruned = layer_pruner(weight, "sparsegpt", statistics).prune(weight.numel() // 2).weight
    packed, mask, offsets = bitmask_pack(pruned)
    codes, scales = bitmask_quantize(packed, offsets, mask, bits=4)
    later = bitmask_unpack(codes, mask, offsets, tuple(weight.shape), scales)
    together = LayerCompressor(weight, statistics).prune("int4 50%").weight
    zeros, later, together = (output_error(one - weight, statistics) for one in (pruned, later, together))
    assert zeros < together < zeros + 0.7 * (later - zeros)


def test_at_as_many_bits_codes_of_fewer_cost_less_than_more_zeros():
    """So the menu has no zeros with 16 bits, and few with 8."""
    statistics, weight = statistics_and_weight(256)
    make = LayerCompressor(weight, statistics).prune
    # 1 bit of a mask, and 16 bits of half of the weights, or 8 of all
    zeros = layer_pruner(weight, "sparsegpt", statistics).prune(weight.numel() // 2).weight
    assert output_error(make("int8 0%").weight - weight, statistics) < 0.1 * output_error(zeros - weight, statistics)
    for eight, four in (("int8 50%", "int4 6%"), ("int8 40%", "int4 0%")):
        fewer, more = (output_error(make(level).weight - weight, statistics) for level in (four, eight))
        assert fewer < more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dtype", "settings"),
    [
        (lambda: make_llama(2, hidden_size=80), torch.float32, {"curves": "measured"}),
        (lambda: make_llama(2, hidden_size=80), torch.bfloat16, {"curves": "fisher", "reconstruct": 8}),
        (lambda: make_gpt2(n_embd=80), torch.float32, {"curves": "fisher", "reconstruct": 8}),
        (lambda: make_gpt2(n_embd=80), torch.bfloat16, {"curves": "fisher", "score": "nearest"}),
    ],
    ids=["llama", "llama-bf16", "gpt2", "gpt2-bf16"],
)
def test_a_sparse_folder_reads_back_as_the_compressed_model(make, dtype, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse, "_ZEROS", {"int8": (0,), "int4": (0, 30, 60)})
    values, convert = {}, files.make_sparse

    def spied(folder, coded):
        values.update(load_file(folder / "model.safetensors"))
        convert(folder, coded)

    monkeypatch.setattr(files, "make_sparse", spied)
    folder = save_model(make().to(dtype), tmp_path / "model")
    size = int((folder / "model.safetensors").stat().st_size / (8 * dtype.itemsize) * 9)
    options = {"size": size, "held_out": tokens(2, seed=1), "batch_size": 2, **settings}
    result = compress_checkpoint(folder, tmp_path / "out", tokens(8), format="sparse", **options)
    assert 0.85 * size < (tmp_path / "out" / "model.safetensors").stat().st_size <= size
    assert len(set(result.allocation.patterns.values())) > 1 and 0.02 < result.sparsity < 0.6
    dense = AutoModelForCausalLM.from_pretrained
    export_folder(tmp_path / "out", tmp_path / "back", format="dense")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == values.keys() and all(torch.equal(back[name], values[name]) for name in values)
    logits = [load(tmp_path / name)(tokens(1)).logits for load, name in ((load_sparse, "out"), (dense, "back"))]
    error = (logits[0] - logits[1]).abs().max() / logits[1].abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)


def test_fused_experts_have_no_codes_in_sparse_files():
    with pytest.raises(ValueError, match=r"gate_up_proj\[0\]: .* of a fused expert; exclude it"):
        compress(make_mixtral(), tokens(4), pattern="sparse", bits_per_weight=4.0)


def test_files_hold_the_levels_of_their_menu(tmp_path):
    folder = save_model(make_llama(1), tmp_path / "model")
    with pytest.raises(ValueError, match="sparse has the levels of pattern sparse; got pattern ggml"):
        compress_checkpoint(folder, tmp_path / "out", tokens(4), format="sparse", pattern="ggml", size=10**4)
    assert not (tmp_path / "out").exists()
