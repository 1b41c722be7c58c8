"""LANTON's noise from the two halves of a batch: the estimate, and the ways gradients are accumulated."""

import copy
import math
import warnings

import pytest
import torch
from lanton_formula import dual_norm
from torch import nn

from leanstep.optimizers import LANTON

NORMS = {"rms": (12, 16), "sign": (12, 16), "vector": (24,)}


def one(norm, dtype=torch.float64, **options):
    param = torch.zeros(NORMS[norm], dtype=dtype).requires_grad_()
    settings = {"lr": 0.0, "noise": "halves", "nuclear": "svd", **options}
    return param, LANTON([{"params": [param], "norm": norm}], **settings)


def accumulated(param, optimizer, samples, share):
    """Backpropagate samples one by one, with a mark after ``share`` of them."""
    param.grad = torch.zeros_like(param)
    for i, sample in enumerate(samples):
        param.grad += sample.to(param.dtype) / len(samples)
        if i + 1 == round(share * len(samples)):
            optimizer.mark_half((i + 1) / len(samples))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("micro", "share"), [(2, 1 / 2), (8, 1 / 2), (4, 3 / 4), (3, 1 / 3)])
def test_its_mean_is_that_of_two_independent_gradients(norm, micro, share):
    """E H, within three standard errors of both estimates, whatever the share of the first part."""
    chance = torch.Generator().manual_seed(0)
    param, optimizer = one(norm, betas=(0.9, 0.0))
    mean = torch.randn(NORMS[norm], generator=chance, dtype=torch.float64)

    def sample():
        return mean + 0.5 * torch.randn(NORMS[norm], generator=chance, dtype=torch.float64)

    estimates, expected = [], []
    for _ in range(200):
        accumulated(param, optimizer, [sample() for _ in range(micro)], share)
        optimizer.step()
        estimates.append(optimizer.noise_report()[0]["H"])
        first, second = (sum(sample() for _ in range(micro)) / micro for _ in range(2))
        expected.append(dual_norm(first - second, norm) ** 2)
    estimates, expected = torch.tensor(estimates), torch.tensor(expected)
    error = math.sqrt((estimates.var() / len(estimates) + expected.var() / len(expected)).item())
    assert abs(estimates.mean() - expected.mean()).item() < 3 * error
    assert error < 0.05 * expected.mean()


def test_it_has_no_drift():
    """The true gradient moves far from step to step; only the noise within a step counts."""
    values = {}
    for noise in ("halves", "previous"):
        param, optimizer = one("vector", noise=noise)
        for step in range(6):
            drift = torch.full(NORMS["vector"], float((-1) ** step), dtype=torch.float64)
            samples = [drift + 0.01 * torch.randn(NORMS["vector"], dtype=torch.float64) for _ in range(4)]
            if noise == "halves":
                accumulated(param, optimizer, samples, 1 / 2)
            else:
                param.grad = sum(samples) / 4
            optimizer.step()
        values[noise] = optimizer.noise_report()[0]["H"]
    assert values["halves"] < 1e-3 * values["previous"]


def test_the_first_step_measures_and_nothing_is_kept_between_steps():
    param, optimizer = one("rms")
    first, second = (torch.randn(NORMS["rms"], dtype=torch.float64) for _ in range(2))
    accumulated(param, optimizer, [first, second], 1 / 2)
    assert "half_grad" in optimizer.state[param]
    optimizer.step()
    expected = 0.1 * 2 * dual_norm((first - second) / 2, "rms") ** 2
    assert optimizer.noise_report()[0]["H"] == pytest.approx(expected, rel=1e-9)
    assert optimizer.state[param].keys() == {"momentum_buffer", "noise", "noise_steps"}
    assert optimizer.state_bytes() == param.numel() * 8 + 8 + 4


def test_a_state_saved_between_the_halves_under_older_names_goes_on():
    (param, optimizer), (twin, resumed) = (one("rms", lr=0.1) for _ in range(2))
    halves = [torch.randn(NORMS["rms"], dtype=torch.float64) for _ in range(2)]
    param.grad = halves[0] / 2
    optimizer.mark_half()
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        group["half_is"], group["half_seen"] = group.pop("half_content"), group.pop("half_marked")
    resumed.load_state_dict(older)
    assert not {"half_is", "half_seen"} & resumed.param_groups[0].keys()
    for p, o in ((param, optimizer), (twin, resumed)):
        p.grad = (halves[0] + halves[1]) / 2
        o.step()
    assert resumed.noise_report()[0]["H"] == optimizer.noise_report()[0]["H"] > 0
    assert torch.equal(param, twin)


def test_clipping_and_scaling_after_mark_whole_do_not_change_the_estimate():
    values = []
    for way in ("plain", "clipped", "scaled"):
        torch.manual_seed(0)
        param, optimizer = one("rms")
        scale = 1024.0 if way == "scaled" else 1.0
        for _ in range(3):
            samples = [torch.randn(NORMS["rms"], dtype=torch.float64) for _ in range(4)]
            param.grad = (samples[0] + samples[1]) / 4 * scale
            optimizer.mark_half(loss_scale=scale)
            param.grad += (samples[2] + samples[3]) / 4 * scale
            optimizer.mark_whole(loss_scale=torch.tensor(scale))
            if way == "clipped":
                nn.utils.clip_grad_norm_([param], 1e-3)
            param.grad /= scale
            optimizer.step()
        values.append(optimizer.noise_report()[0]["H"])
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)


def test_a_step_without_a_mark_leaves_the_estimate():
    param, optimizer = one("rms", lr=0.1)
    accumulated(param, optimizer, [torch.randn(NORMS["rms"]) for _ in range(2)], 1 / 2)
    optimizer.step()
    before, weights = optimizer.noise_report()[0]["H"], param.detach().clone()
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.noise_report()[0]["H"] == before
    assert not torch.equal(param, weights)


def test_noise_every_takes_no_copy_in_between():
    param, optimizer = one("rms", noise_every=3)
    copies, estimates = [], []
    for _ in range(7):
        accumulated(param, optimizer, [torch.randn(NORMS["rms"]) for _ in range(2)], 1 / 2)
        copies.append("half_grad" in optimizer.state[param])
        optimizer.step()
        estimates.append(optimizer.noise_report()[0]["H"])
    assert copies == [True, False, False, True, False, False, True]
    assert estimates[0] == estimates[1] == estimates[2] != estimates[3] == estimates[5] != estimates[6]


def test_a_non_finite_half_is_not_taken():
    param, optimizer = one("rms", lr=0.1)
    accumulated(param, optimizer, [torch.randn(NORMS["rms"]) for _ in range(2)], 1 / 2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())["state"]
    bad = torch.randn(NORMS["rms"])
    bad[0, 0] = float("nan")
    accumulated(param, optimizer, [bad, torch.randn(NORMS["rms"])], 1 / 2)
    optimizer.step()
    after = optimizer.state_dict()["state"]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], before[0][key]) for key in before[0])


def test_what_is_remembered_survives_a_save_in_the_middle():
    torch.manual_seed(0)
    param, optimizer = one("rms", lr=0.1)
    first, second = torch.randn(NORMS["rms"]).double(), torch.randn(NORMS["rms"]).double()
    param.grad = first / 2
    optimizer.mark_half()
    other, resumed = one("rms", lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.grad = param.grad.clone()
    for p, o in ((param, optimizer), (other, resumed)):
        p.grad += second / 2
        o.step()
    assert torch.equal(param, other)
    assert optimizer.noise_report()[0]["H"] == resumed.noise_report()[0]["H"] > 0


def test_the_half_may_be_kept_in_bf16():
    param, optimizer = one("rms", dtype=torch.float32, noise_dtype=torch.bfloat16)
    first, second = torch.randn(NORMS["rms"]), torch.randn(NORMS["rms"])
    accumulated(param, optimizer, [first, second], 1 / 2)
    assert optimizer.state[param]["half_grad"].dtype == torch.bfloat16
    optimizer.step()
    expected = 0.1 * 2 * dual_norm(((first - second) / 2).double(), "rms") ** 2
    assert optimizer.noise_report()[0]["H"] == pytest.approx(expected, rel=0.02)


def test_a_compiled_step_is_refused():
    """The tracer does not see copies that come and go in the state: it would measure nothing."""
    param, optimizer = one("rms", lr=torch.tensor(0.1))
    accumulated(param, optimizer, [torch.randn(NORMS["rms"]) for _ in range(2)], 1 / 2)
    with pytest.raises(Exception, match="noise='halves' cannot be compiled"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    torch._dynamo.reset()
    assert not param.any()


def test_under_accelerate_accumulation():
    """optimizer.optimizer is LANTON itself; sync_gradients tells the last micro-batch."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def train(accelerate):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(0)
        model = nn.Linear(5, 3, bias=False).double()
        optimizer = LANTON([{"params": list(model.parameters()), "norm": "rms"}], lr=0.1, noise="halves")
        inner, made = optimizer, None
        if accelerate:
            made = Accelerator(cpu=True, gradient_accumulation_steps=4)
            model, optimizer = made.prepare(model, optimizer)
            inner = optimizer.optimizer
        for batch in range(12):
            loss = model(torch.randn(6, 5, generator=torch.Generator().manual_seed(batch)).double()).square().mean()
            if made is not None:
                with made.accumulate(model):
                    made.backward(loss)
                    if batch % 4 == 1:
                        inner.mark_half()
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (loss / 4).backward()
                if batch % 4 == 1:
                    inner.mark_half()
                if batch % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
        return inner.noise_report(), [p.detach() for p in inner.param_groups[0]["params"]]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with_it, by_hand = train(True), train(False)
    assert with_it[0][0]["H"] == by_hand[0][0]["H"] > 0
    assert torch.equal(with_it[1][0], by_hand[1][0])


def test_what_is_asked_for_in_the_wrong_place_is_an_error():
    param, optimizer = one("rms", lr=0.1)
    with pytest.raises(RuntimeError, match="no parameter has a gradient yet"):
        optimizer.mark_half()
    param, optimizer = one("rms", lr=0.1)
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError, match="mark_half.. was not called.*noise='previous'"):
        optimizer.step()
    assert not param.any()
    with pytest.raises(RuntimeError, match="call mark_half"):
        optimizer.mark_whole()
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match="fraction of the micro-batches"):
            optimizer.mark_half(fraction)
    optimizer.mark_half()
    half = optimizer.state[param]["half_grad"].clone()
    for fraction in (0, 0.0, 1.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="mark_whole: expected a fraction of the micro-batches in .0, 1."):
            optimizer.mark_whole(fraction=fraction)
    assert torch.equal(optimizer.state[param]["half_grad"], half)
    with pytest.raises(RuntimeError, match="no group has noise='halves'"):
        LANTON([{"params": [param], "norm": "rms"}]).mark_half()


def test_a_saved_half_of_unknown_content_is_refused():
    param, optimizer = one("rms", lr=0.1)
    param.grad = torch.randn(NORMS["rms"], dtype=torch.float64)
    optimizer.mark_half()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["half_content"] = "none"
    with pytest.raises(ValueError, match="LANTON: .*half_grad, but .*half_content=.none.; nothing was changed"):
        optimizer.load_state_dict(saved)
