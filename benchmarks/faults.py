"""Kill runs at random moments, resume them, and compare each with the run that nothing disturbed, bit for bit.

    python benchmarks faults [--kills 50] [--only NAME ...] [--out FOLDER] [--table]

A kill is SIGKILL to a real process. Every other kill comes before a file operation chosen at random, which spreads the
kills evenly over everything that a run writes, checkpoints included; the others come at a random time. A resumed run
is killed again in a third of the trials. A trial is survived if the last start ends well, weights, optimizer state,
schedule, progress and log are those of the undisturbed run, and no file is missing, added or left over.

The further kinds fill the disk, make folders read-only, remove them, kill or stop one of two processes, and watch the
memory of one process that trains again and again (``--soak MINUTES``).

Processes are forked from this one, which has imported torch and leanstep and has run no tensor operation and started no
thread: a trial takes seconds. Only workers of the launcher import everything themselves; they get a tenth of the kills.
``OUT/results.jsonl`` gets a line per trial. A later call repeats no trial. ``--table`` only prints the tables.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
from common import append_json_line, command_line, machine_line, print_table, read_json_lines
from forks import Job, Moment

PARSER = command_line(__doc__, kills=(50, "kills of each kind; default 50"), seed=0, table=(False, "print the tables"))
PARSER.add_argument("--only", nargs="+", metavar="NAME", help="these kinds; default: all")
PARSER.add_argument("--out", type=Path, default=Path("runs/faults"), help="folder of results.jsonl")
PARSER.add_argument(
    "--soak", type=float, default=0.0, metavar="MINUTES", help="train again and again, watch the memory"
)

# kinds that start from a trained model
_FROM_BASE = {"lora", "prune", "compressed"}
_WORDS = "the union state congress people war peace law nation great public year country world men power act of and to"
_SIZES = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2"
LLAMA = f"model={{family: llama, config: {{{_SIZES}, max_position_embeddings: 32, tie_word_embeddings: true}}}}"
# dropout in every place GPT-2 has it
_RECIPE = """\
recipe: pretrain
steps: 12
model:
  family: gpt2
  config: {{n_embd: 32, n_layer: 2, n_head: 2, n_positions: 32, resid_pdrop: 0.1, attn_pdrop: 0.1, embd_pdrop: 0.1}}
data: {{source: text, path: {text}, tokenizer: "train:300", seq_len: 32, val_tokens: 300}}
batch: {{tokens_per_step: 256, micro_batch_size: 4}}
optimizer: {{name: adamw, lr: 1e-3, weight_decay: 0.1}}
precision: fp32
eval: {{every: 6}}
checkpoint: {{every: 3}}
log: {{every: 1, trackers: []}}
"""


class Files:
    """What all trials read, made once per call: text, recipe, and the base of pruning and of adapters."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe, self.text, self.base = (
            root,
            str(root / "tiny.yaml"),
            root / "text.txt",
            root / "base/final",
        )

    def make(self, with_base: bool) -> None:
        """Write text and recipe; train the base, where a kind needs it."""
        chance = forks.chance_of(0, "text")
        words = [chance.choice(_WORDS.split()) for _ in range(1000)]
        self.text.write_text(" ".join(words))
        for shard in range(2):
            rows = [
                " ".join(words[start : start + 5 + start % 13]) for start in range(shard * 400, shard * 400 + 400, 10)
            ]
            (self.root / f"shard-{shard}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        Path(self.recipe).write_text(_RECIPE.format(text=self.text))
        if not with_base:
            return
        job = Job(self.root / "base.txt")
        job.fork(lambda: forks.train_in([self.recipe, f"out={self.root / 'base'}", LLAMA]))
        if job.wait() != [0]:
            raise RuntimeError(job.text())


# -- kinds ------------------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """One kind of run to kill: ``start(job, out, kill)`` forks its processes and returns those to kill by the clock."""

    name: str
    about: str
    start: Callable[..., list[int]]
    digest: Callable[[Path], dict[str, Any]]
    # only the time can choose the moment
    by_clock: bool = False


def training(name: str, about: str, files: Files, *settings: str, world: int = 1) -> Kind:
    """A training run of 12 steps with a checkpoint every 3."""

    def start(job: Job, out: Path, victim: int = 0, **kill: Any) -> list[int]:
        victim %= world
        arguments = [files.recipe, f"out={out}", *(text.format(out=out, root=files.root) for text in settings)]
        return [forks.start_training(job, arguments, world, victim=victim, **kill)[victim]]

    return Kind(name, about, start, forks.run_digest)


def launched(files: Files) -> Kind:
    """``leanstep train --nproc 2``; the launcher is killed."""

    def start(job: Job, out: Path, victim: int = 0, **kill: Any) -> list[int]:
        from leanstep.recipes.launch import launch

        # workers that lose their launcher save at once: with a checkpoint more, the older one would be removed
        arguments = [f"out={out}", "batch.micro_batch_size=2", "checkpoint.keep_last=1"]
        return [job.fork(lambda: launch(files.recipe, arguments, 2), **kill)]

    return Kind("launcher", "`leanstep train --nproc 2`, the launcher killed", start, forks.run_digest, by_clock=True)


def pruning(files: Files) -> Kind:
    """``leanstep prune``."""

    def work(out: Path) -> int:
        from leanstep.recipes.shrink import prune

        resume = ["--resume"] if out.with_name(f"{out.name}.curves.jsonl").exists() else []
        amounts = "--samples 8 --curve-samples 4 --held-out 2 --seq-len 32 --levels 0.3,0.5,0.7,0.8 --sparsity 0.5"
        return prune.main([str(files.base), "--out", str(out), "--data", str(files.text), *amounts.split(), *resume])

    def start(job: Job, out: Path, victim: int = 0, **kill: Any) -> list[int]:
        return [job.fork(lambda: work(out), **kill)]

    return Kind("prune", "`leanstep prune`, its curves resumed", start, forks.folder_digest)


def compressed(files: Files) -> Kind:
    """``export_compressed`` over an older file, again and again."""

    def work(out: Path) -> int:
        from safetensors.torch import load_file

        from leanstep.sparsity import export_compressed

        out.mkdir(exist_ok=True)
        state = load_file(files.base / "model.safetensors")
        for round_ in range(1, 21):
            export_compressed({name: weight * round_ for name, weight in state.items()}, out / "model.safetensors")
        return 0

    def start(job: Job, out: Path, victim: int = 0, **kill: Any) -> list[int]:
        return [job.fork(lambda: work(out), **kill)]

    return Kind("compressed", "`export_compressed` over an older file, 20 times", start, forks.folder_digest)


def kinds(files: Files) -> list[Kind]:
    """All kinds of runs that are killed."""
    args = {"adamw": "", "lion": "", "sinkgd": "", "lanton": "", "mfac": ", args: {{window: 8}}", "muon": ""}
    by_optimizer = [
        training(name, f"training with `{name}`", files, f"optimizer={{{{name: {name}, lr: 1e-3{more}}}}}")
        for name, more in args.items()
    ]
    best = "checkpoint={{every: 3, keep_last: 1, keep_best: true}}"
    stream = (
        "data.streaming=true",
        "data.source=json",
        "data.path={root}/shard-*.jsonl",
        "data.val_path={root}/text.txt",
    )
    sparsity = 'sparsity={{patterns: {{"*.mlp.*": "1:4"}}, method: srste, finetune: 0.2}}'
    adapters = ("model={{init_from: '{root}/base/final'}}", "data.tokenizer={root}/base/final")
    # a process that was not killed yet waits twice that time at most
    connected = ("batch.micro_batch_size=2", "distributed.connect_minutes=0.25")
    lora = "lora={{target_modules: [q_proj, v_proj, up_proj], r: 4, lora_dropout: 0.1}}"
    return [
        *by_optimizer,
        training("keep-best", "`keep_best`, `keep_last` 1, evaluation every 2 steps", files, best, "eval.every=2"),
        training("streamed", "streamed data", files, *stream),
        training("cold-cache", "text and tokenizer not cached yet", files, "data.cache_dir={out}.cache"),
        training("sparse", "N:M sparse training, 1:4", files, LLAMA.replace("{", "{{").replace("}", "}}"), sparsity),
        training("lora", "LoRA training with dropout", files, *adapters, lora),
        training("rank", "two processes (gloo), one killed", files, *connected, world=2),
        launched(files),
        pruning(files),
        compressed(files),
    ]


# -- trials -----------------------------------------------------------------------------------------------------------


@dataclass
class Undisturbed:
    """The run that nothing disturbed: its digest, seconds, and file operations of the first process."""

    digest: dict[str, Any]
    seconds: float
    operations: int


def undisturbed(kind: Kind, folder: Path) -> Undisturbed:
    """Run a kind to its end."""
    job, count = Job(folder / "console.txt"), folder / "count.txt"
    begin = time.monotonic()
    kind.start(job, folder / "run", count_to=None if kind.by_clock else count)
    codes = job.wait()
    seconds = time.monotonic() - begin
    forks.reap_orphans()
    if any(codes):
        raise RuntimeError(f"{kind.name} exits {codes} undisturbed:\n{job.text()[-3000:]}")
    digest = forks.in_fork(lambda: kind.digest(folder / "run"), folder)
    return Undisturbed(digest, seconds, int(count.read_text()) if count.exists() else 0)


def killed_once(kind: Kind, folder: Path, number: int, moment: Moment, expected: Undisturbed, victim: int) -> str:
    """Start or resume a run and kill it. Returns ``killed``, ``ended`` if it was faster, or what went wrong."""
    job = Job(folder / f"console-{number}.txt")
    if moment.by == "file":
        victims = kind.start(job, folder / "run", victim, kill_at=1 + int(moment.fraction * expected.operations))
    else:
        victims = kind.start(job, folder / "run", victim)
        end = time.monotonic() + moment.fraction * expected.seconds
        job.wait(until=lambda: time.monotonic() > end)
        job.kill(*victims)
    try:
        job.wait(until=lambda: all(pid in job.codes for pid in victims))
        # what a kill leaves must end soon; on a busy machine, reaching the next message may take as long as the run
        job.wait(60 + expected.seconds)
        forks.reap_orphans(60)
    except TimeoutError as error:
        return f"after the kill: {error}"
    if all(job.codes[pid] == 0 for pid in victims):
        return "ended"
    if any(job.codes[pid] != -9 for pid in victims):
        return f"exit codes {sorted(job.codes.values())}: {job.text()[-300:]}"
    if not {code for pid, code in job.codes.items() if pid not in victims} <= {0, 1}:
        return f"exit codes {sorted(job.codes.values())} of all processes: {job.text()[-300:]}"
    if "Traceback" in job.text():
        return f"a traceback: {job.text().strip().splitlines()[-1][:300]}"
    return "killed"


def trial(kind: Kind, number: int, seed: int, expected: Undisturbed, folder: Path) -> dict[str, Any]:
    """Kill a run once or more, resume it to its end, compare. Returns the trial's row."""
    chance = forks.chance_of(seed, kind.name, number)
    # the golden ratio spreads any number of moments evenly
    fraction = (forks.chance_of(seed, kind.name).random() + number * 0.6180339887) % 1
    by = "clock" if kind.by_clock or number % 2 else "file"
    moments, problem, begin = [], "", time.monotonic()
    planned = 1 + (chance.random() < 1 / 3) + (chance.random() < 1 / 9)
    while len(moments) < planned and not problem:
        moment = Moment(by, fraction)
        outcome = killed_once(kind, folder, len(moments), moment, expected, number // 2)
        if outcome == "killed":
            moments.append(str(moment))
            by = "clock" if kind.by_clock or chance.random() < 0.5 else "file"
            fraction = chance.random()
        elif outcome == "ended" and not moments:
            # faster than the undisturbed run was: begin again, and kill earlier
            forks.cleared(folder)
            fraction *= 0.7
        elif outcome == "ended":
            break
        else:
            problem = outcome
        # a folder that is neither absent nor complete may be half written
        if kind.name == "prune" and not problem:
            problem = half_written(folder / "run", expected)
    finished = kind.name == "prune" and (folder / "run").exists()
    job = Job(folder / "console-last.txt")
    if not problem:
        problem = last_start(kind, job, folder, expected, finished)
    row = {"kind": kind.name, "trial": number, "seed": seed, "moments": moments, "problem": problem}
    return row | {"seconds": round(time.monotonic() - begin, 1)}


def half_written(out: Path, expected: Undisturbed) -> str:
    """What is wrong with an output folder that appears at once or not at all."""
    present = forks.folder_digest(out) if out.exists() else expected.digest
    wrong = forks.differences(expected.digest, present)
    return f"half written: {wrong}" if wrong else ""


def last_start(kind: Kind, job: Job, folder: Path, expected: Undisturbed, finished: bool) -> str:
    """Resume to the end, undisturbed, and compare; returns what went wrong."""
    kind.start(job, folder / "run")
    try:
        codes = job.wait()
        forks.reap_orphans()
    except TimeoutError as error:
        return f"resumed: {error}"
    # a folder that was complete before is refused, and nothing is overwritten
    if any(codes) and not (finished and codes == [2] and "exists already" in job.text()):
        return f"resumed, exit codes {codes}: {job.text()[-300:]}"
    try:
        actual = forks.in_fork(lambda: kind.digest(folder / "run"), folder)
    except RuntimeError as error:
        return f"unreadable: {str(error)[-300:]}"
    beside = [name for name in os.listdir(folder) if not name.startswith(("console", "run.cache")) and name != "run"]
    beside = [name for name in beside if name not in ("answer.json", "answer.txt")]
    wrong = forks.differences(expected.digest, actual)
    if beside:
        wrong += f" left over: {', '.join(sorted(beside))}"
    return f"not the undisturbed run: {wrong}" if wrong else ""


# -- results ----------------------------------------------------------------------------------------------------------


def print_tables(results: list[dict[str, Any]], about: dict[str, str]) -> None:
    """Print trials, kills, survived and lost runs of every kind; then the further trials and the soak."""
    rows = []
    for name in about:
        mine = [row for row in results if row["kind"] == name and "moments" in row]
        if mine:
            lost = sum(bool(row["problem"]) for row in mine)
            kills = sum(len(row["moments"]) for row in mine)
            rows.append([name, about[name], len(mine), kills, len(mine) - lost, lost])
    if rows:
        totals = [sum(row[column] for row in rows) for column in range(2, 6)]
        print_table(
            ["kind", "what is killed", "tried", "kills", "survived", "lost"], [*rows, ["all", "", *totals]], (0, 1)
        )
        print()


def main() -> int:
    """Run the trials that are missing, and print the tables; 1 if a trial was lost."""
    options = PARSER.parse_args()
    import mishaps

    results = options.out / "results.jsonl"
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        files = Files(Path(name))
        everything = {kind.name: kind for kind in kinds(files)}
        about = {name: kind.about for name, kind in everything.items()}
        unknown = set(options.only or ()) - set(everything) - set(mishaps.NAMES)
        if unknown:
            PARSER.error(
                f"expected kinds of {', '.join([*everything, *mishaps.NAMES])}, got {', '.join(sorted(unknown))}"
            )
        wanted = options.only or [*everything, *mishaps.NAMES]
        if not options.table:
            os.environ["OMP_NUM_THREADS"] = "1"
            forks.prepare()
            files.make(with_base=bool(_FROM_BASE & set(wanted)))
            run_kinds([everything[name] for name in wanted if name in everything], options, files, results)
            mishaps.run([name for name in wanted if name in mishaps.NAMES], options, files, results)
            if options.soak:
                mishaps.soak(options.soak, files, results)
    rows = read_json_lines(results)
    print(machine_line())
    print_tables(rows, about)
    mishaps.print_tables(rows)
    return int(any(row.get("problem") for row in rows))


def run_kinds(kinds: list[Kind], options: Any, files: Files, results: Path) -> None:
    """Run the missing trials, the kinds in turn, so that a call that is cut short has about as many of each."""
    done = {(row["kind"], row.get("trial")) for row in read_json_lines(results) if row["seed"] == options.seed}
    expected: dict[str, Undisturbed] = {}
    for number in range(options.kills):
        for kind in kinds:
            if (kind.name, number) in done or (kind.by_clock and number >= max(1, options.kills // 10)):
                continue
            if kind.name not in expected:
                expected[kind.name] = undisturbed(kind, forks.cleared(files.root / f"{kind.name}-undisturbed"))
            folder = forks.cleared(files.root / f"{kind.name}-{number}")
            row = trial(kind, number, options.seed, expected[kind.name], folder)
            append_json_line(results, row)
            print(f"{kind.name} {number}: {', '.join(row['moments'])}: {row['problem'] or 'survived'}", flush=True)
            if row["problem"]:
                shutil.copytree(folder, options.out / folder.name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
