"""Faults for training processes to suffer: each function runs in the process before it trains.

They stand in a module of their own because a process imports them by name.
"""

import functools
import os
import signal
import sys
import time
import types
from pathlib import Path


def die_before_the_marker():
    """Leave the way ``kill -9`` does in the middle of writing the second checkpoint."""
    from leanstep.recipes.training import checkpoint, saver

    def commit(staged):
        if staged.name.endswith("step-000006"):
            os.truncate(staged / "trainer" / "optimizer.bin", 100)
            os.kill(os.getpid(), signal.SIGKILL)
        return checkpoint.commit(staged)

    saver.commit = commit


def die_before_the_rename():
    """The same, with everything written but the name."""
    from leanstep import _files

    replace = os.replace

    def die(source, target):
        if str(target).endswith("step-000006"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    _files.os = types.SimpleNamespace(**{**vars(os), "replace": die})


def die_while_removing_a_checkpoint():
    """Be killed when the oldest checkpoint is removed, with one of its files gone."""
    import shutil

    rmtree = shutil.rmtree

    def die(path, *arguments, **options):
        weights = path / "hf" / "model.safetensors"
        if "step-000003" in path.name and weights.exists():
            weights.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return rmtree(path, *arguments, **options)

    shutil.rmtree = die


def die_before_the_checkpoints():
    """Be killed when the folder ``checkpoints`` of a new run has just been made."""
    mkdir = os.mkdir

    def die(path, *arguments, **options):
        mkdir(path, *arguments, **options)
        if str(path).endswith("/checkpoints"):
            os.kill(os.getpid(), signal.SIGKILL)

    os.mkdir = die


def die_while_linking(name=""):
    """Be killed before the new link ``last`` to the checkpoint ``name`` takes its name; default: the first one."""
    from leanstep.recipes.training import checkpoint

    replace = os.replace

    def die(source, target):
        if str(target).endswith("/last") and os.readlink(source).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    checkpoint.os = types.SimpleNamespace(**{**vars(os), "replace": die})


def refuse_to_load():
    """Let a checkpoint that looks whole fail while it is loaded."""
    from leanstep.recipes.training.checkpoint import CheckpointError
    from leanstep.recipes.training.saver import Saver

    def load(saver, path, state):
        raise CheckpointError("the checkpoint could not be loaded")

    Saver.load = load


def refuse_links_and_removal():
    """Write as a file system does that knows no links and lets nothing be removed."""
    import errno

    from leanstep.recipes.training import saver

    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    saver.replace_symlink = saver.prune = refuse


def samples_fail():
    """Continue no text after training, as with logits that are not finite."""
    from leanstep.recipes.training import saver

    def fail(*arguments, **options):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")

    saver.sample = fail


def disk_of(free):
    """Let the disk have ``free`` bytes left when the run starts."""
    from leanstep.recipes.check import costs

    costs.free_bytes = lambda path: free


def explode_after_step_6():
    from leanstep.recipes.training import build

    factor = build.schedule_factor
    build.schedule_factor = lambda config, steps: lambda made: 300.0 if made >= 6 else factor(config, steps)(made)


def record_windows(path, *others):
    """After ``others``: append the tokens of each window that this process reads to ``path`` and its rank."""
    import json
    import zlib

    from leanstep.recipes.training import run

    for other in others:
        other()
    backward = run.backward

    def recorded(accelerator, model, window, **options):
        sums = [zlib.crc32(batch["input_ids"].numpy().tobytes()) for batch in window]
        with open(f"{path}.{accelerator.process_index}", "a") as file:
            file.write(json.dumps(sums) + "\n")
        return backward(accelerator, model, window, **options)

    run.backward = recorded


def save_weights(folder):
    """Write the weights and AdamW's moments after each step to ``folder``."""
    import torch

    from leanstep.recipes.training.run import Run

    update = Run.update

    def saved(run, **options):
        update(run, **options)
        content = dict(run.model.named_parameters())
        for index, moments in run.optimizer.optimizer.state_dict()["state"].items():
            content |= {f"{index}.{name}": value for name, value in moments.items()}
        torch.save({name: tensor.detach() for name, tensor in content.items()}, folder / f"{run.state.step + 1}.pt")

    Run.update = saved


def die_around_the_rollback(moment, *others):
    """After ``others``: die as by ``kill -9`` in the second rollback, before or after it writes its checkpoint."""
    from leanstep.recipes.methods import spikes
    from leanstep.recipes.training.run import Run

    for other in others:
        other()
    owner, name = {"before": (Run, "save"), "after": (spikes.SpikeDetector, "report_rollback")}[moment]
    action = getattr(owner, name)

    def dying(self, *arguments):
        state = self.state if moment == "before" else arguments[1]
        if moment == "after":
            action(self, *arguments)
        if state.spikes.rollbacks == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "before":
            action(self, *arguments)

    setattr(owner, name, dying)


def die_while_connecting(rank, moment):
    """Let a process be killed before it reaches the others (``start``), or once it has reached them (``reached``)."""
    if os.environ["RANK"] != str(rank):
        return
    if moment == "start":
        os.kill(os.getpid(), signal.SIGKILL)
    from torch.distributed import distributed_c10d

    # torch calls it with the store that all processes have joined
    distributed_c10d._new_process_group_helper = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)


def nan_at_step_3():
    """Make the loss of the third step NaN, as a bad batch does."""
    from leanstep.recipes.training import run

    backward, steps = run.backward, []

    def poisoned(accelerator, model, window, **options):
        part, targets = backward(accelerator, model, window, **options)
        steps.append(1)
        return (part * float("nan") if len(steps) == 3 else part), targets

    run.backward = poisoned


def infinite_gradient_at_step_3():
    """Leave the loss as it is and make one element of one gradient infinite."""
    from leanstep.recipes.training import run

    backward, steps = run.backward, []

    def poisoned(accelerator, model, window, **options):
        result = backward(accelerator, model, window, **options)
        steps.append(1)
        if len(steps) == 3:
            next(model.parameters()).grad.view(-1)[0] = float("inf")
        return result

    run.backward = poisoned


def in_process(rank, fault):
    """Let one of several processes alone suffer ``fault``."""
    if os.environ.get("RANK", "0") == str(rank):
        fault()


def refuse_the_data():
    """Find no text, as a process does whose machine lacks a disk."""
    from leanstep.recipes.training import run

    def load_data(*arguments, **options):
        raise ValueError("data.path: 'text.txt' does not exist")

    run.load_data = load_data


def out_of_memory_while_reading():
    """Refuse the memory for the text."""
    from leanstep.recipes.training import run

    def refuse(*arguments, **options):
        raise MemoryError

    run.load_data = refuse


def interrupted_in_its_samples():
    """Press Ctrl-C while the final model writes its first sample."""
    from leanstep.recipes.training import saver

    whole = saver.sample

    def sample(*arguments, **options):
        for text in whole(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            yield text

    saver.sample = sample


def out_of_memory_at_step_3():
    """Raise what torch raises when a GPU's memory is used up."""
    import torch

    from leanstep.recipes.training import run

    backward, steps = run.backward, []

    def exhausted(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return backward(*arguments, **options)

    run.backward = exhausted


def signal_in_step_4(number):
    """Send this process a signal in the middle of its fourth step."""
    from leanstep.recipes.training import run

    backward, steps = run.backward, []

    def signalled(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return backward(*arguments, **options)

    run.backward = signalled


def hangup_under_nohup():
    """Ignore SIGHUP, as nohup does, and get one in the fourth step."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_in_step_4(signal.SIGHUP)


def swallowed_interrupt_while_starting():
    """Get Ctrl-C where the text is read, in code that catches everything."""
    from leanstep.recipes.training import run

    load_data = run.load_data

    def careless(*arguments, **options):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except BaseException:
            pass
        return load_data(*arguments, **options)

    run.load_data = careless


def signal_in_evaluation(number):
    """Send this process a signal in the middle of its first evaluation."""
    from leanstep.recipes.training import validation

    batch, calls = validation._batch, []

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return batch(*arguments)

    validation._batch = signalled


def disk_fills_up_at_the_second_checkpoint():
    """Write as a full disk lets one write: a part of the file, then ENOSPC; the third checkpoint is written again."""
    import errno

    import torch

    save, calls = torch.save, []

    def full(content, file, *arguments, **options):
        if str(file).endswith("optimizer.bin"):
            calls.append(file)
            if len(calls) == 2:
                with open(file, "wb") as part:
                    part.write(b"x" * 100)
                raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return save(content, file, *arguments, **options)

    torch.save = full


def first_save_fails(part, *others):
    """After ``others``: let the first process meet a used-up quota in one part of its first checkpoint.

    ``part``: "staging", where the folder is made, or "export", where the model is written.
    """
    import errno

    from transformers import PreTrainedModel

    from leanstep.recipes.training import saver

    for other in others:
        other()
    place, name = {"staging": (saver, "staging"), "export": (PreTrainedModel, "save_pretrained")}[part]
    write, calls = getattr(place, name), []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(arguments[1]))
        return write(*arguments, **options)

    setattr(place, name, full)


def hang_in_step_4():
    """Stay in the fourth step for ever, and say when a signal was noted."""
    from leanstep.recipes.training import run

    backward, steps = run.backward, []

    def hanging(*arguments, **options):
        steps.append(1)
        if len(steps) == 4:
            handler = signal.getsignal(signal.SIGINT)

            def noted(*details):
                handler(*details)
                print("noted", flush=True)

            signal.signal(signal.SIGINT, noted)
            # last: who reads it may send the signal at once
            print("hanging", flush=True)
            while True:
                time.sleep(0.01)
        return backward(*arguments, **options)

    run.backward = hanging


def with_a_tracker():
    """Give Accelerate a tracker that writes into the run folder what it is told."""
    import json
    from pathlib import Path

    from accelerate import tracking

    class Notebook(tracking.GeneralTracker):
        name = "notebook"
        requires_logging_directory = True
        main_process_only = True

        def __init__(self, run_name, logging_dir, **options):
            super().__init__()
            self.path = Path(logging_dir) / "notebook.jsonl"

        @property
        def tracker(self):
            return self

        def write(self, entry):
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

        def store_init_configuration(self, values):
            self.write({"config": values})

        def log(self, values, step=None, **options):
            self.write({"values": values, "step": step})

        def finish(self):
            self.write({"end": True})

    tracking.register_tracker_class(Notebook)


def with_a_variable(name, value):
    """Set an environment variable, and give Accelerate the tracker of :func:`with_a_tracker`."""
    os.environ[name] = value
    with_a_tracker()


def with_a_talking_optimizer(*others):
    """After ``others``: give AdamW the two methods by which an optimizer reports on itself; both ask all processes."""
    import torch

    from leanstep.recipes.training import build

    for other in others:
        other()

    class Talking(torch.optim.AdamW):
        def diagnostics(self):
            here = torch.ones(())
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(here)
            self.asked = getattr(self, "asked", 0) + 1
            return {"noise/layer.0": here, "noise/layer.1": 0.5, "asked": self.asked}

        def noise_report(self):
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            return [
                {"name": "layer.0", "H": torch.tensor(0.25), "lr": 1e-3},
                {"name": "layer.1", "H": float("nan"), "group": "hidden"},
            ]

    build.optimizer_class = lambda name: Talking


def low_rank_takes(speed, *others):
    """After ``others``: let an operation of low-rank attention be measured to take so many of exact attention's."""
    from leanstep.lora.attention import gate

    for other in others:
        other()
    gate.measure_speed = lambda *settings: speed


def compile_without_a_compiler():
    """Let torch.compile capture graphs and run them as they are: seconds instead of half a minute."""
    import torch

    compile_in_place = torch.nn.Module.compile

    def captured(graph, inputs):
        print("graph captured", flush=True)
        return graph.forward

    torch.nn.Module.compile = lambda module: compile_in_place(module, backend=captured)


def add_documented_part():
    """Add the part of training that CONTRIBUTING.md shows, for recipes that measure attention norms."""
    from leanstep.recipes.training import parts

    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text("utf-8")
    module = types.ModuleType("leanstep.recipes.methods.head")
    module.Part = parts.Part
    exec(page[page.index("class HeadNorm(Part):") :].partition("```")[0], vars(module))
    sys.modules[module.__name__] = module
    parts.PARTS["head:HeadNorm"] = "log.attention_norms"


def on_backend(name):
    """Run the optimizers' operations on one backend. The reference needs no compiler, which takes longest of all."""
    from leanstep import use_backend

    # the context is never left: it must not be collected either
    _kept.append(use_backend(name))
    _kept[-1].__enter__()


_kept = []


def fsdp2_on_cpu():
    """Let Accelerate shard on the CPU. It can, but switches FSDP on for GPU types only: its state is told otherwise.

    These are private attributes of Accelerate; when they move, this has to follow.
    """
    import dataclasses

    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    from leanstep.recipes.config.schema import DistributedConfig
    from leanstep.recipes.training import build, train

    accelerator_class, whole = build.Accelerator, train.build_accelerator

    def accelerator(config):
        plugin = build._fsdp_plugin()
        build.Accelerator = lambda **options: accelerator_class(**{**options, "fsdp_plugin": plugin})
        made = whole(dataclasses.replace(config, distributed=DistributedConfig(strategy="ddp")))
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
        return made

    train.build_accelerator = accelerator
    on_backend("reference")


def fp16_on_cpu(*others):
    """After ``others``: train in fp16 on the CPU. It can, but Accelerate allows it on GPU types only.

    These are private attributes of Accelerate; when they move, this has to follow.
    """
    import torch
    from accelerate.state import AcceleratorState

    from leanstep.recipes.training import train

    for other in others:
        other()
    build = train.build_accelerator

    def accelerator(config):
        made = build(config)
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
        made.native_amp = True
        # the first steps overflow, and the scale grows again after a few others
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
        return made

    train.build_accelerator = accelerator


def held_at(step, *others):
    """After ``others``: take a moment for every step, and ten seconds for one, so that a kill comes in time.

    Changes no number. A test that waits for an earlier step and kills then cannot come too late.
    """
    from leanstep.recipes.training import run

    for other in others:
        other()
    backward, steps = run.backward, []

    def held(*arguments, **options):
        steps.append(1)
        time.sleep(10.0 if len(steps) == step else 0.01)
        return backward(*arguments, **options)

    run.backward = held


def on_a_terminal():
    """Show a live bar, as where the output is a terminal."""
    from leanstep.recipes.training import train

    train.Progress = functools.partial(train.Progress, live=True)
