"""Operations: the published table for a vision transformer, and whole runs by adding up their steps."""

import pytest

from leanstep.sparsity import NM, Schedule
from leanstep.sparsity.training.flops import training_operations

# ViT-B/16 at 224 x 224: 12 blocks of width 768 over 197 tokens, 196 patches of 16 x 16 x 3, 1000 classes
TOKENS, WIDTH, BLOCKS = 197, 768, 12
FF, QKV, PROJECTION = 8 * WIDTH**2, 3 * WIDTH**2, WIDTH**2
ATTENTION = 2 * TOKENS * TOKENS * WIDTH
MACS = BLOCKS * (TOKENS * (FF + QKV + PROJECTION) + ATTENTION) + 196 * WIDTH * 768 + WIDTH * 1000


def vit(pattern, *, qkv=False):
    weights = BLOCKS * (FF + QKV if qkv else FF)
    return [(weights, NM.parse(pattern))]


@pytest.mark.parametrize(
    ("pattern", "forward", "training", "with_qkv"),
    [
        ("2:4", 0.682, 0.788, 0.563),
        ("1:4", 0.524, 0.682, 0.345),
        ("1:8", 0.444, 0.630, 0.236),
        ("1:16", 0.405, 0.603, 0.181),
        ("1:32", 0.385, 0.590, 0.154),
        ("1:128", 0.370, 0.580, 0.134),
    ],
)
def test_the_table_of_a_vision_transformer(pattern, forward, training, with_qkv):
    # forward and the input's gradient save the same, so twice the forward pass is a run without the weight's gradient
    for layers, fraction in ((vit(pattern), forward), (vit(pattern, qkv=True), with_qkv)):
        found = training_operations(4 * MACS, layers, Schedule(total_steps=1), steps=1, tokens=TOKENS)
        assert found.theoretical / found.dense == pytest.approx(fraction, abs=6e-4)
    run = training_operations(6 * MACS, vit(pattern), Schedule(total_steps=1), steps=10, tokens=TOKENS)
    assert run.dense == 60 * MACS
    assert run.fractions()[0] == pytest.approx(training, abs=6e-4)
    # sparse units know 2:4 and nothing else
    assert (run.hardware < run.dense) == (pattern == "2:4")


def test_hardware_takes_the_transposed_product_for_transposable_masks_only():
    layers = [(1000, NM(2, 4))]
    options = {"steps": 1, "tokens": 3}
    plain = training_operations(18_000, layers, Schedule(total_steps=1), **options)
    both = training_operations(18_000, layers, Schedule(total_steps=1), **options, transposable=True)
    # three products of 6000: one of them halved, or two
    assert (plain.theoretical, plain.hardware) == (12_000, 15_000)
    assert (both.theoretical, both.hardware) == (12_000, 12_000)


def test_decayed_weights_cost_as_much_as_any():
    layers = [(1000, NM(2, 4))]
    schedule = Schedule(kind="mdgf-linear", total_steps=100, decay=0.1)
    run = training_operations(6000, layers, schedule, steps=100, tokens=1)
    # alpha is above zero in the first ten steps
    assert run.theoretical == 10 * 6000 + 90 * 4000


@pytest.mark.parametrize("kind", ["constant", "sdgf-stepwise", "sdgf-geometric", "mdgf-exponential"])
def test_a_run_is_the_sum_of_its_steps(kind):
    layers = [(64, NM(2, 4)), (128, NM(1, 8)), (32, NM(2, 4))]
    schedule = Schedule(kind=kind, total_steps=40, dense=0.2, finetune=0.1)
    run = training_operations(3000, layers, schedule, steps=50, tokens=2)
    theoretical = hardware = 0.0
    for step in range(50):
        theoretical += 3000
        hardware += 3000
        for numel, target in layers:
            stage = schedule.at(step, target)
            if stage.alpha == 0:
                theoretical -= 2 * (2 * numel * 2) * stage.pattern.sparsity
                hardware -= (2 * numel * 2) * stage.pattern.sparsity * (stage.pattern == NM(2, 4))
    assert run.dense == 150_000
    assert run.theoretical == pytest.approx(theoretical) and run.hardware == pytest.approx(hardware)
