"""Runs whose batches lie on disk before they are wanted, and a trainer in this process: what is timed is the trainer.

All batches of a run are said to be sampled from its step_0, and all may be that old. So the trainer never waits for
one, and it takes, learns and publishes as it would with an orchestrator beside it, and the embedded engine: no probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.bases import adapter_for
from graftwork.adapters.source import InMemory
from graftwork.config.load import dump
from graftwork.config.run import OptimizerConfig, RunConfig, SamplingConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.queue import Batch, Rollout, SampledVersion, Version, publish_batch
from graftwork.training.packer import Example
from graftwork.training.tenant import Tenant
from graftwork.training.trainer import Trainer

FOLDER = Path("outputs/bench/runs")
NEVER = 10**6
"""Steps."""
GROUP = 8
"""Answers a prompt."""
STILL = OptimizerConfig(learning_rate=1e-9)
"""Every step computes gradients, moments and new weights, and the function stays what it was: so that two sides that
step at different times have the same losses."""


def batch_of(version: Version, step: int, examples: Sequence[Example]) -> Batch:
    """The batch of a step that learns from these examples."""
    rollouts = [
        Rollout(
            prompt_index=index // GROUP, sample_index=index % GROUP, token_ids=example.token_ids,
            loss_mask=example.loss_mask, logprobs=np.where(example.loss_mask, example.sampler_logprobs, 0),
            version_index=np.where(example.loss_mask, 0, -1).astype(np.int32),
            reward=example.advantage, advantage=example.advantage,
        )
        for index, example in enumerate(examples)
    ]  # fmt: skip
    sampled = SampledVersion(version.name, version.digest, "engine")
    return Batch(version.run, step, 1.0, (sampled,), tuple(rollouts), {"next_step": step + 1})


def run_config(model: ModelConfig, sequences: int, **settings: Any) -> RunConfig:
    """Of a run that goes on for ever with so many sequences a step, and writes no checkpoint on its way."""
    return RunConfig(
        model=model,
        sampling=SamplingConfig(prompts_per_step=max(1, sequences // GROUP), samples_per_prompt=min(GROUP, sequences)),
        **{"max_steps": NEVER, "max_staleness_steps": NEVER, "checkpoint_interval_steps": NEVER, "optimizer": STILL}
        | settings,
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the file system of the checkout, not in memory: what a run writes is synced to a disk."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=FOLDER) as folder:
        yield Path(folder).absolute()


def model_of(path: Path, base: BaseModel) -> ModelConfig:
    return ModelConfig.model_validate(
        {"path": str(path), "dtype": str(base.dtype).removeprefix("torch."), "device": str(base.device)}
    )


@dataclass(frozen=True)
class MadeRuns:
    """A trainer, and runs of it that all start from one adapter, of which no factor is zero."""

    trainer: Trainer
    outputs: OutputTree

    @staticmethod
    @contextmanager
    def of(
        folder: Path, base: BaseModel, model: ModelConfig, slots: int, tokens_per_micro_batch: int
    ) -> Iterator[MadeRuns]:
        """folder: the trainer's own."""
        config = TrainerConfig(
            model=model, output_dir=str(folder), slots=slots, tokens_per_micro_batch=tokens_per_micro_batch,
            publish_probes=False,
        )  # fmt: skip
        trainer = Trainer(config, base, Disk(), InMemory(adapter_for(base)))
        claim = trainer.open()
        try:
            yield MadeRuns(trainer, OutputTree(folder))
        finally:
            claim.release()

    def admit(self, name: str, sequences: int, **settings: Any) -> Tenant:
        """A run that holds a slot, with its step_0 published."""
        tree = self.outputs.run(RunId(name))
        Disk().publish_file(tree.orch_toml, dump(run_config(self.trainer.config.model, sequences, **settings)))
        self.trainer.one_pass()
        return self.trainer.tenants[tree.id]

    @staticmethod
    def lay(tenant: Tenant, examples: Sequence[Example], steps: int) -> None:
        """The same batch for each of the run's next steps."""
        version = Version(tenant.tree.id, tenant.step, tenant.known[tenant.step][-1])
        for step in range(tenant.step + 1, tenant.step + 1 + steps):
            publish_batch(Disk(), tenant.tree, batch_of(version, step, examples))

    def step(self) -> None:
        """Passes until every run is a step further. No batch may be smaller than a micro-batch: a pass would then take
        several steps of its run."""
        target = {run: tenant.step + 1 for run, tenant in self.trainer.tenants.items()}
        while any(self.trainer.tenants[run].step < step for run, step in target.items()):
            assert self.trainer.one_pass(), "a run waits for a batch"
            assert self.trainer.tenants.keys() == target.keys(), "a run has ended: its status.json says why"
        assert {run: tenant.step for run, tenant in self.trainer.tenants.items()} == target


def rows_of(tree: RunTree) -> list[dict[str, Any]]:
    """Its lines of metrics.jsonl, one a step."""
    return list(read_lines(tree.metrics_jsonl))
