"""A saved adapter becomes a run's step_0, or nothing happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_adapter

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.convert import Target, convert_adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.snapshot import read_snapshot
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import BadRunId, Conflict, Damaged, MisfitAdapter, StoreError, UnreadableAdapter
from graftwork.store.checkpoint import Cursor, open_checkpoint
from graftwork.store.disk import Disk
from graftwork.store.files import read_json

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8)}
FINGERPRINT = "ab" * 32


def adapter_folder(root: Path, adapter: Adapter | None = None, facts: AdapterFacts | None = None) -> Path:
    folder = root / "sft"
    folder.mkdir(parents=True)
    adapter = adapter or random_adapter(SHAPES, 2)
    for name, data in write_peft(adapter, facts or AdapterFacts("some/base")).items():
        (folder / name).write_bytes(data)
    return folder


def trainer_file(root: Path, **changes: Any) -> Path:
    modules = {path: list(shape) for path, shape in SHAPES.items()}
    about = {"base_fingerprint": FINGERPRINT, "max_rank": 4, "modules": modules, "base": "bases/tiny", **changes}
    path = root / "trainer.json"
    path.write_text(json.dumps({key: value for key, value in about.items() if value is not ...}))
    return path


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_the_checkpoint_holds_the_adapter_as_step_0(tmp_path: Path) -> None:
    adapter = random_adapter(SHAPES, 2, scale=1.5)
    report = convert_adapter(Disk(), adapter_folder(tmp_path, adapter), tmp_path / "a" / "anything")
    checkpoint = open_checkpoint(tmp_path / "a" / "anything" / "checkpoints")
    snapshot = read_snapshot(checkpoint)
    assert checkpoint.path == report.folder and checkpoint.step == 0
    assert snapshot.adapter.digest() == adapter.digest()
    assert snapshot.state.cursor == Cursor.start(adapter.digest())
    assert snapshot.state.start == {"kind": "adapter", "source_digest": adapter.digest()}
    assert snapshot.state.known_digests == {"0": [adapter.digest()]}
    assert (snapshot.state.rank, snapshot.state.alpha, snapshot.state.base_fingerprint) == (2, 3.0, None)
    assert read_json(checkpoint.path / "report.json", "report") == report.report


def test_the_trainers_slots_are_checked_and_its_base_recorded(tmp_path: Path) -> None:
    run = tmp_path / "run_x"
    report = convert_adapter(Disk(), adapter_folder(tmp_path), run, Target.of_trainer(trainer_file(tmp_path)))
    snapshot = read_snapshot(open_checkpoint(run / "checkpoints"))
    assert snapshot.state.base_fingerprint == FINGERPRINT
    assert read_peft(report.folder / "weight").facts == AdapterFacts("bases/tiny", FINGERPRINT)
    text = "\n".join(report.lines())
    assert "rank 2, alpha 4 (scale 2), 2 modules, from float32" in text
    assert "2 modules as they are" in text and "it fits the slots" in text
    assert "names its base 'some/base', this one is 'bases/tiny'" in text
    assert str(report.folder) in text


def test_without_a_trainer_yet_the_adapter_is_taken_as_it_is(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path, facts=AdapterFacts("some/base", FINGERPRINT))
    report = convert_adapter(Disk(), source, tmp_path / "run_x", Target())
    assert "the trainer checks the fit" in "\n".join(report.lines())
    state = read_snapshot(open_checkpoint(tmp_path / "run_x" / "checkpoints")).state
    assert state.base_fingerprint == FINGERPRINT, "what the adapter records of its base is kept for the trainer"


def test_a_half_precision_adapter_becomes_fp32_and_the_report_says_so(tmp_path: Path) -> None:
    pairs = random_adapter(SHAPES, 2).pairs
    half = Adapter({k: LoraPair(p.a.to(torch.bfloat16), p.b.to(torch.bfloat16), p.scale) for k, p in pairs.items()})
    report = convert_adapter(Disk(), adapter_folder(tmp_path, half), tmp_path / "run_x")
    snapshot = read_snapshot(open_checkpoint(tmp_path / "run_x" / "checkpoints"))
    assert snapshot.adapter.dtypes() == ["float32"]
    assert report.report["dtype_from"] == ["bfloat16"] and report.report["source_digest"] == half.digest()
    assert "2 modules, from bfloat16" in report.lines()[1]


def test_the_same_adapter_converted_twice_gives_the_same_trainer_folder(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path)
    one, two = (convert_adapter(Disk(), source, tmp_path / name).folder for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(files) == 7
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in files)


def test_a_step_0_can_itself_be_the_source(tmp_path: Path) -> None:
    first = convert_adapter(Disk(), adapter_folder(tmp_path), tmp_path / "one")
    second = convert_adapter(Disk(), first.folder / "weight", tmp_path / "two")
    assert second.report["source_digest"] == first.report["digest"]


@pytest.mark.parametrize("there", ["step_0", "step_20"])
def test_a_run_that_has_a_checkpoint_is_not_started_again(tmp_path: Path, there: str) -> None:
    source = adapter_folder(tmp_path)
    (tmp_path / "run_x" / "checkpoints" / there).mkdir(parents=True)
    before = everything(tmp_path)
    with pytest.raises(Conflict, match=f"has {there} already"):
        convert_adapter(Disk(), source, tmp_path / "run_x")
    assert everything(tmp_path) == before


def test_converting_twice_keeps_the_first(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path)
    first = convert_adapter(Disk(), source, tmp_path / "run_x")
    with pytest.raises(Conflict):
        convert_adapter(Disk(), source, tmp_path / "run_x")
    assert open_checkpoint(tmp_path / "run_x" / "checkpoints").path == first.folder


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"max_rank": 1}, MisfitAdapter, r"Set lora.max_rank to 2"),
        ({"modules": {"layers.0.q_proj": [6, 8]}}, MisfitAdapter, r"slots do not have: layers.0.v_proj"),
        ({"modules": {"layers.0.q_proj": [6, 9], "layers.0.v_proj": [4, 9]}}, MisfitAdapter, "2 modules of another"),
        ({"modules": {"layers.0.q_proj": [6]}}, Damaged, "was not written by a trainer"),
        ({"base_fingerprint": ...}, Damaged, "base_fingerprint"),
        ({"base_fingerprint": "cd" * 32}, MisfitAdapter, "its fingerprint is abab"),
    ],
)
def test_a_refusal_leaves_nothing_behind(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    source = adapter_folder(tmp_path, facts=AdapterFacts("base", FINGERPRINT))
    slots = trainer_file(tmp_path, **changes)
    before = everything(tmp_path)
    with pytest.raises(error, match=says):
        convert_adapter(Disk(), source, tmp_path / "out" / "run_x", Target.of_trainer(slots))
    assert everything(tmp_path) == before


def test_a_source_that_is_not_there_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UnreadableAdapter, match="no folder at"):
        convert_adapter(Disk(), tmp_path / "absent", tmp_path / "run_x")
    assert everything(tmp_path) == []


def test_a_file_in_place_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run_x").write_text("mine")
    with pytest.raises(Conflict, match="is a file"):
        convert_adapter(Disk(), adapter_folder(tmp_path), tmp_path / "run_x")


class FullDisk(Disk):
    """Fails at the n-th write."""

    def __init__(self, fails_at: int) -> None:
        self.left = fails_at

    def write(self, path: Path, data: bytes) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        super().write(path, data)


@pytest.mark.parametrize("fails_at", range(1, 8))
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, fails_at: int, existing: bool) -> None:
    source = adapter_folder(tmp_path)
    if existing:
        (tmp_path / "run_x" / "control").mkdir(parents=True)
    before = everything(tmp_path)
    with pytest.raises(StoreError, match="No space left"):
        convert_adapter(FullDisk(fails_at), source, tmp_path / "run_x")
    assert everything(tmp_path) == before


def test_a_run_folder_that_no_trainer_would_take_is_refused(tmp_path: Path) -> None:
    source = adapter_folder(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(BadRunId, match="is not a run id"):
        convert_adapter(Disk(), source, tmp_path / "run_Bad.Name")
    assert everything(tmp_path) == before
