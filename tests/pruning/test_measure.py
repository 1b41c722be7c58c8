"""Curves: what they measure, that a prefix cache changes no bit of them, and that nothing is left behind."""

import math

import architectures
import pytest
import torch
from pruned_models import MODELS, make_cnn, make_gpt2, make_llama, make_mixtral, tokens
from torch import nn

from leanstep.pruning import find_targets, layer_pruner, measure_curves
from leanstep.pruning.folder.text import token_sequences
from leanstep.pruning.measure.activation_cache import ActivationCache
from leanstep.pruning.measure.batches import Batch, as_batches, batches_hash
from leanstep.pruning.measure.curve_file import weights_hash
from leanstep.pruning.measure.measurement import Measurement
from leanstep.pruning.measure.metrics import KL, METRICS, KLTopK, Metric, kl_divergence, make_metric, summarise
from leanstep.pruning.score.calibration import collect_inputs, prune_group, statistics_for
from leanstep.pruning.score.targets import make_groups, split_count

LEVELS = (0.5, 0.9)


@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_cache_changes_no_bit_of_a_curve(kind):
    make, data = MODELS[kind]
    model, samples = make(), data(4)
    before = weights_hash(model)
    last = list(model.modules())[-1]
    cached = measure_curves(model, samples, levels=LEVELS, batch_size=2)
    assert cached == measure_curves(model, samples, levels=LEVELS, batch_size=2, prefix_cache=False)
    assert weights_hash(model) == before
    assert last.__dict__.get("forward") is None
    assert list(cached) == [target.name for target in find_targets(model)]
    # an expert that few tokens go to may have nothing to lose
    moved = [curve for curve in cached.values() if 0 == curve.distortion[0] < curve.distortion[1]]
    assert len(moved) > 0.8 * len(cached)


def test_a_prefix_cache_saves_nearly_half_of_the_work():
    model, samples = make_llama(8), tokens(4, length=4)
    runs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    sums = {}
    for cached in (True, False):
        runs.clear()
        measure_curves(model, samples, levels=(0.3, 0.6, 0.9), score="magnitude", prefix_cache=cached)
        sums[cached] = sum(runs)
    # the reference, once that nothing changes it, and the levels; behind a cache once more that it changes nothing
    assert sums[False] == (2 + 8 * 7 * 3) * 8 * 4
    assert sums[True] < 0.7 * sums[False]


def test_a_curve_is_the_distortion_of_one_pruned_matrix():
    model, samples = make_llama(), tokens(4)
    curves = measure_curves(model, samples, levels=(0.5,), score="magnitude", metric="kl", batch_size=3)
    target = find_targets(model)[8]
    with torch.no_grad():
        dense = model(samples).logits.double().log_softmax(-1)
        weight = target.weight
        weight[weight.abs() <= weight.abs().flatten().kthvalue(weight.numel() // 2).values] = 0
        pruned = model(samples).logits.double().log_softmax(-1)
    values = (dense.exp() * (dense - pruned)).sum(-1).mean(-1)
    curve = curves[target.name]
    assert curve.counts == (target.layer.numel, target.layer.numel // 2)
    assert curve.distortion[1] == pytest.approx(values.mean().item(), rel=1e-3)
    assert curve.stderr[1] == pytest.approx(values.std().item() / math.sqrt(len(values)), rel=1e-2)


class _Failing(Metric):
    name = "failing"
    calls = 0

    def reference(self, output, batch):
        return None

    def compare(self, reference, output, batch):
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("the metric failed")
        return torch.zeros(batch.size, dtype=torch.float64), torch.ones(batch.size, dtype=torch.float64)


def test_a_metric_that_raises_leaves_the_model_as_it_was():
    model = make_llama().train()
    before = weights_hash(model)
    with pytest.raises(RuntimeError, match="the metric failed"):
        measure_curves(model, tokens(4), metric=_Failing())
    assert weights_hash(model) == before
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


class _Skipping(nn.Module):
    """A stage whose input is needed again two stages on."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        first = self.blocks[0](x).tanh()
        second = self.blocks[1](first).tanh()
        return self.blocks[3](self.blocks[2](second).tanh() + first)


def test_a_prefix_is_not_cached_where_more_than_its_output_is_needed_later():
    model, data = _Skipping(), torch.randn(8, 6)
    batches = as_batches(data, model)
    # behind the third block the sum with the first one's output is still to come
    assert ActivationCache(model, batches).starts == (0, 1)
    cached = measure_curves(model, data, levels=LEVELS)
    assert cached == measure_curves(model, data, levels=LEVELS, prefix_cache=False)


def test_a_chain_of_blocks_is_tried_block_by_block():
    """Trying the starts one by one would run all blocks that follow each."""
    model, calls = make_llama(8), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))
    batches = as_batches(tokens(2), model)
    assert ActivationCache(model, batches).starts == tuple(range(11))  # with embedding, norm and head
    # two whole passes; to go on and to try, two blocks for each start
    assert len(calls) <= 2 * 8 + 2 * 8


class _Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.dropout(self.linear(x), 0.5, training=True)


def test_a_model_whose_output_is_not_reproducible_is_refused():
    with pytest.raises(ValueError, match="the same inputs twice differ"):
        measure_curves(_Noisy(), torch.randn(4, 4))
    broken = nn.Sequential(nn.Linear(4, 4))
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        measure_curves(broken, torch.randn(4, 4), score="magnitude")


def test_measuring_goes_on_where_it_was_cut_and_only_under_the_same_circumstances(tmp_path):
    model, samples, file = make_llama(2), tokens(4), tmp_path / "curves.jsonl"
    whole = measure_curves(model, samples, levels=LEVELS, resume=file)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 14 * 2
    file.write_text("".join(lines[:10]) + lines[10][:7])
    seen = []
    again = measure_curves(model, samples, levels=LEVELS, resume=file, progress=lambda done, *rest: seen.append(done))
    assert again == whole
    assert seen[0] == 10 and seen[-1] == 28
    assert file.read_text() == "".join(lines)
    for change, message in (
        ({"metric": "mse_logits"}, "metric: kl then, mse_logits now"),
        ({"score": "magnitude"}, "score: wanda then, magnitude now"),
        ({"levels": (0.5,)}, r"levels: of model\.layers\.0\.\S+ \[.*\] then, \[\d+, \d+\] now"),
        (
            {"groups": make_groups(find_targets(model, exclude=["*.0.*"]), "matrix")},
            r"levels: 7 more then \(model\.layers\.0\.\S+, .* and 4 more\)\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"other circumstances.*{message}"):
            measure_curves(model, samples, **{"levels": LEVELS, "resume": file} | change)
    with pytest.raises(ValueError, match="data: "):
        measure_curves(model, tokens(4, seed=1), levels=LEVELS, resume=file)
    find_targets(model)[0].weight[0, 0] = 1.0
    with pytest.raises(ValueError, match="weights: "):
        measure_curves(model, samples, levels=LEVELS, resume=file)
    file.write_text("nothing of ours\n")
    with pytest.raises(ValueError, match="holds no measured curves"):
        measure_curves(model, samples, levels=LEVELS, resume=file)


class _Scaled(KL):
    """A metric with settings of its own."""

    name = "scaled"

    def __init__(self, weights, power=2.0):
        self.weights, self.power, self.calls = weights, power, 0


def test_metrics_of_one_name_are_told_apart_by_their_settings(tmp_path):
    model, data, file = make_llama(1), tokens(2), tmp_path / "curves.jsonl"
    arguments = {"levels": (0.5,), "score": "magnitude", "resume": file}
    few = measure_curves(model, data, metric=KLTopK(2), **arguments)
    assert {curve.metric for curve in few.values()} == {"kl_topk(k=2)"}
    with pytest.raises(ValueError, match=r"metric: kl_topk\(k=2\) then, kl_topk now"):
        measure_curves(model, data, metric=KLTopK(512), **arguments)
    # the name alone at the default settings, as in files of older versions
    assert [make_metric(name, model).identity for name in METRICS] == list(METRICS)
    one, other = (_Scaled(torch.full((3,), value)).identity for value in (1.0, 2.0))
    assert one != other and one == _Scaled(torch.ones(3)).identity and "power" not in one
    assert "power=3.0" in _Scaled(torch.ones(3), 3.0).identity


def test_a_matrix_of_a_group_gets_no_more_weights_than_it_has():
    model = make_llama(1)
    group = make_groups(find_targets(model), "role")[0]
    first, *others = group.targets
    first.module.weight.data[1:] = 0
    few, asked = int(first.weight.count_nonzero()), 120
    pruners = {target.name: layer_pruner(target.weight, "magnitude") for target in group.targets}
    left = {target.name: int(weight.count_nonzero()) for target, weight in prune_group(group, pruners, (asked, ""))}
    assert others and left[first.name] == few and sum(left.values()) == asked


def test_matrices_of_a_group_share_a_level():
    model, samples = make_llama(2), tokens(4)
    curves = measure_curves(model, samples, levels=(0.5,), granularity="role")
    # a matrix that is alone keeps its name
    block = lambda n: [*(f"block {n}: {role}" for role in ("qk", "vo", "up")), f"model.layers.{n}.mlp.down_proj.weight"]  # noqa: E731
    assert list(curves) == block(0) + block(1)
    sizes = {group.name: group.layer.numel for group in make_groups(find_targets(model), "role")}
    assert {name: curve.numel for name, curve in curves.items()} == sizes
    assert list(measure_curves(model, samples, levels=(0.5,), granularity="block")) == ["block 0: all", "block 1: all"]
    assert split_count(7, [10, 10, 1]) == [4, 3, 0]
    assert [sum(split_count(kept, [3, 5, 9])) for kept in range(18)] == list(range(18))


def test_levels_can_be_patterns():
    model = make_llama(1)
    curves = measure_curves(model, tokens(2), pattern="N:8", score="magnitude")
    assert next(iter(curves.values())).patterns == ("8:8", "7:8", "6:8", "5:8", "4:8", "3:8", "2:8")
    with pytest.raises(ValueError, match="40 inputs, which groups of 16 do not fill"):
        measure_curves(model, tokens(2), pattern="N:16")


def test_levels_beside_a_pattern_are_refused():
    with pytest.raises(ValueError, match="pattern N:8 has its own levels"):
        measure_curves(make_llama(1), tokens(2), pattern="N:8", levels=LEVELS, score="magnitude")


@pytest.mark.parametrize("metric", ["kl", "kl_topk", "mse_logits"])
def test_every_metric_gives_curves(metric):
    model = make_llama(1)
    curves = measure_curves(model, tokens(4), metric=metric, levels=LEVELS, score="magnitude")
    assert all(curve.metric == metric for curve in curves.values())
    rising = [curve for curve in curves.values() if 0 < curve.distortion[1] < curve.distortion[2]]
    assert len(rising) >= 6
    assert not any(module._forward_pre_hooks for module in model.modules())


def values_of(metric, dense, pruned, mask=None, model=None):
    """(sums, counts) of a metric between two tensors of logits."""
    made = make_metric(metric, model or make_llama(1))
    batch = as_batches([{"input_ids": torch.zeros(dense.shape[:2], dtype=torch.long)}], nn.Linear(1, 1))[0]
    batch = type(batch)(batch.args, batch.kwargs, mask)
    return made.compare(made.reference(dense, batch), pruned, batch)


def test_kl_is_the_divergence_and_to_second_order_a_quadratic_form():
    dense, step = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    sums, counts = values_of("kl", dense, dense + step)
    expected = nn.functional.kl_div(
        (dense + step).log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
    ).sum((1, 2))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)
    assert counts.tolist() == [5, 5]
    assert values_of("kl", dense, dense)[0].tolist() == [0, 0]
    shift = torch.randn(2, 5, 1, dtype=torch.float64)
    torch.testing.assert_close(values_of("kl", dense, dense + step + shift)[0], sums, rtol=1e-4, atol=0)
    p = dense.softmax(-1)
    small = 0.02 * step
    quadratic = 0.5 * ((p * small**2).sum(-1) - (p * small).sum(-1) ** 2).sum(-1)
    torch.testing.assert_close(values_of("kl", dense, dense + small)[0], quadratic, rtol=0.03, atol=0)


def test_padding_does_not_count():
    dense, pruned = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for metric in ("kl", "kl_topk", "mse_logits"):
        sums, counts = values_of(metric, dense, pruned, mask)
        other = pruned.clone()
        other[0, 3:] += 100.0
        assert torch.equal(values_of(metric, dense, other, mask)[0], sums)
        assert counts.tolist() == [3, 5]


def test_kl_over_the_top_entries_and_the_rest_is_at_most_kl_and_equal_with_all():
    dense, pruned = torch.randn(2, 5, 40), torch.randn(2, 5, 40)
    whole, top = values_of("kl", dense, pruned)[0], values_of(KLTopK(8), dense, pruned)[0]
    assert (top < whole).all() and (top > 0.1 * whole).all()
    torch.testing.assert_close(values_of(KLTopK(39), dense, pruned)[0], whole, rtol=1e-4, atol=0)


@pytest.fixture(params=[True, False], ids=["with gradients", "without"])
def gradients(request):
    """On a CPU without gradients, most values take a shorter form."""
    with torch.set_grad_enabled(request.param):
        yield


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("metric", ["kl", "kl_topk"])
@pytest.mark.parametrize("step", [1e-5, 1e-3, 1.0])
def test_kl_keeps_its_digits_where_the_outputs_are_near(metric, step):
    """A sum of p (log p - log q) in fp32 is rounding noise there, and negative about as often as not."""
    dense = 3 * torch.randn(4, 8, 300)
    pruned = dense + step * torch.randn(4, 8, 300)
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    sums = values_of(metric, dense, pruned)[0]
    torch.testing.assert_close(sums, (p.exp() * (p - q)).sum((1, 2)), rtol=1e-2 if step < 1e-4 else 1e-4, atol=0)
    # what no entry of the dense model's output has, and what only it has
    assert values_of(metric, dense * 100, dense * 100 + step)[0].min() >= 0
    assert values_of(metric, dense * 100, pruned * -100)[0].isfinite().all()


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("shift", [30.0, 60.0, 200.0])
def test_kl_where_the_pruned_model_is_sure_of_what_the_dense_one_excludes(shift):
    dense = torch.randn(5, 40, dtype=torch.float64)
    pruned = dense.clone()
    dense[:, 3] -= shift
    p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(kl_divergence(p.float(), q.float()).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("metric", ["kl", "kl_topk"])
def test_a_sample_without_a_token_that_counts_has_none(metric):
    dense, pruned = torch.randn(2, 4, 30), torch.randn(2, 4, 30)
    batch = Batch((torch.zeros(2, 4),), mask=torch.tensor([[True] * 4, [False] * 4]))
    one = make_metric(metric, nn.Linear(1, 1))
    sums, counts = one.compare(one.reference(dense, batch), pruned, batch)
    assert counts.tolist() == [4, 0] and sums[0] > 0 and sums[1] == 0


@pytest.mark.usefixtures("gradients")
def test_kl_of_entries_without_probability():
    p = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    q = torch.tensor([[0.5, 0.5, 0.0]]).log()
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([0.5]).log().neg())
    assert kl_divergence(q, p).item() == torch.inf and kl_divergence(p, p).item() == 0


@pytest.mark.parametrize("metric", [KL(), KLTopK(2), KLTopK(3)])
def test_the_gradient_at_a_logit_of_minus_infinity_is_finite(metric):
    dense, batch = torch.tensor([[0.3, 1.0, -torch.inf]]), Batch((torch.zeros(1, 1),))
    logits = torch.tensor([[0.4, 0.8, -torch.inf]], requires_grad=True)
    metric.compare(metric.reference(dense, batch), logits, batch)[0].sum().backward()
    expected = logits.detach().softmax(-1) - dense.softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


def test_kl_over_few_entries_counts_a_small_rest():
    """1 - sum(top) loses a rest of 1e-9, which the pruned model may give a hundred times."""
    dense = torch.zeros(1, 1, 20)
    dense[..., 4:] = -24.0
    pruned = dense.clone()
    pruned[..., 4:] = -10.0
    p, q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum((1, 2))
    torch.testing.assert_close(values_of(KLTopK(4), dense, pruned)[0], expected, rtol=1e-4, atol=0)


def test_mse_of_a_language_model_does_not_see_what_softmax_does_not_see():
    dense, pruned = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    sums = values_of("mse_logits", dense, pruned)[0]
    torch.testing.assert_close(values_of("mse_logits", dense, pruned + torch.randn(2, 5, 1))[0], sums)
    plain = values_of("mse_logits", dense, pruned, model=make_cnn())[0]
    torch.testing.assert_close(plain, (dense - pruned).square().mean(-1).sum(-1).double())


def test_the_hash_of_batches_tells_numbers_and_names_apart():
    x = torch.arange(12).reshape(2, 6)
    hashes = [
        batches_hash([Batch((), kwargs)])
        for kwargs in ({"a": x}, {"b": x}, {"input_ids": x}, {"a": x, "scale": torch.tensor(1.0)})
    ]
    assert len(set(hashes)) == 4
    # that of tokens is the one in the files of earlier versions
    [batch] = as_batches(x, make_llama(1))
    assert batches_hash([batch])[:16] == "52b4b34fbf044420"


def test_the_standard_error_is_that_of_a_ratio():
    sums, counts = torch.rand(200, dtype=torch.float64), torch.full((200,), 4.0, dtype=torch.float64)
    found = summarise([(sums[:50], counts[:50]), (sums[50:], counts[50:])])
    assert found.mean == pytest.approx((sums / 4).mean().item())
    assert found.stderr == pytest.approx((sums / 4).std().item() / math.sqrt(200), rel=1e-6)


def test_statistics_leave_padding_out():
    model = make_llama(1)
    samples = tokens(2)
    mask = torch.ones_like(samples)
    mask[0, 10:] = 0
    batches = as_batches([{"input_ids": samples, "attention_mask": mask}], model)
    target = next(target for target in find_targets(model) if "up_proj" in target.name)
    seen = []
    handle = target.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        found = statistics_for(ActivationCache(model, batches), [target], ("square_sum", "gram"))[target.name]
    handle.remove()
    rows = seen[-1][mask.bool()]
    assert found.count == 26 == len(rows)
    assert found.square_sum.dtype == torch.float64
    torch.testing.assert_close(found.square_sum, rows.double().square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-5)


def test_the_inputs_of_every_expert_are_seen():
    model, samples = make_mixtral(), tokens(4)
    experts = [target for target in find_targets(model) if target.expert is not None]
    inputs: dict[str, list[torch.Tensor]] = {target.name: [] for target in experts}
    cache = ActivationCache(model, as_batches(samples, model))
    collect_inputs(cache, experts, {name: rows.append for name, rows in inputs.items()})
    routed = sum(len(rows) for name, parts in inputs.items() if "layers.0" in name and "down" in name for rows in parts)
    assert routed == 2 * samples.numel()
    assert model.config._experts_implementation == "grouped_mm"
    for target in experts:
        for rows in inputs[target.name]:
            assert rows.shape[1] == target.weight.shape[1]


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4"])
def test_statistics_of_experts_leave_padding_out(name):
    """They are those of the same sequences without padding, one by one."""
    model, samples, mask = architectures.make(name), tokens(3), torch.ones(3, 16, dtype=torch.int64)
    mask[0, 10:] = mask[2, 13:] = 0
    experts = [target for target in find_targets(model) if target.expert is not None]
    padded = as_batches([{"input_ids": samples, "attention_mask": mask}], model)
    single = as_batches(
        [{"input_ids": row[None, : int(length)]} for row, length in zip(samples, mask.sum(1), strict=True)], model
    )
    with torch.no_grad():
        without, alone = (
            statistics_for(ActivationCache(model, batches), experts, ("square_sum", "gram"))
            for batches in (padded, single)
        )
    assert sum(statistics.count for statistics in without.values()) > 0
    for expert, statistics in without.items():
        assert statistics.count == alone[expert].count
        torch.testing.assert_close(statistics.square_sum, alone[expert].square_sum, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(statistics.gram, alone[expert].gram, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": (2, 1)}, {"padding": "same"}])
def test_a_convolution_is_a_product_with_its_rows_of_inputs(options):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False, **options))
    batches = as_batches(torch.randn(2, 3, 8, 8), model)
    (target,) = find_targets(model)
    rows: list[torch.Tensor] = []
    collect_inputs(ActivationCache(model, batches), [target], {target.name: rows.append})
    expected = model(batches[0].args[0]).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(rows[0] @ target.weight.T, expected)


def test_what_has_no_rows_of_inputs_is_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="score it by magnitude"):
        measure_curves(model, torch.randn(2, 4, 8, 8), score="wanda")
    assert measure_curves(model, torch.randn(2, 4, 8, 8), score="magnitude")


def test_targets_leave_out_what_is_no_hidden_matrix():
    names = {kind: [target.name for target in find_targets(make())] for kind, (make, _) in MODELS.items()}
    assert len(names["llama"]) == 3 * 7 and all(".layers." in name for name in names["llama"])
    assert len(names["gpt2"]) == 2 * 4 and all(".h." in name for name in names["gpt2"])
    assert len(names["mixtral"]) == 2 * (4 + 3 * 2) and not any("gate.weight" in name for name in names["mixtral"])
    assert len(names["vit"]) == 2 * 6 and not any("embed" in name or "classifier" in name for name in names["vit"])
    # a small network has no embedding; its first convolution counts and its head, which is called fc, too
    assert names["cnn"][0] == "conv1.weight" and names["cnn"][-1] == "fc.weight"
    shapes = {target.name: target.layer.shape for target in find_targets(make_gpt2())}
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (64, 16)


def test_rules_that_match_nothing_and_weights_that_cannot_be_pruned_are_refused():
    model = make_llama(1)
    assert len(find_targets(model, include=["*.mlp.*"])) == 3
    assert len(find_targets(model, exclude=["*.mlp.*"])) == 4
    assert find_targets(model, include=["lm_head*"])[0].name == "lm_head.weight"
    with pytest.raises(ValueError, match=r"'\*.ffn.\*' matches no matrix"):
        find_targets(model, include=["*.ffn.*"])
    with pytest.raises(ValueError, match="of the kind 'embedding', which is never pruned"):
        find_targets(model, include=["*embed*"])
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="up_proj.weight is quantised"):
        find_targets(model)
    nn.utils.parametrizations.orthogonal(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ValueError, match="down_proj.weight is parametrized"):
        find_targets(model)


def test_sequences_are_cut_from_text_without_overlap():
    found = token_sequences(lambda text: list(text.encode()), ["abcdef", "ghijkl"], 3, 4, end=0, seed=1)
    assert found.shape == (3, 4)
    assert sorted(found.flatten().tolist()) == sorted([*b"abcdef", 0, *b"ghijk"])
    with pytest.raises(ValueError, match="4 sequences of 4 tokens take 16 tokens of text, it has 14"):
        token_sequences(lambda text: list(text.encode()), ["abcdef", "ghijkl"], 4, 4, end=0, seed=1)


def test_every_sequence_begins_as_the_tokenizer_begins_a_text():
    pieces = token_sequences(lambda text: list(text.encode()), ["abcdef", "ghijkl"], 4, 4, begin=(1,), end=0, seed=1)
    assert pieces[:, 0].tolist() == [1] * 4
    assert sorted(pieces[:, 1:].flatten().tolist()) == sorted([*b"abcdef", 0, *b"ghijk"])
    with pytest.raises(ValueError, match="more than the 4 tokens before a text, got 4"):
        token_sequences(lambda text: list(text.encode()), ["abcdef"], 1, 4, begin=(1, 2, 3, 4), end=0, seed=1)


def test_the_joint_distortion_of_unchanged_weights_is_zero():
    model = make_gpt2()
    measurement = Measurement(model, as_batches(tokens(4), model))
    assert measurement.joint().mean == 0.0
    find_targets(model)[0].weight.zero_()
    assert measurement.joint().mean > 0.0


def test_points_of_another_configuration_are_refused(tmp_path):
    model, samples, file = make_llama(1), tokens(2), tmp_path / "curves.jsonl"
    curves = measure_curves(model, samples, levels=(0.5,), resume=file)
    model.config._name_or_path = "elsewhere"
    assert measure_curves(model, samples, levels=(0.5,), resume=file) == curves
    model.config.rms_norm_eps = 0.1
    with pytest.raises(ValueError, match="other circumstances .configuration: "):
        measure_curves(model, samples, levels=(0.5,), resume=file)
