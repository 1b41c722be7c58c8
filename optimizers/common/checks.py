"""Checks of settings, with the messages of torch's optimizers, and how messages name a parameter."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanstep.kernels.reference.rounding import ROUNDINGS


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's settings from the ``locals()`` of its constructor."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "__class__")}


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
        # one value of an option that stays; its rows are converted when they are loaded
        "storage='fp16'": Removed("leave storage out, which also continues a saved state, or write 'bf16'", _only()),
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
            "algorithm='balanced' zeroes rows below 1e-3 of the mean norm, and no other algorithm zeroes rows",
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


# what other packages and papers call an option -> what one of leanstep's optimizers may call it
OTHER_NAMES = {
    "learning_rate": ("lr",), "beta1": ("betas",), "beta2": ("betas",),
    "state_dtype": ("momentum_dtype", "noise_dtype", "storage"),
}  # fmt: skip
# switches of torch's optimizers -> the values that change no result here; a step has one fused kernel in any case
TORCH_SWITCHES = {"amsgrad": (False,), "capturable": (False,), "differentiable": (False,), "fused": (None, True, False)}


def no_option(owner: str, unknown: Collection[str], options: Iterable[str]) -> str:
    """Return the message for options that an optimizer does not have."""
    if instead := removed_from(owner.rpartition(": ")[2], unknown):
        return f"{owner}: {instead}"
    options = sorted(set(options) - {"self", "params"})
    nearest = [
        name
        for option in unknown
        for name in OTHER_NAMES.get(option, difflib.get_close_matches(option, options, n=1, cutoff=0.75))
        if name in options
    ]
    advice = f"take {' or '.join(dict.fromkeys(nearest))}; " if nearest else ""
    return f"{owner} has no option {', '.join(sorted(unknown))}; {advice}it has {', '.join(options)}"


def check_switches(owner: str, options: dict[str, Any], known: Collection[str]) -> None:
    """Raise ValueError if a switch of torch's optimizers asks for what an optimizer without it does not do."""
    for name in TORCH_SWITCHES.keys() & options.keys() - set(known):
        if options[name] not in TORCH_SWITCHES[name]:
            raise ValueError(
                f"{owner}: {name}={options[name]!r:.80} is an option of torch's optimizers that this one does not "
                f"have; leave it out, or give {' or '.join(map(str, TORCH_SWITCHES[name]))}. (docs/gpu.md says which "
                "steps a CUDA graph captures.)"
            )


def known_options(owner: str, options: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the options that an optimizer has, without torch's switches.

    Raises:
        TypeError: for an option that neither it nor torch has.
        ValueError: as :func:`check_switches`.
    """
    if unknown := options.keys() - set(known) - TORCH_SWITCHES.keys():
        raise TypeError(no_option(owner, unknown, known))
    check_switches(owner, options, known)
    return {name: value for name, value in options.items() if name in known}


def naming_options(owner: str, init: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that takes torch's switches and names its options for any other. Its signature stays."""
    parameters = inspect.signature(init).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return init

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **known_options(owner, options, parameters))

    return checked


def describe(group: dict[str, Any], position: int) -> str:
    """Return a parameter's name (or its position in the group) and shape, for error messages."""
    names = group.get("param_names")
    name = names[position] if names else f"parameter {position} of group {group.get('name', '(unnamed)')!r}"
    return f"{name} {tuple(group['params'][position].shape)}"


def refuse_complex(owner: str, group: dict[str, Any], position: int) -> None:
    """Raise ValueError for a complex parameter: kernels read it as real numbers."""
    param = group["params"][position]
    if param.is_complex():
        raise ValueError(
            f"{owner}: {describe(group, position)} is complex ({param.dtype}); expected a real floating dtype. Give "
            "torch.view_as_real(parameter) to the optimizer or use another one."
        )


def names_of(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Return a name for every parameter; without names its group and position.

    The number of a group is added where several have one name, or none.
    """
    prefixes = [str(group.get("name", "group")) for group in groups]
    names: dict[Tensor, str] = {}
    for number, (group, prefix) in enumerate(zip(groups, prefixes, strict=True)):
        of_group = f"{prefix}{number}" if prefixes.count(prefix) > 1 else prefix
        unnamed = (f"{of_group}.{i}" for i in range(len(group["params"])))
        names.update(zip(group["params"], group.get("param_names") or unnamed, strict=True))
    return names


def warn_how_auto_routes(groups: list[dict[str, Any]], owner: str, matrices: str, rest: str, choice: str) -> None:
    """Warn once that "auto" takes all parameters of two or more dimensions, also embeddings, as matrices.

    Does not warn for the groups of :func:`leanstep.lora.lora_groups`, whose parameters are all matrices.

    Args:
        groups: the groups with "auto".
        owner: name of the optimizer.
        matrices, rest: how the message names its treatment of matrices and of other parameters.
        choice: the setting that silences the warning.
    """
    params = [p for group in groups if group.get("name") not in ("lora_A", "lora_B") for p in group["params"]]
    count = sum(p.dim() >= 2 for p in params)
    if count:
        others = f", {len(params) - count} others {rest}" if count < len(params) else ""
        warnings.warn(
            f"{owner}: {count} parameters of two or more dimensions are taken as {matrices}{others}. Embeddings and "
            f"heads are {matrices} here too: leanstep.optimizers.param_groups(model) routes them by module; {choice} "
            "means them all.",
            stacklevel=4,  # above the constructors of the class and of naming_options
        )


def check_number(
    owner: str, name: str, value: Any, low: float, high: float = math.inf, *, open_high: bool = False
) -> None:
    """Raise unless low <= value <= high, or < high with ``open_high``. Accepts one-element tensors.

    Without ``high``, the limit is 2**128, where float32 ends: kernels compute with float32 settings.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            label = "Tensor lr" if name == "learning rate" else f"{name} as a tensor"
            raise ValueError(f"{label} must be 1-element; {owner} got shape {tuple(value.shape)}")
        if value.device.type not in ("cpu", "meta"):
            return  # reading it would wait for the device
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r:.80}{_number_in(value)}")
    if not isinstance(value, (int, float)):  # numpy compares in the number's dtype, where the limit overflows
        value = float(value)
    if high == math.inf:
        high, open_high = 2.0**128, True
    too_large = isinstance(value, int) and abs(value) >= 2**63  # for torch; write a float
    if too_large or not (low <= value <= high) or (open_high and value == high) or math.isnan(value):
        end = ")" if open_high else "]"
        raise ValueError(f"Invalid {name}: {value}; {owner} expects it in [{low}, {high}{end}")


def _number_in(value: Any) -> str:
    """Return the advice for a number that is written as a string, as YAML reads 1e-3."""
    try:
        return f"; write {float(value):g}, without quotes" if isinstance(value, str) else ""
    except ValueError:
        return ""


def check_count(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless the value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"Invalid {name}: {value!r:.80}; {owner} expects an int of at least 1, and less than 2**31")


def check_saved_count(owner: str, name: str, group: dict[str, Any]) -> None:
    """Raise ValueError unless a saved entry is a whole number of at least 0."""
    value = group[name]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"Invalid {name}: {value!r:.80}; {owner} expects an int in [0, 2**63)")


def check_layout(owner: str, group: dict[str, Any]) -> None:
    """Raise unless ``transposed`` and ``flatten`` of a group are bools, and at most one is True."""
    check_flags(owner, group, ("transposed", "flatten"))
    if group["transposed"] and group["flatten"]:
        raise ValueError(
            f"{owner}: transposed is for matrices and stacks of them, flatten for convolutions; choose one"
        )


def check_blocks(owner: str, group: dict[str, Any]) -> None:
    """Raise unless ``blocks`` of a group is None, an int, or several ints; all at least 1."""
    blocks = group["blocks"]
    if blocks is None:
        return
    sizes = blocks if isinstance(blocks, (tuple, list)) else (blocks,)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(
            f"Invalid blocks: {blocks!r:.80}; {owner} expects None, the rows of every block, or a tuple with the rows "
            "of each block, as ints of at least 1"
        )


def check_rows(owner: str, group: dict[str, Any], position: int, rows: int) -> None:
    """Raise ValueError unless the blocks of a group cover the rows of its parameter at ``position``."""
    blocks = group["blocks"]
    covered = rows if blocks is None else sum(blocks) if isinstance(blocks, (tuple, list)) else rows - rows % blocks
    if covered != rows:
        side = ", which is stored (in, out)," if group["transposed"] else ""
        raise ValueError(
            f"{owner}: blocks={blocks!r:.80} have {covered} rows, and {describe(group, position)}{side} has {rows}. "
            "Give blocks whose rows add up, or put the parameter in a group without blocks."
        )


def check_flags(owner: str, group: dict[str, Any], flags: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise unless the named settings are bools; the ``optional`` ones may be None."""
    for name in (*flags, *optional):
        if not isinstance(group[name], bool) and not (name in optional and group[name] is None):
            expected = "True, False or None" if name in optional else "True or False"
            raise TypeError(f"{owner}: {name} must be {expected}, got {group[name]!r}")


def check_choice(owner: str, name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise unless the value is one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"Invalid {name}: {value!r}; {owner} expects one of {tuple(choices)}")


def check_dtype(owner: str, name: str, dtype: Any, *, codes: bool = False) -> None:
    """Raise unless the value is a floating dtype of 16 bits or more, the name of one, or None.

    With ``codes``, torch.int8, torch.float8_e4m3fn and "fp8" are valid too.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if codes and (dtype == "fp8" or named in (torch.int8, torch.float8_e4m3fn)):
        return
    if isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize == 1:
        instead = (
            "torch.int8 or torch.float8_e4m3fn, which have a scale per 128 entries, or" if codes else "for instance"
        )
        raise TypeError(
            f"{owner}: {name} does not take {dtype!r}, whose numbers are too few; take {instead} torch.bfloat16"
        )
    if dtype is None or (isinstance(named, torch.dtype) and named.is_floating_point):
        return
    expected = "a floating torch.dtype, torch.int8, 'fp8'" if codes else "a floating torch.dtype"
    raise TypeError(f"{owner}: {name} must be {expected} or None, got {dtype!r}")


def check_betas(owner: str, betas: Any) -> None:
    """Raise unless betas are two numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; {owner} expects two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        check_number(owner, f"beta parameter at index {i}", beta, 0.0, 1.0, open_high=True)


def check_rounding(owner: str, group: dict[str, Any]) -> None:
    """Raise unless ``rounding`` and ``seed`` of a group are valid."""
    check_choice(owner, "rounding", group["rounding"], ROUNDINGS)
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"Invalid seed: {seed!r}; {owner} expects an int in [0, 2**32)")
