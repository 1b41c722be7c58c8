"""``leanstep check``: report the needs of a run and what would stop it, before it starts.

Allocates nothing of the model's size. An error in one section becomes a problem, and the other sections still run.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch.utils.benchmark import Timer

from leanstep._files import format_bytes, parse_json, read_text
from leanstep._memory import free_memory
from leanstep.pruning.folder.files import stored_tensors
from leanstep.pruning.folder.loading import check_values, check_weights
from leanstep.recipes.check.costs import MemoryEstimate, check_layers, disk_need, estimate, flops_per_token, meta_model
from leanstep.recipes.config.loader import dump
from leanstep.recipes.config.schema import RunConfig, accumulation_steps, targets_note, trained_size
from leanstep.recipes.data.hub import check_hub, from_hub, offline, offline_recipes, unreachable
from leanstep.recipes.data.sequences import load_data
from leanstep.recipes.data.sources import find_files, look, open_corpus, open_stream, open_validation
from leanstep.recipes.data.tokens import open_tokenizer, vocabulary_size
from leanstep.recipes.methods.pruned import masked_names, pruned_start_warning, zeros_of
from leanstep.recipes.methods.sparse import plan, run_operations, schedule_of
from leanstep.recipes.report.formatting import format_duration
from leanstep.recipes.report.progress import ProgressBar
from leanstep.recipes.training.build import build_optimizer, missing_here, optimizer_section, trackers_of, wants_cpu
from leanstep.recipes.training.checkpoint import choose_start, find_checkpoints
from leanstep.recipes.training.failures import lighter_state
from leanstep.recipes.training.folder import RunFolder, holder_of, is_held
from leanstep.recipes.training.initial import check_initial_folder, check_initial_tokenizer, initial_problem

LOAD_LIMIT = 64 * 2**20  # tokenise local text up to this size to count its tokens; the run reuses the cache

# bytes of the weights of model.init_from that are read
_READ = 2**30


@dataclass
class Section:
    """One section of the report: lines to print, and problems. Any problem makes the check fail."""

    title: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """Add a line with a name in front."""
        self.lines.append(f"{name:<15} {text}")

    def add_table(self, rows: list[tuple[str, ...]]) -> None:
        """Add rows as aligned columns; columns of numbers are flush right."""
        columns = []
        for column in zip(*rows, strict=True):
            width, numeric = max(map(len, column)), all(cell[:1].isdigit() for cell in column[1:])
            columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
        self.lines += ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def check(config: RunConfig, *, world_size: int = 1, progress: ProgressBar | None = None) -> int:
    """Print the report, problems first; ``progress`` shows the way there. Returns 1 if there are any, else 0."""
    progress = progress or ProgressBar(shown=False)
    sections = list(Check(config, world_size, progress).sections())
    progress.close()
    # two sections may meet the same problem: the first one tells it
    first = {problem: section for section in reversed(sections) for problem in section.problems}
    told = [(section, problem) for section in sections for problem in section.problems if first[problem] is section]
    problems = [f"  - {section.title.lower()}: {problem}" for section, problem in told]
    verdict = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}" if problems else "ready to train"
    print("\n".join([f"{config.name}: {verdict}", *problems, *(f"  {note}" for note in config.notes)]))
    for section in sections:
        if section.lines:
            print("\n".join([f"\n{section.title}", *(f"  {line}" for line in section.lines)]))
    return 1 if problems else 0


@dataclass
class Check:
    """The report on a recipe. Each method fills one section; the attributes after ``world_size`` are for later ones."""

    config: RunConfig
    world_size: int = 1
    progress: Callable[[int, int, str], object] = lambda *_: None
    vocabulary: int = 0
    train_sequences: int | None = None
    offline: bool = False
    device_name: str = "cpu"
    estimate: MemoryEstimate | None = None

    def sections(self) -> Iterator[Section]:
        """Yield the sections of the report, in order."""
        parts = (
            ("Device", self.device),
            ("Network", self.network),
            ("Initial model", self.initial),
            ("Data", self.data),
            ("Length", self.length),
            ("Parameter groups", self.groups),
            ("Sparsity", self.sparsity),
            ("Pruning", self.pruning),
            ("Memory", self.memory),
            ("Time", self.time),
            ("Disk", self.disk),
            ("Output", self.output),
            ("Recipe", self.recipe),
        )
        for number, (title, fill) in enumerate(parts):
            self.progress(number, len(parts), "check")
            section = Section(title)
            try:
                with offline() if self.offline else nullcontext():
                    fill(section)
            except Exception as error:
                section.problems.append(str(error) or type(error).__name__)
            yield section

    def recipe(self, section: Section) -> None:
        """Print the resolved recipe."""
        section.lines += dump(self.config).splitlines()

    def device(self, section: Section) -> None:
        """Check that the device exists and supports precision and sharding, and that the trackers are installed."""
        config, world_size = self.config, self.world_size
        cpu = wants_cpu(config.device)
        self.device_name = "cpu" if cpu else str(torch.accelerator.current_accelerator())
        section.add("device", f"{self.device_name} (asked for: {config.device})")
        section.add("precision", config.precision)
        section.add("processes", f"{world_size}, {config.distributed.strategy}" if world_size > 1 else "1")
        section.add("log", ", ".join(["log.jsonl", "report.html", *trackers_of(config)]))
        section.problems += missing_here(config, cpu)
        if not cpu and world_size > torch.accelerator.device_count():
            section.problems.append(
                f"{world_size} processes need as many devices, there are {torch.accelerator.device_count()}"
            )

    def network(self, section: Section) -> None:
        """List what the run downloads. Asks once whether the hub answers; later sections reuse the answer."""
        names = from_hub(self.config)
        if not names:
            return
        section.add("from the hub", ", ".join(f"{name} ({key})" for key, name in names.items()))
        reason = unreachable()
        if reason is None:
            section.add("hub", "can be reached")
            return
        self.offline = True
        with offline():
            missing = [f"{name} ({key})" for key, name in names.items() if not _is_cached(key, name)]
        section.add("hub", f"cannot be reached ({reason})")
        section.add("offline recipes", ", ".join(offline_recipes()))
        if missing:
            section.problems.append(
                f"needs the network: {', '.join(missing)}; offline recipes: {', '.join(offline_recipes())}; or copy "
                "the data here and set data.source, data.path and data.tokenizer"
            )

    def initial(self, section: Section) -> None:
        """Check that the files of ``model.init_from`` hold every weight, in the model's shape; small ones are read."""
        source, new_heads = self.config.model.init_from, self.config.model.new_heads
        if not source:
            return
        check_initial_folder(source, self.config.source_file)
        section.add("from", source)
        if not Path(source).expanduser().is_dir():
            section.add("weights", "not compared: they are not in a folder here")
            return
        folder = Path(source).expanduser()
        try:
            check_weights(source, new_heads=new_heads)
            size = sum(file.stat().st_size for file in {file for file, *_ in stored_tensors(folder)})
            if size <= _READ:
                check_values(folder)
        except ValueError as error:
            raise ValueError(initial_problem(error)) from error
        drawn = f", but for {', '.join(new_heads)}, drawn anew" if new_heads else ""
        section.add("weights", f"fit its config.json{drawn}")
        told = "all finite" if size <= _READ else "not read: NaN and infinity are refused when the run begins"
        section.add("values", f"{format_bytes(size)}, {told}")

    def data(self, section: Section) -> None:
        """Check that the text is readable, the tokenizer opens and its vocabulary fits the model."""
        config, data = self.config, self.config.data
        unknown = (
            self.offline and "data.tokenizer" in from_hub(config) and not _is_cached("data.tokenizer", data.tokenizer)
        )
        if unknown:
            section.add("tokenizer", f"{data.tokenizer}, not in the hub's cache: its vocabulary is not known")
        else:
            size = trained_size(data.tokenizer)
            self.vocabulary = size if size is not None else vocabulary_size(open_tokenizer(data.tokenizer))
            at_most = "" if size is None else "at most "
            section.add("tokenizer", f"{data.tokenizer}, {at_most}{self.vocabulary:,} tokens")
        if (size := self.model_vocabulary()) is not None:
            section.add("model", f"vocabulary of {size:,}")
            self.compare_vocabularies(section)
        if data.source == "hf":
            if not self.offline:
                check_hub(data.name or "")
            section.add("source", f"hub dataset {data.name} {'not checked' if self.offline else 'exists'}")
            if data.val_path:
                open_validation(data)
            return
        try:
            check_layers(config)
        except ValueError:
            section.add("source", "not read: repair the problems below first")
            return
        files = find_files(data.path, data.source) if data.path and data.source != "sotu" else []
        if data.streaming or unknown or sum(file.stat().st_size for file in files) > LOAD_LIMIT:
            if data.source == "chat":
                look(data)
            else:
                (open_stream if data.streaming else open_corpus)(data)
                open_validation(data)
            section.add("source", f"{data.source} {data.path}, read as text; its tokens are not counted here")
            return
        loaded = load_data(data, seed=config.seed, rank=0, world_size=1)
        check_initial_tokenizer(config, loaded.tokenizer)
        for name, fact in loaded.facts.items():
            if name != "tokenizer":
                section.add(name, fact)
        self.train_sequences = len(loaded.train)
        if loaded.vocabulary < self.vocabulary:
            section.add("trained to", f"{loaded.vocabulary:,} tokens: the text gives no more")
        grows, self.vocabulary = loaded.vocabulary > self.vocabulary, loaded.vocabulary
        if grows:
            section.add("special tokens", f"the text has some: {loaded.vocabulary:,} tokens with them")
            self.compare_vocabularies(section)

    def model_vocabulary(self) -> int | None:
        """The vocabulary that the recipe or the model of ``model.init_from`` has; None if the tokenizer decides."""
        source, stated = self.config.model.init_from, self.config.model.config.get("vocab_size")
        if stated is not None or not source:
            return stated
        try:
            saved = parse_json(read_text(Path(source).expanduser() / "config.json"))
            return int((saved.get("text_config") or saved)["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def compare_vocabularies(self, section: Section) -> None:
        """Add a problem if the tokenizer produces tokens that the model does not have."""
        size, source = self.model_vocabulary(), self.config.model.init_from
        has, advice = "model.config.vocab_size is", "raise it, or leave it out to take the tokenizer's"
        if source:
            has, advice = f"the model in {source} has", "give it rows for them (resize_token_embeddings)"
        if size is not None and self.vocabulary > size:
            section.problems.append(
                f"the tokenizer {self.config.data.tokenizer} produces {self.vocabulary:,} tokens, {has} {size:,}; "
                f"{advice}"
            )

    def length(self, section: Section) -> None:
        """Count steps, tokens and epochs."""
        batch, seq_len, steps = self.config.batch, self.config.data.seq_len, self.config.steps
        sequences = batch.tokens_per_step // seq_len
        section.add("steps", f"{steps:,}")
        section.add("tokens", f"{steps * batch.tokens_per_step:,} ({batch.tokens_per_step:,} a step)")
        section.add(
            "one step",
            f"{sequences} sequences of {seq_len}: {self.world_size} process{'es' if self.world_size > 1 else ''} x "
            f"{accumulation_steps(self.config, self.world_size)} passes x {batch.micro_batch_size} sequences",
        )
        section.add("targets", targets_note(self.config.data))
        if self.train_sequences is None:
            section.add("epochs", "unknown: the text has not been counted")
            return
        section.add("epochs", f"{steps * sequences / self.train_sequences:.2f}")
        if self.train_sequences < sequences:
            section.add(
                "note",
                f"one step takes {sequences} sequences, the text has {self.train_sequences}: each step repeats some; "
                "lower batch.tokens_per_step or give more text",
            )

    def known_vocabulary(self, section: Section) -> int:
        """Return the vocabulary of tokenizer or recipe; 0, with a line in the section, if neither is known."""
        vocabulary = self.vocabulary or self.config.model.config.get("vocab_size", 0)
        if not vocabulary:
            section.add("unknown", "the tokenizer, which decides the model's vocabulary, did not open")
        return vocabulary

    def groups(self, section: Section) -> None:
        """List the parameter groups of the optimizer and their options."""
        if vocabulary := self.known_vocabulary(section):
            optimizer = build_optimizer(optimizer_section(self.config), meta_model(self.config, vocabulary))
            section.add_table(routing_rows(optimizer))

    def sparsity(self, section: Section) -> None:
        """List the layers that become N:M sparse, the schedule, and the operations in theory and on hardware."""
        config = self.config
        if not config.sparsity.patterns or not (vocabulary := self.known_vocabulary(section)):
            return
        model = meta_model(config, vocabulary)
        layers, schedule = plan(config, model), schedule_of(config)
        section.add("method", config.sparsity.method)
        section.add(
            "phases",
            f"{schedule.dense_steps:,} steps dense, {schedule.span:,} on the way, {schedule.finetune_steps:,} at the "
            "end",
        )
        operations = run_operations(config, layers, flops_per_token(model, config.data.seq_len))
        theoretical, hardware = operations.fractions()
        section.add("operations", f"{theoretical:.3f} of dense in theory, {hardware:.3f} where hardware multiplies 2:4")
        rows: list[tuple[str, ...]] = [("pattern", "layers", "weights", "way", "first")]
        for target in dict.fromkeys(layer.target for layer in layers):
            same = [layer for layer in layers if layer.target == target]
            count = sum(layer.weight.numel() for layer in same)
            patterns = " ".join(map(str, schedule.frames(target)))
            rows.append((str(target), str(len(same)), f"{count:,}", patterns, same[0].name))
        section.add_table(rows)

    def pruning(self, section: Section) -> None:
        """Count the zeros of the initial model that the run keeps."""
        config = self.config
        if not config.pruning.keep_masks:
            if warning := pruned_start_warning(config):
                section.add("note", warning)
            return
        names = masked_names(config, meta_model(config, self.vocabulary))
        folder = Path(str(config.model.init_from)).expanduser()
        counts = zeros_of(folder, names)
        if not counts:
            section.add("zeros", f"not counted: no safetensors file in {folder} has these matrices under their names")
            return
        pruned = [count for count in counts.values() if count[0]]
        if not pruned:
            section.problems.append(
                f"no matrix of {folder} has a zero to keep; prune it first (leanstep prune), or take "
                "pruning.keep_masks=false"
            )
            return
        zeros, total = map(sum, zip(*pruned, strict=True))
        section.add("zeros", f"{zeros / total:.2%} of {len(pruned)} matrices, {zeros:,} weights, which stay zero")
        if config.lora.target_modules:
            section.add("adapters", "their product is masked where the base is zero; the merged model keeps its zeros")

    def memory(self, section: Section) -> None:
        """Estimate the memory of one process and compare it with the free memory."""
        config, device = self.config, self.device_name
        if not (vocabulary := self.known_vocabulary(section)):
            return
        self.estimate = estimate(config, vocabulary, world_size=self.world_size, device=device)
        section.add_table([(name, format_bytes(size)) for name, size in self.estimate.rows()])
        free = free_memory(device)
        if free is None:
            return
        # processes on a CPU share its memory, devices do not
        need = self.estimate.peak * (self.world_size if device == "cpu" else 1)
        section.add("free now", f"{format_bytes(free)} on {device}")
        if need > free:
            half = max(1, config.batch.micro_batch_size // 2)
            hints = [f"batch.micro_batch_size={half} (same maths)", "activation_checkpointing=true"]
            hints.append("precision=bf16-pure")
            state = [f"{setting} ({why})" for setting, why in lighter_state(config)]
            # smaller batches do not help when the optimizer state alone fills the memory
            hints = [*state, *hints] if self.estimate.optimizer_state > free // 2 else [*hints, *state]
            section.problems.append(
                f"{format_bytes(need)} do not fit the {format_bytes(free)} that are free on {device}; in this order: "
                + ", ".join(hints)
            )

    def time(self, section: Section) -> None:
        """Estimate the time of all steps from their products of matrices, at the rate of the device in such."""
        config, name = self.config, self.device_name
        if vocabulary := self.known_vocabulary(section):
            model = meta_model(config, vocabulary)
            # processes on a CPU share its cores
            rate = _product_rate(model, config, name) * (1 if name == "cpu" else self.world_size)
            work = flops_per_token(model, config.data.seq_len) * config.batch.tokens_per_step * config.steps
            section.add("at least", f"{format_duration(work / rate)} for {work:.3g} operations of products of matrices")
            section.add("rate", f"{rate:.3g} a second, in the fastest of such products on {name} now")
            section.add("note", "`leanstep train` shows the time left from its second step on")

    def disk(self, section: Section) -> None:
        """Compare the size of the checkpoints with the free disk space."""
        folder = Path(self.config.out).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        section.add("free", f"{format_bytes(free)} in {folder}")
        if not os.access(folder, os.W_OK):
            section.problems.append(f"{folder} cannot be written to; choose another with out=FOLDER")
        if self.estimate is None:
            section.add("checkpoints", "unknown: the memory of the run is not known")
            return
        checkpoint, need = disk_need(self.config, self.estimate, self.world_size)
        count = self.config.checkpoint.keep_last
        section.add("checkpoint", f"{format_bytes(checkpoint)}, {count} kept and one being written")
        section.add("needed", f"{format_bytes(need)} with the final model")
        if need > free:
            section.problems.append(
                f"the run needs {format_bytes(need)}, {folder} has {format_bytes(free)}; lower checkpoint.keep_last "
                "or choose another disk with out=FOLDER"
            )

    def output(self, section: Section) -> None:
        """State whether the output folder is free or holds a run, and what ``train`` would do with it."""
        out, folder = Path(self.config.out), RunFolder(Path(self.config.out))
        section.add("folder", str(out))
        if out.exists() and not out.is_dir():
            section.problems.append(f"{out} is a file; choose another with out=FOLDER")
            return
        if is_held(out):
            section.problems.append(
                f"another process is training in {out}{holder_of(out)}; wait for it, or choose out=ANOTHER_FOLDER"
            )
            return
        try:
            start = choose_start(self.config, folder, claim=False)
        except ValueError as error:
            section.problems.append(str(error))
            return
        for note in start.notes:
            section.add("start", note)
        is_new = folder.is_empty(self.config.data.cache_dir)
        section.add("state", "no run: a new one begins" if is_new else _describe_run(folder))


def _product_rate(model: Any, config: RunConfig, device: str) -> float:
    """Operations per second in products of a micro batch's hidden states with a square matrix."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16}
    width = getattr(model.config.get_text_config(), "hidden_size", 1024)
    rows, dtype = config.batch.micro_batch_size * config.data.seq_len, dtypes.get(config.precision, torch.bfloat16)
    left, right = (torch.ones(size, width, dtype=dtype, device=device) for size in (min(rows, 4096), width))
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=torch.get_num_threads())
    # the fastest: at least this time is taken, also where other programs slow down most of the products
    return 2 * len(left) * width**2 / min(timer.blocked_autorange(min_run_time=0.3).times)


def routing_rows(optimizer: torch.optim.Optimizer) -> list[tuple[str, ...]]:
    """A header and one row for each parameter group: name, algorithm, tensors, elements, rate, decay, an example."""
    rows: list[tuple[str, ...]] = [("group", "algorithm", "tensors", "elements", "lr", "decay", "first")]
    for index, group in enumerate(optimizer.param_groups):
        parameters, names = group["params"], group.get("param_names", [])
        rows.append(
            (
                str(group.get("name", index)),
                str(group.get("algorithm", type(optimizer).__name__)),
                str(len(parameters)),
                f"{sum(parameter.numel() for parameter in parameters):,}",
                f"{float(group['lr']):g}",
                f"{group.get('weight_decay', 0):g}",
                names[0] if names else "",
            )
        )
    return rows


def _is_cached(key: str, name: str) -> bool:
    """Whether a tokenizer or model is in the hub's cache. False for datasets, which must be opened to know."""
    files = {"data.tokenizer": ("tokenizer.json", "tokenizer_config.json"), "model.init_from": ("config.json",)}
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files.get(key, ()))


def _describe_run(folder: RunFolder) -> str:
    status = folder.read_status()
    word, step = status.get("status", "a run without status.json"), status.get("step", "?")
    if word == "done":
        return f"a run that is done (step {step}): `train` leaves it as it is"
    if word == "running":
        word = "crashed: status.json says that it is running, but no process holds the folder"
    saved = find_checkpoints(folder.checkpoints)
    if not saved:
        return f"a run at step {step} ({word}) without a complete checkpoint: `train` begins it again at step 0"
    return f"a run at step {step} ({word}): `train` continues from its newest complete checkpoint, {saved[-1].name}"
