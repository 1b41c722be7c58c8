"""What every test of the suite gets: private caches, no network, fixed seeds, and the interpreter tests.

Importing this file sets environment variables, before any test module imports torch or transformers, because those
libraries read them once. Child processes inherit them.
"""

import atexit
import gc
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

# Nothing is read from or left in the caches of whoever runs the tests, and one run compiles each thing once: the
# folder is shared by pytest-xdist's workers and by every process a test starts. LEANSTEP_TEST_CACHE=DIR keeps it.
_OWN_CACHE = "LEANSTEP_TEST_CACHE" not in os.environ
if _OWN_CACHE:
    os.environ["LEANSTEP_TEST_CACHE"] = tempfile.mkdtemp(prefix="leanstep-tests-")
CACHE = Path(os.environ["LEANSTEP_TEST_CACHE"])
os.environ["LEANSTEP_CACHE"] = str(CACHE / "leanstep")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHE / "inductor")
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
os.environ["HF_HOME"] = str(CACHE / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that starts pytest in the background lets it ignore Ctrl-C, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The tensors are small: a second thread costs more than it brings, and sums stay in one order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import interpreter_accesses  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402
from interpreter_session import InterpreterSession, in_interpreter  # noqa: E402
from interpreter_speed import spare_repeated_work  # noqa: E402
from network import refuse_network  # noqa: E402
from scheduling import FileScheduling, longest_files_first, tell_scheduler  # noqa: E402
from selection import mark_exhaustive, shorten_default_run  # noqa: E402

# The same examples in every run of the suite. `pytest tests/fuzz --hypothesis-profile long` draws others, forty times
# as many, or LEANSTEP_FUZZ times as many.
_COMMON = settings(database=None, deadline=None, print_blob=True, phases=[p for p in Phase if p is not Phase.explain])
settings.register_profile("suite", _COMMON, derandomize=True, max_examples=50)
settings.register_profile(
    "long", _COMMON, derandomize=False, max_examples=50 * int(os.environ.get("LEANSTEP_FUZZ", 40))
)
settings.load_profile("suite")

_SAFE_PATH = "PYTHONSAFEPATH" in os.environ

_session = pytest.StashKey[InterpreterSession]()


def pytest_configure(config):
    """Shorten a run of which nothing is named: `pytest` alone."""
    shorten_default_run(config)
    if in_interpreter():
        spare_repeated_work()
        interpreter_accesses.watch()


def pytest_unconfigure(config):
    """End the interpreter process when the run is interrupted, and remove the caches this run made."""
    if _session in config.stash:
        config.stash[_session].close()
    if _OWN_CACHE and not hasattr(config, "workerinput"):
        shutil.rmtree(CACHE, ignore_errors=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection():
    """Import the tests without the garbage collector, and keep it from visiting afterwards what they imported."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind takes what is never collected for a leak
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the exhaustive cases before pytest deselects; then order what is left."""
    mark_exhaustive(items)
    yield
    _prepare(config, items)


def _prepare(config, items):
    """Skip GPU tests where there is no GPU, and give the interpreter tests to their own process."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
    if in_interpreter():
        return
    if hasattr(config, "workerinput"):  # before pytest-xdist reports the collection
        longest_files_first(items, _interpreted(items))
        tell_scheduler(CACHE, _interpreted(items))
    else:  # last, so that the process which runs them has been at work beside this one for as long as possible
        items.sort(key=_is_interpreted)


def pytest_collection_finish(session):
    """Start the interpreter process as soon as it is known that its tests run here."""
    waits = session.config.option.collectonly or hasattr(session.config, "workerinput")
    if _interpreted(session.items) and not waits and not in_interpreter():
        session.config.stash[_session] = InterpreterSession(session.config, _interpreted(session.items), CACHE)


def _is_interpreted(item):
    return item.get_closest_marker("interpret") is not None


def _interpreted(items):
    return [item.nodeid for item in items if _is_interpreted(item)]


def pytest_xdist_auto_num_workers(config):
    """Use all cores for the whole suite, and no worker where files or folders are named."""
    named = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return 0 if named else len(os.sched_getaffinity(0))


def pytest_xdist_make_scheduler(config, log):
    """Give the tests of a file to one worker, and all interpreter tests to one worker."""
    return FileScheduling(config, CACHE, log)


def pytest_runtest_protocol(item, nextitem):
    """Report what an interpreter test did in the other process; run every other test here."""
    if in_interpreter() or not _is_interpreted(item):
        return None
    if _session not in item.config.stash:  # the one of pytest-xdist's workers that got these tests
        item.config.stash[_session] = InterpreterSession(item.config, _interpreted(item.session.items), CACHE)
    session = item.config.stash[_session]
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse every connection that leaves this machine, and fail the test that tried, even if it caught the error.

    Yields the list of refused addresses. A test about an unreachable network clears it.
    """
    refused = refuse_network(monkeypatch)
    yield refused
    assert not refused, f"this test reached for the network: {', '.join(map(str, refused))}"


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Start every test from the same random state, and put back what it changed of torch's global settings."""
    random.seed(0)
    np.random.seed(0)
    # torch.manual_seed keeps a stack trace for every kind of device that is not there
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def command_leaves_no_environment():
    """Take back the variable that leanstep's command sets for its children; tests call it in their own process."""
    yield
    if not _SAFE_PATH:
        os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in classes: give a test an empty one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset():
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture
def dirty_memory():
    """Fill uninitialised memory: NaN in floating tensors, the largest value in integer ones.

    torch does it itself in its deterministic mode, for empty, empty_like, empty_strided and resize_. What a kernel
    forgets to write is then seen at once, instead of being yesterday's right answer by luck.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _dirty_interpreter(request):
    """Every interpreter test runs on dirty memory; others ask for the fixture by name."""
    if in_interpreter() and request.node.get_closest_marker("interpret"):
        request.getfixturevalue("dirty_memory")
