"""A training step multiplies no more than it has to: counted by operator, to the last product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import VOCAB

from bench.bases import adapter_for, start_of
from bench.floor import counted, floor_of
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.model.base import BaseModel
from graftwork.training.learner import Banks, Learner, LearnerConfig, learn
from graftwork.training.packer import Example

PROMPT, ANSWER = 12, 8
RANK = 4


def examples(group: int) -> list[Example]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (8, PROMPT + ANSWER)).astype(np.int32)
    for first in range(0, 8, group):
        tokens[first : first + group, :PROMPT] = tokens[first, :PROMPT]
    mask = np.arange(PROMPT + ANSWER) >= PROMPT
    return [Example(row, mask, np.full(len(row), -4, np.float32), float(rng.normal())) for row in tokens]


def flops(base: BaseModel, batch: list[Example], budget: int = 1000) -> int:
    config = LearnerConfig(OptimizerConfig(), LossConfig(), 1.0, budget, 16)
    one = Learner(Banks.of(base, 2), 0, config, start_of(base, adapter_for(base)))

    def gradient() -> None:
        one.feed(batch)
        while one.rounds:
            learn([one])

    return round(sum(counted(gradient).values()))


def spared(base: BaseModel, rows: int) -> int:
    """Nothing needs the gradient of what goes into the first layer: so it is not computed."""
    shapes = [base.spec.shapes[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"]
    return rows * sum(2 * math.prod(shape) + 2 * RANK * shape[1] for shape in shapes)


@pytest.mark.parametrize("budget", [1000, 50])
def test_a_step_does_what_the_floor_says_less_the_first_layers_input(tiny: BaseModel, budget: int) -> None:
    batch = examples(group=1)
    floor = floor_of(tiny, batch)
    expected = floor.linears + floor.head + floor.adapters - spared(tiny, floor.tokens)
    assert flops(tiny, batch, budget) == expected <= 1.03 * (floor.total - floor.attention)


def test_a_prompt_that_answers_share_is_multiplied_once(tiny: BaseModel) -> None:
    """All but its last token, whose row predicts each answer's first. What it costs: keys' and values' gradients are
    summed over a family by a product with zeros and ones, 2 families by 8 sequences here."""
    apart, together = (flops(tiny, examples(group)) for group in (1, 4))
    floor = floor_of(tiny, examples(group=1))
    a_row = (floor.linears + floor.adapters - spared(tiny, floor.tokens)) / floor.tokens
    layers, key_width = 2, tiny.spec.shapes["model.layers.0.self_attn.k_proj"][0]
    sums = layers * 2 * (2 * 2 * 8 * (PROMPT - 1) * key_width)
    assert apart - together == 2 * 3 * (PROMPT - 1) * a_row - sums


def test_the_counter_sees_products_in_place() -> None:
    total, left, right = torch.zeros(2, 3), torch.ones(2, 5), torch.ones(5, 3)
    assert sum(counted(lambda: total.addmm_(left, right)).values()) == 2 * 2 * 5 * 3 and torch.all(total == 5)
