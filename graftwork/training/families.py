"""Sequences that begin alike, as the answers to one prompt do: what they share is computed once.

What may be shared ends before the row that predicts the first token with loss: so every row that carries loss belongs
to one sequence. The gradients of the sequences' rows add up in what they share, which is what they do without sharing.

A sequence's rows end with the one that predicts its last token with loss: nothing attends to those behind it. Of an
answer that is the row of its last token.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SHARED_TOKENS_MIN = 4
"""Below, sequences are computed whole: more calls of attention would cost more than the rows."""
WHOLE_MAX = 4
"""Attention lays sequences out whole: so many times a micro-batch's budget of rows is the most for their tokens."""
PARTS_A_RANK = 2
"""With several ranks, no family is larger than a rank's even share, so many times divided."""


class Sequenced(Protocol):
    """token_ids [L] int32; loss_mask [L] bool."""

    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...


@dataclass(frozen=True)
class Family:
    """members: indices of sequences whose first `shared` tokens are the same, shorter ones first; of one alone, shared
    is 0. lengths: of each, all the rows that it needs."""

    shared: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shared + sum(self.lengths) - self.shared * len(self.members)

    @property
    def cost(self) -> int:
        """What it takes of a micro-batch's budget: its rows, or a share of its sequences' rows where that is more."""
        return max(self.rows, -(-sum(self.lengths) // WHOLE_MAX))

    @property
    def place(self) -> tuple[int, int, int]:
        """What families are sorted by: so that those whose attention is one call lie side by side."""
        return self.shared, self.lengths[-1], self.members[0]


def families(examples: Sequence[Sequenced], budget: int, *, share: bool, ranks: int = 1) -> list[Family]:
    """All sequences, each in one family that fits into a micro-batch of `budget`, sorted by `place`. No sequence may be
    longer.

    share  False: each sequence is alone
    ranks  that the families are dealt to: large ones are cut, so that each rank can have as much as the others
    """
    found: dict[Hashable, list[int]] = {}
    for index, example in enumerate(examples):
        shared = _may_share(example) if share else 0
        key = example.token_ids[:shared].tobytes() if shared >= SHARED_TOKENS_MIN else index
        found.setdefault(key, []).append(index)
    made = [family for members in found.values() for family in _cut(members, examples, budget)]
    if ranks > 1:
        even = sum(family.rows for family in made) // (PARTS_A_RANK * ranks)
        made = [part for family in made for part in _cut(family.members, examples, min(budget, even))]
    return sorted(made, key=lambda family: family.place)


def _may_share(example: Sequenced) -> int:
    """Tokens before the one whose row predicts the first loss token; none where there is no loss."""
    return max(int(np.argmax(example.loss_mask)) - 1, 0)


def rows_needed(example: Sequenced) -> int:
    """As many rows as come before the last token with loss: the last of them predicts it. Without loss, one."""
    with_loss = np.flatnonzero(example.loss_mask)  # never the first: nothing predicts it
    return int(with_loss[-1]) if with_loss.size else 1


def _cut(members: Sequence[int], examples: Sequence[Sequenced], budget: int) -> Iterator[Family]:
    """Families that cost at most `budget`, but for a sequence that alone is longer."""
    lengths = {index: rows_needed(examples[index]) for index in members}
    shared = _may_share(examples[members[0]])
    part: list[int] = []
    for index in sorted(members, key=lambda index: (lengths[index], index)):
        if part and _family([*part, index], lengths, shared).cost > budget:
            yield _family(part, lengths, shared)
            part = []
        part.append(index)
    yield _family(part, lengths, shared)


def _family(members: Sequence[int], lengths: dict[int, int], shared: int) -> Family:
    return Family(shared if len(members) > 1 else 0, tuple(members), tuple(lengths[index] for index in members))


def split(found: Sequence[Family], budget: int) -> list[list[Family]]:
    """Families a micro-batch: in their order, filled up to a cost of `budget` each; none is empty."""
    parts: list[list[Family]] = []
    used = budget + 1
    for family in found:
        assert family.cost <= budget, f"a sequence of {family.rows} tokens does not fit into {budget}"
        if used + family.cost > budget:
            parts.append([])
            used = 0
        parts[-1].append(family)
        used += family.cost
    return parts


def shares(found: Sequence[Family], ranks: int) -> list[list[Family]]:
    """Families a rank: the largest first, each to the rank that has the fewest rows. Each rank's are sorted by
    `place`."""
    dealt: list[list[Family]] = [[] for _ in range(ranks)]
    rows = [0] * ranks
    for family in sorted(found, key=lambda family: (-family.rows, family.members)):
        rank = rows.index(min(rows))
        dealt[rank].append(family)
        rows[rank] += family.rows
    return [sorted(own, key=lambda family: family.place) for own in dealt]
