"""One module's factors brought to a run's rank and scale, as pure functions of tensors. fp32 in and out.

Shapes as in canonical.py; what is said of A [r, in] and B [out, r] holds for each expert of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graftwork.adapters.canonical import LoraPair


@dataclass(frozen=True)
class Reduced:
    """A pair of lower rank. energy: share of the squared Frobenius norm of B A that is kept."""

    pair: LoraPair
    energy: float


def pad_rank(pair: LoraPair, room: LoraPair) -> LoraPair:
    """Raise the rank to that of `room`, a fresh pair (B zero), which is written and returned. Exact, and the new
    directions can learn: the gradient of their columns of B is not zero, since their rows of A are not."""
    room.a[..., : pair.rank, :] = pair.a
    room.b[..., : pair.rank] = pair.b
    return LoraPair(room.a, room.b, pair.scale)


def drop_idle_directions(pair: LoraPair, rank: int) -> LoraPair | None:
    """Lower the rank by directions whose column of B is zero (for all experts): exact. None if there are too few."""
    idle = ~pair.b.any(dim=tuple(range(pair.b.dim() - 1)))  # (r,)
    if int((~idle).sum()) > rank:
        return None
    keep = torch.argsort(idle.to(torch.uint8), stable=True)[:rank].sort().values
    return LoraPair(pair.a.index_select(-2, keep), pair.b.index_select(-1, keep), pair.scale)


def truncate_rank(pair: LoraPair, rank: int) -> Reduced:
    """The best approximation of B A of lower rank, in the Frobenius norm (Eckart and Young 1936).

    Computed without the [out, in] product: B = Q_b R_b, A^T = Q_a R_a, and the SVD of R_b R_a^T, r x r, in float64. The
    singular values go in equal parts to both factors.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    kept, total = s[..., :rank].square().sum(), s.square().sum()
    root = s[..., :rank].sqrt()
    b = (q_b @ u[..., :rank]) * root[..., None, :]
    a = root[..., :, None] * (vh[..., :rank, :] @ q_a.mT)
    energy = float(kept / total) if total > 0 else 1.0
    return Reduced(LoraPair(_exactly(a, rank, -2), _exactly(b, rank, -1), pair.scale), energy)


def _exactly(factor: Tensor, rank: int, axis: int) -> Tensor:
    """fp32, `rank` directions: layers narrower than the rank have fewer singular values."""
    short = rank - factor.shape[axis]
    if short > 0:
        shape = list(factor.shape)
        shape[axis] = short
        factor = torch.cat([factor, factor.new_zeros(shape)], dim=axis)
    return factor.float().contiguous()


def to_scale(pair: LoraPair, scale: float) -> LoraPair:
    """Another scale, the same function to rounding: B takes up the difference."""
    return LoraPair(pair.a, pair.b * (pair.scale / scale), scale)


def revive(pair: LoraPair, fresh_a: Callable[[], Tensor]) -> LoraPair | None:
    """Fresh rows of A where a direction could never learn, its row of A and its column of B both zero (for an expert):
    exact. None where there are no such directions. fresh_a gives [rank, in], for experts [E, rank, in]."""
    largest = pair.a.abs().amax(dim=-1) + pair.b.abs().amax(dim=-2)  # [r], experts [E, r]
    dead = largest == 0
    if not bool(dead.any()):
        return None
    return LoraPair(torch.where(dead[..., None], fresh_a(), pair.a), pair.b, pair.scale)


def spread_experts(pair: LoraPair, present: tuple[int, ...], experts: int, fresh_a: Tensor) -> LoraPair:
    """A stack of some experts as one of all: the others start fresh, B zero. fresh_a [experts, r, in]."""
    where = torch.tensor(present)
    a = fresh_a[:, : pair.rank].to(pair.a.dtype).index_copy(0, where, pair.a)
    b = pair.b.new_zeros(experts, *pair.b.shape[1:]).index_copy(0, where, pair.b)
    return LoraPair(a, b, pair.scale)
