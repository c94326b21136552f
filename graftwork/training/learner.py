"""One run in its slot, without disk or network: snapshot in, examples through, snapshot out. RL and SFT share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.adapters.snapshot import Snapshot
from graftwork.config.schema import LossConfig, OptimizerConfig
from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.base import BaseModel, Route
from graftwork.model.logprobs import token_logprobs
from graftwork.training.loss import cross_entropy, policy_loss, sequence_weights
from graftwork.training.optim import SlotOptimizer, StepOutcome
from graftwork.training.packer import Example, MicroBatch, join, pack


@dataclass(frozen=True)
class LearnerConfig:
    """loss None: supervised learning (cross-entropy, mean over tokens)."""

    optimizer: OptimizerConfig
    loss: LossConfig | None
    temperature: float
    tokens_per_micro_batch: int
    logprob_chunk_tokens: int


@dataclass
class Sums:
    """Running sums over the tokens of a batch, for its line in metrics.jsonl."""

    loss: float = 0.0
    tokens: int = 0
    loss_tokens: int = 0
    entropy: float = 0.0
    mismatch_max: float = 0.0
    token_sums: dict[str, float] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Means a loss token of everything summed."""
        count = max(self.loss_tokens, 1)
        return {name: total / count for name, total in {"entropy": self.entropy, **self.token_sums}.items()}


@dataclass
class Banks:
    """Training slots, and the frozen starting adapters that KL losses compare with: same index, other memory."""

    base: BaseModel
    training: SlotBank
    reference: SlotBank | None = None

    @staticmethod
    def of(base: BaseModel, slots: int) -> Banks:
        return Banks(base, base.new_bank(slots, gradients=True))

    def references(self) -> SlotBank:
        """The reference bank; memory for it is taken when the first run needs it."""
        if self.reference is None:
            self.reference = self.base.new_bank(self.training.slots, gradients=False)
        return self.reference

    def reset(self, slot: int) -> None:
        self.training.reset(slot)
        if self.reference is not None:
            self.reference.reset(slot)


class Learner:
    """The run that holds `slot`. Its state is in the slot, the optimizer and `state`; `snapshot` returns all of it."""

    def __init__(self, banks: Banks, slot: int, config: LearnerConfig, snapshot: Snapshot) -> None:
        self.banks, self.slot, self.config = banks, slot, config
        self.state = snapshot.state
        self.companions = snapshot.companions
        self.sums = Sums()
        banks.reset(slot)
        banks.training.write(slot, _prepared(snapshot.adapter, self.state.rank, self.state.alpha))
        taken = self.state.optimizer_steps
        self.optimizer = SlotOptimizer(banks.training, slot, config.optimizer, steps_taken=taken)
        if snapshot.moments is not None:
            layout = banks.training.layout
            self.optimizer.restore(layout.pack(snapshot.moments[0]), layout.pack(snapshot.moments[1]))
        self.reference = self._hold_reference(snapshot)

    def _hold_reference(self, snapshot: Snapshot) -> Adapter | None:
        """The run's starting adapter, in the reference bank, where its loss needs it."""
        if not self.needs_reference:
            return snapshot.reference
        reference = snapshot.reference or (snapshot.adapter if snapshot.state.step == 0 else None)
        assert reference is not None, "checked at admission"
        self.banks.references().write(self.slot, _prepared(reference, self.state.rank, self.state.alpha))
        return reference

    def plan(self, examples: Sequence[Example]) -> list[MicroBatch]:
        """The micro-batches of one step's examples, with the normaliser over all of them."""
        weights = sequence_weights([e.loss_tokens for e in examples], self.config.loss or LossConfig())
        return pack(examples, weights, self.config.tokens_per_micro_batch, self.banks.base.device)

    def learn(self, micro: MicroBatch) -> None:
        """Add one micro-batch's gradients to the slot's."""
        learn([Part(self, micro)])

    def loss_of(self, micro: MicroBatch, hidden: Tensor, reference_hidden: Tensor | None) -> Tensor:
        """The micro-batch's share of the batch's loss, from its rows' last hidden states [T, H]; recorded in `sums`."""
        logprobs, entropies = self._logprobs(micro, hidden)
        if self.config.loss is None:
            loss, sums = cross_entropy(logprobs, micro), dict[str, Tensor]()
        else:
            reference = None if reference_hidden is None else self._logprobs(micro, reference_hidden)[0]
            loss, sums = policy_loss(logprobs, reference, micro, self.config.loss)
            gap = (logprobs.detach() - micro.sampler_logprobs).abs()
            self.sums.mismatch_max = max(self.sums.mismatch_max, float(gap.max()) if len(gap) else 0.0)
        self._record(micro, loss, entropies, sums)
        return loss

    @property
    def needs_reference(self) -> bool:
        return self.config.loss is not None and self.config.loss.kl_coefficient > 0

    def _logprobs(self, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows, chunk = hidden[micro.loss_rows], self.config.logprob_chunk_tokens
        head = self.banks.base.head
        return token_logprobs(rows, head, micro.targets, temperature=self.config.temperature, chunk=chunk)

    def _record(self, micro: MicroBatch, loss: Tensor, entropies: Tensor, sums: dict[str, Tensor]) -> None:
        self.sums.loss += float(loss.detach())
        self.sums.tokens += len(micro.tokens)
        self.sums.loss_tokens += len(micro.targets)
        self.sums.entropy += float(entropies.sum())
        for name, value in sums.items():
            self.sums.token_sums[name] = self.sums.token_sums.get(name, 0.0) + float(value)

    def step(self, batch_digest: str) -> tuple[StepOutcome, Sums]:
        """Finish the step that consumed the batch of this digest: clip, check, AdamW, advance the cursor."""
        outcome = self.optimizer.step()
        self.banks.training.refresh(self.slot)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            optimizer_steps=self.optimizer.steps_taken,
            skipped_in_a_row=self.state.skipped_in_a_row + 1 if outcome.skipped else 0,
            cursor=self.state.cursor.after(batch_digest),
        )
        sums, self.sums = self.sums, Sums()
        return outcome, sums

    def adapter(self) -> Adapter:
        """The adapter as it is now: fp32 copies on the CPU."""
        return self.banks.training.read(self.slot)

    def snapshot(self, orchestrator_state: dict[str, Any] | None) -> Snapshot:
        held = self.banks.training.holding(self.slot)
        layout = self.banks.training.layout
        moments = None
        if self.optimizer.moments is not None:
            first, second = self.optimizer.moments
            moments = (layout.unpack(first, held), layout.unpack(second, held))
        return Snapshot(self.state, self.adapter(), moments, self.reference, orchestrator_state, self.companions)

    def forget_gradient(self) -> None:
        """Begin the step again."""
        self.optimizer.gradient.zero_()
        self.sums = Sums()

    def release(self) -> None:
        """Leave the slot zeroed."""
        self.banks.reset(self.slot)


@dataclass(frozen=True)
class Part:
    """One run's micro-batch in a joint one."""

    learner: Learner
    micro: MicroBatch


def learn(parts: Sequence[Part]) -> None:
    """One forward and backward pass for micro-batches of different runs: each run's gradients go to its own slot.

    With one part that is training alone. With several only the frozen base's products are shared, row by row: no number
    of one run, finite or not, reaches another's rows. Losses are each run's own; one backward pass starts from all.
    """
    banks = parts[0].learner.banks
    hidden = _hidden(parts, banks.training)
    compared = [part for part in parts if part.learner.needs_reference]
    references: dict[int, Tensor] = {}
    if compared:
        with torch.no_grad():
            for part, states in zip(compared, _hidden(compared, banks.references()), strict=True):
                references[part.learner.slot] = states
    losses = [
        part.learner.loss_of(part.micro, states, references.get(part.learner.slot))
        for part, states in zip(parts, hidden, strict=True)
    ]
    torch.autograd.backward(losses)


def _hidden(parts: Sequence[Part], bank: SlotBank) -> list[Tensor]:
    """Last hidden states, [T, H] a part."""
    rows = join([part.micro for part in parts])
    segments, start = [], 0
    for part, count in zip(parts, rows.counts, strict=True):
        slot = part.learner.slot
        segments.append(Segment(slot, start, start + count, bank.holding(slot).scale))
        start += count
    hidden = parts[0].learner.banks.base.hidden(rows.tokens, rows.positions, rows.plan, Route(bank, segments))
    return [hidden] if len(parts) == 1 else list(hidden.split(rows.counts))


def _prepared(adapter: Adapter, rank: int, alpha: float) -> PreparedInitAdapter:
    return PreparedInitAdapter(adapter, rank, alpha, "", {})
