"""One torch.optim.AdamW a run, over a view of its slot's row; the schedule is a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.config.schema import OptimizerConfig
from graftwork.lora.slots import SlotBank


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """The rate of optimizer step `step` (the first is 1). It depends on nothing else: stopping does not change it."""
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay_steps is None:
        return config.learning_rate * warmup
    done = min(1.0, (step - 1) / config.decay_steps)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * warmup * left


@dataclass(frozen=True)
class StepOutcome:
    """gradient_norm: L2, before clipping. skipped: it was not finite and the weights are as before."""

    gradient_norm: float
    learning_rate: float
    skipped: bool


class SlotOptimizer:
    """AdamW over one slot. Its moments are its own: a new run in the slot gets a new optimizer."""

    def __init__(self, bank: SlotBank, slot: int, config: OptimizerConfig, *, steps_taken: int) -> None:
        assert bank.gradients is not None
        self.config = config
        self.steps_taken = steps_taken
        self.parameter = bank.weights[slot].detach().requires_grad_()  # a leaf over the row's own memory
        self.gradient = bank.gradients[slot]
        self.parameter.grad = self.gradient
        self.adamw = torch.optim.AdamW(
            [self.parameter],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )

    @property
    def moments(self) -> tuple[Tensor, Tensor] | None:
        """(exp_avg, exp_avg_sq), rows [P] like the slot's; None before the first step."""
        state = self.adamw.state[self.parameter]
        return (state["exp_avg"], state["exp_avg_sq"]) if state else None

    def restore(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Take the moments of a run that took `steps_taken` steps."""
        self.adamw.state[self.parameter] = {
            "step": torch.tensor(float(self.steps_taken)),
            "exp_avg": exp_avg.to(self.parameter.device),
            "exp_avg_sq": exp_avg_sq.to(self.parameter.device),
        }

    def step(self) -> StepOutcome:
        """Clip this run's gradient, step if it is finite, and zero it. Touches nothing outside the slot's row."""
        rate = learning_rate(self.config, self.steps_taken + 1)
        norm = float(torch.linalg.vector_norm(self.gradient))
        finite = math.isfinite(norm)
        if finite:
            if norm > self.config.clip_norm:
                self.gradient.mul_(self.config.clip_norm / norm)
            self.adamw.param_groups[0]["lr"] = rate
            self.adamw.step()
            self.steps_taken += 1
        self.gradient.zero_()
        return StepOutcome(norm, rate, skipped=not finite)
