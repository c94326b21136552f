"""safetensors files: a reader that trusts nothing in them, and a writer whose bytes depend on the tensors alone.

8 bytes     length n of the header, little-endian
n bytes     JSON: name -> {dtype, shape, data_offsets}; `__metadata__`: text -> text
the rest    the tensors' bytes, one after the other, without gaps
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from graftwork.adapters.canonical import tensor_bytes
from graftwork.adapters.formats.untrusted import json_members, open_plain, quote, read_exactly
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter
from graftwork.store.files import Pieces

HEADER_BYTES_MAX = 16 * 2**20
MEMBER_CHARACTERS_MAX = 2**18
"""Of one tensor's entry, or of the metadata."""
TENSORS_MAX = 100_000
NAME_CHARACTERS_MAX = 512
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_DTYPES = frozenset(
    {"F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "C64"}
    | {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
)
METADATA = "__metadata__"
ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

Sizes = tuple[int, ...]
"""A tensor's shape."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the header, checked: `start` counts bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: Sizes
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """An open safetensors file whose header agrees with itself and with the file's length."""

    path: Path
    file: BinaryIO
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def load(self, name: str) -> Tensor:
        """One tensor, in the file's dtype, in memory of its own (never mapped: a file cut short meanwhile is an error,
        not a SIGBUS). Raises UnreadableAdapter, naming the tensor, and the index of the first number not finite."""
        entry = self.entries[name]
        try:
            raw = torch.empty(entry.bytes, dtype=torch.uint8)
        except RuntimeError:
            raise UnreadableAdapter(f"{self.path}: no memory for tensor {name} ({entry.bytes} bytes)") from None
        self.file.seek(entry.start)
        read_exactly(self.file, raw.numpy().data, f"{self.path}: tensor {name}")
        tensor = raw.view(entry.dtype).view(entry.shape)
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            index = torch.nonzero(~finite)[0].tolist()
            value = float(tensor[tuple(index)])
            raise UnreadableAdapter(
                f"{self.path}: tensor {name}{index} is {value}; a diverged training run writes such numbers: "
                "take an earlier checkpoint of it"
            )
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Raises UnreadableAdapter or UnsupportedAdapter, naming file and tensor, before a byte of a tensor is read."""
    with open_plain(path) as (file, size):
        if size < 8:
            raise UnreadableAdapter(f"{path}: {size} bytes are too few for a safetensors file; copy it again")
        head = bytearray(8)
        read_exactly(file, memoryview(head), str(path))
        (length,) = struct.unpack("<Q", head)
        if length > min(HEADER_BYTES_MAX, size - 8):
            raise UnreadableAdapter(
                f"{path}: says its header has {length} bytes; the file has {size}, and {HEADER_BYTES_MAX} are the most "
                "that is read. It is cut short or not safetensors"
            )
        entries, metadata = _read_header(file, length, path)
        _check_layout(entries, 8 + length, size, path)
        yield TensorFile(path, file, entries, metadata)


def _read_header(file: BinaryIO, length: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata, each checked while the next is not yet read."""
    where = f"{path}: header"
    entries: dict[str, Entry] = {}
    shapes: dict[Sizes, Sizes] = {}
    metadata: dict[str, str] | None = None
    for name, about in json_members(file, length, where, MEMBER_CHARACTERS_MAX):
        if name in entries or (name == METADATA and metadata is not None):
            raise UnreadableAdapter(f"{where}: {quote(name)} stands there twice, so its value is unclear")
        if name == METADATA:
            metadata = _metadata(about, path)
            continue
        if len(entries) == TENSORS_MAX:
            raise UnreadableAdapter(f"{where} lists more than the {TENSORS_MAX} tensors that are read at most")
        entries[name] = _entry(name, about, 8 + length, shapes, path)
    return entries, metadata or {}


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UnreadableAdapter(f"{path}: {METADATA} in the header is not a table of texts")
    return value


def _entry(name: str, about: Any, data_start: int, shapes: dict[Sizes, Sizes], path: Path) -> Entry:
    """One line of the header. Raises UnreadableAdapter or UnsupportedAdapter, naming the tensor.

    shapes: those of the entries before; of equal ones, one is kept.
    """

    def where() -> str:
        return f"{path}: tensor {quote(name)}"

    if not name.isascii() or not name.isprintable() or not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise UnreadableAdapter(f"{where()}: not a name that a module can have")
    if not isinstance(about, dict) or about.keys() != ENTRY_FIELDS:
        raise UnreadableAdapter(f"{where()}: the header must give dtype, shape and data_offsets, and nothing else")
    shape, offsets, dtype = about["shape"], about["data_offsets"], about["dtype"]
    if not _naturals(shape) or len(shape) > 8:
        raise UnreadableAdapter(f"{where()}: its shape is not a list of whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise UnreadableAdapter(f"{where()}: its data_offsets are not two whole numbers")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in OTHER_DTYPES:
            raise UnsupportedAdapter(f"{where()} has dtype {dtype}; save the adapter as F32, BF16 or F16")
        raise UnreadableAdapter(f"{where()}: unknown dtype {quote(dtype)}; expected F32, BF16 or F16")
    sizes = tuple(shape)
    entry = Entry(DTYPES[dtype], shapes.setdefault(sizes, sizes), data_start + offsets[0])
    if (held := offsets[1] - offsets[0]) != entry.bytes:
        raise UnreadableAdapter(f"{where()}: {dtype}{shape} needs {entry.bytes} bytes, its data_offsets hold {held}")
    return entry


def _naturals(value: Any) -> bool:
    """Whether it is a list of whole numbers that a file can address."""
    return isinstance(value, list) and not [n for n in value if type(n) is not int or not 0 <= n < 2**63]


def _check_layout(entries: Mapping[str, Entry], data_start: int, size: int, path: Path) -> None:
    """The tensors follow one another from the header to the end of the file: no gap, no overlap, nothing beyond."""
    end = data_start
    for name in sorted(sorted(entries, key=lambda name: entries[name].bytes), key=lambda name: entries[name].start):
        entry = entries[name]
        if entry.start != end:
            kind = "overlaps the one before it" if entry.start < end else "leaves a gap before it"
            raise UnreadableAdapter(f"{path}: tensor {name} {kind} (begins at byte {entry.start}, expected {end})")
        end += entry.bytes
        if end > size:
            raise UnreadableAdapter(f"{path}: tensor {name} ends at byte {end}, the file at {size}; copy it again")
    if end != size:
        raise UnreadableAdapter(f"{path}: {size - end} bytes follow the last tensor; copy the file again")


def tensor_chunks(tensors: Mapping[str, Callable[[], Tensor]], metadata: Mapping[str, str]) -> Pieces:
    """A safetensors file: larger dtypes first (so that each tensor is aligned), then by name.

    tensors: what makes each tensor; called once for its dtype and shape, and once when it is written, so that a tensor
    that is made for the file alone is in memory alone.
    """
    kinds = {name: _kind(make()) for name, make in tensors.items()}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        dtype, shape = kinds[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return _chunks(struct.pack("<Q", len(head)) + head, tensors, order)


def _kind(tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, list(tensor.shape)


def _chunks(head: bytes, tensors: Mapping[str, Callable[[], Tensor]], order: Iterable[str]) -> Pieces:
    yield head
    for name in order:
        yield tensor_bytes(tensors[name]())
