"""A checkpoint's state and its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from support import random_adapter

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec, fresh, prepare
from graftwork.adapters.snapshot import STATE_FILE, Snapshot, read_snapshot, snapshot_of, write_snapshot
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.errors import CannotResume
from graftwork.store.checkpoint import Checkpoint, Cursor, open_checkpoint, save_checkpoint
from graftwork.store.disk import Disk, Staging
from graftwork.store.files import dump_json, verify

SHAPES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (4, 8)}
SPEC = SlotSpec(4, SHAPES)
RANK_FILE = "trainer/rank_0.safetensors"


def start(seed: int = 3) -> PreparedInitAdapter:
    return fresh(SPEC, 2, 4.0, seed)


def saved(root: Path, snapshot: Snapshot, then: Callable[[Staging], None] = lambda staging: None) -> Checkpoint:
    def fill(staging: Staging) -> None:
        write_snapshot(staging, snapshot, AdapterFacts("base"))
        then(staging)

    save_checkpoint(Disk(), root / "checkpoints", snapshot.state.step, fill)
    return open_checkpoint(root / "checkpoints")


def later(prepared: PreparedInitAdapter) -> Snapshot:
    """A snapshot as after two steps, with everything in it."""
    first = snapshot_of(prepared, "ab" * 32)
    state = replace(first.state, step=2, optimizer_steps=2, cursor=first.state.cursor.after("x").after("y"))
    moments = (random_adapter(SHAPES, 2, seed=1), random_adapter(SHAPES, 2, seed=2))
    adapter = random_adapter(SHAPES, 2, seed=3)
    return Snapshot(state, adapter, moments, prepared.adapter, {"next": 3})


def test_a_fresh_runs_first_state_carries_its_seed() -> None:
    prepared = start(seed=11)
    state = snapshot_of(prepared, "ab" * 32).state
    digest = prepared.adapter.digest()
    assert state.start == {"kind": "fresh", "seed": 11}
    assert (state.step, state.optimizer_steps, state.skipped_in_a_row) == (0, 0, 0)
    assert (state.rank, state.alpha, state.base_fingerprint) == (2, 4.0, "ab" * 32)
    assert state.cursor == Cursor.start(digest) and state.known_digests == {"0": [digest]}


def test_a_warm_starts_first_state_names_its_source() -> None:
    source = InMemory(random_adapter(SHAPES, 2), AdapterFacts(), ())
    state = snapshot_of(prepare(source, SPEC), None).state
    assert state.start == {"kind": "adapter", "source_digest": source.adapter.digest()}
    assert state.base_fingerprint is None


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    snapshot = later(start())
    found = read_snapshot(saved(tmp_path, snapshot))
    assert (found.state, found.orchestrator_state) == (snapshot.state, {"next": 3})
    assert found.adapter.digest() == snapshot.adapter.digest()
    assert found.reference is not None and snapshot.reference is not None
    assert found.reference.digest() == snapshot.reference.digest()
    assert found.moments is not None and snapshot.moments is not None
    for one, other in zip(found.moments, snapshot.moments, strict=True):
        assert [pair.a.tolist() for pair in one.pairs.values()] == [pair.a.tolist() for pair in other.pairs.values()]
        assert [pair.b.tolist() for pair in one.pairs.values()] == [pair.b.tolist() for pair in other.pairs.values()]


def test_equal_snapshots_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (saved(tmp_path / name, later(start())) for name in ("one", "two"))
    assert one.manifest == two.manifest


def test_the_exported_weight_is_a_sealed_peft_adapter_that_names_the_base(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, later(start()))
    manifest = verify(checkpoint.path / "weight", "weight")
    found = read_peft(checkpoint.path / "weight")
    assert found.facts == AdapterFacts("base", "ab" * 32)
    assert manifest.facts == {"step": 2, "digest": found.adapter.digest()}


def edited(name: str, change: Callable[[bytes], bytes]) -> Callable[[Staging], None]:
    """Rewrite one file before the checkpoint is sealed: whole by its manifest, wrong inside."""

    def apply(staging: Staging) -> None:
        path = staging.root / name
        data = change(path.read_bytes())
        path.unlink()
        staging.write(name, data)

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Staging], None]:
    def apply(data: bytes) -> bytes:
        loaded = load_safetensors(data)
        change(loaded)
        return save_safetensors(loaded)

    return edited(RANK_FILE, apply)


Q_A = "layers.0.q_proj.lora_A"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (tensors(lambda t: t.pop(f"adapter.{Q_A}")), f"adapter.{Q_A} is missing"),
        (tensors(lambda t: t.pop(f"exp_avg_sq.{Q_A}")), f"exp_avg_sq.{Q_A} is missing"),
        (tensors(lambda t: t.update({"more": torch.zeros(1)})), "unknown tensor more"),
        (tensors(lambda t: t.update({f"exp_avg.{Q_A}": torch.zeros(3, 8)})), r"float32\[3, 8\], expected torch"),
        (tensors(lambda t: t.update({f"adapter.{Q_A}": torch.zeros(2, 8).half()})), "float16"),
        (tensors(lambda t: t[f"adapter.{Q_A}"].add_(1)), "hold different adapters"),
        (edited(RANK_FILE, lambda data: data[:50]), "cannot be used"),
        (edited(STATE_FILE, lambda data: data.replace(b'"alpha": 4.0', b'"alpha": 8.0')), "says rank 2 and alpha 8.0"),
        (edited(STATE_FILE, lambda data: b"[]"), "not a trainer state"),
        (edited("weight/adapter_config.json", lambda data: data.replace(b'"r": 2', b'"r": 4')), "says r = 4"),
        (edited("reference/adapter_config.json", lambda data: dump_json({})), "peft_type is missing"),
    ],
)
def test_parts_that_disagree_are_refused_by_name(tmp_path: Path, spoil: Callable[[Staging], None], says: str) -> None:
    with pytest.raises(CannotResume, match=says):
        read_snapshot(saved(tmp_path, later(start()), spoil))
