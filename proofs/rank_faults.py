"""A rank fails while a checkpoint is written. On every rank, by on_ranks.py:

errors   for each rank r and each storage operation k of a checkpoint ("all", or "r:k,r:k"): k fails on r with "no space
         left". Then the run must fail with that reason, nothing of the checkpoint may be visible, all ranks must have
         logged the same, and a resume must end with the bytes of the run that nothing happened to.
kill     rank r dies right after its operation k ("r:k"); torchrun starts the job again.

An operation is one primitive of `store/disk.py` under the run's checkpoints/. Each rank counts its own; k = 0 is the
last, -1 the one before it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graftwork.config.load import dump, load
from graftwork.config.run import AdapterConfig, LossConfig, RunConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import GraftworkError
from graftwork.model.base import BaseModel, Placement, load_base
from graftwork.parallel.ranks import Ranks, restarts
from graftwork.store.checkpoint import open_checkpoint
from graftwork.store.disk import Disk
from graftwork.store.files import Content, is_stable
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.queue import publish_batch, read_version
from graftwork.store.status import read_status
from graftwork.training.trainer import Trainer
from graftwork.training.worker import worker_of
from proofs.made_up import random_batch
from proofs.workload import Unsynced, settle, wanted

SLOT_RANK, MAX_STEPS, INTERVAL = 4, 4, 2
RUN = RunId("kl")
KILLED = 137


class Armed(Unsynced):
    """Counts the primitives under `folder`, and breaks number `at`: an error, or the end of the process."""

    def __init__(self, folder: Path, at: int | None = None, *, kill: bool = False) -> None:
        self.folder, self.at, self.kill, self.count = folder, at, kill, 0
        self.counts = True

    def _do(self, path: Path, work: Callable[[], None]) -> None:
        meant = False
        if self.counts and path.is_relative_to(self.folder):
            self.count += 1
            meant = self.count == self.at
        if meant and not self.kill:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        work()
        if meant:
            os._exit(KILLED)

    def make_folder(self, path: Path) -> None:
        self._do(path, partial(super().make_folder, path))

    def write(self, path: Path, data: Content) -> None:
        self._do(path, partial(super().write, path, data))

    def sync_folder(self, path: Path) -> None:
        self._do(path, partial(super().sync_folder, path))

    def rename(self, source: Path, target: Path) -> None:
        self._do(target, partial(super().rename, source, target))


class Heard(logging.Handler):
    """What this rank logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@dataclass
class Lab:
    """One rank's. Every attempt has a tree of its own."""

    ranks: Ranks
    base: BaseModel
    model: ModelConfig
    folder: Path
    heard: Heard = field(default_factory=Heard)

    @staticmethod
    def of(ranks: Ranks, base: str, folder: Path) -> Lab:
        model = ModelConfig(path=base, dtype="float32", device="cpu")
        lab = Lab(ranks, load_base(model, LoraConfig(max_rank=SLOT_RANK), Placement(ranks)), model, folder)
        logger = logging.getLogger("graftwork")
        logger.handlers = [lab.heard]
        logger.propagate = False
        return lab

    def tree(self, name: str) -> RunTree:
        return OutputTree(self.folder / name).run(RUN)

    def config(self, name: str) -> TrainerConfig:
        return TrainerConfig(
            model=self.model, lora=LoraConfig(max_rank=SLOT_RANK), output_dir=str(self.folder / name), slots=2,
            tokens_per_micro_batch=40, ranks=self.ranks.size,
        )  # fmt: skip

    def lay(self, name: str) -> None:
        """Rank 0: a run that has not begun."""
        config = RunConfig(
            model=self.model, max_steps=MAX_STEPS, checkpoint_interval_steps=INTERVAL,
            loss=LossConfig(kl_coefficient=0.1), adapter=AdapterConfig(rank=SLOT_RANK),
        )  # fmt: skip
        Disk().publish_file(self.tree(name).orch_toml, dump(config))

    def live(self, name: str, disk: Armed) -> None:
        """One trainer, of all ranks, until nothing is left to do. The disk counts from the run's admission on."""
        if not self.ranks.leads:
            worker_of(self.config(name), self.base, disk, None).follow()
            return
        trainer, tree = Trainer(self.config(name), self.base, disk, None), self.tree(name)
        claim = trainer.open()
        disk.counts = False  # a step_0 is made by one rank, before there is a run
        trainer.one_pass()
        disk.counts = True
        settle(trainer)
        while (batch := wanted(tree)) and trainer.tenants:
            published = read_version(tree, batch - 1)
            assert published is not None
            if not is_stable(tree.batch(batch)):
                publish_batch(Disk(), tree, random_batch(RUN, batch, published))
            settle(trainer)
        trainer.crew.quit()
        claim.release()


def bytes_of(tree: RunTree) -> dict[str, bytes]:
    """What the run came to: the trainer's files of its last checkpoint, and its chain of versions."""
    last = tree.checkpoint(MAX_STEPS) / "trainer"
    return {path.name: path.read_bytes() for path in [*sorted(last.glob("*")), tree.chain_jsonl]}


# --- errors -----------------------------------------------------------------------------------------------------------


def errors(ranks: Ranks, base: str, folder: str, which: str) -> dict[str, Any]:
    lab = Lab.of(ranks, base, Path(folder))
    if ranks.leads:
        lab.lay("whole")
    first = Armed(lab.tree("whole").checkpoints)
    lab.live("whole", first)
    # Of the run's two checkpoints, each writes as much: the first is the one that is broken.
    counts = ranks.gather(first.count // (MAX_STEPS // INTERVAL))
    asked = [(rank, k) for rank, count in enumerate(counts) for k in range(1, count + 1)]
    if which != "all":
        asked = [(int(r), int(k) if int(k) > 0 else counts[int(r)] + int(k)) for r, k in pairs(which)]
    failures, slowest = [], 0.0
    for rank, k in asked:
        began = time.monotonic()
        wrong = attempt_error(lab, rank, k)
        slowest = max(slowest, time.monotonic() - began)
        failures += [f"rank {rank}, operation {k}: {text}" for text in wrong]
    return {"operations": counts, "asked": len(asked), "failures": failures, "slowest_seconds": round(slowest, 1)}


def pairs(text: str) -> list[list[str]]:
    return [pair.split(":") for pair in text.split(",")]


def attempt_error(lab: Lab, rank: int, k: int) -> list[str]:
    """What is wrong after operation k failed on a rank; the same on every rank."""
    name = f"error_{rank}_{k}"
    tree, wrong = lab.tree(name), list[str]()
    lab.heard.texts.clear()
    if lab.ranks.leads:
        lab.lay(name)
    lab.live(name, Armed(tree.checkpoints, k if lab.ranks.rank == rank else None))
    said = lab.ranks.gather(lab.heard.texts)
    if lab.ranks.leads:
        wrong += _failed_with_a_word(tree, rank)
        if any(texts != said[0] for texts in said) or len(said[0]) != 1:
            wrong.append(f"the ranks say {said}")
        Disk().publish_file(tree.orch_toml, dump(load(RunConfig, tree.orch_toml).model_copy(update={"resume": True})))
    lab.live(name, Armed(tree.checkpoints))
    if lab.ranks.leads:
        if bytes_of(tree) != bytes_of(lab.tree("whole")):
            wrong.append("after a resume it ended with other bytes")
        shutil.rmtree(lab.folder / name)
    return lab.ranks.gather(wrong)[0]


def _failed_with_a_word(tree: RunTree, rank: int) -> list[str]:
    status, wrong = read_status(tree), []
    reason = "" if status is None else str(status.reason)
    if status is None or status.state != "failed" or os.strerror(errno.ENOSPC) not in reason:
        wrong.append(f"the run is {status and status.state}: {reason}")
    if rank and f"rank {rank}:" not in reason:
        wrong.append(f"the reason names no rank: {reason}")
    if left := [path.name for path in tree.checkpoints.iterdir() if path.name != "step_0"]:
        wrong.append(f"{left} is left in checkpoints/")
    try:
        open_checkpoint(tree.checkpoints)
    except GraftworkError as error:
        wrong.append(f"the checkpoint before it cannot be used: {error}")
    return wrong


# --- kills ------------------------------------------------------------------------------------------------------------


def kill(ranks: Ranks, base: str, folder: str, which: str) -> dict[str, Any]:
    """One kill; torchrun's second start of the job ends it."""
    lab, [(rank, k)] = Lab.of(ranks, base, Path(folder)), pairs(which)
    second = restarts() > 0
    armed = not second and ranks.rank == int(rank)
    if ranks.leads and not second:
        lab.lay("killed")
    lab.live("killed", Armed(lab.tree("killed").checkpoints, int(k) if armed else None, kill=True))
    if ranks.leads:
        lab.lay("whole")
    lab.live("whole", Armed(lab.tree("whole").checkpoints))
    same = not ranks.leads or bytes_of(lab.tree("killed")) == bytes_of(lab.tree("whole"))
    return {"killed": second, "same": same}
