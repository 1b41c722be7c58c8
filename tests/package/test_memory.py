"""Free memory of the CPU within the limits of control groups, and the peak of a process."""

import subprocess
import sys

import psutil
import pytest

from leanstep import _memory
from leanstep._memory import free_memory, peak_process_memory

MIB = 2**20


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Pretend that the process is in control groups; returns a function that describes them."""
    monkeypatch.setattr(_memory, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(_memory, "PROCESS_CGROUPS", tmp_path / "self")

    def describe(lines: str, folders: dict[str, dict[str, str]]) -> None:
        (tmp_path / "self").write_text(lines)
        for folder, files in folders.items():
            (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / "cgroup" / folder / name).write_text(text)

    return describe


def v2(limit: object, current: int, cache: int = 0) -> dict[str, str]:
    stat = f"anon {current - cache}\ninactive_file {cache}\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{current}\n", "memory.stat": stat}


def test_without_limits_it_is_what_the_machine_has(cgroups):
    cgroups("0::/user\n", {"user": v2("max", 5 * MIB)})
    before = psutil.virtual_memory()
    free = free_memory("cpu")
    after = psutil.virtual_memory()
    # other processes take and give memory between the readings
    margin = before.total // 8
    assert min(before.available, after.available) - margin < free < max(before.available, after.available) + margin


def test_a_limit_of_the_process_counts_and_its_page_cache_is_free(cgroups):
    cgroups("0::/job/step\n", {"job/step": v2(64 * MIB, 40 * MIB, cache=10 * MIB)})
    assert free_memory("cpu") == 34 * MIB


def test_a_limit_of_a_group_above_counts(cgroups):
    cgroups("0::/job/step\n", {"job/step": v2("max", MIB), "job": v2(32 * MIB, 30 * MIB), ".": v2(64 * MIB, MIB)})
    assert free_memory("cpu") == 2 * MIB


def test_in_a_container_the_root_is_its_own_group(cgroups):
    cgroups("0::/docker/0123\n", {".": v2(16 * MIB, 4 * MIB)})
    assert free_memory("cpu") == 12 * MIB


def test_a_group_over_its_limit_has_nothing_left(cgroups):
    cgroups("0::/\n", {".": v2(16 * MIB, 17 * MIB)})
    assert free_memory("cpu") == 0


def test_limits_of_version_1_count(cgroups):
    files = {
        "memory.limit_in_bytes": f"{8 * MIB}\n",
        "memory.usage_in_bytes": f"{5 * MIB}\n",
        "memory.stat": f"cache {MIB}\ntotal_inactive_file {MIB}\n",
    }
    unlimited = {**files, "memory.limit_in_bytes": f"{2**63 - 4096}\n"}
    cgroups("5:cpu:/job\n4:memory,hugetlb:/job\n0::/\n", {"memory/job": files, "memory": unlimited})
    assert free_memory("cpu") == 4 * MIB


def test_files_that_cannot_be_read_limit_nothing(cgroups):
    cgroups("0::/job\n", {"job": {"memory.max": "many\n"}, ".": {"memory.max": f"{MIB}\n", "memory.current": "?\n"}})
    assert free_memory("cpu") > MIB


def test_devices_that_do_not_tell(cgroups):
    assert free_memory("meta") is None and free_memory("mps:0") is None


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    parent = psutil.Process().memory_info().rss
    code = "from leanstep._memory import peak_process_memory; print(peak_process_memory())"
    grown = b"x" * (parent + 256 * MIB)
    started = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert int(started.stdout) < len(grown)


def test_the_peak_of_the_process_is_in_bytes_and_does_not_fall():
    before = peak_process_memory()
    assert before >= 0.9 * psutil.Process().memory_info().rss
    grown = b"x" * (before + 64 * MIB)
    peak = peak_process_memory()
    assert peak >= len(grown) > before
    del grown
    assert peak_process_memory() >= peak - MIB  # Linux adds up what its processors count each
