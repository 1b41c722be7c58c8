"""The worlds of processes themselves: a check that a crash outside its own code ended runs once more, and no other."""

import pytest
from distributed_world import load_cases, run_world

MODULES = ("distributed_crashes",)


@pytest.mark.slow
def test_only_what_ended_from_outside_runs_again(tmp_path, capfd):
    load_cases(MODULES)
    names = ["thread_crashes_once", "killed_once", "python_crashes_once", "thread_crashes_always", "passes"]
    errors = run_world(2, names, tmp_path, MODULES, patience=5)
    assert [name for name, text in errors.items() if not text] == ["thread_crashes_once", "killed_once", "passes"]
    assert list(errors) == names
    for name in ("python_crashes_once", "thread_crashes_always"):
        assert "rank 1: did not come to an end (exit code -11)" in errors[name], errors[name]
    assert "string_at" in errors["python_crashes_once"]
    told = capfd.readouterr().err
    again = [name for name in names if f"{name}: a process of 2 was ended, and the check runs once more" in told]
    assert again == ["thread_crashes_once", "killed_once", "thread_crashes_always"]
