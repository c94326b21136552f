"""canonical + slot spec -> PreparedInitAdapter: parsed, validated, normalised CPU tensors, and a report."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graftwork.adapters.canonical import ALPHA_RANGE, Adapter, LoraPair, alpha_for
from graftwork.adapters.formats.peft import PeftAdapter
from graftwork.adapters.formats.untrusted import listed
from graftwork.errors import MisfitAdapter

SCALE_TOLERANCE = 1e-9
"""Relative. Scales this close are the same: an fp32 product cannot tell them apart."""


@dataclass(frozen=True)
class SlotSpec:
    """What a slot can hold: `shapes` maps each target module's path to (out, in)."""

    max_rank: int
    shapes: Mapping[str, tuple[int, int]]

    @staticmethod
    def around(adapter: Adapter) -> SlotSpec:
        """The slot that holds exactly this adapter."""
        ranks = [pair.rank for pair in adapter.pairs.values()]
        return SlotSpec(max(ranks, default=1), {path: pair.shape for path, pair in adapter.pairs.items()})


@dataclass(frozen=True)
class PreparedInitAdapter:
    """What one slot starts from: fp32, on the CPU, for exactly the slot's modules, one rank and one scale.

    Its adapter's pairs have the run's own rank (not the slot's), all with scale alpha / rank.
    report: JSON-able. kind "adapter": what was kept of which source; kind "fresh": the seed.
    """

    adapter: Adapter
    rank: int
    alpha: float
    source_digest: str
    report: dict[str, Any]


def prepare(source: PeftAdapter, spec: SlotSpec, rank: int | None, alpha: float | None) -> PreparedInitAdapter:
    """A saved adapter as a slot's start: same modules, shapes, rank and scale, so the function is the same.

    rank, alpha  the run's; None inherits the adapter's
    Returns      fp32 copies; float16 and bfloat16 become fp32 without rounding
    Raises       MisfitAdapter: one message that names everything that does not fit, and what to do
    """
    adapter = source.adapter
    misfits = [*_module_misfits(adapter, spec), *_rank_misfits(adapter, spec, rank)]
    if misfits:
        raise _misfit(misfits)
    run_rank = next(iter(adapter.pairs.values())).rank
    scales = {path: pair.scale for path, pair in adapter.pairs.items()}
    run_alpha = _inherited_alpha(scales, run_rank) if alpha is None else alpha
    if misfits := _scale_misfits(scales, run_rank, run_alpha, given=alpha is not None):
        raise _misfit(misfits)
    kept = _same_function(adapter, run_alpha / run_rank)
    digest = adapter.digest()
    report = {
        "kind": "adapter",
        "source_digest": digest,
        "digest": kept.digest(),
        "base_model": source.facts.base_model,
        "rank": run_rank,
        "alpha": run_alpha,
        "modules": len(spec.shapes),
        "kept": len(kept.pairs),
        "dtype_from": adapter.dtypes(),
        "dtype_to": "float32",
        "notes": list(source.notes),
    }
    return PreparedInitAdapter(kept, run_rank, run_alpha, digest, report)


def _same_function(adapter: Adapter, scale: float) -> Adapter:
    """fp32 copies, by path."""
    return Adapter(
        {
            path: LoraPair(
                adapter.pairs[path].a.to("cpu", torch.float32, copy=True).contiguous(),
                adapter.pairs[path].b.to("cpu", torch.float32, copy=True).contiguous(),
                scale,
            )
            for path in sorted(adapter.pairs)
        }
    )


def _inherited_alpha(scales: Mapping[str, float], rank: int) -> float:
    """The alpha of the first module's scale. A scale that no alpha / rank gives (rsLoRA) moves by one part in 2^52."""
    scale = next(iter(scales.values()))
    alpha = alpha_for(scale, rank)
    return scale * rank if alpha is None else alpha


def _misfit(misfits: list[str]) -> MisfitAdapter:
    numbered = (f"({index}) {misfit}." for index, misfit in enumerate(misfits, 1))
    return MisfitAdapter(f"the adapter does not fit the slots: {' '.join(numbered)}")


def _module_misfits(adapter: Adapter, spec: SlotSpec) -> list[str]:
    misfits = []
    if unknown := sorted(adapter.pairs.keys() - spec.shapes.keys()):
        misfits.append(
            f"{_count(unknown, 'module')} of the adapter that the slots do not have: {listed(unknown)}. "
            "Add their names to lora.target_modules, or check that the adapter belongs to this base"
        )
    if absent := sorted(spec.shapes.keys() - adapter.pairs.keys()):
        misfits.append(
            f"{_count(absent, 'module')} of the slots that the adapter does not have: {listed(absent)}. "
            "Set lora.target_modules to those that the adapter was trained on"
        )
    wrong = [
        f"{path} (found {_by(adapter.pairs[path].shape)}, expected {_by(spec.shapes[path])})"
        for path in sorted(adapter.pairs.keys() & spec.shapes.keys())
        if adapter.pairs[path].shape != tuple(spec.shapes[path])
    ]
    if wrong:
        misfits.append(
            f"{_count(wrong, 'module')} of another shape (out x in): {listed(wrong)}. "
            "The adapter was trained on another base; use the base that it belongs to"
        )
    return misfits


def _rank_misfits(adapter: Adapter, spec: SlotSpec, rank: int | None) -> list[str]:
    ranks = {path: pair.rank for path, pair in sorted(adapter.pairs.items())}
    if not ranks:
        return ["the adapter has no modules; save it again"]
    expected = next(iter(ranks.values())) if rank is None else rank
    misfits = []
    if wrong := [f"{path} (rank {found})" for path, found in ranks.items() if found != expected]:
        why = "the run's" if rank is not None else f"that of {next(iter(ranks))}"
        misfits.append(
            f"{_count(wrong, 'module')} whose rank is not {expected}, {why}: {listed(wrong)}. "
            "Leave adapter.rank out to take over the adapter's; changing a rank is not yet supported"
        )
    if expected > spec.max_rank:
        misfits.append(f"rank {expected}, and the slots hold {spec.max_rank} at most. Set lora.max_rank to {expected}")
    return misfits


def _scale_misfits(scales: Mapping[str, float], rank: int, alpha: float, *, given: bool) -> list[str]:
    if not ALPHA_RANGE[0] <= alpha <= ALPHA_RANGE[1]:
        return [f"alpha {alpha:g} is not between {ALPHA_RANGE[0]:g} and {ALPHA_RANGE[1]:g}"]
    scale = alpha / rank
    wrong = [
        f"{path} (scale {found:g})"
        for path, found in sorted(scales.items())
        if not math.isclose(found, scale, rel_tol=SCALE_TOLERANCE, abs_tol=0.0)
    ]
    if not wrong:
        return []
    why = f"alpha {alpha:g} / rank {rank} of the run" if given else f"that of {next(iter(scales))}"
    return [
        f"{_count(wrong, 'module')} whose scale is not {scale:g}, {why}: {listed(wrong)}. "
        "Leave adapter.alpha out to take over the adapter's; changing a scale is not yet supported"
    ]


def _count(found: list[str], noun: str) -> str:
    return f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def fresh(spec: SlotSpec, rank: int, alpha: float, seed: int) -> PreparedInitAdapter:
    """An adapter that changes nothing yet: B = 0, A uniform in +-1/sqrt(in) as PEFT draws it.

    Each module's A comes from a generator of its own, keyed by (seed, path): other modules, their order and the
    slots' rank make no difference. Raises MisfitAdapter when the rank does not fit the slots.
    """
    if not 1 <= rank <= spec.max_rank:
        raise MisfitAdapter(f"rank {rank}: the slots hold 1 to {spec.max_rank}. Change adapter.rank or lora.max_rank")
    if not ALPHA_RANGE[0] <= alpha <= ALPHA_RANGE[1]:
        raise MisfitAdapter(f"alpha {alpha:g} is not between {ALPHA_RANGE[0]:g} and {ALPHA_RANGE[1]:g}")
    pairs = {}
    for path in sorted(spec.shapes):
        out_features, in_features = spec.shapes[path]
        bound = 1 / math.sqrt(in_features)
        a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=_generator(seed, path))
        pairs[path] = LoraPair(a, torch.zeros(out_features, rank), alpha / rank)
    adapter = Adapter(pairs)
    digest = adapter.digest()
    report = {
        "kind": "fresh",
        "seed": seed,
        "digest": digest,
        "rank": rank,
        "alpha": alpha,
        "modules": len(pairs),
        "kept": 0,
        "notes": [],
    }
    return PreparedInitAdapter(adapter, rank, alpha, digest, report)


def _generator(seed: int, path: str) -> torch.Generator:
    key = hashlib.sha256(f"fresh {seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
