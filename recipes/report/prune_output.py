"""What ``leanstep prune`` prints: the summary of a result, and the table of an estimate."""

import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from leanstep._files import format_bytes
from leanstep._process import processor_name
from leanstep.recipes.report.formatting import format_duration, measure_text

if TYPE_CHECKING:
    from leanstep.pruning import Estimate, PruneResult, RecoveryResult

# seconds from which a run is told how to be shorter
_LONG = 600
OUT_OF_MEMORY = (
    "out of memory; take fewer or shorter sequences (--samples, --curve-samples, --seq-len), a smaller --batch-size or "
    "--activations disk. --dry-run states the memory"
)


def estimate_lines(estimate: "Estimate") -> list[str]:
    """A table of an estimate."""
    free = "" if estimate.free_memory is None else f", {format_bytes(estimate.free_memory)} free"
    lines = [
        f"{estimate.parameters:,} parameters, {estimate.pruned:,} of them in {estimate.matrices:,} matrices to change",
        *([f"  {estimate.left_dense}"] if estimate.left_dense else []),
        f"memory {format_bytes(estimate.processes * sum(estimate.memory.values()))}{free}",
        *([f"  in each of {estimate.processes} processes"] if estimate.processes > 1 else []),
        *(f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.memory.items()),
        f"disk {format_bytes(sum(estimate.disk.values()))}, {format_bytes(estimate.free_disk)} free",
        *(f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.disk.items()),
    ]
    if estimate.recovery:
        lines.append(f"memory of recovery {format_bytes(sum(estimate.recovery.values()))}, after pruning")
        lines += [f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.recovery.items()]
        lines.append(
            "  it learns the dense model's outputs"
            if estimate.distills
            else "  it learns the data's next tokens"
            + (": the dense model does not fit" if "dense model" in estimate.recovery else "")
        )
    if estimate.device_memory:
        free = "" if estimate.free_device is None else f", {format_bytes(estimate.free_device)} free"
        lines.append(f"memory of the device {format_bytes(sum(estimate.device_memory.values()))}{free}")
        lines += [f"  {use:<28}{format_bytes(size):>12}" for use, size in estimate.device_memory.items()]
        lines.append("time is not estimated: the rates of that device are not known")
    else:
        lines.append(time_line(estimate))
        lines += [f"  {use:<28}{format_duration(duration):>12}" for use, duration in estimate.seconds.items()]
    if estimate.reads:
        lines.append(f"the model does not fit into the free memory: {format_bytes(estimate.reads)} are read from disk")
    return lines + [f"not in the estimate: {what}" for what in estimate.not_counted]


def time_line(estimate: "Estimate") -> str:
    """How long a run takes, and of a long one which settings make it shorter."""
    from leanstep.pruning.folder.estimate import QUICK

    seconds = sum(estimate.seconds.values())
    machine = f"{processor_name()}, {os.cpu_count()} processors"
    line = f"time about {format_duration(seconds)}: an estimate, at the rates of this machine ({machine}) as loaded now"
    if estimate.quick is None or seconds < _LONG or estimate.quick > seconds / 2:
        return line
    samples, curve_samples, tokens, minutes = QUICK
    options = f"--samples {samples} --curve-samples {curve_samples} --seq-len {tokens} --minutes {minutes:g}"
    return f"{line}\nshorter: about {format_duration(estimate.quick)} with {options}"


def _spent(budget: dict[str, Any]) -> str:
    from leanstep.pruning.allocate.budgets import UNITS

    before, after, dense = budget["before"], budget["after"], budget["dense"]
    removed, requested = 1 - after / dense, 1 - budget["target"] / dense
    after, before, dense = (f"{cost:,.0f}" if cost >= 1000 else f"{cost:.6g}" for cost in (after, before, dense))
    shares = f"{removed:.2%} of {dense} removed, {requested:.2%} asked for"
    return f"{after} {UNITS[budget['kind']]} after, {before} before: {shares}"


def reconstruction_line(reconstruction: dict[str, Any], metric: str) -> str:
    """A line about the training of blocks: their mean errors, and the distortion on held-out data after it."""
    blocks, held_out = reconstruction["blocks"], reconstruction["held_out"]
    trained = [block for block in blocks if block["applied"]]
    before, after = (
        sum(block[when if block["applied"] else "before"] or 0.0 for block in blocks) / max(1, len(blocks))
        for when in ("before", "after")
    )
    line = f"reconstructed  {len(trained)} of {len(blocks)} blocks, {reconstruction['steps']} steps each; mean error "
    line += f"of a block {before:.3g} pruned, {after:.3g} trained"
    if held_out is not None and held_out["mean"] is not None:
        line += f"; held out: {metric} {held_out['mean']:.4g}"
    return line


def recovery_lines(recovery: "RecoveryResult") -> list[str]:
    """Lines about the training after pruning."""
    names = {"kl": "KL from the dense model", "cross_entropy": "cross-entropy"}
    lines = [f"recovery       {recovery.settings.steps} steps, {'applied' if recovery.applied else 'not applied'}"]
    if recovery.before is not None and recovery.after is not None:
        change = f"{recovery.before.mean:.4g} pruned, {recovery.after.mean:.4g} trained"
        lines[0] += f"; held out, {names[recovery.metric]}: {change}"
    if recovery.perplexity is not None:
        lines.append(f"perplexity     {recovery.perplexity:.2f} recovered")
    return lines + [f"note           {note}" for note in recovery.notes]


def quality_lines(quality: dict[str, Any]) -> list[str]:
    """Lines about an embedding model or a classifier, on held-out samples."""
    lines = []
    for name, after in quality["after"].items():
        before = quality["before"].get(name)
        begin = "" if before is None else f"{measure_text(before)} before, "
        lines.append(
            f"{name:<14} {begin}{measure_text(after)}{' after' if begin else ''} ({quality['samples']} samples)"
        )
    return lines


def shown(value: Any) -> str:
    """The value of an option as it is typed."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)) or "left out"
    return "left out" if value is None else str(value)


def _error(stderr: float) -> str:
    return "" if math.isnan(stderr) else f" +- {stderr:.2g}"


def summary_of(result: "PruneResult", layers: list[dict[str, Any]], out: str) -> str:
    """Lines about a result that was written to the folder ``out``, with the rows ``layers`` in its report."""
    from leanstep.pruning.result import sparsity_of

    weights, compressed = sum(row["numel"] for row in layers), bool(result.encoded)
    lines = [f"sparsity       {sparsity_of(layers):.4f} of {weights:,} weights"]
    if compressed:
        formats = Counter(result.allocation.patterns.values()).items()
        lines = [f"size           {8 * result.budget['after'] / weights:.3f} bits per weight, of {weights:,} weights"]
        lines.append("formats        " + ", ".join(f"{number} {name}" for name, number in formats))
    by_curves = "" if result.curve_score in (None, result.score) else f" (curves: {result.curve_score})"
    settings = f"score {result.score}{by_curves}, pattern {result.pattern}, inputs {result.inputs}"
    lines.append(f"allocation     {result.allocation.method}, {settings}")
    if result.budget["kind"] != "params":
        lines.append(f"budget         {_spent(result.budget)}")
    sources = Counter(curve.source for curve in result.curves.values())
    if set(sources) - {"measured"}:
        lines.append("curves         " + ", ".join(f"{number} {source}" for source, number in sources.items()))
    if result.allocation.predicted is not None:
        lines.append(f"predicted      {result.allocation.predicted:.4g} ({result.metric}, sum of the curves)")
    if result.refinement:
        search = result.refinement
        first, last = ("-" if cost is None else f"{cost:.4g}" for cost in (search["start"], search["points"][-1][2]))
        lines.append(
            f"refined        {search['accepted']} of {search['evaluations']} exchanges, ended: {search['ended']}; "
            f"{result.metric} on the judging data {first} before, {last} after, pruned anew"
        )
    for one in result.compared:
        summed = "" if math.isnan(one.summed) else f"; single matrices sum to {one.summed:.4g}"
        changed = "in their formats" if compressed else "pruned"
        joint = f"{result.metric} {one.joint:.4g}{_error(one.joint_stderr)} with all matrices {changed}"
        lines.append(f"held out       {one.method}: {joint}{summed}")
    changes = {one.method: one.joint for one in result.compared}
    written, uniform = changes.get(result.allocation.method, math.nan), changes.get("uniform", math.nan)
    if result.allocation.method != "uniform" and written < uniform < math.inf:
        share = 1 - written / uniform
        uniform_name = "one format for all" if compressed else "uniform sparsity"
        lines.append(f"written        {result.allocation.method}, {share:.0%} below {uniform_name} on held-out data")
    if result.reconstruction:
        lines.append(reconstruction_line(result.reconstruction, result.metric))
    if result.perplexity:
        before, after = (
            f"{result.perplexity[name]:.2f}{_error(result.perplexity[f'{name}_stderr'])}"
            for name in ("before", "after")
        )
        lines.append(f"perplexity     {before} before, {after} after ({result.perplexity['tokens']:,} targets)")
    if result.quality:
        lines += quality_lines(result.quality)
    if result.recovery is not None:
        lines += recovery_lines(result.recovery)
    lines += [f"note           {note}" for note in result.notes]
    if compressed:
        return "\n".join([*lines, f"model, sparsity.json and report.html: {out}"])
    lines.append("File size and speed are those of the dense model: zeros alone make neither PyTorch nor vLLM faster.")
    lines.append(f"To store and run it without the zeros: leanstep export {out} --format sparse --out {out}-sparse")
    lines.append(f"model, sparsity.json and report.html: {out}")
    return "\n".join(lines)
