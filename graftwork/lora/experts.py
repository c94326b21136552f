"""The adapted experts of a mixture as pure functions of tensors: rows of several slots, routed to E experts, at once.

    for each token t and each of its K experts e:   h = act(gate) * up;   y_t += weight_te * down
    gate = W_gate[e] x_t + scale * B_gate[slot, e] (A_gate[slot, e] x_t),   up and down likewise

The base keeps gate above up in one tensor, `gate_up [E, 2I, H]`; a slot's factors of the two are apart. (token, expert)
pairs are sorted by expert, so that every product is over contiguous rows: one grouped product over all experts where
the device has one, a loop over those that were chosen elsewhere. Nothing is scattered with atomics: the same rows give
the same bits, backwards too.

Source: mixture of experts by sorted pairs and grouped products as in MegaBlocks (arXiv 2211.15841).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.lora.linear import Factors, Segment, accumulate

GROUPED_ALIGNMENT_BYTES = 16  # rows and strides of torch's grouped product


@dataclass(frozen=True)
class Blocks:
    """Rows that are sorted by group: rows ends[g-1]:ends[g] belong to group g.

    ends       [G] int32, on the device
    ends_host  the same as numbers; None where the grouped product is used, which needs none (and no sync)
    """

    ends: Tensor
    ends_host: Sequence[int] | None

    def each(self) -> list[tuple[int, slice]]:
        """(group, its rows) of every group that has rows."""
        assert self.ends_host is not None
        starts = [0, *self.ends_host[:-1]]
        pairs = zip(starts, self.ends_host, strict=True)
        return [(group, slice(start, end)) for group, (start, end) in enumerate(pairs) if end > start]


@dataclass(frozen=True)
class SlotRows:
    """The pairs of one segment. rows: their places among all pairs [n] int64, None for all. blocks: by expert."""

    slot: int
    scale: float
    rows: Tensor | None
    blocks: Blocks


@dataclass(frozen=True)
class Dispatch:
    """Which pairs there are, P = T * K, sorted by expert.

    order    [P] int64: place in the order (token, k) of each sorted pair
    inverse  [P] int64: its inverse permutation
    """

    order: Tensor
    inverse: Tensor
    per_token: int
    blocks: Blocks
    segments: Sequence[SlotRows]


def dispatch(experts_of: Tensor, experts: int, segments: Sequence[Segment], *, grouped: bool) -> Dispatch:
    """Sort the pairs of `experts_of [T, K]` int64 by expert, and tell which of them are which segment's."""
    tokens, per_token = experts_of.shape
    flat = experts_of.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    sorted_experts = flat[order]
    found = []
    for segment in segments:
        if (segment.start, segment.stop) == (0, tokens):
            found.append(SlotRows(segment.slot, segment.scale, None, _blocks(sorted_experts, experts, grouped)))
            continue
        token = order // per_token
        rows = torch.nonzero((token >= segment.start) & (token < segment.stop))[:, 0]
        found.append(SlotRows(segment.slot, segment.scale, rows, _blocks(sorted_experts[rows], experts, grouped)))
    return Dispatch(order, inverse, per_token, _blocks(sorted_experts, experts, grouped), found)


def _blocks(sorted_experts: Tensor, experts: int, grouped: bool) -> Blocks:
    groups = torch.arange(experts, device=sorted_experts.device)
    ends = torch.searchsorted(sorted_experts, groups, right=True).to(torch.int32)
    return Blocks(ends, None if grouped else ends.tolist())


def can_group(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> bool:
    """Whether torch's grouped product takes matrices with rows of these sizes here. On a CPU the loop is as fast."""
    if device.type != "cuda" or dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(size * dtype.itemsize % GROUPED_ALIGNMENT_BYTES == 0 for size in sizes)


def grouped_product(x: Tensor, weights: Tensor, blocks: Blocks) -> Tensor:
    """y [P, n] = x [P, m] times weights [G, m, n] of each row's group."""
    if blocks.ends_host is None:
        return torch.nn.functional.grouped_mm(x, weights, offs=blocks.ends)
    y = x.new_zeros(x.shape[0], weights.shape[2])
    for group, rows in blocks.each():
        torch.mm(x[rows], weights[group], out=y[rows])
    return y


def accumulate_groups(total: Tensor, left: Tensor, right: Tensor, blocks: Blocks) -> None:
    """total [G, m, n] += left[rows of g]^T @ right[rows of g], left [P, m], right [P, n]."""
    if blocks.ends_host is None:
        total.add_(torch.nn.functional.grouped_mm(left.T, right, offs=blocks.ends))
        return
    for group, rows in blocks.each():
        accumulate(total[group], left[rows].T, right[rows])


@dataclass(frozen=True)
class Part:
    """Factors of the rows `columns` of the base's weight: of gate, of up, or of all of down."""

    factors: Factors
    columns: slice


class _SlotExperts(torch.autograd.Function):
    """One product over all experts, with the slots' updates; as `_SlotLinears`, group by group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, weight: Tensor, parts: Sequence[Part], plan: Dispatch
    ) -> Tensor:
        y, shrunk = _forward(x, weight, parts, plan)
        ctx.save_for_backward(x, weight, *shrunk)
        ctx.parts, ctx.plan = parts, plan
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *shrunk = ctx.saved_tensors
        plan: Dispatch = ctx.plan
        grad_x = grouped_product(grad_y, weight, plan.blocks) if ctx.needs_input_grad[0] else None
        remaining = iter(shrunk)
        for part in ctx.parts:
            for segment in plan.segments:
                update = _part_backward(part, segment, x, grad_y, next(remaining))
                if grad_x is not None:
                    _add_rows(grad_x, segment.rows, update)
        return grad_x, None, None, None, None


def _part_backward(part: Part, segment: SlotRows, x: Tensor, grad_y: Tensor, u: Tensor) -> Tensor:
    """Add one segment's gradients of one part's factors to their buffers; return what it adds to the input's."""
    factors = part.factors
    assert factors.grad_a is not None and factors.grad_b is not None
    grad_rows = _take(grad_y, segment.rows)[:, part.columns].contiguous()  # (n, out)
    grad_u = grouped_product(grad_rows, factors.b[segment.slot], segment.blocks) * segment.scale  # (n, r)
    accumulate_groups(factors.grad_b[segment.slot], grad_rows, u, segment.blocks)
    accumulate_groups(factors.grad_a[segment.slot], grad_u, _take(x, segment.rows), segment.blocks)
    return grouped_product(grad_u, factors.a[segment.slot], segment.blocks)


def _forward(x: Tensor, weight: Tensor, parts: Sequence[Part], plan: Dispatch) -> tuple[Tensor, list[Tensor]]:
    """(y [P, out], scaled shrunk rows of each part and segment) for x [P, in], weight [E, out, in]."""
    y = grouped_product(x, weight.mT, plan.blocks)
    shrunk = []
    for part in parts:
        for segment in plan.segments:
            rows = _take(x, segment.rows)
            u = grouped_product(rows, part.factors.a[segment.slot].mT, segment.blocks) * segment.scale
            update = grouped_product(u, part.factors.b[segment.slot].mT, segment.blocks)
            _add_rows(y[:, part.columns], segment.rows, update)
            shrunk.append(u)
    return y, shrunk


def _take(rows: Tensor, which: Tensor | None) -> Tensor:
    return rows if which is None else rows[which]


def _add_rows(total: Tensor, which: Tensor | None, update: Tensor) -> None:
    """total[which] += update, in place; no row stands in `which` twice."""
    if which is None:
        total.add_(update)
    else:
        total[which] += update


class _Spread(torch.autograd.Function):
    """Token rows [T, H] to sorted pairs [P, H]; backwards, a token's pairs are summed in the order of k."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return x[plan.order // plan.per_token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.plan.inverse].unflatten(0, (-1, ctx.plan.per_token)).sum(1), None


class _Unsort(torch.autograd.Function):
    """Sorted pairs [P, H] to the order (token, k)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Dispatch) -> Tensor:
        ctx.plan = plan
        return y[plan.inverse]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.plan.order], None


@dataclass(frozen=True)
class ExpertWeights:
    """The frozen experts of a layer: gate_up [E, 2I, H], gate above up; down [E, H, I]."""

    gate_up: Tensor
    down: Tensor
    activation: Callable[[Tensor], Tensor]


def slot_experts(
    x: Tensor, experts_of: Tensor, weights_of: Tensor, base: ExpertWeights, parts: dict[str, Factors],
    segments: Sequence[Segment], anchor: Tensor | None,
) -> Tensor:  # fmt: skip
    """y [T, H] for x [T, H], its experts experts_of [T, K] int64 and their weights weights_of [T, K].

    parts    factors by projection, any of gate_proj, up_proj, down_proj
    anchor   as in `slot_linears`
    """
    middle = base.down.shape[2]
    ranks = [factors.a.shape[-2] for factors in parts.values()]
    grouped = can_group(x.device, x.dtype, [x.shape[1], middle, *ranks])
    plan = dispatch(experts_of, base.down.shape[0], segments, grouped=grouped)
    columns = {"gate_proj": slice(middle), "up_proj": slice(middle, 2 * middle)}
    above = [Part(parts[name], where) for name, where in columns.items() if name in parts]
    below = [Part(parts["down_proj"], slice(None))] if "down_proj" in parts else []
    gate, up = _product(_Spread.apply(x, plan), anchor, base.gate_up, above, plan).chunk(2, dim=-1)
    y = _product(base.activation(gate) * up, anchor, base.down, below, plan)
    pairs = _Unsort.apply(y, plan).unflatten(0, experts_of.shape)  # (T, K, H)
    return (pairs * weights_of[..., None].to(pairs.dtype)).sum(1)


def _product(x: Tensor, anchor: Tensor | None, weight: Tensor, parts: Sequence[Part], plan: Dispatch) -> Tensor:
    if torch.is_grad_enabled() and (anchor is not None or x.requires_grad):
        return _SlotExperts.apply(x, anchor, weight, parts, plan)
    return _forward(x, weight, parts, plan)[0]
