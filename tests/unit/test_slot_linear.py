"""slot_linears against plain autograd, row by row."""

import numpy as np
import pytest
import torch

from graftwork.lora.linear import (
    Factors,
    Frozen,
    Segment,
    Siblings,
    SlotBatch,
    slot_linears,
    slot_linears_batched,
)


def _alone(factors: Factors) -> Siblings:
    return Siblings((factors,), factors.a, factors.grad_a)


def slot_linear(x, weight, bias, factors: Factors, segments, anchor) -> torch.Tensor:
    [y] = slot_linears(x, [Frozen(weight, bias)], _alone(factors), segments, anchor)
    return y


def slot_linear_batched(x, weight, bias, factors: Factors, batch: SlotBatch) -> torch.Tensor:
    [y] = slot_linears_batched(x, [Frozen(weight, bias)], _alone(factors), batch)
    return y


def _case(dtype: torch.dtype = torch.float64):
    torch.manual_seed(1)
    x = torch.randn(10, 6, dtype=dtype)
    weight = torch.randn(5, 6, dtype=dtype)
    bias = torch.randn(5, dtype=dtype)
    a = torch.randn(12, 3, 6, dtype=dtype)
    b = torch.randn(12, 5, 3, dtype=dtype)
    segments = (Segment(1, 0, 4, 2.0), Segment(10, 6, 10, 0.5))  # rows 4 and 5 see the bare base
    return x, weight, bias, a, b, segments


def _plain(x, weight, bias, a, b, segments):
    rows = list(torch.nn.functional.linear(x, weight, bias).unbind())
    for segment in segments:
        for i in range(segment.start, segment.stop):
            rows[i] = rows[i] + segment.scale * (b[segment.slot] @ (a[segment.slot] @ x[i]))
    return torch.stack(rows)


def test_forward_equals_the_formula_with_and_without_gradients() -> None:
    x, weight, bias, a, b, segments = _case()
    expected = _plain(x, weight, bias, a, b, segments)
    anchor = torch.zeros((), requires_grad=True)
    for given in (None, anchor):
        torch.testing.assert_close(slot_linear(x, weight, bias, Factors(a, b), segments, given), expected)


def test_gradients_equal_autograd_and_add_up() -> None:
    x, weight, bias, a, b, segments = _case()
    upstream = torch.randn(10, 5, dtype=x.dtype)
    x1, a1, b1 = (t.clone().requires_grad_() for t in (x, a, b))
    _plain(x1, weight, bias, a1, b1, segments).backward(upstream)
    x2 = x.clone().requires_grad_()
    factors = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b))
    for _ in range(2):
        x2.grad = None
        slot_linear(x2, weight, bias, factors, segments, torch.zeros((), requires_grad=True)).backward(upstream)
    torch.testing.assert_close(x2.grad, x1.grad)
    torch.testing.assert_close(factors.grad_a, 2 * a1.grad)
    torch.testing.assert_close(factors.grad_b, 2 * b1.grad)


def test_an_input_without_gradient_still_fills_the_buffers() -> None:
    x, weight, bias, a, b, segments = _case()
    factors = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b))
    slot_linear(x, weight, bias, factors, segments, torch.zeros((), requires_grad=True)).sum().backward()
    assert factors.grad_b is not None and factors.grad_b[10].abs().sum() > 0


def test_only_the_slots_of_the_segments_get_gradients() -> None:
    x, weight, bias, a, b, segments = _case()
    factors = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b))
    slot_linear(x, weight, bias, factors, segments, torch.zeros((), requires_grad=True)).sum().backward()
    assert factors.grad_a is not None
    assert set(factors.grad_a.flatten(1).abs().sum(1).nonzero().flatten().tolist()) == {1, 10}


def test_a_nan_in_one_segment_stays_in_it() -> None:
    x, weight, bias, a, b, segments = _case()
    x[7] = float("nan")
    factors = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b))
    y = slot_linear(x, weight, bias, factors, segments, torch.zeros((), requires_grad=True))
    y.sum().backward()
    assert torch.isfinite(y[:6]).all() and factors.grad_a is not None
    assert torch.isfinite(factors.grad_a[1]).all() and torch.isnan(factors.grad_a[10]).any()


def _batch_case(lengths: list[int], slots: list[int], before: int):
    """`before` rows of the bare base, then a segment a slot."""
    x, weight, bias, a, b, _ = _case()
    torch.manual_seed(2)
    x = torch.randn(before + sum(lengths), 6, dtype=x.dtype)
    ends = (before + np.cumsum(lengths)).tolist()
    segments = [
        Segment(slot, end - length, end, 0.5 + index)
        for index, (slot, length, end) in enumerate(zip(slots, lengths, ends, strict=True))
    ]
    return x, weight, bias, a, b, segments


@pytest.mark.parametrize("lengths", [[3, 3, 3], [4, 1, 2], [1, 1, 1]])
@pytest.mark.parametrize("slots", [[4, 5, 6], [0, 3, 11]])
@pytest.mark.parametrize("before", [0, 2])
def test_a_batch_of_slots_equals_the_formula(lengths: list[int], slots: list[int], before: int) -> None:
    x, weight, bias, a, b, segments = _batch_case(lengths, slots, before)
    batch = SlotBatch.of(segments, x)
    assert batch is not None and (batch.rows is None) == (len(set(lengths)) == 1)
    expected = _plain(x, weight, bias, a, b, segments)
    torch.testing.assert_close(slot_linear_batched(x, weight, bias, Factors(a, b), batch), expected)


def test_a_nan_in_a_batch_stays_in_its_segment() -> None:
    """In the rows and in the weights of a slot, also where short segments are filled up."""
    x, weight, bias, a, b, segments = _batch_case([4, 1, 2], [0, 3, 11], 2)
    batch = SlotBatch.of(segments, x)
    assert batch is not None
    x[2] = float("nan")  # the row that fills up the others
    y = slot_linear_batched(x, weight, bias, Factors(a, b), batch)
    assert torch.isnan(y[2]).all() and torch.isfinite(y[torch.arange(9) != 2]).all()
    x[2], b[3] = 0.0, float("nan")
    y = slot_linear_batched(x, weight, bias, Factors(a, b), batch)
    assert torch.isnan(y[6]).all() and torch.isfinite(y[torch.arange(9) != 6]).all()


def test_segments_that_no_batch_serves() -> None:
    x = torch.zeros(1)
    assert SlotBatch.of([Segment(1, 0, 4, 1.0)], x) is None
    assert SlotBatch.of([Segment(1, 0, 4, 1.0), Segment(2, 5, 9, 1.0)], x) is None  # a gap
    assert SlotBatch.of([Segment(slot, 1000 * slot, 1000 * slot + 1000, 1.0) for slot in range(4)], x) is not None
    uneven = [Segment(0, 0, 4000, 1.0), *(Segment(slot, 3999 + slot, 4000 + slot, 1.0) for slot in range(1, 4))]
    assert SlotBatch.of(uneven, x) is None


# --- layers with the same input ---------------------------------------------------------------------------------------

WIDTHS = (5, 2, 7)


def _together() -> tuple[Siblings, list[Frozen]]:
    """Three layers of an input of 6, whose A lie one above the other."""
    torch.manual_seed(3)
    n, dtype = len(WIDTHS), torch.float64
    a, grad_a = torch.randn(12, n * 3, 6, dtype=dtype), torch.zeros(12, n * 3, 6, dtype=dtype)
    members = []
    for i, width in enumerate(WIDTHS):
        b, rows = torch.randn(12, width, 3, dtype=dtype), slice(3 * i, 3 * i + 3)
        members.append(Factors(a[:, rows], b, grad_a[:, rows], torch.zeros_like(b)))
    layers = [Frozen(torch.randn(width, 6, dtype=dtype), torch.randn(width, dtype=dtype)) for width in WIDTHS]
    return Siblings(members, a, grad_a), layers


def test_siblings_together_are_what_each_is_alone() -> None:
    x, *_, segments = _case()
    together, layers = _together()
    upstream = [torch.randn(10, width, dtype=x.dtype) for width in WIDTHS]
    anchor = torch.zeros((), requires_grad=True)
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    ys = slot_linears(x1, layers, together, segments, anchor)
    torch.autograd.backward(ys, upstream)
    for y, layer, member, above in zip(ys, layers, together.members, upstream, strict=True):
        alone = Factors(member.a, member.b, torch.zeros_like(member.a), torch.zeros_like(member.b))
        expected = slot_linear(x2, layer.weight, layer.bias, alone, segments, anchor)
        expected.backward(above)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(member.grad_a, alone.grad_a)
        torch.testing.assert_close(member.grad_b, alone.grad_b)
    torch.testing.assert_close(x1.grad, x2.grad)


@pytest.mark.parametrize("lengths", [[3, 3, 3], [4, 1, 2]])
def test_a_batch_of_slots_for_siblings_equals_each_alone(lengths: list[int]) -> None:
    x, *_, segments = _batch_case(lengths, [0, 3, 11], 2)
    together, layers = _together()
    batch = SlotBatch.of(segments, x)
    assert batch is not None
    for y, layer, member in zip(
        slot_linears_batched(x, layers, together, batch), layers, together.members, strict=True
    ):
        torch.testing.assert_close(y, slot_linear(x, layer.weight, layer.bias, member, segments, None))
