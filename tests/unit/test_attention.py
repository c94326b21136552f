"""Packed attention: each sequence as if it were alone."""

import torch

from graftwork.model.attention import Group, PackedPlan


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
