"""Who may use the trainer next: deficit round robin over passes (Shreedhar and Varghese, SIGCOMM 1995).

In each pass every run with work is granted `quantum` tokens and spends them on whole micro-batches; what is left over
is kept while it has work. With quantum at least the largest micro-batch, over any K passes in which a run had work

    |tokens it learnt - K * quantum| < its largest micro-batch

so no two such runs are further apart than their micro-batches, however long their sequences and large their batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from graftwork.store.layout import RunId


def fits(tokens: Sequence[int], room: Sequence[int]) -> bool:
    """Whether each rank has room for its tokens."""
    return all(needed <= left for needed, left in zip(tokens, room, strict=True))


@dataclass
class DeficitRoundRobin:
    """`credit`: tokens that each run with work may still learn in this pass."""

    quantum: int
    credit: dict[RunId, int] = field(default_factory=dict)

    def grant(self, with_work: Iterable[RunId]) -> None:
        """A pass begins. A run that has no work gets nothing, and what it had left is forgotten: the share that it did
        not use was used by the others, and cannot be saved up."""
        self.credit = {run: self.credit.get(run, 0) + self.quantum for run in with_work}

    def affords(self, run: RunId, tokens: int) -> bool:
        return tokens <= self.credit.get(run, 0)

    def spend(self, run: RunId, tokens: int) -> None:
        assert self.affords(run, tokens)
        self.credit[run] -= tokens

    def forget(self, run: RunId) -> None:
        """The run has no more work, or no slot."""
        self.credit.pop(run, None)
