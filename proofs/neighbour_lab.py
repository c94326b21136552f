"""What the scenarios of neighbours.py are played with: a tiny base, trainers with a clock and a disk of their own, and
the good run as it is alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from graftwork.adapters.convert import convert_adapter
from graftwork.config.load import dump
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig, RetentionConfig, RunConfig, SamplingConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import Damaged
from graftwork.model.base import BaseModel, load_base
from graftwork.store.disk import Disk
from graftwork.store.files import Content, pieces, read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.queue import Batch, Rollout, SampledVersion, Version, publish_batch, read_version
from graftwork.store.status import Status, read_status
from graftwork.training.trainer import Trainer
from proofs.adapter_models import VOCAB, make_base, save_with_peft

Variant = Literal["fresh", "kl", "warm"]
VARIANTS: tuple[Variant, ...] = ("fresh", "kl", "warm")
GOOD = RunId("good")
TOKENS_PER_MICRO_BATCH = 40
PROMPTS, SAMPLES = 2, 4
SHORTEST, LONGEST = 6, 11
"""Tokens of a rollout: a full batch of 8 is more than one micro-batch, one of 2 leaves room for another run's."""
MAX_STEPS = 6
TIMES = ("train_seconds", "turn_wait_seconds", "wait_seconds", "tokens_per_second")
"""Columns of metrics.jsonl that hold times."""


def made_up_batch(
    run: RunId, step: int, version: Version, rng: np.random.Generator, lengths: Sequence[int],
    advantage: float | None = None,
) -> Batch:  # fmt: skip
    """A well-formed batch that is said to be sampled from `version`. advantage: of every rollout; else drawn."""
    rollouts = []
    for index, length in enumerate(lengths):
        mask = np.arange(length) >= 3
        rollouts.append(
            Rollout(
                prompt_index=index // SAMPLES,
                sample_index=index % SAMPLES,
                token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -4 * rng.random(length), 0).astype(np.float32),
                version_index=np.where(mask, 0, -1).astype(np.int32),
                reward=float(rng.random()),
                advantage=float(rng.normal()) if advantage is None else advantage,
            )
        )
    sampled = SampledVersion(version.name, version.digest, "engine")
    return Batch(run, step, 1.0, (sampled,), tuple(rollouts), {"next_step": step + 1})


@dataclass
class Clock:
    """Seconds that nothing moves but a scenario. `deeds` are done at each reading: the trainer reads it before and
    after every micro-batch."""

    now: float = 0.0
    pace_seconds: float = 1.0
    deeds: list[Callable[[], None]] = field(default_factory=list)

    def __call__(self) -> float:
        for deed in tuple(self.deeds):
            deed()
        return self.now

    def next_pass(self) -> None:
        self.now += self.pace_seconds


@dataclass
class SceneDisk(Disk):
    """Without fsync: no power cut comes here. `deeds` are done before a folder or file gets its name."""

    deeds: list[Callable[[Path], None]] = field(default_factory=list)

    def write(self, path: Path, data: Content) -> None:
        with path.open("xb") as file:
            file.writelines(pieces(data))

    def sync_file(self, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        if not path.is_dir():
            raise FileNotFoundError(path)

    def rename(self, source: Path, target: Path) -> None:
        for deed in tuple(self.deeds):
            deed(target)
        super().rename(source, target)


@dataclass(frozen=True)
class Scene:
    """What the runs of a scenario have in common. good: the run that must notice nothing."""

    outputs: OutputTree
    trainer: Trainer
    clock: Clock
    disk: SceneDisk
    good: RunTree


# --- the good run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What must be equal. digests: of every published version. files: bytes, by path. rows: without times."""

    digests: Sequence[str]
    files: Mapping[str, bytes]
    rows: Sequence[Mapping[str, Any]]

    @staticmethod
    def of(tree: RunTree) -> Record:
        paths = [tree.chain_jsonl, *sorted(tree.checkpoints.glob("step_*/**/*"))]
        return Record(
            [_digest_of(tree, step) for step in stable_steps(tree.broadcasts)],
            {path.relative_to(tree.root).as_posix(): path.read_bytes() for path in paths if path.is_file()},
            [{k: v for k, v in row.items() if k not in TIMES} for row in read_lines(tree.metrics_jsonl)],
        )

    def differences(self, other: Record) -> Iterator[str]:
        if self.digests != other.digests:
            yield f"published digests {other.digests}, expected {self.digests}"
        for path in sorted(self.files.keys() | other.files.keys()):
            if self.files.get(path) != other.files.get(path):
                yield f"{path} differs"
        if len(self.rows) != len(other.rows):
            yield f"metrics.jsonl has {len(other.rows)} rows, expected {len(self.rows)}"
        for ours, theirs in zip(self.rows, other.rows, strict=False):
            if wrong := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
                yield f"metrics.jsonl, step {ours['step']}: {', '.join(wrong)} differ"


def _digest_of(tree: RunTree, step: int) -> str:
    try:
        published = read_version(tree, step)
    except Damaged as error:
        return str(error)
    return "none" if published is None else published.version.digest


class Lab:
    """A base, trainers over it, and the good run of each variant as it is alone."""

    def __init__(self, folder: Path, base: BaseModel, model: ModelConfig) -> None:
        self.folder, self.base, self.model = folder, base, model

    @cached_property
    def alone(self) -> Mapping[Variant, RunTree]:
        return {variant: self._train_alone(variant) for variant in VARIANTS}

    @cached_property
    def records(self) -> Mapping[Variant, Record]:
        records = {variant: Record.of(tree) for variant, tree in self.alone.items()}
        for variant, record in records.items():
            assert len(set(record.digests)) == MAX_STEPS + 1, f"{variant}: some step of the good run changed nothing"
        return records

    @cached_property
    def adapter(self) -> Path:
        """What the warm variant starts from."""
        return save_with_peft(Path(self.model.path), self.folder / "adapter", r=4, lora_alpha=8)

    @staticmethod
    def make(folder: Path) -> Lab:
        torch.set_num_threads(1)
        model = ModelConfig(path=str(make_base("qwen3", folder)), dtype="float32", device="cpu")
        return Lab(folder, load_base(model, LoraConfig(max_rank=4)), model)

    def trainer(self, outputs: OutputTree, slots: int, clock: Clock, disk: Disk) -> Trainer:
        """With micro-batches of TOKENS_PER_MICRO_BATCH."""
        config = TrainerConfig(
            model=self.model, output_dir=str(outputs.root), slots=slots, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH
        )
        return Trainer(config, self.base, disk, None, clock)

    def config(self, **settings: Any) -> RunConfig:
        sampling = SamplingConfig(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES)
        settings = {"max_steps": MAX_STEPS, "checkpoint_interval_steps": 2, "sampling": sampling, **settings}
        return RunConfig(model=self.model, **settings)

    def begin(self, outputs: OutputTree, variant: Variant) -> RunTree:
        """The good run's folder, before its first pass."""
        tree = outputs.run(GOOD)
        config = self.config(
            seed=7,
            adapter=AdapterConfig(rank=3 if variant == "fresh" else 4),
            loss=LossConfig(kl_coefficient=0.1 if variant == "kl" else 0.0),
            optimizer=OptimizerConfig(schedule="cosine", decay_steps=9, warmup_steps=2, weight_decay=0.1),
            retention=RetentionConfig(checkpoints=100, history=True),
        )
        if variant == "warm":
            convert_adapter(Disk(), self.adapter, tree.root)
        Disk().publish_file(tree.orch_toml, dump(config))
        return tree

    def _train_alone(self, variant: Variant) -> RunTree:
        outputs = OutputTree(self.folder / f"alone_{variant}")
        tree, trainer = self.begin(outputs, variant), self.trainer(outputs, 1, Clock(), SceneDisk())
        rng = np.random.default_rng(VARIANTS.index(variant))
        trainer.one_pass()
        while (tenant := trainer.tenants.get(GOOD)) is not None:
            if tenant.work is None and not tree.batch(tenant.step + 1).exists():
                version = Version(GOOD, tenant.step, tenant.known[tenant.step][-1])
                lengths = rng.integers(SHORTEST, LONGEST + 1, PROMPTS * SAMPLES).tolist()
                publish_batch(trainer.disk, tree, made_up_batch(GOOD, tenant.step + 1, version, rng, lengths))
            trainer.one_pass()
        status = status_of(tree)
        assert status is not None and status.state == "finished", f"the good run alone: {status}"
        return tree


def status_of(tree: RunTree) -> Status | None:
    """None where there is none that can be read."""
    try:
        return read_status(tree)
    except Damaged:
        return None
