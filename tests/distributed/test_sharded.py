"""Optimizers, sparse weights and adapters, sharded and replicated, in real gloo processes.

The checks are in the modules that are listed here, in tests/helpers.
"""

import pytest
from distributed_cases import WORLDS
from distributed_world import CASES, load_cases, run_world

MODULES = (
    "distributed_cases", "distributed_placements", "distributed_engines", "distributed_checkpoints",
    "distributed_lanton", "distributed_mfac", "distributed_sparsity", "distributed_lora", "distributed_mesh",
    "distributed_release", "distributed_pruning",
)  # fmt: skip
load_cases(MODULES)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, request):
    """Run every wanted check of every world size once; the error text of each, by (world size, name)."""
    folder = tmp_path_factory.mktemp("worlds")
    wanted = {item.callspec.id for item in request.session.items if "outcomes" in getattr(item, "fixturenames", ())}
    # what is loaded in a world was saved by the world of two
    if any(name.startswith("checkpoint_") for name in wanted):
        wanted |= {f"{name}-2" for name in CASES if name.startswith("checkpoint_")}
    found = {}
    for size in WORLDS:
        names = [c.name for c in CASES.values() if size in c.worlds and f"{c.name}-{size}" in wanted]
        if names:
            errors = run_world(size, names, folder, MODULES)
            found.update({(name, size): text for name, text in errors.items()})
    return found


@pytest.mark.sample(16)
@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(c.name, size, id=f"{c.name}-{size}") for c in CASES.values() for size in c.worlds]
)
def test_check(outcomes, name, size):
    assert not outcomes[name, size], outcomes[name, size]
