"""Attention that never lets one sequence see another, whatever else is in the micro-batch.

transformers hands every attention layer's q, k, v to `attend`; the `plan` that travels down the model's keyword
arguments says which rows are which sequence. There is no T x T mask: a NaN that is masked out still spreads through a
shared softmax (0 * NaN = NaN), and a mask over packed rows is quadratic work for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from graftwork.errors import ModelError

NAME = "graftwork"


class AttentionPlan(Protocol):
    """How the rows of one forward pass attend."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [Hq, T, D], k and v [Hkv, T, D]; returns [T, Hq, D]."""
        ...


@dataclass(frozen=True)
class Group:
    """`count` sequences of `length` rows each, back to back from row `start`."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class PackedPlan:
    """Whole sequences, causal, from position 0: training, and the log-probs of finished answers.

    `groups` cover all rows in order. Sequences of one length share a call; each is a batch entry of its own.
    """

    groups: Sequence[Group]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        outputs = [self._attend_group(group, q, k, v, scale) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_group(self, group: Group, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = slice(group.start, group.start + group.count * group.length)
        shape = (group.count, group.length)
        parts = (t[:, rows].unflatten(1, shape).transpose(0, 1) for t in (q, k, v))  # (count, H, length, D)
        q, k, v = parts
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1)  # (rows, Hq, D)


@torch.compiler.disable
def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, plan: AttentionPlan | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> ([1, T, Hq, D], no weights).

    torch.compile passes it by: it depends on the plan.
    """
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} did not pass the attention plan down; this architecture cannot be used"
        )
    if attention_mask is not None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__} uses an attention mask, soft cap or sink; only plain causal attention works"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(module.layer_idx, query[0], key[0], value[0], scale)[None], None  # type: ignore[arg-type]


def register() -> None:
    """Tell transformers about `attend`. A second time changes nothing."""
    AttentionInterface.register(NAME, attend)
