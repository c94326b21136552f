"""canonical + slot spec -> PreparedInitAdapter: parsed, validated, normalised CPU tensors, and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.adapters.canonical import Adapter


@dataclass(frozen=True)
class SlotSpec:
    """What a slot can hold: `shapes` maps each target module's path to (out, in)."""

    max_rank: int
    shapes: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class PreparedInitAdapter:
    """What one slot starts from: fp32, on the CPU, for exactly the slot's modules, one rank and one scale.

    Its adapter's pairs have the run's own rank (not the slot's), all with scale alpha / rank.
    """

    adapter: Adapter
    rank: int
    alpha: float
    source_digest: str
    report: dict[str, Any]
