"""The base's weights in its safetensors files: which tensor of the files fills which of the model's, and reading them.

`assign` decides from names and shapes alone, and refuses what it does not understand, so that nothing is left as it
was by chance. `Reader` then reads of each tensor the part that this rank holds, and no more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from graftwork.adapters.names import EXPERTS, FUSED
from graftwork.errors import ModelError
from graftwork.parallel.parts import fill, local, own_part

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
EXPERT_NAME = re.compile(rf"(.*\.{EXPERTS})\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
ADVICE = 'base_placement = "replicated" loads the base as transformers does'


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: safetensors' name of it, as "BF16"."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """What fills a tensor of the model.

    names   one tensor of the files, or those that must all be the same as it
    experts instead, for a tensor [E, rows, columns]: the tensors of each expert, one above the other
    """

    names: tuple[str, ...] = ()
    experts: tuple[tuple[str, ...], ...] = ()


# --- where they are ---------------------------------------------------------------------------------------------------


def find_files(path: str) -> list[Path]:
    """The safetensors files of a folder or a hub id. Raises ModelError."""
    if (single := _find(path, SINGLE)) is not None:
        return [single]
    if (index := _find(path, INDEX)) is None:
        raise ModelError(f"{path}: expected {SINGLE} or {INDEX}, found neither; {ADVICE}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: expected a table weight_map from tensors to files") from None
    files = [(name, _find(path, name)) for name in names]
    if missing := [name for name, file in files if file is None]:
        raise ModelError(f"{index} names {missing[0]}, which is not there")
    return [file for _, file in files if file is not None]


def _find(path: str, name: str) -> Path | None:
    if Path(path).is_dir():
        return file if (file := Path(path) / name).is_file() else None
    try:
        found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ModelError(f"cannot fetch {name} of the base model {path!r}: {str(error).splitlines()[0]}") from None
    return None if found is None else Path(found)


def stored_tensors(files: Iterable[Path]) -> dict[str, Stored]:
    """By name, from the files' headers. Raises ModelError."""
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a dict)
                    if name in found:
                        raise ModelError(f"{file}: {name} is in {found[name].file.name} too")
                    entry = opened.get_slice(name)
                    found[name] = Stored(file, tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: {error}") from None
    return found


# --- which fills which ------------------------------------------------------------------------------------------------


def assign(
    wanted: Mapping[str, Sequence[int]], aliases: Mapping[str, Sequence[str]], stored: Mapping[str, Stored],
    ignored: Iterable[str] = (),
) -> dict[str, Source]:  # fmt: skip
    """A source for every tensor of `wanted` (name -> shape), with every stored tensor in use.

    aliases  further names of the same tensor, where weights are tied; the files may have any of them
    ignored  patterns of stored names that transformers knows to be of no use
    Raises ModelError, naming the tensor that is missing, of another shape or kind, or not of this model.
    """
    experts = _expert_names(stored)
    sources: dict[str, Source] = {}
    missing = []
    for name, shape in wanted.items():
        if names := tuple(each for each in (name, *aliases.get(name, ())) if each in stored):
            sources[name] = Source(names)
            for each in names:
                _check(stored, each, tuple(shape))
        elif (stacked := _expert_source(name, tuple(shape), experts, stored)) is not None:
            sources[name] = stacked
        else:
            missing.append(f"{name} {list(shape)} is missing")
    used = {name for source in sources.values() for name in (*source.names, *chain.from_iterable(source.experts))}
    dropped = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    extra = [f"{name} is no tensor of this model" for name in stored if name not in used and not dropped.search(name)]
    if missing or extra:
        counted = [f"{texts[0]} (the first of {len(texts)})" for texts in (missing, extra) if texts]
        advice = f"; {ADVICE}" if extra else ""  # not of what is missing alone: transformers makes it up
        raise ModelError(f"{_place(stored)}: {' and '.join(counted)}{advice}")
    return sources


def _expert_names(stored: Iterable[str]) -> dict[tuple[str, str], set[int]]:
    """(path of the experts, projection) -> the experts of which there is a tensor."""
    found: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(EXPERT_NAME.fullmatch, stored)):
        found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return found


def _expert_source(
    name: str, shape: tuple[int, ...], experts: Mapping[tuple[str, str], set[int]], stored: Mapping[str, Stored]
) -> Source | None:
    """Of stacked experts that the files have one by one: gate above up, as transformers stacks them."""
    path, _, leaf = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if leaf == FUSED else (leaf,)
    if len(shape) != 3 or not any((path, part) in experts for part in parts):
        return None
    count, rows, columns = shape
    names = tuple(tuple(f"{path}.{expert}.{part}.weight" for part in parts) for expert in range(count))
    for each in chain.from_iterable(names):
        if each not in stored:
            raise ModelError(f"{_place(stored)}: {each} is missing, a part of {name} {list(shape)}")
        _check(stored, each, (rows // len(parts), columns))
    return Source(experts=names)


def _check(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> None:
    found = stored[name]
    if found.shape != shape:
        raise ModelError(f"{found.file}: {name} has shape {list(found.shape)}, expected {list(shape)}")
    if found.dtype not in FLOATS:
        raise ModelError(f"{found.file}: {name} is {found.dtype}, expected one of {', '.join(FLOATS)}; {ADVICE}")


def _place(stored: Mapping[str, Stored]) -> str:
    files = {each.file for each in stored.values()}
    return str(files.pop()) if len(files) == 1 else f"{len(files)} files of the base"


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """Files that are open for as long as the `with` lasts. They are mapped into memory: what is not asked for is not
    read, and what was read is the page cache's."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self._stack, self._files = ExitStack(), dict[Path, Any]()

    def __enter__(self) -> Reader:
        for file in sorted({each.file for each in self.stored.values()}):
            self._files[file] = self._stack.enter_context(safe_open(file, "pt"))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def slices(self, name: str) -> Any:
        """A parts.Sliceable of the whole tensor."""
        return self._files[self.stored[name].file].get_slice(name)

    @torch.no_grad()
    def fill(self, target: Tensor, source: Source) -> str | None:
        """Write this rank's part, in target's dtype. Returns the name of a tensor that should be the same as the first
        of `source.names` and, in this part, is not."""
        if source.experts:
            own, where = local(target), own_part(target)[0]
            for place, names in enumerate(source.experts[where]):
                for piece, name in zip(own[place].chunk(len(names)), names, strict=True):
                    piece.copy_(self.slices(name)[:])
            return None
        first, *others = source.names
        fill(target, self.slices(first))
        where_all = own_part(target)
        if not others or any(part.stop == part.start for part in where_all):
            return None
        mine = self.slices(first)[where_all]
        return next((name for name in others if not torch.equal(mine, self.slices(name)[where_all])), None)
