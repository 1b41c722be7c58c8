"""Find the matrices of a model to prune, group those that share a level, and restore their weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from leanstep._checkpoint.mapped import touched
from leanstep.optimizers.param_groups import parameter_roles, transposed_parameters
from leanstep.pruning.measure.batches import Batch, hooked

# share of the weights from which on bare parameters are told
_FEW = 0.05
LAYOUTS = ("out_in", "in_out", "conv")

Stored = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Layer:
    """Name and size of one prunable matrix.

    Attributes:
        name: unique among the layers that are pruned together.
        shape: (out, in), or (out, in / groups, kernel...) of a convolution.
        block: number of the transformer block it is in, from 0; None outside of blocks.
        uses: how often each weight is multiplied per sample: the output positions of a convolution, the tokens of a
            sequence.
        itemsize: bytes of a stored weight.

    Raises:
        ValueError: for fewer than two dimensions, an empty matrix, or numbers below 1.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    uses: int = 1
    itemsize: int = 4

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or self.numel < 1:
            raise ValueError(f"Layer {self.name!r}: expected a shape (out, in, ...) without zeros, got {self.shape}")
        if self.uses < 1 or self.itemsize < 1:
            raise ValueError(f"Layer {self.name!r}: uses = {self.uses} and itemsize = {self.itemsize} must be >= 1")

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def as_matrix(weight: Tensor, layout: str = "out_in") -> Tensor:
    """A weight as a matrix [out, in] that shares its memory: writes change the weight.

    Args:
        weight: the parameter's data, or one expert of a three-dimensional parameter.
        layout: "out_in" for ``nn.Linear``; "in_out" for transformers' ``Conv1D`` and experts stored [in, out], which
            are transposed; "conv" for convolutions [out, in / groups, kernel...], whose rows are flattened.

    Raises:
        ValueError: for another layout, a weight with the wrong number of dimensions, or a convolution whose strides
            allow no view as a matrix.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"as_matrix: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if (weight.dim() < 3) if layout == "conv" else (weight.dim() != 2):
        needed = "three or more" if layout == "conv" else "two"
        raise ValueError(f"as_matrix: layout {layout!r} needs {needed} dimensions, got shape {tuple(weight.shape)}")
    if layout == "in_out":
        return weight.T
    if layout == "out_in":
        return weight
    try:
        return weight.view(weight.shape[0], -1)
    except RuntimeError:
        raise ValueError(
            f"as_matrix: a convolution's weight with strides {weight.stride()} has no rows in one piece; make it "
            "contiguous (weight.contiguous()) first"
        ) from None


_PRUNED_ROLES = ("hidden", "expert", "conv")
# routers, and layers inside them, are small, and an error there sends tokens to other experts
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.\w+)?$")
_ROUTER_CLASS = re.compile(r"Router|Gate$")
_EMBEDDING = re.compile(r"embed", re.IGNORECASE)
# of a model without a head: nothing that is measured depends on it
_POOLER = re.compile(r"^pooler(\.|$)")
# bare parameters that multiply no input: state matrices, tables and biases
_NO_WEIGHT = re.compile(r"(^|[._])(A|A_log|\w*tables?|\w*bias(es)?)$")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
# up to the last number in a name, such as "layers.0.mlp.experts.3"
_NUMBERED = re.compile(r"(.*\.)?\d+(?=\.)")
# number of an expert in a list, such as "experts.3." and "experts.expert_3."; shared experts take every token
_EXPERT_NUMBER = re.compile(r"((?:^|\.)(?!\w*shared)\w*expert\w*\.(?:\w*_)?)\d+(?=\.)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Target:
    """One matrix to prune: a parameter, or one expert of a three-dimensional one.

    Attributes:
        layer: name and size for allocations. ``layer.name`` is the parameter's name in the model; an expert's name ends
            with its number, as in ``"model.layers.0.mlp.experts.down_proj[3]"``.
        parameter: the parameter's name.
        modules: those that own it; more than one for tied weights.
        attribute: the parameter's name in the first module.
        layout: see :func:`leanstep.pruning.as_matrix`.
        expert: number of the expert, None for a parameter that is one matrix.
    """

    layer: Layer
    parameter: str
    modules: tuple[nn.Module, ...]
    attribute: str
    layout: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.layer.name

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to an expert, which may get no token: of a fused parameter, or in a list of experts."""
        return self.expert is not None or self.kind != self.parameter

    @property
    def origin(self) -> str:
        """Name of the expert, or of the innermost numbered module, that it belongs to; without any, its own name."""
        if self.expert is not None:
            return f"{self.parameter.rpartition('.')[0]}[{self.expert}]"
        numbered = _NUMBERED.match(self.parameter)
        return numbered.group() if numbered else self.parameter

    @property
    def kind(self) -> str:
        """The parameter's name, with ``*`` for the number of an expert in a list: the same for all experts."""
        return _EXPERT_NUMBER.sub(r"\1*", self.parameter, count=1)

    @property
    def owned(self) -> nn.Parameter:
        """The parameter that it is, or is an expert of."""
        return getattr(self.module, self.attribute)

    @property
    def module(self) -> nn.Module:
        """The first module that owns it."""
        return self.modules[0]

    @property
    def input_modules(self) -> list[nn.Module]:
        """Those that multiply inputs by it: all but embeddings."""
        return [module for module in self.modules if not isinstance(module, nn.Embedding)]

    @property
    def weight(self) -> Tensor:
        """The current weight [out, in], a view: writes change the model."""
        return self.matrix_in(touched(self.owned).data)

    def matrix_in(self, values: Tensor) -> Tensor:
        """The matrix [out, in] in values like those of the parameter, such as its gradient; a view."""
        return as_matrix(values if self.expert is None else values[self.expert], self.layout)


def parameters_of(targets: Iterable[Target]) -> dict[str, nn.Parameter]:
    """The parameters of some targets, by name."""
    return {target.parameter: target.owned for target in targets}


def find_targets(
    model: nn.Module, *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> list[Target]:
    """Find the matrices to prune, in the order of the model's parameters.

    Takes linear layers, transformers' ``Conv1D``, convolutions, and each expert of fused expert weights. Leaves out
    embeddings of every kind (patches and positions too), the head, weights tied to these, norms, biases, the routers
    of mixtures of experts, and the pooler of a model without a head.

    Args:
        model: any module; frozen parameters count as well.
        include: wildcards over parameter names, such as ``"*.mlp.*"``. Takes only matching matrices, including
            a matching head or router. None: the matrices named above.
        exclude: wildcards; matching parameters are left out.

    Raises:
        ValueError: for a wildcard that matches nothing, nothing left to prune, or a matrix among those to prune that
            is quantised, parametrized, or tied between modules of different classes.
    """
    targets = empty_targets(model, include=include, exclude=exclude)
    for target in targets:
        _check_weight(target.parameter, model.get_parameter(target.parameter))
    return targets


def empty_targets(
    model: nn.Module, *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()
) -> list[Target]:
    """As :func:`find_targets`, also of a model on the meta device. The kind of the weights is not checked."""
    names = prunable_names(model, include=include, exclude=exclude)
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    transposed, blocks, owners = transposed_parameters(model), block_numbers(names), _owners(model)
    targets = []
    for name in names:
        attribute = name.rpartition(".")[2]
        parameter = parameters[name]
        _check_tied(name, owners[parameter])
        layout = "in_out" if id(parameters[name]) in transposed else "out_in"
        if roles[name] == "conv":
            layout = "conv"
        experts = range(parameter.shape[0]) if roles[name] == "expert" else [None]
        for expert in experts:
            shape = tuple(parameter.shape) if expert is None else tuple(parameter.shape[1:])
            layer = Layer(
                name if expert is None else f"{name}[{expert}]",
                shape[::-1] if layout == "in_out" else shape,
                block=blocks.get(name),
                itemsize=parameter.element_size(),
            )
            targets.append(Target(layer, name, owners[parameter], attribute, layout, expert))
    return targets


def prunable_names(model: nn.Module, *, include: Iterable[str] | None = None, exclude: Iterable[str] = ()) -> list[str]:
    """Names of the parameters that :func:`find_targets` would prune; the model may be on the meta device."""
    _refuse_quantised(model)
    parameters = dict(model.named_parameters())
    rules = None if include is None else list(include)
    names = _choose(model, parameter_roles(model), parameters, rules, list(exclude))
    _refuse_parametrized(model, names)
    return names


def dense_note(model: nn.Module) -> str:
    """Which weights stay dense because they are bare parameters, in one sentence; "" where these are few."""
    roles, sizes = parameter_roles(model), {name: parameter.numel() for name, parameter in model.named_parameters()}
    pruned = {name for name in sizes if _is_pruned(model, name, roles[name]) and not _special(model, name)}
    bare = [
        name
        for name, parameter in model.named_parameters()
        if roles[name] == "other" and parameter.dim() > 1 and name not in pruned and not _special(model, name)
    ]
    weights = sum(sizes[name] for name in bare)
    share = weights / (weights + sum(sizes[name] for name in pruned) or 1)
    if share < _FEW:
        return ""
    return (
        f"{share:.0%} of the weights beside embeddings and head stay dense, in {len(bare)} parameters that are no "
        f"linear layer, convolution or experts: {abbreviate(bare, 3)}"
    )


def count_uses(model: nn.Module, targets: Sequence[Target], batch: Batch) -> list[Target]:
    """Count ``layer.uses`` of the targets on a batch: how often each weight is multiplied per sample.

    For budgets of FLOPs. A convolution uses its weights at every output position, a linear layer for every token; both
    at every call of a pass. Experts are counted as if every token came to each.
    """
    rows: Counter[nn.Module] = Counter()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        channels = first.shape[1 if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1]
        rows[module] += first.numel() // channels

    modules = {module for target in targets for module in target.modules}
    with hooked(module.register_forward_hook(hook) for module in modules), torch.no_grad():
        batch.run(model)
    uses = {target: sum(rows[module] for module in target.modules) // batch.size for target in targets}
    return [replace(target, layer=replace(target.layer, uses=max(1, uses[target]))) for target in targets]


def _choose(
    model: nn.Module,
    roles: dict[str, str],
    parameters: dict[str, nn.Parameter],
    include: list[str] | None,
    exclude: list[str],
) -> list[str]:
    matrices = [name for name, parameter in parameters.items() if parameter.dim() > 1]
    for rule in [*(include or []), *exclude]:
        if not any(fnmatchcase(name, rule) for name in matrices):
            raise ValueError(
                f"the rule {rule!r} matches no matrix of {type(model).__name__}; they are {abbreviate(matrices)}"
            )
    if include is None:
        selected = [name for name in matrices if _is_pruned(model, name, roles[name]) and not _special(model, name)]
    else:
        selected = [name for name in matrices if any(fnmatchcase(name, rule) for rule in include)]
        wrong = [name for name in selected if not _is_pruned(model, name, roles[name], named=True)]
        if wrong:
            raise ValueError(f"{wrong[0]} is of the kind {roles[wrong[0]]!r}, which is never pruned; narrow the rules")
    selected = [name for name in selected if not any(fnmatchcase(name, rule) for rule in exclude)]
    if not selected:
        raise ValueError(f"{type(model).__name__} has nothing to prune; its matrices are {abbreviate(matrices)}")
    return selected


def _is_pruned(model: nn.Module, name: str, role: str, *, named: bool = False) -> bool:
    """Whether a matrix is pruned by default, or if a rule names it (``named``)."""
    if role == "other":
        # linear layers with one output, and bare matrices of modules that are not torch's
        parameter = model.get_parameter(name)
        linear = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
        return parameter.dim() == 2 and (linear or (named and not _NO_WEIGHT.search(name)))
    return role in _PRUNED_ROLES or (named and role in ("head", "router"))


def _special(model: nn.Module, name: str) -> bool:
    """Whether a matrix is a router, an embedding, or the pooler of a model without a head."""
    module_name = name.rpartition(".")[0]
    module = model.get_submodule(module_name)
    return bool(
        _ROUTER.search(module_name)
        or _ROUTER_CLASS.search(type(module).__name__)
        or _EMBEDDING.search(module_name)
        or _POOLER.search(module_name)
    )


def block_numbers(names: list[str]) -> dict[str, int]:
    """Block of each matrix that is in one: the index of its entry in a module list.

    A list of blocks has an entry with several matrices. The entries of several such lists, as in encoder-decoders, are
    counted on in the order of ``names``. Where there is none, a list that holds three quarters of the matrices counts,
    else every matrix is a block.
    """
    matches = {name: match for name in names if (match := _INDEX.search(name))}
    list_of = {name: name[: match.start(1)] for name, match in matches.items()}
    entry_of = {name: name[: match.end(1)] for name, match in matches.items()}
    sizes, lengths = Counter(entry_of.values()), Counter(list_of.values())
    lists = {list_of[name] for name, entry in entry_of.items() if sizes[entry] > 1}
    if not lists:
        lists = {prefix for prefix, count in lengths.items() if 4 * count >= 3 * len(names)}
    if not lists:
        return {name: index for index, name in enumerate(names)}
    if len(lists) == 1:
        return {name: int(match[1]) for name, match in matches.items() if list_of[name] in lists}
    entries = {name: entry for name, entry in entry_of.items() if list_of[name] in lists}
    order = {entry: number for number, entry in enumerate(dict.fromkeys(entries.values()))}
    return {name: order[entry] for name, entry in entries.items()}


def _refuse_parametrized(model: nn.Module, names: Sequence[str]) -> None:
    """Raise ValueError for a selected weight that a parametrization computes."""
    for name in names:
        owner, parametrized, rest = name.rpartition("parametrizations.")
        if parametrized:
            attribute = rest.partition(".")[0]
            kind = model.get_submodule(f"{owner}parametrizations.{attribute}")[0]  # type: ignore[index]
            raise ValueError(
                f"{owner}{attribute} is parametrized ({kind}); bake it into the weight first "
                "(leanstep.sparsity.squash, or torch's remove_parametrizations), or leave it out with "
                f"exclude={owner + '*'!r}"
            )


def _refuse_quantised(model: nn.Module) -> None:
    quantised = getattr(model, "hf_quantizer", None) or getattr(
        getattr(model, "config", None), "quantization_config", None
    )
    if quantised is not None:
        raise ValueError(
            f"{type(model).__name__} is quantised ({type(quantised).__name__}): expected plain floating weights; prune "
            "the model it was made from, and quantise the result"
        )


def _check_weight(name: str, parameter: nn.Parameter) -> None:
    if not parameter.is_floating_point() or parameter.element_size() < 2 or type(parameter.data) is not Tensor:
        raise ValueError(
            f"{name} is quantised ({type(parameter.data).__name__} of {parameter.dtype}): expected a plain weight of "
            "fp32, bf16, fp16 or fp64; prune the model it was made from, and quantise the result"
        )
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values; load the model first")


def _owners(model: nn.Module) -> dict[nn.Parameter, tuple[nn.Module, ...]]:
    owners: dict[nn.Parameter, tuple[nn.Module, ...]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = (*owners.get(parameter, ()), module)
    return owners


def _check_tied(name: str, modules: Sequence[nn.Module]) -> None:
    classes = {nn.Linear if isinstance(module, nn.Linear) else type(module) for module in modules}
    if len(classes) > 1:
        raise ValueError(
            f"{name} is tied between {' and '.join(sorted(one.__name__ for one in classes))}: expected modules of one "
            "class, which multiply it in one way; leave it out with exclude"
        )


def abbreviate(names: Sequence[str], most: int = 12) -> str:
    """The first names in a message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


GRANULARITIES = ("matrix", "role", "block")
# matrices of a transformer block that read the same input, or whose errors are of one kind
_ROLES = (
    ("qk", re.compile(r"\.(q_proj|k_proj|query|key)\.weight$")),
    # BERT's attention ends in attention.output.dense, its feed-forward layers in intermediate.dense and output.dense
    ("vo", re.compile(r"(\.(v_proj|o_proj|value|out_proj)|(?<!intermediate)(?<!\d\.output)\.dense)\.weight$")),
    ("up", re.compile(r"\.intermediate\.dense\.weight$")),
    ("down", re.compile(r"\d\.output\.dense\.weight$")),
    ("up", re.compile(r"\.(gate_proj|up_proj|fc1|c_fc|gate_up_proj|w1|w3)(\.weight)?(\[\d+\])?$")),
)


@dataclass(frozen=True)
class Group:
    """Targets that share one sparsity; ``layer`` stands for them in allocations."""

    layer: Layer
    targets: tuple[Target, ...]

    @property
    def is_end(self) -> bool:
        """Whether its curve is measured in any case: that of an embedding or a head."""
        return False

    @property
    def name(self) -> str:
        """Name of the group, or of its only matrix."""
        return self.layer.name

    @property
    def sizes(self) -> list[int]:
        """Weights of each target."""
        return [target.layer.numel for target in self.targets]

    def nonzero(self) -> int:
        """Current number of nonzero weights; all weights of a model without values."""
        return sum(
            target.layer.numel if target.weight.is_meta else int(target.weight.count_nonzero())
            for target in self.targets
        )


def make_groups(targets: Sequence[Target], granularity: str = "matrix") -> list[Group]:
    """Group targets that share a level. A matrix outside of blocks is a group of its own.

    Args:
        granularity: ``matrix``: every matrix alone. ``role``: a block's q and k, v and o, up and gate, others by name.
            ``block``: all matrices of a block.

    Raises:
        ValueError: for another granularity.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    by_group: dict[str, list[Target]] = {}
    for target in targets:
        name = target.name
        if target.layer.block is not None and granularity != "matrix":
            kinds = (kind for kind, pattern in _ROLES if pattern.search(name))
            role = next(kinds, role_of(name)) if granularity == "role" else "all"
            name = f"block {target.layer.block}: {role}"
        by_group.setdefault(name, []).append(target)
    return [Group(_joined(name, group), tuple(group)) for name, group in by_group.items()]


def role_of(name: str) -> str:
    """The kind of a matrix within its block: ``q_proj``, ``c_fc``, ``down_proj``."""
    return re.sub(r"\[\d+\]$", "", name).removesuffix(".weight").rpartition(".")[2]


def _joined(name: str, targets: Sequence[Target]) -> Layer:
    if len(targets) == 1:
        return targets[0].layer
    total = sum(target.layer.numel for target in targets)
    return replace(targets[0].layer, name=name, shape=(total, 1))


def check_filled(groups: Sequence[Group], m: int) -> None:
    """Raise ValueError for a matrix whose inputs N:M groups of ``m`` do not fill."""
    for target in (target for group in groups for target in group.targets):
        inputs = target.layer.shape[1]
        if inputs % m:
            raise ValueError(
                f"{target.name} has {inputs} inputs, which groups of {m} do not fill; leave it out "
                "with exclude, or use another pattern"
            )


def split_count(count: int, sizes: Sequence[int]) -> list[int]:
    """Deal ``count`` weights to matrices in proportion to their sizes, to the exact sum."""
    total = sum(sizes)
    shares = [count * size // total for size in sizes]
    # the rest after rounding down goes to the largest remainders
    order = sorted(range(len(sizes)), key=lambda index: -(count * sizes[index] % total))
    for index in order[: count - sum(shares)]:
        shares[index] += 1
    return shares


class WeightSnapshot:
    """The original parameters of some targets.

    Args:
        targets: matrices that will be changed.
        stored: function from a parameter's name to its stored values on the CPU, or to None. Parameters equal to their
            stored values are not copied. Without a function, all are.
    """

    def __init__(self, targets: Sequence[Target], stored: Stored | None = None) -> None:
        self._parameters = parameters_of(targets)
        self._stored = stored
        self._copies: dict[str, Tensor] | None = None
        self._changed = False

    @torch.no_grad()
    def take(self) -> None:
        """Copy the parameters that are not stored. Call it before changing weights."""
        if self._copies is None:
            self._copies = {
                name: parameter.detach().clone()
                for name, parameter in self._parameters.items()
                if not self._is_stored(name, parameter)
            }
        self._changed = True

    def _is_stored(self, name: str, parameter: Tensor) -> bool:
        value = None if self._stored is None else self._stored(name)
        if value is None or value.dtype != parameter.dtype or value.shape != parameter.shape:
            return False
        return torch.equal(value.to(parameter.device), touched(parameter))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all weights, bit for bit."""
        if not self._changed or self._copies is None:
            return
        for name, parameter in self._parameters.items():
            touched(parameter).copy_(self._original(name))
        self._changed = False

    def matrix(self, target: Target) -> Tensor:
        """The original weight [out, in] of a target, to be read. Call :meth:`take` before."""
        return target.matrix_in(self._original(target.parameter))

    def _original(self, name: str) -> Tensor:
        assert self._copies is not None
        value = self._copies.get(name)
        if value is None and self._stored is not None:
            value = self._stored(name)
        assert value is not None
        return value

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Context manager: restores all weights on exit, bit for bit."""
        self.take()
        try:
            yield
        finally:
            self.restore()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Context manager: restores all weights if an error is raised inside."""
        try:
            yield
        except BaseException:
            self.restore()
            raise
