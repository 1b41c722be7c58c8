"""Compare two recipes: differences that forbid continuing a run, or comparing its result with the expected one."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from leanstep.recipes.config.schema import RunConfig

# sections that do nothing without this key of theirs
SWITCHES = {"sparsity": "patterns", "pruning": "keep_masks", "lora": "target_modules"}

# what may differ between a checkpoint and the run that continues it. The first set changes no computed number but
# which are computed, shown or kept; the second keeps the maths and changes the order of additions.
_FREE = {"name", "description", "source_file", "expect", "out", "eval", "checkpoint", "log", "stop", "device"}
_ROUNDING = {
    "batch.micro_batch_size",
    "activation_checkpointing",
    "compile",
    "release_gradients",
    "distributed.strategy",
}
_DATA_PLACE = {"data.cache_dir"}


def config_differences(saved: dict[str, Any], config: RunConfig) -> tuple[list[str], list[str]]:
    """Compare the recipe of a run, as it was saved, with the one that is to continue it.

    Returns:
        ``(forbidden, rounding)``, lines of the form ``optimizer.lr: was 0.001, is 0.002 now``. Keys that say what is
        measured, shown or kept (``eval``, ``checkpoint``, ``log``, ``stop``, ``expect``, ``out``, names) may differ and
        are in neither. ``rounding`` holds keys that leave the maths as it is but not its rounding. ``steps`` may differ
        when the rate does not depend on it: schedule ``constant`` with ``warmup_steps`` given.
    """
    planned = bool(config.sparsity.patterns)
    free_steps = config.schedule.name == "constant" and config.schedule.warmup_steps is not None and not planned
    forbidden: list[str] = []
    rounding: list[str] = []
    for key, before, now in _changes(saved, asdict(config)):
        if key == "steps" and free_steps:
            continue
        planner = "sparsity plans masks" if planned else f"schedule.name {config.schedule.name} plans the rate"
        why = "" if key != "steps" else f" ({planner} over all steps)"
        line = f"{key}: was {_show(before)}, is {_show(now)} now{why}"
        (rounding if key in _ROUNDING else forbidden).append(line)
    return forbidden, rounding


def expectation_breakers(recipe: dict[str, Any], config: RunConfig) -> list[str]:
    """Keys of ``config`` that differ from the ``recipe`` it comes from, so that its ``expect`` does not hold.

    The seed is none of them, since the tolerance covers it, and neither is what the recipe leaves open (``???``).
    """
    changed = [key for key, before, _ in _changes(recipe, asdict(config)) if before != "???"]
    # which batches are evaluated changes the number that is compared
    measured = ["eval.batches"] if (recipe.get("eval") or {}).get("batches") != config.eval.batches else []
    return [*(key for key in changed if key not in _ROUNDING and key != "seed"), *measured]


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of what decides the numbers of a run, sorted by key."""
    old, new = (dict(_flat(_without_idle(tree))) for tree in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key.split(".")[0] not in _FREE and key not in _DATA_PLACE:
            yield key, old.get(key), new.get(key)


def _without_idle(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the sections that are switched off; older recipes do not have them."""
    idle = {name for name, switch in SWITCHES.items() if not (tree.get(name) or {}).get(switch)}
    return {key: value for key, value in tree.items() if key not in idle}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; lists and empty dicts are values. Passed through JSON, so that tuples equal lists."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value, default=str))


def _show(value: Any) -> str:
    return "not set" if value is None else repr(value)
