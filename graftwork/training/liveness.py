"""`liveness.json`: that the trainer is alive, and who had how much of it. For people and `graftwork runs`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from graftwork.parallel.ranks import job_pid
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId
from graftwork.training.tenant import Tenant

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
"""At most one file a second."""
WINDOW_SECONDS = 60.0
"""Shares are of the tokens that were learnt in the last minute."""
REMOVED_KEPT = 50


@dataclass
class Liveness:
    """Times are seconds since 1970: other processes read them."""

    disk: Disk
    outputs: OutputTree
    published: float = 0.0
    learnt: deque[tuple[float, RunId, int]] = field(default_factory=deque)
    last_batch: dict[RunId, float] = field(default_factory=dict)
    removed: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=REMOVED_KEPT))

    def note_learnt(self, run: RunId, tokens: int) -> None:
        now = time.time()
        self.learnt.append((now, run, tokens))
        self.last_batch[run] = now

    def note_removed(self, run: RunId, step: int) -> None:
        self.removed.append({"run": str(run), "step": step, "time": time.time()})

    def publish(self, passes: int, tenants: Mapping[RunId, Tenant]) -> None:
        """Write the file, if it is time. That it cannot be written is said, and stops nobody."""
        now = time.time()
        if 0 <= now - self.published < INTERVAL_SECONDS:
            return
        self.published = now
        while self.learnt and not 0 <= now - self.learnt[0][0] <= WINDOW_SECONDS:
            self.learnt.popleft()
        self.last_batch = {run: when for run, when in self.last_batch.items() if run in tenants}
        shares = shares_of((run, tokens) for _, run, tokens in self.learnt)
        runs = {
            str(run): {
                "slot": tenant.learner.slot, "step": tenant.step, "tokens": tenant.tokens_learnt,
                "share": shares.get(run, 0.0), "last_batch_time": self.last_batch.get(run),
            }
            for run, tenant in tenants.items()
        }  # fmt: skip
        self._write({"passes": passes, "runs": runs})

    def end(self, passes: int) -> None:
        """The last sign, of a trainer that ends as it should: nobody has to wait until it is too old to believe."""
        self._write({"passes": passes, "runs": {}, "ended": True})

    def _write(self, about: Mapping[str, Any]) -> None:
        sign = {"pid": job_pid(), "time": time.time(), **about, "removed": list(self.removed)}
        try:
            self.disk.publish_json(self.outputs.liveness_json, sign)
        except OSError as error:
            log.warning("cannot write %s: %s", self.outputs.liveness_json, error)


def shares_of(learnt: Iterable[tuple[RunId, int]]) -> dict[RunId, float]:
    """Each run's part of all tokens, 0 to 1."""
    tokens: dict[RunId, int] = {}
    for run, count in learnt:
        tokens[run] = tokens.get(run, 0) + count
    total = sum(tokens.values())
    return {run: count / total for run, count in tokens.items()} if total else {}
