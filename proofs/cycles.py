"""Runs that come, train one step, finish and go, a thousand times in one trainer: nothing may grow."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from graftwork.config.load import dump
from graftwork.config.run import LossConfig, RunConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import load_base
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.queue import publish_batch, read_version
from graftwork.store.status import read_status
from graftwork.training.trainer import Trainer
from proofs.adapter_models import make_base
from proofs.made_up import random_batch
from proofs.report import Proof

PASSES_MAX = 10
SAMPLE_EVERY = 25
MEMORY_GROWTH = 1.02
"""Resident memory, median of the last fifth over median of the second fifth: what counts as flat."""


@dataclass(frozen=True)
class Sample:
    """Of this process and of the output tree, after a cycle whose folder is gone."""

    resident_bytes: int
    descriptors: int
    files: int
    disk_bytes: int


@dataclass
class Cycles:
    """A trainer and its tree. `samples`: one every SAMPLE_EVERY cycles."""

    trainer: Trainer
    outputs: OutputTree
    model: ModelConfig
    disk: Disk = field(default_factory=Disk)
    samples: list[Sample] = field(default_factory=list)

    def run(self, count: int) -> int:
        """Cycles that ended as they should."""
        good = 0
        for number in range(count):
            good += self.one(number)
            if number % SAMPLE_EVERY == SAMPLE_EVERY - 1:
                self.samples.append(self.sample())
        return good

    def one(self, number: int) -> bool:
        """One run from its folder's appearance to its disappearance; every third has a KL reference."""
        tree = self.outputs.run(RunId(f"cycle_{number}"))
        loss = LossConfig(kl_coefficient=0.1 if number % 3 == 0 else 0.0)
        self.disk.publish_file(tree.orch_toml, dump(RunConfig(model=self.model, max_steps=1, seed=number, loss=loss)))
        self.trainer.one_pass()
        published = read_version(tree, 0)
        if published is None:
            return False
        publish_batch(self.disk, tree, random_batch(tree.id, 1, published, seed=number))
        ended = self._until_finished(tree)
        shutil.rmtree(tree.root)
        self.trainer.one_pass()
        return ended

    def _until_finished(self, tree: RunTree) -> bool:
        for _ in range(PASSES_MAX):
            self.trainer.one_pass()
            status = read_status(tree)
            if status is not None and status.state == "finished":
                return True
        return False

    def sample(self) -> Sample:
        gc.collect()
        files = [path for path in self.outputs.root.rglob("*") if path.is_file()]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return Sample(
            resident_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
            files=len(files),
            disk_bytes=sum(path.stat().st_size for path in files),
        )


def prove_cycles(proof: Proof, count: int) -> None:
    """Memory, file descriptors and disk after warm-up (the first fifth) and at the end."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(path=str(make_base("qwen3", Path(folder))), dtype="float32", device="cpu")
        outputs = OutputTree(Path(folder) / "outputs")
        config = TrainerConfig(model=model, output_dir=str(outputs.root), slots=2)
        trainer = Trainer(config, load_base(model, LoraConfig(max_rank=4)), Disk(), None)
        claim = trainer.open()
        cycles = Cycles(trainer, outputs, model)
        proof.count("create, train one step, finish, remove: cycles", count, cycles.run(count))
        claim.release()
    fifth = max(1, len(cycles.samples) // 5)
    early, late = cycles.samples[fifth : 2 * fifth], cycles.samples[-fifth:]
    memory = [statistics.median(sample.resident_bytes for sample in part) for part in (early, late)]
    proof.figures["cycles"] = {
        "resident_mib": [round(value / 2**20, 1) for value in memory],
        "descriptors": [early[0].descriptors, late[-1].descriptors],
        "files": [early[0].files, late[-1].files],
        "disk_bytes": [early[0].disk_bytes, late[-1].disk_bytes],
    }
    proof.check(memory[1] <= MEMORY_GROWTH * memory[0], f"cycles: memory grew from {memory[0]} to {memory[1]} bytes")
    proof.check(early[0].descriptors >= late[-1].descriptors, "cycles: file descriptors grew")
    proof.check(early[0].files >= late[-1].files, "cycles: files are left behind")
    # liveness.json lists the last 50 removed runs; nothing else may be there
    proof.check(late[-1].disk_bytes <= early[0].disk_bytes + 4096, "cycles: disk use grew")
