"""The adapters that the engine holds: name -> slot, and what is checked before one gets in."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec, prepare
from graftwork.errors import BadRunId, MisfitAdapter
from graftwork.inference.lanes import Source
from graftwork.inference.requests import BadRequest
from graftwork.lora.slots import SlotBank
from graftwork.store.files import Manifest, is_stable, verify
from graftwork.store.queue import parse_version_name

NAME_CHARACTERS_MAX = 256


@dataclass(frozen=True)
class Shelved:
    """An adapter that was read and checked, ready to go into a slot."""

    name: str
    folder: Path
    prepared: PreparedInitAdapter
    digest: str


def read_adapter(name: str, folder: Path, spec: SlotSpec, base_fingerprint: str) -> Shelved:
    """The adapter in a PEFT folder, every check done; touches no slot.

    `digest` is computed from the tensors that were read. A folder with a manifest is verified against it, a name that
    is a version's must agree with the digest, and an adapter that says which base it was trained on must have been
    trained on this one. Raises BadRequest, AdapterError, Damaged.
    """
    if not name or len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise BadRequest(f"lora_name: {name!r}, expected 1 to {NAME_CHARACTERS_MAX} printable characters", "lora_name")
    if not folder.is_dir():
        raise BadRequest(
            f"lora_path: there is no folder {folder} on the server's file system (it runs in {Path.cwd()})", "lora_path"
        )
    manifest = verify(folder, Manifest.read(folder).kind) if is_stable(folder) else None
    source = read_peft(folder)
    digest = source.adapter.digest()
    if manifest is not None and manifest.facts.get("digest", digest) != digest:
        raise BadRequest(
            f"{folder}: its manifest says digest {manifest.facts['digest'][:8]}, its tensors have {digest[:8]}; it was"
            " not loaded. Publish the version again",
            "lora_path",
        )
    trained_on = source.facts.base_fingerprint
    if trained_on not in (None, base_fingerprint):
        raise MisfitAdapter(
            f"{folder} was trained on the base with fingerprint {trained_on[:8]}, this server's has"
            f" {base_fingerprint[:8]}; serve it from its own base"
        )
    expected = digest8_of(name)
    if expected is not None and not digest.startswith(expected):
        raise BadRequest(
            f"{name} says digest {expected}, the adapter in {folder} has {digest[:8]}: it is another version. It was"
            " not loaded; name the version that the folder holds",
            "lora_name",
        )
    return Shelved(name, folder, prepare(source, spec), digest)


def digest8_of(name: str) -> str | None:
    """The digest's first 8 hex digits in a version's name; None for any other name."""
    try:
        return parse_version_name(name)[2]
    except BadRunId:
        return None


class Shelf:
    """Which adapter is in which slot. Only the engine's worker changes it; `entries` may be read from any thread."""

    def __init__(self, bank: SlotBank, base_name: str) -> None:
        self.bank = bank
        self.base = Source(base_name, -1, 0.0, None)
        self.entries: dict[str, tuple[Source, Path]] = {}
        """In the order of loading."""
        self._by_use: list[str] = []
        """Names of the entries; what was loaded or asked for last comes last."""

    def check_name(self, name: str) -> None:
        """Raises BadRequest if the name is taken."""
        if name == self.base.name or name in self.entries:
            raise BadRequest(
                f"{name} is loaded already, and what a name stands for does not change; unload it or use another name",
                "lora_name",
            )

    @property
    def is_full(self) -> bool:
        return self.bank.free_slot() is None

    def put(self, shelved: Shelved) -> None:
        """The name must be free. Raises BadRequest when no slot is."""
        slot = self.bank.free_slot()
        if slot is None:
            held = ", ".join(self.entries) or "adapters that are being unloaded"
            raise BadRequest(
                f"all {self.bank.slots} adapter slots are taken: {held}, and requests use every one. Try again when one"
                " has ended, or raise inference.max_adapters",
                "lora_name",
            )
        self.bank.write(slot, shelved.prepared)
        source = Source(shelved.name, slot, self.bank.holding(slot).scale, shelved.digest)
        self.entries = {**self.entries, shelved.name: (source, shelved.folder)}
        self._by_use.append(shelved.name)

    def least_used(self, in_use: Container[int]) -> Source | None:
        """Of the adapters whose slots are not `in_use`, the one that was loaded or asked for the longest time ago."""
        by_use = (self.entries[name][0] for name in self._by_use)
        return next((source for source in by_use if source.slot not in in_use), None)

    def find(self, name: str) -> Source | None:
        """What answers a request for `name`: an adapter, which counts as used now, the bare base, or nothing."""
        if name == self.base.name:
            return self.base
        if name not in self.entries:
            return None
        self._by_use.remove(name)
        self._by_use.append(name)
        return self.entries[name][0]

    def withdraw(self, name: str) -> Source | None:
        """Take the name away; the slot stays taken until `free`."""
        if name not in self.entries:
            return None
        source, _ = self.entries[name]
        self.entries = {other: entry for other, entry in self.entries.items() if other != name}
        self._by_use.remove(name)
        return source

    def free(self, source: Source) -> None:
        self.bank.reset(source.slot)
