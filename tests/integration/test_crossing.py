"""Rollouts that cross an adapter update, fed to a real trainer: which are learnt from, and with which log-probs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support import random_batch
from test_trainer import DISK, Lab, status_of

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import prepare
from graftwork.config.run import OptimizerConfig
from graftwork.config.section import ModelConfig
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Route
from graftwork.store.files import read_lines
from graftwork.store.layout import RunTree
from graftwork.store.queue import Batch, Published, Rollout, SampledVersion, publish_batch, read_version

RATE = OptimizerConfig(learning_rate=0.05)


@pytest.fixture
def lab(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path / "one", tiny, tiny_model_config)


def logprobs_under(base: BaseModel, published: Published, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """[L] of each token given those before it, by this version; 0 for the first."""
    bank = base.new_bank(1, gradients=False)
    bank.write(0, prepare(read_peft(published.path), base.spec))
    length = len(token_ids)
    tokens, rows = torch.from_numpy(token_ids.astype(np.int64)), torch.arange(length - 1)
    route = Route(bank, [Segment(0, 0, length, bank.holding(0).scale)])
    plan = PackedPlan([Group(0, 1, length)])
    with torch.no_grad():
        [(found, _)] = base.logprobs(tokens, torch.arange(length), plan, route, [Ask(rows, tokens[1:], 1.0)], 8)
    return np.concatenate([[0], found.numpy()]).astype(np.float32)


def crossing(base: BaseModel, rollout: Rollout, index: NDArray[np.int32], versions: list[Published]) -> Rollout:
    """The rollout with its token t sampled by versions[index[t]], and that version's own log-prob."""
    under = np.stack([logprobs_under(base, version, rollout.token_ids) for version in versions])
    logprobs = np.where(rollout.loss_mask, under[index, np.arange(len(index))], 0).astype(np.float32)
    index = np.where(rollout.loss_mask, index, -1).astype(np.int32)
    return replace(rollout, version_index=index, logprobs=logprobs)


def batch_of(tree: RunTree, base: BaseModel, steps: list[int], sampled_by: list[tuple[int, int]]) -> Batch:
    """Batch 4: rollout i begins with version sampled_by[i][0] and ends with [1], both places in `steps`."""
    found = [read_version(tree, step) for step in steps]
    versions = [version for version in found if version is not None]
    batch = random_batch(tree.id, 4, versions[0])
    rollouts = []
    for rollout, (first, last) in zip(batch.rollouts, sampled_by, strict=True):
        index = np.where(np.arange(len(rollout.token_ids)) < 4, first, last)
        rollouts.append(crossing(base, rollout, index, versions))
    named = tuple(SampledVersion(v.version.name, v.version.digest, "engine") for v in versions)
    return replace(batch, versions=named, rollouts=tuple(rollouts))


SAMPLED_BY = [(0, 0), (1, 0), (1, 1), (2, 0), (1, 0), (2, 2), (0, 0), (2, 1)]
"""Of versions 3, 2 and 0; with a limit of 1 step, 0 is too old for batch 4."""
KEPT = [0, 1, 2, 4, 6]


def test_each_token_has_the_log_prob_of_its_own_version_and_old_ones_are_dropped(lab: Lab, tiny: BaseModel) -> None:
    tree, trainer = lab.run("a", max_staleness_steps=1, optimizer=RATE), lab.trainer()
    lab.feed(tree, trainer, 3)
    batch = batch_of(tree, tiny, [3, 2, 0], SAMPLED_BY)
    newest = read_version(tree, 3)
    assert newest is not None
    publish_batch(DISK, tree, batch)
    lab.settle(trainer)
    assert status_of(tree).step == 4
    row = read_lines(tree.metrics_jsonl)[-1]
    assert (row["rollouts"], row["stale_rollouts"]) == (5, 3)

    kept = [batch.rollouts[i] for i in KEPT]
    gaps, losses = [], []
    for rollout in kept:
        mask = rollout.loss_mask
        policy = logprobs_under(tiny, newest, rollout.token_ids)[mask]
        gaps.append(policy - rollout.logprobs[mask])
        losses.append(-np.minimum(np.exp(gaps[-1]), 2.0) * rollout.advantage * policy)
    assert np.abs(gaps[0]).max() < 1e-4, "sampled by the version that learns"
    assert np.abs(gaps[1][0]) > 1e-2 and np.abs(gaps[1][1:]).max() < 1e-4, "its first sampled token by the one before"
    assert np.abs(gaps[2]).min() > 1e-5 and np.abs(gaps[2]).max() > 1e-2
    assert row["loss_tokens"] == len(np.concatenate(gaps))
    assert row["mismatch_mean"] == pytest.approx(np.abs(np.concatenate(gaps)).mean(), rel=1e-3)
    assert row["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-3)


def test_what_is_dropped_leaves_no_trace_in_the_weights(lab: Lab, tiny: BaseModel, tmp_path: Path) -> None:
    """The same run, fed the rollouts that are kept and nothing else, has the same version 4 to the bit."""
    other = Lab(tmp_path / "two", tiny, lab.model)
    digests = []
    for place, only in ((lab, range(8)), (other, KEPT)):
        tree, trainer = place.run("a", max_staleness_steps=1, optimizer=RATE), place.trainer()
        place.feed(tree, trainer, 3)
        batch = batch_of(tree, tiny, [3, 2, 0], SAMPLED_BY)
        publish_batch(DISK, tree, replace(batch, rollouts=tuple(batch.rollouts[i] for i in only)))
        place.settle(trainer)
        made = read_version(tree, 4)
        assert made is not None
        digests.append(made.version.digest)
    assert digests[0] == digests[1]


def test_a_batch_that_keeps_nothing_is_stale_and_another_is_awaited(lab: Lab, tiny: BaseModel) -> None:
    tree, trainer = lab.run("a", max_staleness_steps=1, optimizer=RATE), lab.trainer()
    lab.feed(tree, trainer, 3)
    publish_batch(DISK, tree, batch_of(tree, tiny, [3, 1], [(0, 1)] * 8))
    lab.settle(trainer)
    status = status_of(tree)
    assert (status.state, status.step, status.wanted_batch) == ("active", 3, 4) and not tree.batch(4).exists()
    assert "sampled from step 1; the oldest allowed is 2" in str(status.reason)
    lab.feed(tree, trainer, 4)
    assert read_lines(tree.metrics_jsonl)[-1]["stale_rollouts"] == 0
