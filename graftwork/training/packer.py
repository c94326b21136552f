"""Sequences to micro-batches: flat rows, no padding, equal lengths side by side.

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

from graftwork.model.attention import Group, PackedPlan


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
    loss_rows, targets           [N] int64: hidden state of row loss_rows[i] predicts targets[i]
    sampler_logprobs, advantages [N] float32
    weights                      [N] float32: share of each token's loss in the batch's loss (the normaliser)
    """

    tokens: Tensor
    positions: Tensor
    plan: PackedPlan
    loss_rows: Tensor
    targets: Tensor
    sampler_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


def split(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences a micro-batch: sorted by length (ties by index), filled up to `budget` tokens each.

    Every index appears once; no micro-batch is empty or above the budget. No length may be above it.
    """
    parts: list[list[int]] = []
    used = budget + 1
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        assert lengths[index] <= budget, f"a sequence of {lengths[index]} tokens does not fit into {budget}"
        if used + lengths[index] > budget:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += lengths[index]
    return parts


def build(examples: Sequence[Example], weights: Sequence[float], device: torch.device) -> MicroBatch:
    """Lay out examples, already sorted by length; `weights`: one number a sequence, for each of its loss tokens."""
    lengths = [len(example.token_ids) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    masks = [np.flatnonzero(example.loss_mask) for example in examples]
    per_loss_token = [len(mask) for mask in masks]
    return MicroBatch(
        tokens=_int64(np.concatenate([e.token_ids for e in examples]), device),
        positions=_int64(np.concatenate([np.arange(length) for length in lengths]), device),
        plan=PackedPlan(_groups(lengths)),
        loss_rows=_int64(np.concatenate([m - 1 + start for m, start in zip(masks, starts, strict=True)]), device),
        targets=_int64(np.concatenate([e.token_ids[m] for e, m in zip(examples, masks, strict=True)]), device),
        sampler_logprobs=_float32(
            np.concatenate([e.sampler_logprobs[m] for e, m in zip(examples, masks, strict=True)]), device
        ),
        advantages=_float32(np.repeat([e.advantage for e in examples], per_loss_token), device),
        weights=_float32(np.repeat(np.asarray(weights), per_loss_token), device),
    )


def idle_micro_batch(device: torch.device) -> MicroBatch:
    """Two tokens (torch.compile takes one for a case of its own), and nothing to learn."""
    rows, none = torch.arange(2, device=device), torch.empty(0, dtype=torch.int64, device=device)
    floats = torch.empty(0, device=device)
    return MicroBatch(torch.zeros_like(rows), rows, PackedPlan([Group(0, 1, 2)]), none, none, floats, floats, floats)


@dataclass(frozen=True)
class Round:
    """What the ranks learn of one run at the same time: one micro-batch each, or none.

    tokens  of each rank's, 0 where it has none
    micro   this rank's; None where it has none
    """

    tokens: tuple[int, ...]
    micro: MicroBatch | None


def shares(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of sequences a rank: sorted by length (ties by index) and dealt out, so that every rank has sequences of
    every length, and as many as the others or one less."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    return [order[rank::ranks] for rank in range(ranks)]


def pack(
    examples: Sequence[Example], weights: Sequence[float], budget: int, device: torch.device, rank: int = 0,
    ranks: int = 1,
) -> list[Round]:  # fmt: skip
    """All examples, dealt out over the ranks, as rounds of micro-batches of at most `budget` tokens a rank."""
    lengths = [len(example.token_ids) for example in examples]
    parts = [
        [[share[i] for i in part] for part in split([lengths[i] for i in share], budget)]
        for share in shares(lengths, ranks)
    ]
    rounds = []
    for at_once in zip_longest(*parts, fillvalue=()):
        own = at_once[rank]
        micro = build([examples[i] for i in own], [weights[i] for i in own], device) if own else None
        rounds.append(Round(tuple(sum(lengths[i] for i in part) for part in at_once), micro))
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
    starts = np.cumsum([0, *counts[:-1]])
    groups = [
        Group(int(start) + group.start, group.count, group.length)
        for start, micro in zip(starts, micros, strict=True)
        for group in micro.plan.groups
    ]
    tokens, positions = (torch.cat(parts) for parts in zip(*((m.tokens, m.positions) for m in micros), strict=True))
    return Rows(tokens, positions, PackedPlan(groups), counts)


def _groups(lengths: Sequence[int]) -> list[Group]:
    groups, start = [], 0
    for length, same in groupby(lengths):
        count = len(list(same))
        groups.append(Group(start, count, length))
        start += count * length
    return groups


def _int64(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def _float32(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
