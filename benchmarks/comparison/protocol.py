"""What every run of a comparison shares, and what makes one run differ from another."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from leanstep.recipes.config.loader import load
from leanstep.recipes.config.schema import RunConfig

# of the rules below and of docs/protocol.md: results of two versions are not compared
VERSION = 1
# Mixtral in the sizes of a LLaMA, which no recipe has: what differs. A token passes two of four experts, of half the
# nano's width, so as many weights as there. Nothing balances their load.
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192}


class ComparisonError(ValueError):
    """A comparison that cannot go on, or results that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Protocol:
    """Model, schedules, seeds and the settings to try. Every field is part of the identity of a result."""

    model: str = "llama-nano"
    overrides: tuple[str, ...] = ()
    # half the time of fp32 on a CPU with AVX512-BF16; weights, gradients and optimizer state stay fp32
    precision: str = "bf16"
    tune_steps: int = 60
    judge_steps: int = 200
    eval_every: int = 40
    tune_seed: int = 0
    judge_seeds: tuple[int, ...] = (1, 2, 3)
    # of the held-out sequences, from the start; the others judge
    tune_fraction: float = 0.25
    # the first ones hold while the learning rates are searched
    weight_decays: tuple[float, ...] = (0.1, 0.0, 1.0)
    warmups: tuple[float, ...] = (0.05, 0.15)
    threads: int = 1

    @cached_property
    def config(self) -> RunConfig:
        """The recipe of AdamW for this model, or for the LLaMA of a mixture. Raises ConfigError without one."""
        name = self.model if self.model.endswith("-lora") else f"{self.model}-adamw"
        if self.is_mixture:
            name = name.replace("mixtral", "llama")
        return load(name, (f"precision={self.precision}", *self.overrides))

    @property
    def is_mixture(self) -> bool:
        """Whether experts take the place of MLPs (:data:`MIXTURE`)."""
        return self.model.startswith("mixtral-")

    @property
    def num_rates(self) -> int:
        """How many learning rates the search moves: 2, or 1 where adapters alone are trained, which have one role."""
        return 1 if self.config.lora.target_modules else 2

    @cached_property
    def definition(self) -> dict[str, Any]:
        """All that decides a result besides method, step sizes and seed, as JSON has it.

        Of the recipe, what differs from the defaults: a key that recipes get later changes no result. Where a default
        changes, raise VERSION.
        """
        defaults = asdict(RunConfig())
        recipe: dict[str, Any] = {}
        for section in ("model", "data", "batch", "schedule", "lora"):
            values = asdict(getattr(self.config, section))
            different = {k: v for k, v in values.items() if v != defaults[section][k] and k != "cache_dir"}
            if different or section != "lora":
                recipe[section] = different
        recipe["max_grad_norm"] = self.config.max_grad_norm
        if self.is_mixture:
            recipe["mixture"] = MIXTURE
        return json.loads(json.dumps({"version": VERSION, **asdict(self), "recipe": recipe}))

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits of the definition."""
        return digest(self.definition)

    def other_settings(self) -> list[tuple[float, float]]:
        """Pairs of weight decay and warm-up to try at the best step sizes, without the first."""
        return list(itertools.product(self.weight_decays, self.warmups))[1:]


@dataclass(frozen=True)
class Run:
    """One training run. Step sizes and weight decay are None where the defaults of the optimizer's class hold."""

    # tune; judge; and judged once more: half of the steps, double: twice the hidden rate, warmup: another warm-up
    kind: str
    method: str
    seed: int
    hidden_lr: float | None
    other_lr: float | None
    weight_decay: float | None
    warmup: float

    def steps(self, protocol: Protocol) -> int:
        """Number of steps."""
        shorter = {"tune": protocol.tune_steps, "half": protocol.judge_steps // 2}
        return shorter.get(self.kind, protocol.judge_steps)


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a value that JSON can express."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
