"""Write and read checkpoints through Accelerate; write the final model, samples and the report.

Training goes on when a full disk prevents a checkpoint. The newest complete checkpoint stays.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from leanstep._checkpoint.files import load_tensors
from leanstep._files import STAGED, format_bytes, free_bytes, one_line, publish_folder, remove
from leanstep._process import StopFlag
from leanstep.lora import save_adapter
from leanstep.lora.apply import is_adapted
from leanstep.lora.merge import config_of_merged, merged_state_dict
from leanstep.pruning.folder.loading import begin_tokens, open_model
from leanstep.recipes.config.schema import CheckpointConfig, ExpectConfig, RunConfig
from leanstep.recipes.data.batches import Windows
from leanstep.recipes.data.sequences import LoadedData
from leanstep.recipes.methods.lora import ADAPTER, load_adapters
from leanstep.recipes.methods.sparse import load_sparse, without_sparse
from leanstep.recipes.report.samples import TEMPERATURE, held_out_prompts, sample, word_starts
from leanstep.recipes.training.build import all_agree, on_main_process
from leanstep.recipes.training.checkpoint import (
    CheckpointError,
    TrainState,
    checkpoint_name,
    commit,
    find_checkpoints,
    prune,
    reading,
    replace_symlink,
    staging,
    write_state,
)
from leanstep.recipes.training.failures import RunFailure, disk_trouble
from leanstep.recipes.training.folder import RunFolder
from leanstep.recipes.training.logger import RunLogger
from leanstep.recipes.training.parts import Part
from leanstep.sparsity import plain_state_dict
from leanstep.sparsity.training.modules import sparse_layers

_DONE = object()


class Saver:
    """Saves and loads one run. Weights are stored once, in ``hf/``, unless they are sharded.

    Every process must call :meth:`save` and :meth:`load` at the same step. Memory: the writers' buffers; for a sharded
    model also the whole state dict on the CPU of the first process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: RunFolder,
        config: CheckpointConfig,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        parts: Sequence[Part] = (),
    ) -> None:
        self._accelerator, self._folder, self._config, self._model = accelerator, folder, config, model
        self._tokenizer, self._say, self.parts = tokenizer, say, parts
        self.card: Callable[..., None] = lambda *_, **__: None  # the run says what it writes into a folder
        self._sharded = accelerator.distributed_type == "FSDP"
        # why the last save failed; log lines show it until a save succeeds
        self.trouble: str | None = None
        if not self._sharded:
            accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
            accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, state: TrainState, windows: Windows) -> bool:
        """Write the checkpoint of ``state.step``. Returns False on a disk error, and raises other errors."""
        # weights and optimizer state; the rest of a checkpoint is small
        states = [list(optimizer.state.values()) for optimizer in self._accelerator._optimizers]
        leaves = [*self._model.parameters(), *torch.utils._pytree.tree_leaves(states)]
        leaves += chain.from_iterable(part.tensors() for part in self.parts)
        needed = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))

        def disk_problem() -> str | None:
            try:
                free = free_bytes(self._folder.root)
            except OSError as error:
                return f"cannot write: {error}"
            return f"disk full, {format_bytes(needed)} needed, {format_bytes(free)} free" if free < needed else None

        problem = on_main_process(self._accelerator, disk_problem)
        if problem is None:
            staged = self._folder.checkpoints / f"{STAGED}{checkpoint_name(state.step)}"
            fill = partial(self._fill, state=state, windows=windows)
            problem = self.write(staged, fill, lambda path: self.update_links(commit(path), state), needed)
        self.trouble = problem and f"checkpoint at step {state.step} failed: {problem}"
        if problem:
            last = find_checkpoints(self._folder.checkpoints)
            newest = last[-1].name if last else "none"
            self._say(f"WARNING: {self.trouble}; training goes on, newest complete checkpoint: {newest}")
        return problem is None

    def write(
        self, staged: Path, fill: Callable[[Path], Iterator[None]], publish: Callable[[Path], None], needed: int = 0
    ) -> str | None:
        """Fill the folder ``staged`` in every process, then publish it in the first one.

        ``fill`` yields before each part that no process may begin unless all have done the one before: where one fails
        alone, the others would wait for it in the collective calls of the next part.

        Returns None, or the disk error that prevented it; then ``staged`` is removed. Raises other errors. ``needed``:
        bytes to write.
        """

        def parts() -> Iterator[None]:
            yield from fill(staged)
            yield
            if self._accelerator.is_main_process:
                publish(staged)

        problem, failure = None, None
        done, rest = False, parts()
        while not done:
            try:
                done = next(rest, _DONE) is _DONE
            except Exception as error:
                problem, failure = disk_trouble(error, self._folder.root, needed), error
            # also a barrier: every process has written its files
            if not all_agree(self._accelerator, failure is None):
                break
        else:
            return None
        if self._accelerator.is_main_process:
            shutil.rmtree(staged, ignore_errors=True)
        if failure is not None and problem is None:
            raise failure
        return problem or "another process could not write its part"

    def _fill(self, staged: Path, state: TrainState, windows: Windows) -> Iterator[None]:
        accelerator = self._accelerator
        if accelerator.is_main_process:
            staging(self._folder.checkpoints, state.step)
        yield
        yield from self.export(staged / "hf")
        yield
        accelerator.save_state(str(staged / "trainer"))
        stream = windows.state()
        if stream is not None:
            torch.save(stream, staged / "trainer" / f"stream_{accelerator.process_index}.pt")
        for part in self.parts:
            part.save(staged / "trainer")
        if accelerator.is_main_process:
            write_state(staged, state)

    def export(self, path: Path, replaces: Path | None = None) -> Iterator[None]:
        """Write model, tokenizer and card as a Hugging Face folder, in parts of :meth:`write`."""
        model: PreTrainedModel = self._accelerator.unwrap_model(self._model)
        weights = self._accelerator.get_state_dict(self._model) if self._sharded else None
        yield
        if self._accelerator.is_main_process:
            if is_adapted(model):
                weights = merged_state_dict(model, device="cpu")
            elif sparse_layers(model):
                # masked weights under plain names
                weights = plain_state_dict(model, weights)
            with config_of_merged(model):
                model.save_pretrained(path, state_dict=weights)
            if is_adapted(model):
                save_adapter(model, path / ADAPTER)
            for part in self.parts:
                part.export(model, path)
            self._tokenizer.save_pretrained(path)
            self.card(path, replaces=replaces)
            if is_adapted(model):
                self.card(path / ADAPTER, relation="adapter", tags=["lora"], replaces=replaces and replaces / ADAPTER)

    def update_links(self, path: Path, state: TrainState) -> None:
        """Point the links to the newest checkpoint ``path`` and remove old ones; the first process calls it.

        Does nothing for a checkpoint of another folder. Failures are warnings, since ``path`` is complete.
        """
        if path.resolve().parent != self._folder.checkpoints.resolve():
            return
        self._link("last", self._folder.checkpoints / path.name)
        keep = []
        if self._config.keep_best and state.best_step is not None:
            best = self._folder.checkpoints / checkpoint_name(state.best_step)
            if best.is_dir():
                self._link("best", best)
            # where the best could not be saved, the link has the one before; where links cannot be made, there is none
            keep += [best, self._folder.root / "best"]
        try:
            prune(self._folder.checkpoints, self._config.keep_last, keep)
        except OSError as error:
            self._say(f"WARNING: older checkpoints could not be removed: {error}")

    def _link(self, name: str, target: Path) -> None:
        link = self._folder.root / name
        try:
            replace_symlink(link, target)
        except OSError as error:
            self._say(f"WARNING: the link {link} could not be set to {target.name}: {error}")

    def load(self, path: Path, world_size: int) -> dict[str, Any] | None:
        """Load weights, optimizer, schedule and random generators. Returns the stream's state, or None.

        Another number of processes than ``world_size``, which wrote the checkpoint, keeps its random generators.

        Raises CheckpointError for a stream that another number of processes read.
        """
        accelerator = self._accelerator
        trainer = path / "trainer"
        with reading(trainer):
            accelerator.load_state(str(trainer))
        # Accelerate restores its count of passes, which is wrong after a change of accumulation; windows begin at 0
        accelerator.step = 0
        if world_size == accelerator.num_processes:
            # Accelerate only logs that it could not restore the random state
            file = trainer / f"random_states_{accelerator.process_index}.pkl"
            with reading(file):
                restored = torch.equal(load(file)["torch_manual_seed"], torch.get_rng_state())
            if not restored:
                raise CheckpointError(f"{trainer}: the state of torch's random generator could not be restored")
        streams = sorted(trainer.glob("stream_*.pt"))
        if not streams:
            return None
        if len(streams) != accelerator.num_processes:
            raise CheckpointError(
                f"{path}: its stream was read by {len(streams)} processes, this run has {accelerator.num_processes}; "
                f"continue it with --nproc {len(streams)}"
            )
        file = trainer / f"stream_{accelerator.process_index}.pt"
        with reading(file):
            return dict(torch.load(file, weights_only=True))

    def _load_weights(self, models: list[torch.nn.Module], trainer: str) -> None:
        model = self._accelerator.unwrap_model(models[0])
        if is_adapted(model):
            # hf/ has merged weights; the base is loaded already
            load_adapters(model, Path(trainer).parent / "hf")
            models.clear()
            return
        expected = model.state_dict()
        loaded: set[str] = set()
        stored = (
            (file, without_sparse(model, weights)) for file, weights in _stored(model, Path(trainer).parent / "hf")
        )
        for file, weights in chain(stored, [(Path(trainer), load_sparse(model, Path(trainer)))]):
            result = model.load_state_dict(weights, strict=False)
            if result.unexpected_keys:
                raise CheckpointError(f"{file}: the model has no parameter {', '.join(result.unexpected_keys[:5])}")
            loaded.update(weights)
        # a tied weight is stored under one of its names
        present = {expected[name].data_ptr() for name in loaded}
        missing = [name for name, tensor in expected.items() if tensor.data_ptr() not in present and tensor.numel()]
        if missing:
            raise CheckpointError(f"{Path(trainer).parent / 'hf'}: no weights for {', '.join(missing[:5])}")
        models.clear()


def _stored(model: PreTrainedModel, folder: Path) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """Yield the files of a Hugging Face folder and their weights, under the names of ``model``."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors)")
    if get_model_conversion_mapping(model, add_legacy=False):
        # transformers stores them in another form, as a mixture's experts one by one, and alone knows the way back;
        # until they are copied, the weights take their memory twice
        yield folder, open_model(folder, type(model), finite=False).state_dict()
        return
    yield from ((file, load_tensors(file)) for file in files)


def write_final(accelerator: Accelerator, folder: RunFolder, saver: Saver) -> None:
    """Write ``final/`` and ``final-ema/``. Raises RunFailure on a disk error."""
    export_final(accelerator, folder.final, saver)
    for applied in filter(None, (part.applied for part in saver.parts)):
        with applied():
            export_final(accelerator, folder.final_ema, saver)


def show_result(
    config: RunConfig,
    folder: RunFolder,
    state: TrainState,
    data: LoadedData,
    device: torch.device,
    logger: RunLogger,
    stop: StopFlag,
) -> None:
    """Name the model, let it continue held-out texts until a signal comes, compare the loss with ``expect``."""
    if not logger.main:
        return
    say, tokenizer = logger.say, data.tokenizer
    say(f"model and tokenizer: {folder.final}")
    if folder.final_ema.is_dir():
        say(f"the same with averaged weights: {folder.final_ema}")
    prompts = held_out_prompts(data.validation, tokenizer.eos_token_id, word_starts(tokenizer), begin_tokens(tokenizer))
    texts: list[str] = []
    try:
        talks = config.data.source == "chat"
        what = "held-out conversations, answered" if talks else "[held-out text] continued"
        say(f"samples ({what}, temperature {TEMPERATURE:g}, seed {config.seed}):")
        for text in sample(folder.final, prompts, config.seed, device, answers=talks):
            # after few steps, most of a text is line ends
            say(f"\n{text}" if talks else " ".join(text.split()))
            texts.append(text)
            if stop.received and len(texts) < len(prompts):
                say("interrupted: the other samples are left out, the model is complete")
                break
    except Exception as error:  # no memory for a second copy, logits that are not finite: the model is written
        say(f"WARNING: no samples of the final model: {one_line(error)}")
    if texts:
        folder.log({"step": state.step, "kind": "sample", "text": "\n\n".join(texts)})
    if state.val_loss is not None:
        say(compare(state.val_loss, config.expect))


def write_report(folder: RunFolder, say: Callable[[str], None]) -> None:
    """Write report.html. Missing packages and disk errors are warnings."""
    try:
        from leanstep.recipes.report.report import write_report as write

        say(f"report: {write([folder.root], folder.root / 'report.html')}")
    except (ImportError, OSError) as error:
        say(f"WARNING: no report was written: {error}")


def export_final(accelerator: Accelerator, target: Path, saver: Saver) -> None:
    """Write model and tokenizer to a staging folder and rename it to ``target``, replacing an older one."""
    staged = target.with_name(f"{STAGED}{target.name}")

    def fill(path: Path) -> Iterator[None]:
        if accelerator.is_main_process:
            remove(path)
            path.mkdir()
        yield
        yield from saver.export(path, replaces=target)

    trouble = saver.write(staged, fill, lambda path: publish_folder(path, target))
    if trouble is not None:
        raise RunFailure(
            "disk",
            1,
            f"{target} could not be written: {trouble}. Make room and start the same command again: it continues "
            "from the last checkpoint",
        )


def compare(val_loss: float, expect: ExpectConfig) -> str:
    """Format the validation loss, and whether it is within the recipe's tolerance."""
    line = f"validation loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 700.0)):.2f}"
    if expect.val_loss is None:
        return line + (f" (not compared: {expect.source})" if expect.source else "")
    difference = val_loss - expect.val_loss
    source = f" ({expect.source})" if expect.source else ""
    where = "within" if abs(difference) <= expect.tolerance else "NOT within"
    return (
        f"{line}: {where} the expected {expect.val_loss:.4f} +- {expect.tolerance:g}{source}, "
        f"difference {difference:+.4f}"
    )
