"""One run in its slot, without disk: snapshot in, examples through, snapshot out. RL and SFT share it.

With several ranks each has a learner for the run, and they do the same things in the same order (training/crew.py says
which). What is theirs alone is their part of the sequences, of the masters and of the moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.adapters.snapshot import MASTERS, MOMENTS, Snapshot
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.base import Ask, BaseModel, Route
from graftwork.training.loss import cross_entropy, policy_loss, sequence_weights
from graftwork.training.optim import SlotOptimizer, StepOutcome
from graftwork.training.packer import Example, MicroBatch, Round, idle_micro_batch, join, pack

LogProbs = tuple[Tensor, Tensor]
"""Log-probs and entropies of N tokens, [N] fp32 each."""


@dataclass(frozen=True)
class LearnerConfig:
    """loss None: supervised learning (cross-entropy, mean over tokens)."""

    optimizer: OptimizerConfig
    loss: LossConfig | None
    temperature: float
    tokens_per_micro_batch: int
    logprob_chunk_tokens: int
    share_prompts: bool = True

    @property
    def needs_reference(self) -> bool:
        return self.loss is not None and self.loss.needs_reference


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

    @staticmethod
    def merged(parts: Sequence[Sums]) -> Sums:
        """Of all ranks."""
        total = Sums()
        for part in parts:
            total.loss += part.loss
            total.tokens += part.tokens
            total.loss_tokens += part.loss_tokens
            total.entropy += part.entropy
            total.mismatch_max = max(total.mismatch_max, part.mismatch_max)
            for name, value in part.token_sums.items():
                total.token_sums[name] = total.token_sums.get(name, 0.0) + value
        return total


@dataclass(frozen=True)
class Report:
    """What a rank says of its part of a step. square: of the L2 norm of its part of the summed gradient. fault: what
    was raised while it learnt."""

    square: float
    sums: Sums
    fault: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Report:
        return Report(float(value["square"]), Sums(**value["sums"]), value["fault"])


def gradient_norm(reports: Sequence[Report]) -> float:
    """L2, of the whole gradient."""
    return math.sqrt(sum(report.square for report in reports))


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
        self.examples: Sequence[Example] = ()
        self.rounds: list[Round] = []
        """Of the step's examples, those still to learn; the next one last."""
        self.fault: str | None = None
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
        if not self.config.needs_reference:
            return snapshot.reference
        reference = snapshot.reference or (snapshot.adapter if snapshot.state.step == 0 else None)
        assert reference is not None, "checked at admission"
        self.banks.references().write(self.slot, _prepared(reference, self.state.rank, self.state.alpha))
        return reference

    def feed(self, examples: Sequence[Example]) -> None:
        """Begin a step that learns from these examples; all ranks get all of them."""
        self.examples = examples
        self.begin_again()

    def begin_again(self) -> None:
        """Begin the step again: nothing of it is learnt."""
        self.forget_gradient()
        weights = sequence_weights(
            [e.loss_tokens for e in self.examples], self.config.loss or LossConfig(), [e.sample for e in self.examples]
        )
        base, budget = self.banks.base, self.config.tokens_per_micro_batch
        rounds = pack(
            self.examples, weights, budget, base.device, base.ranks.rank, base.ranks.size,
            share=self.config.share_prompts,
        )  # fmt: skip
        self.rounds = rounds[::-1]

    def loss_of(self, micro: MicroBatch, found: LogProbs, reference: LogProbs | None) -> Tensor:
        """The micro-batch's share of the batch's loss, from its tokens' log-probs; recorded in `sums`."""
        logprobs, entropies = found
        if self.config.loss is None:
            loss, sums = cross_entropy(logprobs, micro), dict[str, Tensor]()
        else:
            compared = None if reference is None else reference[0]
            loss, sums = policy_loss(logprobs, compared, micro, self.config.loss)
            gap = (logprobs.detach() - micro.sampler_logprobs).abs()
            self.sums.mismatch_max = max(self.sums.mismatch_max, float(gap.max()) if len(gap) else 0.0)
        self._record(micro, loss, entropies, sums)
        return loss

    def _record(self, micro: MicroBatch, loss: Tensor, entropies: Tensor, sums: dict[str, Tensor]) -> None:
        self.sums.loss += float(loss.detach())
        self.sums.tokens += micro.sequence_tokens
        self.sums.loss_tokens += len(micro.targets)
        self.sums.entropy += float(entropies.sum())
        for name, value in sums.items():
            self.sums.token_sums[name] = self.sums.token_sums.get(name, 0.0) + float(value)

    def report(self) -> Report:
        """The step's examples are learnt: sum the gradient over the ranks, and say what this one's part of it is. All
        ranks take part."""
        return Report(self.optimizer.sum_gradient(), self.sums, self.fault)

    def step(self, batch_digest: str, norm: float) -> StepOutcome:
        """Finish the step that consumed the batch of this digest: clip, check, AdamW, advance the cursor. norm: the
        whole gradient's, which rank 0 decides by. All ranks take part."""
        outcome = self.optimizer.step(norm)
        self.banks.training.refresh(self.slot)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            optimizer_steps=self.optimizer.steps_taken,
            skipped_in_a_row=self.state.skipped_in_a_row + 1 if outcome.skipped else 0,
            cursor=self.state.cursor.after(batch_digest),
        )
        self.examples, self.sums = (), Sums()
        return outcome

    def learn_from(self, examples: Sequence[Example], batch_digest: str) -> tuple[StepOutcome, Sums]:
        """A whole step, of a process alone."""
        self.feed(examples)
        while self.rounds:
            learn([self])
        report = self.report()
        return self.step(batch_digest, gradient_norm([report])), report.sums

    def adapter(self) -> Adapter:
        """The adapter as it is now: fp32 copies on the CPU. All ranks take part."""
        return self.banks.training.read(self.slot)

    def snapshot(self, orchestrator_state: dict[str, Any] | None) -> Snapshot:
        """Everything. All ranks take part, and each gets it."""
        moments = None
        if self.optimizer.moments is not None:
            first, second = self.optimizer.moments
            bank = self.banks.training
            moments = (bank.unpack(self.slot, first), bank.unpack(self.slot, second))
        return Snapshot(self.state, self.adapter(), moments, self.reference, orchestrator_state, self.companions)

    def own_tensors(self) -> Iterator[tuple[str, str, str, Tensor]]:
        """This rank's part of the masters and moments: (kind, module, "lora_A" or "lora_B", elements [n])."""
        bank = self.banks.training
        rows = (self.optimizer.parameter, *(self.optimizer.moments or ()))
        for kind, row in zip((MASTERS, *MOMENTS), rows, strict=False):
            for path, side, elements in bank.pieces(self.slot, row):
                yield kind, path, side, elements

    def forget_gradient(self) -> None:
        """Nothing of the step is learnt any more."""
        self.optimizer.forget_gradient()
        self.sums, self.fault = Sums(), None


def learn(learners: Sequence[Learner]) -> None:
    """One forward and backward pass for the next rounds of different runs: each run's gradients go to its own slot.

    With one run that is training alone. With several only the frozen base's products are shared, row by row: no number
    of one run, finite or not, reaches another's rows. Losses are each run's own; one backward pass starts from all.

    All ranks take part. One that has nothing to learn in these rounds, where the base is sharded, passes two
    tokens without a slot through it: the others need its part of every layer, forwards and backwards.
    """
    banks = learners[0].banks
    parts = [(one, micro) for one in learners if (micro := one.rounds[-1].micro) is not None]
    if parts or banks.base.sharded:
        found = _logprobs(banks.base, parts, banks.training)
        references: dict[int, LogProbs] = {}
        if any(one.config.needs_reference for one in learners):
            compared = [(one, micro) for one, micro in parts if one.config.needs_reference]
            with torch.no_grad():
                answers = _logprobs(banks.base, compared, banks.references())
            references = {one.slot: answer for (one, _), answer in zip(compared, answers, strict=False)}
        losses = [
            one.loss_of(micro, answer, references.get(one.slot))
            for (one, micro), answer in zip(parts, found, strict=False)
        ]
        torch.autograd.backward(losses or [logprobs.sum() for logprobs, _ in found])
    for one in learners:
        one.rounds.pop()


def _logprobs(base: BaseModel, parts: Sequence[tuple[Learner, MicroBatch]], bank: SlotBank) -> list[LogProbs]:
    """Log-probs and entropies of the loss tokens, [N] a part; without parts, of no token."""
    rows = join([micro for _, micro in parts] or [idle_micro_batch(base.device)])
    segments, asks, start = [], [], 0
    for (one, micro), count in zip(parts, rows.counts, strict=False):
        segments.append(Segment(one.slot, start, start + count, bank.holding(one.slot).scale))
        asks.append(Ask(micro.loss_rows + start, micro.targets, one.config.temperature))
        start += count
    if not parts:
        nothing = torch.empty(0, dtype=torch.int64, device=base.device)
        asks.append(Ask(nothing, nothing, 1.0))
    chunk = parts[0][0].config.logprob_chunk_tokens if parts else 1
    return base.logprobs(rows.tokens, rows.positions, rows.plan, Route(bank, segments), asks, chunk)


def _prepared(adapter: Adapter, rank: int, alpha: float) -> PreparedInitAdapter:
    return PreparedInitAdapter(adapter, rank, alpha, "", {})
