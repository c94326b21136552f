"""A source + slot spec -> PreparedInitAdapter: validated, normalised CPU tensors, and a report of what was done."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.canonical import ALPHA_RANGE, Adapter, LoraPair, RunningDigest, Shape, alpha_for
from graftwork.adapters.fit import (
    drop_idle_directions,
    pad_rank,
    revive,
    spread_experts,
    to_scale,
    truncate_rank,
)
from graftwork.adapters.formats.pieces import ONE_BY_ONE
from graftwork.adapters.formats.untrusted import listed
from graftwork.adapters.names import match_paths
from graftwork.adapters.report import ImportReport
from graftwork.adapters.source import AdapterSource, ModuleFacts, name_in_digest
from graftwork.config.section import ALL_LINEAR
from graftwork.errors import MisfitAdapter

SCALE_TOLERANCE = 1e-9
"""Relative. Scales this close are the same: an fp32 product cannot tell them apart."""


@dataclass(frozen=True)
class SlotSpec:
    """What a slot can hold: `shapes` maps each target module's path to (out, in), (E, out, in) for experts."""

    max_rank: int
    shapes: Mapping[str, Shape]

    @staticmethod
    def around(source: AdapterSource) -> SlotSpec:
        """The slot that holds exactly this adapter. Raises MisfitAdapter when only a base could tell how many experts
        there are."""
        modules = source.modules
        if gaps := [path for path, facts in modules.items() if facts.present is not None]:
            raise MisfitAdapter(
                f"{listed(gaps)}: some experts are missing, and how many there are is unknown; name the base (--base)"
            )
        return SlotSpec(max(f.rank for f in modules.values()), {path: f.shape for path, f in modules.items()})

    def narrowed(self, targets: Sequence[str] | None) -> SlotSpec:
        """Only the modules whose names end in one of `targets`; None or "all-linear": all. Raises MisfitAdapter, naming
        the targets that no module answers to."""
        if targets is None or tuple(targets) == ALL_LINEAR:
            return self
        shapes = {path: shape for path, shape in self.shapes.items() if path.rpartition(".")[2] in targets}
        known = {path.rpartition(".")[2] for path in self.shapes}
        if unknown := sorted(set(targets) - known):
            raise MisfitAdapter(
                f"adapter.target_modules names {listed(unknown)}, which the slots do not have; they have "
                f"{', '.join(sorted(known))}"
            )
        return SlotSpec(self.max_rank, shapes)


@dataclass(frozen=True)
class Wish:
    """What the run asks for. rank, alpha: None inherits the adapter's rank, and its scale.
    allow_lossy: cut a rank that is too high by SVD. seed: of what starts fresh. targets: see `SlotSpec.narrowed`."""

    rank: int | None = None
    alpha: float | None = None
    allow_lossy: bool = False
    seed: int = 0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PreparedInitAdapter:
    """What one slot starts from: fp32, on the CPU, for exactly the run's modules, one rank and one scale.

    Its adapter's pairs have the run's own rank (not the slot's), all with scale alpha / rank.
    report: JSON-able. kind "adapter": what was done with which source; kind "fresh": the seed.
    """

    adapter: Adapter
    rank: int
    alpha: float
    source_digest: str
    report: dict[str, Any]


def prepare(source: AdapterSource, spec: SlotSpec, wish: Wish = Wish()) -> PreparedInitAdapter:
    """A saved adapter as a slot's start: the same function, or a refusal.

    Reads one module of the source at a time; at its end only what the slot starts from is in memory.
    Raises MisfitAdapter: one message that names everything that does not fit, and what to do. UnreadableAdapter for a
    number that is not finite.
    """
    spec = spec.narrowed(wish.targets)
    modules, places = source.modules, places_of(source, spec, wish)
    rank, alpha = _rank_and_alpha(modules, wish, spec)
    fitting = _Fitting(spec, rank, alpha / rank, wish)
    digest, dtypes = RunningDigest(), set[str]()
    for path in sorted(modules):
        room = fitting.room(places[path], modules[path])
        pair = source.load(path)
        digest.add(name_in_digest(path, modules[path]), pair)
        fitting.untouched &= places[path] == path
        dtypes |= {str(tensor.dtype).removeprefix("torch.") for tensor in (pair.a, pair.b)}
        fitting.take(places[path], pair, modules[path], room)
    adapter, report = fitting.finish()
    report.notes += source.notes
    report.dropped += source.dropped
    report.warnings += [f"{what}: the function is not the source's any more" for what in source.dropped]
    if report.energies:
        report.warnings.append(
            f"{_count(report.energies, 'module')} cut by SVD: the function is not the source's any more"
        )
    source_digest = digest.hexdigest()
    about = {
        "kind": "adapter",
        "source_digest": source_digest,
        "digest": source_digest if fitting.untouched else adapter.digest(),
        "base_model": source.facts.base_model,
        "rank": rank,
        "alpha": alpha,
        "source_ranks": sorted({facts.rank for facts in modules.values()}),
        "modules": len(spec.shapes),
        "dtype_from": sorted(dtypes),
        "dtype_to": "float32",
        **report.to_json(),
    }
    return PreparedInitAdapter(adapter, rank, alpha, source_digest, about)


def places_of(source: AdapterSource, spec: SlotSpec, wish: Wish) -> dict[str, str]:
    """The source's modules -> the slot's, by what is known before a tensor is read. Raises MisfitAdapter, naming
    everything that does not fit."""
    places = match_paths(source.modules, spec.shapes)
    if misfits := [*_module_misfits(source.modules, places, spec), *_rank_misfits(wish, spec)]:
        raise _misfit(misfits)
    return places


def refuse_other_base(what: str, recorded: str | None, fingerprint: str | None) -> None:
    """Raises MisfitAdapter when both are known and differ."""
    if None not in (recorded, fingerprint) and recorded != fingerprint:
        raise MisfitAdapter(
            f"{what} was trained on another base: its fingerprint is {str(recorded)[:12]}, this one's "
            f"{str(fingerprint)[:12]}; use the one that it belongs to"
        )


class _Fitting:
    """One import: modules come in one by one, what they became is collected, misfits are told together."""

    def __init__(self, spec: SlotSpec, rank: int, scale: float, wish: Wish) -> None:
        self.spec, self.rank, self.scale, self.wish = spec, rank, scale, wish
        self.report = ImportReport()
        self.pairs: dict[str, LoraPair] = {}
        self.too_high: dict[str, int] = {}
        self.out_of_range: dict[str, float] = {}
        self.untouched = True
        """Whether every module so far is the source's to the last byte, name and scale: the digest is then, too."""

    def room(self, path: str, facts: ModuleFacts) -> LoraPair | None:
        """Where a module that will be padded goes: made before its source is read, so that what is freed again lies
        behind what stays, and memory is not left in holes."""
        shape = self.spec.shapes[path]
        return _fresh_pair(shape, self.rank, self.scale, self.wish.seed, path) if facts.rank < self.rank else None

    def take(self, path: str, pair: LoraPair, facts: ModuleFacts, room: LoraPair | None) -> None:
        """Fit one module. It is changed in as few ways as will do, and each is reported."""
        self.report.layouts[facts.layout] += 1
        steps = list(facts.changed)
        source = pair
        pair = LoraPair(pair.a.float().contiguous(), pair.b.float().contiguous(), pair.scale)
        shape = self.spec.shapes[path]
        if len(shape) == 3 and pair.a.shape[0] != shape[0]:
            present = facts.present or tuple(range(pair.a.shape[0]))
            pair = spread_experts(pair, present, shape[0], self._fresh(path, max(pair.rank, self.rank)))
            steps.append("experts added")
        if pair.rank > self.rank:
            lower = self._lower(path, pair, steps)
            if lower is None:
                return
            pair = lower
        if not math.isclose(pair.scale, self.scale, rel_tol=SCALE_TOLERANCE, abs_tol=0.0):
            pair = to_scale(pair, self.scale)
            steps.append("rescaled")
            if not bool(torch.isfinite(pair.b).all()) or (not pair.b.any() and bool(source.b.any())):
                self.out_of_range[path] = source.scale
                return
        if pair.rank < self.rank:
            assert room is not None, "a pair never has a lower rank than its file says"
            pair = pad_rank(pair, room)
            steps.append("padded")
        if (revived := revive(pair, lambda: self._fresh(path, self.rank))) is not None:
            pair = revived
            steps.append("revived")
        self.pairs[path] = LoraPair(pair.a, pair.b, self.scale)
        self.untouched &= pair.a is source.a and pair.b is source.b and source.scale == self.scale
        for step in dict.fromkeys(steps or ["kept"]):
            self.report.add(step, path)

    def _lower(self, path: str, pair: LoraPair, steps: list[str]) -> LoraPair | None:
        """The pair at the run's rank; None, and remembered, when that would change the function unasked."""
        if (lean := drop_idle_directions(pair, self.rank)) is not None:
            steps.append("idle directions dropped")
            return lean
        if not self.wish.allow_lossy:
            self.too_high[path] = pair.rank
            return None
        reduced = truncate_rank(pair, self.rank)
        self.report.energies[path] = reduced.energy
        steps.append("reduced")
        return reduced.pair

    def finish(self) -> tuple[Adapter, ImportReport]:
        """Fresh factors where the adapter has none. Raises MisfitAdapter for modules of too high a rank, and for scales
        between which fp32 has no numbers."""
        if self.too_high or self.out_of_range:
            far = listed(f"{path} (scale {scale:g})" for path, scale in self.out_of_range.items())
            beyond = f"scales that fp32 cannot bring to {self.scale:g}: {far}. Choose another adapter.alpha"
            advice = [self._rank_advice()] if self.too_high else []
            raise _misfit([*advice, *([beyond] if self.out_of_range else [])])
        for path in sorted(self.spec.shapes.keys() - self.pairs.keys()):
            self.pairs[path] = _fresh_pair(self.spec.shapes[path], self.rank, self.scale, self.wish.seed, path)
            self.report.add("fresh", path)
            self.untouched = False
        return Adapter({path: self.pairs[path] for path in sorted(self.pairs)}), self.report

    def _rank_advice(self) -> str:
        whose, where = ("the slots'", "lora.max_rank") if self.wish.rank is None else ("the run's", "adapter.rank")
        named = listed(f"{path} (rank {rank})" for path, rank in self.too_high.items())
        return (
            f"{_count(self.too_high, 'module')} of a rank above {self.rank}, {whose}: {named}. Set {where} to "
            f"{max(self.too_high.values())}, or allow the best approximation by SVD, which changes the function "
            "(--allow-lossy, adapter.allow_lossy = true)"
        )

    def _fresh(self, path: str, rank: int) -> Tensor:
        return _fresh_a(self.spec.shapes[path], rank, self.wish.seed, path)


def _rank_and_alpha(modules: Mapping[str, ModuleFacts], wish: Wish, spec: SlotSpec) -> tuple[int, float]:
    """The run's. Inherited: the adapter's highest rank as far as the slots hold it, the scale of its first module."""
    rank = min(max(f.rank for f in modules.values()), spec.max_rank) if wish.rank is None else wish.rank
    if wish.alpha is not None:
        return rank, wish.alpha
    scale = modules[min(modules)].scale
    alpha = alpha_for(scale, rank)  # a scale that no alpha / rank gives (rsLoRA) moves by one part in 2^52
    alpha = scale * rank if alpha is None else alpha
    if not ALPHA_RANGE[0] <= alpha <= ALPHA_RANGE[1]:
        raise _misfit([f"its scale {scale:g} gives alpha {alpha:g}, which is not between {ALPHA_RANGE[0]:g} and "
                       f"{ALPHA_RANGE[1]:g}. Set adapter.alpha"])  # fmt: skip
    return rank, alpha


def _misfit(misfits: list[str]) -> MisfitAdapter:
    numbered = (f"({index}) {misfit}." for index, misfit in enumerate(misfits, 1))
    return MisfitAdapter(f"the adapter does not fit the slots: {' '.join(numbered)}")


def _module_misfits(modules: Mapping[str, ModuleFacts], places: Mapping[str, str], spec: SlotSpec) -> list[str]:
    misfits = []
    if not modules:
        return ["the adapter has no modules; save it again"]
    if unknown := sorted(modules.keys() - places.keys()):
        misfits.append(
            f"{_count(unknown, 'module')} of the adapter that the slots do not have: {listed(unknown)}. "
            "Add their names to lora.target_modules (--targets; adapter.target_modules, if the run names some), drop "
            "them (--ignore), or check that the adapter belongs to this base"
        )
    if twice := sorted(path for path, count in Counter(places.values()).items() if count > 1):
        misfits.append(f"two modules of the adapter stand for {listed(twice)}. Save it again with one name for each")
    wrong = [
        f"{path} (found {_by(facts.shape)}, expected {_by(spec.shapes[places[path]])})"
        for path, facts in sorted(modules.items())
        if path in places and not _fits(facts, spec.shapes[places[path]])
    ]
    if wrong:
        misfits.append(
            f"{_count(wrong, 'module')} of another shape (out x in): {listed(wrong)}. "
            "The adapter was trained on another base; use the base that it belongs to"
        )
    return misfits


def _fits(facts: ModuleFacts, shape: Shape) -> bool:
    """Equal shapes; an adapter of single experts may have fewer of them."""
    if facts.layout == ONE_BY_ONE and len(shape) == 3:
        return facts.shape[0] <= shape[0] and facts.shape[1:] == tuple(shape[1:])
    return facts.shape == tuple(shape)


def _rank_misfits(wish: Wish, spec: SlotSpec) -> list[str]:
    misfits = []
    if wish.rank is not None and not 1 <= wish.rank <= spec.max_rank:
        misfits.append(f"rank {wish.rank}, and the slots hold 1 to {spec.max_rank}. Set lora.max_rank to {wish.rank}")
    if wish.alpha is not None and not ALPHA_RANGE[0] <= wish.alpha <= ALPHA_RANGE[1]:
        misfits.append(f"alpha {wish.alpha:g} is not between {ALPHA_RANGE[0]:g} and {ALPHA_RANGE[1]:g}")
    return misfits


def _count(found: Sized, noun: str) -> str:
    return f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def fresh(spec: SlotSpec, rank: int, alpha: float, seed: int) -> PreparedInitAdapter:
    """An adapter that changes nothing yet: B = 0, A uniform in +-1/sqrt(in) as PEFT draws it.

    Each module's A comes from a generator of its own, keyed by (seed, path): other modules, their order and the
    slots' rank make no difference. Raises MisfitAdapter when the rank does not fit the slots.
    """
    if not 1 <= rank <= spec.max_rank:
        raise MisfitAdapter(f"rank {rank}: the slots hold 1 to {spec.max_rank}. Change adapter.rank or lora.max_rank")
    if not ALPHA_RANGE[0] <= alpha <= ALPHA_RANGE[1]:
        raise MisfitAdapter(f"alpha {alpha:g} is not between {ALPHA_RANGE[0]:g} and {ALPHA_RANGE[1]:g}")
    shapes = spec.shapes
    adapter = Adapter({path: _fresh_pair(shapes[path], rank, alpha / rank, seed, path) for path in sorted(shapes)})
    digest = adapter.digest()
    report = {
        "kind": "fresh",
        "seed": seed,
        "digest": digest,
        "rank": rank,
        "alpha": alpha,
        "modules": len(adapter.pairs),
        "notes": [],
    }
    return PreparedInitAdapter(adapter, rank, alpha, digest, report)


def _fresh_pair(shape: Shape, rank: int, scale: float, seed: int, path: str) -> LoraPair:
    return LoraPair(_fresh_a(shape, rank, seed, path), torch.zeros(*shape[:-1], rank), scale)


def _fresh_a(shape: Shape, rank: int, seed: int, path: str) -> Tensor:
    """[rank, in], for experts [E, rank, in]: expert after expert from one generator."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(*shape[:-2], rank, shape[-1]).uniform_(-bound, bound, generator=_generator(seed, path))


def _generator(seed: int, path: str) -> torch.Generator:
    key = hashlib.sha256(f"fresh {seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
