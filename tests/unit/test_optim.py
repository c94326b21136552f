"""SlotOptimizer against torch's AdamW and clip_grad_norm_ on separate tensors; the schedule; skipped steps."""

import math

import pytest
import torch
from support import random_adapter

from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec
from graftwork.config.run import OptimizerConfig
from graftwork.lora.slots import SlotBank
from graftwork.training.optim import SlotOptimizer, StepOutcome, learning_rate

SPEC = SlotSpec(4, {"q_proj": (6, 10), "down_proj": (10, 7)})
CONFIG = OptimizerConfig(learning_rate=0.01, clip_norm=0.5, weight_decay=0.1, warmup_steps=2)


def _bank() -> SlotBank:
    bank = SlotBank(SPEC, 3, device=torch.device("cpu"), dtype=torch.float32, gradients=True)
    bank.write(1, PreparedInitAdapter(random_adapter(SPEC.shapes, 4), 4, 8.0, "", {}))
    return bank


def take_step(optimizer: SlotOptimizer) -> StepOutcome:
    return optimizer.step(math.sqrt(optimizer.sum_gradient()))


def test_steps_equal_torch_adamw_with_clipping() -> None:
    bank = _bank()
    assert bank.gradients is not None
    optimizer = SlotOptimizer(bank, 1, CONFIG, steps_taken=0)
    pairs = random_adapter(SPEC.shapes, 4).pairs
    plain = [t.clone().requires_grad_() for path in sorted(pairs) for t in (pairs[path].a, pairs[path].b)]
    adamw = torch.optim.AdamW(plain, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        generator = torch.Generator().manual_seed(step)
        for path, (a, b) in zip(sorted(pairs), zip(plain[::2], plain[1::2], strict=True), strict=True):
            a.grad, b.grad = torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
            factors = bank.factors[path]
            assert factors.grad_a is not None and factors.grad_b is not None
            factors.grad_a[1].copy_(a.grad)
            factors.grad_b[1].copy_(b.grad)
        norm = torch.nn.utils.clip_grad_norm_(plain, 0.5)
        adamw.param_groups[0]["lr"] = learning_rate(CONFIG, step)
        adamw.step()
        outcome = take_step(optimizer)
        assert outcome.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert bank.gradients.count_nonzero() == 0
    read = bank.read(1).pairs
    ours = [t for path in sorted(read) for t in (read[path].a, read[path].b)]
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert bank.weights[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_gone_afterwards(bad: float) -> None:
    bank = _bank()
    assert bank.gradients is not None
    before = bank.weights.clone()
    optimizer = SlotOptimizer(bank, 1, CONFIG, steps_taken=0)
    bank.gradients[1, 5] = bad
    outcome = take_step(optimizer)
    assert outcome.skipped and optimizer.steps_taken == 0 and optimizer.moments is None
    assert torch.equal(bank.weights, before) and bank.gradients.count_nonzero() == 0


def test_restored_moments_go_on_bit_equal() -> None:
    def steps(optimizer: SlotOptimizer, first: int, last: int) -> None:
        for step in range(first, last + 1):
            gradient = optimizer.bank.gradients
            assert gradient is not None
            gradient[1].copy_(torch.randn(gradient[1].shape, generator=torch.Generator().manual_seed(step)))
            take_step(optimizer)

    whole, halves = _bank(), _bank()
    steps(SlotOptimizer(whole, 1, CONFIG, steps_taken=0), 1, 6)
    first = SlotOptimizer(halves, 1, CONFIG, steps_taken=0)
    steps(first, 1, 3)
    assert first.moments is not None
    second = SlotOptimizer(halves, 1, CONFIG, steps_taken=3)
    second.restore(first.moments[0].clone(), first.moments[1].clone())
    steps(second, 4, 6)
    assert torch.equal(whole.weights, halves.weights)


def test_schedules() -> None:
    warm = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(warm, step) for step in (1, 2, 4, 100)] == [0.25, 0.5, 1.0, 1.0]
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear", decay_steps=10)
    assert [learning_rate(linear, step) for step in (1, 6, 11, 50)] == [1.0, 0.5, 0.0, 0.0]
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", decay_steps=10)
    assert learning_rate(cosine, 6) == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
