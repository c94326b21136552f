"""The adapted linear layer as a pure function of tensors: rows of several slots in one call.

    y = x W^T + b;    y[rows of slot k] += scale_k * (x[rows of slot k] A_k^T) B_k^T

A [S, r, in] and B [S, out, r] are stacked over slots and are never re-stacked: a segment reads its slot in place. The
scale goes into the small rows x r product. Gradients of A and B are added to buffers of the same shape, in place:
autograd would make a dense gradient over all slots for one indexed slot.

Source: LoRA (arXiv 2106.09685); many adapters in one call by segments of rows as in Punica (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Rows start:stop of a micro-batch belong to one slot. Rows in no segment see the bare base."""

    slot: int
    start: int
    stop: int
    scale: float


@dataclass(frozen=True)
class Factors:
    """The stacked factors of one module, and their gradient buffers where they train.

    a [S, r, in], b [S, out, r] in the dtype of the activations (experts: [S, E, r, in], [S, E, out, r]); grad_a, grad_b
    likewise shaped, fp32.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor | None = None
    grad_b: Tensor | None = None


class _SlotLinear(torch.autograd.Function):
    """Saves the input and the shrunk rows (rows x r) only. `anchor` makes autograd call backward at the first layer,
    where the input itself needs no gradient; it gets none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, weight: Tensor, bias: Tensor | None, factors: Factors,
        segments: Sequence[Segment],
    ) -> Tensor:  # fmt: skip
        y = torch.nn.functional.linear(x, weight, bias)
        shrunk = _add_updates(y, x, factors, segments)
        ctx.save_for_backward(x, weight, factors.a, factors.b, *shrunk)
        ctx.factors, ctx.segments = factors, segments
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, *shrunk = ctx.saved_tensors
        factors: Factors = ctx.factors
        assert factors.grad_a is not None and factors.grad_b is not None
        grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
        for segment, u in zip(ctx.segments, shrunk, strict=True):
            rows = slice(segment.start, segment.stop)
            grad_rows = grad_y[rows]  # (rows, out)
            grad_u = (grad_rows @ b[segment.slot]) * segment.scale  # (rows, r)
            accumulate(factors.grad_b[segment.slot], grad_rows.T, u)
            accumulate(factors.grad_a[segment.slot], grad_u.T, x[rows])
            if grad_x is not None:
                grad_x[rows].addmm_(grad_u, a[segment.slot])
        return grad_x, None, None, None, None, None


def slot_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, segments: Sequence[Segment], anchor: Tensor | None
) -> Tensor:
    """y [T, out] for x [T, in], weight [out, in]. `segments` are ascending and do not overlap.

    anchor   any tensor that requires a gradient: given, the backward pass fills the gradient buffers of `factors`.
    """
    if anchor is not None and torch.is_grad_enabled():
        return _SlotLinear.apply(x, anchor, weight, bias, factors, segments)
    y = torch.nn.functional.linear(x, weight, bias)
    _add_updates(y, x, factors, segments)
    return y


def _add_updates(y: Tensor, x: Tensor, factors: Factors, segments: Sequence[Segment]) -> list[Tensor]:
    """Add each segment's low-rank update to its rows of y; return the scaled shrunk rows, (rows, r) a segment."""
    shrunk = []
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        u = (x[rows] @ factors.a[segment.slot].T) * segment.scale
        y[rows].addmm_(u, factors.b[segment.slot].T)
        shrunk.append(u)
    return shrunk


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the product in the activations' dtype, the sum in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
