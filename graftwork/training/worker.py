"""What one rank has of the runs, and how it carries out an order. The same on every rank, rank 0 included.

What can go wrong on one rank alone is tried first, without a word to the others; then every rank says how it went, and
only if all went well is it done. So no rank waits inside a `try` for another that has left it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.snapshot import Snapshot, tensor_name, write_shared, write_tensors
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.config.run import AdapterConfig
from graftwork.config.schema import TrainerConfig
from graftwork.errors import GraftworkError, RankLost
from graftwork.model.base import BaseModel
from graftwork.parallel.ranks import Ranks
from graftwork.store.disk import Disk, Staging
from graftwork.store.files import FileFacts
from graftwork.store.status import as_reason
from graftwork.training.learner import Banks, Learner, Report, learn
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
    decode_examples,
    describe,
    order_from,
)
from graftwork.training.probe import Distribution, Prober
from graftwork.training.start import open_start, prepare_for

log = logging.getLogger(__name__)
T = TypeVar("T")


def unforeseen(error: Exception) -> str:
    """The reason of a run that a bug ended."""
    return as_reason(f"an error that nobody foresaw: {type(error).__name__}: {error}; the trainer's log has more")


def attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the work gives, or why it gives nothing. It communicates with nobody."""
    try:
        return work(), None
    except (GraftworkError, OSError) as error:
        return None, as_reason(error)
    except Exception as error:
        log.exception("a bug, or a lack of memory")
        return None, unforeseen(error)


def first_failure(texts: list[str | None]) -> str | None:
    """`rank 1: No space left on device` of the lowest rank that failed; None when none did."""
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if not failed:
        return None
    rank, text = failed[0]
    return text if len(texts) == 1 else f"rank {rank}: {text}"


@dataclass
class Worker:
    """`learners`: by slot. All ranks take part in making one. probes: whether versions are published with one."""

    base: BaseModel
    banks: Banks
    disk: Disk
    probes: bool = True
    learners: dict[int, Learner] = field(default_factory=dict)
    prober: Prober | None = field(init=False)

    def __post_init__(self) -> None:
        self.prober = Prober(self.base, self.banks.training) if self.probes else None

    @property
    def ranks(self) -> Ranks:
        return self.base.ranks

    def follow(self) -> None:
        """Every rank but the first: do what rank 0 says until it says that there is no more to do."""
        try:
            while not isinstance(self._next(), Quit):
                pass
        except RuntimeError as error:
            raise RankLost(f"no order can be heard or carried out any more ({as_reason(error)})") from error

    def _next(self) -> Order:
        """Hear an order, and carry it out."""
        value, payload = self.ranks.hear()
        order = order_from(value)
        with self.ranks.at(describe(order)):
            self.carry_out(order, payload)
        return order

    def carry_out(self, order: Order, payload: bytes) -> None:
        """An order that rank 0 gave. What comes of it is rank 0's to use."""
        match order:
            case Seat():
                self.seat(order, None)
            case Feed(slot=slot):
                self.learners[slot].feed(decode_examples(payload))
            case BeginAgain(slot=slot):
                self.learners[slot].begin_again()
            case Learn():
                self.learn(order)
            case Reduce():
                self.reduce(order)
            case Step():
                self.step(order)
            case Read():
                self.read(order)
            case Probe():
                self.probe(order)
            case Save():
                self.save(order, Staging(self.disk, Path(order.folder)), None)
            case Vacate():
                self.vacate(order)
            case Say():
                log.log(order.level, "%s", order.text)
            case Idle() | Quit():
                pass

    # --- one an order -------------------------------------------------------------------------------------------------

    def seat(self, order: Seat, snapshot: Snapshot | None) -> str | None:
        """Put a run into its slot on all ranks, or on none: then the reason. Rank 0 has the snapshot already."""
        found, text = (snapshot, None) if snapshot is not None else attempt(lambda: self._open(order))
        failure = first_failure(self.ranks.gather(text))
        if failure is None:
            assert found is not None
            self.learners[order.slot] = Learner(self.banks, order.slot, order.learner, found)
        return failure

    def _open(self, order: Seat) -> Snapshot:
        """The checkpoint that rank 0 means. Raises CannotResume, AdapterError."""
        _, snapshot = open_start(
            Path(order.checkpoints), order.step, self.base, order.wish, order.seed,
            needs_reference=order.learner.needs_reference,
        )  # fmt: skip
        if (found := snapshot.adapter.digest()) != order.digest:
            raise GraftworkError(
                f"{order.checkpoints}/step_{order.step} holds adapter {found[:8]} here, {order.digest[:8]} at rank 0; "
                "the ranks do not see the same file system"
            )
        return snapshot

    def learn(self, order: Learn) -> None:
        """What is raised where one rank's layers wait for another's ends the job; else it is a matter of these runs."""
        learners = [self.learners[slot] for slot in order.slots]
        try:
            learn(learners)
        except Exception as error:
            if self.ranks.size == 1 or self.base.sharded:
                raise
            log.exception("a bug, or a lack of memory, in slots %s", list(order.slots))
            for one in learners:
                one.fault, one.rounds[-1:] = unforeseen(error), []

    def reduce(self, order: Reduce) -> list[Report]:
        """Every rank's report."""
        return [Report.from_json(said) for said in self.ranks.gather(self.learners[order.slot].report().to_json())]

    def step(self, order: Step) -> StepOutcome:
        return self.learners[order.slot].step(order.batch_digest, order.norm)

    def read(self, order: Read) -> Adapter:
        return self.learners[order.slot].adapter()

    def probe(self, order: Probe) -> Distribution:
        assert self.prober is not None, "nobody orders what was not wanted"
        return self.prober.of_slot(order.slot)

    def save(
        self, order: Save, staging: Staging, shared: tuple[dict[str, Any] | None, AdapterFacts] | None
    ) -> str | None:
        """Fill a checkpoint's folder, each rank with its part; why that failed, if it did.

        shared: rank 0's: the orchestrator's state and the facts, for the files that are not cut.
        """
        one = self.learners[order.slot]
        adapter = one.adapter()
        own = {tensor_name(kind, path, side): part.cpu() for kind, path, side, part in one.own_tensors()}

        def write() -> dict[str, Any]:
            name = write_tensors(staging, self.ranks.rank, own)
            if shared is not None:
                state, facts = shared
                snapshot = Snapshot(one.state, adapter, None, one.reference, state, one.companions)
                write_shared(staging, snapshot, facts)
            else:
                self.disk.sync_folder((staging.root / name).parent)
            held = staging.written[staging.root / name]
            return {"name": name, "bytes": held.bytes, "sha256": held.sha256}

        file, text = attempt(write)
        said = self.ranks.gather({"file": file, "failure": text})
        for file in (other["file"] for other in said[1:]):
            if file is not None:
                staging.take(file["name"], FileFacts(file["bytes"], file["sha256"]))
        return first_failure([each["failure"] for each in said])

    def vacate(self, order: Vacate) -> None:
        self.learners.pop(order.slot, None)
        self.banks.reset(order.slot)


def door_at(path: str | None) -> InMemory | None:
    """The trainer's own init adapter, read once. Raises AdapterError."""
    return None if path is None else read_peft(Path(path))


def worker_of(config: TrainerConfig, base: BaseModel, disk: Disk, door: InMemory | None) -> Worker:
    """What every rank has when it begins: the slots, and the trainer's own init adapter in slot 0. All ranks take part.
    Raises MisfitAdapter when that adapter does not fit."""
    banks = Banks.of(base, config.slots)
    if door is not None:
        banks.training.write(0, prepare_for(base, door, AdapterConfig(), 0))
    return Worker(base, banks, disk, probes=config.publish_probes is not False)
