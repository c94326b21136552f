"""Adapter folder -> adapter folder, checkpoint folder; and back.

The trainer does not know where a checkpoint came from; a `step_0` made here is what it would have written itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.companions import Companions, differences
from graftwork.adapters.formats.peft_read import Choice
from graftwork.adapters.formats.peft_write import ExpertLayout, peft_files
from graftwork.adapters.formats.rank_files import rank_file
from graftwork.adapters.formats.untrusted import listed, quote
from graftwork.adapters.opening import open_adapter
from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec, Wish, prepare, refuse_other_base
from graftwork.adapters.report import REPORT_NAME, lines_of
from graftwork.adapters.snapshot import snapshot_of, write_snapshot
from graftwork.adapters.source import AdapterFacts, AdapterSource
from graftwork.errors import Conflict, Damaged, StoreError
from graftwork.store.checkpoint import CHECKPOINT, WEIGHT
from graftwork.store.disk import Disk
from graftwork.store.files import Content, dump_json, read_json
from graftwork.store.layout import RUN_PREFIX, RunId, step_folder

IMPORT_REPORT_NAME = "import_report.json"
ADAPTER = "adapter"
OLDER_CHECKPOINT = "checkpoint with rank_N.pt"
FORMATS: dict[str, ExpertLayout] = {
    "peft": "fused", "peft-per-expert": "per expert", "vllm-3d": "vllm 3-D", "stacked": "stacked",
}  # fmt: skip
RankFormat = Literal["safetensors", "pt"]


@dataclass(frozen=True)
class Target:
    """What an adapter is imported for. spec None: for slots that hold it as it is; nothing is checked then.

    base: the folder or hub id of the base, as the user or the trainer names it.
    """

    spec: SlotSpec | None = None
    base: str | None = None
    fingerprint: str | None = None

    @staticmethod
    def of_trainer(path: Path) -> Target:
        """The slots that a `trainer.json` describes. Raises Damaged, naming file and field."""
        about = read_json(path, "trainer")
        try:
            shapes = {str(name): tuple(int(size) for size in shape) for name, shape in about["modules"].items()}
            if not all(len(shape) in (2, 3) and min(shape) > 0 for shape in shapes.values()):
                raise ValueError("a module's shape is not (out, in) or (experts, out, in)")
            base = about.get("base")
            return Target(
                SlotSpec(int(about["max_rank"]), shapes), None if base is None else str(base),
                str(about["base_fingerprint"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(
                f"{path} was not written by a trainer ({type(error).__name__}: {error}); start the trainer again"
            ) from None


@dataclass(frozen=True)
class Imported:
    """`folder`: what was made. `report`: what the report beside it holds."""

    folder: Path
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """For a person, one sentence a line."""
        about = self.report
        fit = "it fits the slots" if about["checked"] else "no trainer.json, no base: the trainer checks the fit"
        return [
            f"{about['source']}: {about['format']}",
            *lines_of(about),
            fit,
            f"wrote {self.folder} (adapter {about['digest'][:8]}, from {about['source_digest'][:8]})",
        ]


@dataclass(frozen=True)
class _Ready:
    prepared: PreparedInitAdapter
    facts: AdapterFacts
    companions: Companions
    report: dict[str, Any]


def import_adapter(
    disk: Disk, source: Path, out: Path, target: Target, wish: Wish = Wish(), choice: Choice = Choice()
) -> Imported:
    """Publish `out`: the adapter in `source` as a PEFT adapter that fits the target, with `import_report.json`.

    Raises AdapterError when it cannot be used, Conflict when `out` exists, StoreError when it cannot be written. Then
    nothing is left behind.
    """
    _refuse_existing(out)
    ready = _ready(source, target, wish, choice)
    files = peft_files(ready.prepared.adapter, ready.facts)
    _publish(disk, out, ADAPTER, {"digest": ready.report["digest"]}, {
        **files, **ready.companions, IMPORT_REPORT_NAME: dump_json(ready.report),
    })  # fmt: skip
    return Imported(out, ready.report)


def convert_adapter(
    disk: Disk, source: Path, run_dir: Path, target: Target = Target(), wish: Wish = Wish(), choice: Choice = Choice(),
    *, ranks: int = 1, rank_format: RankFormat = "safetensors",
) -> Imported:  # fmt: skip
    """Publish `run_dir/checkpoints/step_0` with the adapter in `source`; `run_dir` is made if need be.

    ranks: files that the trainer's state is cut into; any trainer reads any number. rank_format "pt": older trainers'.
    Raises as `import_adapter` does, and BadRunId when the folder is called run_<what is no id>.
    """
    checkpoints = run_dir / "checkpoints"
    _refuse_second_start(run_dir, checkpoints)
    ready = _ready(source, target, wish, choice)
    folder = step_folder(checkpoints, 0)
    if rank_format == "pt":
        _publish(disk, folder, OLDER_CHECKPOINT, {"step": 0}, {
            **{f"trainer/rank_{rank}.pt": rank_file(ready.prepared.adapter, rank, ranks) for rank in range(ranks)},
            **{f"{WEIGHT}/{name}": data for name, data in peft_files(ready.prepared.adapter, ready.facts).items()},
            **{f"{WEIGHT}/{name}": data for name, data in ready.companions.items()},
            REPORT_NAME: dump_json(ready.report),
        })  # fmt: skip
        return Imported(folder, ready.report)
    snapshot = snapshot_of(ready.prepared, ready.facts.base_fingerprint, ready.companions)
    with _nothing_left(disk, checkpoints), disk.publish_dir(folder, CHECKPOINT, {"step": 0}) as staging:
        write_snapshot(staging, snapshot, ready.facts, ranks)
        staging.write_json(REPORT_NAME, ready.report)
    return Imported(folder, ready.report)


def export_adapter(
    disk: Disk, source: Path, out: Path, format: str, alpha: float | None = None, *, older: bool = False
) -> list[str]:
    """Publish `out`: the adapter (or checkpoint) in `source`, its experts in another layout; what to tell the user.

    format: a key of FORMATS. Dtypes, ranks and scales stay. older: `source` may be a checkpoint with rank_N.pt; alpha:
    for one that does not say its scale. Raises as `import_adapter` does.
    """
    _refuse_existing(out)
    with open_adapter(source, alpha=alpha, older=older) as opened:
        SlotSpec.around(opened.source)  # all experts are there
        adapter = Adapter({path: opened.source.load(path) for path in sorted(opened.source.modules)})
        facts, companions, kind = opened.source.facts, opened.companions(), opened.kind
    digest = adapter.digest()
    files = peft_files(adapter, facts, FORMATS[format])
    # Not `digest`: gate and up in one tensor come back as another adapter of the same function.
    _publish(disk, out, ADAPTER, {"source_digest": digest, "format": format}, {**files, **companions})
    return [
        f"{source}: {kind}",
        *_export_notes(adapter, format),
        f"wrote {out} (from adapter {digest[:8]}, format {format})",
    ]


def _export_notes(adapter: Adapter, format: str) -> list[str]:
    stacks = [path for path, pair in adapter.pairs.items() if len(pair.shape) == 3]
    dense = {path.rpartition(".")[2] for path, pair in adapter.pairs.items() if len(pair.shape) == 2}
    if not stacks:
        return ["no experts: every format is the same"]
    notes = []
    apart = [path for path in stacks if path.endswith(".gate_proj") and not _shares_a(adapter, path)]
    if format in ("peft", "vllm-3d") and apart:
        notes.append(
            f"gate and up of {len(apart)} layers have factors of their own: in one tensor they are block-diagonal, of "
            "the summed rank; exact"
        )
    if format in ("peft", "peft-per-expert") and dense & {"gate_proj", "up_proj", "down_proj"}:
        notes.append("WARNING: PEFT 0.21 takes this adapter's dense MLP layers for experts and drops them on loading")
    if format == "stacked":
        notes.append("stacked experts are read by Graftwork; neither PEFT 0.21 nor vLLM 0.32 reads them")
    return notes


def _shares_a(adapter: Adapter, gate: str) -> bool:
    up = adapter.pairs.get(gate.removesuffix("gate_proj") + "up_proj")
    return up is None or up.a.equal(adapter.pairs[gate].a)


def _ready(source: Path, target: Target, wish: Wish, choice: Choice) -> _Ready:
    """Everything that can refuse, before a byte is written."""
    with open_adapter(source, choice) as opened:
        spec = target.spec or _as_it_is(opened.source, wish)
        notes = [] if target.spec is None else _compare_bases(opened.source, target, source)
        prepared = prepare(opened.source, spec, wish)
        companions = opened.companions()
    facts = opened.source.facts
    fingerprint = facts.base_fingerprint if target.fingerprint is None else target.fingerprint
    base = facts.base_model if target.base is None else target.base
    warnings = differences(companions, None if target.base is None else Path(target.base))  # never the adapter's
    report = {
        **prepared.report,
        "source": str(source.absolute()),
        "format": opened.kind,
        "checked": target.spec is not None,
        "asked": {"adapter_name": choice.adapter, "ignore": list(choice.ignore), "allow_lossy": wish.allow_lossy},
        "notes": [*prepared.report["notes"], *notes],
        "warnings": [*prepared.report["warnings"], *warnings],
    }
    return _Ready(prepared, AdapterFacts(base, fingerprint), companions, report)


def _as_it_is(source: AdapterSource, wish: Wish) -> SlotSpec:
    spec = SlotSpec.around(source)
    return SlotSpec(max(spec.max_rank, wish.rank or 0), spec.shapes)


def _refuse_existing(out: Path) -> None:
    """Before any work is done for it. Raises Conflict."""
    if out.exists():
        raise Conflict(f"{out} exists already; nothing is ever overwritten: choose another name")


def _publish(disk: Disk, target: Path, kind: str, facts: dict[str, Any], files: dict[str, Content]) -> None:
    with _nothing_left(disk, target.parent), disk.publish_dir(target, kind, facts) as staging:
        for name, data in files.items():
            staging.write(name, data)


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


def _compare_bases(source: AdapterSource, target: Target, path: Path) -> list[str]:
    """Notes on what the adapter says of its base. Raises MisfitAdapter when its fingerprint is another's."""
    recorded = source.facts.base_fingerprint
    refuse_other_base(str(path), recorded, target.fingerprint)
    name = source.facts.base_model
    if recorded is None and name is not None and target.base is not None and name != target.base:
        return [f"the adapter names its base {quote(name)}, this one is {quote(target.base)}; the shapes fit"]
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
