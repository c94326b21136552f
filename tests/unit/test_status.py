"""status.json is read as data: a wrong one is an error with a name, never a crash later."""

from pathlib import Path

import pytest

from graftwork.errors import Damaged
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import Status, read_status, write_status

GOOD = {"run": "a", "state": "active", "orch_digest": "d", "arrival": 1}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    assert read_status(tree) is None
    status = Status("a", "active", "d", 3, admitted=True, slot=0, step=4, start_step=2, wanted_batch=5)
    write_status(Disk(), tree, status)
    assert read_status(tree) == status


@pytest.mark.parametrize(
    "value", [[], 3, {}, {**GOOD, "arrival": "1"}, {**GOOD, "state": "gone"}, {**GOOD, "step": "x"}, {**GOOD, "y": 1}]
)
def test_what_is_no_status_is_damaged(tmp_path: Path, value: object) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    Disk().publish_json(tree.status_json, value)
    with pytest.raises(Damaged, match=r"status\.json is not a status of ours"):
        read_status(tree)
