"""A run's whole trainable state as a value, and its files inside a checkpoint.

    trainer/rank_0.safetensors    `adapter.<module>.lora_A` ..., `exp_avg. ...`, `exp_avg_sq. ...`, all fp32
    trainer/state.json            TrainerState
    orchestrator/state.json       copied from the last consumed batch, if there was one
    reference/                    the run's starting adapter (PEFT), where its loss needs it
    weight/                       STABLE and a PEFT adapter, ready for PEFT or vLLM

The same writer serves the trainer, SFT and the converter: a reader cannot tell who wrote a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.formats.peft import PeftFacts, read_peft, write_peft
from graftwork.errors import CannotResume, Damaged
from graftwork.store.checkpoint import WEIGHT, Checkpoint, TrainerState
from graftwork.store.disk import Staging, read_json

RANK_FILE = "trainer/rank_0.safetensors"
STATE_FILE = "trainer/state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """`moments` is None until AdamW has taken a step; else (exp_avg, exp_avg_sq), shaped and keyed like `adapter`."""

    state: TrainerState
    adapter: Adapter
    moments: tuple[Adapter, Adapter] | None
    reference: Adapter | None
    orchestrator_state: dict[str, Any] | None


def write_snapshot(staging: Staging, snapshot: Snapshot, facts: PeftFacts) -> None:
    """Fill a staged checkpoint folder. `facts` goes into the exported adapter_config.json."""
    tensors = dict(_flatten("adapter", snapshot.adapter))
    for name, moments in zip(MOMENTS, snapshot.moments or (), strict=False):
        tensors.update(_flatten(name, moments))
    staging.write(RANK_FILE, save_safetensors(tensors))
    staging.write_json(STATE_FILE, snapshot.state.to_json())
    if snapshot.orchestrator_state is not None:
        staging.write_json("orchestrator/state.json", snapshot.orchestrator_state)
    if snapshot.reference is not None:
        _write_adapter(staging, "reference", snapshot.reference, facts)
    _write_adapter(staging, WEIGHT, snapshot.adapter, facts)
    staging.seal(WEIGHT, WEIGHT, {"step": snapshot.state.step, "digest": snapshot.adapter.digest()})


def read_snapshot(checkpoint: Checkpoint) -> Snapshot:
    """The snapshot in a verified checkpoint. Raises CannotResume, naming the file and the tensor."""
    try:
        state_path = checkpoint.path / STATE_FILE
        state = TrainerState.from_json(read_json(state_path, "checkpoint"), state_path)
        tensors = load_safetensors((checkpoint.path / RANK_FILE).read_bytes())
        exported = read_peft(checkpoint.path / WEIGHT)
        scales = {path: pair.scale for path, pair in exported.adapter.pairs.items()}
        adapter = _unflatten("adapter", tensors, scales)
        moments = None
        if state.optimizer_steps > 0:
            moments = (_unflatten(MOMENTS[0], tensors, scales), _unflatten(MOMENTS[1], tensors, scales))
        if left := sorted(tensors):
            raise Damaged(f"{checkpoint.path / RANK_FILE}: unknown tensor {left[0]}")
        reference_path = checkpoint.path / "reference"
        reference = read_peft(reference_path).adapter if reference_path.is_dir() else None
    except (Damaged, SafetensorError, FileNotFoundError) as error:
        raise CannotResume(f"checkpoint {checkpoint.path} cannot be used: {error}") from None
    return Snapshot(state, adapter, moments, reference, checkpoint.orchestrator_state)


def _write_adapter(staging: Staging, folder: str, adapter: Adapter, facts: PeftFacts) -> None:
    for name, data in write_peft(adapter, facts).items():
        staging.write(f"{folder}/{name}", data)


def _flatten(kind: str, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for path, pair in adapter.pairs.items():
        yield f"{kind}.{path}.lora_A", pair.a.contiguous()
        yield f"{kind}.{path}.lora_B", pair.b.contiguous()


def _unflatten(kind: str, tensors: dict[str, Tensor], scales: dict[str, float]) -> Adapter:
    """Take the tensors of one kind out of `tensors`. Raises Damaged, naming the first that is missing or not fp32."""
    pairs = {}
    for path, scale in scales.items():
        factors = []
        for side in ("lora_A", "lora_B"):
            tensor = tensors.pop(f"{kind}.{path}.{side}", None)
            if tensor is None or tensor.dtype != torch.float32 or tensor.dim() != 2:
                raise Damaged(f"{RANK_FILE}: tensor {kind}.{path}.{side} is missing or not a float32 matrix")
            factors.append(tensor)
        pairs[path] = LoraPair(factors[0], factors[1], scale)
    return Adapter(pairs)
