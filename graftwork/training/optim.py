"""One torch.optim.AdamW a run, over a view of its slot's row; the schedule is a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.config.run import OptimizerConfig
from graftwork.lora.slots import SlotBank
from graftwork.parallel.parts import fill, local


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
    """AdamW over one slot. Its moments are its own: a new run in the slot gets a new optimizer. With several ranks each
    steps its part of the row: the parameter, its gradient and the moments are DTensors.

    A step is two calls, so that it can be decided in one place: `sum_gradient` on all ranks, then `step` on all, with
    the norm of the whole gradient.
    """

    def __init__(self, bank: SlotBank, slot: int, config: OptimizerConfig, *, steps_taken: int) -> None:
        assert bank.gradients is not None
        self.bank, self.slot, self.config = bank, slot, config
        self.steps_taken = steps_taken
        self.parameter = bank.rows[slot].detach().requires_grad_()  # a leaf over the row's own memory
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
        """Take the moments, rows [P] on the CPU, of a run that took `steps_taken` steps."""
        state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        held = {name: torch.zeros_like(self.parameter, requires_grad=False) for name in state}
        for name, row in state.items():
            fill(held[name], row)
        self.adamw.state[self.parameter] = {"step": torch.tensor(float(self.steps_taken)), **held}

    def sum_gradient(self) -> float:
        """Sum the slot's gradients over the ranks; the square of the L2 norm of this rank's part."""
        gradient = self.bank.summed_gradient(self.slot)
        self.parameter.grad = gradient
        return float(torch.linalg.vector_norm(local(gradient))) ** 2

    def step(self, norm: float) -> StepOutcome:
        """Clip this run's gradient, whose norm over all ranks is given, step if that is finite, and zero the gradient.
        Touches nothing outside the slot's row."""
        rate = learning_rate(self.config, self.steps_taken + 1)
        finite = math.isfinite(norm)
        if finite:
            gradient = self.parameter.grad
            assert gradient is not None, "sum_gradient comes first"
            if norm > self.config.clip_norm:
                gradient.mul_(self.config.clip_norm / norm)
            self.adamw.param_groups[0]["lr"] = rate
            self.adamw.step()
            self.steps_taken += 1
        self.forget_gradient()
        return StepOutcome(norm, rate, skipped=not finite)

    def forget_gradient(self) -> None:
        assert self.bank.gradients is not None
        self.bank.gradients[self.slot].zero_()
        self.parameter.grad = None
