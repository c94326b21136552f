"""Losses against their formulas, written out token by token."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support import whole

from graftwork.config.run import LossConfig
from graftwork.training.loss import cross_entropy, policy_loss, sequence_weights
from graftwork.training.packer import Example, MicroBatch


def _micro(weights: list[float]) -> MicroBatch:
    mask = np.array([False, True, True])
    examples = [
        Example(np.array([1, 2, 3], np.int32), mask, np.array([0, -1.0, -2.0], np.float32), 0.5),
        Example(np.array([1, 4, 5], np.int32), mask, np.array([0, -0.5, -3.0], np.float32), -1.0),
    ]
    return whole(examples, weights)


LOGPROBS = [-0.9, -0.2, -0.5, -3.5]
SAMPLER = [-1.0, -2.0, -0.5, -3.0]
ADVANTAGES = [0.5, 0.5, -1.0, -1.0]


@pytest.mark.parametrize("ratio", ["truncate", "mask"])
def test_policy_loss_and_its_gradient(ratio: str) -> None:
    config = LossConfig(ratio=ratio, ratio_max=2.0)
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    loss, sums = policy_loss(logprobs, None, _micro([0.1, 0.2]), config)
    loss.backward()
    expected_loss, expected_gradient = 0.0, []
    for ours, sampler, advantage, weight in zip(LOGPROBS, SAMPLER, ADVANTAGES, [0.1, 0.1, 0.2, 0.2], strict=True):
        rho = math.exp(ours - sampler)
        rho = min(rho, 2.0) if ratio == "truncate" else (rho if rho <= 2.0 else 0.0)
        expected_loss -= weight * rho * advantage * ours
        expected_gradient.append(-weight * rho * advantage)
    assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(expected_gradient, rel=1e-5)
    assert int(sums["truncated"]) == 1
    assert float(sums["mismatch"]) == pytest.approx(0.1 + 1.8 + 0.0 + 0.5, rel=1e-5)


def test_kl_is_zero_at_the_reference_and_pulls_back_towards_it() -> None:
    config = LossConfig(kl_coefficient=0.3)
    at = torch.tensor(LOGPROBS, requires_grad=True)
    without, _ = policy_loss(at, None, _micro([0.1, 0.2]), LossConfig())
    same, sums = policy_loss(at, at.detach(), _micro([0.1, 0.2]), config)
    assert same.item() == pytest.approx(without.item()) and float(sums["kl"]) == 0.0
    off = torch.tensor(LOGPROBS, requires_grad=True)
    flat = _micro([0.1, 0.2])
    loss, _ = policy_loss(off, torch.tensor(LOGPROBS) + 0.4, flat, config)
    plain, _ = policy_loss(off, None, flat, LossConfig())
    (loss - plain).backward()
    assert (loss - plain).item() == pytest.approx(0.3 * 0.6 * (math.exp(0.4) - 1.4), rel=1e-4)
    assert off.grad is not None and (off.grad < 0).all()  # descending raises the log-probs towards the reference


def test_normalisers() -> None:
    assert sequence_weights([2, 6], LossConfig()) == [1 / 8, 1 / 8]
    assert sequence_weights([2, 6], LossConfig(normaliser="sequence_mean")) == [1 / 4, 1 / 12]
    assert sequence_weights([2, 6], LossConfig(normaliser="constant", constant_tokens=10)) == [1 / 20, 1 / 20]


def test_the_branches_of_a_sample_count_as_one_sequence() -> None:
    def weights(**config: Any) -> list[float]:
        return sequence_weights([2, 6, 4], LossConfig(**config), [0, 0, 1])

    assert weights() == [1 / 12] * 3
    assert weights(normaliser="sequence_mean") == [1 / 16, 1 / 16, 1 / 8]
    assert weights(normaliser="constant", constant_tokens=10) == [1 / 20] * 3
    alone = sequence_weights([2, 6], LossConfig(normaliser="sequence_mean"), [None, None])
    assert alone == [1 / 4, 1 / 12], "without a number each is one of its own"


def test_cross_entropy_is_the_mean_negative_log_likelihood() -> None:
    micro = _micro(sequence_weights([2, 2], LossConfig()))
    assert float(cross_entropy(torch.tensor(LOGPROBS), micro)) == pytest.approx(-sum(LOGPROBS) / 4)
