"""Ledgers of sweeps and fine-tuning data: damaged lines are refused in one line, or read as what they say."""

import json

import pytest
from fuzzing import COUNTS, damaged, fuzz, guarded, json_files, said
from hypothesis import given
from hypothesis import strategies as st

from leanstep.recipes.data.chat import read_rows
from leanstep.recipes.sweep.grid import make_plan
from leanstep.recipes.sweep.ledger import Ledger, LedgerError
from leanstep.recipes.sweep.page import write_pages
from leanstep.recipes.sweep.results import summarize

END = {"kind": "end", "status": "done", "val_loss": 3.5, "step": 9, "code": 0, "seconds": 1.5}
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = [TALK, {"prompt": "a", "completion": "b"}, {"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]}]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A plan, and the lines of its ledger."""
    plan = make_plan("llama-nano-adamw", ["seed=0,1"], tmp_path_factory.mktemp("sweeps") / "sweep")
    ledger = Ledger(plan)
    for run in plan.runs:
        ledger.start(run)
        ledger.end(run, {key: value for key, value in END.items() if key != "kind"})
    ledger.close()
    return plan, ledger.path.read_bytes()


@given(data=st.data())
@fuzz(100)
def test_damaged_ledgers(sweep, data):
    plan, content = sweep
    path = plan.folder / "ledger.jsonl"
    lines = content.splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    changed = [*lines[:number], data.draw(json_files(lines[number])), *lines[number + 1 :], b""]
    path.write_bytes(data.draw(st.just(b"\n".join(changed)) | damaged(content)))
    try:
        with guarded(plan.folder):
            ledger = Ledger(plan)
            write_pages(plan, summarize(plan, ledger.ends), ledger.ends)
            ledger.close()
    except (LedgerError, OSError) as error:
        said(error)
        COUNTS["ledgers of sweeps"]["refused"] += 1
        return
    COUNTS["ledgers of sweeps"]["same" if path.read_bytes() == content else "other"] += 1


@given(data=st.data())
@fuzz(100)
def test_damaged_fine_tuning_data(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("chat") / "rows.jsonl"
    lines = [json.dumps(row).encode() for row in ROWS]
    number = data.draw(st.integers(0, len(lines) - 1))
    path.write_bytes(b"\n".join([*lines[:number], data.draw(json_files(lines[number])), *lines[number + 1 :]]))
    try:
        with guarded():
            rows = [row for _, row in read_rows(str(path), "data.path")]
    except ValueError as error:
        said(error)
        assert f"{path}:" in str(error)
        COUNTS["fine-tuning data"]["refused"] += 1
        return
    assert all("messages" in row or {"prompt", "completion"} <= row.keys() for row in rows)
    COUNTS["fine-tuning data"]["same" if rows == ROWS else "other"] += 1
