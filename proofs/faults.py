"""Every storage operation of a trainer fails, or is followed by a kill, one at a time; and real kill -9 at random
moments. Afterwards every run must end with the bytes that it ends with when nothing fails.

    sweep(KINDS, "all", seed=0)             every kind of fault at every operation of the workload
    sweep_restarts(KINDS, "all", seed=0)    the same at the start of a trainer whose predecessor was killed
    real_kills(50, seed=0)                  processes

    with scratch() as workload:             one of them again, as the failures say it
        print(try_faults(workload, [Fault(KILLED_AFTER, 17)]))

An operation is one primitive of `store/disk.py`. `Twin` numbers them; the same workload does the same ones in the same
order each time.
"""

from __future__ import annotations

import errno
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from graftwork.errors import GraftworkError
from graftwork.store.disk import Claim
from graftwork.store.files import Content, pieces
from graftwork.store.layout import RUN_PREFIX, OutputTree
from graftwork.training.trainer import Trainer
from proofs.workload import (
    Processes,
    Unsynced,
    Workload,
    ask_again,
    scratch,
    settle,
    unfinished,
)

T = TypeVar("T")
RANDOM_NAME = re.compile(r"-[0-9a-f]{8}(?=/|$)")


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass(frozen=True)
class Kind:
    """A way to break one operation: how much of it is done, and the error that is then raised. error None: kill -9."""

    name: str
    done: Literal["nothing", "half", "all"]
    error: int | None

    @property
    def is_kill(self) -> bool:
        return self.error is None

    def applies(self, operation: Operation) -> bool:
        """Half an operation is half the bytes, or half of the files that are removed. What is done and then raises is a
        write whose fsync failed. Killed before an operation is killed after the last one, but for the first."""
        if self.done == "half":
            return operation.primitive in ("write", "append", "remove_tree")
        if self.is_kill:
            return self.done == "all" or operation.number == 1
        return self.done == "nothing" or operation.primitive == "write"


NO_SPACE = Kind("no_space", "nothing", errno.ENOSPC)
"""Somebody makes room, and the same trainer goes on; after every other fault another one does."""
IO_ERROR = Kind("io_error", "nothing", errno.EIO)
SHORT = Kind("short", "half", errno.ENOSPC)
UNSYNCED = Kind("unsynced", "all", errno.EIO)
KILLED_BEFORE = Kind("killed_before", "nothing", None)
KILLED_AMID = Kind("killed_amid", "half", None)
KILLED_AFTER = Kind("killed_after", "all", None)
KINDS = (NO_SPACE, IO_ERROR, SHORT, UNSYNCED, KILLED_BEFORE, KILLED_AMID, KILLED_AFTER)


@dataclass(frozen=True)
class Operation:
    """path: relative to the output tree, without the random parts of names."""

    number: int
    primitive: str
    path: str

    @property
    def run(self) -> str | None:
        """The run whose file it is about; None for the trainer's own."""
        first = self.path.partition("/")[0]
        return first.removeprefix(RUN_PREFIX) if first.startswith(RUN_PREFIX) else None


@dataclass(frozen=True)
class Fault:
    """number: of the operation that breaks, from 1."""

    kind: Kind
    number: int

    def __str__(self) -> str:
        return f"Fault({self.kind.name.upper()}, {self.number})"


RESTARTS = (
    (KILLED_AMID, "write", "run_kl/checkpoints/.staging-step_4-*/trainer/rank_0.safetensors"),
    (KILLED_AMID, "append", "run_kl/metrics.jsonl"),
    (KILLED_AMID, "append", "run_mixed/chain.jsonl"),
    (KILLED_AFTER, "rename", "run_kl/broadcasts/step_3"),
    (KILLED_AFTER, "rename", "run_kl/.trash/retired-step_0-*"),
    (KILLED_AFTER, "rename", "run_warm/checkpoints/step_2"),
)
"""After these a trainer has something to put right when it starts. Meant is the last such operation."""


class Twin(Unsynced):
    """Numbers the operations of a trainer, and breaks one.

    A kill raises Killed, and everything after it does. It also takes the tree away (until `bury`): whatever still runs
    in this process, like the tidying up in `except` blocks, finds no files, as it would not have run in a dead process.
    """

    def __init__(self, outputs: OutputTree, fault: Fault | None = None) -> None:
        self.root, self.fault = outputs.root, fault
        self.away = outputs.root.with_name(f"{outputs.root.name}-away")
        self.operations: list[Operation] = []
        self.claims: list[Claim] = []
        self.killed = False
        self.struck: Operation | None = None
        """The operation that was broken."""

    def bury(self) -> None:
        """The process is gone: its locks are, and its files are there for the next one."""
        for claim in self.claims:
            claim.release()
        self.claims.clear()
        if self.away.exists():
            self.away.rename(self.root)

    # --- primitives ---------------------------------------------------------------------------------------------------

    def make_folder(self, path: Path) -> None:
        self._do("make_folder", path, partial(super().make_folder, path))

    def write(self, path: Path, data: Content) -> None:
        self._do("write", path, partial(super().write, path, data), partial(_write_half, path, data))

    def append(self, path: Path, data: bytes) -> None:
        self._do("append", path, partial(super().append, path, data), partial(super().append, path, _half(data)))

    def sync_file(self, path: Path) -> None:
        self._do("sync_file", path, partial(super().sync_file, path))

    def sync_folder(self, path: Path) -> None:
        self._do("sync_folder", path, partial(super().sync_folder, path))

    def rename(self, source: Path, target: Path) -> None:
        self._do("rename", target, partial(super().rename, source, target))

    def remove_tree(self, path: Path) -> None:
        self._do("remove_tree", path, partial(super().remove_tree, path), partial(_remove_half, path))

    def claim(self, path: Path, who: str) -> Claim:
        """No primitive, but it writes."""

        def keep() -> Claim:
            self.claims.append(super(Twin, self).claim(path, who))
            return self.claims[-1]

        return self._do("claim", path, keep)

    def _do(self, primitive: str, path: Path, whole: Callable[[], T], half: Callable[[], object] | None = None) -> T:
        if self.killed:
            raise Killed
        where = RANDOM_NAME.sub("-*", path.relative_to(self.root).as_posix())
        operation = Operation(len(self.operations) + 1, primitive, where)
        self.operations.append(operation)
        if self.fault is None or operation.number != self.fault.number:
            return whole()
        self.struck, kind = operation, self.fault.kind
        if kind.done == "half":
            assert half is not None, f"half of {primitive}"
            half()
        elif kind.done == "all":
            whole()
        if kind.error is not None:
            raise OSError(kind.error, os.strerror(kind.error), str(path))
        self.killed = True
        self.root.rename(self.away)
        raise Killed


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _write_half(path: Path, data: Content) -> None:
    path.write_bytes(_half(b"".join(pieces(data))))


def _remove_half(path: Path) -> None:
    files = sorted(inner for inner in path.rglob("*") if inner.is_file())
    for file in files[: len(files) // 2]:
        file.unlink()


# --- one of them ------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A tree and the lives of trainers on it.

    wrong: what should not have been. notes: what cost no run its result, and yet is not as if nothing had happened.
    """

    workload: Workload
    outputs: OutputTree
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def live(self, fault: Fault | None) -> Twin:
        """One trainer, from its start to its end or until nothing is left to do."""
        twin = Twin(self.outputs, fault)
        try:
            self._live(self.workload.trainer(self.outputs, twin), twin)
        except Killed:
            pass
        finally:
            twin.bury()
        if fault is not None and twin.struck is None:
            self.wrong.append(f"there is no operation {fault.number}")
        return twin

    def _live(self, trainer: Trainer, twin: Twin) -> None:
        try:
            trainer.open()
        except (OSError, GraftworkError) as error:  # one that cannot say who it is does not start
            self.wrong += [] if twin.struck else [f"the trainer does not start: {error}"]
            return
        self._settle(trainer)
        fault, struck = twin.fault, twin.struck
        if fault is None or struck is None or fault.kind.error is None:
            return
        self.wrong += self.workload.cost(self.outputs, struck.run, fault.kind.error)
        ask_again(self.outputs)
        if fault.kind is NO_SPACE:
            self._settle(trainer)
            self.notes += [f"the same trainer does not go on: {text}" for text in unfinished(self.outputs)]

    def _settle(self, trainer: Trainer) -> None:
        try:
            settle(trainer)
        except Exception as error:  # noqa: BLE001
            self.wrong.append(f"the trainer ended: {type(error).__name__}: {error}")


def try_faults(workload: Workload, faults: Sequence[Fault]) -> Trial:
    """One trainer after the other meets a fault, and the last one none."""
    with workload.laid() as outputs:
        trial = Trial(workload, outputs)
        for fault in (*faults, None):
            trial.live(fault)
        trial.wrong += workload.differences(trial.outputs)
        if all(fault.kind.is_kill for fault in faults):  # after an error, what could not be retired may stay
            trial.wrong += workload.remains(trial.outputs)
            trial.notes += workload.kept_too_long(trial.outputs)
        return trial


# --- all of them ------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """asked, done: by kind; done are those after which everything was as if nothing had happened. operations: that
    there are to break. failures: each says what replays it. notes: as in Trial. moments: what real kills hit."""

    operations: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    moments: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Figures) -> Figures:
        """Of two parts of the same sweep."""
        return Figures(
            self.operations, self.asked + other.asked, self.done + other.done, self.failures + other.failures,
            self.notes + other.notes, self.moments + other.moments,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kind of fault at an operation, after other faults."""

    kind: Kind
    operation: Operation
    earlier: tuple[Fault, ...] = ()

    @property
    def faults(self) -> list[Fault]:
        return [*self.earlier, Fault(self.kind, self.operation.number)]

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.faults))}] ({self.operation.primitive} {self.operation.path})"


WHOLE = slice(None)


def sweep(
    kinds: Sequence[Kind], operations: int | Literal["all"], seed: int, workload: Workload | None = None,
    part: slice = WHOLE,
) -> Figures:  # fmt: skip
    """Each kind of fault at each operation of the workload, or `operations` of these, spread over kinds and
    primitives. part: of the cases; a proof shares them out over processes."""
    with scratch() if workload is None else nullcontext(workload) as workload:
        there = operations_of(workload)
        return _try_all(workload, len(there), sample(_cases(kinds, there), operations, seed)[part])


def sweep_restarts(
    kinds: Sequence[Kind], operations: int | Literal["all"], seed: int, workload: Workload | None = None,
    part: slice = WHOLE,
) -> Figures:  # fmt: skip
    """The same for what a trainer does when it starts after each of RESTARTS, until it has admitted its runs."""
    with scratch() if workload is None else nullcontext(workload) as workload:
        first, cases = operations_of(workload), list[Case]()
        for kind, *which in RESTARTS:
            earlier = Fault(kind, max(one.number for one in first if [one.primitive, one.path] == which))
            cases += _cases(kinds, _until_admitted(operations_of(workload, earlier)), earlier)
        count = len({(case.earlier, case.operation) for case in cases})
        return _try_all(workload, count, sample(cases, operations, seed)[part])


def _cases(kinds: Sequence[Kind], operations: Sequence[Operation], *earlier: Fault) -> list[Case]:
    return [Case(kind, one, earlier) for kind in kinds for one in operations if kind.applies(one)]


def operations_of(workload: Workload, *earlier: Fault) -> list[Operation]:
    """What a trainer does to the tree when nothing fails, after others to whom something happened."""
    with workload.laid() as outputs:
        trial = Trial(workload, outputs)
        return [trial.live(fault) for fault in (*earlier, None)][-1].operations


def _until_admitted(operations: Sequence[Operation]) -> Sequence[Operation]:
    """Runs that train append to their logs; what comes then is as in every other life."""
    return operations[: next(index for index, operation in enumerate(operations) if operation.primitive == "append")]


def sample(cases: Sequence[Case], count: int | Literal["all"], seed: int) -> Sequence[Case]:
    """`count` of them: one of each kind and primitive, then another of each, and so on."""
    if count == "all":
        return cases
    met: Counter[tuple[str, str]] = Counter()

    def turn(case: Case) -> int:
        met[key := (case.kind.name, case.operation.primitive)] += 1
        return met[key]

    return sorted(random.Random(seed).sample(cases, len(cases)), key=turn)[:count]


def _try_all(workload: Workload, operations: int, cases: Sequence[Case]) -> Figures:
    figures = Figures(operations)
    for case in cases:
        trial = try_faults(workload, case.faults)
        figures.asked[case.kind.name] += 1
        figures.done[case.kind.name] += not trial.wrong
        if trial.wrong:
            figures.failures.append(f"{case}: {'; '.join(trial.wrong)}")
        figures.notes += [f"{case}: {note}" for note in trial.notes]
    return figures


# --- processes --------------------------------------------------------------------------------------------------------


def real_kills(count: int, seed: int, workload: Workload | None = None) -> Figures:
    """`graftwork trainer` is killed -9 at random moments of its work, started again, and so on to the workload's end;
    then the next workload, until there were `count` kills."""
    rng = random.Random(seed)
    figures = Figures(asked=Counter(kills=count))
    with scratch() if workload is None else nullcontext(workload) as workload, tempfile.TemporaryDirectory() as folder:
        unkilled = Processes(workload, Path(folder) / "unkilled")
        seconds = unkilled.seconds_of_a_version()
        figures.failures += unkilled.wrong()
        for number in range(10 * count):
            if figures.done["kills"] >= count:
                break
            killed = Processes(workload, Path(folder) / f"killed_{number}")
            moments = killed.to_the_end(rng, seconds, count - figures.done["kills"])
            figures.done["kills"] += len(moments)
            figures.moments.update(moments)
            figures.asked["workloads"] += 1
            figures.done["workloads"] += not killed.wrong()
            figures.failures += [f"seed {seed}, workload {number}, killed {moments}: {text}" for text in killed.wrong()]
    return figures
