"""Which runs there are, and what to do about them.

    Observer.look(disk, Memory) -> World        what the folders say now
    reconcile(World, Memory) -> [Action]        pure: what makes the slots agree with it

Level-triggered: nothing depends on having seen an event, so a restart or a repeated call ends in the same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from graftwork.config.run import RunConfig
from graftwork.store.layout import RunId, RunTree
from graftwork.store.status import TERMINAL, Status


@dataclass(frozen=True)
class SeenRun:
    """One run folder. orch_digest None: orch.toml is absent or unreadable, and `unreadable` says how. config_error:
    readable and wrong. folder_id: of the folder, see RunTree."""

    tree: RunTree
    orch_digest: str | None
    config: RunConfig | None
    config_error: str | None
    checkpoints: tuple[int, ...]
    status: Status | None
    unreadable: str | None = None
    folder_id: tuple[int, int] | None = None

    @property
    def settled(self) -> bool:
        """The run ended under the orch.toml that is there now: nothing to do until that changes."""
        status = self.status
        return status is not None and status.state in TERMINAL and status.is_of(self.tree.id, self.orch_digest)


@dataclass(frozen=True)
class World:
    runs: Mapping[RunId, SeenRun]


@dataclass(frozen=True)
class Seat:
    """A run that holds a slot, the folder and the orch.toml that it was admitted under. doubted: that file could not be
    read in the last pass."""

    slot: int
    orch_digest: str
    arrival: int
    doubted: bool = False
    folder_id: tuple[int, int] | None = None


@dataclass(frozen=True)
class Memory:
    """What the trainer knows and no folder says.

    unwritten: runs whose last status could not be written, with the orch.toml that it was about; they are left alone
    until that changes, else each pass would admit and fail them again.
    """

    slots: int
    seats: Mapping[RunId, Seat] = field(default_factory=dict)
    unwritten: Mapping[RunId, str] = field(default_factory=dict)

    @property
    def free_slots(self) -> list[int]:
        taken = {seat.slot for seat in self.seats.values()}
        return [slot for slot in range(self.slots) if slot not in taken]


@dataclass(frozen=True)
class FromCheckpoint:
    """Go on from (or begin at) a checkpoint; step None: the newest. A named step is gone back to: what came after it is
    set aside."""

    step: int | None


@dataclass(frozen=True)
class FromTrainer:
    """Begin at the trainer's own init adapter if it has one, else fresh."""


Start = FromCheckpoint | FromTrainer


@dataclass(frozen=True)
class Enqueue:
    """Let a run wait: `queued`, with the reason. place: in the line of those that only lack a slot, from 1."""

    run: RunId
    arrival: int
    reason: str
    place: int | None = None


@dataclass(frozen=True)
class Admit:
    run: RunId
    arrival: int
    slot: int
    start: Start


@dataclass(frozen=True)
class End:
    """Say that a run without a slot has ended: `failed` with the reason, or `stopped`, as its orch.toml asks."""

    run: RunId
    arrival: int
    state: Literal["failed", "stopped"]
    reason: str | None


@dataclass(frozen=True)
class Release:
    """Take a slot back.

    removed       the folder is gone, or another stands in its place
    reconfigured  its orch.toml changed; the run comes up anew
    stopped       its orch.toml asks for it: checkpoint first
    unreadable    its orch.toml cannot be read, twice in a row: `evicted`, checkpoint first
    absent        it has none any more, twice in a row: `evicted`; no checkpoint, somebody may be deleting the folder
    """

    run: RunId
    why: Literal["removed", "reconfigured", "stopped", "unreadable", "absent"]


Action = Enqueue | Admit | End | Release
ABSENT = "is absent"
NO_SLOT = "no slot is free"


def reconcile(world: World, memory: Memory) -> list[Action]:
    """What to do now. Releases come first; a slot that they free is given away in the next pass."""
    actions: list[Action] = [
        Release(run, why) for run, seat in memory.seats.items() if (why := _why_release(world.runs.get(run), seat))
    ]
    waiting = [seen for run, seen in world.runs.items() if run not in memory.seats and _wants_something(seen, memory)]
    free, line = memory.free_slots, 0
    for arrival, seen in _in_order(waiting, world, memory):
        action = _admit_or_wait(seen, arrival, free)
        if isinstance(action, Enqueue) and action.reason == NO_SLOT:
            line += 1
            action = Enqueue(action.run, arrival, NO_SLOT, line)
        actions.append(action)
    return actions


def _why_release(
    seen: SeenRun | None, seat: Seat
) -> Literal["removed", "reconfigured", "stopped", "unreadable", "absent"] | None:
    if seen is None or seen.folder_id != seat.folder_id:
        return "removed"
    if seen.orch_digest is None:
        if not seat.doubted:
            return None  # an editor may be saving it
        return "absent" if seen.unreadable == ABSENT else "unreadable"
    if seen.orch_digest == seat.orch_digest:
        return None
    return "stopped" if seen.config is not None and seen.config.stop else "reconfigured"


def _wants_something(seen: SeenRun, memory: Memory) -> bool:
    if seen.orch_digest is None or seen.settled:
        return False
    return memory.unwritten.get(seen.tree.id) != seen.orch_digest


def waits(world: World, memory: Memory) -> bool:
    """Whether some run holds a slot or wants one."""
    return bool(memory.seats) or any(_wants_something(seen, memory) for seen in world.runs.values())


def _in_order(waiting: Sequence[SeenRun], world: World, memory: Memory) -> list[tuple[int, SeenRun]]:
    """Waiting runs with their places in the order of arrival. Newcomers come after everyone who was ever seen; runs
    that held a slot when the trainer was restarted come before everyone who did not."""
    arrivals = [seen.status.arrival for seen in world.runs.values() if seen.status]
    last = max(arrivals + [seat.arrival for seat in memory.seats.values()], default=0)
    placed: list[tuple[int, SeenRun]] = []
    for seen in sorted(waiting, key=lambda seen: seen.tree.id):
        if seen.status is not None and seen.status.is_of(seen.tree.id, seen.orch_digest):
            placed.append((seen.status.arrival, seen))
        else:
            last += 1
            placed.append((last, seen))
    return sorted(placed, key=lambda pair: (not was_admitted(pair[1]), pair[0], pair[1].tree.id))


def _admit_or_wait(seen: SeenRun, arrival: int, free: list[int]) -> Action:
    """What to do with one run without a slot; takes a slot out of `free` when it admits."""
    run = seen.tree.id
    if seen.config is not None and seen.config.stop:
        return End(run, arrival, "stopped", None)
    start = choose_start(seen)
    if isinstance(start, str):
        return End(run, arrival, "failed", start)
    if start is None:
        return Enqueue(run, arrival, "waiting for its step_0, which its orchestrator makes from init_adapter_path")
    if not free:
        return Enqueue(run, arrival, NO_SLOT)
    return Admit(run, arrival, free.pop(0), start)


def choose_start(seen: SeenRun) -> Start | str | None:
    """Which weights a run starts from; None: not yet; text: the reason why it cannot start.

    First match wins: its checkpoint, when the trainer was restarted under it or it asked to resume > its step_0 > the
    trainer's init adapter > fresh. A run that asked to resume and cannot never starts over.
    """
    config, newest = seen.config, max(seen.checkpoints, default=None)
    if config is None:
        return seen.config_error or "its orch.toml cannot be read"
    if was_admitted(seen):
        if newest is None:
            return f"it held a slot, and {seen.tree.checkpoints} holds no checkpoint any more; nothing was started"
        return FromCheckpoint(None)
    if config.resume:
        if newest is None:
            return f"it asked to resume, and {seen.tree.checkpoints} holds no checkpoint; nothing was started"
        return FromCheckpoint(config.resume_step)
    if newest is not None and newest > 0:
        return f"it has checkpoints up to step {newest} and did not ask to resume; set resume = true, or use another id"
    if newest is not None:
        return FromCheckpoint(None)
    if config.init_adapter_path is not None:
        return None
    return FromTrainer()


def was_admitted(seen: SeenRun) -> bool:
    """Whether this very run held a slot under this very orch.toml. A copied folder carries another id and must ask."""
    status = seen.status
    return status is not None and status.admitted and status.is_of(seen.tree.id, seen.orch_digest)
