"""Polar factors that are the same on every processor."""

import pytest
import torch

from leanstep.kernels.matrices import newton_schulz
from leanstep.optimizers.lanton import rule


@pytest.fixture(autouse=True)
def polar_factors_for_comparisons(monkeypatch):
    """Newton-Schulz never multiplies in bf16, and "classic_quintic" takes as many steps as float64's precision needs.

    What is left is the rule itself.
    """
    monkeypatch.setattr(newton_schulz, "_multiplies_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    of_five_steps = rule.polar_factors

    def polar_factors(momenta, coefficients="jordan", **steps):
        if coefficients == "classic_quintic":
            steps.setdefault("steps", 60)
        return of_five_steps(momenta, coefficients, **steps)

    monkeypatch.setattr(rule, "polar_factors", polar_factors)
