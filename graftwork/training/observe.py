"""What the run folders say, as a value. Reading only; unreadable, half-written or vanishing files are said to be so."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftwork.config.load import build, digest, parse_toml
from graftwork.config.run import RunConfig
from graftwork.errors import ConfigError, Damaged
from graftwork.store.files import read_file
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import Status, read_status
from graftwork.training.runs import ABSENT, Seat, SeenRun, World

ORCH_TOML_BYTES_MAX = 2**20  # what is larger is no configuration
RACY_SECONDS = 2.0
"""A file that changed this recently may change again without its time stamp showing it."""

Stamp = tuple[int, int, int]
"""Inode, size and time (ns) of a file."""


@dataclass
class Observer:
    """Looks at every run folder. What it saw of runs that ended is remembered by the stamps of their control files, so
    that a thousand finished runs cost a thousand `stat`s a pass, no more."""

    outputs: OutputTree
    ended: dict[RunId, tuple[tuple[Stamp, Stamp], SeenRun]] = field(default_factory=dict)

    def look(self, seats: Mapping[RunId, Seat]) -> World:
        """Folders whose name is no run id are left out (and left alone)."""
        trees, _ = self.outputs.scan()
        runs = {tree.id: self._look_at(tree, seats.get(tree.id)) for tree in trees}
        self.ended = {run: known for run, known in self.ended.items() if run in runs}
        return World(runs)

    def _look_at(self, tree: RunTree, seat: Seat | None) -> SeenRun:
        stamps, folder_id = _stamps(tree), tree.folder_id()
        if seat is None and stamps is not None and tree.id in self.ended and self.ended[tree.id][0] == stamps:
            return self.ended[tree.id][1]
        try:
            seen = read_run(tree, seat)
        except (OSError, UnicodeDecodeError, Damaged) as error:
            seen = _unreadable(tree, f"cannot be read ({error})")
        seen = replace(seen, folder_id=folder_id)
        self.ended.pop(tree.id, None)
        if seen.settled and stamps is not None and _is_old(stamps):
            self.ended[tree.id] = stamps, seen
        return seen


def read_run(tree: RunTree, seat: Seat | None) -> SeenRun:
    """What one folder says. Of a run that is seated under this very orch.toml nothing else matters."""
    if not tree.orch_toml.is_file():
        return _unreadable(tree, ABSENT if not tree.orch_toml.exists() else "is not a file")
    data = read_file(tree.orch_toml, ORCH_TOML_BYTES_MAX)
    if not data.strip():
        return _unreadable(tree, "is empty")
    orch_digest = digest(data)
    if seat is not None and seat.orch_digest == orch_digest:
        return SeenRun(tree, orch_digest, None, None, (), None)
    try:
        values = parse_toml(data.decode(), str(tree.orch_toml))
    except ConfigError as error:
        return _unreadable(tree, str(error).removeprefix(str(tree.orch_toml)).strip())
    try:
        config, mistake = build(RunConfig, values, source=str(tree.orch_toml)), None
    except ConfigError as refused:
        config, mistake = None, str(refused)
    return SeenRun(tree, orch_digest, config, mistake, tuple(stable_steps(tree.checkpoints)), _status(tree))


def _unreadable(tree: RunTree, how: str) -> SeenRun:
    return SeenRun(tree, None, None, None, (), _status(tree), how)


def _status(tree: RunTree) -> Status | None:
    try:
        return read_status(tree)
    except Damaged:
        return None


def _stamps(tree: RunTree) -> tuple[Stamp, Stamp] | None:
    try:
        return _stamp(tree.orch_toml), _stamp(tree.status_json)
    except OSError:
        return None


def _stamp(path: Path) -> Stamp:
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _is_old(stamps: tuple[Stamp, Stamp]) -> bool:
    return time.time() - max(changed for _, _, changed in stamps) / 1e9 > RACY_SECONDS
