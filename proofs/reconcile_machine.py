"""A hypothesis machine that holds observe and reconcile against a model, over real folders.

    users     the rules: make, copy, spoil, mend and remove run folders
    trainer   carries actions out as training/trainer.py does, without torch: a step is a number
    model     knows what the users did and what the trainer said, and demands from that alone what a pass must do

A sequence is some twenty of the users' and the trainer's moves with passes between them; `run_sequences` runs many.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from graftwork.store.checkpoint import CHECKPOINT
from graftwork.store.disk import Disk
from graftwork.store.files import Content, pieces
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL, State, Status, read_status, write_status
from graftwork.training.observe import Observer
from graftwork.training.runs import (
    NO_SLOT,
    Action,
    Admit,
    End,
    Enqueue,
    FromCheckpoint,
    FromTrainer,
    Memory,
    Release,
    Seat,
    SeenRun,
    Start,
    World,
    reconcile,
    waits,
)

K = TypeVar("K")
V = TypeVar("V")

IDS = [RunId(name) for name in ("a", "b", "c", "d", "e")]
MOVES_MAX = 20
ROUND = 1000
"""Sequences that hypothesis remembers at a time."""
IN_MEMORY = "/dev/shm"
"""Where it is there: fast, and an inode is not given out twice."""
QUIET_PASSES = 2
"""Passes without a disturbance after which everything has found its place."""
AGE_NS = 10 * 10**9
"""More than the observer's RACY_SECONDS."""
MISSING_STEP = 999
"""A step that no checkpoint is ever made of."""


# --- what users put into folders --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """What an orch.toml asks for."""

    seed: int = 0
    init: bool = False
    resume: bool = False
    resume_step: int | None = None
    stop: bool = False

    def to_bytes(self) -> bytes:
        lines = [f"seed = {self.seed}"]
        lines += ['init_adapter_path = "/adapter"'] if self.init else []
        lines += ["resume = true"] if self.resume else []
        lines += [f"resume_step = {self.resume_step}"] if self.resume_step is not None else []
        lines += ["stop = true"] if self.stop else []
        return "\n".join([*lines, "[model]", 'path = "base"', ""]).encode()


SPOILT: Mapping[str, Callable[[bytes], bytes | None]] = {
    "half-written": lambda data: data[:-3],  # within the last string
    "empty": lambda data: b"",  # opened for writing, not written yet
    "no text": lambda data: b"\xff\xfe" + data,
    "absent": lambda data: None,
    "wrong": lambda data: b"sed = 1\n" + data,  # TOML, and an unknown key
}
"""What becomes of an orch.toml that was good; None: there is no file."""

WISHES: Mapping[str, Callable[[Wish], Wish]] = {
    "the same": lambda wish: wish,
    "other settings": lambda wish: replace(wish, seed=wish.seed + 1),
    "stop": lambda wish: replace(wish, stop=True),
    "resume": lambda wish: replace(wish, stop=False, resume=True, resume_step=None),
    "resume from 0": lambda wish: replace(wish, stop=False, resume=True, resume_step=0),
    "resume from a step that is missing": lambda wish: replace(wish, stop=False, resume=True, resume_step=MISSING_STEP),
}

NEWCOMERS: Mapping[str, tuple[Wish, tuple[int, ...]]] = {
    "fresh": (Wish(), ()),
    "one more": (Wish(), ()),
    "another": (Wish(), ()),
    "warm": (Wish(init=True), ()),
    "warm, with its step_0": (Wish(init=True), (0,)),
    "resumes nothing": (Wish(resume=True), ()),
    "resumes": (Wish(resume=True), (0, 10)),
    "resumes from 0": (Wish(resume=True, resume_step=0), (0, 10)),
    "has checkpoints and does not ask": (Wish(), (0, 10)),
    "stopped from the beginning": (Wish(stop=True), ()),
}
"""Settings and checkpoints of a folder that appears. Many have the very same orch.toml."""


Since = tuple[int, RunId]
"""Number of a pass, and the run's id: what tells those apart who were first seen in the same pass."""


@dataclass(frozen=True)
class Said:
    """What a status.json says, in the model's words. since: when the run was first seen waiting under this digest.
    held: it held a slot under it."""

    run: RunId
    digest: str
    since: Since
    held: bool
    ended: bool

    def is_of(self, run: RunId, digest: str | None) -> bool:
        return (self.run, self.digest) == (run, digest)


@dataclass
class Folder:
    """What the model knows of a run folder. data: the bytes of orch.toml. spoilt: what became of them."""

    wish: Wish
    data: bytes | None = None
    spoilt: str | None = None
    said: Said | None = None

    @property
    def wrong(self) -> bool:
        return self.spoilt == "wrong"

    @property
    def digest(self) -> str | None:
        """None: orch.toml cannot be read."""
        if self.data is None or not (self.spoilt is None or self.wrong):
            return None
        return hashlib.sha256(self.data).hexdigest()

    def said_of(self, run: RunId) -> Said | None:
        """What was said of this very run under this very orch.toml."""
        return self.said if self.said is not None and self.said.is_of(run, self.digest) else None


# --- a disk that is watched -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The trainer's process is gone."""


class WatchedDisk(Disk):
    """Never waits for the platter. Counts its changes; fails and dies when told to.

    failures: so many of the next status writes fail. lifetime: writes until the process is killed.
    """

    def __init__(self) -> None:
        self.changes = 0
        self.failures = 0
        self.failed = 0
        self.lifetime: int | None = None

    def write(self, path: Path, data: Content) -> None:
        self.changes += 1
        if self.lifetime is not None:
            if self.lifetime == 0:
                raise Killed
            self.lifetime -= 1
        if self.failures and "status.json" in path.name:
            self.failures -= 1
            self.failed += 1
            raise OSError(errno.ENOSPC, "no space left", str(path))
        with path.open("xb", buffering=0) as file:
            file.write(b"".join(pieces(data)))

    def rename(self, source: Path, target: Path) -> None:
        self.changes += 1
        super().rename(source, target)

    def remove_tree(self, path: Path) -> None:
        raise AssertionError(f"the trainer deletes {path}")

    def sync_file(self, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


Listing = dict[str, tuple[int, int, int]]
"""Inode, size and time (ns) of every file by its path from the root; of a folder, zeros."""


def listing(root: str) -> Listing:
    return dict(_entries(root, len(root) + 1))


def _entries(folder: str, cut: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield entry.path[cut:], (0, 0, 0)
            yield from _entries(entry.path, cut)
        else:
            facts = entry.stat(follow_symlinks=False)
            yield entry.path[cut:], (facts.st_ino, facts.st_size, facts.st_mtime_ns)


# --- a trainer without torch ------------------------------------------------------------------------------------------


@dataclass
class Sitting:
    """A run that holds a slot: what is a Tenant in the trainer."""

    tree: RunTree
    slot: int
    status: Status
    step: int
    folder_id: tuple[int, int] | None
    doubted: bool = False

    @property
    def seat(self) -> Seat:
        return Seat(self.slot, self.status.orch_digest, self.status.arrival, self.doubted, self.folder_id)

    @property
    def is_there(self) -> bool:
        """Whether its folder is, and not another under its name."""
        return self.folder_id is not None and self.tree.folder_id() == self.folder_id


@dataclass
class ModelTrainer:
    """told: every status that was written, since somebody last took note. refused: admissions that came to nothing."""

    disk: WatchedDisk
    outputs: OutputTree
    slots: int
    seats: dict[RunId, Sitting] = field(default_factory=dict)
    unwritten: dict[RunId, str] = field(default_factory=dict)
    told: list[Status] = field(default_factory=list)
    refused: int = 0

    def __post_init__(self) -> None:
        self.observer = Observer(self.outputs)

    def look(self) -> tuple[World, Memory]:
        seats = {run: sitting.seat for run, sitting in self.seats.items()}
        memory = Memory(self.slots, seats, dict(self.unwritten))
        world = self.observer.look(memory.seats)
        self.unwritten = {run: digest for run, digest in self.unwritten.items() if run in world.runs}
        return world, memory

    def act(self, actions: list[Action], world: World, memory: Memory) -> None:
        for action in actions:
            self._act(action, world)
        for run, sitting in self.seats.items():
            sitting.doubted = run in memory.seats and world.runs[run].orch_digest is None

    def _act(self, action: Action, world: World) -> None:
        match action:
            case Release(run, why):
                self._release(run, why, world.runs.get(run))
            case Enqueue(run, arrival, reason, place):
                self._note(world.runs[run], arrival, "queued", reason, place)
            case End(run, arrival, state, reason):
                self._note(world.runs[run], arrival, state, reason)
            case Admit(run, arrival, slot, start):
                self._admit(world.runs[run], arrival, slot, start)

    def _release(self, run: RunId, why: str, seen: SeenRun | None) -> None:
        sitting = self.seats[run]
        match why:
            case "stopped":
                assert seen is not None and seen.orch_digest is not None
                sitting.status = replace(sitting.status, orch_digest=seen.orch_digest)
                self.end(run, "stopped", None, checkpoint=True)
            case "unreadable" | "absent":
                assert seen is not None and seen.unreadable
                self.end(run, "evicted", f"its orch.toml {seen.unreadable}", checkpoint=why == "unreadable")
            case _:
                del self.seats[run]

    def _note(self, seen: SeenRun, arrival: int, state: State, reason: str | None, place: int | None = None) -> None:
        assert seen.orch_digest is not None
        old, run = seen.status, seen.tree.id
        admitted = old is not None and old.is_of(run, seen.orch_digest) and old.admitted
        step = None if state == "queued" else max(seen.checkpoints, default=None)
        status = Status(str(run), state, seen.orch_digest, arrival, admitted=admitted, step=step, reason=reason,
                        place=place)  # fmt: skip
        if status == old:
            return
        try:
            self._write(seen.tree, status)
        except OSError:
            self.unwritten[run] = seen.orch_digest

    def _admit(self, seen: SeenRun, arrival: int, slot: int, start: Start) -> None:
        assert seen.orch_digest is not None
        run, tree = seen.tree.id, seen.tree
        if isinstance(start, FromCheckpoint) and start.step is not None and start.step not in seen.checkpoints:
            self.refused += 1
            self._note(seen, arrival, "failed", f"no checkpoint at {tree.checkpoint(start.step)}")
            return
        step = 0
        if isinstance(start, FromTrainer):
            publish_checkpoint(self.disk, tree, 0)
        elif start.step is None:
            step = max(stable_steps(tree.checkpoints))
        else:
            step = start.step
            for later in stable_steps(tree.checkpoints):
                if later > step:
                    self.disk.quarantine(tree.checkpoint(later), tree.trash)
        status = Status(str(run), "active", seen.orch_digest, arrival, admitted=True, slot=slot, start_step=step)
        self.seats[run] = Sitting(tree, slot, status, step, tree.folder_id())
        self.say(run)

    # --- a run's turn -------------------------------------------------------------------------------------------------

    def say(self, run: RunId) -> None:
        """`active`; a run of which that cannot be written has failed."""
        sitting = self.seats[run]
        sitting.status = replace(sitting.status, step=sitting.step, wanted_batch=sitting.step + 1)
        try:
            self._write(sitting.tree, sitting.status)
        except OSError as error:
            self.end(run, "failed", str(error))

    def step(self, run: RunId, *, checkpoint: bool) -> None:
        sitting = self.seats[run]
        if not sitting.is_there:
            self.end(run, "failed", "its folder is gone")
            return
        sitting.step += 1
        if checkpoint:
            publish_checkpoint(self.disk, sitting.tree, sitting.step)
        self.say(run)

    def end(self, run: RunId, state: State, reason: str | None, *, checkpoint: bool = False) -> None:
        """Give the slot back and say why, if its folder is there to say it in."""
        sitting = self.seats[run]
        status = replace(sitting.status, state=state, reason=reason, slot=None, step=sitting.step, wanted_batch=None)
        if sitting.is_there:
            if checkpoint:
                publish_checkpoint(self.disk, sitting.tree, sitting.step)
            try:
                self._write(sitting.tree, status)
            except OSError:
                self.unwritten[run] = status.orch_digest
        del self.seats[run]

    def _write(self, tree: RunTree, status: Status) -> None:
        write_status(self.disk, tree, status)
        self.unwritten.pop(tree.id, None)
        self.told.append(status)


def publish_checkpoint(disk: Disk, tree: RunTree, step: int) -> None:
    """Unless it is there."""
    if not tree.checkpoint(step).is_dir():
        with disk.publish_dir(tree.checkpoint(step), CHECKPOINT, {"step": step}):
            pass


# --- the model --------------------------------------------------------------------------------------------------------

Demand = tuple[str, RunId, object]
"""What must be done with a run: ("release", run, why), ("admit", run, start), ("queue", run, place),
("wait", run, None) for its step_0, ("end", run, state)."""


def demand_of(action: Action) -> Demand:
    match action:
        case Release(run, why):
            return "release", run, why
        case Admit(run, _, _, start):
            return "admit", run, start
        case Enqueue(run, _, reason, place):
            return ("queue", run, place) if reason == NO_SLOT else ("wait", run, place)
        case End(run, _, state, _):
            return "end", run, state


@dataclass
class Model:
    """folders: what users did, and what was written there. seated_in: where each run that sits was admitted.

    since: when each run that waits or sits was first seen waiting; its own status.json keeps that for it, through
    restarts and while its orch.toml cannot be read.
    """

    outputs: OutputTree
    folders: dict[RunId, Folder] = field(default_factory=dict)
    seated_in: dict[RunId, Folder] = field(default_factory=dict)
    since: dict[RunId, Since] = field(default_factory=dict)
    passes: int = 0

    def demands(self, trainer: ModelTrainer) -> list[Demand]:
        """What the next pass must do, in no order."""
        self.passes += 1
        demands: list[Demand] = [
            ("release", run, why) for run, sitting in trainer.seats.items() if (why := self._why_release(run, sitting))
        ]
        ready: list[tuple[RunId, Start]] = []
        for run in self.wanting(trainer):
            self._notice(run)
            fate = self._fate(run)
            if isinstance(fate, str):
                demands.append(("end", run, fate))
            elif fate is None:
                demands.append(("wait", run, None))
            else:
                ready.append((run, fate))
        ready.sort(key=lambda pair: self._turn(pair[0]))
        free = trainer.slots - len(trainer.seats)
        demands += [("admit", run, start) for run, start in ready[:free]]
        demands += [("queue", run, place) for place, (run, _) in enumerate(ready[free:], 1)]
        return demands

    def wanting(self, trainer: ModelTrainer) -> list[RunId]:
        """Runs without a slot of which something must be said."""
        return [run for run in self.folders if run not in trainer.seats and self._wants(run, trainer)]

    def _wants(self, run: RunId, trainer: ModelTrainer) -> bool:
        folder = self.folders[run]
        said = folder.said_of(run)
        ended = said is not None and said.ended
        return folder.digest is not None and not ended and trainer.unwritten.get(run) != folder.digest

    def _why_release(self, run: RunId, sitting: Sitting) -> str | None:
        folder = self.folders.get(run)
        if folder is None or folder is not self.seated_in[run]:
            return "removed"  # also when nobody looked while it was gone
        if folder.digest is None:
            if not sitting.doubted:
                return None
            return "absent" if folder.data is None else "unreadable"
        if folder.digest == sitting.status.orch_digest:
            return None
        return "stopped" if folder.wish.stop and not folder.wrong else "reconfigured"

    def _fate(self, run: RunId) -> Start | str | None:
        """Where a run must start; None: it waits for its step_0; text: the state in which it has ended."""
        folder = self.folders[run]
        steps = stable_steps(self.outputs.run(run).checkpoints)
        if folder.wrong:
            return "failed"
        if folder.wish.stop:
            return "stopped"
        if self._held(run):
            return FromCheckpoint(None) if steps else "failed"  # they are gone: it must not start over
        if folder.wish.resume:
            return FromCheckpoint(folder.wish.resume_step) if steps else "failed"
        if steps:
            return FromCheckpoint(None) if steps == [0] else "failed"
        return None if folder.wish.init else FromTrainer()

    def _held(self, run: RunId) -> bool:
        said = self.folders[run].said_of(run)
        return said is not None and said.held

    def _notice(self, run: RunId) -> None:
        said = self.folders[run].said_of(run)
        self.since[run] = (self.passes, run) if said is None else said.since

    def _turn(self, run: RunId) -> tuple[bool, Since]:
        """First come, first served; before all others, who held a slot when the trainer was restarted."""
        return not self._held(run), self.since[run]

    def hear(self, told: list[Status]) -> None:
        """Take note of what was written into folders."""
        for status in told:
            run = RunId(status.run)
            folder = self.folders[run]
            old = folder.said
            held = status.state == "active" or (old is not None and old.is_of(run, status.orch_digest) and old.held)
            folder.said = Said(run, status.orch_digest, self.since[run], held, status.state in TERMINAL)
            if status.state == "active":
                self.seated_in[run] = folder
        told.clear()


# --- the machine ------------------------------------------------------------------------------------------------------

PICK = st.integers(0, len(IDS) - 1)
KINDS = st.sampled_from(sorted(NEWCOMERS))
SPOILS = st.sampled_from(sorted(SPOILT))
SLOTS = st.integers(1, 3)
PASSES = st.sampled_from([0, 0, 1, 1, 2, 3])


class ReconcileMachine(RuleBasedStateMachine):
    """Moves of users and of the trainer; after each a few passes, and in each pass every check. quiet: passes since
    somebody did something, or something failed."""

    figures: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(dir=IN_MEMORY if Path(IN_MEMORY).is_dir() else None)
        self.outputs = OutputTree(Path(self.root))
        self.disk, self.users_disk = WatchedDisk(), WatchedDisk()
        self.model = Model(self.outputs)
        self.trainer = ModelTrainer(self.disk, self.outputs, 1)
        self.quiet = 0

    def teardown(self) -> None:
        shutil.rmtree(self.root)
        whole = sys.exc_info()[0] is None  # hypothesis gives up a sequence in the middle by an exception
        self.figures["sequences" if whole else "sequences given up"] += 1

    # --- users --------------------------------------------------------------------------------------------------------

    @initialize(kinds=st.lists(KINDS, min_size=2, max_size=len(IDS)), slots=SLOTS)
    def are_there_from_the_beginning(self, kinds: list[str], slots: int) -> None:
        self.trainer.slots = slots
        for kind in kinds:
            self._make(0, kind)
        self._go_on(1)

    @precondition(lambda self: self.absent)
    @rule(pick=PICK, kind=KINDS, passes=PASSES)
    def appears(self, pick: int, kind: str, passes: int) -> None:
        self._make(pick, kind)
        self._go_on(passes)

    @precondition(lambda self: self.present and self.absent)
    @rule(source=PICK, pick=PICK, passes=PASSES)
    def is_copied(self, source: int, pick: int, passes: int) -> None:
        """The whole folder, under another id; a copy that nobody looked at is not copied back."""
        old, new = chosen(self.present, source), chosen(self.absent, pick)
        folder = self.model.folders[old]
        if folder.said is None or folder.said.run != new:
            shutil.copytree(self.outputs.run(old).root, self.outputs.run(new).root)
            self.model.folders[new] = replace(folder)
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, passes=PASSES)
    def vanishes(self, pick: int, passes: int) -> None:
        run = chosen(self.present, pick)
        shutil.rmtree(self.outputs.run(run).root)
        del self.model.folders[run]
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, how=SPOILS, passes=PASSES)
    def is_spoilt(self, pick: int, how: str, passes: int) -> None:
        self._spoil(chosen(self.present, pick), how)
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, what=st.sampled_from(sorted(WISHES)), passes=PASSES)
    def is_asked(self, pick: int, what: str, passes: int) -> None:
        """A good orch.toml, whatever was there."""
        run = chosen(self.present, pick)
        self._ask(run, WISHES[what](self.model.folders[run].wish))
        self._go_on(passes)

    @precondition(lambda self: self.present and self.absent)
    @rule(pick=PICK, how=SPOILS, kind=KINDS, passes=PASSES)
    def is_saved_slowly(self, pick: int, how: str, kind: str, passes: int) -> None:
        """The same orch.toml once more; a pass sees it spoilt, and a newcomer."""
        run = chosen(self.present, pick)
        self._spoil(run, how)
        self._make(pick, kind)
        self._go_on(1)
        self._ask(run, self.model.folders[run].wish)
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, what=st.sampled_from(["damaged", "removed"]), passes=PASSES)
    def loses_its_status(self, pick: int, what: str, passes: int) -> None:
        run = chosen(self.present, pick)
        path = self.outputs.run(run).status_json
        path.unlink(missing_ok=True)
        if what == "damaged":
            path.write_bytes(b'{"run": ')
        self.model.folders[run].said = None
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(pick=PICK, lost=st.booleans(), passes=PASSES)
    def checkpoints_come_or_go(self, pick: int, lost: bool, passes: int) -> None:
        """Its orchestrator makes its step_0; or all that it has are lost."""
        tree = self.outputs.run(chosen(self.present, pick))
        if lost:
            shutil.rmtree(tree.checkpoints, ignore_errors=True)
        elif not stable_steps(tree.checkpoints):
            publish_checkpoint(self.users_disk, tree, 0)
        self._go_on(passes)

    @precondition(lambda self: self.present)
    @rule(passes=PASSES)
    def time_goes_by(self, passes: int) -> None:
        """Every file is old enough for the observer to remember it."""
        for run in self.present:
            for path in self.outputs.run(run).orch_toml.parent.iterdir():
                then = path.stat().st_mtime_ns - AGE_NS
                os.utime(path, ns=(then, then))
        self._go_on(passes)

    # --- the trainer --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.trainer.seats)
    @rule(pick=PICK, checkpoint=st.booleans(), passes=PASSES)
    def makes_a_step(self, pick: int, checkpoint: bool, passes: int) -> None:
        self.trainer.step(chosen(sorted(self.trainer.seats), pick), checkpoint=checkpoint)
        self._go_on(passes)

    @precondition(lambda self: self.trainer.seats)
    @rule(pick=PICK, state=st.sampled_from(("finished", "failed", "evicted")), passes=PASSES)
    def ends(self, pick: int, state: State, passes: int) -> None:
        self.trainer.end(chosen(sorted(self.trainer.seats), pick), state, None, checkpoint=state != "failed")
        self._go_on(passes)

    @rule(count=st.integers(1, 3), passes=PASSES)
    def cannot_write(self, count: int, passes: int) -> None:
        """The next status writes fail."""
        self.disk.failures = count
        self._go_on(passes)

    @rule(slots=SLOTS, lifetime=st.none() | st.integers(0, 3), passes=PASSES)
    def is_restarted(self, slots: int, lifetime: int | None, passes: int) -> None:
        """Seats and memory are lost, folders stay. lifetime: killed again in its first pass, after so many writes."""
        self.trainer = ModelTrainer(self.disk, self.outputs, slots)
        if lifetime is not None:
            self.disk.lifetime = lifetime
            try:
                self._go_on(1)
            except Killed:
                self.figures["killed within a pass"] += 1
            self.disk.lifetime = None
            self.trainer = ModelTrainer(self.disk, self.outputs, slots)
        self._go_on(passes)

    @rule(passes=st.integers(1, 3))
    def is_left_alone(self, passes: int) -> None:
        for _ in range(passes):
            self._pass()

    # --- tools --------------------------------------------------------------------------------------------------------

    @property
    def present(self) -> list[RunId]:
        return sorted(self.model.folders)

    @property
    def absent(self) -> list[RunId]:
        return [run for run in IDS if run not in self.model.folders]

    def _make(self, pick: int, kind: str) -> None:
        """A folder for one of the ids that have none."""
        run = chosen(self.absent, pick)
        wish, steps = NEWCOMERS[kind]
        tree = self.outputs.run(run)
        tree.orch_toml.parent.mkdir(parents=True)
        for step in steps:
            publish_checkpoint(self.users_disk, tree, step)
        self.model.folders[run] = Folder(wish)
        self._ask(run, wish)

    def _ask(self, run: RunId, wish: Wish) -> None:
        folder = self.model.folders[run]
        folder.wish, folder.data, folder.spoilt = wish, wish.to_bytes(), None
        self.outputs.run(run).orch_toml.write_bytes(folder.data)

    def _spoil(self, run: RunId, how: str) -> None:
        folder, path = self.model.folders[run], self.outputs.run(run).orch_toml
        folder.data, folder.spoilt = SPOILT[how](folder.wish.to_bytes()), how
        if folder.data is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(folder.data)

    # --- a pass, and what must hold -----------------------------------------------------------------------------------

    def _go_on(self, passes: int) -> None:
        """After a move."""
        self.model.hear(self.trainer.told)
        self.figures["moves"] += 1
        self.quiet = 0
        for _ in range(passes):
            self._pass()

    def _pass(self) -> None:
        trainer, before = self.trainer, listing(self.root)
        self.disk.changes = self.disk.failed = trainer.refused = 0
        world, memory = trainer.look()
        actions = reconcile(world, memory)
        self._check_pure(world, memory, actions)
        assert self.disk.changes == 0 and listing(self.root) == before, "observe or reconcile wrote"
        self._check_slots(actions, memory)
        done, demanded = by_run(map(demand_of, actions)), by_run(self.model.demands(trainer))
        assert done == demanded, f"done: {done}; demanded: {demanded}"
        assert waits(world, memory) == bool(memory.seats or self.model.wanting(trainer))
        try:
            trainer.act(actions, world, memory)
        finally:
            self.model.hear(trainer.told)
            self._check_files(before, actions)
        self._check_seats(actions)
        if self.quiet >= QUIET_PASSES:
            self._check_calm(actions)
        doubts = any(sitting.doubted and not memory.seats[run].doubted for run, sitting in trainer.seats.items())
        self.quiet = 0 if doubts or self.disk.failed or trainer.refused else self.quiet + 1
        self.figures["passes"] += 1
        self.figures.update(what for what, _, _ in done)

    def _check_pure(self, world: World, memory: Memory, actions: list[Action]) -> None:
        """The same again: with the same arguments, which are left as they were; with the runs in another order; and
        for an observer that remembers nothing."""
        runs, seats, unwritten = dict(world.runs), dict(memory.seats), dict(memory.unwritten)
        assert reconcile(world, memory) == actions
        turned = reconcile(World(turn(runs)), replace(memory, seats=turn(seats), unwritten=turn(unwritten)))
        assert by_run(map(demand_of, turned)) == by_run(map(demand_of, actions))
        assert (world.runs, memory.seats, memory.unwritten) == (runs, seats, unwritten)
        if self.trainer.observer.ended:
            fresh = Observer(self.outputs).look(memory.seats)
            assert reconcile(fresh, memory) == actions, "what the observer remembers is out of date"

    def _check_slots(self, actions: list[Action], memory: Memory) -> None:
        given = [action.slot for action in actions if isinstance(action, Admit)]
        taken = [seat.slot for seat in memory.seats.values()]
        assert len({*given, *taken}) == len(given) + len(taken), "a slot is given twice"
        assert all(0 <= slot < memory.slots for slot in given), "there is no such slot"

    def _check_seats(self, actions: list[Action]) -> None:
        """Who ended or lost its folder has none."""
        assert not {action.run for action in actions if isinstance(action, Release | End)} & self.trainer.seats.keys()

    def _check_calm(self, actions: list[Action]) -> None:
        """Passes ago, all found their places: nothing is written any more, nobody is in line beside a free slot, and
        each was told its place."""
        assert self.disk.changes == 0, f"{self.quiet} quiet passes, and the next changes something: {actions}"
        line = [action for action in actions if isinstance(action, Enqueue) and action.reason == NO_SLOT]
        assert not line or len(self.trainer.seats) == self.trainer.slots, "a run waits beside a free slot"
        statuses = [read_status(self.outputs.run(action.run)) for action in line]
        assert [(status.state, status.place) for status in statuses if status] == [
            ("queued", place) for place in range(1, len(line) + 1)
        ]
        assert not any(isinstance(action, Admit | End | Release) for action in actions)

    def _check_files(self, before: Listing, actions: list[Action]) -> None:
        """Nothing is deleted, and nothing of runs that no action names is touched. What changes in place are statuses;
        what moves (into the trash) are checkpoints after the one that a run goes back to."""
        after = listing(self.root)
        touched = {path for path in after if before.get(path) != after[path]}
        assert {path.partition("/")[0] for path in touched} <= {f"run_{action.run}" for action in actions}
        changed = touched & before.keys()
        assert all(path.endswith("/control/status.json") for path in changed)
        kept = {inode for inode, _, _ in after.values()}
        assert all(path in changed or before[path][0] in kept for path in before), "a file was deleted"
        goes_back = tuple(
            f"run_{a.run}/checkpoints/" for a in actions if isinstance(a, Admit) and goes_back_to(a.start)
        )
        assert all(path.startswith(goes_back) for path in before.keys() - after.keys()), "a file was moved"


def chosen(runs: list[RunId], pick: int) -> RunId:
    return runs[pick % len(runs)]


def by_run(demands: Iterable[Demand]) -> list[Demand]:
    return sorted(demands, key=lambda demand: (demand[1], demand[0]))


def turn(items: Mapping[K, V]) -> dict[K, V]:
    """The same in another order."""
    return dict(reversed(list(items.items())))


def goes_back_to(start: Start) -> bool:
    return isinstance(start, FromCheckpoint) and start.step is not None


def run_sequences(count: int, seed: int) -> dict[str, int]:
    """Run at least `count` sequences; what was done in them. Raises what the first broken promise raises, shrunk."""
    figures: Counter[str] = Counter()
    for number, first in enumerate(range(0, count, ROUND)):
        machine = hypothesis.seed(f"{seed}, round {number}")(type("Machine", (ReconcileMachine,), {"figures": figures}))
        some = settings(
            max_examples=min(ROUND, count - first),
            stateful_step_count=MOVES_MAX,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        run_state_machine_as_test(machine, settings=some)
    return dict(figures)
