"""Packed attention: each sequence as if it were alone."""

import pytest
import torch

from graftwork.model.attention import Families, Group, Own, PackedPlan


def _qkv(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, rows, 8), torch.randn(2, rows, 8), torch.randn(2, rows, 8)


def _alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention of one sequence, written out."""
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    scores = (q @ k.transpose(1, 2)) * 0.3
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def test_each_sequence_attends_to_itself_only() -> None:
    q, k, v = _qkv(3 + 3 + 5)
    out = PackedPlan([Group(0, 2, 3), Group(6, 1, 5)]).attend(0, q, k, v, 0.3)
    expected = [_alone(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 3), slice(3, 6), slice(6, 11))]
    torch.testing.assert_close(out, torch.cat(expected))


def test_a_nan_in_one_sequence_leaves_the_others_bit_equal() -> None:
    q, k, v = _qkv(9)
    plan = PackedPlan([Group(0, 3, 3)])
    clean = plan.attend(0, q, k, v, 0.3)
    v[:, 4] = float("nan")
    spoilt = plan.attend(0, q, k, v, 0.3)
    assert torch.equal(spoilt[[0, 1, 2, 6, 7, 8]], clean[[0, 1, 2, 6, 7, 8]])
    assert torch.isnan(spoilt[4]).all()


# Two families that share 3 rows each; the first has sequences of 2 and 1 further rows, the second of 2.
FAMILIES = Families(Group(1, 2, 3), [Own(Group(7, 1, 1), torch.tensor([0])), Own(Group(8, 2, 2), torch.tensor([0, 1]))])
WHOLE = ([0], [1, 2, 3, 7], [1, 2, 3, 8, 9], [4, 5, 6, 10, 11])
"""The rows of each sequence; the first shares nothing."""


@pytest.fixture(params=[512, 0], ids=["masked", "whole"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences are computed with a mask, long ones whole."""
    monkeypatch.setattr("graftwork.model.attention.MASKED_POSITIONS_MAX", request.param)


@pytest.mark.usefixtures("ways")
def test_sequences_that_share_a_beginning_are_what_they_are_alone() -> None:
    q, k, v = _qkv(12)
    out = PackedPlan([Group(0, 1, 1), FAMILIES]).attend(0, q, k, v, 0.3)
    for rows in WHOLE:
        torch.testing.assert_close(out[rows], _alone(q[:, rows], k[:, rows], v[:, rows]))


@pytest.mark.usefixtures("ways")
def test_gradients_of_what_is_shared_add_up() -> None:
    shared, apart = ([t.requires_grad_() for t in _qkv(12)] for _ in range(2))
    upstream = torch.randn(12, 4, 8)
    PackedPlan([Group(0, 1, 1), FAMILIES]).attend(0, *shared, 0.3).backward(upstream)
    seen: set[int] = set()
    for rows in WHOLE:
        weights = upstream[rows].clone()
        weights[[place for place, row in enumerate(rows) if row in seen]] = 0  # each row's output is asked for once
        seen.update(rows)
        (_alone(*(t[:, rows] for t in apart)) * weights).sum().backward()
    for ours, theirs in zip(shared, apart, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.usefixtures("ways")
def test_a_nan_behind_a_beginning_leaves_those_who_share_it_bit_equal() -> None:
    q, k, v = _qkv(12)
    plan = PackedPlan([Group(0, 1, 1), FAMILIES])
    clean = plan.attend(0, q, k, v, 0.3)
    v[:, 8] = float("nan")
    spoilt = plan.attend(0, q, k, v, 0.3)
    others = [row for row in range(12) if row not in (8, 9)]
    assert torch.equal(spoilt[others], clean[others]) and torch.isnan(spoilt[[8, 9]]).all()


def test_a_plan_that_is_moved_attends_to_the_rows_further_down() -> None:
    q, k, v = _qkv(14)
    plan = PackedPlan([Group(0, 1, 1), FAMILIES])
    moved = PackedPlan([Group(0, 1, 2), *plan.moved(2).groups]).attend(0, q, k, v, 0.3)
    assert torch.equal(moved[2:], plan.attend(0, q[:, 2:], k[:, 2:], v[:, 2:], 0.3))
