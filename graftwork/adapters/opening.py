"""A path that a user gives -> the adapter in it: a PEFT folder, one of our checkpoints, or one with rank_N.pt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftwork.adapters.companions import Companions, read_companions
from graftwork.adapters.formats.peft_read import Choice, open_peft
from graftwork.adapters.formats.rank_files import has_rank_files, read_rank_files
from graftwork.adapters.source import AdapterSource
from graftwork.errors import UnreadableAdapter
from graftwork.store.checkpoint import CHECKPOINT, WEIGHT
from graftwork.store.disk import is_stable, verify


@dataclass(frozen=True)
class Opened:
    """`kind`: what the path holds, in words."""

    source: AdapterSource
    kind: str
    companions: Companions


@contextmanager
def open_adapter(path: Path, choice: Choice = Choice(), alpha: float | None = None) -> Iterator[Opened]:
    """Raises AdapterError, and Damaged for a checkpoint whose bytes are not those of its manifest.

    alpha: for a checkpoint with rank_N.pt that does not say its scale.
    """
    if has_rank_files(path):
        if choice != Choice():
            raise UnreadableAdapter(
                f"{path} is a checkpoint with rank_N.pt: there is nothing to choose or ignore in it"
            )
        weight = path / WEIGHT
        yield Opened(
            read_rank_files(path, alpha), "checkpoint of an older trainer (rank_N.pt)",
            read_companions(weight) if weight.is_dir() else {},
        )  # fmt: skip
        return
    kind, folder = "PEFT adapter", path
    if is_checkpoint(path):
        verify(path, CHECKPOINT)
        kind, folder = "checkpoint of Graftwork", path / WEIGHT
    with open_peft(folder, choice) as source:
        yield Opened(source, kind, read_companions(folder))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a trainer's checkpoint, of ours or of an older one, rather than an adapter's folder."""
    return has_rank_files(path) or (is_stable(path) and (path / "trainer").is_dir())
