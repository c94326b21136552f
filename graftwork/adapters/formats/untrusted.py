"""Open and parse files that someone else made: bounded, plain files only, nothing in them is followed or run."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from graftwork.errors import UnreadableAdapter

QUOTE_CHARACTERS = 80


def quote(value: Any) -> str:
    """A value out of a file, for an error message: escaped, so that it cannot steer a terminal, and cut short."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= QUOTE_CHARACTERS else f"{text[:QUOTE_CHARACTERS]}..."


def listed(names: Iterable[str], at_most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    found = list(names)
    more = f" and {len(found) - at_most} more" if len(found) > at_most else ""
    return ", ".join(found[:at_most]) + more


@contextmanager
def open_plain(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file at `path`, open for reading without a buffer, and its size in bytes.

    Raises UnreadableAdapter for a symbolic link, a folder, a pipe, a device, or a file that may not be read. What was
    checked is what is read: the checks look at the open file, not at its name again.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise UnreadableAdapter(f"{path} is a symbolic link; copy the file itself into the folder") from None
        raise UnreadableAdapter(f"{path} cannot be read: {error.strerror}") from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise UnreadableAdapter(f"{path} is not a plain file; copy the adapter's own file there")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file, facts.st_size


def read_exactly(file: BinaryIO, into: memoryview, where: str) -> None:
    """Fill `into`. Raises UnreadableAdapter, naming `where`, when the file ends or fails before that."""
    done = 0
    while done < len(into):
        try:
            count = file.readinto(into[done:])  # type: ignore[attr-defined]
        except OSError as error:
            raise UnreadableAdapter(f"{where}: reading failed ({error.strerror}); copy the file again") from None
        if not count:
            raise UnreadableAdapter(f"{where}: the file ended {len(into) - done} bytes early; copy it again")
        done += count


def parse_json_object(data: bytes, where: str, max_depth: int) -> dict[str, Any]:
    """A JSON object: UTF-8, no name twice, no NaN, at most `max_depth` deep.

    Raises UnreadableAdapter, naming `where`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1) if len(names) < 10_000 else "a name"
            raise UnreadableAdapter(f"{where}: {quote(twice)} stands there twice, so its value is unclear")
        return found

    def no_constant(name: str) -> NoReturn:
        raise UnreadableAdapter(f"{where}: {name} is not a JSON number")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except RecursionError:
        raise UnreadableAdapter(f"{where}: nested more than {max_depth} deep; no adapter's is") from None
    except ValueError as error:
        raise UnreadableAdapter(f"{where} is not JSON ({str(error)[:QUOTE_CHARACTERS]})") from None
    if not isinstance(value, dict):
        raise UnreadableAdapter(f"{where} holds a JSON {type(value).__name__}, expected an object")
    if _deeper_than(value, max_depth):
        raise UnreadableAdapter(f"{where}: nested more than {max_depth} deep; no adapter's is")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
