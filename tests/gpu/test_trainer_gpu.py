"""What only a GPU can show: skipped elsewhere. Run: python -m pytest tests/gpu"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import random_adapter

from graftwork.adapters.prepare import prepare
from graftwork.adapters.snapshot import snapshot_of
from graftwork.adapters.source import InMemory
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Placement, Route, load_base
from graftwork.parallel.ranks import Ranks
from graftwork.training.learner import Banks, Learner, LearnerConfig, learn
from graftwork.training.packer import Example
from proofs.adapter_models import VOCAB

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LORA = LoraConfig(max_rank=16)


def base_on(path: Path, device: str, dtype: str, **placement: bool) -> BaseModel:
    config = ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": device})
    return load_base(config, LORA, Placement(Ranks.alone(), **placement))


def learner_on(base: BaseModel, slot: int = 0, slots: int = 2, rank: int = 8) -> Learner:
    adapter = random_adapter(base.spec.shapes, rank, seed=slot)
    snapshot = snapshot_of(prepare(InMemory(adapter), base.spec), base.fingerprint)
    return Learner(Banks.of(base, slots), slot, LearnerConfig(OptimizerConfig(), LossConfig(), 1.0, 512, 64), snapshot)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.integers(0, VOCAB, 12).astype(np.int32), np.arange(12) >= 2,
            (-4 * rng.random(12)).astype(np.float32), float(rng.normal()),
        )
        for _ in range(16)
    ]  # fmt: skip


def gradient_on(base: BaseModel) -> torch.Tensor:
    one = learner_on(base)
    one.feed(examples())
    while one.rounds:
        learn([one])
    assert one.banks.training.gradients is not None
    return one.banks.training.gradients[0].float().cpu()


@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_steps_gradient_is_that_of_the_cpu(tiny_path: Path, moe_path: Path, dtype: str, bar: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for path in (tiny_path, moe_path):
        expected = gradient_on(base_on(path, "cpu", "float32"))
        found = gradient_on(base_on(path, "cuda", dtype))
        assert float((found - expected).norm() / expected.norm()) <= bar, path


def test_layers_make_the_host_wait_for_nothing(tiny_path: Path) -> None:
    """Forwards and backwards: every synchronisation is an error meanwhile."""
    base = base_on(tiny_path, "cuda", "bfloat16")
    one = learner_on(base)
    tokens = torch.randint(VOCAB, (96,), device="cuda")
    positions = torch.arange(12, device="cuda").repeat(8)
    route = Route(one.banks.training, [Segment(0, 0, 96, 2.0)])
    rows = torch.arange(0, 95, 2, device="cuda")
    ask = Ask(rows, tokens[rows + 1], 1.0)
    for _ in range(2):  # the first time, libraries set themselves up
        [(logprobs, _)] = base.logprobs(tokens, positions, PackedPlan([Group(0, 8, 12)]), route, [ask], 32)
        logprobs.sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        [(logprobs, _)] = base.logprobs(tokens, positions, PackedPlan([Group(0, 8, 12)]), route, [ask], 32)
        logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_layers_that_are_computed_again_give_the_same_bits(tiny_path: Path) -> None:
    plain = gradient_on(base_on(tiny_path, "cuda", "bfloat16"))
    again = gradient_on(base_on(tiny_path, "cuda", "bfloat16", activation_checkpointing=True))
    assert torch.equal(plain, again)


def test_compiled_layers_survive_another_run(tiny_path: Path) -> None:
    base = base_on(tiny_path, "cuda", "bfloat16", compile_layers=True)
    gradient_on(base)
    with torch.compiler.set_stance("fail_on_recompile"):
        other = learner_on(base, slot=1, slots=3, rank=4)
        other.feed(examples()[:5])
        while other.rounds:
            learn([other])
    assert other.banks.training.gradients is not None and other.banks.training.gradients[1].isfinite().all()
