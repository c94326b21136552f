"""Adapted linear layers as pure functions of tensors: rows of several slots in one call.

    y = x W^T + b;    y[rows of slot k] += scale_k * (x[rows of slot k] A_k^T) B_k^T

A [S, r, in] and B [S, out, r] are stacked over slots and are never re-stacked: a segment reads its slot in place. The
scale goes into the small rows x r product. Layers that get the same input (q, k and v; gate and up) are computed in one
call: their A lie one above the other, so that one product shrinks the input for all, and one gives it its gradient.
Gradients of A and B are added to buffers of the same shape, in place:
autograd would make a dense gradient over all slots for one indexed slot.

Source: LoRA (arXiv 2106.09685); many adapters in one call by segments of rows as in Punica (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FILLED_ROWS_MAX = 256
FILLED_SHARE_MAX = 2
"""A batch of slots is filled up to so many rows, or so many times the rows that there are."""


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


@dataclass(frozen=True)
class SlotBatch:
    """Few rows of several slots, K segments side by side: a batched product costs less than a product a slot. Segments
    shorter than the longest (M rows) are filled up with rows whose results nobody reads, so nothing spreads by them.

    start, stop  the rows that are in segments; one behind the other
    slots        which slots: [K] int64, or a slice where they lie next to one another, which copies nothing
    scales       a number where all have the same, else [K, 1, 1] in the dtype of the activations
    rows         [K * M] int64: which row of start:stop stands in each place; None: all segments have M rows
    places       [stop - start] int64: the place of each row; None likewise
    taken        by siblings: their factors for these slots, as `take` gives them, where they are views: they are made
                 once for all steps of the same rows. Copies, of slots that are no neighbours, are not kept
    """

    start: int
    stop: int
    slots: Tensor | slice
    scales: Tensor | float
    rows: Tensor | None = None
    places: Tensor | None = None
    taken: dict[Siblings, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(segments: Sequence[Segment], like: Tensor) -> SlotBatch | None:
        """None where products one by one serve better: a single segment, lengths that differ much, gaps. `like` has
        the activations' dtype and device."""
        if len(segments) < 2 or any(one.stop != other.start for one, other in pairwise(segments)):
            return None
        lengths = [segment.stop - segment.start for segment in segments]
        count, longest = sum(lengths), max(lengths)
        if len(lengths) * longest > max(FILLED_ROWS_MAX, FILLED_SHARE_MAX * count):
            return None
        numbers = [segment.slot for segment in segments]
        side_by_side = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        slots = slice(numbers[0], numbers[-1] + 1) if side_by_side else torch.tensor(numbers, device=like.device)
        alike = len({segment.scale for segment in segments}) == 1
        scales = segments[0].scale if alike else like.new_tensor([s.scale for s in segments])[:, None, None]
        start, stop = segments[0].start, segments[-1].stop
        if min(lengths) == longest:
            return SlotBatch(start, stop, slots, scales)
        places = torch.cat([torch.arange(length) + index * longest for index, length in enumerate(lengths)])
        rows = torch.zeros(len(lengths) * longest, dtype=torch.int64)
        rows[places] = torch.arange(count)
        return SlotBatch(start, stop, slots, scales, rows.to(like.device), places.to(like.device))

    def take(self, siblings: Siblings) -> tuple[Tensor, list[Tensor]]:
        """A^T [K, in, n * r], and each member's B^T [K, r, out]."""
        if (held := self.taken.get(siblings)) is not None:
            return held
        found = (siblings.a[self.slots].mT, [member.b[self.slots].mT for member in siblings.members])
        if isinstance(self.slots, slice):
            self.taken[siblings] = found
        return found


@dataclass(frozen=True, eq=False)
class Siblings:
    """The stacked factors of n layers that get the same input. Equal to itself alone.

    members       each layer's; n may be 1
    a [S, n * r, in], grad_a likewise: the members' own, one above the other in the same memory
    """

    members: Sequence[Factors]
    a: Tensor
    grad_a: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    """A layer of the base: weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class _SlotLinears(torch.autograd.Function):
    """Saves the input and the shrunk rows (rows x n * r) only. `anchor` makes autograd call backward at the first
    layer, where the input itself needs no gradient; it gets none."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, layers: Sequence[Frozen], siblings: Siblings,
        segments: Sequence[Segment],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ys = tuple(layer(x) for layer in layers)
        shrunk = _add_updates(ys, x, siblings, segments)
        ctx.save_for_backward(x, *(layer.weight for layer in layers), *shrunk)
        ctx.siblings, ctx.segments = siblings, segments
        return ys

    @staticmethod
    def backward(ctx: Any, *grad_ys: Tensor) -> tuple[Tensor | None, ...]:
        siblings: Siblings = ctx.siblings
        count = len(siblings.members)
        x, *saved = ctx.saved_tensors
        grad_x = _base_backward(grad_ys, saved[:count]) if ctx.needs_input_grad[0] else None
        for segment, u in zip(ctx.segments, saved[count:], strict=True):
            rows = slice(segment.start, segment.stop)
            grad_rows = [grad_y[rows] for grad_y in grad_ys]  # (rows, out) each
            grad_u = _shrunk_backward(grad_rows, u, siblings, segment)
            assert siblings.grad_a is not None
            accumulate(siblings.grad_a[segment.slot], grad_u.T, x[rows])
            if grad_x is not None:
                grad_x[rows].addmm_(grad_u, siblings.a[segment.slot])
        return grad_x, None, None, None, None


def _base_backward(grad_ys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    grad_x = grad_ys[0] @ weights[0]
    for grad_y, weight in zip(grad_ys[1:], weights[1:], strict=True):
        grad_x.addmm_(grad_y, weight)
    return grad_x


def _shrunk_backward(grad_rows: Sequence[Tensor], u: Tensor, siblings: Siblings, segment: Segment) -> Tensor:
    """Add one segment's gradients of the members' B to their buffers; return that of x A^T, (rows, n * r)."""
    grads = []
    for member, grad, own_u in zip(siblings.members, grad_rows, u.chunk(len(grad_rows), 1), strict=True):
        assert member.grad_b is not None
        grads.append(grad @ member.b[segment.slot])
        accumulate(member.grad_b[segment.slot], grad.T, own_u)
    return (torch.cat(grads, 1) if len(grads) > 1 else grads[0]) * segment.scale


def slot_linears(
    x: Tensor, layers: Sequence[Frozen], siblings: Siblings, segments: Sequence[Segment], anchor: Tensor | None
) -> tuple[Tensor, ...]:
    """y [T, out] of each layer, for x [T, in]. `segments` are ascending and do not overlap.

    anchor   any tensor that requires a gradient: given, the backward pass fills the gradient buffers of the factors.
    """
    if anchor is not None and torch.is_grad_enabled():
        return _SlotLinears.apply(x, anchor, layers, siblings, segments)
    ys = tuple(layer(x) for layer in layers)
    _add_updates(ys, x, siblings, segments)
    return ys


def slot_linears_batched(
    x: Tensor, layers: Sequence[Frozen], siblings: Siblings, batch: SlotBatch
) -> tuple[Tensor, ...]:
    """What `slot_linears` computes without gradients, for the segments of `batch`."""
    ys = tuple(layer(x) for layer in layers)
    _add_batched_updates(ys, x, siblings, batch)
    return ys


def _add_batched_updates(ys: Sequence[Tensor], x: Tensor, siblings: Siblings, batch: SlotBatch) -> None:
    a, bs = batch.take(siblings)
    own_x = x[batch.start : batch.stop]
    if batch.rows is not None:
        own_x = own_x.index_select(0, batch.rows)
    u = torch.bmm(own_x.view(len(a), -1, x.shape[1]), a)  # (K, M, n * r)
    scale = 1.0 if isinstance(batch.scales, Tensor) else batch.scales
    if isinstance(batch.scales, Tensor):
        u = u * batch.scales
    for y, own_u, b in zip(ys, u.chunk(len(ys), 2), bs, strict=True):
        own_y = y[batch.start : batch.stop]
        if batch.places is None:
            own_y.view(len(a), -1, y.shape[1]).baddbmm_(own_u, b, alpha=scale)
        else:
            update = torch.bmm(own_u, b).flatten(0, 1).index_select(0, batch.places)
            own_y.add_(update, alpha=scale)


def _add_updates(ys: Sequence[Tensor], x: Tensor, siblings: Siblings, segments: Sequence[Segment]) -> list[Tensor]:
    """Add each segment's low-rank updates to its rows of each y; return the scaled shrunk rows, (rows, n * r) a
    segment."""
    shrunk = []
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        u = (x[rows] @ siblings.a[segment.slot].T) * segment.scale
        for y, member, own_u in zip(ys, siblings.members, u.chunk(len(ys), 1), strict=True):
            y[rows].addmm_(own_u, member.b[segment.slot].T)
        shrunk.append(u)
    return shrunk


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the product in the activations' dtype, the sum in fp32."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
