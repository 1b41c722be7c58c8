"""Checks of the open parts of a recipe, whose keys belong to other classes: optimizer arguments, groups, model sizes.

Each function yields ``(path, message)``: the key's path as a tuple and what is wrong there. None of them imports torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from leanstep.recipes.config.schema import range_problem
from leanstep.recipes.config.signatures import Accepts, model_config_fields, optimizer_arguments, string_constants

__all__ = ["group_problems", "model_problems", "optimizer_problems", "pattern_problems", "text_problem", "unknown_key"]

Problem = tuple[tuple[str, ...], str]

# Where the classes keep the words that a text argument may be; read from there, so that they are written once. Words of
# one optimizer only, where another has an argument of the same name, are under "OPTIMIZER.ARGUMENT".
CHOICES = {
    "role": ("leanstep.optimizers", "param_groups.py", "ROLES"),
    "algorithm": ("leanstep.optimizers.sinkgd", "optimizer.py", "ALGORITHMS"),
    "spectral": ("leanstep.optimizers.sinkgd", "optimizer.py", "SPECTRAL"),
    "momentum_order": ("leanstep.optimizers.sinkgd", "optimizer.py", "MOMENTUM_ORDERS"),
    "nonfinite": ("leanstep.optimizers.common", "base.py", "NONFINITE"),
    "rounding": ("leanstep.kernels", "reference/rounding.py", "ROUNDINGS"),
    "alpha": ("leanstep.optimizers.lanton", "optimizer.py", "ALPHAS"),
    "norm": ("leanstep.optimizers.lanton", "optimizer.py", "NORMS"),
    "noise": ("leanstep.optimizers.lanton", "optimizer.py", "NOISES"),
    "grouping": ("leanstep.optimizers.lanton", "optimizer.py", "GROUPINGS"),
    "decay_rate": ("leanstep.optimizers.lanton", "optimizer.py", "DECAY_RATES"),
    "nuclear": ("leanstep.kernels.matrices", "newton_schulz.py", "ESTIMATORS"),
    "ns_coefficients": ("leanstep.kernels", "reference/matrices/newton_schulz.py", "COEFFICIENTS"),
    "nuclear_coefficients": ("leanstep.kernels", "reference/matrices/newton_schulz.py", "COEFFICIENTS"),
    "lanton.scaling": ("leanstep.optimizers.lanton", "optimizer.py", "SCALINGS"),
    "mfac.scaling": ("leanstep.optimizers.mfac", "settings.py", "SCALINGS"),
    "storage": ("leanstep.optimizers.mfac", "window.py", "STORAGES"),
    "scope": ("leanstep.optimizers.mfac", "settings.py", "SCOPES"),
    "compression": ("leanstep.optimizers.mfac", "settings.py", "COMPRESSIONS"),
    "momentum_on": ("leanstep.optimizers.mfac", "settings.py", "MOMENTUM_ON"),
    "decay": ("leanstep.optimizers.mfac", "settings.py", "DECAYS"),
    "precondition": ("leanstep.optimizers.mfac", "settings.py", "PRECONDITIONED"),
}
OWN_KEYS = {"params": "comes from the model", "lr": "is optimizer.lr", "weight_decay": "is optimizer.weight_decay"}
# Ranges that the optimizer classes enforce on construction, repeated so that they are known before torch is imported.
ARGUMENT_BOUNDS: dict[str, dict[str, float]] = {
    "lr": {"at_least": 0},
    "weight_decay": {"at_least": 0},
    "eps": {"at_least": 0},
    "scale": {"at_least": 0},
    "num_iters": {"at_least": 1},
    "momentum": {"at_least": 0, "below": 1},
    "betas": {"at_least": 0, "below": 1},
    "row_mask_tau": {"at_least": 0},
    "base_width": {"at_least": 1},
    "alpha": {"above": 0},
    "radius": {"at_least": 0},
    **dict.fromkeys(("noise_every", "ns_steps", "nuclear_steps"), {"at_least": 1}),
    **dict.fromkeys(("window", "rank", "precondition_every", "window_every"), {"at_least": 1}),
    "damping": {"above": 0},
    "density": {"above": 0, "at_most": 1},
    "warmup_steps": {"at_least": 0},
    "max_update_norm": {"above": 0},
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
)
_PROBABILITIES = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
MODEL_BOUNDS: dict[str, dict[str, float]] = {
    **{name: {"at_least": 1} for name in _SIZES},
    **{name: {"at_least": 0, "below": 1} for name in _PROBABILITIES},
    **{name: {"above": 0} for name in ("rms_norm_eps", "layer_norm_epsilon", "initializer_range")},
}


def unknown_key(path: tuple[str, ...], known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The message for a key that does not exist, with the nearest one of its section or of the whole schema."""
    parent, key = path[:-1], path[-1]
    # the same name in another section is nearer than a like one in this
    near = [full for full in elsewhere if full.rpartition(".")[2] == key]
    near = near or [".".join((*parent, match)) for match in get_close_matches(key, sorted(known), n=1, cutoff=0.6)]
    hint = f"; did you mean {' or '.join(repr(name) for name in near[:3])}?" if near else ""
    if not hint and len(set(known)) <= 24:
        section = f" in {'.'.join(parent)}" if parent else ""
        hint = f"; the keys{section} are {', '.join(sorted(known))}"
    return f"unknown key '{'.'.join(path)}'{hint}"


def optimizer_problems(name: str, args: Mapping[str, Any]) -> Iterator[Problem]:
    """Check ``optimizer.args`` against the signature of the class."""
    accepted = optimizer_arguments(name)
    for key, value in args.items():
        path = ("optimizer", "args", key)
        if key in OWN_KEYS:
            yield path, f"optimizer.args.{key} {OWN_KEYS[key]}"
        elif accepted is not None:
            yield from _entry_problems(path, value, accepted, set(accepted) - set(OWN_KEYS), ARGUMENT_BOUNDS, name)


def group_problems(name: str, groups: list[Any]) -> Iterator[Problem]:
    """Check the entries of ``optimizer.groups``: one selector each, and options that the class knows per group."""
    arguments = optimizer_arguments(name)
    for index, entry in enumerate(groups):
        if not isinstance(entry, dict):
            continue  # reported as a wrong type already
        path = ("optimizer", "groups", str(index))
        where = ".".join(path)
        selectors = [key for key in ("match", "role") if key in entry]
        if len(selectors) != 1:
            found = "both" if selectors else "neither"
            yield path, f"{where} must select parameters by 'match' (a pattern) or 'role', got {found}"
        elif len(entry) == 1:
            yield path, f"{where} selects parameters but sets nothing; add lr, weight_decay or another option"
        accepted = {
            **(arguments or {key: Accepts(anything=True) for key in entry}),
            "match": Accepts.of(str),
            "role": Accepts.of(str),
            "lr": Accepts.of(float),
            "weight_decay": Accepts.of(float),
        }
        for key, value in entry.items():
            yield from _entry_problems((*path, key), value, accepted, set(accepted) - {"params"}, ARGUMENT_BOUNDS, name)
            if key == "match" and isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    yield (*path, key), f"{where}.match: {value!r} is not a regular expression: {error}"


def model_problems(family: str, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Check ``model.config`` against the transformers configuration of the family."""
    accepted = model_config_fields(family)
    if accepted is None:
        return
    for key, value in config.items():
        yield from _entry_problems(("model", "config", key), value, accepted, set(accepted), MODEL_BOUNDS)


def pattern_problems(patterns: Mapping[str, Any]) -> Iterator[Problem]:
    """Check the values of ``sparsity.patterns``, each a text N:M with at most M of M kept."""
    # the keys are wildcards with dots, which are no paths
    path = ("sparsity", "patterns")
    for layers, pattern in patterns.items():
        found = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
        if found is None:
            hint = "; put it in quotes" if isinstance(pattern, (int, float)) else ""
            yield path, f"sparsity.patterns: {layers!r} must have a text such as '2:4', got {pattern!r}{hint}"
        elif not 0 < int(found[1]) <= int(found[2]):
            yield path, f"sparsity.patterns: {layers!r} keeps {found[1]} of {found[2]}; expected 0 < N <= M in N:M"


def text_problem(full: str, value: Any) -> str | None:
    """Check the form of a text that is more than text; ``full`` is its key, from whose name the message reads on."""
    if not isinstance(value, str):
        return None
    if full == "data.tokenizer" and value.startswith("train:"):
        size = value.partition(":")[2]
        # 256 bytes and the end-of-text token are in every vocabulary
        if not size.isdecimal() or int(size) < 257:
            return f"must be 'train:SIZE' with a size of at least 257 (256 bytes and end-of-text), got {value!r}"
    if full in ("out", "checkpoint.resume", "data.tokenizer", "data.text_key", "name") and not value.strip():
        return "must not be empty"
    if full == "name" and ("/" in value or "\\" in value or value in (".", "..")):
        return f"must be a plain name without slashes, got {value!r}"
    return None


def _entry_problems(
    path: tuple[str, ...],
    value: Any,
    accepted: Mapping[str, Accepts],
    listed: set[str],
    bounds: Mapping[str, Mapping[str, float]],
    owner: str = "",
) -> Iterator[Problem]:
    """One key of an open mapping: known, of an allowed type, in its range. ``owner`` is the optimizer's name."""
    key, full = path[-1], ".".join(path)
    if key not in listed:
        yield path, unknown_key(path, listed)
        return
    problem = accepted[key].problem(value)
    place = CHOICES.get(f"{owner}.{key}") or CHOICES.get(key)
    choices = string_constants(*place) if place and isinstance(value, str) else None
    if choices and not problem:
        near = get_close_matches(str(value), choices, n=1)
        words = tuple(word for word in accepted[key].words if word != "str")
        problem = Accepts(words=words, choices=choices).problem(value)
        problem = f"{problem}; did you mean {near[0]!r}?" if problem and near else problem
    if problem:
        yield path, f"{full}: {problem}"
        return
    for element in value if isinstance(value, list) else [value]:
        problem = range_problem(bounds.get(key, {}), element)
        if problem:
            yield path, f"{full} {problem}"
