"""The adapted linear layer as a pure function of tensors: rows of several slots in one call.

    y = x W^T + b;    y[rows of slot k] += scale_k * (x[rows of slot k] A_k^T) B_k^T

A [S, r, in] and B [S, out, r] are stacked over slots and are never re-stacked: a segment reads its slot in place. The
scale goes into the small rows x r product. Gradients of A and B are added to buffers of the same shape, in place:
autograd would make a dense gradient over all slots for one indexed slot.

Source: LoRA (arXiv 2106.09685); many adapters in one call by segments of rows as in Punica (arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

FILLED_ROWS_MAX = 256
FILLED_SHARE_MAX = 2
"""A batch of slots is filled up to so many rows, or so many times the rows that there are."""


ONE_THREAD_ROWS_MAX = 128
"""Up to so many rows the products of a batch of slots are too small for several threads."""


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
    scales       [K, 1, 1] in the dtype of the activations
    rows         [K * M] int64: which row of start:stop stands in each place; None: all segments have M rows
    places       [stop - start] int64: the place of each row; None likewise
    """

    start: int
    stop: int
    slots: Tensor | slice
    scales: Tensor
    rows: Tensor | None = None
    places: Tensor | None = None

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
        scales = like.new_tensor([segment.scale for segment in segments])[:, None, None]
        start, stop = segments[0].start, segments[-1].stop
        if min(lengths) == longest:
            return SlotBatch(start, stop, slots, scales)
        places = torch.cat([torch.arange(length) + index * longest for index, length in enumerate(lengths)])
        rows = torch.zeros(len(lengths) * longest, dtype=torch.int64)
        rows[places] = torch.arange(count)
        return SlotBatch(start, stop, slots, scales, rows.to(like.device), places.to(like.device))


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


def slot_linear_batched(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors, batch: SlotBatch) -> Tensor:
    """What `slot_linear` computes without gradients, for the segments of `batch`."""
    y = torch.nn.functional.linear(x, weight, bias)
    with _one_thread(x.device) if len(x) <= ONE_THREAD_ROWS_MAX else nullcontext():
        _add_batched_updates(y, x, factors, batch)
    return y


def _add_batched_updates(y: Tensor, x: Tensor, factors: Factors, batch: SlotBatch) -> None:
    a, b = factors.a[batch.slots], factors.b[batch.slots]  # (K, r, in), (K, out, r)
    own_x, own_y = x[batch.start : batch.stop], y[batch.start : batch.stop]
    if batch.rows is None or batch.places is None:
        u = torch.bmm(own_x.view(len(a), -1, x.shape[1]), a.mT) * batch.scales  # (K, M, r)
        own_y.view(len(a), -1, y.shape[1]).baddbmm_(u, b.mT)
        return
    filled = own_x.index_select(0, batch.rows).view(len(a), -1, x.shape[1])
    u = torch.bmm(filled, a.mT) * batch.scales
    own_y.add_(torch.bmm(u, b.mT).flatten(0, 1).index_select(0, batch.places))


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, for small products: waking the other threads for one takes longer than the product. The setting is the
    calling thread's, but MKL's is the process's: another thread's products are slower meanwhile."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
