"""Keys and values of the live sequences, and the two ways of attending to them.

Legend: N rows, H_kv key heads, G query heads a key head, L positions, D head size.

One pair of slabs `[lanes, H_kv, capacity, D]` a layer. A lane is one live sequence; live lanes are 0..n-1, without
holes, so attention reads a slice and gathers nothing. The slabs grow with what is live; nothing is set aside for
sequences that are not there. Behind its sequence a live lane holds zeros: what a lane's last owner left there (NaN, if
its adapter was broken) cannot reach the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.model.attention import Group, PackedPlan

LENGTH_STEP = 32  # positions: capacities are multiples of this
LANE_STEP = 16


@dataclass(frozen=True)
class Prefix:
    """A prompt that was prefilled: (keys, values) of each layer, [H_kv, length, D], and the next token's logits [V]."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int
    logits: Tensor


class KvCache:
    """`max_lanes` and `max_length` bound the growth; slabs appear when the first rows of a layer come in."""

    def __init__(self, max_lanes: int, max_length: int) -> None:
        self.max_lanes, self.max_length = max_lanes, max_length
        self.lanes, self.capacity = 0, 0
        self._slabs: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, lanes: int, length: int) -> None:
        """Make room for `lanes` sequences of `length` positions. What is there stays."""
        assert lanes <= self.max_lanes and length <= self.max_length
        if lanes <= self.lanes and length <= self.capacity:
            return
        self.lanes = _grown(self.lanes, lanes, LANE_STEP, self.max_lanes)
        self.capacity = _grown(self.capacity, length, LENGTH_STEP, self.max_length)
        for layer, (keys, values) in self._slabs.items():
            self._slabs[layer] = (self._resized(keys), self._resized(values))

    def clear(self) -> None:
        """Forget everything and free the memory: the engine is idle. What follows does not depend on what was."""
        self.lanes, self.capacity = 0, 0
        self._slabs = {}

    def slabs(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, each [lanes, H_kv, capacity, D]; made for rows `like` [H_kv, N, D]."""
        if layer not in self._slabs:
            shape = (self.lanes, like.shape[0], self.capacity, like.shape[2])
            self._slabs[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._slabs[layer]

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` positions of lanes `sources` over lanes `targets` (int64, disjoint). `length` covers
        the sequences of both."""
        for slab in self._all():
            slab[:, :, :length].index_copy_(0, targets, slab[:, :, :length].index_select(0, sources))

    def wipe(self, lanes: slice) -> None:
        """Zero lanes before sequences move in: a masked position still counts 0 times its value, and 0 * NaN is NaN."""
        for slab in self._all():
            slab[lanes] = 0

    def read_prefix(self, lane: int, length: int, logits: Tensor) -> Prefix:
        """A copy of the first `length` positions of a lane."""
        ordered = (self._slabs[layer] for layer in sorted(self._slabs))
        layers = tuple((k[lane, :, :length].clone(), v[lane, :, :length].clone()) for k, v in ordered)
        return Prefix(layers, length, logits)

    def write_prefix(self, lanes: Tensor, prefix: Prefix) -> None:
        """Let `lanes` (int64) begin with a prompt that was prefilled before."""
        for layer, parts in zip(sorted(self._slabs), prefix.layers, strict=True):
            for slab, part in zip(self._slabs[layer], parts, strict=True):
                slab[:, :, : prefix.length].index_copy_(0, lanes, part.expand(len(lanes), *part.shape))

    def _all(self) -> list[Tensor]:
        return [slab for pair in self._slabs.values() for slab in pair]

    def _resized(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self.lanes, old.shape[1], self.capacity, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


@dataclass(frozen=True)
class PromptGroup:
    """`count` distinct prompts of `length` tokens, back to back from row `start`. Lane `lanes[i]` begins with prompt
    `sources[i]` (0..count-1); both int64."""

    start: int
    count: int
    length: int
    lanes: Tensor
    sources: Tensor


class PrefillPlan:
    """Whole prompts, causal, each once; attends as the trainer does, and keeps keys and values for each lane."""

    def __init__(self, cache: KvCache, groups: Sequence[PromptGroup]) -> None:
        self._cache, self._groups = cache, groups
        self._packed = PackedPlan([Group(g.start, g.count, g.length) for g in groups])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.slabs(layer, k)
        for group in self._groups:
            for slab, new in ((keys, k), (values, v)):
                rows = new[:, group.start : group.start + group.count * group.length]
                prompts = rows.unflatten(1, (group.count, group.length)).transpose(0, 1)  # (count, H_kv, length, D)
                slab[:, :, : group.length].index_copy_(0, group.lanes, prompts.index_select(0, group.sources))
        return self._packed.attend(layer, q, k, v, scale)


class DecodePlan:
    """One new row a lane. Row r belongs to lane `order[r]`; no `order`: row r is lane r, and nothing is gathered.

    positions  [n] int64 by lane: where the new key goes; the lane's sequence is 0..position
    order      [n] int64, or None
    """

    def __init__(
        self, cache: KvCache, positions: Tensor, longest: int, order: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._cache, self._positions, self._length = cache, positions, longest
        self._order = order
        self._inverse = None if order is None else torch.argsort(order)
        steps = torch.arange(longest, device=positions.device)
        mask = torch.zeros(len(positions), longest, device=positions.device, dtype=dtype)
        mask.masked_fill_(steps > positions[:, None], -torch.inf)
        self._mask = mask[:, None, None]  # (n, 1, 1, L)
        self._places: Tensor | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.slabs(layer, k)
        places = self._key_places(k.shape[0])
        keys.view(-1, keys.shape[3]).index_copy_(0, places, k.transpose(0, 1).reshape(-1, k.shape[2]))
        values.view(-1, values.shape[3]).index_copy_(0, places, v.transpose(0, 1).reshape(-1, v.shape[2]))
        heads, lanes, size = q.shape
        q = q.transpose(0, 1)  # (n, H_q, D)
        if self._inverse is not None:
            q = q.index_select(0, self._inverse)
        # Query heads that share a key head become rows of it: no key is repeated.
        q = q.reshape(lanes, k.shape[0], heads // k.shape[0], size)
        live = slice(0, lanes), slice(None), slice(0, self._length)
        out = _attend_to_cache(q, keys[live], values[live], self._mask, scale)
        out = out.reshape(lanes, heads, -1)  # (n, H_q, D)
        return out if self._order is None else out.index_select(0, self._order)

    def _key_places(self, heads: int) -> Tensor:
        """Rows of a slab seen as [lanes * H_kv * capacity, D] that take the new keys, (row, head) by (row, head)."""
        if self._places is None:
            n, device = len(self._positions), self._positions.device
            lanes = torch.arange(n, device=device) if self._order is None else self._order
            columns = torch.arange(heads, device=device)
            capacity = self._cache.capacity
            places = (lanes[:, None] * heads + columns) * capacity + self._positions[lanes][:, None]
            self._places = places.reshape(-1)
        return self._places


def _attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (n, H_kv, G, D), k and v (n, H_kv, L, D), mask (n, 1, 1, L) -> (n, H_kv, G, D).

    On a CPU as two batched products: one query a lane is too little for the fused kernel, which then takes up to five
    times as long on two threads. In bfloat16 it keeps its weights in float32, which products would not.
    """
    if q.device.type != "cpu" or q.dtype != torch.float32:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.softmax(torch.matmul(q * scale, k.mT) + mask, -1) @ v


def _grown(have: int, need: int, step: int, limit: int) -> int:
    """At least `need`; when it must grow, at least doubled, a multiple of `step`, never above `limit`."""
    if need <= have:
        return have
    wanted = max(need, 2 * have)
    return min(-(-wanted // step) * step, limit)
