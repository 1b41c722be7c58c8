"""Options that earlier versions had: what to write instead, and the values with which a saved state still loads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Removed(NamedTuple):
    """An option that an optimizer no longer has.

    Attributes:
        instead: what to write instead.
        loads: whether a state loads that was saved with a value, by the saved group. Its group goes on as it did then.
    """

    instead: str
    loads: Callable[[Any, Mapping[str, Any]], bool]


def _only(*values: Any) -> Callable[[Any, Mapping[str, Any]], bool]:
    return lambda value, group: not isinstance(value, Tensor) and value in values


# optimizer -> option -> what became of it; for one release
REMOVED: Mapping[str, Mapping[str, Removed]] = {
    "LANTON": {
        "grouping": Removed("leave it out: all layers of one norm share a maximum; set alpha per group", _only("norm")),
        "ns_steps": Removed("leave it out: Newton-Schulz takes five steps, as in Muon", _only(5)),
        "ns_dtype": Removed("leave it out: the device chooses, bf16 where it has matrix units for it", _only()),
        "decay_rate": Removed("set weight_decay per group", _only("group")),
        "bias_correction": Removed("leave it out, and rescale alpha", _only(False)),
        "nuclear_steps": Removed("leave it out; nuclear='svd' is exact", _only(3)),
        "nuclear_coefficients": Removed("leave it out; nuclear='svd' is exact", _only("nuclear")),
    },
    "MFAC": {
        "damping_schedule": Removed("set group['damping'] between steps", _only()),
        "masks": Removed(
            "write sparse=True, which excludes the weights that are zero when the group is added",
            lambda masks, group: group.get("sparse") is True,
        ),
        "max_update_norm": Removed("leave it out; a larger damping shortens updates", _only()),
        "rank": Removed(
            "it was that of compression='lowrank', which left; write compression='topk'",
            lambda rank, group: group.get("compression") != "lowrank",
        ),
        "shard_window": Removed("leave it out; torch.distributed.fsdp.fully_shard shards windows", _only(False)),
        "momentum_on": Removed("write momentum= alone", _only("update")),
        "precondition": Removed("leave it out", _only("row")),
        "precondition_every": Removed("leave it out: every step solves", _only(1)),
        "window_every": Removed("leave it out: every step inserts its gradient", _only(1)),
        "warmup_steps": Removed("step with torch.optim.SGD first", _only(0)),
    },
    "SinkGD": {
        "clip_threshold": Removed(
            "leave it out; torch.nn.utils.clip_grad_norm_ before the step clips, and release_gradients has no clipping",
            _only(),
        ),
        "row_mask_tau": Removed(
            "algorithm='balanced' zeroes rows of at most 1e-3 of the mean norm, and no other algorithm zeroes rows",
            lambda tau, group: _only(0.0, *[1e-3] * (group.get("algorithm") == "balanced"))(tau, group),
        ),
    },
}


def removed_from(owner: str, options: Collection[str]) -> str | None:
    """Return what to write instead of those of the options that an optimizer no longer has; None if it has none."""
    removed = REMOVED.get(owner, {})
    return (
        "; ".join(f"{name} was removed: {removed[name].instead}" for name in sorted(removed.keys() & options)) or None
    )


def check_saved_options(owner: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved group has a removed option, whose value the optimizer does not go on with."""
    for name, option in REMOVED.get(owner, {}).items():
        value = group.get(name)
        if value is not None and not option.loads(value, group):
            raise ValueError(
                f"{owner}: the state was saved with {name}={value!r:.80}, which no longer exists "
                f"({removed_from(owner, [name])}); nothing was changed. Continue with the version that saved it, or "
                "start without the state."
            )
