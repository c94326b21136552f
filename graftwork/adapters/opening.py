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
from graftwork.errors import UnsupportedAdapter
from graftwork.store.checkpoint import CHECKPOINT, WEIGHT
from graftwork.store.files import is_stable, verify


@dataclass(frozen=True)
class Opened:
    """`kind`: what the path holds, in words. `folder`: where tokenizer files lie beside the adapter."""

    source: AdapterSource
    kind: str
    folder: Path

    def companions(self) -> Companions:
        """Read when the adapter itself was found good. Raises UnreadableAdapter."""
        return read_companions(self.folder) if self.folder.is_dir() else {}


@contextmanager
def open_adapter(
    path: Path, choice: Choice = Choice(), *, alpha: float | None = None, older: bool = False
) -> Iterator[Opened]:
    """Raises AdapterError, and Damaged for a checkpoint whose bytes are not those of its manifest.

    older: checkpoints with rank_N.pt are opened too (`graftwork convert` alone does that); alpha: for one that does not
    say its scale.
    """
    if has_rank_files(path):
        if not older:
            raise UnsupportedAdapter(
                f"{path} is a checkpoint of an older trainer (rank_0.pt); make an adapter of it first: "
                f"graftwork convert {path} ADAPTER_DIR"
            )
        yield Opened(read_rank_files(path, alpha), "checkpoint of an older trainer (rank_N.pt)", path / WEIGHT)
        return
    kind, folder = "PEFT adapter", path
    if is_checkpoint(path):
        verify(path, CHECKPOINT)
        kind, folder = "checkpoint of Graftwork", path / WEIGHT
    with open_peft(folder, choice) as source:
        yield Opened(source, kind, folder)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a trainer's checkpoint, of ours or of an older one, rather than an adapter's folder."""
    return has_rank_files(path) or (is_stable(path) and (path / "trainer").is_dir())
