"""LoRA on a LLaMA of 3B shape with random weights: a training step by PEFT and by leanstep, seconds and peak memory.

    python benchmarks device/lora [--dry-run] [--out FOLDER]

The shape is Llama-3.2-3B's in bf16, batch 4 of 768 tokens, rank 32 on q_proj and v_proj as in PEFT's own comparison of
methods, and on all linear layers. All models share the frozen weights, live in one process and take turns. A step is
forward, backward and AdamW on the factors. The peak is that of one model alone: its weights, its factors and their
state, and what a step allocates beyond them. PEFT publishes 20.76 GiB and 942 s for LoRA, 22.85 GiB and 1191 s for DoRA
(5,000 steps on an L40S); ratios compare with these, seconds do not. LoRA-FA is PEFT's optimizer for it beside
leanstep's ``save="lora_fa"``. Needs peft, of the extra ``bench``.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import interleaved, required
from events import Timer, peak_bytes
from models import LINEARS
from stages import Cases, Row, Stage, run_stage, stage_parser
from torch import nn

from leanstep.lora import LoraConfig, apply_lora

PARSER = stage_parser(__doc__)
SHAPE = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True,
}  # fmt: skip
FULL = {"shape": SHAPE, "batch": 4, "length": 768, "rank": 32, "rounds": 7}
DRY = {"shape": SMALL, "batch": 2, "length": 8, "rank": 4, "rounds": 1}
TARGETS = {"q, v": ["q_proj", "v_proj"], "all linear": LINEARS}
PLAIN: dict[str, Any] = {}
ADAPTERS = {"LoRA": PLAIN, "dropout": {"lora_dropout": 0.05}, "DoRA": {"use_dora": True}, "LoRA-FA": PLAIN}
RATE = 1e-4


def main() -> int:
    """Measure, and print the table."""
    return run_stage("lora", PARSER, cases_of, FULL, DRY)


def cases_of(stage: Stage) -> Cases:
    """One case per kind of adapter and set of layers."""
    pairs = [(adapter, targets) for targets in TARGETS for adapter in ADAPTERS]
    return {f"{adapter}, {targets}": partial(measure, stage, adapter, targets) for adapter, targets in pairs}


_bases: dict[str, nn.Module] = {}


def base_of(stage: Stage) -> nn.Module:
    """The frozen model with random weights, made once."""
    if "base" not in _bases:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(**stage.sizes.shape, use_cache=False, max_position_embeddings=stage.sizes.length)
        with stage.device:
            _bases["base"] = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    return _bases["base"]


@dataclass
class Candidate:
    """A model with adapters and the optimizer of its factors."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def bytes(self) -> int:
        """Weights, factors, and the optimizer's state."""
        state = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers(), *state))


def candidates(stage: Stage, adapter: str, targets: str) -> dict[str, Candidate]:
    """PEFT's model and leanstep's, on the weights of one frozen model."""
    peft, base, rank = required("peft"), base_of(stage), stage.sizes.rank
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS[targets], **ADAPTERS[adapter]}

    def shared() -> nn.Module:
        # a copy of the modules around the same frozen weights
        return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})

    models = {"PEFT": peft.get_peft_model(shared(), peft.LoraConfig(**settings))}
    extra = {"save": "lora_fa"} if adapter == "LoRA-FA" else {}
    models["leanstep"] = apply_lora(shared(), LoraConfig(**settings, **extra))
    made = {}
    for name, model in models.items():
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if name == "PEFT" and adapter == "LoRA-FA":
            optimizer = required("peft.optimizers").create_lorafa_optimizer(model, rank, 2 * rank, lr=RATE)
        else:
            optimizer = torch.optim.AdamW(factors, lr=RATE)
        made[name] = Candidate(model.train(), optimizer)
    return made


def training_step(stage: Stage, candidate: Candidate) -> Callable[[], float]:
    """A step on one batch of random tokens: returns the loss, without waiting for it."""
    shape = stage.sizes.batch, stage.sizes.length
    generator = torch.Generator(stage.device).manual_seed(0)
    ids = torch.randint(stage.sizes.shape["vocab_size"], shape, generator=generator, device=stage.device)

    def step() -> Any:
        loss = candidate.model(input_ids=ids, labels=ids).loss
        loss.backward()
        candidate.optimizer.step()
        candidate.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(stage: Stage, adapter: str, targets: str) -> list[Row]:
    """Rows of PEFT and of leanstep, in turns."""
    made = candidates(stage, adapter, targets)
    steps = {name: training_step(stage, candidate) for name, candidate in made.items()}
    timer = Timer(stage.device)
    losses = {name: float(step()) for name, step in steps.items()}
    peaks = {name: peak_bytes(stage.device, step) + made[name].bytes() for name, step in steps.items()}
    runs = {name: partial(timer.seconds, step) for name, step in steps.items()}
    times = interleaved(runs, stage.sizes.rounds, warmup=1)
    return [
        {
            "adapter": adapter,
            "layers": targets,
            "library": name,
            "ms": 1e3 * statistics.median(times[name]),
            "peak GiB": peaks[name] / 2**30,
            "÷ PEFT's time": statistics.median(a / b for a, b in zip(times[name], times["PEFT"], strict=True)),
            "÷ PEFT's peak": peaks[name] / peaks["PEFT"],
            "first loss": losses[name],
        }
        for name in made
    ]
