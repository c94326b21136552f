"""S slots of adapter weights for every target module: write, read and reset one slot.

All weights of a slot lie in one row of `weights [S, P]`; the stacked factors `A [S, r, in]`, `B [S, out, r]` are views
of it. So clipping, the finite check, AdamW and zeroing are one call on one vector a run, and nothing that is done to
row k can touch another row. A run of lower rank than the slot's uses the first rows of A and columns of B; the rest
stays zero, and so do its gradients (dA = B^T ... = 0 where B is 0, dB = ... A^T = 0 where A is 0).

With several ranks every row of the masters is a DTensor whose elements are cut over the ranks, and so are the moments
that AdamW makes for it. What the layers compute with, and the buffers that gradients are added to, are whole on each
rank: a run's gradients are summed over the ranks once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from graftwork.adapters.canonical import Adapter, LoraPair, Shape
from graftwork.adapters.names import siblings
from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec
from graftwork.lora.linear import Factors, Siblings
from graftwork.parallel.parts import fill, local, own_part, sharded_rows, summed, whole

ALIGN = 16  # floats: a factor, and the A of siblings together, start on a 64-byte boundary of their row


@dataclass(frozen=True)
class Place:
    """Where a module's factors lie in a row: first element of A and of B, and the weight's shape."""

    a_start: int
    b_start: int
    shape: Shape


class SlotLayout:
    """Where each module lies in a row of P fp32 numbers; adapters to rows and back."""

    def __init__(self, spec: SlotSpec) -> None:
        self.spec = spec
        self.places: dict[str, Place] = {}
        start = 0
        self.siblings = siblings(spec.shapes)
        """Paths of dense modules that get the same input; their A lie one above the other."""
        experts = [(path,) for path, shape in spec.shapes.items() if len(shape) == 3]
        for paths in sorted([*self.siblings, *experts]):
            a_starts = []
            for path in paths:
                a_starts.append(start)
                start += self._per_rank(path) * spec.shapes[path][-1]
            start = _aligned(start)
            for path, a_start in zip(paths, a_starts, strict=True):
                self.places[path] = Place(a_start, start, tuple(spec.shapes[path]))
                start = _aligned(start + self._per_rank(path) * spec.shapes[path][-2])
        self.row_numel = start

    def _per_rank(self, path: str) -> int:
        """Vectors of a factor: rank, times experts."""
        return math.prod(self.spec.shapes[path][:-2]) * self.spec.max_rank

    def factors(self, table: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """Views A [S, r, in] and B [S, out, r] of `table [S, P]`; experts A [S, E, r, in] and B [S, E, out, r]."""
        place, rank = self.places[path], self.spec.max_rank
        *experts, out_features, in_features = place.shape
        count = math.prod(experts) * rank
        a = table[:, place.a_start : place.a_start + count * in_features]
        b = table[:, place.b_start : place.b_start + count * out_features]
        return a.view(-1, *experts, rank, in_features), b.view(-1, *experts, out_features, rank)

    def stacked_a(self, table: Tensor, paths: Sequence[str]) -> Tensor:
        """The view [S, n * r, in] of `table [S, P]` that holds the A of n siblings."""
        start, width = self.places[paths[0]].a_start, self.spec.shapes[paths[0]][-1]
        numel = len(paths) * self.spec.max_rank * width
        return table[:, start : start + numel].view(-1, numel // width, width)

    def pack(self, adapter: Adapter) -> Tensor:
        """A row [P] fp32 on the CPU that holds `adapter`; rank beyond the adapter's is zero."""
        row = torch.zeros(1, self.row_numel)
        for path, pair in adapter.pairs.items():
            a, b = self.factors(row, path)
            a[0][..., : pair.rank, :] = pair.a
            b[0][..., : pair.rank] = pair.b
        return row[0]

    def pieces(self, part: Tensor, start: int, held: Held) -> Iterator[tuple[str, str, Tensor]]:
        """(module, "lora_A" or "lora_B", elements [n]) of what `part`, the elements of a row from `start` on, holds of
        the run's own factors: those of its rank, in row-major order. One behind the other, the pieces of consecutive
        parts are the factors that `unpack` gives; a factor that lies in `part` as a whole has its shape."""
        slot_rank, rank = self.spec.max_rank, held.rank
        for path in sorted(held.modules):
            place = self.places[path]
            *experts, out_features, in_features = place.shape
            factors = (  # element i of A belongs to direction (i // in) % slot_rank, of B to i % slot_rank
                ("lora_A", place.a_start, in_features, -2, (*experts, slot_rank, in_features)),
                ("lora_B", place.b_start, 1, -1, (*experts, out_features, slot_rank)),
            )
            for side, first, stride, axis, room in factors:
                last = first + math.prod(room)
                low, high = max(first, start), min(last, start + len(part))
                if low >= high:
                    continue
                own = part[low - start : high - start]
                if (low, high) == (first, last):
                    own = own.view(room).narrow(axis, 0, rank)
                elif rank < slot_rank:
                    own = own[torch.arange(low - first, high - first, device=part.device) // stride % slot_rank < rank]
                if own.numel():
                    shape = (*room[:axis], rank, *room[axis:][1:])
                    yield path, side, own.reshape(shape) if own.numel() == math.prod(shape) else own

    def unpack(self, row: Tensor, held: Held) -> Adapter:
        """The adapter in `row [P]`: copies, fp32, on the CPU, at its own rank, of its own modules."""
        table, rank, scale = row.detach().cpu()[None], held.rank, held.scale
        pairs = {}
        for path in sorted(held.modules):
            a, b = self.factors(table, path)
            own_a, own_b = a[0][..., :rank, :], b[0][..., :rank]
            pairs[path] = LoraPair(_copied(own_a), _copied(own_b), scale)
        return Adapter(pairs)


@dataclass(frozen=True)
class Held:
    """What a slot holds: rank, alpha and modules of the adapter in it. The row is zero elsewhere, and stays zero: where
    A and B are 0, so are both gradients, and what AdamW makes of them."""

    rank: int
    alpha: float
    modules: frozenset[str]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class SlotBank:
    """Weights of S slots. A bank that trains has gradients; a sampler's and a KL reference's have not.

    rows       S rows [P] of fp32 masters; with a mesh, DTensors cut over its ranks
    gradients  [S, P] fp32, or None; with a mesh, of this rank's micro-batches
    factors    module path -> Factors: views of the compute copy (the masters themselves where they are whole and the
               base is fp32)
    siblings   of dense modules: paths that get the same input -> their factors together, views likewise
    """

    def __init__(
        self, spec: SlotSpec, slots: int, *, device: torch.device, dtype: torch.dtype, gradients: bool,
        mesh: DeviceMesh | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.mesh = SlotLayout(spec), mesh
        numel = self.layout.row_numel
        self.weights, self.rows = sharded_rows(slots, numel, mesh, device)
        """[S, own part of P]: the memory of `rows`."""
        self.gradients = torch.zeros(slots, numel, device=device) if gradients else None
        self.held: list[Held | None] = [None] * slots
        aliased = mesh is None and dtype == torch.float32
        self._compute = self.weights if aliased else torch.zeros(slots, numel, device=device, dtype=dtype)
        self.anchor = torch.zeros((), device=device, requires_grad=True) if gradients else None
        self.factors: Mapping[str, Factors] = {path: self._views(path) for path in self.layout.places}
        self.siblings: Mapping[tuple[str, ...], Siblings] = {
            paths: self._views_together(paths) for paths in self.layout.siblings
        }

    def _views(self, path: str) -> Factors:
        a, b = self.layout.factors(self._compute, path)
        if self.gradients is None:
            return Factors(a, b)
        return Factors(a, b, *self.layout.factors(self.gradients, path))

    def _views_together(self, paths: tuple[str, ...]) -> Siblings:
        gradients = None if self.gradients is None else self.layout.stacked_a(self.gradients, paths)
        members = [self.factors[path] for path in paths]
        return Siblings(members, self.layout.stacked_a(self._compute, paths), gradients)

    @property
    def slots(self) -> int:
        return len(self.held)

    def write(self, slot: int, prepared: PreparedInitAdapter) -> None:
        """Put an adapter into a slot; no other slot is touched. The slot must be free: reset it first. All ranks take
        part, each with the full adapter, and each writes its own part."""
        assert self.held[slot] is None, f"slot {slot} is in use"
        self.held[slot] = Held(prepared.rank, prepared.alpha, frozenset(prepared.adapter.pairs))
        fill(self.rows[slot], self.layout.pack(prepared.adapter))
        self.refresh(slot)

    def read(self, slot: int) -> Adapter:
        """The adapter in a slot, as it would be published: fp32 copies on the CPU, at the run's own rank. All ranks
        take part."""
        return self.unpack(slot, self.rows[slot])

    def unpack(self, slot: int, row: Tensor) -> Adapter:
        """What `row [P]`, the slot's masters or numbers shaped like them, holds for the slot's run. All ranks take
        part."""
        return self.layout.unpack(whole(row), self.holding(slot))

    def pieces(self, slot: int, row: Tensor) -> Iterator[tuple[str, str, Tensor]]:
        """This rank's part of what `unpack` gives, on the CPU: see SlotLayout.pieces. There they may be the row's own
        memory."""
        return self.layout.pieces(local(row).detach().cpu(), own_part(row)[0].start, self.holding(slot))

    def summed_gradient(self, slot: int) -> Tensor:
        """A row [P] like the slot's masters: its gradients, summed over the ranks. All ranks take part."""
        assert self.gradients is not None
        return summed(self.gradients[slot], self.mesh)

    def holding(self, slot: int) -> Held:
        held = self.held[slot]
        assert held is not None, f"slot {slot} is empty"
        return held

    def reset(self, slot: int) -> None:
        """Free a slot: weights and gradients become zero, so that no trace of its run is left."""
        self.weights[slot].zero_()
        self._compute[slot].zero_()
        if self.gradients is not None:
            self.gradients[slot].zero_()
        self.held[slot] = None

    def refresh(self, slot: int) -> None:
        """Bring the compute copy of a slot up to its masters, after anything that wrote them. All ranks take part."""
        if self._compute is not self.weights:
            self._compute[slot].copy_(whole(self.rows[slot]))

    def free_slot(self) -> int | None:
        """The lowest free slot."""
        return next((slot for slot, held in enumerate(self.held) if held is None), None)


def _copied(view: Tensor) -> Tensor:
    return view.clone(memory_format=torch.contiguous_format)


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
