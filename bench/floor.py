"""The least arithmetic that a training step of an adapter on a frozen base can do, and what one does.

    4 a frozen linear parameter and token      the product forwards, and that to the input backwards
    4 a parameter of the head and loss token   only where there is loss
    6 an adapter parameter and token           as above, and the gradients of the factors
    attention                                  4 products of L x L / 2 x D a head forwards and backwards twice that

Tokens are those that something is computed from: the last one of a sequence is only predicted. Attention is counted by
this formula on both sides: torch's counter takes the CPU's kernel for nothing. A multiplication
and an addition are two operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from graftwork.model.base import BaseModel
from graftwork.training.families import rows_needed
from graftwork.training.packer import Example


@dataclass(frozen=True)
class Floor:
    """FLOPs of a step over `tokens` tokens, nothing shared, of `loss_tokens` predictions."""

    tokens: int
    loss_tokens: int
    linears: float
    head: float
    adapters: float
    attention: float

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("linears", "head", "adapters", "attention")}

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def floor_of(base: BaseModel, examples: Sequence[Example]) -> Floor:
    """For a base all of whose linear layers but the head carry slots, and are dense."""
    lengths = [rows_needed(example) for example in examples]
    tokens = sum(lengths)
    loss_tokens = sum(example.loss_tokens for example in examples)
    shapes = base.spec.shapes.values()
    frozen = sum(math.prod(shape) for shape in shapes)
    adapter = sum(base.spec.max_rank * sum(shape) for shape in shapes)
    config = base.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    squares = sum(length**2 for length in lengths)
    return Floor(
        tokens, loss_tokens,
        linears=4.0 * frozen * tokens,
        head=4.0 * base.head.numel() * loss_tokens,
        adapters=6.0 * adapter * tokens,
        attention=3.0 * 2 * 2 * squares / 2 * width * config.num_hidden_layers,
    )  # fmt: skip


def counted(work: Callable[[], object]) -> dict[str, float]:
    """FLOPs of every operator but attention's kernels, which torch counts on some devices only."""
    aten = torch.ops.aten
    in_place: dict[Any, Any] = {
        aten.addmm_: lambda total, left, right, *_, out_shape=None, **__: 2 * math.prod(left) * right[-1]
    }
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    found = {str(operator): float(flops) for operator, flops in counter.get_flop_counts()["Global"].items()}
    return {operator: flops for operator, flops in found.items() if "attention" not in operator}
