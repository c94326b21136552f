"""Where a run starts: a verified checkpoint, and for a run that has none, the step_0 that is made first.

So there is one way in: trained checkpoint, converter's step_0, trainer's own init adapter and fresh adapter all come
through `open_start`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from graftwork.adapters.companions import Companions
from graftwork.adapters.formats.untrusted import listed
from graftwork.adapters.prepare import PreparedInitAdapter, Wish, fresh, places_of, prepare, refuse_other_base
from graftwork.adapters.report import lines_of
from graftwork.adapters.snapshot import Snapshot, is_unfitted, read_snapshot, snapshot_of, write_snapshot
from graftwork.adapters.source import AdapterFacts, AdapterSource, InMemory
from graftwork.config.run import AdapterConfig
from graftwork.errors import CannotResume, MisfitAdapter
from graftwork.model.base import BaseModel
from graftwork.store.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from graftwork.store.disk import Disk
from graftwork.training.runs import FromCheckpoint, SeenRun, Start, was_admitted

log = logging.getLogger(__name__)


def starting_point(
    disk: Disk, base: BaseModel, door: InMemory | None, seen: SeenRun, start: Start
) -> tuple[Checkpoint, Snapshot]:
    """The verified checkpoint that a run starts from; a run that has none gets its step_0 made first.

    Raises AdapterError, CannotResume.
    """
    tree, config = seen.tree, seen.config
    assert config is not None
    step = start.step if isinstance(start, FromCheckpoint) else 0
    facts = AdapterFacts(config.model.path, base.fingerprint)
    said: list[str] = []
    if not isinstance(start, FromCheckpoint):
        said = lines_of(make_step_0(disk, tree.checkpoints, base, door, config.adapter, config.seed, facts).report)
    for line in said:
        log.info("run %s: step_0: %s", tree.id, line)
    checkpoint, snapshot = open_start(
        tree.checkpoints, step, base, config.adapter, config.seed, needs_reference=config.loss.needs_reference
    )
    if snapshot.state.skipped_in_a_row >= config.max_skipped_steps and not was_admitted(seen):
        # It was evicted for this, and somebody asked for another try: it gets all its tries.
        snapshot = replace(snapshot, state=replace(snapshot.state, skipped_in_a_row=0))
    return checkpoint, snapshot


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
    return fresh(base.spec.narrowed(wish.target_modules), rank, 2.0 * rank if wish.alpha is None else wish.alpha, seed)


def prepare_for(base: BaseModel, source: AdapterSource, wish: AdapterConfig, seed: int) -> PreparedInitAdapter:
    """A saved adapter, made ready for a slot of this base. Raises MisfitAdapter, also when it records another base."""
    refuse_other_base("the adapter", source.facts.base_fingerprint, base.fingerprint)
    return prepare(source, base.spec, Wish(wish.rank, wish.alpha, wish.allow_lossy, seed, wish.target_modules))


def _brought(checkpoint: Checkpoint, base: BaseModel, wish: AdapterConfig, seed: int) -> Snapshot:
    """What a run starts from at this checkpoint: what it holds; but of a step_0 that the converter made without sight
    of any slots, its adapter brought to these: their modules, the run's rank and alpha, as an import is.

    The folder stays as it is. Whoever starts from it brings it again, to the same bits: so there is no moment at which
    a run has no step_0. Raises AdapterError.
    """
    snapshot = read_snapshot(checkpoint)
    if not is_unfitted(checkpoint.path):
        return snapshot
    refuse_other_base(str(checkpoint.path), snapshot.state.base_fingerprint, base.fingerprint)
    prepared = prepare_for(base, InMemory(snapshot.adapter), wish, seed)
    for line in lines_of(prepared.report):
        log.info("%s: %s", checkpoint.path, line)
    brought = snapshot_of(prepared, base.fingerprint, snapshot.companions)
    return replace(brought, state=replace(brought.state, start=snapshot.state.start))


def open_start(
    checkpoints: Path, step: int | None, base: BaseModel, wish: AdapterConfig, seed: int, *, needs_reference: bool
) -> tuple[Checkpoint, Snapshot]:
    """The checkpoint of `step` (None: the newest), every byte verified, and fit for this base and configuration.

    seed: of what starts fresh in a step_0 that is yet to be brought to the slots.

    Raises CannotResume when it is absent, damaged, of another base, or lacks the reference adapter that a KL loss
    needs; MisfitAdapter when it does not fit the slots or contradicts the configured rank or alpha.
    """
    checkpoint = open_checkpoint(checkpoints, step)
    snapshot = _brought(checkpoint, base, wish, seed)
    where, state = checkpoint.path, snapshot.state
    if state.base_fingerprint not in (None, base.fingerprint):
        raise CannotResume(
            f"{where} was made on another base: fingerprint {str(state.base_fingerprint)[:12]}, this one has "
            f"{base.fingerprint[:12]}; give the base that it was trained on"
        )
    for name, asked, found in (("rank", wish.rank, state.rank), ("alpha", wish.alpha, state.alpha)):
        if asked is not None and asked != found:
            raise MisfitAdapter(f"adapter.{name} is {asked}, {where} has {found}; drop the setting, or convert again")
    spec = base.spec.narrowed(wish.target_modules)
    for adapter in (snapshot.adapter, snapshot.reference):
        if adapter is not None:
            places_of(InMemory(adapter), spec, Wish(state.rank, state.alpha))
            if absent := sorted(spec.shapes.keys() - adapter.pairs.keys()):
                raise MisfitAdapter(
                    f"{where} was trained without {listed(absent)}; set adapter.target_modules or lora.target_modules "
                    "as it was"
                )
    if needs_reference and state.step > 0 and snapshot.reference is None:
        raise CannotResume(
            f"{where} holds no reference adapter, which loss.kl_coefficient needs; it was trained without"
        )
    return checkpoint, replace(snapshot, state=replace(state, base_fingerprint=base.fingerprint))
