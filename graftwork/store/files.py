"""Files as values, and how they are read: manifests, JSON, logs. Nothing here writes; `disk.py` does.

Readers verify: a plain file, no larger than it may be, of the bytes that its folder's manifest says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import Damaged

MANIFEST = "STABLE"
MANIFEST_FORMAT = 1
JSON_BYTES_MAX = 64 * 2**20
LOG_BYTES_MAX = 2**32
MANIFEST_BYTES_MAX = 2 * 2**20  # ten thousand files
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
        refuse_unplain(path, descriptor)
        if (size := os.fstat(descriptor).st_size) > bytes_max:
            raise Damaged(f"{path} has {size} bytes, at most {bytes_max} are read")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(bytes_max)
    finally:
        os.close(descriptor)


def refuse_unplain(path: Path, descriptor: int) -> None:
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
