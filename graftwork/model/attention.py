"""Attention that never lets one sequence see another, whatever else is in the micro-batch.

transformers hands every attention layer's q, k, v to `attend`; the `plan` that travels down the model's keyword
arguments says which rows are which sequence. There is no T x T mask: a NaN that is masked out still spreads through a
shared softmax (0 * NaN = NaN), and a mask over packed rows is quadratic work for nothing.

Sequences that begin alike, as the answers to one prompt do, may share the rows of their beginning (`Families`): a row
depends on those before it alone, so that it is the same in all of them. Every layer then has these rows once; only
attention lays keys and values of each sequence out whole. Its queries too, as if nothing were shared, where sequences
are long: kernels know no other way without a mask, and one of a short sequence alone is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from graftwork.errors import ModelError

NAME = "graftwork"
MASKED_POSITIONS_MAX = 512
"""Of a sequence: a mask between what it has of its own and all of it is then 1 MB a head of a group at most."""

Qkv = tuple[Tensor, Tensor, Tensor]
"""q [Hq, n, D], k and v [Hkv, n, D] of some rows; or of sequences, with their count in front."""


class AttentionPlan(Protocol):
    """How the rows of one forward pass attend."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [Hq, T, D], k and v [Hkv, T, D]; returns [T, Hq, D]."""
        ...


@dataclass(frozen=True)
class Group:
    """`count` sequences of `length` rows each, back to back from row `start`."""

    start: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def parts(self) -> list[Group]:
        return [self]

    def moved(self, rows: int) -> Group:
        return Group(self.start + rows, self.count, self.length)

    def attend(self, parts: Iterator[Qkv], scale: float) -> Iterator[Tensor]:
        """Takes the rows of its parts, and gives [rows, Hq, D] for each."""
        yield _causal(*self.sequences(next(parts)), scale)

    def sequences(self, qkv: Qkv) -> Qkv:
        """(count, H, length, D) of the group's rows (H, count * length, D)."""
        q, k, v = (t.unflatten(1, (self.count, self.length)).transpose(0, 1) for t in qkv)
        return q, k, v


@dataclass(frozen=True)
class Own:
    """What sequences have of their own behind a beginning that they share with others. family [count] int64: whose."""

    group: Group
    family: Tensor


@dataclass(frozen=True)
class Families:
    """Families of sequences that begin alike, all with beginnings of one length: `beginnings` has one sequence a
    family, whose rows are computed once; `own` follows right behind, and has what each sequence goes on with."""

    beginnings: Group
    own: Sequence[Own]

    @property
    def parts(self) -> list[Group]:
        return [self.beginnings, *(each.group for each in self.own)]

    def attend(self, parts: Iterator[Qkv], scale: float) -> Iterator[Tensor]:
        """As of a Group."""
        begun_q, begun_k, begun_v = self.beginnings.sequences(next(parts))
        yield _causal(begun_q, begun_k, begun_v, scale)
        unused = begun_q.detach()  # whose outputs are left out
        for each in self.own:
            own_q, own_k, own_v = each.group.sequences(next(parts))
            k = torch.cat([_Spread.apply(begun_k, each.family), own_k], 2)
            v = torch.cat([_Spread.apply(begun_v, each.family), own_v], 2)
            if k.shape[2] <= MASKED_POSITIONS_MAX:
                yield _causal_behind(own_q, k, v, scale)
            else:
                q = torch.cat([unused[each.family], own_q], 2)
                yield _causal(q, k, v, scale, behind=self.beginnings.length)

    def moved(self, rows: int) -> Families:
        return Families(self.beginnings.moved(rows), [Own(each.group.moved(rows), each.family) for each in self.own])


@dataclass(frozen=True)
class PackedPlan:
    """Whole sequences, causal, from position 0: training, and the log-probs of finished answers.

    `groups` cover all rows in order. Sequences of one length share a call; each is a batch entry of its own.
    """

    groups: Sequence[Group | Families]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        counts = [part.count * part.length for group in self.groups for part in group.parts]
        # The gradient of a split is one concatenation; that of each slice would be zeros for all rows.
        parts = zip(*(t.split(counts, 1) for t in (q, k, v)), strict=True)
        outputs = [out for group in self.groups for out in group.attend(parts, scale)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def moved(self, rows: int) -> PackedPlan:
        """The same sequences, so many rows further down."""
        return PackedPlan([group.moved(rows) for group in self.groups])


def _kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's attention; on a CPU in float32, whose kernel takes a third to a half of the time of bfloat16's there."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return out.to(q.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, *, behind: int = 0) -> Tensor:
    """q (count, Hq, length, D), k and v (count, Hkv, length, D); returns [count * (length - behind), Hq, D]: without
    the first `behind` positions of each sequence."""
    out = _kernel(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[:, :, behind:].transpose(1, 2).flatten(0, 1)


def _causal_behind(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As `_causal`, for q (count, Hq, length, D) that are the last of the positions of k and v (count, Hkv, L, D).

    Query heads that share a key head become rows of it: with a mask, not every kernel knows of groups of heads.
    """
    length, heads, keys = q.shape[2], q.shape[1], k.shape[1]
    seen = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - length)
    rows = q.unflatten(1, (keys, heads // keys)).flatten(2, 3)  # (count, Hkv, heads a key head * length, D)
    out = _kernel(rows, k, v, attn_mask=seen.repeat(heads // keys, 1), scale=scale)
    return out.unflatten(2, (heads // keys, length)).flatten(1, 2).transpose(1, 2).flatten(0, 1)


class _Spread(torch.autograd.Function):
    """[families, ...] to [sequences, ...], each sequence its family's. Backwards a product with zeros and ones: sums
    without atomics, so that the same rows give the same bits."""

    @staticmethod
    def forward(ctx: Any, begun: Tensor, family: Tensor) -> Tensor:
        ctx.save_for_backward(family)
        ctx.families = begun.shape[0]
        return begun[family]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (family,) = ctx.saved_tensors
        is_of = family == torch.arange(ctx.families, device=grad.device)[:, None]  # (families, sequences)
        return (is_of.to(grad.dtype) @ grad.flatten(1)).view(-1, *grad.shape[1:]), None


@torch.compiler.disable
def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, plan: AttentionPlan | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> ([1, T, Hq, D], no weights).

    torch.compile passes it by: it depends on the plan.
    """
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} did not pass the attention plan down; this architecture cannot be used"
        )
    if attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} uses an attention mask, soft cap or sink; only plain causal attention works"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(module.layer_idx, query[0], key[0], value[0], scale)[None], None  # type: ignore[arg-type]


def register() -> None:
    """Tell transformers about `attend`. A second time changes nothing."""
    AttentionInterface.register(NAME, attend)
