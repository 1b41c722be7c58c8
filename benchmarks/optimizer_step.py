"""Step times of optimizers on the parameter list of LLaMA-60M, side by side in one process.

    python benchmarks/optimizer_step.py [--device cuda] [--dtype float32 bfloat16] [--threads 2] [--rounds 15] [--slow]

All optimizers step the same parameters with the same gradients, one step each per round, in shuffled order; medians
over the rounds. "bytes" is what the rule must read and write, divided by the bandwidth of a copy measured in the same
rounds: 1.0 is the floor that the copy sets. Peers are measured when they are installed (extra ``bench``). ``--slow``
adds those that take over a second a step. The first step of each optimizer, which may compile, is reported apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from leanstep.optimizers import Lion, SinkGD

HIDDEN, MLP, LAYERS, VOCAB = 512, 1376, 8, 32000


def llama_60m() -> list[tuple[str, tuple[int, ...]]]:
    """(role, shape) of the 75 tensors of LLaMA-60M, 58.07 M parameters."""
    layer = [("hidden", (HIDDEN, HIDDEN))] * 4 + [("hidden", (MLP, HIDDEN))] * 2 + [("hidden", (HIDDEN, MLP))]
    layer += [("norm", (HIDDEN,))] * 2
    return [("embedding", (VOCAB, HIDDEN)), *layer * LAYERS, ("norm", (HIDDEN,)), ("head", (VOCAB, HIDDEN))]


def make_parameters(dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[str]]:
    """Random parameters with random gradients."""
    generator = torch.Generator().manual_seed(0)
    params, roles = [], []
    for role, shape in llama_60m():
        param = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device, dtype))
        param.grad = torch.randn(shape, generator=generator).to(device, dtype)
        params.append(param)
        roles.append(role)
    return params, roles


def sinkgd_groups(params: list[Tensor], roles: list[str]) -> list[dict]:
    """Matrices to SinkGD, embedding, head and norms to AdamW: the published routing."""
    hidden = [p for p, r in zip(params, roles, strict=True) if r == "hidden"]
    rest = [p for p, r in zip(params, roles, strict=True) if r != "hidden"]
    return [{"params": hidden, "algorithm": "sinkgd"}, {"params": rest, "algorithm": "adamw"}]


def candidates(params: list[Tensor], roles: list[str], slow: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """name -> (step, parameter-sized reads and writes per parameter); 0 where bytes are not the measure."""
    lr, decay = 1e-6, 0.1
    hidden = [p for p, r in zip(params, roles, strict=True) if r == "hidden"]
    share = sum(p.numel() for p in hidden) / sum(p.numel() for p in params)
    found: dict[str, tuple[Callable[[], object], float]] = {
        "torch AdamW fused": (torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True).step, 7),
        "torch SGD momentum fused": (torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True).step, 5),
        "leanstep Lion": (Lion(params, lr=lr, weight_decay=decay).step, 5),
        'leanstep Lion nonfinite="pass"': (Lion(params, lr=lr, weight_decay=decay, nonfinite="pass").step, 5),
        # what SinkGD does with embeddings, heads and norms, here with all
        "leanstep AdamW fallback": (SinkGD(params, algorithm="adamw", lr=lr, weight_decay=decay).step, 7),
        # five iterations read the gradient once each, the update reads it again
        "leanstep SinkGD + AdamW": (SinkGD(sinkgd_groups(params, roles), lr=lr, weight_decay=decay).step,
                                    share * (5 + 3) + (1 - share) * 7),
    }  # fmt: skip
    if params[0].dtype == torch.bfloat16:
        found["leanstep Lion stochastic rounding"] = (
            Lion(params, lr=lr, weight_decay=decay, rounding="stochastic").step, 5)  # fmt: skip
    if importlib.util.find_spec("lion_pytorch"):
        from lion_pytorch import Lion as PeerLion

        found["lion_pytorch Lion"] = (PeerLion(params, lr=lr, weight_decay=decay).step, 5)
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer import Lion as OtherLion

        found["pytorch_optimizer Lion"] = (OtherLion(params, lr=lr, weight_decay=decay).step, 5)
    if slow:
        muon = torch.optim.Muon(hidden, lr=lr)
        rest = torch.optim.AdamW([p for p, r in zip(params, roles, strict=True) if r != "hidden"], lr=lr, fused=True)
        found["torch Muon + AdamW fused"] = (lambda: (muon.step(), rest.step()), 0)
        if importlib.util.find_spec("sinkgd_optimizer"):
            from sinkgd_optimizer import SinkGD as PeerSinkGD

            found["sinkgd-pytorch SinkGD"] = (PeerSinkGD(params, lr=lr).step, 3)
    return found


def seconds(step: Callable[[], object], device: str) -> float:
    """One call, with what it started on the device."""
    begin = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin


def measure(dtype: torch.dtype, rounds: int, slow: bool, device: str) -> list[str]:
    """Lines of one markdown table."""
    params, roles = make_parameters(dtype, device)
    steps = candidates(params, roles, slow)
    source = [p.detach().clone() for p in params]
    target = [torch.zeros_like(p) for p in source]

    def copy() -> None:
        for a, b in zip(target, source, strict=True):
            a.copy_(b)

    first: dict[str, float] = {}
    for name, (step, _) in steps.items():
        first[name] = seconds(step, device)
    runs = {name: step for name, (step, _) in steps.items()} | {"copy": copy}
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(seconds(runs[name], device))
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = 2 * sum(p.numel() * p.element_size() for p in params)
    lines = [
        f"copy of the parameters: {median['copy'] * 1e3:.1f} ms, {moved / median['copy'] / 1e9:.1f} GB/s",
        "",
        f"| {str(dtype).removeprefix('torch.')} | median ms | ÷ AdamW fused | x copy of its bytes | first step s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    base = median["torch AdamW fused"]
    for name, (_, streams) in sorted(steps.items(), key=lambda item: median[item[0]]):
        floor = f"{median[name] / (median['copy'] * streams / 2):.2f}" if streams else "—"
        lines.append(f"| {name} | {median[name] * 1e3:.1f} | {median[name] / base:.2f} | {floor} | {first[name]:.1f} |")
    return lines


def machine(device: str = "cpu") -> str:
    """Processor or accelerator, threads, versions and commit, for the caption."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    if device != "cpu":
        model = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, xpu, ...")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(machine(options.device))
    for name in options.dtype:
        print()
        print("\n".join(measure(getattr(torch, name), options.rounds, options.slow, options.device)), flush=True)


if __name__ == "__main__":
    main()
