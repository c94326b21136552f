"""One look at an output tree: what its files say now. Nothing is trusted: they vanish and change under our eyes.

Nothing is locked either: a lock that is held for the time of a look would turn a program away that starts just then. So
whether an orchestrator lives is judged from the pid in its lock file, which is a hint and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graftwork.config.load import digest, parse_toml
from graftwork.config.run import RunConfig
from graftwork.errors import ConfigError, Damaged
from graftwork.logs import plain_lines
from graftwork.programs.orchestrators import is_alive, pid_in
from graftwork.store.files import read_json
from graftwork.store.layout import OutputTree, RunTree
from graftwork.store.status import Status, read_status

LIVE_SECONDS = 15.0
"""A trainer whose liveness.json is older than this is not running, or as good as."""
TAIL_BYTES = 64 * 1024
DEFAULT_MAX_STEPS = int(RunConfig.model_fields["max_steps"].default)


@dataclass(frozen=True)
class Seated:
    """What liveness.json says of a run that holds a slot. share: of the tokens of the last minute, 0 to 1.
    last_batch_time: seconds since 1970."""

    slot: int | None = None
    step: int | None = None
    share: float | None = None
    last_batch_time: float | None = None


@dataclass(frozen=True)
class Removed:
    """A run whose folder vanished while it held a slot."""

    run: str
    step: int | None = None
    time: float = 0.0


@dataclass(frozen=True)
class Liveness:
    """The trainer's liveness.json; fields that we do not know are passed over. time: seconds since 1970. ended: it
    said so; one that was killed did not."""

    time: float
    pid: int | None = None
    runs: Mapping[str, Seated] = field(default_factory=dict)
    removed: tuple[Removed, ...] = ()
    ended: bool = False

    def is_live(self, now: float) -> bool:
        return not self.ended and now - self.time <= LIVE_SECONDS


LIVENESS: TypeAdapter[Liveness] = TypeAdapter(Liveness)


@dataclass(frozen=True)
class Seen:
    """What one run's folder says.

    orch_digest: None when there is no orch.toml that can be read; `orch_error` says why.
    status: of this very run; a copied folder brings another run's, then `copy_of` names it.
    metrics: the newest line of metrics.jsonl. orchestrator_error: why no orchestrator seems to run here.
    """

    id: str
    orch_digest: str | None = None
    orch_error: str | None = None
    max_steps: int | None = None
    status: Status | None = None
    status_error: str | None = None
    copy_of: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    orchestrator_error: str | None = None


@dataclass(frozen=True)
class Glance:
    """slots: None when no trainer ever said how many it has. ignored: folders whose names are no runs'."""

    runs: tuple[Seen, ...]
    liveness: Liveness | None
    slots: int | None
    ignored: tuple[str, ...]


def look(outputs: OutputTree) -> Glance:
    """Everything that `graftwork runs` shows."""
    trees, errors = outputs.scan()
    runs = tuple(look_at(tree) for tree in trees)
    return Glance(runs, read_liveness(outputs), read_slots(outputs), tuple(map(str, errors)))


def look_at(tree: RunTree) -> Seen:
    orch_digest, orch_error, max_steps = _read_orch_toml(tree)
    status, status_error = read_own_status(tree)
    own = status if status is None or status.run == str(tree.id) else None
    return Seen(
        str(tree.id),
        orch_digest=orch_digest,
        orch_error=orch_error,
        max_steps=max_steps,
        status=own,
        status_error=status_error,
        copy_of=None if status is None or own is not None else status.run,
        metrics=last_row(tree.metrics_jsonl),
        orchestrator_error=_why_no_orchestrator(tree),
    )


def read_own_status(tree: RunTree) -> tuple[Status | None, str | None]:
    """(the status, why it cannot be read)."""
    try:
        return read_status(tree), None
    except Damaged as error:
        return None, str(error)


def _read_orch_toml(tree: RunTree) -> tuple[str | None, str | None, int | None]:
    """(digest, why it cannot be read, max_steps). Whether its settings are right is for the trainer to say."""
    try:
        data = tree.orch_toml.read_bytes()
        values = parse_toml(data.decode(), str(tree.orch_toml))
    except FileNotFoundError:
        return None, f"it has no {tree.orch_toml.relative_to(tree.root)}", None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        return None, f"{tree.orch_toml.relative_to(tree.root)} cannot be read: {error}", None
    steps = values.get("max_steps", DEFAULT_MAX_STEPS)
    return digest(data), None, steps if isinstance(steps, int) else None


def last_row(path: Path) -> dict[str, Any]:
    """The newest whole line of a `.jsonl` log, read from its end; {} when there is none."""
    for line in reversed(_tail(path).split(b"\n")[:-1]):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            return row
    return {}


def _tail(path: Path) -> bytes:
    """The last bytes of a log; it may begin in the middle of a line. b"" when it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read(TAIL_BYTES)
    except OSError:
        return b""


def _why_no_orchestrator(tree: RunTree) -> str | None:
    """None when one seems to live. Else what its log says last, if that is an error."""
    pid = pid_in(tree)
    if pid is not None and is_alive(pid):
        return None
    log = tree.logs / "orchestrator.log"
    words = ""
    for line in plain_lines(_tail(log).decode(errors="replace")):
        if line.startswith(("=== ", "error: ")):  # the head of a start, and what it said at its end
            words = line.removeprefix("error: ") if line.startswith("error: ") else ""
    return f"no orchestrator of it runs on this machine{f'; its log ends: {words}' if words else ''}"


def read_liveness(outputs: OutputTree) -> Liveness | None:
    """None when no trainer has ever said that it is alive, or what it said cannot be read."""
    try:
        return LIVENESS.validate_json(outputs.liveness_json.read_bytes())
    except (OSError, ValidationError):
        return None


def read_slots(outputs: OutputTree) -> int | None:
    return _number_in_trainer_json(outputs, "slots")


def read_max_rank(outputs: OutputTree) -> int | None:
    """The highest rank that the trainer's slots hold; None when it never said."""
    return _number_in_trainer_json(outputs, "max_rank")


def _number_in_trainer_json(outputs: OutputTree, name: str) -> int | None:
    try:
        number = read_json(outputs.trainer_json, "what the trainer says of itself")[name]
    except (Damaged, OSError, LookupError, TypeError):
        return None
    return number if isinstance(number, int) else None


def told(status: Status) -> str:
    """A status in words: `failed at step 3: <reason>`, `active in slot 0 at step 12`."""
    words: str = status.state
    if status.state == "queued" and status.place is not None:
        words += f" at place {status.place}"
    if status.state == "active" and status.slot is not None:
        words += f" in slot {status.slot}"
    if status.step is not None:
        words += f" at step {status.step}"
    return words + (f": {status.reason}" if status.reason else "")
