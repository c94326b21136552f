"""Packing keeps every token, in its own sequence, within the budget; what sequences share is there once."""

from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from graftwork.model.attention import Families, Group
from graftwork.training.families import WHOLE_MAX, families, shares, split
from graftwork.training.packer import Example, MicroBatch, pack

lengths = st.lists(st.integers(2, 30), min_size=1, max_size=40)
budgets = st.integers(30, 90)
seeds = st.integers(0, 2**32 - 1)


def needed(example: Example) -> list[int]:
    """Its tokens before the last one with loss; of a sequence without loss, the first."""
    last = max(np.flatnonzero(example.loss_mask), default=1)
    return [int(token) for token in example.token_ids[:last]]


def made(sizes: list[int], seed: int) -> list[Example]:
    """Sequences of which many begin alike: three prompts, cut at any length. The prompt carries no loss."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, 1000, (3, 30))
    examples = []
    for index, size in enumerate(sizes):
        prompt = int(rng.integers(0, size))
        mask = (rng.random(size) < 0.7) & (np.arange(size) > prompt)
        tokens = np.concatenate([prompts[rng.integers(3), :prompt], rng.integers(0, 1000, size - prompt)])
        examples.append(Example(tokens.astype(np.int32), mask, np.full(size, -index, np.float32), float(index)))
    return examples


@given(lengths, budgets, seeds, st.integers(1, 6), st.booleans())
def test_every_sequence_is_in_one_family_that_fits_and_begins_alike(
    sizes: list[int], budget: int, seed: int, ranks: int, share: bool
) -> None:
    examples = made(sizes, seed)
    found = families(examples, budget, share=share, ranks=ranks)
    assert sorted(index for family in found for index in family.members) == list(range(len(sizes)))
    for family in found:
        assert family.cost <= budget and family.lengths == tuple(
            len(needed(examples[index])) for index in family.members
        )
        beginnings = {examples[index].token_ids[: family.shared].tobytes() for index in family.members}
        assert len(beginnings) == 1 and (share or len(family.members) == 1)
        assert not any(examples[index].loss_mask[: family.shared + 1].any() for index in family.members)


@given(lengths, budgets, seeds, st.integers(1, 6))
def test_families_are_dealt_out_and_split_whole(sizes: list[int], budget: int, seed: int, ranks: int) -> None:
    found = families(made(sizes, seed), budget, share=True, ranks=ranks)
    dealt = shares(found, ranks)
    assert sorted(family.place for share in dealt for family in share) == [family.place for family in found]
    loads = [sum(family.rows for family in share) for share in dealt]
    assert max(loads) - min(loads) <= max(family.rows for family in found)
    assert all(loads) or len(sizes) < ranks
    for share in dealt:
        parts = split(share, budget)
        assert [family for part in parts for family in part] == sorted(share, key=lambda family: family.place)
        assert all(part and sum(family.cost for family in part) <= budget for part in parts)


def sequences(micro: MicroBatch) -> Iterator[list[int]]:
    """The rows of each sequence, from its first token on."""
    for group in micro.plan.groups:
        if isinstance(group, Group):
            yield from torch.arange(len(micro.tokens))[group.rows].view(group.count, group.length).tolist()
            continue
        assert isinstance(group, Families)
        begun = torch.arange(len(micro.tokens))[group.beginnings.rows].view(group.beginnings.count, -1)
        for own in group.own:
            rows = torch.arange(len(micro.tokens))[own.group.rows].view(own.group.count, own.group.length)
            yield from torch.cat([begun[own.family], rows], 1).tolist()


@given(lengths, budgets, seeds, st.integers(1, 5), st.booleans())
def test_rows_hold_what_each_sequence_needs_and_loss_rows_predict_their_targets(
    sizes: list[int], budget: int, seed: int, ranks: int, share: bool
) -> None:
    examples = made(sizes, seed)
    weights = [1.0 + index for index in range(len(sizes))]
    micros = [
        micro
        for rank in range(ranks)
        for round in pack(examples, weights, budget, torch.device("cpu"), rank, ranks, share=share)
        if (micro := round.micro) is not None
    ]
    seen, predicted = [], []
    for micro in micros:
        assert (
            len(micro.tokens) <= budget
            and (total := sum(map(len, sequences(micro)))) <= WHOLE_MAX * budget
            and (share or total == len(micro.tokens))
        )
        rows = list(sequences(micro))
        assert {row for sequence in rows for row in sequence} == set(range(len(micro.tokens)))
        for sequence in rows:
            assert micro.positions[sequence].tolist() == list(range(len(sequence)))
            seen.append(tuple(micro.tokens[sequence].tolist()))
        sequence_of = {row: sequence for sequence in rows for row in sequence}
        for row, target, index in zip(micro.loss_rows.tolist(), micro.targets, micro.advantages, strict=True):
            example, place = examples[int(index)], int(micro.positions[row]) + 1
            assert micro.tokens[sequence_of[row]][:place].tolist() == example.token_ids[:place].tolist()
            assert target == example.token_ids[place] and example.loss_mask[place]
        assert torch.equal(micro.weights, micro.advantages + 1)
        assert torch.equal(micro.sampler_logprobs, -micro.advantages)
        predicted += list(zip(micro.advantages.tolist(), micro.targets.tolist(), strict=True))
    assert sorted(seen) == sorted(tuple(needed(example)) for example in examples)
    assert sum(micro.sequence_tokens for micro in micros) == sum(sizes)
    wanted = [(e.advantage, token) for e in examples for token in e.token_ids[e.loss_mask].tolist()]
    assert sorted(predicted) == sorted(wanted)
