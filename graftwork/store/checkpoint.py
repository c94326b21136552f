"""Checkpoint folders: save, verify, load. Verify everything, then hand it over.

What a trainer must know to go on, besides tensors, is `TrainerState`. It holds nothing of the clock or the machine, so
the `trainer/` folder of a resumed run is byte-equal to that of the run that was never stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from graftwork.errors import CannotResume, Damaged
from graftwork.store.disk import Disk, Staging
from graftwork.store.files import Manifest, is_stable, read_json, verify
from graftwork.store.layout import stable_steps, step_folder

CHECKPOINT = "checkpoint"
WEIGHT = "weight"


@dataclass(frozen=True)
class Cursor:
    """Which batches went into the weights: `chain` is a hash over all their digests, in order, each exactly once."""

    step: int
    chain: str

    @staticmethod
    def start(adapter_digest: str) -> Cursor:
        return Cursor(0, hashlib.sha256(f"start {adapter_digest}".encode()).hexdigest())

    def after(self, batch_digest: str) -> Cursor:
        return Cursor(self.step + 1, hashlib.sha256(f"{self.chain} {batch_digest}".encode()).hexdigest())


Count = Annotated[int, Field(ge=0, le=2**53)]


@dataclass(frozen=True)
class TrainerState:
    """`trainer/state.json`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read with pydantic: types and names are checked

    step: Count
    optimizer_steps: Count
    """Steps that AdamW took: `step` less those that were skipped."""
    skipped_in_a_row: Count
    rank: Count
    alpha: float
    cursor: Cursor
    start: dict[str, Any]
    """Where step_0 came from: {"kind": "fresh" | "adapter", "seed" or "source_digest": ...}."""
    known_digests: dict[Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,17})$")], list[str]]
    """Every digest that was ever published for a step (decimal) within the staleness limit."""
    base_fingerprint: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Any, source: Path) -> TrainerState:
        """Raises Damaged, naming the first field that is missing, unknown or of another type."""
        try:
            return TypeAdapter(TrainerState).validate_python(value)
        except ValidationError as error:
            mistake = error.errors()[0]
            where = ".".join(map(str, mistake["loc"]))
            raise Damaged(f"{source} is not a trainer state ({where}: {mistake['msg']})") from None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was verified."""

    path: Path
    step: int
    manifest: Manifest

    @property
    def orchestrator_state(self) -> dict[str, Any] | None:
        """What the last consumed batch carried. Raises Damaged when it is no table."""
        path = self.path / "orchestrator" / "state.json"
        if not path.exists():
            return None
        state = read_json(path, "orchestrator state")
        if not isinstance(state, dict):
            raise Damaged(f"{path} holds no table")
        return state


def stage_checkpoint(disk: Disk, checkpoints: Path, step: int) -> Staging:
    """A hidden folder that is to become `checkpoints/step_k`. One that is there is set aside first."""
    target = step_folder(checkpoints, step)
    if target.exists():
        disk.quarantine(target, checkpoints.parent / ".trash")
    return disk.stage(target, {"step": step})


def publish_checkpoint(staging: Staging, checkpoints: Path, step: int) -> None:
    """Make a filled folder visible; when that fails, nothing is left of it."""
    try:
        staging.publish(step_folder(checkpoints, step), CHECKPOINT)
    except BaseException:
        staging.discard()
        raise


def save_checkpoint(disk: Disk, checkpoints: Path, step: int, fill: Callable[[Staging], None]) -> None:
    """Publish `checkpoints/step_k`, by one process."""
    staging = stage_checkpoint(disk, checkpoints, step)
    try:
        fill(staging)
    except BaseException:
        staging.discard()
        raise
    publish_checkpoint(staging, checkpoints, step)


def open_checkpoint(checkpoints: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step` (the newest if None), verified. Raises CannotResume, naming folder and file."""
    steps = stable_steps(checkpoints)
    if not steps:
        raise CannotResume(f"nothing to go on from: no checkpoint with a STABLE file in {checkpoints}")
    wanted = steps[-1] if step is None else step
    folder = step_folder(checkpoints, wanted)
    if not is_stable(folder):
        raise CannotResume(f"no checkpoint at {folder}; there are steps {', '.join(map(str, steps))}")
    if (folder / "trainer" / "rank_0.pt").exists():
        raise CannotResume(
            f"{folder} is a checkpoint of an older trainer (rank_0.pt), which is never opened here; make an adapter of "
            f"it: graftwork convert {folder} ADAPTER_DIR, and start from that (init_adapter_path)"
        )
    try:
        manifest = verify(folder, CHECKPOINT)
        if manifest.facts.get("step") != wanted:
            raise Damaged(f"{folder}: its manifest says step {manifest.facts.get('step')!r}")
    except Damaged as error:
        raise CannotResume(
            f"checkpoint {folder} is damaged: {error}. Nothing was changed; name an earlier step with resume_step"
        ) from None
    return Checkpoint(folder, wanted, manifest)
