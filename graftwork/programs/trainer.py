"""`graftwork trainer`: load the base, open the output tree, make passes until told to stop.

With several ranks the same program runs in each, started by torchrun: rank 0 decides, the others follow.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event

import torch

from graftwork import logs
from graftwork.config.schema import TrainerConfig
from graftwork.errors import RankLost
from graftwork.model.base import BaseModel, Placement, load_base, pick_device
from graftwork.parallel.ranks import Ranks, restarts, torchrun_store, under_torchrun
from graftwork.parallel.watch import Watch
from graftwork.programs.processes import PARENT_VARIABLE
from graftwork.store.disk import Disk
from graftwork.training.trainer import Trainer
from graftwork.training.worker import door_at, worker_of

log = logging.getLogger(__name__)


def main(config: TrainerConfig) -> None:
    """Returns after SIGTERM or SIGINT, or when every run ended and the configuration asks for that."""
    if config.ranks > 1 and not under_torchrun():
        become_torchrun(config, sys.argv[1:])
    use_threads(config.threads)
    with joined(config) as ranks:
        placement = Placement(
            ranks, sharded=config.base_placement == "sharded",
            activation_checkpointing=config.activation_checkpointing, compile_layers=config.compile_layers,
        )  # fmt: skip
        device = pick_device(config.model.device)
        if config.gpu_memory_fraction is not None and device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(config.gpu_memory_fraction, device)
        base = load_base(config.model, config.lora, placement)
        if ranks.leads:
            lead(config, base)
        else:
            follow(config, base)
    if under_torchrun():
        ranks.exit()


def lead(config: TrainerConfig, base: BaseModel) -> None:
    """The trainer itself, of one rank or of all."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    trainer = Trainer(config, base, Disk(), door_at(config.init_adapter_path))
    claim = trainer.open()
    several = f"{base.ranks.size} ranks, " if base.ranks.size > 1 else ""
    log.info("trainer: %s%d slots on %s (%s, %s), watching %s", several, config.slots, config.model.path,
             base.dtype, base.device, trainer.outputs.root)  # fmt: skip
    trainer.some_ended = restarts() > 0  # runs may have ended under the job's earlier start
    trainer.run(stop)
    trainer.crew.quit()
    claim.release()


def follow(config: TrainerConfig, base: BaseModel) -> None:
    """Any other rank: it ends when rank 0 says so, or is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    worker_of(config, base, Disk(), door_at(config.init_adapter_path)).follow()


# --- ranks ------------------------------------------------------------------------------------------------------------


def become_torchrun(config: TrainerConfig, arguments: list[str]) -> None:
    """Go on as torchrun, under this process's id, which starts `graftwork <arguments>` once a rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks}",
                f"--max-restarts={config.max_restarts}"]  # fmt: skip
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the ranks must not outlive it
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "graftwork", *arguments])


@contextmanager
def joined(config: TrainerConfig) -> Iterator[Ranks]:
    """This process among the ranks that torchrun started, watched; or alone. Raises RankLost, naming the rank that is
    to blame, when they cannot go on together."""
    if not under_torchrun():
        yield Ranks.alone()
        return
    seconds = config.rank_timeout_seconds
    take_own_gpu(config.model.device)
    ranks = Ranks.of_torchrun(pick_device(config.model.device), seconds + 60)  # the watch comes first
    store = torchrun_store(timedelta(seconds=seconds))
    logs.set_up(ranks.rank, anew=True)
    with Watch(ranks.rank, ranks.size, store, seconds) as watch:
        ranks.watch = watch
        try:
            yield ranks
        except RankLost as lost:
            raise RankLost(f"{watch.culprits()}. Rank {ranks.rank}: {lost}") from lost


def take_own_gpu(device: str) -> None:
    """Of a machine's GPUs each rank has its own, as the current one: where the configuration names none by number."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def use_threads(threads: int) -> None:
    """CPU threads of torch's matrix products; 0 leaves torch's own choice, one a core."""
    if threads:
        torch.set_num_threads(threads)
