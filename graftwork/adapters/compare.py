"""What an adapter does to the weights, in numbers, without ever making an [out, in] product."""

from __future__ import annotations

import torch
from torch import Tensor

from graftwork.adapters.canonical import LoraPair


def update_norm(pair: LoraPair) -> float:
    """Frobenius norm of scale * B A (over all experts), in float64."""
    return _norm(pair.b.double() * pair.scale, pair.a.double())


def relative_difference(one: LoraPair, other: LoraPair) -> float:
    """|dW_one - dW_other| / max(|dW_one|, |dW_other|) in the Frobenius norm; 0 when neither does anything.

    [B1 s1, -B2 s2] [A1; A2] is the difference, of rank r1 + r2; its norm by QR, so that equal updates with unlike
    factors come out at 1e-15, not at the square root of that.
    """
    b = torch.cat([one.b.double() * one.scale, -other.b.double() * other.scale], dim=-1)
    a = torch.cat([one.a.double(), other.a.double()], dim=-2)
    largest = max(update_norm(one), update_norm(other))
    return _norm(b, a) / largest if largest > 0 else 0.0


def _norm(b: Tensor, a: Tensor) -> float:
    r_b = torch.linalg.qr(b, mode="r").R
    r_a = torch.linalg.qr(a.mT, mode="r").R
    return float((r_b @ r_a.mT).square().sum().sqrt())


def idle_directions(pair: LoraPair) -> int:
    """Directions whose column of B is zero for all experts: they do nothing yet, and can learn where A is not zero."""
    return int((~pair.b.any(dim=tuple(range(pair.b.dim() - 1)))).sum())
