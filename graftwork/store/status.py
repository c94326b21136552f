"""`control/status.json`: what the trainer says of a run. The trainer writes it, everyone reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from graftwork.errors import Damaged
from graftwork.store.disk import Disk, read_json
from graftwork.store.layout import RunTree

State = Literal["queued", "active", "finished", "failed", "evicted", "stopped"]
TERMINAL: frozenset[State] = frozenset({"finished", "failed", "evicted", "stopped"})


@dataclass(frozen=True)
class Status:
    """orch_digest: sha256 of the orch.toml that it is about. arrival: place in the order of arrival, kept by restarts.
    admitted: the run held a slot under this orch.toml, so a restarted trainer goes on with it unasked.
    start_step: the step at which this admission began. wanted_batch: the step whose batch the trainer waits for."""

    run: str
    state: State
    orch_digest: str
    arrival: int
    admitted: bool = False
    slot: int | None = None
    step: int | None = None
    start_step: int | None = None
    wanted_batch: int | None = None
    reason: str | None = None


def read_status(tree: RunTree) -> Status | None:
    """None if there is none. Raises Damaged, naming the file."""
    path = tree.status_json
    if not path.exists():
        return None
    try:
        status = Status(**read_json(path, "status"))
    except TypeError as error:
        raise Damaged(f"{path} is not a status of ours ({error})") from None
    if status.state not in get_args(State):
        raise Damaged(f"{path}: unknown state {status.state!r}")
    return status


def write_status(disk: Disk, tree: RunTree, status: Status) -> None:
    disk.publish_json(tree.status_json, asdict(status))
