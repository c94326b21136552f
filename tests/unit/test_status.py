"""status.json is read as data: a wrong one is an error with a name, never a crash later."""

import os
from pathlib import Path

import pytest

from graftwork.errors import Damaged
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import STATUS_BYTES_MAX, Status, as_reason, read_status, write_status

GOOD = {"run": "a", "state": "active", "orch_digest": "d", "arrival": 1}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    assert read_status(tree) is None
    status = Status("a", "active", "d", 3, admitted=True, slot=0, step=4, start_step=2, wanted_batch=5)
    with pytest.raises(FileNotFoundError):  # a run that was removed does not come back
        write_status(Disk(), tree, status)
    Disk().make_folder(tree.status_json.parent)
    write_status(Disk(), tree, status)
    assert read_status(tree) == status


def test_a_pipe_or_a_giant_in_its_place_is_damaged(tmp_path: Path) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    Disk().make_folder(tree.status_json.parent)
    os.mkfifo(tree.status_json)
    with pytest.raises(Damaged, match="not a plain file"):
        read_status(tree)
    tree.status_json.unlink()
    tree.status_json.write_bytes(b" " * (STATUS_BYTES_MAX + 1))
    with pytest.raises(Damaged, match="at most"):
        read_status(tree)


@pytest.mark.parametrize("text", ["\ud800", "x" * 10**7, "\x00"])
def test_a_reason_that_quotes_anything_can_be_read_again(tmp_path: Path, text: str) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    Disk().make_folder(tree.status_json.parent)
    status = Status("a", "failed", "d", 3, reason=as_reason(text))
    write_status(Disk(), tree, status)
    assert read_status(tree) == status
    assert tree.status_json.stat().st_size < 10_000


@pytest.mark.parametrize(
    "value",
    [
        [],
        3,
        {},
        {**GOOD, "arrival": "1"},
        {**GOOD, "state": "gone"},
        {**GOOD, "step": "x"},
        {**GOOD, "y": 1},
        {**GOOD, "arrival": 10**400},
        {**GOOD, "arrival": -1},
    ],
)
def test_what_is_no_status_is_damaged(tmp_path: Path, value: object) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    Disk().publish_json(tree.status_json, value)
    with pytest.raises(Damaged, match=r"status\.json is not a status of ours"):
        read_status(tree)
