"""What of a run's folder can go: what no reader and no resume can need any more."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from graftwork.config.run import RunConfig
from graftwork.store.disk import RETIRED_PREFIX, Disk
from graftwork.store.layout import RunTree, stable_steps, step_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Needed:
    """The oldest batch and the oldest version that must stay."""

    batch: int
    version: int


def needed(config: RunConfig, step: int, newest_checkpoint: int) -> Needed:
    """step: of the run's newest version.

    A batch is needed until a checkpoint has consumed it. A version is needed while a batch that comes may have been
    sampled from it, and where a resume from the newest checkpoint would sample from it.
    """
    if config.retention.history:
        return Needed(0, 0)
    return Needed(
        newest_checkpoint + 1, max(0, min(step - config.max_staleness_steps, newest_checkpoint - config.lag_steps))
    )


class Retention:
    """Retires what is no longer needed. It asks for folders by name: a flood of batches that nobody waits for costs
    nothing. A folder that cannot be deleted is a matter of disk space, not of the run: it is logged and left."""

    def __init__(self, disk: Disk, tree: RunTree, config: RunConfig, step: int) -> None:
        """step: that the run is at. Later batches are counted when they were consumed."""
        self.disk, self.tree, self.config = disk, tree, config
        self.batches = [old for old in stable_steps(tree.rollouts) if old <= step]
        self.versions = [*(old for old in stable_steps(tree.broadcasts) if old < step), step]

    def sweep(self) -> None:
        """Finish what a killed trainer had begun to retire."""
        try:
            self.disk.sweep(self.tree.trash, RETIRED_PREFIX)
        except OSError as error:
            self._leave(self.tree.trash, error)

    def tidy(self, step: int, newest_checkpoint: int) -> None:
        """After a step: its batch was consumed, its version published."""
        self.batches.append(step)
        self.versions.append(step)
        bounds = needed(self.config, step, newest_checkpoint)
        self._retire_before(bounds.batch, self.batches, self.tree.rollouts)
        self._retire_before(bounds.version, self.versions, self.tree.broadcasts)

    def tidy_checkpoints(self) -> None:
        """After a checkpoint was published."""
        for old in stable_steps(self.tree.checkpoints)[: -self.config.retention.checkpoints]:
            self._retire(step_folder(self.tree.checkpoints, old))

    def _retire_before(self, bound: int, steps: list[int], parent: Path) -> None:
        """In order: what cannot go now is tried again after the next step, and leaves no hole behind it."""
        while steps and steps[0] < bound and self._retire(step_folder(parent, steps[0])):
            steps.pop(0)

    def _retire(self, folder: Path) -> bool:
        """Whether it is gone."""
        if not folder.exists():
            return True
        try:
            self.disk.retire(folder, self.tree.trash)
        except OSError as error:
            self._leave(folder, error)
        return not folder.exists()

    def _leave(self, folder: Path, error: OSError) -> None:
        log.warning("run %s: %s is no longer needed and cannot be deleted: %s", self.tree.id, folder, error)
