"""Curves with and without the prefix cache, on a LLaMA of 30 layers: processor time, and whether they are equal.

    python benchmarks/prune_prefix.py [--layers 30] [--hidden 128] [--levels 8] [--rounds 3]

Weights are random: what is measured is time. Eight levels of each matrix are half of what ``leanstep prune`` measures,
where what is done once counts less. Rounds alternate, and medians of processor time are compared, which other processes
on the machine disturb less than the time of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from leanstep.pruning import measure_curves


def make_model(layers: int, hidden: int) -> torch.nn.Module:
    """A LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = make_model(options.layers, options.hidden)
    data = torch.randint(512, (options.sequences, options.seq_len))

    levels = tuple(0.95 * (number + 1) / options.levels for number in range(options.levels))

    def measure(cached: bool) -> dict:
        return measure_curves(model, data, levels=levels, prefix_cache=cached)

    seconds: dict[bool, list[float]] = {True: [], False: []}
    curves = {}
    for _ in range(options.rounds):
        for cached in (True, False):
            begin = time.process_time()
            curves[cached] = measure(cached)
            seconds[cached].append(time.process_time() - begin)
    cached, whole = statistics.median(seconds[True]), statistics.median(seconds[False])
    print(f"{options.layers} layers, {len(curves[True])} matrices, {options.levels} levels, {data.numel()} tokens")
    print(f"processor time  {cached:.1f} s with the cache, {whole:.1f} s without, ratio {whole / cached:.2f}")
    print(f"the numbers are {'equal, bit for bit' if curves[True] == curves[False] else 'NOT equal'}")


if __name__ == "__main__":
    main()
