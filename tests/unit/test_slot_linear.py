"""slot_linear against plain autograd, row by row."""

import torch

from graftwork.lora.linear import Factors, Segment, slot_linear


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
