"""The one module that writes, renames and deletes.

Commit protocol: write every file into a hidden folder beside the target, fsync each file and folder, write the
manifest (`STABLE`) last, fsync it, rename, fsync the parent. A reader therefore sees a folder whole or not at all, and
`verify` proves it. An fsync that failed is never tried again on the same file: the kernel may have dropped the dirty
pages, and a second fsync would say "fine" (Rebello et al., USENIX ATC 2020).

`Disk` is passed as an object, never imported as state: a test hands in a twin whose primitives fail or record.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.errors import Busy, Conflict, StoreError
from graftwork.store.files import (
    MANIFEST,
    Content,
    FileFacts,
    Hashing,
    Manifest,
    dump_json,
    json_line,
    pieces,
    read_lines,
    refuse_unplain,
)

STAGING_PREFIX = ".staging-"
RETIRED_PREFIX = "retired-"


@dataclass
class Staging:
    """A hidden folder that is being filled; `publish_dir` makes it visible. Names are POSIX paths relative to it."""

    disk: Disk
    root: Path
    facts: dict[str, Any] = field(default_factory=dict)
    manifest: Manifest | None = None
    written: dict[Path, FileFacts] = field(default_factory=dict)

    @property
    def published(self) -> Manifest:
        """The manifest that the folder was published with; readers may have moved the folder since."""
        assert self.manifest is not None, "not published yet"
        return self.manifest

    def write(self, name: str, data: Content) -> None:
        """Bytes, or pieces of bytes that are hashed as they pass."""
        path = self.root / name
        self.disk.make_folder(path.parent)
        passing = Hashing(data)
        self.disk.write(path, passing)
        self.written[path] = passing.facts()

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, dump_json(value))

    def take(self, name: str, facts: FileFacts) -> None:
        """A file that another process wrote into this folder, and what that process says it holds."""
        self.written[self.root / name] = facts

    def seal(self, folder: str, kind: str, facts: dict[str, Any]) -> Manifest:
        """Write the manifest of a folder inside this one (or of this one: `folder` = ".")."""
        root = self.root / folder
        inside = sorted((p.relative_to(root).as_posix(), f) for p, f in self.written.items() if p.is_relative_to(root))
        manifest = Manifest(kind, facts, dict(inside))
        self.write((Path(folder) / MANIFEST).as_posix(), manifest.to_bytes())
        return manifest

    def publish(self, target: Path, kind: str) -> None:
        """Make the folder visible as `target`, with its manifest, and durable; or, where that raises, neither."""
        for folder in sorted(p for p in self.root.rglob("*") if p.is_dir()):
            self.disk.sync_folder(folder)
        self.manifest = self.seal(".", kind, self.facts)
        self.disk.sync_folder(self.root)
        self.disk.rename(self.root, target)
        try:
            self.disk.sync_folder(target.parent)
        except OSError:
            target.rename(self.root)  # it may not outlive a power cut: nobody may build on it
            raise

    def discard(self) -> None:
        """Remove what is not published; what cannot be removed is swept away later."""
        shutil.rmtree(self.root, ignore_errors=True)


@dataclass
class Claim:
    """An exclusive hold on a folder; the kernel lets go of it when the process dies, however it dies."""

    path: Path
    descriptor: int

    def release(self) -> None:
        os.close(self.descriptor)


class Pin:
    """Keeps a folder's inode from being given to another one, for as long as it is held: so that (device, inode) tells
    the folder from one that was made under its name. Raises OSError when there is no such folder."""

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


class Disk:
    """Primitives first (a twin overrides these), then what the rest of the system calls."""

    # --- primitives -------------------------------------------------------------------------------------------------

    def make_folder(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: Content) -> None:
        """Create `path`, which must not exist, write `data` and fsync it."""
        with path.open("xb") as file:
            for piece in pieces(data):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def append(self, path: Path, data: bytes) -> None:
        """Raises Damaged when `path` is no plain file, FileNotFoundError when its folder is gone."""
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            refuse_unplain(path, descriptor)
            with open(descriptor, "ab", closefd=False) as file:
                file.write(data)
        finally:
            os.close(descriptor)

    def sync_file(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)

    # --- publishing -------------------------------------------------------------------------------------------------

    def publish_file(self, path: Path, data: bytes, *, make_folder: bool = True) -> None:
        """Make `path` hold `data`, whole or not at all; an older file of that name is replaced.

        make_folder: the folder is made where it is missing; else that raises FileNotFoundError.
        """
        if make_folder:
            self.make_folder(path.parent)
        staged = path.parent / f"{STAGING_PREFIX}{path.name}-{secrets.token_hex(4)}"
        try:
            self.write(staged, data)
            self.rename(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        self.sync_folder(path.parent)

    def publish_json(self, path: Path, value: Any) -> None:
        self.publish_file(path, dump_json(value))

    def stage(self, target: Path, facts: dict[str, Any]) -> Staging:
        """A hidden folder beside `target`, to be filled and published as it. Raises Conflict if `target` exists."""
        if target.exists():
            raise Conflict(f"{target} exists already; a published folder is never changed in place")
        self.make_folder(target.parent)
        root = target.parent / f"{STAGING_PREFIX}{target.name}-{secrets.token_hex(4)}"
        self.make_folder(root)
        return Staging(self, root, dict(facts))

    @contextmanager
    def publish_dir(self, target: Path, kind: str, facts: dict[str, Any]) -> Iterator[Staging]:
        """Fill a folder inside the `with`; it appears as `target`, with its manifest, when the block ends well.

        Raises Conflict if `target` exists. When the block raises, nothing is left behind.
        """
        staging = self.stage(target, facts)
        try:
            yield staging
            staging.publish(target, kind)
        except BaseException:
            staging.discard()
            raise

    # --- everything else --------------------------------------------------------------------------------------------

    def append_line(self, path: Path, line: str) -> None:
        """Append one line of a log. Logs are not part of the commit protocol: a reader drops a torn last line."""
        self.append(path, line.encode() + b"\n")

    def cut_log(self, path: Path, last_step: int) -> None:
        """Drop the lines of a `.jsonl` log whose `step` is missing or after `last_step`, and a torn last line."""
        if path.exists():
            rows = [row for row in read_lines(path) if isinstance(row.get("step"), int) and row["step"] <= last_step]
            self.publish_file(path, "".join(json_line(row) + "\n" for row in rows).encode())

    def quarantine(self, path: Path, trash: Path, prefix: str = "") -> Path:
        """Move a file or folder into `trash` (same file system) under a name that was never used; return it."""
        self.make_folder(trash)
        target = trash / f"{prefix}{path.name}-{secrets.token_hex(4)}"
        self.rename(path, target)
        self.sync_folder(trash)
        self.sync_folder(path.parent)
        return target

    def retire(self, path: Path, trash: Path) -> None:
        """Delete a published folder: first out of its readers' sight, whole, by a rename into `trash`, then from there.
        What a kill leaves between the two is removed by `sweep(trash, RETIRED_PREFIX)`."""
        self.remove_tree(self.quarantine(path, trash, RETIRED_PREFIX))

    def sweep(self, folder: Path, prefix: str = STAGING_PREFIX) -> list[Path]:
        """Remove what a killed writer left half-done in `folder`. Only for the folder's one writer."""
        left = sorted(folder.glob(f"{prefix}*")) if folder.is_dir() else []
        for path in left:
            if path.is_dir():
                self.remove_tree(path)
            else:
                path.unlink()
        return left

    def claim(self, path: Path, who: str) -> Claim:
        """Hold `path` (a lock file) until this process ends. Raises Busy, naming the holder, if another has it."""
        self.make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise Busy(f"{path.parent} is in use by {holder}; stop it first, or choose another folder") from None
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"{path}: this file system cannot lock files ({error})") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{who}, pid {os.getpid()}\n".encode(), 0)
        return Claim(path, descriptor)
