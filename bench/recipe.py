"""What both sides of rl_vs_trl and reward_vs_trl do in a run: one place, so that neither does less."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """prompts, samples: a step has so many prompts, and so many answers to each."""

    steps: int = 20
    prompts: int = 64
    samples: int = 8
    max_tokens: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 4
