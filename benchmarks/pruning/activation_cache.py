"""Curves with and without cached activations, on a LLaMA of 30 layers: processor time, and whether they are equal.

    python benchmarks pruning/activation_cache [--layers 30] [--hidden 128] [--levels 8] [--rounds 3]

Weights are random: what is measured is time. Eight levels of each matrix are half of what ``leanstep prune`` measures,
where the work that is done once counts less. Rounds alternate, and medians of processor time are compared, which other
processes on the machine disturb less than the time of the clock.
"""

import statistics
import time

import torch
from common import command_line, interleaved, timed
from models import random_llama

from leanstep.pruning import measure_curves

PARSER = command_line(__doc__, layers=30, hidden=128, sequences=4, seq_len=64, levels=8, rounds=3)


def main() -> None:
    """Measure, and print the table."""
    options = PARSER.parse_args()
    model = random_llama(options.hidden, 3 * options.hidden, options.layers, 256).eval()
    data = torch.randint(512, (options.sequences, options.seq_len))
    levels = tuple(0.95 * (number + 1) / options.levels for number in range(options.levels))

    def measure(cached: bool) -> tuple[float, dict]:
        """Processor seconds and curves."""
        return timed(lambda: measure_curves(model, data, levels=levels, prefix_cache=cached), time.process_time)

    results = interleaved({"cached": lambda: measure(True), "plain": lambda: measure(False)}, options.rounds, warmup=0)
    cached, plain = (statistics.median(seconds for seconds, _ in values) for values in results.values())
    curves, plain_curves = (values[-1][1] for values in results.values())
    print(f"{options.layers} layers, {len(curves)} matrices, {options.levels} levels, {data.numel()} tokens")
    print(f"processor time  {cached:.1f} s with the cache, {plain:.1f} s without, ratio {plain / cached:.2f}")
    print(f"the numbers are {'equal, bit for bit' if curves == plain_curves else 'NOT equal'}")
