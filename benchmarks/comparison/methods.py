"""The optimizers that are compared: class, fixed settings, rule of each role, and where the search starts."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

from comparison.protocol import ComparisonError, Protocol, Run, digest
from leanstep.optimizers import create, param_groups
from leanstep.optimizers.rates.adamw import convert_rates

# roles whose learning rate is the first axis of the grid; embeddings, heads, norms and biases have the second
MATRIX_ROLES = ("hidden", "expert", "router", "conv", "lora")
_ADAMW = {"betas": (0.9, 0.95)}


@dataclass(frozen=True)
class Method:
    """An optimizer with its fixed settings.

    Attributes:
        cls: module:class.
        label: name in tables.
        start: hidden and other learning rate in the middle of the first grid; None: not tuned, the class's defaults.
        args: arguments of the class.
        matrices: ``algorithm`` of the groups of matrix roles, for classes with several.
        embeddings: rule of embeddings and heads, as for :func:`leanstep.optimizers.param_groups`.
        roles: settings of the groups of other roles, by role; "tied" are those of an embedding that is also the head.
        carried: for comparisons without a search: "rates": AdamW's, by ``like_adamw``; "defaults": the class's;
            "create": those of :func:`leanstep.create`.
    """

    cls: str
    label: str
    start: tuple[float, float] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    matrices: str | None = None
    embeddings: str = "adamw"
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    carried: str | None = None

    def start_for(self, model: str) -> tuple[float, float] | None:
        """Where the search begins on a model, for example ``"gpt-nano"``: its own start, or that of all models."""
        return MOVED_STARTS.get((self.label, model), self.start) if self.start else None

    @property
    def title(self) -> str:
        """The label, with a word where the class's defaults hold."""
        return self.label if self.start or self.carried == "rates" else f"{self.label}, defaults"

    @property
    def definition(self) -> dict[str, Any]:
        """All that decides a result besides protocol and run."""
        fixed = {"args": self.args, "matrices": self.matrices, "roles": self.roles}
        if self.embeddings != "adamw":
            fixed["embeddings"] = self.embeddings
        if self.carried == "rates":
            fixed["like_adamw"] = True
        if self.carried == "create":
            fixed["create"] = True
        return {"class": self.cls, **{key: value for key, value in fixed.items() if value}}

    def optimizer_class(self) -> type[torch.optim.Optimizer]:
        """Import the class. Raises ComparisonError with what to do where it is missing."""
        module, _, name = self.cls.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ComparisonError(
                f"{self.label}: {self.cls} is not here ({error}); install a torch that has it (torch.optim.Muon: 2.9), "
                "or leave the row out with --methods"
            ) from None

    def build(self, model: torch.nn.Module, run: Run) -> torch.optim.Optimizer:
        """Build the optimizer over the roles of a model, with the step sizes of a run."""
        if self.carried == "create":
            return create(model, self.optimizer_class().__name__.lower(), say=None, **self.args)
        roles = {role: dict(settings) for role, settings in self.roles.items() if role != "tied"}
        if "tied" in self.roles and _is_tied(model):
            roles["embedding"] = {**roles.get("embedding", {}), **self.roles["tied"]}
        groups = param_groups(model, roles, embeddings=self.embeddings)
        for group in groups:
            is_matrix = group["name"] in MATRIX_ROLES
            if is_matrix and self.matrices:
                group["algorithm"] = self.matrices
            rate = run.hidden_lr if is_matrix else run.other_lr
            if rate is not None:
                group["lr"] = rate
        options = dict(self.args)
        if self.carried == "rates":
            rates = {"lr": run.hidden_lr, "weight_decay": run.weight_decay}
            convert_rates(self.label, self.optimizer_class(), groups, options, rates)
        elif run.weight_decay is not None:
            options["weight_decay"] = run.weight_decay
        return self.optimizer_class()(groups, **options)


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def run_id(protocol_id: str, definition: dict[str, Any], run: dict[str, Any]) -> str:
    """Identity of a run: of the protocol, the method's settings and the run's."""
    return digest([protocol_id, definition, run])


def default_run(method: str, protocol: Protocol, seed: int) -> Run:
    """A judged run of a method that is not tuned."""
    return Run("judge", method, seed, None, None, None, protocol.warmups[0])


# one rate for embeddings and norms: without a scale an entry moves by about that rate, as by AdamW's
_UNSCALED = {"scale": 1.0}
_SPARSE_MFAC = {"window": 256, "damping": 1e-4, "compression": "topk", "density": 0.01, "momentum": 0.9}
_SINKGD, _LANTON = "leanstep.optimizers:SinkGD", "leanstep.optimizers:LANTON"
_LION, _MFAC = "leanstep.optimizers:Lion", "leanstep.optimizers:MFAC"

# by label and model: searches from the start of all models that ended on an edge, guesses from the nano's best rates,
# and the one rate of adapters
MOVED_STARTS = {
    ("AdamW", "llama-micro"): (5e-4, 4e-2),
    ("SinkGD, AdamW on the rest", "llama-micro"): (1e-2, 4e-2),
    ("Muon, AdamW on the rest", "llama-micro"): (8e-3, 3.2e-2),
    ("SCALE", "llama-micro"): (2.5e-4, 4e-2),
    ("S-MFAC", "llama-micro"): (3.75e-4, 1.2e-2),
    ("LANTON", "gpt-nano"): (2e-2, 5e-3),
    ("LANTON, plain", "gpt-nano"): (2e-2, 5e-3),
    ("AdamW", "llama-nano-lora"): (8e-3, 8e-3),
    ("SinkGD, AdamW on the rest", "llama-nano-lora"): (8e-2, 8e-2),
    ("Lion", "llama-nano-lora"): (1e-3, 1e-3),
}

# in the order in which they run: the first answers come first
METHODS = {
    "adamw": Method("torch.optim:AdamW", "AdamW", (1e-3, 2e-2), {**_ADAMW, "fused": True}),
    "sinkgd": Method(_SINKGD, "SinkGD, AdamW on the rest", (2e-2, 2e-2), _ADAMW),
    "muon": Method("leanstep.recipes.methods.muon:MuonAdamW", "Muon, AdamW on the rest", (8e-3, 1.6e-2), _ADAMW,
                   matrices="muon"),
    "lion": Method(_LION, "Lion", (1e-3, 1.6e-2)),
    "lanton": Method(_LANTON, "LANTON", (2e-2, 2e-2), {"alpha": "auto"}),
    "scale": Method("comparison.peers:SCALE", "SCALE", (1e-3, 1e-2), matrices="rows",
                    roles={"embedding": {"algorithm": "columns"}, "position": {"algorithm": "columns"},
                           "head": {"algorithm": "head"}, "tied": {"algorithm": "head"}}),
    "normuon": Method("comparison.peers:NorMuon", "NorMuon, AdamW on the rest", (8e-3, 1.6e-2), _ADAMW,
                      matrices="normuon"),
    "rmnp": Method("comparison.peers:RMNP", "RMNP, AdamW on the rest", (4e-3, 3.2e-2), _ADAMW, matrices="rmnp"),
    "muoneq": Method("comparison.peers:MuonEq", "MuonEq, AdamW on the rest", (1.6e-2, 3.2e-2), _ADAMW,
                     matrices="muoneq"),
    "lionmuon": Method("comparison.peers:LionMuon", "LionMuon, AdamW on the rest", (1.6e-2, 3.2e-2), _ADAMW,
                       matrices="lionmuon"),
    "sinkgd-momentum": Method(_SINKGD, "SinkGD with momentum", (2e-2, 2e-2), {**_ADAMW, "momentum": 0.9}),
    "sinkgd-muon": Method(_SINKGD, "SinkGD with Muon's scaling", (4e-2, 2e-2),
                          {**_ADAMW, "spectral": "muon", "scale": 1.0}),
    "sinkgd-balanced": Method(_SINKGD, "SinkGD, balanced embedding and head", (2e-2, 1e-2), _ADAMW,
                              embeddings="balanced", roles={"embedding": _UNSCALED, "head": _UNSCALED}),
    "lanton-plain": Method(_LANTON, "LANTON, plain", (2e-2, 2e-2), {"noise_adaptive": False}),
    # differs from "muon" in the rule of embeddings, head and vectors alone
    "lanton-matrices": Method(_LANTON, "LANTON, plain, with Muon's step of matrices", (1.6e-2, 1.6e-2),
                              {"noise_adaptive": False, "nesterov": True, "scaling": "muon"}),
    "sgd": Method("torch.optim:SGD", "SGD with momentum", (7.8125e-5, 0.5), {"momentum": 0.9}),
    "s-mfac": Method(_MFAC, "S-MFAC", (6e-3, 3e-3), _SPARSE_MFAC),
    "adamw-default": Method("torch.optim:AdamW", "AdamW", None, {"fused": True}),
    "sinkgd-default": Method(_SINKGD, "SinkGD, AdamW on the rest"),
    "lion-default": Method(_LION, "Lion"),
    "lanton-default": Method(_LANTON, "LANTON"),
    "sinkgd-balanced-default": Method(_SINKGD, "SinkGD, balanced embedding and head", embeddings="balanced"),
    "lanton-plain-default": Method(_LANTON, "LANTON, plain", None, {"noise_adaptive": False}),
    "sinkgd-carried": Method(_SINKGD, "SinkGD, AdamW on the rest", None, _ADAMW, carried="rates"),
    "lanton-carried": Method(_LANTON, "LANTON", None, {"alpha": "auto"}, carried="rates"),
    "lion-carried": Method(_LION, "Lion", carried="rates"),
    "lanton-auto": Method(_LANTON, "LANTON, alpha='auto'", None, {"alpha": "auto"}, carried="defaults"),
    "sinkgd-create": Method(_SINKGD, "SinkGD by create", carried="create"),
    "lion-create": Method(_LION, "Lion by create", carried="create"),
    "lanton-create": Method(_LANTON, "LANTON by create", carried="create"),
    "s-mfac-default": Method(_MFAC, "S-MFAC", None, {"compression": "topk"}),
}  # fmt: skip
