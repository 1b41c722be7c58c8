"""The configuration of adapters: PEFT's fields under PEFT's names, and three fields for the fast path."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

SAVES = ("min", "full", "lora_fa")
BIASES = ("none", "all", "lora_only")

# fields that adapter_config.json does not have
_FAST_PATH_FIELDS = ("save", "fast_path", "fused_blocks")
# older versions of PEFT cannot read these fields: write them only if they are set
_RECENT = ("exclude_modules", "lora_bias", "target_parameters", "trainable_token_indices")
# PEFT also trains these heads for these tasks
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
HEADS = tuple(dict.fromkeys(head for heads in TASK_HEADS.values() for head in heads))
# PEFT's fields that change an adapter's output and are not implemented here
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# initialisations that leave the base unchanged; others move some of the base into the factors
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_SWITCHES = ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "inference_mode", "fused_blocks")


def is_pissa(init: object) -> bool:
    """Whether ``init_lora_weights`` names PiSSA: ``"pissa"``, or ``"pissa_niter_N"``."""
    return isinstance(init, str) and re.fullmatch(r"pissa(_niter_\d+)?", init) is not None


def is_token_list(indices: object) -> bool:
    """Whether something is a list of different token numbers."""
    is_number = lambda i: isinstance(i, int) and not isinstance(i, bool) and i >= 0  # noqa: E731
    return isinstance(indices, list) and all(map(is_number, indices)) and 0 < len(indices) == len(set(indices))


@dataclass
class LoraConfig:
    """A low-rank adapter: ``W x + scale * B A x``, ``scale = lora_alpha / r``.

    Args:
        r: rank of the factors A (r, in) and B (out, r); at most the smaller width of a layer, but in files.
        lora_alpha: numerator of the scale.
        target_modules: the layers to adapt. A list holds names, each the whole name of a layer or its end after a dot.
            A string is a regular expression for the whole name. ``"all-linear"`` selects every linear layer except the
            output head, layers in ``modules_to_save``, layers narrower than their rank, layers that are never called
            (``out_proj`` of ``nn.MultiheadAttention``), layers whose weight a state-space mixer multiplies by itself
            (``dt_proj``), and layers that return no tensor (a router of experts). It warns about the last four, about
            fused experts, and about a classifier that is not trained whole.
        target_parameters: parameters to adapt that are no layer's weight, above all the fused weights of experts (E,
            out, in): names, each whole or its end after a dot, such as ``"mlp.experts.down_proj"``. Every expert gets
            factors of rank r. Without dropout, DoRA, bias on B and PiSSA, as in PEFT.
        exclude_modules: selected layers to leave out: a list of names or a regular expression.
        lora_dropout: probability of dropping an entry of the adapter's input in training.
        bias: biases of the base model to train: ``"none"``, ``"all"``, or ``"lora_only"`` for those of adapted layers.
        use_rslora: use ``scale = lora_alpha / sqrt(r)`` (Kalajdzievski, arXiv 2312.03732).
        use_dora: also train a magnitude per output (Liu et al., "DoRA", arXiv 2402.09353), for linear layers, Conv1D
            and embeddings.
        modules_to_save: names of modules to train and save whole, such as a new head, with their buffers. Each is the
            whole name of a module or its end, also within a word, as in PEFT: ``"classifier"`` also names
            ``pre_classifier``.
        trainable_token_indices: tokens whose rows of the embedding are trained, such as new ones: a list of whole
            numbers, or names of embeddings and heads -> lists. Modules with the same weight, such as a tied head, have
            the same rows.
        init_lora_weights: True: A uniform as in ``torch.nn.Linear``, B zero; ``"gaussian"``: A normal with standard
            deviation 1 / r, B zero; ``"orthogonal"``: A with orthonormal rows, B zero; False: both random, for tests.
            ``"pissa"``: the r largest singular vectors of the base weight, which keeps the rest (Meng, Wang, Zhang,
            "PiSSA", arXiv 2404.02948); ``"pissa_niter_N"``: a faster, randomised decomposition. The adapter is saved
            with rank 2 r, for the plain base.
        fan_in_fan_out: stored in the file only; a layer's class determines the layout of its weight.
        layers_to_transform: indices of the layers to adapt, for names that contain an index.
        layers_pattern: the name before that index.
        rank_pattern, alpha_pattern: regular expression for the end of a name -> r, lora_alpha of those layers.
        lora_bias: train a bias on B, for linear layers and Conv1D without DoRA.
        task_type: stored in the file. ``"SEQ_CLS"`` and ``"TOKEN_CLS"`` also add the model's ``classifier`` and
            ``score`` to ``modules_to_save``, as in PEFT.
        base_model_name_or_path, revision, inference_mode: stored in the file only.
        save: the tensors that autograd saves. ``"min"``: the input, and the output of DoRA without bias. ``"full"``:
            also the products with A, which avoids ``2 M n r`` operations, and DoRA's product, which avoids
            ``2 M n m`` if the layer has a bias. ``"lora_fa"``: only the products with A, M r numbers; A is frozen
            (Zhang et al., "LoRA-FA", arXiv 2308.03303). Embeddings save M r numbers with any value, and train A, which
            starts at zero.
        fast_path: None: layers that cannot run on the fast path run in plain torch, and their ``fast_path`` says why.
            True: such a layer is an error. False: plain torch everywhere.
        fused_blocks: run q, k and v of a block as one function, and each SwiGLU block as one, which then saves only its
            input and the two inner projections.

    Raises:
        ValueError: for a rank or a probability out of range, and for unknown values. The message lists all of them.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    save: Literal["min", "full", "lora_fa"] = "min"
    fast_path: bool | None = None
    fused_blocks: bool = True

    def __post_init__(self) -> None:
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value, key=str))
        if isinstance(self.layers_to_transform, (set, tuple, range)):
            self.layers_to_transform = list(self.layers_to_transform)
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        problems = self._wrong_types() or self._problems()
        if problems:
            raise ValueError("LoraConfig: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        problems = []
        texts = {"target_modules": True, "exclude_modules": True, "target_parameters": False, "modules_to_save": False}
        for name, text in texts.items():
            value = getattr(self, name)
            if value is None or (text and isinstance(value, str)):
                continue
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
                also = " or a text" if text else ""
                problems.append(f"{name} must be a list of names{also}, got {value!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                problems.append(f"{name} must be a dictionary of names and numbers, got {value!r}")
        tokens = self.trainable_token_indices
        for indices in tokens.values() if isinstance(tokens, Mapping) else [] if tokens is None else [tokens]:
            if not is_token_list(indices):
                problems.append(
                    f"trainable_token_indices must be a list of whole numbers from 0, each once, or a dictionary of "
                    f"names and such lists, got {tokens!r}"
                )
                break
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            problems.append(f"layers_to_transform must be a whole number or a list of them, got {layers!r}")
        return problems

    def _problems(self) -> list[str]:
        problems = []
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        for name, value in ranks.items():
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                problems.append(f"{name} must be a whole number above 0, got {value!r}")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
                problems.append(f"{name} must be a finite number above 0, got {alpha!r}")
        if not (isinstance(self.lora_dropout, int | float) and 0 <= self.lora_dropout < 1):
            problems.append(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout!r}")
        for name, allowed in (
            ("bias", BIASES),
            ("save", SAVES),
            ("fast_path", (None, True, False)),
            *((name, (True, False)) for name in _SWITCHES),
        ):
            if getattr(self, name) not in allowed:
                problems.append(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        init = self.init_lora_weights
        if init not in (True, False, "gaussian", "orthogonal") and not is_pissa(init):
            problems.append(
                "init_lora_weights must be one of True, False, 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', "
                f"got {init!r}"
            )
        if self.target_parameters:
            problems += self._parameter_problems()
        if self.target_modules is not None and not self.target_modules and not self.target_parameters:
            problems.append("target_modules is empty; name the layers to adapt, or take 'all-linear'")
        expressions = [("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules)]
        lists = {name: getattr(self, name) or () for name in ("modules_to_save", "layers_pattern")}
        lists = {name: [value] if isinstance(value, str) else value for name, value in lists.items()}
        lists |= {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        expressions += [(name, expression) for name, values in lists.items() for expression in values]
        for name, expression in expressions:
            try:
                re.compile(expression if isinstance(expression, str) else "")
            except re.error as error:
                problems.append(f"{name} {expression!r} is no regular expression: {error}")
        if self.use_dora and self.lora_bias:
            problems.append("use_dora and lora_bias exclude each other: PEFT cannot load such an adapter; unset one")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern needs layers_to_transform, which is not set")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            problems.append("layers_to_transform needs a list of target_modules, not a regular expression")
        return problems

    def _parameter_problems(self) -> list[str]:
        set_here = {"lora_dropout": self.lora_dropout != 0, "use_dora": self.use_dora, "lora_bias": self.lora_bias}
        problems = [f"target_parameters excludes {name}, as in PEFT; unset it" for name, on in set_here.items() if on]
        if self.init_lora_weights not in (True, False, "gaussian"):
            problems.append(
                "target_parameters takes init_lora_weights True, False or 'gaussian', as adapters of many experts, got "
                f"{self.init_lora_weights!r}"
            )
        return problems

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``adapter_config.json``: PEFT's fields, ready for JSON."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FAST_PATH_FIELDS}
        return {"peft_type": "LORA", **{key: value for key, value in known.items() if value or key not in _RECENT}}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> LoraConfig:
        """Build a configuration from the contents of ``adapter_config.json``.

        Warns about unknown keys, unless their value is null, false or empty.

        Raises:
            ValueError: for another kind of adapter, a variant of LoRA that is not implemented here, or an
                initialisation that changed the base and cannot be repeated (``init_lora_weights`` of OLoRA, CorDA,
                LoftQ, LoRA-GA, randomised PiSSA).
        """
        kind = settings.get("peft_type", "LORA")
        if str(kind).rsplit(".", 1)[-1] != "LORA":
            raise ValueError(f"LoraConfig: expected an adapter of peft_type 'LORA', got {kind!r}")
        foreign = [name for name in _FOREIGN if settings.get(name)]
        if foreign:
            raise ValueError(
                f"LoraConfig: the adapter uses {', '.join(foreign)}, which leanstep.lora does not have; load it with "
                "peft, and make it fast with accelerate_peft"
            )
        names = {f.name for f in fields(cls)} - set(_FAST_PATH_FIELDS)
        ignored = {"peft_type", "auto_mapping", "peft_version", "loftq_config", "corda_config", "eva_config"}
        ignored |= {"lora_ga_config", "velora_config", "qalora_group_size", "megatron_core", "runtime_config"}
        unknown = sorted(key for key, value in settings.items() if value and key not in names | ignored)
        if unknown:
            warnings.warn(f"LoraConfig: ignored the unknown fields {', '.join(unknown)}", stacklevel=2)
        known = {key: value for key, value in settings.items() if key in names}
        init = known.get("init_lora_weights", True)
        if init not in (*_PLAIN_INITS, "pissa"):
            raise ValueError(
                f"LoraConfig: the adapter began with init_lora_weights {init!r}, which changes the base, so it does "
                "not fit the plain base; convert it with peft: save_pretrained("
                "path_initial_model_for_weight_conversion=...)"
            )
        if not isinstance(init, bool) and init != "pissa":
            # the factors come from the file, so their initialisation does not matter
            known["init_lora_weights"] = True
        return cls(**known)
