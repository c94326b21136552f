"""Log-probabilities of given tokens, a chunk of positions at a time: `[tokens, vocab]` never exists for a whole batch.

    logp_i = z_i[target_i] - logsumexp(z_i),   z_i = (h_i W^T) / temperature, in fp32

Only positions that carry loss come in here. The head is frozen, so the only gradient is that of h, and it is linear in
what comes from above: what it is multiplied with is made in the forward pass, from logits that are there already,

    dh_i = g_i * d_i,   d_i = (onehot(target_i) - softmax(z_i)) W / temperature

so that the head is multiplied twice a token, not three times, and only `[N, H]` numbers are kept. The entropy comes
with it, without another pass over the vocabulary:

    H_i = logsumexp(z_i) - sum_v softmax(z_i)_v z_iv = h_i . d_i - logp_i
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
        directions = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            chosen = targets[rows, None]
            log_softmax = _logits(hidden[rows], weight, temperature).log_softmax(-1)
            logprobs[rows] = log_softmax.gather(1, chosen)[:, 0]
            if directions is None:
                entropies[rows] = _entropies(log_softmax)
                continue
            grad_logits = log_softmax.exp_().scatter_add_(1, chosen, -log_softmax.new_ones(chosen.shape))
            directions[rows] = (grad_logits.to(weight.dtype) @ weight).div_(-temperature)
            entropies[rows] = (hidden[rows].float() * directions[rows].float()).sum(-1) - logprobs[rows]
        ctx.save_for_backward(directions)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (directions,) = ctx.saved_tensors
        return (directions * grad_logprobs[:, None]).to(directions.dtype), None, None, None, None


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
    return log_softmax, _entropies(log_softmax)


def _entropies(log_softmax: Tensor) -> Tensor:
    return -(log_softmax.exp() * log_softmax).sum(-1)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits if temperature == 1.0 else logits / temperature
