"""A tensor that is sharded over ranks: write one's own part of it, and put the whole together again.

Everything that lays full tensors out over ranks goes through `fill`: the base's weights, which lie in files, and an
adapter's rows, which are in memory. It communicates nothing: each rank has, or reads, what it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class Sliceable(Protocol):
    """A tensor, or one in a file (safetensors' `get_slice`) of which only what is asked for is read."""

    def __getitem__(self, where: Any) -> Tensor: ...


def part_of(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[slice, ...]:
    """Which part of a tensor of `shape` is this rank's: one slice an axis; empty where there is none.

    Shard(d) cuts axis d into pieces of one size, the last ones shorter or empty (as torch.chunk and FSDP2 do).
    """
    starts, stops = [0] * len(shape), list(shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue
        assert type(placement) is Shard, f"a tensor placed as {placement}"
        dim = placement.dim
        size = -(-(stops[dim] - starts[dim]) // mesh.size(axis))
        start = min(starts[dim] + mesh.get_local_rank(axis) * size, stops[dim])
        starts[dim], stops[dim] = start, min(start + size, stops[dim])
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def own_part(target: Tensor) -> tuple[slice, ...]:
    """Which part of `target`'s full shape this rank holds: all of it, unless it is a DTensor."""
    if isinstance(target, DTensor):
        return part_of(target.shape, target.device_mesh, target.placements)
    return tuple(slice(0, size) for size in target.shape)


@torch.no_grad()
def fill(target: Tensor, source: Sliceable) -> None:
    """Write this rank's part of `source`, a tensor of target's full shape; nothing else of it is touched.

    target   a DTensor (Shard and Replicate, uneven and empty parts), or a plain tensor: all of it
    """
    where = own_part(target)
    if all(part.stop > part.start for part in where):
        local(target).copy_(source[where])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in its own memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; all take part. Of a plain tensor, itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_rows(rows: int, numel: int, mesh: DeviceMesh | None, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """`rows` rows [numel] of fp32 zeros, and the local tensor [rows, own part] that they are views of. Each row's
    elements are cut over the ranks of a mesh of one axis; where there is no mesh, rows are plain tensors."""
    if mesh is None:
        table = torch.zeros(rows, numel, device=device)
        return table, list(table)
    own = part_of([numel], mesh, [Shard(0)])[0]
    table = torch.zeros(rows, own.stop - own.start, device=device)
    shape, stride = torch.Size([numel]), (1,)
    return table, [
        DTensor.from_local(row, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride) for row in table
    ]


def summed(row: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """The sum of every rank's `row [P]`, cut over the ranks like the rows of `sharded_rows`; all take part."""
    if mesh is None:
        return row
    return DTensor.from_local(row, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(0)])
