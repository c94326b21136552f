"""The trainer: one frozen base, S slots, and passes over whatever runs the folder tree shows.

    pass = observe, reconcile, act; then for each run that holds a slot, in turn, one micro-batch of work

What goes wrong in a run ends that run, with the reason in its status.json. What goes wrong in the trainer's own set-up
ends the trainer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.report import lines_of
from graftwork.adapters.snapshot import Snapshot
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.config.schema import AdapterConfig, RunConfig, TrainerConfig
from graftwork.errors import GraftworkError
from graftwork.model.base import BaseModel
from graftwork.store.checkpoint import Checkpoint
from graftwork.store.disk import Claim, Disk
from graftwork.store.layout import OutputTree, RunId
from graftwork.store.status import TERMINAL, State, Status, write_status
from graftwork.training.learner import Banks, Learner, LearnerConfig
from graftwork.training.runs import (
    Admit,
    Enqueue,
    Fail,
    FromCheckpoint,
    Release,
    Seat,
    SeenRun,
    Start,
    World,
    observe,
    reconcile,
)
from graftwork.training.start import bring_step_0, make_step_0, open_start, prepare_for
from graftwork.training.tenant import Tenant

log = logging.getLogger(__name__)


def door_at(path: str | None) -> InMemory | None:
    """The trainer's own init adapter, read once. Raises AdapterError."""
    return None if path is None else read_peft(Path(path))


@dataclass
class Trainer:
    """`passes` counts turns. `ended` lists the runs that reached a terminal state under this trainer."""

    config: TrainerConfig
    base: BaseModel
    disk: Disk
    door: InMemory | None
    banks: Banks = field(init=False)
    tenants: dict[RunId, Tenant] = field(default_factory=dict)
    ended: set[RunId] = field(default_factory=set)
    passes: int = 0
    _warned: set[str] = field(default_factory=set)
    _unwritten: dict[RunId, str | None] = field(default_factory=dict)
    """Runs whose last status could not be written, with their orch.toml's digest: not tried again until it changes."""

    def __post_init__(self) -> None:
        self.outputs = OutputTree(Path(self.config.output_dir).absolute())
        self.banks = Banks.of(self.base, self.config.slots)

    # --- set-up -------------------------------------------------------------------------------------------------------

    def open(self) -> Claim:
        """Claim the output tree, say who we are in trainer.json, and put the door's adapter into slot 0.

        Raises Busy when another trainer holds the tree, MisfitAdapter when the door's adapter does not fit the slots.
        """
        claim = self.disk.claim(self.outputs.trainer_lock, "a trainer")
        if self.door is not None:
            self.banks.training.write(0, prepare_for(self.base, self.door, AdapterConfig(), 0))
        about = {
            "pid": os.getpid(),
            "base": self.config.model.path,
            "base_fingerprint": self.base.fingerprint,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.base.device),
            "slots": self.config.slots,
            "max_rank": self.base.spec.max_rank,
            "target_modules": list(self.config.lora.target_modules),
            "modules": {path: list(shape) for path, shape in self.base.spec.shapes.items()},
        }
        self.disk.publish_json(self.outputs.trainer_json, about)
        return claim

    # --- passes -------------------------------------------------------------------------------------------------------

    def run(self, stop: Event) -> None:
        """Passes until `stop` is set, or, with exit_when_done, until every run has ended."""
        while not stop.is_set():
            if not self.one_pass():
                if self.config.exit_when_done and self.done():
                    return
                time.sleep(self.config.poll_interval_seconds)

    def one_pass(self) -> bool:
        """One turn; whether anything was done."""
        self.passes += 1
        seats = {run: Seat(t.learner.slot, t.status.orch_digest, t.status.arrival) for run, t in self.tenants.items()}
        world = self._without_unwritten(observe(self.outputs, seats))
        self._warn_of_bad_names()
        acted = [self._act(action, world) for action in reconcile(world, seats, self.config.slots)]
        worked = [self._turn(tenant) for tenant in list(self.tenants.values())]
        return any(acted) or any(worked)

    def done(self) -> bool:
        """Whether some run ended here and none is active or waiting."""
        world = self._without_unwritten(observe(self.outputs, {}))
        waiting = [seen for seen in world.runs.values() if seen.orch_digest and not seen.settled]
        return bool(self.ended) and not self.tenants and not waiting

    def _turn(self, tenant: Tenant) -> bool:
        """One micro-batch of one run."""

        def turn() -> bool:
            worked = not tenant.finished and tenant.advance()
            if tenant.learner.state.skipped_in_a_row >= tenant.config.max_skipped_steps:
                count = tenant.learner.state.skipped_in_a_row
                self._end(tenant, "evicted", f"{count} steps in a row had a gradient that was not finite")
            elif tenant.finished:
                self._end(tenant, "finished", None)
            return worked

        return self._guarded(tenant, turn)

    def _guarded(self, tenant: Tenant, work: Callable[[], bool]) -> bool:
        """Run `work`; an error of the run's own, or of its files, ends the run and nothing else."""
        try:
            return work()
        except (GraftworkError, OSError) as error:
            self._end(tenant, "failed", str(error))
            return True

    # --- actions ------------------------------------------------------------------------------------------------------

    def _act(self, action: Admit | Enqueue | Fail | Release, world: World) -> bool:
        """Carry out one action; whether it changed anything."""
        match action:
            case Release(run, why):
                self._release(run, why)
            case Enqueue(run, arrival, reason):
                return self._note(world.runs[run], arrival, "queued", reason)
            case Fail(run, arrival, reason):
                self.ended.add(run)
                log.error("run %s: failed: %s", run, reason)
                return self._note(world.runs[run], arrival, "failed", reason)
            case Admit(run, arrival, slot, start):
                self._admit(world.runs[run], arrival, slot, start)
        return True

    def _release(self, run: RunId, why: str) -> None:
        tenant = self.tenants.pop(run)
        tenant.learner.release()
        log.info("run %s: %s at step %d, slot %d is free", run, why, tenant.step, tenant.learner.slot)

    def _note(self, seen: SeenRun, arrival: int, state: State, reason: str) -> bool:
        """Write the status of a run that holds no slot, if it says something new."""
        assert seen.orch_digest is not None
        old = seen.status
        admitted = old is not None and old.orch_digest == seen.orch_digest and old.admitted
        status = Status(str(seen.tree.id), state, seen.orch_digest, arrival, admitted=admitted, reason=reason)
        if status == old:
            return False
        try:
            write_status(self.disk, seen.tree, status)
        except OSError as error:
            self._unwritten[seen.tree.id] = seen.orch_digest
            log.error("run %s: cannot write its status: %s", seen.tree.id, error)
        return True

    def _without_unwritten(self, world: World) -> World:
        """The world less the runs whose end could not be recorded: else each pass would admit and fail them again."""
        return World(
            {run: seen for run, seen in world.runs.items() if self._unwritten.get(run, "") != seen.orch_digest}
        )

    def _admit(self, seen: SeenRun, arrival: int, slot: int, start: Start) -> None:
        """Give the run a slot and publish the version that it starts from, before any rollout."""
        assert seen.config is not None and seen.orch_digest is not None
        run = seen.tree.id
        try:
            checkpoint, snapshot = self._starting_point(seen, start)
            learner = Learner(self.banks, slot, self._learner_config(seen.config), snapshot)
        except (GraftworkError, OSError) as error:
            self.ended.add(run)
            log.error("run %s: failed: %s", run, error)
            self._note(seen, arrival, "failed", str(error))
            return
        status = Status(str(run), "active", seen.orch_digest, arrival, admitted=True, slot=slot)
        max_tokens = min(self.config.tokens_per_micro_batch, self.base.max_positions)
        tenant = Tenant(self.disk, seen.tree, seen.config, status, learner, max_tokens)
        self.tenants[run] = tenant
        go_back = isinstance(start, FromCheckpoint) and start.step is not None
        log.info("run %s: slot %d, from step %d (%s)", run, slot, learner.state.step, learner.state.start)
        self._guarded(tenant, lambda: tenant.open(checkpoint, go_back=go_back))

    def _end(self, tenant: Tenant, state: State, reason: str | None) -> None:
        """Give the slot back and say why. A run whose folder cannot be written any more is still released."""
        assert state in TERMINAL
        run = tenant.tree.id
        try:
            if tenant.tree.root.is_dir():
                tenant.say(state, reason=reason)
        except OSError as error:
            self._unwritten[run] = tenant.status.orch_digest
            log.error("run %s: cannot write its status: %s", run, error)
        tenant.learner.release()
        del self.tenants[run]
        self.ended.add(run)
        log.log(logging.INFO if reason is None else logging.ERROR, "run %s: %s at step %d%s", run, state, tenant.step,
                "" if reason is None else f": {reason}")  # fmt: skip

    def _starting_point(self, seen: SeenRun, start: Start) -> tuple[Checkpoint, Snapshot]:
        """The verified checkpoint that the run starts from; a run that has none gets its step_0 made first."""
        tree, config = seen.tree, seen.config
        assert config is not None
        step = start.step if isinstance(start, FromCheckpoint) else 0
        facts = AdapterFacts(config.model.path, self.base.fingerprint)
        said: list[str] = []
        if not isinstance(start, FromCheckpoint):
            made = make_step_0(self.disk, tree.checkpoints, self.base, self.door, config.adapter, config.seed, facts)
            said = lines_of(made.report)
        elif not config.resume:
            said = bring_step_0(self.disk, tree.checkpoints, self.base, config.adapter, config.seed, facts)
        for line in said:
            log.info("run %s: step_0: %s", tree.id, line)
        needs_reference = config.loss.kl_coefficient > 0
        checkpoint, snapshot = open_start(
            tree.checkpoints, step, self.base, config.adapter, needs_reference=needs_reference
        )
        if seen.status is not None and seen.status.state == "evicted":  # asked to try again: it gets all its tries
            snapshot = replace(snapshot, state=replace(snapshot.state, skipped_in_a_row=0))
        return checkpoint, snapshot

    def _learner_config(self, config: RunConfig) -> LearnerConfig:
        return LearnerConfig(
            optimizer=config.optimizer,
            loss=config.loss,
            temperature=config.sampling.temperature,
            tokens_per_micro_batch=self.config.tokens_per_micro_batch,
            logprob_chunk_tokens=self.config.logprob_chunk_tokens,
        )

    def _warn_of_bad_names(self) -> None:
        for error in self.outputs.scan()[1]:
            if str(error) not in self._warned:
                self._warned.add(str(error))
                log.warning("%s", error)
