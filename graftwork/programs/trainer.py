"""`graftwork trainer`: load the base, open the output tree, make passes until told to stop."""

from __future__ import annotations

import logging
import signal
from threading import Event

import torch

from graftwork.config.schema import TrainerConfig
from graftwork.model.base import load_base
from graftwork.store.disk import Disk
from graftwork.training.trainer import Trainer, door_at

log = logging.getLogger(__name__)


def main(config: TrainerConfig) -> None:
    """Returns after SIGTERM or SIGINT, or when every run ended and the configuration asks for that."""
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    use_threads(config.threads)
    trainer = Trainer(config, load_base(config.model, config.lora), Disk(), door_at(config.init_adapter_path))
    claim = trainer.open()
    log.info("trainer: %d slots on %s (%s, %s), watching %s", config.slots, config.model.path, trainer.base.dtype,
             trainer.base.device, trainer.outputs.root)  # fmt: skip
    trainer.run(stop)
    claim.release()


def use_threads(threads: int) -> None:
    """CPU threads of torch's matrix products; 0 leaves torch's own choice, one a core."""
    if threads:
        torch.set_num_threads(threads)
