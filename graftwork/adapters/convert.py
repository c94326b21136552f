"""Adapter folder -> checkpoint folder: a run's `step_0` from a saved adapter, a warm start.

The trainer does not know where a checkpoint came from; this is what it would have written itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.formats.peft import PeftAdapter, PeftFacts, read_peft
from graftwork.adapters.formats.untrusted import listed, quote
from graftwork.adapters.prepare import SlotSpec, prepare
from graftwork.adapters.snapshot import snapshot_of, write_snapshot
from graftwork.errors import Conflict, Damaged, MisfitAdapter, StoreError
from graftwork.store.checkpoint import CHECKPOINT
from graftwork.store.disk import Disk, read_json
from graftwork.store.layout import RUN_PREFIX, RunId, step_folder

REPORT_NAME = "report.json"


@dataclass(frozen=True)
class TrainerSlots:
    """What `trainer.json` says of the trainer that the checkpoint is for."""

    spec: SlotSpec
    base_fingerprint: str
    base: str | None

    @staticmethod
    def read(path: Path) -> TrainerSlots:
        """Raises Damaged, naming file and field."""
        about = read_json(path, "trainer")
        try:
            shapes = {str(name): (int(out), int(width)) for name, (out, width) in about["modules"].items()}
            spec = SlotSpec(int(about["max_rank"]), shapes)
            base = about.get("base")
            return TrainerSlots(spec, str(about["base_fingerprint"]), None if base is None else str(base))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(
                f"{path} was not written by a trainer ({type(error).__name__}: {error}); start the trainer again"
            ) from None


@dataclass(frozen=True)
class ConvertReport:
    """`folder`: the checkpoint that was made. `report`: what its report.json holds."""

    folder: Path
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """For a person, one sentence a line."""
        about = self.report
        scale = about["alpha"] / about["rank"]
        fit = "it fits the trainer's slots" if about["checked"] else "no trainer.json yet: the trainer checks the fit"
        return [
            f"{about['source']}: rank {about['rank']}, alpha {about['alpha']:g} (scale {scale:g}), "
            f"{about['modules']} modules, {listed(about['dtype_from'])}",
            f"kept {about['kept']} of {about['modules']} modules as they are: the run starts as the same function",
            fit,
            *(f"note: {note}" for note in about["notes"]),
            f"wrote {self.folder} (adapter {about['digest'][:8]}, from {about['source_digest'][:8]})",
        ]


def convert_adapter(disk: Disk, source: Path, run_dir: Path, *, trainer_json: Path | None) -> ConvertReport:
    """Publish `run_dir/checkpoints/step_0` with the adapter (PEFT) in `source`; `run_dir` is made if need be.

    trainer_json: where it exists, the adapter must fit the slots that it describes; without it, the adapter is taken as
    it is, and the trainer checks it at admission.
    Raises AdapterError when the adapter cannot be used, Conflict when the run has a checkpoint already, BadRunId when
    the folder is called run_<what is no id>, StoreError when it cannot be written. Then nothing is left behind.
    """
    checkpoints = run_dir / "checkpoints"
    _refuse_second_start(run_dir, checkpoints)
    adapter = read_peft(source)
    slots = TrainerSlots.read(trainer_json) if trainer_json is not None and trainer_json.exists() else None
    spec = SlotSpec.around(adapter.adapter) if slots is None else slots.spec
    notes = [] if slots is None else _compare_bases(adapter, slots, source)
    prepared = prepare(adapter, spec, None, None)
    report = {**prepared.report, "source": str(source.absolute()), "checked": slots is not None}
    report["notes"] = [*prepared.report["notes"], *notes]
    fingerprint = adapter.facts.base_fingerprint if slots is None else slots.base_fingerprint
    base_model = adapter.facts.base_model if slots is None or slots.base is None else slots.base
    snapshot = snapshot_of(prepared, fingerprint)
    target = step_folder(checkpoints, 0)
    with _nothing_left(disk, checkpoints), disk.publish_dir(target, CHECKPOINT, {"step": 0}) as staging:
        write_snapshot(staging, snapshot, PeftFacts(base_model))
        staging.write_json(REPORT_NAME, report)
    return ConvertReport(target, report)


def _refuse_second_start(run_dir: Path, checkpoints: Path) -> None:
    """A run starts once, under a name that a trainer will take. Raises Conflict, BadRunId."""
    if run_dir.name.startswith(RUN_PREFIX):
        RunId.of_folder(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise Conflict(f"{run_dir} is a file; a run is a folder. Choose another name")
    there = sorted(path.name for path in checkpoints.glob("step_*")) if checkpoints.is_dir() else []
    if there:
        raise Conflict(
            f"{checkpoints} has {listed(there)} already; an adapter can only become the start of a run that has no "
            "checkpoint. Choose another run folder, or move these away"
        )


def _compare_bases(adapter: PeftAdapter, slots: TrainerSlots, source: Path) -> list[str]:
    """Notes on what the adapter says of its base. Raises MisfitAdapter when its fingerprint is another's."""
    recorded = adapter.facts.base_fingerprint
    if recorded is not None and recorded != slots.base_fingerprint:
        raise MisfitAdapter(
            f"{source} was trained on a base with fingerprint {recorded[:12]}, the trainer's has "
            f"{slots.base_fingerprint[:12]}; use the base that the adapter belongs to"
        )
    name = adapter.facts.base_model
    if recorded is None and name is not None and slots.base is not None and name != slots.base:
        return [f"the adapter names its base {quote(name)}, the trainer's is {quote(slots.base)}; the shapes fit"]
    return []


@contextmanager
def _nothing_left(disk: Disk, folder: Path) -> Iterator[None]:
    """If the block raises, remove the folders on the way to `folder` that were not there before, where still empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as error:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                disk.remove_tree(path)
        if isinstance(error, OSError):
            raise StoreError(f"cannot write {folder}: {error.strerror or error}; nothing was left there") from error
        raise
