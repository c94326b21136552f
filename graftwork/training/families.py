"""Sequences that begin alike, as the answers to one prompt do: what they share is computed once.

What may be shared ends before the row that predicts the first token with loss: so every row that carries loss belongs
to one sequence. The gradients of the sequences' rows add up in what they share, which is what they do without sharing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

SHARED_TOKENS_MIN = 4
"""Below, sequences are computed whole: more calls of attention would cost more than the rows."""


class Sequenced(Protocol):
    """token_ids [L] int32; loss_mask [L] bool."""

    @property
    def token_ids(self) -> NDArray[np.int32]: ...
    @property
    def loss_mask(self) -> NDArray[np.bool_]: ...


@dataclass(frozen=True)
class Family:
    """members: indices of sequences whose first `shared` tokens are the same, shorter ones first; of one alone, shared
    is 0. lengths: of each, all its tokens."""

    shared: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shared + sum(self.lengths) - self.shared * len(self.members)

    @property
    def place(self) -> tuple[int, int, int]:
        """What families are sorted by: so that those whose attention is one call lie side by side."""
        return self.shared, self.lengths[-1], self.members[0]


def families(examples: Sequence[Sequenced], budget: int, *, share: bool, at_least: int = 1) -> list[Family]:
    """All sequences, each in one family of at most `budget` rows, sorted by `place`. No sequence may be longer.

    share     False: each sequence is alone
    at_least  so many families, if there are as many sequences: for as many ranks to have work
    """
    found: dict[Hashable, list[int]] = {}
    for index, example in enumerate(examples):
        shared = _may_share(example) if share else 0
        key = example.token_ids[:shared].tobytes() if shared >= SHARED_TOKENS_MIN else index
        found.setdefault(key, []).append(index)
    most = -(-len(examples) // at_least) if len(found) < at_least else len(examples)
    made = [family for members in found.values() for family in _cut(members, examples, budget, most)]
    return sorted(made, key=lambda family: family.place)


def _may_share(example: Sequenced) -> int:
    """Tokens before the one whose row predicts the first loss token; none where there is no loss."""
    return max(int(np.argmax(example.loss_mask)) - 1, 0)


def _cut(members: Sequence[int], examples: Sequence[Sequenced], budget: int, most: int) -> Iterator[Family]:
    """Families of at most `budget` rows and `most` sequences."""
    lengths = {index: len(examples[index].token_ids) for index in members}
    shared = _may_share(examples[members[0]])
    part: list[int] = []
    used = shared
    for index in sorted(members, key=lambda index: (lengths[index], index)):
        assert lengths[index] <= budget, f"a sequence of {lengths[index]} tokens does not fit into {budget}"
        own = lengths[index] - shared
        if part and (used + own > budget or len(part) == most):
            yield _family(part, lengths, shared)
            part, used = [], shared
        part.append(index)
        used += own
    yield _family(part, lengths, shared)


def _family(members: Sequence[int], lengths: dict[int, int], shared: int) -> Family:
    return Family(shared if len(members) > 1 else 0, tuple(members), tuple(lengths[index] for index in members))


def split(found: Sequence[Family], budget: int) -> list[list[Family]]:
    """Families a micro-batch: in their order, filled up to `budget` rows each; none is empty."""
    parts: list[list[Family]] = []
    used = budget + 1
    for family in found:
        if used + family.rows > budget:
            parts.append([])
            used = 0
        parts[-1].append(family)
        used += family.rows
    return parts


def shares(found: Sequence[Family], ranks: int) -> list[list[Family]]:
    """Families a rank: sorted by rows and dealt out, so that every rank has large and small ones, and as many as the
    others or one less. Each rank's are sorted by `place`."""
    order = sorted(found, key=lambda family: (family.rows, family.members))
    return [sorted(order[rank::ranks], key=lambda family: family.place) for rank in range(ranks)]
