"""Where an adapter comes from: what is known of it before a tensor is read, and its modules, one at a time.

Everything that takes an adapter in reads from an `AdapterSource`, so that an import holds one source module in memory,
not the whole source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from graftwork.adapters.canonical import Adapter, LoraPair, RunningDigest, Shape


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter beside its tensors. base_model: what it calls its base.
    base_fingerprint: that of the base, when Graftwork wrote the adapter."""

    base_model: str | None = None
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class ModuleFacts:
    """One module of a source. layout: how it lies in the file. present: the experts that it holds, None for all.
    changed: what reading it already does to it, in the words of adapters/report.py."""

    shape: Shape
    rank: int
    scale: float
    layout: str = "dense"
    present: tuple[int, ...] | None = None
    changed: tuple[str, ...] = ()


class AdapterSource(Protocol):
    """`notes`: what a person should know of the import; none of it changes the function.
    `dropped`: what the user chose to leave out, so that the function is another."""

    @property
    def facts(self) -> AdapterFacts: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def dropped(self) -> tuple[str, ...]: ...

    @property
    def modules(self) -> Mapping[str, ModuleFacts]: ...

    def load(self, path: str) -> LoraPair:
        """One module, in the file's dtype, on the CPU; only the experts that are present. Raises UnreadableAdapter."""
        ...


@dataclass(frozen=True)
class InMemory:
    """An adapter that is there already, as a source."""

    adapter: Adapter
    facts: AdapterFacts = AdapterFacts()
    notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = field(default=())

    @property
    def modules(self) -> dict[str, ModuleFacts]:
        return {path: ModuleFacts(pair.shape, pair.rank, pair.scale) for path, pair in self.adapter.pairs.items()}

    def load(self, path: str) -> LoraPair:
        return self.adapter.pairs[path]


def name_in_digest(path: str, facts: ModuleFacts) -> str:
    """A module's path; with the experts that are there, where some are missing: they are part of what it is."""
    return path if facts.present is None else f"{path}{list(facts.present)}"


def digest_of(source: AdapterSource) -> str:
    """The adapter's digest, read a module at a time."""
    running = RunningDigest()
    for path in sorted(source.modules):
        running.add(name_in_digest(path, source.modules[path]), source.load(path))
    return running.hexdigest()
