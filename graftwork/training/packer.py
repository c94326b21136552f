"""Sequences to micro-batches: flat rows, no padding, equal lengths side by side, what sequences share once, and nothing
behind the row that predicts a sequence's last token with loss.

A micro-batch depends on its own run's sequences and on the token budget, on nothing else: so a run's arithmetic is the
same beside other runs as alone (`isolation = "exact"`). `join` lays micro-batches of several runs behind one another
(`isolation = "mixed"`): every run keeps its own rows and its own attention calls.

With several ranks a run's sequences are dealt out over them, and the weights are those of all of them: so the sum of
the ranks' gradients is the gradient of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.model.attention import Families, Group, Own, PackedPlan
from graftwork.training.families import Family, families, shares, split


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    token_ids         [L] int32
    loss_mask         [L] bool; loss_mask[i]: predicting token i from those before it is learnt. loss_mask[0] is False.
    sampler_logprobs  [L] float32, meaningful where loss_mask
    advantage         what the sequence's log-probs are multiplied by; 1 in supervised learning
    sample            equal for the branches of one conversation, which count as one sequence where sequences are
                      weighted alike; None: it is one of its own
    """

    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    sampler_logprobs: NDArray[np.float32]
    advantage: float
    sample: int | None = None

    @property
    def loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class MicroBatch:
    """T rows of several sequences; N of them predict a token that carries loss.

    tokens, positions            [T] int64
    sequence_tokens              of all sequences, whole: more than T
    loss_rows, targets           [N] int64: hidden state of row loss_rows[i] predicts targets[i]
    sampler_logprobs, advantages [N] float32
    weights                      [N] float32: share of each token's loss in the batch's loss (the normaliser)
    """

    tokens: Tensor
    positions: Tensor
    sequence_tokens: int
    plan: PackedPlan
    loss_rows: Tensor
    targets: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a micro-batch: tokens first:stop of one sequence."""

    index: int
    first: int
    stop: int


def lay_out(found: Sequence[Family], device: torch.device) -> tuple[list[Span], PackedPlan]:
    """Whose tokens the rows are, in order, and how they attend; `found` is sorted by `place`."""
    spans: list[Span] = []
    groups: list[Group | Families] = []
    row = 0

    def add(new: Sequence[Span]) -> Group:
        """Spans of one length, back to back."""
        nonlocal row
        group = Group(row, len(new), new[0].stop - new[0].first)
        spans.extend(new)
        row = group.rows.stop
        return group

    for shared, together in groupby(found, key=lambda family: family.shared):
        if shared == 0:
            whole = [Span(family.members[0], 0, family.lengths[0]) for family in together]
            groups.extend(add(list(same)) for _, same in groupby(whole, key=lambda span: span.stop))
            continue
        alike = list(together)
        beginnings = add([Span(family.members[0], 0, shared) for family in alike])
        members = sorted(
            (length, number, index)
            for number, family in enumerate(alike)
            for index, length in zip(family.members, family.lengths, strict=True)
        )
        own = []
        for length, same in groupby(members, key=lambda member: member[0]):
            _, numbers, indices = zip(*same, strict=True)
            group = add([Span(index, shared, length) for index in indices])
            own.append(Own(group, torch.tensor(numbers, device=device)))
        groups.append(Families(beginnings, own))
    return spans, PackedPlan(groups)


def build(
    examples: Sequence[Example], weights: Sequence[float], found: Sequence[Family], device: torch.device
) -> MicroBatch:
    """Lay out the families' sequences; `weights`: one number a sequence of `examples`, for each of its loss tokens."""
    spans, plan = lay_out(found, device)
    rows = np.cumsum([0, *(span.stop - span.first for span in spans[:-1])])
    masks = [_predicted(examples[span.index], span) for span in spans]
    of = [examples[span.index] for span in spans]
    counts = [len(mask) for mask in masks]

    def chosen(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(e, name)[mask] for e, mask in zip(of, masks, strict=True)])

    starts = zip(spans, rows, masks, strict=True)
    return MicroBatch(
        tokens=_int64(np.concatenate([e.token_ids[s.first : s.stop] for e, s in zip(of, spans, strict=True)]), device),
        positions=_int64(np.concatenate([np.arange(span.first, span.stop) for span in spans]), device),
        sequence_tokens=sum(len(examples[index].token_ids) for family in found for index in family.members),
        plan=plan,
        loss_rows=_int64(np.concatenate([mask - 1 - span.first + row for span, row, mask in starts]), device),
        targets=_int64(chosen("token_ids"), device),
        sampler_logprobs=_float32(chosen("sampler_logprobs"), device),
        advantages=_float32(np.repeat([e.advantage for e in of], counts), device),
        weights=_float32(np.repeat([weights[span.index] for span in spans], counts), device),
    )


def _predicted(example: Example, span: Span) -> NDArray[np.int64]:
    """The tokens with loss that a span's rows predict, each from the row before it."""
    return span.first + 1 + np.flatnonzero(example.loss_mask[span.first + 1 : span.stop + 1])


def idle_micro_batch(device: torch.device) -> MicroBatch:
    """Two tokens (torch.compile takes one for a case of its own), and nothing to learn."""
    rows, none = torch.arange(2, device=device), torch.empty(0, dtype=torch.int64, device=device)
    floats = torch.empty(0, device=device)
    plan = PackedPlan([Group(0, 1, 2)])
    return MicroBatch(torch.zeros_like(rows), rows, 2, plan, none, none, floats, floats, floats)


@dataclass(frozen=True)
class Round:
    """What the ranks learn of one run at the same time: one micro-batch each, or none.

    tokens  rows of each rank's, 0 where it has none
    micro   this rank's; None where it has none
    """

    tokens: tuple[int, ...]
    micro: MicroBatch | None


def pack(
    examples: Sequence[Example], weights: Sequence[float], budget: int, device: torch.device, rank: int = 0,
    ranks: int = 1, *, share: bool = True,
) -> list[Round]:  # fmt: skip
    """All examples, dealt out over the ranks, as rounds of micro-batches of at most `budget` rows a rank. share:
    sequences that begin alike share the rows of their beginning."""
    dealt = shares(families(examples, budget, share=share, ranks=ranks), ranks)
    rounds = []
    for at_once in zip_longest(*(split(found, budget) for found in dealt), fillvalue=()):
        own = at_once[rank]
        micro = build(examples, weights, own, device) if own else None
        rounds.append(Round(tuple(sum(family.rows for family in found) for found in at_once), micro))
    return rounds


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass; part i owns `counts[i]` of them, in order."""

    tokens: Tensor
    positions: Tensor
    plan: PackedPlan
    counts: tuple[int, ...]


def join(micros: Sequence[MicroBatch]) -> Rows:
    """The rows of one or more micro-batches, one behind the other. Of one, they are its own tensors."""
    counts = tuple(len(micro.tokens) for micro in micros)
    if len(micros) == 1:
        return Rows(micros[0].tokens, micros[0].positions, micros[0].plan, counts)
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    groups = [group for start, micro in zip(starts, micros, strict=True) for group in micro.plan.moved(start).groups]
    tokens, positions = (torch.cat(parts) for parts in zip(*((m.tokens, m.positions) for m in micros), strict=True))
    return Rows(tokens, positions, PackedPlan(groups), counts)


def _int64(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _float32(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
