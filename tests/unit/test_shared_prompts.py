"""Answers that share their prompt's rows are learnt as if each had its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import VOCAB, random_adapter

from graftwork.adapters.prepare import prepare
from graftwork.adapters.snapshot import snapshot_of
from graftwork.adapters.source import InMemory
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.model.base import BaseModel
from graftwork.training.learner import Banks, Learner, LearnerConfig, Sums, learn
from graftwork.training.packer import Example

PROMPT, LENGTHS = 9, (12, 15, 12, 20)


@pytest.fixture(params=["dense", "moe"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return request.getfixturevalue({"dense": "tiny", "moe": "moe"}[request.param])


def examples() -> list[Example]:
    """Three prompts of which two are of one length, four answers each, and a sequence of its own."""
    rng = np.random.default_rng(0)
    made = []
    for prompt_tokens in (PROMPT, PROMPT, PROMPT + 2):
        prompt = rng.integers(0, VOCAB, prompt_tokens)
        made += [(prompt, rng.integers(0, VOCAB, length - PROMPT)) for length in LENGTHS]
    made.append((rng.integers(0, VOCAB, 3), rng.integers(0, VOCAB, 4)))
    return [
        Example(
            np.concatenate([prompt, answer]).astype(np.int32),
            np.arange(len(prompt) + len(answer)) >= len(prompt),
            (-4 * rng.random(len(prompt) + len(answer))).astype(np.float32),
            float(rng.normal()),
        )
        for prompt, answer in made
    ]


def learnt(base: BaseModel, share: bool, budget: int) -> tuple[torch.Tensor, Sums, int]:
    """The gradient of a step, its sums, and how many rows went through the base."""
    first, other = (random_adapter(base.spec.shapes, 4, seed=seed) for seed in range(2))
    snapshot = replace(snapshot_of(prepare(InMemory(first), base.spec), base.fingerprint), reference=other)
    config = LearnerConfig(OptimizerConfig(), LossConfig(kl_coefficient=0.1), 0.9, budget, 16, share)
    one = Learner(Banks.of(base, 1), 0, config, snapshot)
    one.feed(examples())
    rows = sum(sum(each.tokens) for each in one.rounds)
    while one.rounds:
        learn([one])
    assert one.banks.training.gradients is not None
    return one.banks.training.gradients[0].clone(), one.sums, rows


@pytest.mark.parametrize("budget", [1000, 50, 25])
def test_a_step_is_the_same_with_and_without_sharing(base: BaseModel, budget: int) -> None:
    """Of 25 tokens a micro-batch, families are cut in two."""
    shared, apart = (learnt(base, share, budget) for share in (True, False))
    assert shared[2] < apart[2] == sum(len(example.token_ids) - 1 for example in examples())
    torch.testing.assert_close(shared[0], apart[0], rtol=1e-4, atol=1e-5 * float(apart[0].abs().max()))
    told: list[dict[str, Any]] = [vars(sums) | sums.means() for _, sums, _ in (shared, apart)]
    assert {key: value for key, value in told[0].items() if key != "token_sums"} == pytest.approx(
        {key: value for key, value in told[1].items() if key != "token_sums"}, rel=1e-4
    )


def test_the_same_batch_gives_the_same_bits(base: BaseModel) -> None:
    first, again = (learnt(base, True, 1000)[0] for _ in range(2))
    assert torch.equal(first, again)
