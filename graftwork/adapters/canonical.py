"""An adapter as a value: module path -> (A, B, scale). Every format reads into this form and writes from it.

The adapted layer computes  y = W x + scale * B (A x).   A [r, in], B [out, r]   (LoRA, arXiv 2106.09685)

The E experts of a mixture are one module a projection, `<layer>.mlp.experts.gate_proj` (`up_proj`, `down_proj`),
whatever the file or the base calls them: A [E, r, in], B [E, out, r]. gate and up are always apart: so an adapter with
factors of its own for each, and one whose gate and up share A, both fit at their own rank.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALPHA_RANGE = (1e-30, 1e30)
"""Scales beyond it vanish or overflow in fp32."""


Shape = tuple[int, ...]
"""(out, in) of a weight that an adapter updates; (E, out, in) for E experts."""


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one module's update, on the CPU, with the number that multiplies their product."""

    a: Tensor  # [r, in], experts [E, r, in]
    b: Tensor  # [out, r], experts [E, out, r]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> Shape:
        """(out, in), experts (E, out, in): that of the weight which the pair updates."""
        return (*self.b.shape[:-1], self.a.shape[-1])


class RunningDigest:
    """An adapter's digest, one module at a time, in the order of their paths."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, path: str, pair: LoraPair) -> None:
        for name, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
            self._hash.update(f"{path}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            self._hash.update(tensor_bytes(tensor))
        self._hash.update(struct.pack("<d", pair.scale))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """`pairs`: module path in the base model (`model.layers.0.self_attn.q_proj`, no PEFT prefix) -> factors."""

    pairs: Mapping[str, LoraPair]

    def digest(self) -> str:
        """sha256 over keys, dtypes, shapes, bytes and scales in key order: equal digest, equal adapter."""
        running = RunningDigest()
        for path in sorted(self.pairs):
            running.add(path, self.pairs[path])
        return running.hexdigest()

    def dtypes(self) -> list[str]:
        """Names of the data types of its tensors, sorted: usually one, such as `bfloat16`."""
        tensors = (tensor for pair in self.pairs.values() for tensor in (pair.a, pair.b))
        return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a CPU tensor in row-major order, little-endian, as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def alpha_for(scale: float, divisor: float) -> float | None:
    """The float that gives exactly `scale` when divided by `divisor`; None where there is no such float.

    It exists whenever `scale` was made by such a division. Of several, the one with the shortest decimal form is taken,
    so that alpha = 32.1 survives the way through its scale.
    """
    middle = scale * divisor
    near = [middle]
    for direction in (math.inf, -math.inf):
        first = math.nextafter(middle, direction)
        near += [first, math.nextafter(first, direction)]
    exact = [alpha for alpha in near if alpha / divisor == scale]
    return min(exact, key=lambda alpha: len(repr(alpha)), default=None)
