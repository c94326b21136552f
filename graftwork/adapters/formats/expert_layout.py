"""The ways in which factors lie in files, as pure functions of tensors. E experts, rank r.

PEFT's `target_parameters` flattens experts and rank into one axis, and not alike for both factors (peft 0.21,
`ParamWrapper.get_delta_weight`): A is expert after expert, B is direction after direction.

    A [E*r, in]    row e*r + k       B [out, r*E]    column k*E + e
"""

from __future__ import annotations

import torch
from torch import Tensor


def unflatten_a(flat: Tensor, experts: int) -> Tensor:
    """[E*r, in] -> [E, r, in]."""
    return flat.view(experts, -1, flat.shape[-1])


def unflatten_b(flat: Tensor, experts: int) -> Tensor:
    """[out, r*E] -> [E, out, r], a copy."""
    return flat.view(flat.shape[0], -1, experts).permute(2, 0, 1).contiguous()


def flatten_a(a: Tensor) -> Tensor:
    """[E, r, in] -> [E*r, in]."""
    return a.reshape(-1, a.shape[-1])


def flatten_b(b: Tensor) -> Tensor:
    """[E, out, r] -> [out, r*E], a copy."""
    return b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def fuse(gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Factors of gate and up as those of the weight that has gate above up: (A [E, r', in], B [E, 2I, r']).

    Where both share A, r' = r; else B is block-diagonal and r' is the sum of the ranks. Exact either way.
    """
    (gate_a, gate_b), (up_a, up_b) = gate, up
    if torch.equal(gate_a, up_a):
        return gate_a, torch.cat([gate_b, up_b], dim=1)
    experts, rank = gate_b.shape[0], gate_b.shape[2]
    b = gate_b.new_zeros(experts, gate_b.shape[1] + up_b.shape[1], rank + up_b.shape[2])
    b[:, : gate_b.shape[1], :rank] = gate_b
    b[:, gate_b.shape[1] :, rank:] = up_b
    return torch.cat([gate_a, up_a], dim=1), b


def piece_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What rank `rank` of `ranks` has of axis 0, a view: pieces of one size, the last ones shorter or empty (as
    torch.chunk and FSDP2 cut)."""
    size = -(-tensor.shape[0] // ranks)
    return tensor[rank * size : (rank + 1) * size]
