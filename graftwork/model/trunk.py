"""The base's decoder and its head as one module, whose one call gives the log-probs of given tokens.

Cut over ranks (model/shard.py), weights are whole only inside the module's own forward and backward passes; so what
needs the head, which is often the embedding itself, happens in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graftwork.model.attention import AttentionPlan
from graftwork.model.logprobs import distributions, token_logprobs


@dataclass(frozen=True)
class Ask:
    """Tokens whose log-probs are wanted.

    rows         [N] int64: the rows of the whole micro-batch that predict `targets` [N] int64; N may be 0
    targets      None: all tokens of the vocabulary, for few rows
    temperature  what the logits are divided by
    """

    rows: Tensor
    targets: Tensor | None
    temperature: float


class Trunk(nn.Module):
    """body: transformers' decoder. head: the linear layer [V, H] behind it; the two may share the embedding."""

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.body, self.head = body, head

    def hidden(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Last hidden states [T, H] for token ids [T] at positions [T] int64."""
        output = self.body(input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=plan)
        return output.last_hidden_state[0]

    def forward(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, asks: Sequence[Ask], chunk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """(log-probs [N], entropies [N]) in fp32 an ask, of which there is at least one; without targets,
        (log-probs [N, V], entropies [N]).

        chunk: tokens whose logits exist at a time. Backwards from any ask, also one of no tokens, is backwards through
        all layers.
        """
        hidden = self.hidden(tokens, positions, plan)[torch.cat([ask.rows for ask in asks])]
        parts = hidden.split([len(ask.rows) for ask in asks]) if len(asks) > 1 else [hidden]
        return [self._answer(ask, part, chunk) for part, ask in zip(parts, asks, strict=True)]

    def _answer(self, ask: Ask, hidden: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        if ask.targets is None:
            return distributions(hidden, self.head.weight, temperature=ask.temperature)
        return token_logprobs(hidden, self.head.weight, ask.targets, temperature=ask.temperature, chunk=chunk)
