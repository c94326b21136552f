"""Where a run starts: a verified checkpoint, and for a run that has none, the step_0 that is made first.

So there is one way in: trained checkpoint, converter's step_0, trainer's own init adapter and fresh adapter all come
through `open_start`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.companions import Companions
from graftwork.adapters.formats.untrusted import listed
from graftwork.adapters.prepare import PreparedInitAdapter, Wish, fresh, prepare
from graftwork.adapters.snapshot import Snapshot, read_snapshot, snapshot_of, write_snapshot
from graftwork.adapters.source import AdapterFacts, AdapterSource, InMemory
from graftwork.config.schema import AdapterConfig
from graftwork.errors import CannotResume, MisfitAdapter
from graftwork.model.base import BaseModel
from graftwork.store.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from graftwork.store.disk import Disk


def make_step_0(
    disk: Disk, checkpoints: Path, base: BaseModel, source: AdapterSource | None, wish: AdapterConfig, seed: int,
    facts: AdapterFacts, companions: Companions | None = None,
) -> PreparedInitAdapter:  # fmt: skip
    """Publish `checkpoints/step_0` from a saved adapter, or a fresh one; return what it holds. Raises AdapterError."""
    prepared = _first_adapter(base, source, wish, seed)
    snapshot = snapshot_of(prepared, base.fingerprint, companions)
    save_checkpoint(disk, checkpoints, 0, lambda staging: write_snapshot(staging, snapshot, facts))
    return prepared


def _first_adapter(
    base: BaseModel, source: AdapterSource | None, wish: AdapterConfig, seed: int
) -> PreparedInitAdapter:
    if source is not None:
        return prepare_for(base, source, wish, seed)
    rank = base.spec.max_rank if wish.rank is None else wish.rank
    if rank > base.spec.max_rank:
        raise MisfitAdapter(f"adapter.rank is {rank}, the slots have lora.max_rank {base.spec.max_rank}")
    return fresh(base.spec, rank, 2.0 * rank if wish.alpha is None else wish.alpha, seed)


def prepare_for(base: BaseModel, source: AdapterSource, wish: AdapterConfig, seed: int) -> PreparedInitAdapter:
    """A saved adapter, made ready for a slot of this base. Raises MisfitAdapter, also when it records another base."""
    recorded = source.facts.base_fingerprint
    if recorded not in (None, base.fingerprint):
        raise MisfitAdapter(
            f"the adapter was trained on another base: it records fingerprint {str(recorded)[:12]}, this one has "
            f"{base.fingerprint[:12]}"
        )
    return prepare(source, base.spec, Wish(wish.rank, wish.alpha, wish.allow_lossy, seed))


def open_start(
    checkpoints: Path, step: int | None, base: BaseModel, wish: AdapterConfig, seed: int, *, needs_reference: bool
) -> tuple[Checkpoint, Snapshot]:
    """The checkpoint of `step` (None: the newest), every byte verified, and fit for this base and configuration.

    A step_0 that was converted without sight of these slots is brought to their modules and to the run's rank and
    alpha now, as an import: the same function. A trained checkpoint must have all of them already.
    Raises CannotResume when it is absent, damaged, of another base, or lacks the reference adapter that a KL loss
    needs; MisfitAdapter when it does not fit the slots or contradicts the configured rank or alpha.
    """
    checkpoint = open_checkpoint(checkpoints, step)
    snapshot = read_snapshot(checkpoint)
    where, state = checkpoint.path, snapshot.state
    if state.base_fingerprint not in (None, base.fingerprint):
        raise CannotResume(
            f"{where} was made on another base: fingerprint {str(state.base_fingerprint)[:12]}, this one has "
            f"{base.fingerprint[:12]}; give the base that it was trained on"
        )
    if state.step == 0 and not _fits(snapshot.adapter, base, wish, state.rank, state.alpha):
        prepared = prepare_for(base, InMemory(snapshot.adapter), wish, seed)
        brought = snapshot_of(prepared, base.fingerprint, snapshot.companions)
        return checkpoint, replace(brought, state=replace(brought.state, start=state.start))
    for name, asked, found in (("rank", wish.rank, state.rank), ("alpha", wish.alpha, state.alpha)):
        if asked is not None and asked != found:
            raise MisfitAdapter(f"adapter.{name} is {asked}, {where} has {found}; drop the setting")
    for adapter in (snapshot.adapter, snapshot.reference):
        if adapter is not None and not _fits(adapter, base, wish, state.rank, state.alpha):
            prepare(InMemory(adapter), base.spec, Wish(state.rank, state.alpha))  # says what does not fit
            absent = sorted(base.spec.shapes.keys() - adapter.pairs.keys())
            raise MisfitAdapter(f"{where} was trained without {listed(absent)}; set lora.target_modules as it was")
    if needs_reference and state.step > 0 and snapshot.reference is None:
        raise CannotResume(
            f"{where} holds no reference adapter, which loss.kl_coefficient needs; it was trained without"
        )
    return checkpoint, replace(snapshot, state=replace(state, base_fingerprint=base.fingerprint))


def _fits(adapter: Adapter, base: BaseModel, wish: AdapterConfig, rank: int, alpha: float) -> bool:
    """Whether the slots hold it as it is: the same modules and shapes, and what the run asks for."""
    shapes = {path: pair.shape for path, pair in adapter.pairs.items()}
    return (
        shapes == {path: tuple(shape) for path, shape in base.spec.shapes.items()}
        and rank <= base.spec.max_rank
        and wish.rank in (None, rank)
        and wish.alpha in (None, alpha)
    )
