"""Compare two recipes: find differences that forbid resuming a run, or comparing its result with the expected one."""

import json
from collections.abc import Iterator
from typing import Any

from leanstep.recipes.config.schema import NOT_KEYS, RunConfig
from leanstep.recipes.config.values import recorded, resolved

# section -> the key without which it has no effect
SWITCHES = {
    "sparsity": "patterns",
    "pruning": "keep_masks",
    "lora": "target_modules",
    "qk_clip": "threshold",
    "ema": "decay",
}

# keys that may differ between a checkpoint and the run that resumes it. _FREE: no effect on computed numbers.
# _ROUNDING: the same maths with another order of additions.
_FREE = {"name", "description", "expect", "out", "eval", "checkpoint", "log", "stop"}
_FREE |= {*NOT_KEYS, "device", "data.cache_dir", "distributed.connect_minutes", "distributed.timeout_minutes"}
_ROUNDING = {
    "batch.micro_batch_size",
    "activation_checkpointing",
    "compile",
    "release_gradients",
    "distributed.strategy",
}


def config_differences(saved: dict[str, Any], config: RunConfig) -> tuple[list[str], list[str]]:
    """Compare the saved recipe of a run with the recipe that resumes it.

    Returns:
        ``(forbidden, rounding)``, lines of the form ``optimizer.lr: was 0.001, is 0.002 now``. ``rounding`` has keys
        that change only the order of additions. Keys without effect on computed numbers (``eval``, ``checkpoint``,
        ``log``, ``stop``, ``expect``, ``out``, names) are in neither list. ``steps`` may differ with the schedule
        ``constant`` and ``warmup_steps``, which do not depend on it.
    """
    planned = bool(config.sparsity.patterns)
    free_steps = config.schedule.name == "constant" and config.schedule.warmup_steps is not None and not planned
    forbidden: list[str] = []
    rounding: list[str] = []
    for key, before, now in _changes(saved, config):
        if key == "steps" and free_steps:
            continue
        planner = "sparsity plans masks" if planned else f"schedule.name {config.schedule.name} plans the rate"
        why = "" if key != "steps" else f" ({planner} over all steps)"
        line = f"{key}: was {_show(before)}, is {_show(now)} now{why}"
        (rounding if key in _ROUNDING else forbidden).append(line)
    return forbidden, rounding


def expectation_breakers(recipe: dict[str, Any], config: RunConfig) -> list[str]:
    """Keys whose overrides make the ``expect`` section of ``recipe`` invalid for ``config``.

    Leaves out the seed, which the tolerance covers, and keys that the recipe leaves open (``???``).
    """
    changed = [key for key, before, _ in _changes(recipe, config) if before != "???"]
    # the compared loss depends on the validation batches
    measured = ["eval.batches"] if (recipe.get("eval") or {}).get("batches") != config.eval.batches else []
    # the expected loss is that of the weights, which an average of them does not change
    free = {*_ROUNDING, "seed", "ema.decay"}
    return [*(key for key in changed if key not in free), *measured]


def _changes(before: dict[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) of the keys that affect a run's numbers, sorted.

    The same reference to an environment variable is no change: a folder has another path on another machine.
    """
    trees = before, resolved(config), recorded(config)
    # JSON turns the tuples of a RunConfig into the lists of a saved one
    old, new, texts = (dict(flat(json.loads(json.dumps(_without_idle(tree), default=str)))) for tree in trees)
    for key in sorted(old.keys() | new.keys()):
        same = old.get(key) in (new.get(key), texts.get(key))
        # another optimizer has arguments of its own
        same |= key.startswith("optimizer.args") and old.get("optimizer.name") != new.get("optimizer.name")
        if not same and not {key, key.split(".")[0]} & _FREE:
            yield key, old.get(key), new.get(key)


def _without_idle(tree: dict[str, Any]) -> dict[str, Any]:
    """Remove sections that are switched off. Older recipes do not have them."""
    idle = {name for name, switch in SWITCHES.items() if not (tree.get(name) or {}).get(switch)}
    return {key: value for key, value in tree.items() if key not in idle}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; lists and empty dicts are values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(value: Any) -> str:
    return "not set" if value is None else repr(value)
