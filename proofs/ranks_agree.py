"""What several ranks compute against what one computes. On every rank, by on_ranks.py:

fills       full tensors laid out over ranks by `fill`, and put together again
slots       adapters written into slots, one after the other, and taken out again
gradients   a step's gradient on all ranks, the base sharded and replicated, against the gradient on one
train       three steps of a run from its step_0 in one folder, and its checkpoint in another
carry       a run's newest checkpoint of one folder, taken up and written into another
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from graftwork.adapters.prepare import prepare
from graftwork.adapters.snapshot import Snapshot, snapshot_of
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig, RunConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import BaseModel, Placement, load_base
from graftwork.parallel.parts import fill, whole
from graftwork.parallel.ranks import Ranks
from graftwork.store.disk import Disk
from graftwork.training.crew import Crew
from graftwork.training.learner import Banks, Learner, LearnerConfig, gradient_norm, learn
from graftwork.training.packer import Example
from graftwork.training.start import open_start
from graftwork.training.worker import Worker
from proofs.adapter_models import VOCAB
from proofs.made_up import random_adapter

SLOT_RANK, SLOTS, BUDGET = 4, 3, 40
STEPS = 3
RUNS: Sequence[tuple[int, LossConfig | None, Sequence[int]]] = (
    (4, LossConfig(), (5, 9, 9, 12, 7, 30, 6)),
    (1, LossConfig(kl_coefficient=0.5, normaliser="sequence_mean"), (7, 7, 21)),
    (3, None, (11,)),
)
"""Rank, loss and lengths of sequences: more than one micro-batch a rank, fewer than ranks, one alone."""


def model_config(base: str) -> ModelConfig:
    return ModelConfig(path=base, dtype="float32", device="cpu")


def based(base: str, placement: Placement) -> BaseModel:
    return load_base(model_config(base), LoraConfig(max_rank=SLOT_RANK), placement)


def examples_of(lengths: Sequence[int], seed: int) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(0, VOCAB, length).astype(np.int32), np.arange(length) >= 2,
            (-4 * rng.random(length)).astype(np.float32), float(rng.normal()),
        )
        for length in lengths
    ]  # fmt: skip


def snapshot_for(base: BaseModel, rank: int, seed: int) -> Snapshot:
    """A start with random factors, and another adapter as the KL reference."""
    adapter, other = (random_adapter(base.spec.shapes, rank, seed=seed + i) for i in range(2))
    made = snapshot_of(prepare(InMemory(adapter), base.spec), base.fingerprint)
    return Snapshot(made.state, made.adapter, None, other, None)


# --- parts ------------------------------------------------------------------------------------------------------------


def fills(ranks: Ranks) -> dict[str, Any]:
    """Placements and shapes (dense, experts, fewer rows than ranks) for which the whole is not what it was filled with,
    or for which something beside the rank's own part was written."""
    assert ranks.mesh is not None
    wrong, tried = [], 0
    for shape in ((7, 5), (12, 3, 4), (1, 6), (3,), (16, 1)):
        for placement in (Shard(0), Shard(len(shape) - 1), Replicate()):
            source = torch.arange(float(math.prod(shape))).view(shape) + 1
            target = distribute_tensor(torch.zeros(shape), ranks.mesh, [placement])
            room = target.to_local()
            fill(target, source)
            tried += 1
            if not torch.equal(whole(target), source) or room.data_ptr() != target.to_local().data_ptr():
                wrong.append(f"{shape} {placement}")
    return {"tried": tried, "wrong": wrong}


def slots(ranks: Ranks, base: str) -> list[str]:
    """What is not so when adapters come into slots of several ranks and go: of every rank."""
    own = based(base, Placement(ranks))
    bank = own.new_bank(SLOTS, gradients=True)
    adapters = [prepare(InMemory(random_adapter(own.spec.shapes, rank, seed=rank)), own.spec) for rank in (1, 3)]
    wrong = []
    for slot, prepared in ((0, adapters[0]), (2, adapters[1])):
        before = bank.weights.clone()
        bank.write(slot, prepared)
        others = [other for other in range(SLOTS) if other != slot]
        if not torch.equal(bank.weights[others], before[others]):
            wrong.append(f"writing slot {slot} touched another")
        if bank.read(slot).digest() != prepared.adapter.digest():
            wrong.append(f"slot {slot} does not hold what was written")
        factors = next(iter(bank.factors.values()))
        if not bool(factors.b[slot].any()) or bool(factors.b[1].any()):
            wrong.append(f"what the layers compute with is not what slot {slot} holds")
    bank.reset(2)
    if bank.weights[1:].count_nonzero() or bank.read(0).digest() != adapters[0].adapter.digest():
        wrong.append("a reset left something, or took something else")
    return [f"rank {rank}: {text}" for rank, texts in enumerate(ranks.gather(wrong)) for text in texts]


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(ranks: Ranks, base: str) -> dict[str, Any]:
    """|difference| / |gradient of one rank|, by placement and by whether the runs share their micro-batches."""
    alone = gradients_on(based(base, Placement(Ranks.alone())), together=False)
    found = {}
    for sharded in (True, False):
        own = based(base, Placement(ranks, sharded=sharded))
        for together in (False, True):
            pairs = zip(gradients_on(own, together=together), alone, strict=True)
            name = f"{'sharded' if sharded else 'replicated'}{', mixed' if together else ''}"
            found[name] = max(float((ours - one).norm() / one.norm()) for ours, one in pairs)
    return found


def gradients_on(base: BaseModel, *, together: bool) -> list[Tensor]:
    """Each run's whole gradient [P]."""
    banks = Banks.of(base, SLOTS)
    learners = []
    for slot, (rank, loss, lengths) in enumerate(RUNS):
        config = LearnerConfig(OptimizerConfig(), loss, 1.0, BUDGET, 16)
        learners.append(Learner(banks, slot, config, snapshot_for(base, rank, slot)))
        learners[-1].feed(examples_of(lengths, slot))
    while left := [one for one in learners if one.rounds]:
        learn(left if together else left[:1])
    for one in learners:
        one.report()
    rows = [one.optimizer.parameter.grad for one in learners]
    return [whole(row).clone() for row in rows if row is not None]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def led(ranks: Ranks, base: str, work: Callable[[Crew], dict[str, Any]]) -> dict[str, Any]:
    """Rank 0 does the work with a crew of all ranks; the others follow."""
    own = based(base, Placement(ranks))
    worker = Worker(own, Banks.of(own, SLOTS), Disk())
    if not ranks.leads:
        worker.follow()
        return {}
    crew = Crew(worker, idle_seconds=60)
    found = work(crew)
    crew.quit()
    return found


def seated(crew: Crew, base: str, run: Path) -> Learner:
    """The run of a folder, in slot 1, from its newest checkpoint."""
    config = RunConfig(model=model_config(base), adapter=AdapterConfig(), loss=LossConfig(kl_coefficient=0.1))
    learner = LearnerConfig(config.optimizer, config.loss, 1.0, BUDGET, 16)
    checkpoint, snapshot = open_start(
        run / "checkpoints", None, crew.worker.base, config.adapter, 0, needs_reference=True
    )
    return crew.seat(1, checkpoint, snapshot, config, learner)


def train(ranks: Ranks, base: str, source: str, target: str) -> dict[str, Any]:
    def work(crew: Crew) -> dict[str, Any]:
        one = seated(crew, base, Path(source))
        for step in range(1, STEPS + 1):
            crew.feed(one, examples_of((5, 9, 9, 12, 7, 30, 6), step))
            while one.rounds:
                crew.learn([one])
            crew.step(one, f"batch {step}", gradient_norm(crew.reports(one)))
        return saved(crew, one, Path(target))

    return led(ranks, base, work)


def carry(ranks: Ranks, base: str, source: str, target: str) -> dict[str, Any]:
    return led(ranks, base, lambda crew: saved(crew, seated(crew, base, Path(source)), Path(target)))


def saved(crew: Crew, one: Learner, target: Path) -> dict[str, Any]:
    """The files of the checkpoint, and what they hold when put together."""
    if target.exists():
        shutil.rmtree(target)
    crew.save(one, target / "checkpoints", None, AdapterFacts("base"))
    _, snapshot = open_start(target / "checkpoints", None, crew.worker.base, AdapterConfig(), 0, needs_reference=True)
    crew.vacate(one.slot)
    files = sorted(path.name for path in (target / "checkpoints").glob("step_*/trainer/*"))
    moments = [moment.digest() for moment in snapshot.moments or ()]
    return {"files": files, "step": snapshot.state.step, "masters": snapshot.adapter.digest(), "moments": moments}
