"""Losses: pure functions of log-probs. Formulas and papers are in docs/algorithms.md too.

Policy loss of a batch, over its loss tokens t:

    - sum_t  w_t * min(rho_t, c) * A_t * logp_t   +   beta * sum_t w_t * k3_t

rho_t  trainer's over sampler's probability of the token, held constant in the gradient; c = ratio_max. Truncated:
       IMPALA (arXiv 1802.01561), per token as in CISPO (arXiv 2506.13585). Masked: tokens with rho_t > c are left out.
A_t    the sequence's group-centred advantage (rollouts/advantages.py)
k3_t   estimator of KL(policy || reference) at the token: exp(d) - d - 1, d = reference - policy log-prob
       (Schulman 2020, "Approximating KL divergence"); the reference is the run's own starting adapter
w_t    the normaliser's share: see `sequence_weights`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from graftwork.config.run import LossConfig
from graftwork.training.packer import MicroBatch


def sequence_weights(
    loss_tokens: Sequence[int], config: LossConfig, samples: Sequence[int | None] | None = None
) -> list[float]:
    """The weight w of each loss token, one number a sequence; `loss_tokens`: how many each sequence has.

    token_mean      1 / total                  every token alike (DAPO, arXiv 2503.14476)
    sequence_mean   1 / (N * own)              every sequence alike (GRPO, arXiv 2402.03300)
    constant        1 / (N * constant_tokens)  no length bias (arXiv 2503.20783)

    samples: sequences with the same number are branches of one conversation, and count as one sequence: N counts
    them once, and their own is what they have together. None: every sequence is one of its own.
    """
    numbers: list[Hashable] = [("own", i) for i in range(len(loss_tokens))]
    if samples is not None:
        numbers = [own if sample is None else sample for own, sample in zip(numbers, samples, strict=True)]
    tokens: Counter[Hashable] = Counter()
    for number, own in zip(numbers, loss_tokens, strict=True):
        tokens[number] += own
    count, total = len(tokens), sum(loss_tokens)
    match config.normaliser:
        case "token_mean":
            return [1 / max(total, 1)] * len(numbers)
        case "sequence_mean":
            return [1 / (count * max(tokens[number], 1)) for number in numbers]
        case "constant":
            assert config.constant_tokens is not None
            return [1 / (count * config.constant_tokens)] * len(numbers)


def policy_loss(
    logprobs: Tensor, reference: Tensor | None, micro: MicroBatch, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The micro-batch's share of the batch's loss (scalar, differentiable), and sums over its tokens for the metrics.

    logprobs   [N] fp32, the trainer's, with gradient
    reference  [N] fp32, the starting adapter's; None where kl_coefficient is 0
    """
    difference = logprobs.detach() - micro.sampler_logprobs
    ratio = difference.exp()
    above = ratio > config.ratio_max
    if config.ratio == "truncate":
        ratio = ratio.clamp(max=config.ratio_max)
    else:
        ratio = torch.where(above, 0.0, ratio)
    loss = -(micro.weights * ratio * micro.advantages * logprobs).sum()
    sums = {"mismatch": difference.abs().sum(), "truncated": above.sum()}
    if reference is not None:
        gap = reference - logprobs
        k3 = gap.exp() - gap - 1
        loss = loss + config.kl_coefficient * (micro.weights * k3).sum()
        sums["kl"] = k3.detach().sum()
    return loss, sums


def cross_entropy(logprobs: Tensor, micro: MicroBatch) -> Tensor:
    """The micro-batch's share of the mean negative log-likelihood: supervised learning."""
    return -(micro.weights * logprobs).sum()
