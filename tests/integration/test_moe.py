"""Mixture of experts in slots: everything that a run does on a dense base, on experts too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support import VOCAB, random_adapter, random_batch, whole
from test_trainer import DISK, Lab, save_adapter, status_of, trainer_files

from graftwork.adapters.convert import FORMATS, export_adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import Wish, prepare
from graftwork.adapters.snapshot import snapshot_of
from graftwork.adapters.source import InMemory
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.inference.engine import Engine
from graftwork.inference.requests import GenerationRequest
from graftwork.lora.linear import Segment
from graftwork.model.base import BaseModel, load_base
from graftwork.model.inject import Route
from graftwork.model.logprobs import token_logprobs
from graftwork.store.queue import publish_batch, read_version
from graftwork.training.learner import Banks, Learner, LearnerConfig, gradient_norm, learn
from graftwork.training.packer import Example
from proofs.adapter_models import MIDDLE, logits, sequences

EOS = 1


@pytest.fixture
def lab(tmp_path: Path, moe: BaseModel, moe_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path, moe, moe_model_config)


def test_the_slots_have_every_projection_of_every_expert(moe: BaseModel) -> None:
    experts = {path: shape for path, shape in moe.spec.shapes.items() if ".experts." in path}
    assert len(experts) == 6 and len(moe.spec.shapes) == 14
    assert experts["model.layers.1.mlp.experts.down_proj"] == (12, 32, MIDDLE)


def test_a_run_trains_experts_and_peft_computes_what_the_trainer_computed(lab: Lab, moe_path: Path) -> None:
    tree, trainer = lab.run("a", adapter=AdapterConfig(rank=3, alpha=7.0)), lab.trainer()
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"
    first, last = (read_version(tree, step) for step in (0, 6))
    assert first is not None and last is not None
    before, after = (read_peft(version.path).adapter.pairs for version in (first, last))
    for path in before:
        assert not torch.equal(before[path].a, after[path].a) and not torch.equal(before[path].b, after[path].b)
    tokens = sequences(3)
    theirs, clear = logits(moe_path, tree.checkpoint(6) / "weight", tokens)
    bank = lab.base.new_bank(1, gradients=False)
    bank.write(0, prepare(read_peft(tree.checkpoint(6) / "weight"), lab.base.spec))
    ours = our_logits(lab.base, bank, tokens)
    assert (ours - theirs)[clear].abs().max() < 1e-4


@torch.no_grad()
def our_logits(base: BaseModel, bank: object, tokens: torch.Tensor) -> torch.Tensor:
    from test_peft_agrees import our_logits

    segment = Segment(0, 0, tokens.numel(), bank.holding(0).scale)  # type: ignore[attr-defined]
    return our_logits(base, Route(bank, (segment,)), tokens).double()  # type: ignore[arg-type]


def test_a_resumed_run_is_the_run(lab: Lab, tmp_path: Path, moe_model_config: ModelConfig) -> None:
    """The trainer is thrown away after step 3, its newest checkpoint is of step 2; the batches stay."""
    whole = Lab(tmp_path / "whole", lab.base, moe_model_config)
    tree = whole.run("a", loss=LossConfig(kl_coefficient=0.1))
    whole.feed(tree, whole.trainer(), 6)
    again = lab.run("a", loss=LossConfig(kl_coefficient=0.1))
    first = lab.trainer()
    lab.settle(first)
    for step in range(1, 7):
        published = read_version(again, step - 1)
        if published is None:  # the trainer that would have made it is gone
            published = read_version(tree, step - 1)
        assert published is not None
        publish_batch(DISK, again, random_batch(again.id, step, published))
        if step <= 3:
            lab.settle(first)
    assert status_of(again).step == 3
    second = lab.trainer()
    lab.settle(second)
    assert status_of(again).state == "finished"
    assert trainer_files(again, 6) == trainer_files(tree, 6)


def test_a_run_is_bit_equal_alone_and_beside_another(lab: Lab, tmp_path: Path, moe_model_config: ModelConfig) -> None:
    alone = Lab(tmp_path / "alone", lab.base, moe_model_config)
    tree = alone.run("a")
    alone.feed(tree, alone.trainer(), 6)
    one, two = lab.run("a"), lab.run("b", seed=9)
    trainer = lab.trainer(slots=2)
    lab.settle(trainer)
    for step in range(1, 7):
        for run in (two, one):
            published = read_version(run, step - 1)
            assert published is not None
            publish_batch(DISK, run, random_batch(run.id, step, published))
        lab.settle(trainer)
    assert trainer_files(one, 6)["rank_0.safetensors"] == trainer_files(tree, 6)["rank_0.safetensors"]


@pytest.fixture(scope="module")
def engine(moe: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    root = tmp_path_factory.mktemp("engine")
    with Engine(moe, name="base", eos_token_ids=[EOS], max_adapters=3, max_sequences=64, max_model_len=96) as engine:
        for index, name in enumerate(("first", "second")):
            engine.load(name, save_adapter(root / name, moe, rank=4 - index, seed=index, scale=1.0 + index))
        yield engine


def test_the_sampler_and_the_trainer_agree_on_log_probs_with_several_adapters_at_once(
    engine: Engine, moe: BaseModel
) -> None:
    names = ("first", "second", "base")
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11], [20, 21, 22, 23]]
    asked = [engine.submit(GenerationRequest(name, prompts, n=4, max_tokens=12, seed=3)) for name in names]
    for name, future in zip(names, asked, strict=True):
        result = future.result(timeout=120)
        bank, segments = moe.new_bank(1, gradients=False), ()
        examples = [
            Example(
                np.array([*prompts[c.prompt_index], *c.token_ids], np.int32),
                np.arange(len(prompts[c.prompt_index]) + len(c.token_ids)) >= len(prompts[c.prompt_index]),
                np.concatenate([np.zeros(len(prompts[c.prompt_index])), c.logprobs]).astype(np.float32),
                1.0,
            )
            for c in result.choices
        ]
        micro = whole(examples)
        if name != "base":
            index = names.index(name)
            adapter = random_adapter(moe.spec.shapes, 4 - index, seed=index, scale=1.0 + index)
            bank.write(0, prepare(InMemory(adapter), moe.spec))
            segments = (Segment(0, 0, len(micro.tokens), bank.holding(0).scale),)
        with torch.no_grad():
            hidden = moe.hidden(micro.tokens, micro.positions, micro.plan, Route(bank, segments))[micro.loss_rows]
            ours, _ = token_logprobs(hidden, moe.head, micro.targets, temperature=1.0, chunk=64)
        assert (ours - micro.sampler_logprobs).abs().max() < 1e-4, name


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_engine_serves_every_exported_layout(engine: Engine, moe: BaseModel, tmp_path: Path, format: str) -> None:
    """Gate and up in one tensor have twice the rank; the slots hold it, for half of its directions do nothing."""
    source = save_adapter(tmp_path / "source", moe, rank=4, seed=0, scale=1.0)
    export_adapter(DISK, source, tmp_path / "out", format)
    engine.load(format, tmp_path / "out")
    first, served = (
        engine.submit(GenerationRequest(name, [[5, 6, 7]], n=2, max_tokens=8, seed=3)).result(timeout=60)
        for name in ("first", format)
    )
    engine.unload(format)
    for one, two in zip(first.choices, served.choices, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()
        np.testing.assert_allclose(one.logprobs, two.logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", ["moe", "tiny"])
def test_a_padded_import_starts_at_the_sources_loss_and_its_new_directions_learn(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """Rank 2 and alpha 4 into rank 4 and alpha 12, against the same adapter in slots of its own rank."""
    config: ModelConfig = request.getfixturevalue(f"{kind}_model_config")
    adapter = random_adapter(load_base(config, LoraConfig(max_rank=2)).spec.shapes, 2, scale=2.0, size=0.2)
    losses, learners = [], []
    for wish in (Wish(), Wish(rank=4, alpha=12.0)):
        base = load_base(config, LoraConfig(max_rank=4))
        snapshot = snapshot_of(prepare(InMemory(adapter), base.spec, wish), base.fingerprint)
        learner = Learner(Banks.of(base, 2), 1, LearnerConfig(OptimizerConfig(), None, 1.0, 256, 64), snapshot)
        rng = np.random.default_rng(0)
        examples = [
            Example(rng.integers(0, VOCAB, 9).astype(np.int32), np.arange(9) > 2, np.zeros(9, np.float32), 1.0)
            for _ in range(6)
        ]
        learner.feed(examples)
        while learner.rounds:
            learn([learner])
        losses.append(learner.sums.loss)
        learners.append(learner)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    padded = learners[1]
    gradients, _ = padded.banks.training.gradients, padded.banks.training.layout
    assert gradients is not None
    for path in padded.banks.training.layout.places:
        _, grad_b = padded.banks.training.layout.factors(gradients, path)
        new = grad_b[1][..., 2:4]
        if ".experts." in path:  # experts that no token went to have none
            assert new.flatten(1).abs().sum(1).count_nonzero() >= 6, path
        else:
            assert new.abs().sum(0).all(), path
    before = padded.adapter()
    padded.step("a" * 64, gradient_norm([padded.report()]))
    after = padded.adapter()
    assert all((after.pairs[path].b[..., 2:] != before.pairs[path].b[..., 2:]).any() for path in before.pairs)
