"""Modules as they lie in a file: which tensors make one up, whether they fit together, and how they are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from graftwork.adapters.formats.expert_layout import unflatten_a, unflatten_b
from graftwork.adapters.formats.peft_config import PeftConfig
from graftwork.adapters.formats.tensor_file import TensorFile
from graftwork.adapters.formats.untrusted import listed, quote
from graftwork.adapters.names import FUSED, Layout, Side
from graftwork.adapters.source import ModuleFacts
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

Factor = dict[Side, tuple[str, str]]
"""side -> (tensor, the module's path in the file)."""
Places = dict[tuple[str, Layout], dict[int | None, Factor]]
"""(module, layout) -> expert, or None -> its two factors."""

ONE_BY_ONE = "one expert a tensor"
EXPERTS_MAX = 4096
EXPANDED_NUMBERS_MAX = 2**29
"""Of a factor that all experts share, once it is repeated: a small file must not ask for all memory."""


class Piece(Protocol):
    @property
    def facts(self) -> ModuleFacts: ...

    def load(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        """(A, B) in our form."""
        ...


@dataclass(frozen=True)
class Dense:
    """One linear layer."""

    facts: ModuleFacts
    a: str
    b: str

    def load(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        return file.load(self.a), file.load(self.b)


@dataclass(frozen=True)
class PerExpert:
    """A tensor an expert. Those of lower rank are padded with zeros; `factors` bring unequal scales to the first's."""

    facts: ModuleFacts
    names: tuple[tuple[str, str], ...]
    factors: tuple[float, ...]

    @property
    def rescales(self) -> bool:
        return any(factor != 1 for factor in self.factors)

    def load(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        count, rank = len(self.names), self.facts.rank
        _, out, width = self.facts.shape
        dtypes = [file.entries[name].dtype for names in self.names for name in names]
        dtype = torch.float32 if self.rescales else functools.reduce(torch.promote_types, dtypes)
        a, b = torch.zeros(count, rank, width, dtype=dtype), torch.zeros(count, out, rank, dtype=dtype)
        for index, ((a_name, b_name), factor) in enumerate(zip(self.names, self.factors, strict=True)):
            one_a, one_b = file.load(a_name), file.load(b_name)
            a[index, : one_a.shape[0]] = one_a
            b[index, :, : one_b.shape[1]] = one_b if factor == 1 else one_b.float() * factor
        return a, b


@dataclass(frozen=True)
class Stacked:
    """All experts in one tensor a side; a side that all experts share is repeated. rows: those of B that are this
    projection's, where gate and up lie in one."""

    facts: ModuleFacts
    a: str
    b: str
    rows: slice

    def load(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        a, b = file.load(self.a), file.load(self.b)
        experts = self.facts.shape[0]
        a = (a if a.dim() == 3 else a[None]).expand(experts, -1, -1)
        b = (b if b.dim() == 3 else b[None]).expand(experts, -1, -1)
        return a.contiguous(), b[:, self.rows].contiguous()


@dataclass(frozen=True)
class Flat:
    """Experts and rank in one axis, as PEFT's target_parameters has them."""

    facts: ModuleFacts
    a: str
    b: str
    rows: slice

    def load(self, file: TensorFile) -> tuple[Tensor, Tensor]:
        experts = self.facts.shape[0]
        return unflatten_a(file.load(self.a), experts), unflatten_b(file.load(self.b)[self.rows], experts)


def pieces_of(file: TensorFile, places: Places, config: PeftConfig) -> dict[str, Piece]:
    """Module path -> piece, by path. Raises UnreadableAdapter or UnsupportedAdapter, naming module or tensor."""
    _refuse_halves(file, places)
    found: dict[str, Piece] = {}
    inner = {path for path, layout in places if layout == "flat inner"}
    for (path, layout), factors in places.items():
        if layout == "dense":
            made: dict[str, Piece] = {path: _dense(file, factors[None], config)}
        elif layout == "expert":
            made = {path: _per_expert(file, {e: f for e, f in factors.items() if e is not None}, config)}
        elif layout == "stacked":
            made = _stacked(file, path, factors[None], config)
        else:
            part = _parameter(file, path, layout, nested=path in inner, factors=factors[None], config=config)
            made = _flat(file, f"{path}.{part}", factors[None], config)
        if twice := found.keys() & made.keys():
            raise UnreadableAdapter(f"{file.path}: {listed(sorted(twice))} stands there in two layouts; keep one")
        found.update(made)
    if not found:
        raise UnreadableAdapter(f"{file.path} holds no LoRA factor that was not dropped")
    return {path: found[path] for path in sorted(found)}


def _refuse_halves(file: TensorFile, places: Places) -> None:
    halves = [
        f"{path}.lora_{'B' if 'A' in factor else 'A'}" if expert is None else f"{path} of expert {expert}"
        for (path, _), factors in places.items()
        for expert, factor in factors.items()
        if len(factor) < 2
    ]
    if halves:
        raise UnreadableAdapter(f"{file.path}: half of a pair is missing: {listed(sorted(halves))}; save it again")


def _shape(file: TensorFile, name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape. Raises unless it has one of these numbers of axes, and elements."""
    shape = file.entries[name].shape
    if len(shape) not in dims:
        only = "only matrices are read" if dims == (2,) else "expected a matrix, or one a expert"
        raise UnsupportedAdapter(f"{file.path}: tensor {name} has shape {list(shape)}; {only}")
    if 0 in shape:
        raise UnreadableAdapter(f"{file.path}: tensor {name} has shape {list(shape)}: it is empty")
    return shape


def _matrix(file: TensorFile, factor: Factor, config: PeftConfig) -> ModuleFacts:
    """What a pair of matrices A [r, in], B [out, r] is."""
    (a, module), (b, _) = factor["A"], factor["B"]
    a_shape, b_shape = _shape(file, a, (2,)), _shape(file, b, (2,))
    if config.targets_parameter(f"{module}.weight"):
        module = f"{module}.weight"
    for name, shape, rank in ((a, a_shape, a_shape[0]), (b, b_shape, b_shape[1])):
        if not config.may_have_rank(module, rank):
            raise _wrong_rank(file, name, shape, rank, config.named_rank(module))
    if a_shape[0] != b_shape[1]:
        raise _wrong_rank(file, b, b_shape, b_shape[1], a_shape[0])
    return ModuleFacts((b_shape[0], a_shape[1]), a_shape[0], config.scale(module, a_shape[0]))


def _wrong_rank(file: TensorFile, name: str, shape: tuple[int, ...], rank: int, expected: int) -> UnreadableAdapter:
    return UnreadableAdapter(
        f"{file.path}: tensor {name} has shape {list(shape)}, so rank {rank}; adapter_config.json says r = {expected}. "
        "The two files do not belong together"
    )


def _dense(file: TensorFile, factor: Factor, config: PeftConfig) -> Dense:
    return Dense(_matrix(file, factor, config), factor["A"][0], factor["B"][0])


def _per_expert(file: TensorFile, factors: Mapping[int, Factor], config: PeftConfig) -> PerExpert:
    experts = sorted(factors)  # as numbers: expert 10 is not expert 1
    if experts[-1] >= EXPERTS_MAX:
        raise UnsupportedAdapter(
            f"{file.path}: tensor {factors[experts[-1]]['A'][0]}: at most {EXPERTS_MAX} experts are read"
        )
    each = [_matrix(file, factors[expert], config) for expert in experts]
    first = each[0]
    for expert, facts in zip(experts, each, strict=True):
        if facts.shape != first.shape:
            raise UnreadableAdapter(
                f"{file.path}: tensors of expert {expert} ({factors[expert]['A'][0]}) are {list(facts.shape)}, those "
                f"of expert {experts[0]} {list(first.shape)}; experts of one layer are alike"
            )
    count = experts[-1] + 1
    present = None if len(experts) == count else tuple(experts)
    names = tuple((factors[expert]["A"][0], factors[expert]["B"][0]) for expert in experts)
    to_first = tuple(f.scale / first.scale for f in each)
    rank = max(f.rank for f in each)
    changed = (["rescaled"] if any(factor != 1 for factor in to_first) else []) + (
        ["padded"] if any(f.rank != rank for f in each) else []
    )
    facts = ModuleFacts((count, *first.shape), rank, first.scale, ONE_BY_ONE, present, tuple(changed))
    return PerExpert(facts, names, to_first)


def _stacked(file: TensorFile, path: str, factor: Factor, config: PeftConfig) -> dict[str, Piece]:
    (a, module), (b, _) = factor["A"], factor["B"]
    a_shape, b_shape = _shape(file, a, (2, 3)), _shape(file, b, (2, 3))
    counts = {shape[0] for shape in (a_shape, b_shape) if len(shape) == 3}
    if not counts:
        raise UnsupportedAdapter(
            f"{file.path}: {path}: both factors are one for all experts, and how many there are is unknown"
        )
    experts, rank = max(counts), a_shape[-2]
    if not counts <= {1, experts} or experts > EXPERTS_MAX:
        raise UnreadableAdapter(f"{file.path}: {path}: A is of {a_shape[0]} experts, B of {b_shape[0]}")
    for name, shape, found in ((a, a_shape, rank), (b, b_shape, b_shape[-1])):
        if found != rank or not config.may_have_rank(module, found):
            raise _wrong_rank(file, name, shape, found, config.named_rank(module))
    if (numbers := experts * max(math.prod(a_shape[-2:]), math.prod(b_shape[-2:]))) > EXPANDED_NUMBERS_MAX:
        raise UnsupportedAdapter(
            f"{file.path}: {path}: repeated for {experts} experts it is {numbers} numbers a factor"
        )
    shared = len(a_shape) == 2 or len(b_shape) == 2 or counts != {experts}
    layout = "experts share a factor" if shared else "stacked experts"
    shape = (experts, b_shape[-2], a_shape[-1])
    changed = ("shared",) if shared else ()
    facts = ModuleFacts(shape, rank, config.scale(module, rank), layout, changed=changed)
    return {name: Stacked(part, a, b, rows) for name, part, rows in _halves(file, path, facts, b)}


def _halves(file: TensorFile, path: str, facts: ModuleFacts, b: str) -> list[tuple[str, ModuleFacts, slice]]:
    """(path, facts, rows of B) of each projection: gate_up_proj is cut in two, and both halves share A."""
    module, _, part = path.rpartition(".")
    if part != FUSED:
        return [(path, facts, slice(None))]
    experts, out, width = facts.shape
    if out % 2:
        raise UnreadableAdapter(f"{file.path}: tensor {b} has {out} rows; gate above up would be an even number")
    half = replace(
        facts,
        shape=(experts, out // 2, width),
        layout=f"{facts.layout}, gate above up",
        changed=(*facts.changed, "split"),
    )
    return [(f"{module}.gate_proj", half, slice(out // 2)), (f"{module}.up_proj", half, slice(out // 2, out))]


def _parameter(
    file: TensorFile, path: str, layout: Layout, *, nested: bool, factors: Factor, config: PeftConfig
) -> str:
    """Which parameter of an `experts` module is meant. PEFT nests one wrapper a parameter, the first one inside."""
    if layout == "flat inner":
        return FUSED
    if nested:
        return "down_proj"
    module = factors["A"][1]
    found = [part for part in (FUSED, "down_proj") if config.targets_parameter(f"{module}.{part}")]
    if len(found) != 1:
        raise UnsupportedAdapter(
            f"{file.path}: tensor {factors['A'][0]} is of one parameter of {path}; target_parameters in "
            f"adapter_config.json must say which ({FUSED} or down_proj), and names "
            f"{listed(map(quote, sorted(config.target_parameters))) or 'none'}"
        )
    return found[0]


def _flat(file: TensorFile, path: str, factor: Factor, config: PeftConfig) -> dict[str, Piece]:
    (a, module), (b, _) = factor["A"], factor["B"]
    a_shape, b_shape = _shape(file, a, (2,)), _shape(file, b, (2,))
    name = f"{module}.{path.rpartition('.')[2]}"
    if config.ranks.regular:
        raise UnsupportedAdapter(
            f"{file.path}: tensor {a} is of all experts at once, and its rank stands in rank_pattern behind a regular "
            "expression, which is never run; name the parameter in it"
        )
    rank = config.named_rank(name)
    for tensor, shape, size in ((a, a_shape, a_shape[0]), (b, b_shape, b_shape[1])):
        if size % rank:
            raise UnreadableAdapter(
                f"{file.path}: tensor {tensor} has shape {list(shape)}; {size} is no number of experts x rank for "
                f"r = {rank} in adapter_config.json. The two files do not belong together"
            )
    if a_shape[0] != b_shape[1]:
        raise UnreadableAdapter(
            f"{file.path}: tensors {a} {list(a_shape)} and {b} {list(b_shape)} differ in experts x rank; save it again"
        )
    facts = ModuleFacts(
        (a_shape[0] // rank, b_shape[0], a_shape[1]), rank, config.scale(name, rank), "flattened experts"
    )
    return {each: Flat(part, a, b, rows) for each, part, rows in _halves(file, path, facts, b)}
