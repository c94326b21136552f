"""Which runs there are, and what to do about them.

    observe(disk) -> World            what the folders say now
    reconcile(World, Seats) -> [Action]    pure: what makes the slots agree with it

Level-triggered: nothing depends on having seen an event, so a restart or a repeated call ends in the same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.config.load import build, digest, parse_toml
from graftwork.config.schema import RunConfig
from graftwork.errors import ConfigError, Damaged
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL, Status, read_status

ORCH_TOML_BYTES_MAX = 2**20  # what is larger is no configuration: wait, as for an unreadable one


@dataclass(frozen=True)
class SeenRun:
    """One run folder. orch_digest None: orch.toml is absent or unreadable, wait. config_error: readable and wrong."""

    tree: RunTree
    orch_digest: str | None
    config: RunConfig | None
    config_error: str | None
    checkpoints: tuple[int, ...]
    status: Status | None

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
    """A run that holds a slot, and the orch.toml that it was admitted under."""

    slot: int
    orch_digest: str
    arrival: int


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
    """Let a run wait: `queued`, with the reason."""

    run: RunId
    arrival: int
    reason: str


@dataclass(frozen=True)
class Admit:
    run: RunId
    arrival: int
    slot: int
    start: Start


@dataclass(frozen=True)
class Fail:
    """End a run that holds no slot."""

    run: RunId
    arrival: int
    reason: str


@dataclass(frozen=True)
class Release:
    """Take a slot back. why "removed": the folder is gone. "reconfigured": its orch.toml changed; it comes up anew."""

    run: RunId
    why: Literal["removed", "reconfigured"]


Action = Enqueue | Admit | Fail | Release


def observe(outputs: OutputTree, seated: Mapping[RunId, Seat]) -> World:
    """Read the control files of every run folder. Folders whose name is no run id are left out (and left alone)."""
    trees, _ = outputs.scan()
    return World({tree.id: _look(tree, seated.get(tree.id)) for tree in trees})


def _look(tree: RunTree, seat: Seat | None) -> SeenRun:
    """What one folder says. Unreadable, half-written or vanishing under our eyes: look again in the next pass."""
    try:
        return _read(tree, seat)
    except (OSError, UnicodeDecodeError):
        return SeenRun(tree, None, None, None, (), None)


def _read(tree: RunTree, seat: Seat | None) -> SeenRun:
    if not tree.orch_toml.is_file() or tree.orch_toml.stat().st_size > ORCH_TOML_BYTES_MAX:
        return SeenRun(tree, None, None, None, (), None)
    data = tree.orch_toml.read_bytes()
    try:
        values = parse_toml(data.decode(), str(tree.orch_toml))
    except ConfigError:
        return SeenRun(tree, None, None, None, (), None)
    orch_digest = digest(data)
    if seat is not None and seat.orch_digest == orch_digest:
        return SeenRun(tree, orch_digest, None, None, (), None)  # nothing else about it matters
    try:
        status = read_status(tree)
    except Damaged:
        status = None
    try:
        config, error = build(RunConfig, values, source=str(tree.orch_toml)), None
    except ConfigError as refused:
        config, error = None, str(refused)
    return SeenRun(tree, orch_digest, config, error, tuple(stable_steps(tree.checkpoints)), status)


def reconcile(world: World, seats: Mapping[RunId, Seat], slots: int) -> list[Action]:
    """What to do now. Releases come first; a slot that they free is given away in the next pass."""
    actions: list[Action] = []
    for run, seat in seats.items():
        seen = world.runs.get(run)
        if seen is None:
            actions.append(Release(run, "removed"))
        elif seen.orch_digest is not None and seen.orch_digest != seat.orch_digest:
            actions.append(Release(run, "reconfigured"))
    waiting = [seen for run, seen in world.runs.items() if run not in seats and seen.orch_digest and not seen.settled]
    free = [slot for slot in range(slots) if slot not in {seat.slot for seat in seats.values()}]
    for arrival, seen in _in_order(waiting, world, seats):
        actions.append(_admit_or_wait(seen, arrival, free))
    return actions


def _in_order(waiting: Sequence[SeenRun], world: World, seats: Mapping[RunId, Seat]) -> list[tuple[int, SeenRun]]:
    """Waiting runs with their places in the order of arrival. Newcomers come after everyone who was ever seen; runs
    that held a slot when the trainer was restarted come before everyone who did not."""
    arrivals = [seen.status.arrival for seen in world.runs.values() if seen.status]
    last = max(arrivals + [seat.arrival for seat in seats.values()], default=0)
    placed: list[tuple[int, SeenRun]] = []
    for seen in sorted(waiting, key=lambda seen: seen.tree.id):
        if seen.status is not None and seen.status.is_of(seen.tree.id, seen.orch_digest):
            placed.append((seen.status.arrival, seen))
        else:
            last += 1
            placed.append((last, seen))
    return sorted(placed, key=lambda pair: (not _was_admitted(pair[1]), pair[0], pair[1].tree.id))


def _admit_or_wait(seen: SeenRun, arrival: int, free: list[int]) -> Action:
    """What to do with one run without a slot; takes a slot out of `free` when it admits."""
    run = seen.tree.id
    start = choose_start(seen)
    if isinstance(start, str):
        return Fail(run, arrival, start)
    if start is None:
        return Enqueue(run, arrival, "waiting for its step_0, which its orchestrator makes from init_adapter_path")
    if not free:
        return Enqueue(run, arrival, "no slot is free")
    return Admit(run, arrival, free.pop(0), start)


def choose_start(seen: SeenRun) -> Start | str | None:
    """Which weights a run starts from; None: not yet; text: the reason why it cannot start.

    First match wins: its checkpoint, when the trainer was restarted under it or it asked to resume > its step_0 > the
    trainer's init adapter > fresh. A run that asked to resume and cannot never starts over.
    """
    config, newest = seen.config, max(seen.checkpoints, default=None)
    if config is None:
        return seen.config_error or "its orch.toml cannot be read"
    if _was_admitted(seen) and newest is not None:
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


def _was_admitted(seen: SeenRun) -> bool:
    """Whether this very run held a slot under this very orch.toml. A copied folder carries another id and must ask."""
    status = seen.status
    return status is not None and status.admitted and status.is_of(seen.tree.id, seen.orch_digest)
