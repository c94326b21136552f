"""Rank 0's way to all ranks: what it decides about a run goes out as an order, here and nowhere else.

A process alone is a crew of one: the same calls, and nothing is communicated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.snapshot import Snapshot
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import RunConfig
from graftwork.errors import GraftworkError, RankLost, StoreError
from graftwork.store.checkpoint import Checkpoint, publish_checkpoint, stage_checkpoint
from graftwork.store.status import as_reason
from graftwork.training.learner import Learner, LearnerConfig, Report
from graftwork.training.optim import StepOutcome
from graftwork.training.orders import (
    BeginAgain,
    Feed,
    Idle,
    Learn,
    Order,
    Probe,
    Quit,
    Read,
    Reduce,
    Save,
    Say,
    Seat,
    Step,
    Vacate,
    describe,
    encode_examples,
)
from graftwork.training.packer import Example
from graftwork.training.probe import Distribution, Probes
from graftwork.training.worker import Worker

T = TypeVar("T")


class Crew:
    """Learners are rank 0's own; each stands for those of all ranks.

    Raises RankLost, from every method, when the ranks cannot go on together: then the job ends and is started again.
    """

    def __init__(self, worker: Worker, idle_seconds: float) -> None:
        """idle_seconds: the longest silence towards ranks that wait for an order."""
        self.worker, self.ranks, self.idle_seconds = worker, worker.base.ranks, idle_seconds
        self.spoken = time.monotonic()

    def seat(
        self, slot: int, checkpoint: Checkpoint, snapshot: Snapshot, config: RunConfig, learner: LearnerConfig
    ) -> Learner:
        """Put a run into a slot on all ranks. Raises GraftworkError when one of them cannot read what it starts
        from."""
        order = Seat(
            slot=slot, checkpoints=str(checkpoint.path.parent), step=checkpoint.step, wish=config.adapter,
            seed=config.seed, learner=learner, digest=snapshot.adapter.digest(),
        )  # fmt: skip
        if (failure := self._order(order, lambda: self.worker.seat(order, snapshot))) is not None:
            raise GraftworkError(failure)
        return self.worker.learners[slot]

    def feed(self, one: Learner, examples: Sequence[Example]) -> None:
        """Begin a step."""
        payload = encode_examples(examples) if self.ranks.size > 1 else b""
        self._order(Feed(slot=one.slot), lambda: one.feed(examples), payload)

    def begin_again(self, one: Learner) -> None:
        self._do(BeginAgain(slot=one.slot))

    def learn(self, learners: Sequence[Learner]) -> None:
        """The next rounds of these runs, together."""
        order = Learn(slots=tuple(one.slot for one in learners))
        self._order(order, lambda: self.worker.learn(order))

    def reports(self, one: Learner) -> list[Report]:
        """All rounds are learnt: the gradient is summed, and every rank says what it found."""
        order = Reduce(slot=one.slot)
        return self._order(order, lambda: self.worker.reduce(order))

    def step(self, one: Learner, batch_digest: str, norm: float) -> StepOutcome:
        order = Step(slot=one.slot, batch_digest=batch_digest, norm=norm)
        return self._order(order, lambda: self.worker.step(order))

    def adapter(self, one: Learner) -> Adapter:
        """The adapter as it is now."""
        order = Read(slot=one.slot)
        return self._order(order, lambda: self.worker.read(order))

    def probe(self, one: Learner) -> Distribution:
        """What the adapter says now after the probe's prompt."""
        order = Probe(slot=one.slot)
        return self._order(order, lambda: self.worker.probe(order))

    def probes(self) -> Probes | None:
        """For a run that begins, where versions are published with a probe."""
        prober = self.worker.prober
        return None if prober is None else Probes(prober.prompt, prober.bare)

    def save(
        self, one: Learner, checkpoints: Path, orchestrator_state: dict[str, Any] | None, facts: AdapterFacts
    ) -> None:
        """Publish the checkpoint of the step that the run is at: the manifest is written when every rank has said that
        its file is. Raises StoreError, naming the rank, or OSError; then nothing is left of it."""
        step = one.state.step
        staging = stage_checkpoint(self.worker.disk, checkpoints, step)
        order = Save(slot=one.slot, folder=str(staging.root))
        failure = self._order(order, lambda: self.worker.save(order, staging, (orchestrator_state, facts)))
        if failure is not None:
            staging.discard()
            raise StoreError(f"checkpoint {step}: {failure}")
        publish_checkpoint(staging, checkpoints, step)

    def vacate(self, slot: int) -> None:
        self._do(Vacate(slot=slot))

    def say(self, level: int, text: str) -> None:
        self._do(Say(level=level, text=text))

    def idle(self) -> None:
        """Called while there is nothing to do."""
        if self.ranks.size > 1 and time.monotonic() - self.spoken > self.idle_seconds:
            self._do(Idle())

    def quit(self) -> None:
        self._do(Quit())

    def _do(self, order: Order) -> None:
        self._order(order, lambda: self.worker.carry_out(order, b""))

    def _order(self, order: Order, own_part: Callable[[], T], payload: bytes = b"") -> T:
        """Tell the others, and do one's own part. Everything that all ranks share goes through here."""
        if self.ranks.size == 1:
            return own_part()
        self.spoken = time.monotonic()
        try:
            with self.ranks.at(describe(order)):
                self.ranks.tell(order.model_dump(mode="json"), payload)
                return own_part()
        except Exception as error:
            raise RankLost(
                f"the ranks could not {describe(order)} together ({type(error).__name__}: {as_reason(error)}); the job "
                "ends, and a restart goes on from the newest checkpoints"
            ) from error
