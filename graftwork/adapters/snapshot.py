"""A run's whole trainable state as a value, and its files inside a checkpoint.

    trainer/rank_N.safetensors    `adapter.<module>.lora_A` ..., `exp_avg. ...`, `exp_avg_sq. ...`, all fp32. A tensor
                                  that one rank has whole has its shape; of others each rank has some elements [n], in
                                  row-major order, and those of rank 0, 1, ... follow one another
    trainer/state.json            TrainerState
    orchestrator/state.json       copied from the last consumed batch, if there was one
    reference/                    the run's starting adapter (PEFT), where its loss needs it
    weight/                       STABLE and a PEFT adapter, ready for PEFT or vLLM, with the tokenizer files that came
                                  with the adapter that the run started from

The same writer serves the trainer, SFT and the converter: a reader cannot tell who wrote a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.companions import Companions, read_companions
from graftwork.adapters.formats.expert_layout import piece_of
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import peft_files
from graftwork.adapters.formats.tensor_file import tensor_chunks
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.adapters.report import REPORT_NAME
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import AdapterError, CannotResume, Damaged
from graftwork.store.checkpoint import WEIGHT, Checkpoint, Cursor, TrainerState
from graftwork.store.disk import Staging
from graftwork.store.files import read_json

RANK_FILES = re.compile(r"trainer/rank_(0|[1-9][0-9]{0,5})\.safetensors", re.ASCII)
STATE_FILE = "trainer/state.json"
MASTERS = "adapter"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """`moments` is None until AdamW has taken a step; else (exp_avg, exp_avg_sq), shaped and keyed like `adapter`."""

    state: TrainerState
    adapter: Adapter
    moments: tuple[Adapter, Adapter] | None
    reference: Adapter | None
    orchestrator_state: dict[str, Any] | None
    companions: Companions = field(default_factory=dict)


def snapshot_of(
    prepared: PreparedInitAdapter, base_fingerprint: str | None, companions: Companions | None = None
) -> Snapshot:
    """The state before the first step: step_0 of a fresh run and of a warm start, whoever makes it.

    base_fingerprint: None when the base was not there to be looked at (the converter without a trainer.json).
    """
    digest = prepared.report["digest"]
    key = "seed" if prepared.report["kind"] == "fresh" else "source_digest"
    state = TrainerState(
        step=0,
        optimizer_steps=0,
        skipped_in_a_row=0,
        rank=prepared.rank,
        alpha=prepared.alpha,
        cursor=Cursor.start(digest),
        start={"kind": prepared.report["kind"], key: prepared.report[key]},
        known_digests={"0": [digest]},
        base_fingerprint=base_fingerprint,
    )
    return Snapshot(state, prepared.adapter, None, None, None, companions or {})


def is_unfitted(folder: Path) -> bool:
    """Whether a checkpoint is a step_0 that the converter made without sight of any slots: its report says so. What it
    holds is then the adapter as it was, which whoever starts from it brings to the slots."""
    path = folder / REPORT_NAME
    report = read_json(path, "import report") if path.is_file() else None
    return isinstance(report, dict) and report.get("checked") is False


def write_snapshot(staging: Staging, snapshot: Snapshot, facts: AdapterFacts, ranks: int = 1) -> None:
    """Fill a staged checkpoint folder. `facts` goes into the exported adapters, with the fingerprint of the base.

    ranks: files that the trainer's tensors are cut into. Readers put any number together.
    """
    tensors = dict(_flatten(MASTERS, snapshot.adapter))
    for name, moments in zip(MOMENTS, snapshot.moments or (), strict=False):
        tensors.update(_flatten(name, moments))
    for rank in range(ranks):
        pieces = {n: piece_of(t.reshape(-1), rank, ranks) for n, t in tensors.items()} if ranks > 1 else tensors
        write_tensors(staging, rank, pieces)
    write_shared(staging, snapshot, facts)


def write_tensors(staging: Staging, rank: int, pieces: Mapping[str, Tensor]) -> str:
    """Write a rank's part of the trainer's tensors, keys as in `tensor_name`; the file's name."""
    held = {name: lambda t=piece: t for name, piece in pieces.items() if piece.numel()}
    staging.write(_rank_file(rank), tensor_chunks(held, {}))
    return _rank_file(rank)


def write_shared(staging: Staging, snapshot: Snapshot, facts: AdapterFacts) -> None:
    """Write everything else: what does not grow with the number of ranks."""
    facts = replace(facts, base_fingerprint=snapshot.state.base_fingerprint or facts.base_fingerprint)
    staging.write_json(STATE_FILE, snapshot.state.to_json())
    if snapshot.orchestrator_state is not None:
        staging.write_json("orchestrator/state.json", snapshot.orchestrator_state)
    if snapshot.reference is not None:
        _write_adapter(staging, "reference", snapshot.reference, facts)
    _write_adapter(staging, WEIGHT, snapshot.adapter, facts)
    for name, data in snapshot.companions.items():
        staging.write(f"{WEIGHT}/{name}", data)
    staging.seal(WEIGHT, WEIGHT, {"step": snapshot.state.step, "digest": snapshot.adapter.digest()})


def tensor_name(kind: str, path: str, side: str) -> str:
    """kind: MASTERS or one of MOMENTS. side: "lora_A" or "lora_B"."""
    return f"{kind}.{path}.{side}"


def read_snapshot(checkpoint: Checkpoint) -> Snapshot:
    """The snapshot in a verified checkpoint: its parts agree with one another.

    Raises CannotResume, naming the file and the tensor or field.
    """
    try:
        state_path = checkpoint.path / STATE_FILE
        state = TrainerState.from_json(read_json(state_path, "checkpoint"), state_path)
        tensors = _read_ranks(checkpoint)
        exported = read_peft(checkpoint.path / WEIGHT).adapter
        adapter = _unflatten(MASTERS, tensors, exported)
        moments = None
        if state.optimizer_steps > 0:
            moments = (_unflatten(MOMENTS[0], tensors, exported), _unflatten(MOMENTS[1], tensors, exported))
        if left := sorted(tensors):
            raise Damaged(f"{checkpoint.path / 'trainer'}: unknown tensor {left[0]}")
        _check_agreement(state, adapter, exported)
        reference_path = checkpoint.path / "reference"
        reference = read_peft(reference_path).adapter if reference_path.is_dir() else None
        if reference is not None:
            _check_scale(state, reference, "reference/")
        orchestrator_state = checkpoint.orchestrator_state
        companions = read_companions(checkpoint.path / WEIGHT)
        if not checkpoint.step == state.step == state.cursor.step:
            raise Damaged(f"{state_path}: step {state.step}, cursor {state.cursor.step}, checkpoint {checkpoint.step}")
    except (Damaged, AdapterError, SafetensorError, OSError) as error:
        raise CannotResume(f"checkpoint {checkpoint.path} cannot be used: {error}") from None
    return Snapshot(state, adapter, moments, reference, orchestrator_state, companions)


def _rank_file(rank: int) -> str:
    return f"trainer/rank_{rank}.safetensors"


def _read_ranks(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Tensors that one rank has; of those that several have, the elements [n] in order. Raises Damaged when a rank's
    file is not there, or pieces do not fit."""
    ranks = sorted(int(match[1]) for name in checkpoint.manifest.files if (match := RANK_FILES.fullmatch(name)))
    if ranks != list(range(len(ranks))) or not ranks:
        raise Damaged(f"{checkpoint.path / 'trainer'} has the files of ranks {ranks}, expected 0 to the last")
    pieces: dict[str, list[Tensor]] = {}
    for rank in ranks:
        for name, tensor in load_safetensors((checkpoint.path / _rank_file(rank)).read_bytes()).items():
            pieces.setdefault(name, []).append(tensor)
    for name, parts in pieces.items():
        if len(parts) > 1 and any(part.dim() != 1 or part.dtype != parts[0].dtype for part in parts):
            found = ", ".join(f"{part.dtype}{list(part.shape)}" for part in parts)
            raise Damaged(f"{checkpoint.path / 'trainer'}: pieces of {name} do not fit together ({found})")
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in pieces.items()}


def _check_agreement(state: TrainerState, adapter: Adapter, exported: Adapter) -> None:
    """The three files tell of one adapter. Raises Damaged."""
    if adapter.digest() != exported.digest():
        raise Damaged(f"trainer/ and {WEIGHT}/ hold different adapters")
    _check_scale(state, adapter, f"{WEIGHT}/")


def _check_scale(state: TrainerState, adapter: Adapter, where: str) -> None:
    for path, pair in adapter.pairs.items():
        if pair.rank != state.rank or pair.scale != state.alpha / state.rank:
            raise Damaged(
                f"{STATE_FILE} says rank {state.rank} and alpha {state.alpha}; "
                f"in {where} {path} has rank {pair.rank} and scale {pair.scale}"
            )


def _write_adapter(staging: Staging, folder: str, adapter: Adapter, facts: AdapterFacts) -> None:
    for name, data in peft_files(adapter, facts).items():
        staging.write(f"{folder}/{name}", data)


def _flatten(kind: str, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for path, pair in adapter.pairs.items():
        yield tensor_name(kind, path, "lora_A"), pair.a.contiguous()
        yield tensor_name(kind, path, "lora_B"), pair.b.contiguous()


def _unflatten(kind: str, tensors: dict[str, Tensor], like: Adapter) -> Adapter:
    """Take the tensors of one kind out of `tensors`: the modules, shapes and scales of `like`, in float32.

    Raises Damaged, naming the first that is missing or of another dtype or shape.
    """
    pairs = {}
    for path, pair in like.pairs.items():
        factors = []
        for side, expected in (("lora_A", pair.a), ("lora_B", pair.b)):
            name = tensor_name(kind, path, side)
            tensor = tensors.pop(name, None)
            if tensor is not None and tensor.dim() == 1 and tensor.numel() == expected.numel():
                tensor = tensor.view(expected.shape)
            if tensor is None or tensor.dtype != torch.float32 or tensor.shape != expected.shape:
                found = "missing" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"
                raise Damaged(f"trainer/: tensor {name} is {found}, expected torch.float32{list(expected.shape)}")
            factors.append(tensor)
        pairs[path] = LoraPair(factors[0], factors[1], pair.scale)
    return Adapter(pairs)
