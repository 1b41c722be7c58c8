"""Checks of pruning by several processes: the result is that of one."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from distributed_world import World, add_case, case
from pruned_models import make_llama, tokens

from leanstep import _processes
from leanstep._processes import Processes, is_first_to_fail
from leanstep.pruning import PruneResult, Refinement, measure_curves, prune
from leanstep.pruning.measure.fisher import sampling
from leanstep.pruning.measure.joint import JointJudge

# settings, and whether sums are added in another order, so that the last bits differ
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "measured": ({"curves": "measured"}, False),
    "anchored": ({"curves": "anchored", "refine": Refinement(evaluations=6)}, False),
    "fisher": ({"curves": "fisher", "inputs": "dense", "granularity": "block"}, False),
    "sparsegpt": ({"curves": "anchored", "score": "sparsegpt"}, True),
    "mfac": ({"curves": "fisher", "score": "mfac"}, False),
    "relinearise": ({"curves": "measured", "correction": "relinearise"}, False),
    "owl": ({"allocation": "owl", "score": "magnitude"}, False),
}


def pruned(processes: Processes | None, **settings: Any) -> tuple[dict[str, torch.Tensor], PruneResult]:
    model = make_llama(2)
    if settings.get("allocation", "dp") == "dp":
        settings["levels"] = (0.4, 0.6, 0.8)
    data = tokens(14)
    result = prune(model, data[:10], held_out=data[10:], sparsity=0.6, batch_size=2, processes=processes, **settings)
    return model.state_dict(), result


def check_result_of_one(world: World, settings: dict[str, Any], *, rounded: bool) -> None:
    weights, alone = pruned(None, **settings)
    shared, together = pruned(Processes(dist.group.WORLD), **settings)
    assert together.allocation.counts == alone.allocation.counts and together.notes == alone.notes
    for name, weight in weights.items():
        assert torch.equal(weight == 0, shared[name] == 0), name
        torch.testing.assert_close(shared[name], weight, **({} if rounded else {"rtol": 0, "atol": 0}))
    for one, other in zip(alone.compared, together.compared, strict=True):
        torch.testing.assert_close(other.summed, one.summed, rtol=1e-4 if rounded else 0, atol=0)
    assert together.refinement.get("accepted") == alone.refinement.get("accepted")


for label, (given, differs) in SETTINGS.items():
    # with three processes some have two batches and some one, and a portion of no level
    sizes = (2, 3) if label in ("measured", "sparsegpt") else (2,)
    add_case(
        f"pruning_{label}",
        sizes,
        lambda world, given=given, differs=differs: check_result_of_one(world, copy.copy(given), rounded=differs),
    )


@case(3)
def pruning_with_fewer_batches_than_processes(world: World) -> None:
    model, data = make_llama(1), tokens(6)
    settings: dict[str, Any] = {"levels": (0.5, 0.7), "batch_size": 4}
    alone = measure_curves(model, data, **settings)
    assert measure_curves(model, data, processes=Processes(dist.group.WORLD), **settings) == alone


@case(2)
def pruning_collects_other_portions_in_each_process(world: World) -> None:
    model, data, settings = make_llama(4), tokens(6), {"levels": (0.4, 0.6), "batch_size": 2, "method": "fisher"}
    alone = measure_curves(model, data, **settings)  # type: ignore[arg-type]
    free_memory = _processes.free_memory
    _processes.free_memory = lambda _: None if world.rank else 0  # type: ignore[assignment]
    try:
        assert measure_curves(model, data, processes=Processes(dist.group.WORLD), **settings) == alone  # type: ignore[arg-type]
    finally:
        _processes.free_memory = free_memory


@case(2)
def pruning_anchors_on_the_first_samples_in_all_processes(world: World) -> None:
    # the clock of each process would take others
    sampling.samples_within = lambda *_: 3 + world.rank  # type: ignore[assignment]
    model, data = make_llama(2), tokens(6)
    settings: dict[str, Any] = {"levels": (0.4, 0.6, 0.8), "batch_size": 2, "method": "anchored"}
    together = measure_curves(model, data, processes=Processes(dist.group.WORLD), **settings)
    assert {curve.samples for curve in together.values()} == {3}
    sampling.samples_within = lambda *_: 3  # type: ignore[assignment]
    assert measure_curves(model, data, **settings) == together


@case(2)
def pruning_goes_on_with_another_number_of_processes(world: World) -> None:
    model, data, processes = make_llama(1), tokens(6), Processes(dist.group.WORLD)
    path = world.folder / "points.jsonl"
    settings: dict[str, Any] = {"levels": (0.4, 0.5, 0.7), "batch_size": 2, "resume": path}

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    def measure_some() -> None:
        try:
            measure_curves(model, data, progress=interrupt, **settings)
        except KeyboardInterrupt:
            return
        raise AssertionError("it was not interrupted")

    processes.from_first(measure_some)
    measured: list[int] = []
    together = measure_curves(
        model, data, processes=processes, progress=lambda done, total, name: measured.append(done), **settings
    )
    # 21 points: 5 were there, and each process measured about half of the others
    assert 6 <= len(measured) <= 10, measured
    for rank in range(world.size):  # one after another: a run locks the file
        dist.barrier()
        if rank == world.rank:
            assert measure_curves(model, data, **settings) == together  # all are in the file
    path = world.folder / f"none-{world.rank}.jsonl"
    assert measure_curves(model, data, **settings | {"resume": path}) == together


@case(2)
def pruning_raises_what_the_first_process_meets_in_all(world: World) -> None:
    def refuse() -> None:
        raise ValueError("expected a folder")

    try:
        Processes(dist.group.WORLD).from_first(refuse)
    except ValueError as error:
        assert str(error) == "expected a folder"
    else:
        raise AssertionError("no error")


@case(2)
def pruning_prints_an_error_once(world: World) -> None:
    processes = Processes(dist.group.WORLD)
    assert sorted(processes.all_gather(is_first_to_fail())) == [False, True]


@case(2)
def pruning_divides_the_memory_of_the_machine(world: World) -> None:
    free_memory = _processes.free_memory
    _processes.free_memory = lambda device: 100
    try:
        assert Processes().free_memory("cpu") == 100
        assert Processes(dist.group.WORLD).free_memory("cpu") == 50
        assert Processes(dist.group.WORLD).free_memory("cuda:0") == 100
    finally:
        _processes.free_memory = free_memory


@case(3)
def pruning_compares_a_batch_in_the_process_that_has_its_inputs(world: World) -> None:
    judged: set[int] = set()
    compare = JointJudge._compare

    def recorded(self: JointJudge, start: int, index: int) -> Any:
        judged.add(index)
        return compare(self, start, index)

    JointJudge._compare = recorded  # type: ignore[method-assign]
    try:
        pruned(Processes(dist.group.WORLD), curves="fisher", refine=Refinement(evaluations=3, data=tokens(8)))
    finally:
        JointJudge._compare = compare  # type: ignore[method-assign]
    # the first batch also runs in a check of the cache
    assert judged == set(range(world.rank, 8, 3)), judged
