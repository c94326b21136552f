"""The one module that writes, renames and deletes.

Commit protocol: write every file into a hidden folder beside the target, fsync each file and folder, write the
manifest (`STABLE`) last, fsync it, rename, fsync the parent. A reader therefore sees a folder whole or not at all, and
`verify` proves it. An fsync that failed is never tried again on the same file: the kernel may have dropped the dirty
pages, and a second fsync would say "fine" (Rebello et al., USENIX ATC 2020).

`Disk` is passed as an object, never imported as state: a test hands in a twin whose primitives fail or record.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.errors import Busy, Conflict, Damaged, StoreError

MANIFEST = "STABLE"
MANIFEST_FORMAT = 1
JSON_BYTES_MAX = 64 * 2**20
LOG_BYTES_MAX = 2**32
MANIFEST_BYTES_MAX = 2 * 2**20  # ten thousand files
STAGING_PREFIX = ".staging-"
RETIRED_PREFIX = "retired-"
HASH_CHUNK_BYTES = 2**20


def dump_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no NaN, one trailing newline; equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, allow_nan=False, indent=1) + "\n").encode()


def json_line(value: Any) -> str:
    """One line of a `.jsonl` log. NaN and infinity become null: other readers of JSON refuse them."""
    return json.dumps(_finite(value), sort_keys=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_file(path: Path, bytes_max: int) -> bytes:
    """The bytes of a plain file. Raises Damaged when it is none (a pipe would keep its reader for ever) or is larger
    than `bytes_max`, OSError when it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _refuse_unplain(path, descriptor)
        if (size := os.fstat(descriptor).st_size) > bytes_max:
            raise Damaged(f"{path} has {size} bytes, at most {bytes_max} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(bytes_max)
    finally:
        os.close(descriptor)


def _refuse_unplain(path: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise Damaged(f"{path} is not a plain file")


def read_json(path: Path, what: str) -> Any:
    """The JSON in `path`. Raises Damaged, naming the file, if it is absent or not JSON."""
    try:
        return json.loads(read_file(path, JSON_BYTES_MAX), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise Damaged(f"{what}: {path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what}: {path} is not JSON ({error})") from None


@dataclass(frozen=True)
class FileFacts:
    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileFacts:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return FileFacts(size, digest.hexdigest())


Pieces = Iterable[bytes | memoryview]
Content = bytes | Pieces
"""A file's bytes, whole or in pieces, in order."""


def pieces(data: Content) -> Pieces:
    return [data] if isinstance(data, bytes) else data


class Hashing:
    """Pieces of a file on their way to it; afterwards, what the file must hold."""

    def __init__(self, data: Content) -> None:
        self.data, self.size, self.digest = data, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in pieces(self.data):
            self.digest.update(piece)
            self.size += len(piece)
            yield piece

    def facts(self) -> FileFacts:
        return FileFacts(self.size, self.digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """What a published folder holds. `facts` is free JSON of the writer; `sha256` identifies the whole folder."""

    kind: str
    facts: dict[str, Any]
    files: dict[str, FileFacts]

    def to_bytes(self) -> bytes:
        files = {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()}
        return dump_json({"format": MANIFEST_FORMAT, "kind": self.kind, "facts": self.facts, "files": files})

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a published folder. Raises Damaged, naming the file."""
        path = folder / MANIFEST
        if path.is_symlink():
            raise Damaged(f"{path} is a symbolic link; a manifest is a plain file")
        if path.is_file() and path.stat().st_size > MANIFEST_BYTES_MAX:
            raise Damaged(f"{path} is larger than a manifest may be ({MANIFEST_BYTES_MAX} bytes)")
        raw = read_json(path, "manifest")
        try:
            if raw["format"] != MANIFEST_FORMAT:
                raise Damaged(f"{path}: format {raw['format']!r}, this version of Graftwork reads {MANIFEST_FORMAT}")
            files = {str(n): FileFacts(int(f["bytes"]), str(f["sha256"])) for n, f in raw["files"].items()}
            return Manifest(str(raw["kind"]), dict(raw["facts"]), files)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise Damaged(f"{path} is not a manifest of ours ({type(error).__name__}: {error})") from None


def is_stable(folder: Path) -> bool:
    """Whether `folder` was published. It says nothing about damage since: that is `verify`."""
    return (folder / MANIFEST).is_file()


def verify(folder: Path, kind: str) -> Manifest:
    """Check every file of a published folder against its manifest; return the manifest.

    Raises Damaged, naming the first file that is missing, extra, of another size or of other bytes.
    """
    manifest = Manifest.read(folder)
    if manifest.kind != kind:
        raise Damaged(f"{folder} holds a {manifest.kind!r}, expected a {kind!r}")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    if missing := sorted(manifest.files.keys() - found):
        raise Damaged(f"{folder / missing[0]} is missing, though {MANIFEST} lists it")
    if extra := sorted(found - manifest.files.keys() - {MANIFEST}):
        raise Damaged(f"{folder / extra[0]} is not listed in {MANIFEST}")
    for name, expected in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise Damaged(f"{path} is not a plain file")
        if (size := path.stat().st_size) != expected.bytes:
            raise Damaged(f"{path} has {size} bytes, {MANIFEST} says {expected.bytes}")
        if (found_facts := FileFacts.of(path)) != expected:
            raise Damaged(f"{path} has sha256 {found_facts.sha256[:12]}, {MANIFEST} says {expected.sha256[:12]}")
    return manifest


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
            _refuse_unplain(path, descriptor)
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


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a `.jsonl` log, without a torn last line; an absent file reads as empty. Raises Damaged when
    it is no plain file."""
    try:
        data = read_file(path, LOG_BYTES_MAX)
    except FileNotFoundError:
        return []
    rows: list[dict[str, Any]] = []
    for line in data.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
