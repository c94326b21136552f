"""A run's line in metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.store.queue import Batch, Rollout, Version
from graftwork.training.learner import Sums
from graftwork.training.optim import StepOutcome


@dataclass
class Work:
    """A batch that is being learnt. alone: no micro-batch is shared with other runs. compute_seconds: spent on its
    micro-batches so far."""

    batch: Batch
    digest: str
    started: float
    alone: bool = False
    compute_seconds: float = 0.0


def metrics_row(
    work: Work, outcome: StepOutcome, sums: Sums, version: Version, batch_wait_seconds: float, step_seconds: float,
    now: float,
) -> dict[str, Any]:  # fmt: skip
    """batch_wait_seconds: from the end of the last step until the batch was there. step_seconds: between the steps."""
    rewards = [rollout.reward for rollout in work.batch.rollouts]
    mean = sum(rewards) / len(rewards)
    means = sums.means()
    return {
        "step": version.step,
        "reward": mean,
        "reward_std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
        "loss": sums.loss,
        "kl": means.get("kl"),
        "entropy": means["entropy"],
        "grad_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate,
        "mismatch_mean": means["mismatch"],
        "mismatch_max": sums.mismatch_max,
        "truncated": means["truncated"],
        "equal_groups": equal_groups(work.batch.rollouts),
        "rollouts": len(rewards),
        "tokens": sums.tokens,
        "loss_tokens": sums.loss_tokens,
        "answer_tokens_mean": sums.loss_tokens / len(rewards),
        "skipped": outcome.skipped,
        "version": version.name,
        "batch": work.digest,
        "train_seconds": work.compute_seconds,
        "turn_wait_seconds": now - work.started - work.compute_seconds,
        "wait_seconds": batch_wait_seconds,
        "tokens_per_second": sums.tokens / max(step_seconds, 1e-9),
    }


def equal_groups(rollouts: Sequence[Rollout]) -> int:
    """Prompts whose answers all earned the same, so that none of them teaches anything: too easy, or too hard."""
    rewards: dict[int, set[float]] = {}
    for rollout in rollouts:
        rewards.setdefault(rollout.prompt_index, set()).add(rollout.reward)
    return sum(len(different) == 1 for different in rewards.values())
