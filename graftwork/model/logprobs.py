"""Log-probabilities of given tokens, a chunk of positions at a time: `[tokens, vocab]` never exists for a whole batch.

    logp_i = z_i[target_i] - logsumexp(z_i),   z_i = (h_i W^T) / temperature, in fp32

Only positions that carry loss come in here. The backward pass computes each chunk's logits again instead of keeping
them; the head is frozen, so the only gradient is that of h:

    dh_i = g_i * (onehot(target_i) - softmax(z_i)) W / temperature
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        logprobs = torch.empty(count, device=hidden.device)
        entropies = torch.empty(count, device=hidden.device)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            log_softmax = _logits(hidden[rows], weight, temperature).log_softmax(-1)
            logprobs[rows] = log_softmax.gather(1, targets[rows, None])[:, 0]
            entropies[rows] = -(log_softmax.exp() * log_softmax).sum(-1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_logits = _logits(hidden[rows], weight, ctx.temperature).softmax(-1).neg_()
            grad_logits[torch.arange(len(grad_logits), device=hidden.device), targets[rows]] += 1
            grad_logits *= (grad_logprobs[rows] / ctx.temperature)[:, None]
            grad_hidden[rows] = grad_logits.to(weight.dtype) @ weight
        return grad_hidden, None, None, None, None


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """(log-probs [N], entropies [N]) in fp32; entropies carry no gradient.

    hidden   [N, H], the last hidden state at the positions that predict `targets` [N] int64
    weight   [V, H], the frozen head
    """
    return _TokenLogProbs.apply(hidden, weight, targets, temperature, chunk)


def distributions(hidden: Tensor, weight: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs [N, V] of all tokens, entropies [N]) in fp32: for few positions. hidden and weight as above."""
    log_softmax = _logits(hidden, weight, temperature).log_softmax(-1)
    return log_softmax, -(log_softmax.exp() * log_softmax).sum(-1)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits / temperature
