"""Open and parse files that someone else made: bounded, plain files only, nothing in them is followed or run."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from graftwork.errors import UnreadableAdapter

QUOTE_CHARACTERS = 80
LISTED_CHARACTERS = 160
VALUES_MAX = 2**16
"""In a JSON object that is parsed whole; empty lists and tables take 60 times their bytes of memory."""
_SPACES = r"[ \t\r\n]*"
OPENING = re.compile(rf'\{{{_SPACES}(?:(?=")|(?P<end>\}}){_SPACES})')
NEXT = re.compile(rf'{_SPACES}(?:,{_SPACES}(?=")|(?P<end>\}}){_SPACES})')
COLON = re.compile(rf"{_SPACES}:{_SPACES}")


def quote(value: Any) -> str:
    """A value out of a file, for an error message: escaped, so that it cannot steer a terminal, and cut short."""
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= QUOTE_CHARACTERS else f"{text[:QUOTE_CHARACTERS]}..."


def listed(names: Iterable[str], at_most: int = 5) -> str:
    """`a, b, c and 4 more`; a name of more than LISTED_CHARACTERS is cut short."""
    found = [name if len(name) <= LISTED_CHARACTERS else f"{name[:LISTED_CHARACTERS]}..." for name in names]
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
    """A JSON object: UTF-8, no name twice, no NaN, at most `max_depth` deep and of VALUES_MAX values.

    Raises UnreadableAdapter, naming `where`.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > VALUES_MAX:
        raise UnreadableAdapter(f"{where} holds more than the {VALUES_MAX} values that are read at most")
    try:
        value = _decoder(where).decode(data.decode("utf-8"))
    except RecursionError:
        raise UnreadableAdapter(f"{where}: nested more than {max_depth} deep; no adapter's is") from None
    except ValueError as error:
        raise UnreadableAdapter(f"{where} is not JSON ({str(error)[:QUOTE_CHARACTERS]})") from None
    if not isinstance(value, dict):
        raise UnreadableAdapter(f"{where} holds a JSON {type(value).__name__}, expected an object")
    if _deeper_than(value, max_depth):
        raise UnreadableAdapter(f"{where}: nested more than {max_depth} deep; no adapter's is")
    return value


def json_members(file: BinaryIO, length: int, where: str, longest: int) -> Iterator[tuple[str, Any]]:
    """Name and value of each member of the JSON object that the file's next `length` bytes are, while they are read:
    however long the object is, a few times `longest` characters are in memory.

    longest: what a member may have. A name that comes twice, and what a value holds, is for the caller to judge.
    Raises UnreadableAdapter, naming `where`.
    """
    scan, decode = _decoder(where).raw_decode, codecs.getincrementaldecoder("utf-8")().decode
    text, at, before = "", 0, 0  # read and not yet dropped; the place in it; characters dropped
    mark_at = OPENING
    try:
        while True:
            while length and len(text) - at < longest:
                raw = bytearray(min(length, longest))
                read_exactly(file, memoryview(raw), where)
                length -= len(raw)
                text, at, before = text[at:] + decode(raw, not length), 0, before + at
            mark = mark_at.match(text, at)
            if mark is None:
                raise ValueError("does not start with {" if mark_at is OPENING else "expected a comma and a name, or }")
            if mark["end"]:
                if length or mark.end() < len(text):
                    raise ValueError("goes on after its end")
                return
            name, end = scan(text, mark.end())
            colon = COLON.match(text, end)
            if colon is None:
                raise ValueError("expected a colon")
            value, end = scan(text, colon.end())
            yield name, value
            mark_at, at = NEXT, end
    except RecursionError:
        raise UnreadableAdapter(f"{where}: nested more than a reader can follow; no adapter's is") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:QUOTE_CHARACTERS]
        long = f", or a piece of it has more than {longest} characters" if length else ""
        raise UnreadableAdapter(f"{where} is not JSON after character {before + at} ({reason}){long}") from None


def _decoder(where: str) -> json.JSONDecoder:
    """One that refuses, naming `where`, what JSON leaves open: names that come twice, and NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1) if len(names) < 10_000 else "a name"
            raise UnreadableAdapter(f"{where}: {quote(twice)} stands there twice, so its value is unclear")
        return found

    def no_constant(name: str) -> NoReturn:
        raise UnreadableAdapter(f"{where}: {name} is not a JSON number")

    return json.JSONDecoder(object_pairs_hook=once, parse_constant=no_constant)


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
