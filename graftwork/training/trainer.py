"""The trainer: one frozen base, S slots, and passes over whatever runs the folder tree shows.

    pass = observe, reconcile, act; then every run that has work learns its share of tokens (training/fairness.py)

With several ranks this is rank 0; the others follow (training/crew.py, worker.py).

What goes wrong in a run's turn ends that run, with the reason in its status.json. What goes wrong in the trainer's own
set-up ends the trainer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TypeVar

from graftwork.adapters.source import InMemory
from graftwork.config.run import RunConfig
from graftwork.config.schema import TrainerConfig
from graftwork.errors import GraftworkError
from graftwork.model.base import BaseModel
from graftwork.parallel.ranks import job_pid
from graftwork.store.disk import Claim, Disk
from graftwork.store.layout import OutputTree, RunId
from graftwork.store.status import TERMINAL, State, Status, as_reason, write_status
from graftwork.training.crew import Crew
from graftwork.training.fairness import DeficitRoundRobin, fits
from graftwork.training.learner import Banks, LearnerConfig
from graftwork.training.liveness import Liveness
from graftwork.training.observe import Observer
from graftwork.training.runs import (
    Action,
    Admit,
    End,
    Enqueue,
    FromCheckpoint,
    Memory,
    Release,
    SeenRun,
    Start,
    World,
    reconcile,
    waits,
)
from graftwork.training.start import starting_point
from graftwork.training.tenant import Clock, Tenant, refuse_links
from graftwork.training.worker import unforeseen, worker_of

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Trainer:
    """`passes` counts turns. `some_ended`: a run reached a terminal state under this trainer."""

    config: TrainerConfig
    base: BaseModel
    disk: Disk
    door: InMemory | None
    clock: Clock = time.monotonic
    tenants: dict[RunId, Tenant] = field(default_factory=dict)
    some_ended: bool = False
    passes: int = 0
    unwritten: dict[RunId, str] = field(default_factory=dict)
    """Runs whose last status could not be written, with their orch.toml's digest."""
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.outputs = OutputTree(Path(self.config.output_dir).absolute())
        self.crew = Crew(worker_of(self.config, self.base, self.disk, self.door), self.config.rank_timeout_seconds / 3)
        self.observer = Observer(self.outputs)
        self.shares = DeficitRoundRobin(self.config.tokens_per_micro_batch * self.base.ranks.size)
        self.liveness = Liveness(self.disk, self.outputs)

    @property
    def banks(self) -> Banks:
        return self.crew.worker.banks

    # --- set-up -------------------------------------------------------------------------------------------------------

    def open(self) -> Claim:
        """Claim the output tree, and say who we are in trainer.json. Raises Busy when another trainer holds the
        tree."""
        claim = self.disk.claim(self.outputs.trainer_lock, "a trainer")
        about = {
            "pid": job_pid(),
            "ranks": self.base.ranks.size,
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
                    break
                self.crew.idle()
                time.sleep(self.config.poll_interval_seconds)
        self.liveness.end(self.passes)

    def one_pass(self) -> bool:
        """One turn; whether anything was done."""
        self.passes += 1
        memory = self._memory()
        world = self.observer.look(memory.seats)
        self.unwritten = {run: digest for run, digest in self.unwritten.items() if run in world.runs}
        self._warn_of_bad_names()
        acted = [self._act(action, world) for action in reconcile(world, memory)]
        for run, tenant in self.tenants.items():
            tenant.doubted = run in memory.seats and world.runs[run].orch_digest is None
        ended = [self._guarded(tenant, lambda tenant=tenant: self._settle(tenant)) for tenant in self._seated()]  # type: ignore[misc]
        worked = self._work()
        self.liveness.publish(self.passes, self.tenants)
        return any(acted) or any(ended) or worked

    def done(self) -> bool:
        """Whether some run ended here and none is active or waiting."""
        memory = self._memory()
        return self.some_ended and not waits(self.observer.look(memory.seats), memory)

    def _memory(self) -> Memory:
        seats = {run: tenant.seat for run, tenant in self.tenants.items()}
        return Memory(self.config.slots, seats, self.unwritten)

    def _seated(self) -> list[Tenant]:
        return list(self.tenants.values())

    # --- work ---------------------------------------------------------------------------------------------------------

    def _work(self) -> bool:
        """Every run that has work learns what it is granted; whether there was any."""
        with_work = [tenant for tenant in self._seated() if self._head(tenant)]
        self.shares.grant(tenant.tree.id for tenant in with_work)
        together = [tenant for tenant in with_work if tenant.may_share]
        for lane in [*([tenant] for tenant in with_work if not tenant.may_share), together]:
            while chosen := self._next_of(lane):
                self._learn(chosen)
        return bool(with_work)

    def _head(self, tenant: Tenant) -> tuple[int, ...]:
        """Tokens of the run's next round, by rank; none when it has no round, or no slot any more."""
        if tenant.tree.id not in self.tenants:
            return ()
        head = self._guarded(tenant, tenant.head)
        return () if head is None else head.tokens

    def _next_of(self, lane: Sequence[Tenant]) -> list[Tenant]:
        """The runs whose next rounds are learnt together: as many as can afford it, up to each rank's token budget."""
        chosen: list[Tenant] = []
        room = [self.config.tokens_per_micro_batch] * self.base.ranks.size
        for tenant in lane:
            tokens = self._head(tenant)
            if not tokens:
                self.shares.forget(tenant.tree.id)
            elif fits(tokens, room) and self.shares.affords(tenant.tree.id, sum(tokens)):
                if not tenant.may_share:
                    return chosen or [tenant]
                chosen.append(tenant)
                room = [left - taken for left, taken in zip(room, tokens, strict=True)]
        return chosen

    def _learn(self, together: Sequence[Tenant]) -> None:
        """One joint round; a run alone is the usual case. One that fails is not charged to anyone: its runs learn their
        batches again, alone."""
        learners = [tenant.learner for tenant in together]
        tokens = [sum(one.rounds[-1].tokens) for one in learners]
        began = self.clock()
        if len(together) == 1:
            self._guarded(together[0], lambda: self.crew.learn(learners))
        else:
            try:
                self.crew.learn(learners)
            except Exception:
                log.exception(
                    "a micro-batch of %s failed; each learns alone", ", ".join(str(t.tree.id) for t in together)
                )
                for tenant in together:
                    tenant.begin_again()
                return
        seconds = self.clock() - began
        for tenant, learnt in zip(together, tokens, strict=True):
            if tenant.tree.id in self.tenants:
                self._count(tenant, learnt, seconds)

    def _count(self, tenant: Tenant, tokens: int, seconds: float) -> None:
        """A run's round is learnt."""

        def count() -> None:
            tenant.learned(tokens, seconds)
            self._settle(tenant)

        self.shares.spend(tenant.tree.id, tokens)
        self.liveness.note_learnt(tenant.tree.id, tokens)
        self._guarded(tenant, count)

    def _settle(self, tenant: Tenant) -> bool:
        """End a run that is through, or that has used up its tries or its time; whether it was ended."""
        config, skipped = tenant.config, tenant.learner.state.skipped_in_a_row
        if skipped >= config.max_skipped_steps:
            reason = f"{skipped} steps in a row had a gradient that was not finite"
            self._end(tenant, "evicted", reason, checkpoint=True)
        elif config.max_mismatch is not None and not tenant.mismatch <= config.max_mismatch:
            reason = (
                f"trainer and sampler differ by {tenant.mismatch:.3g} in the log-prob of a token, on average; "
                f"max_mismatch is {config.max_mismatch:g}"
            )
            self._end(tenant, "evicted", reason, checkpoint=True)
        elif tenant.finished:
            self._end(tenant, "finished", None)
        elif tenant.seconds_without_batch > config.max_batch_wait_seconds and tenant.head() is None:
            reason = (
                f"no batch {tenant.step + 1} for {config.max_batch_wait_seconds:g} seconds (max_batch_wait_seconds)"
            )
            self._end(tenant, "evicted", reason, checkpoint=True)
        else:
            return False
        return True

    def _guarded(self, tenant: Tenant, work: Callable[[], T]) -> T | None:
        """The bulkhead: run a tenant's work; whatever it raises ends this run and nothing else. None when it did.

        Outside the error tree it is a bug of ours or of a library's, or a lack of memory: logged with its traceback.
        """
        try:
            return work()
        except (GraftworkError, OSError) as error:
            self._end(tenant, "failed", as_reason(error))
        except Exception as error:
            log.exception("run %s: a bug, in its turn", tenant.tree.id)
            self._end(tenant, "failed", unforeseen(error))
        return None

    # --- actions ------------------------------------------------------------------------------------------------------

    def _act(self, action: Action, world: World) -> bool:
        """Carry out one action; whether it changed anything."""
        match action:
            case Release(run, why):
                tenant = self.tenants[run]
                self._guarded(tenant, lambda: self._release(tenant, why, world.runs.get(run)))
            case Enqueue(run, arrival, reason, place):
                return self._note(world.runs[run], arrival, "queued", reason, place)
            case End(run, arrival, state, reason):
                self.some_ended = True
                log.log(logging.ERROR if reason else logging.INFO, "run %s: %s: %s", run, state, reason or "as asked")
                return self._note(world.runs[run], arrival, state, reason)
            case Admit(run, arrival, slot, start):
                self._admit(world.runs[run], arrival, slot, start)
        return True

    def _release(self, tenant: Tenant, why: str, seen: SeenRun | None) -> None:
        """Take the slot back, for a reason that its folder gives."""
        run = tenant.tree.id
        match why:
            case "stopped":
                assert seen is not None and seen.orch_digest is not None
                tenant.take_over(seen.orch_digest)
                self._end(tenant, "stopped", None, checkpoint=True)
            case "unreadable" | "absent":
                assert seen is not None
                reason = f"its {tenant.tree.orch_toml.name} {seen.unreadable}"
                self._end(tenant, "evicted", reason, checkpoint=why == "unreadable")
            case _:
                if why == "removed":
                    self.liveness.note_removed(run, tenant.step)
                self._vacate(tenant)
                log.info("run %s: %s at step %d, slot %d is free", run, why, tenant.step, tenant.learner.slot)

    def _vacate(self, tenant: Tenant) -> None:
        tenant.release()
        self.shares.forget(tenant.tree.id)
        self.tenants.pop(tenant.tree.id, None)

    def _note(self, seen: SeenRun, arrival: int, state: State, reason: str | None, place: int | None = None) -> bool:
        """Write the status of a run that holds no slot, if it says something new."""
        assert seen.orch_digest is not None
        old = seen.status
        admitted = old is not None and old.is_of(seen.tree.id, seen.orch_digest) and old.admitted
        step = None if state == "queued" else max(seen.checkpoints, default=None)
        status = Status(str(seen.tree.id), state, seen.orch_digest, arrival, admitted=admitted, step=step,
                        reason=None if reason is None else as_reason(reason), place=place)  # fmt: skip
        if status == old:
            return False
        try:
            write_status(self.disk, seen.tree, status)
        except (GraftworkError, OSError) as error:
            if state in TERMINAL:
                self._cannot_write(seen.tree.id, seen.orch_digest, error)
            else:  # a place in line is said again in every pass
                self._warn(f"run {seen.tree.id}: cannot write its status: {error}")
            return False
        self.unwritten.pop(seen.tree.id, None)
        return True

    def _cannot_write(self, run: RunId, orch_digest: str, error: Exception) -> None:
        self.unwritten[run] = orch_digest
        log.error("run %s: cannot write its status: %s", run, error)

    def _admit(self, seen: SeenRun, arrival: int, slot: int, start: Start) -> None:
        """Give the run a slot and publish the version that it starts from, before any rollout."""
        assert seen.config is not None and seen.orch_digest is not None
        run = seen.tree.id
        if seen.tree.folder_id() != seen.folder_id:
            return  # it went away since we looked, and must not come back because we write into it
        try:
            refuse_links(seen.tree)
            checkpoint, snapshot = starting_point(self.disk, self.base, self.door, seen, start)
            learner = self.crew.seat(slot, checkpoint, snapshot, seen.config, self._learner_config(seen.config))
            status = Status(str(run), "active", seen.orch_digest, arrival, admitted=True, slot=slot)
            max_tokens = min(self.config.tokens_per_micro_batch, self.base.max_positions)
            tenant = Tenant(self.disk, seen.tree, seen.config, status, self.crew, learner, max_tokens, self.clock)
        except (GraftworkError, OSError) as error:
            self._refuse(seen, arrival, slot, as_reason(error))
            return
        except Exception as error:
            log.exception("run %s: a bug, in its admission", run)
            self._refuse(seen, arrival, slot, unforeseen(error))
            return
        self.tenants[run] = tenant
        go_back = isinstance(start, FromCheckpoint) and start.step is not None
        said = f"run {run}: slot {slot}, from step {learner.state.step} ({learner.state.start})"
        self.crew.say(logging.INFO, said)
        self._guarded(tenant, lambda: tenant.open(checkpoint, go_back=go_back))

    def _refuse(self, seen: SeenRun, arrival: int, slot: int, reason: str) -> None:
        self.crew.vacate(slot)
        self.some_ended = True
        self.crew.say(logging.ERROR, f"run {seen.tree.id}: failed: {reason}")
        self._note(seen, arrival, "failed", reason)

    def _end(self, tenant: Tenant, state: State, reason: str | None, *, checkpoint: bool = False) -> None:
        """Give the slot back and say why. A run whose folder cannot be written any more is still released."""
        assert state in TERMINAL
        run = tenant.tree.id
        if checkpoint:
            try:
                tenant.checkpoint()
            except (GraftworkError, OSError) as error:
                state, reason = "failed", f"{reason or state}; its checkpoint could not be written: {error}"
        try:
            if tenant.is_there and tenant.tree.orch_toml.parent.is_dir():
                tenant.say(state, reason=reason)
                self.unwritten.pop(run, None)
        except (GraftworkError, OSError) as error:
            self._cannot_write(run, tenant.status.orch_digest, error)
        if not tenant.is_there:
            self.liveness.note_removed(run, tenant.step)
        self._vacate(tenant)
        self.some_ended = True
        why = "" if reason is None else f": {reason}"
        self.crew.say(
            logging.INFO if reason is None else logging.ERROR, f"run {run}: {state} at step {tenant.step}{why}"
        )

    def _learner_config(self, config: RunConfig) -> LearnerConfig:
        return LearnerConfig(
            optimizer=config.optimizer,
            loss=config.loss,
            temperature=config.sampling.temperature,
            tokens_per_micro_batch=self.config.tokens_per_micro_batch,
            logprob_chunk_tokens=self.config.logprob_chunk_tokens,
            share_prompts=self.config.share_prompts,
        )

    def _warn_of_bad_names(self) -> None:
        for error in self.outputs.scan()[1]:
            self._warn(str(error))

    def _warn(self, text: str) -> None:
        """Once: what is wrong is wrong in every pass."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)
