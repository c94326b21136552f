"""What changed in the runs of an output tree since the last look: a line a change of state, for `graftwork serve`."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from graftwork.programs.glance import Removed, read_liveness, read_own_status, told
from graftwork.store.layout import OutputTree, RunTree
from graftwork.store.status import Status

Stamp = tuple[int, int]
"""Inode and time (ns) of a status.json, which is replaced as a whole."""


@dataclass
class News:
    """Remembers what it saw last. What is there at the first look is no news."""

    outputs: OutputTree
    statuses: dict[str, Status] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    removed: frozenset[Removed] = frozenset()

    def __post_init__(self) -> None:
        self.lines()

    def lines(self) -> list[str]:
        before, known = self.statuses, self.removed
        trees = self.outputs.scan()[0]
        self.statuses = {str(tree.id): status for tree in trees if (status := self._status(tree)) is not None}
        self.stamps = {run: stamp for run, stamp in self.stamps.items() if run in self.statuses}
        if (liveness := read_liveness(self.outputs)) is not None:
            self.removed = frozenset(liveness.removed)
        return changes(before, self.statuses, self.removed - known)

    def _status(self, tree: RunTree) -> Status | None:
        """The run's own status; the last one that could be read, while this one cannot."""
        run = str(tree.id)
        try:
            facts = tree.status_json.stat()
        except OSError:
            return self.statuses.get(run)
        stamp = (facts.st_ino, facts.st_mtime_ns)
        if self.stamps.get(run) != stamp:
            status, error = read_own_status(tree)
            if error is None and status is not None and status.run == run:
                self.stamps[run] = stamp
                return status
        return self.statuses.get(run)


def changes(before: Mapping[str, Status], after: Mapping[str, Status], removed: Set[Removed]) -> list[str]:
    """A line a run whose state is another, or the same under another orch.toml; and one a run that was removed."""
    return [
        *(f"run {run}: {told(after[run])}" for run in sorted(after) if _key(before.get(run)) != _key(after[run])),
        *(
            f"run {gone.run}: removed at step {gone.step}; its folder is gone, its slot is free"
            for gone in sorted(removed, key=lambda gone: gone.time)
        ),
    ]


def _key(status: Status | None) -> tuple[str, str] | None:
    return None if status is None else (status.state, status.orch_digest)
