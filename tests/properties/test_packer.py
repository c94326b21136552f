"""Packing keeps every token, in its own sequence, within the budget."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftwork.training.packer import Example, pack, split

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40)


@given(lengths, st.integers(30, 90))
def test_split_takes_every_index_once_within_the_budget(sizes: list[int], budget: int) -> None:
    parts = split(sizes, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert all(part and sum(sizes[i] for i in part) <= budget for part in parts)


@given(lengths, st.integers(30, 90), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_rows_hold_each_sequence_whole_and_loss_rows_predict_their_targets(
    sizes: list[int], budget: int, seed: int, ranks: int
) -> None:
    rng = np.random.default_rng(seed)
    examples = []
    for index, size in enumerate(sizes):
        mask = rng.random(size) < 0.5
        mask[0] = False
        tokens = rng.integers(0, 1000, size).astype(np.int32)
        examples.append(Example(tokens, mask, np.full(size, -index, np.float32), float(index)))
    weights = [1.0 + index for index in range(len(sizes))]
    micros = [
        micro
        for rank in range(ranks)
        for round in pack(examples, weights, budget, torch.device("cpu"), rank, ranks)
        if (micro := round.micro) is not None
    ]
    seen: list[tuple[int, ...]] = []
    for micro in micros:
        assert len(micro.tokens) <= budget
        assert sum(group.count * group.length for group in micro.plan.groups) == len(micro.tokens)
        assert torch.equal(micro.tokens[micro.loss_rows + 1], micro.targets)
        assert (micro.positions[micro.loss_rows + 1] == micro.positions[micro.loss_rows] + 1).all()
        assert torch.equal(micro.weights, micro.advantages + 1)
        assert torch.equal(micro.sampler_logprobs, -micro.advantages)
        for group in micro.plan.groups:
            rows = micro.tokens[group.start : group.start + group.count * group.length]
            seen.extend(tuple(row.tolist()) for row in rows.view(group.count, group.length))
    assert sorted(seen) == sorted(tuple(example.token_ids.tolist()) for example in examples)
    assert sum(len(micro.targets) for micro in micros) == sum(example.loss_tokens for example in examples)
