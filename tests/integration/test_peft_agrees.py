"""PEFT as the oracle: what the trainer computes and saves is what PEFT computes from the saved files."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import VOCAB, random_adapter, random_batch
from test_trainer import DISK, Lab
from transformers import AutoModelForCausalLM

from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import AdapterConfig
from graftwork.config.section import ModelConfig
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import BaseModel, Route
from graftwork.store.layout import stable_steps
from graftwork.store.queue import publish_batch, read_version


def our_logits(base: BaseModel, adapter_in_slot: Route, tokens: torch.Tensor) -> torch.Tensor:
    """[B, L, V] through the trainer's own forward."""
    count, length = tokens.shape
    positions = torch.arange(length).repeat(count)
    plan = PackedPlan([Group(0, count, length)])
    with torch.no_grad():
        hidden = base.hidden(tokens.flatten(), positions, plan, adapter_in_slot)
    return (hidden @ base.head.T).unflatten(0, (count, length))


def peft_logits(tiny_path: Path, adapter: Path, tokens: torch.Tensor) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter)(tokens).logits


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("slot", [0, 1, 10])
def test_a_slot_computes_what_peft_computes(
    tiny: BaseModel, tiny_path: Path, tmp_path: Path, tokens: torch.Tensor, slot: int
) -> None:
    adapter = random_adapter(tiny.spec.shapes, 3, scale=1.5)
    with DISK.publish_dir(tmp_path / "adapter", "adapter", {}) as staging:
        for name, data in write_peft(adapter, AdapterFacts()).items():
            staging.write(name, data)
    bank = tiny.new_bank(12, gradients=False)
    bank.write(slot, PreparedInitAdapter(adapter, 3, 4.5, "", {}))
    ours = our_logits(tiny, Route(bank, (Segment(slot, 0, tokens.numel(), 1.5),)), tokens)
    theirs = peft_logits(tiny_path, tmp_path / "adapter", tokens)
    bare = our_logits(tiny, Route(bank, ()), tokens)
    assert (ours - bare).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_weights_of_every_checkpoint_load_in_peft_and_give_the_trainers_logits(
    tmp_path: Path, tiny: BaseModel, tiny_path: Path, tiny_model_config: ModelConfig, tokens: torch.Tensor
) -> None:
    lab = Lab(tmp_path, tiny, tiny_model_config)
    tree = lab.run("a", adapter=AdapterConfig(rank=3, alpha=7.0))
    trainer = lab.trainer()
    lab.settle(trainer)
    seen = []
    for step in range(6):
        (tenant,) = trainer.tenants.values()
        segment = Segment(0, 0, tokens.numel(), tenant.learner.banks.training.holding(0).scale)
        seen.append(our_logits(tiny, Route(trainer.banks.training, (segment,)), tokens))
        published = read_version(tree, step)
        assert published is not None
        publish_batch(DISK, tree, random_batch(tree.id, step + 1, published))
        lab.settle(trainer)
    assert stable_steps(tree.checkpoints) == [0, 2, 4, 6]
    for step in (0, 2, 4):
        theirs = peft_logits(tiny_path, tree.checkpoint(step) / "weight", tokens)
        torch.testing.assert_close(seen[step], theirs, rtol=0, atol=1e-4)
    assert (seen[4] - seen[0]).abs().max() > 1e-3
