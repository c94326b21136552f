"""`control/status.json`: what the trainer says of a run. The trainer writes it, everyone reads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from graftwork.errors import Damaged
from graftwork.store.disk import Disk
from graftwork.store.files import dump_json, read_file
from graftwork.store.layout import RunId, RunTree

State = Literal["queued", "active", "finished", "failed", "evicted", "stopped"]
Count = Annotated[int, Field(ge=0, le=2**53)]
STATUS_BYTES_MAX = 2**20
REASON_CHARACTERS_MAX = 2000
TERMINAL: frozenset[State] = frozenset({"finished", "failed", "evicted", "stopped"})


@dataclass(frozen=True)
class Status:
    """orch_digest: sha256 of the orch.toml that it is about. arrival: place in the order of arrival, kept by restarts.
    admitted: the run held a slot under this orch.toml, so a restarted trainer goes on with it unasked.
    start_step: the step at which this admission began. wanted_batch: the step whose batch the trainer waits for.
    place: in the line of the queued, from 1."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read with pydantic: types and names are checked

    run: str
    state: State
    orch_digest: str
    arrival: Count
    admitted: bool = False
    slot: Count | None = None
    step: Count | None = None
    start_step: Count | None = None
    wanted_batch: Count | None = None
    reason: str | None = None
    place: Count | None = None

    def is_of(self, run: RunId, orch_digest: str | None) -> bool:
        """Whether it is about this very run under this very orch.toml; a copied folder brings another run's status."""
        return (self.run, self.orch_digest) == (str(run), orch_digest)


STATUS: TypeAdapter[Status] = TypeAdapter(Status)


def read_status(tree: RunTree) -> Status | None:
    """None if there is none. Raises Damaged, naming the file."""
    path = tree.status_json
    try:
        return STATUS.validate_json(read_file(path, STATUS_BYTES_MAX), strict=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        mistake = error.errors()[0]
        raise Damaged(
            f"{path} is not a status of ours ({'.'.join(map(str, mistake['loc']))}: {mistake['msg']})"
        ) from None


def write_status(disk: Disk, tree: RunTree, status: Status) -> None:
    """Raises FileNotFoundError when the run's control folder is gone: a run that was removed does not come back."""
    disk.publish_file(tree.status_json, dump_json(asdict(status)), make_folder=False)


def as_reason(text: object) -> str:
    """What went wrong, as a status may hold it: it may quote a batch or a file of anyone's making."""
    shown = str(text).encode("utf-8", "replace").decode()
    cut = REASON_CHARACTERS_MAX
    return shown if len(shown) <= cut else f"{shown[:cut]}... ({len(shown)} characters)"
