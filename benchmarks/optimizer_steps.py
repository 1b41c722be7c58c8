"""Optimizers of this package, of torch and of others, each as a step on given parameters."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from leanstep.optimizers import LANTON, MFAC, Lion, SinkGD

# peers by module: the name in the tables, and whether a step is slow on a CPU
PEERS = {
    "lion_pytorch": ("lion_pytorch Lion", False),
    "pytorch_optimizer": ("pytorch_optimizer Lion", False),
    "bitsandbytes": ("bitsandbytes Lion8bit", True),
    "dion": ("dion Muon + AdamW", True),
}
Step = Callable[[], object]


def candidates(
    hidden: list[Tensor], others: list[Tensor], slow: bool, small: int = 0
) -> dict[str, tuple[Callable[[], Step], float]]:
    """name -> (makes the step, parameter-sized reads and writes per parameter); 0 where bytes are not the measure."""
    params = hidden + others
    rate = {"lr": 1e-6}
    options = rate | {"weight_decay": 0.1}
    share = sum(p.numel() for p in hidden) / sum(p.numel() for p in params)
    # the published routing: matrices to SinkGD, embedding, head and norms to AdamW
    groups = [{"params": hidden, "algorithm": "sinkgd"}, {"params": others, "algorithm": "adamw"}]
    made: dict[str, tuple[Callable[[], Step], float]] = {
        "torch AdamW fused": (lambda: torch.optim.AdamW(params, fused=True, **options).step, 7),
        "torch SGD momentum fused": (lambda: torch.optim.SGD(params, momentum=0.9, fused=True, **rate).step, 5),
        "leanstep Lion": (lambda: Lion(params, **options).step, 5),
        "leanstep Lion, int8 momentum": (lambda: Lion(params, momentum_dtype=torch.int8, **options).step, 0),
        'leanstep Lion nonfinite="pass"': (lambda: Lion(params, nonfinite="pass", **options).step, 5),
        # SinkGD's rule for embeddings, heads and norms, here for all
        "leanstep AdamW fallback": (lambda: SinkGD(params, algorithm="adamw", **options).step, 7),
        # five iterations read the gradient once each, the update reads it again
        "leanstep SinkGD + AdamW": (lambda: SinkGD(groups, **options).step, share * (5 + 3) + (1 - share) * 7),
    }
    if params[0].dtype == torch.bfloat16:
        made["leanstep Lion stochastic rounding"] = (lambda: Lion(params, rounding="stochastic", **options).step, 5)
    if small:
        made["torch AdamW foreach"] = (lambda: torch.optim.AdamW(params, foreach=True, **options).step, 7)
        made["leanstep LANTON"] = (lambda: LANTON(params, norm="rms", **rate).step, 0)
        made["leanstep M-FAC, 8 rows"] = (lambda: MFAC(params, window=8, damping=1.0, **rate).step, 0)
    if slow:
        made["torch Muon + AdamW fused"] = (lambda: _muon(hidden, others, rate), 0)
    for module, (name, is_slow) in PEERS.items():
        if module not in missing_peers() and (slow or not is_slow):
            made[name] = (partial(_peer, module, hidden, others, options), 0 if is_slow else 5)
    return made


def missing_peers() -> list[str]:
    """Peers that are not installed."""
    return [module for module in PEERS if importlib.util.find_spec(module) is None]


def _muon(hidden: list[Tensor], others: list[Tensor], rate: dict[str, float]) -> Step:
    muon, adamw = torch.optim.Muon(hidden, **rate), torch.optim.AdamW(others, fused=True, **rate)
    return lambda: (muon.step(), adamw.step())


def _peer(module: str, hidden: list[Tensor], others: list[Tensor], options: dict[str, float]) -> Step:
    package = importlib.import_module(module)
    if module == "dion":
        return package.Muon([{"params": hidden}, {"params": others, "algorithm": "adamw"}], **options).step
    optimizer = package.optim.Lion8bit if module == "bitsandbytes" else package.Lion
    return optimizer(hidden + others, **options).step


LANTON_OPTIONS = {
    "LANTON": {},
    "LANTON, noise every fifth step": {"noise_every": 5},
    "LANTON, noise_adaptive=False": {"noise_adaptive": False},
    'LANTON, nuclear="polar"': {"nuclear": "polar"},
    'LANTON, nuclear="frobenius"': {"nuclear": "frobenius"},
}


def lanton(params: list[Tensor], name: str) -> Step:
    """A step of LANTON on matrices, or five where the name says so."""
    step = LANTON(params, lr=1e-6, norm="rms", scaling="muon", **LANTON_OPTIONS[name]).step
    return (lambda: [step() for _ in range(5)]) if "fifth" in name else step
