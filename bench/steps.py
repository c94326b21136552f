"""A training step to measure: one run in a slot, made-up answers, forwards and backwards through the real learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.bases import adapter_for, answers, load, start_of
from graftwork.adapters.canonical import Adapter
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.model.base import BaseModel
from graftwork.training.learner import Banks, Learner, LearnerConfig, Sums, gradient_norm, learn
from graftwork.training.optim import StepOutcome
from graftwork.training.packer import Example

BATCH = "0" * 64
"""Stands for a batch's digest."""


@dataclass(frozen=True)
class Workload:
    """`group` answers share a prompt."""

    sequences: int
    prompt_tokens: int
    answer_tokens: int
    group: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * (self.prompt_tokens + self.answer_tokens)


@dataclass(frozen=True)
class OneRun:
    """A run that holds slot 0, and the examples that it learns from again and again."""

    base: BaseModel
    learner: Learner
    examples: Sequence[Example]
    adapter: Adapter

    def gradient(self) -> None:
        """Forwards and backwards; the gradient stays."""
        self.learner.feed(self.examples)
        while self.learner.rounds:
            learn([self.learner])

    def gradient_norm(self) -> float:
        """Of `gradient`; never 0."""
        norm = gradient_norm([self.learner.report()])
        assert norm > 0, "nothing was learnt"
        return norm

    def step(self) -> tuple[StepOutcome, Sums]:
        """A whole optimizer step."""
        outcome, sums = self.learner.learn_from(self.examples, BATCH)
        assert outcome.gradient_norm > 0 and not outcome.skipped
        return outcome, sums


def one_run(
    path: Path, device: torch.device, work: Workload, *, dtype: str = "auto", share: bool = True,
    supervised: bool = False, **placement: bool,
) -> OneRun:  # fmt: skip
    """All of the step's tokens in one micro-batch."""
    base = load(path, device, dtype, **placement)
    loss = None if supervised else LossConfig()
    config = LearnerConfig(OptimizerConfig(warmup_steps=0), loss, 1.0, work.tokens, 2048, share)
    adapter = adapter_for(base)
    learner = Learner(Banks.of(base, 1), 0, config, start_of(base, adapter))
    examples = answers(base, work.sequences, work.prompt_tokens, work.answer_tokens, group=work.group)
    return OneRun(base, learner, examples, adapter)
