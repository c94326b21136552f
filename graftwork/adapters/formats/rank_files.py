"""Checkpoints of older trainers, `trainer/rank_N.pt`: read and written offline, by the converter alone.

    trainer/rank_0.pt ...   {"model": {name: tensor}, "progress": {...}, and optimizer state that is not carried over}
    weight/                 a PEFT adapter of the same step, where there is one: rank and alpha stand only there
    STABLE                  says that the checkpoint is whole; often an empty file

Names are those of modules, without PEFT's prefix; experts stacked and by number (names.py). A rank holds the whole
tensor, or its piece of axis 0 (plain, or as DTensor). These files are pickles: they are opened with
`weights_only=True`, which makes tensors and plain values, nothing else. The trainer never opens one.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.fit import drop_idle_directions
from graftwork.adapters.formats.expert_layout import piece_of
from graftwork.adapters.formats.peft_config import PeftConfig, read_config
from graftwork.adapters.formats.untrusted import listed, open_plain, quote
from graftwork.adapters.names import TensorName, numbered_name
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

RANK_FILE = re.compile(r"rank_(0|[1-9][0-9]{0,5})\.pt", re.ASCII)
NAME_CHARACTERS_MAX = 512
PICKLE_BYTES_MAX = 16 * 2**20
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
)
"""What torch.load raises for a file that is not what it says."""


def has_rank_files(checkpoint: Path) -> bool:
    return (checkpoint / "trainer" / "rank_0.pt").exists()


def read_rank_files(checkpoint: Path, alpha: float | None) -> InMemory:
    """The adapter in a checkpoint with `trainer/rank_N.pt`, put together from all ranks.

    alpha: what to take where no `weight/adapter_config.json` says it.
    Raises UnreadableAdapter or UnsupportedAdapter, naming file and tensor.
    """
    if not (checkpoint / "STABLE").exists():
        raise UnreadableAdapter(f"{checkpoint} has no STABLE file: it was not written to its end; take an earlier step")
    folder = checkpoint / "trainer"
    for part in (folder, checkpoint / "weight"):
        if part.is_symlink():
            raise UnreadableAdapter(f"{part} is a symbolic link; copy the folder itself there")
    ranks = [_load(path) for path in _files(folder)]
    whole = _assemble(ranks, folder)
    config_path = checkpoint / "weight" / "adapter_config.json"
    config = read_config(config_path) if config_path.exists() else None
    if config is None and alpha is None:
        raise UnsupportedAdapter(
            f"{checkpoint}: nothing in it says the scale (there is no {config_path.name} in weight/); give --alpha: "
            "the scale is then alpha / the rank of the tensors"
        )
    pairs: dict[str, LoraPair] = {}
    for path, (a, b, module) in _pairs(whole, folder).items():
        pairs[path] = _scaled(LoraPair(a, b, 1.0), module, config, alpha, folder)
    notes = (
        *(config.notes if config else ()),
        f"{len(ranks)} rank files were put together",
        "optimizer, scheduler and progress of the older trainer are not carried over: the run starts at step 0",
    )
    return InMemory(Adapter(pairs), AdapterFacts(config.base_model if config else None), notes)


def _scaled(pair: LoraPair, module: str, config: PeftConfig | None, alpha: float | None, folder: Path) -> LoraPair:
    """The pair with its scale. Tensors wider than the run's rank are those of its slot: what is beyond does nothing and
    goes. Raises UnreadableAdapter when it does something: the scale would be a guess."""
    if config is None:
        return replace(pair, scale=float(alpha or 0) / pair.rank)
    if not config.may_have_rank(module, pair.rank):
        named = config.named_rank(module)
        lean = drop_idle_directions(pair, named) if pair.rank > named else None
        if lean is None:
            raise UnreadableAdapter(f"{folder}: {module} has rank {pair.rank}, {config.path} says r = {named}")
        pair = lean
    return replace(pair, scale=config.scale(module, pair.rank))


def _files(folder: Path) -> list[Path]:
    """rank_0.pt to the last, none missing. Raises UnreadableAdapter."""
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name)))
    for expected, rank in enumerate(found):
        if rank != expected:
            raise UnreadableAdapter(f"{folder}: rank_{expected}.pt is missing; every rank's file is needed")
    return [folder / f"rank_{rank}.pt" for rank in found]


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of one rank. Raises UnreadableAdapter, UnsupportedAdapter, naming the tensor."""
    with open_plain(path) as (file, size):
        _check_zip(file, size, path)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UnreadableAdapter(f"{path} cannot be read as tensors and plain values: {quote(first)}") from None
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise UnreadableAdapter(f"{path} holds no table of tensors")
    for name, value in model.items():
        if not isinstance(name, str) or len(name) > NAME_CHARACTERS_MAX or not isinstance(value, Tensor):
            raise UnreadableAdapter(f"{path}: {quote(name)} is no tensor of numbers")
        if (parsed := TensorName.parse(name)) is None or parsed.layout not in ("dense", "stacked"):
            raise UnsupportedAdapter(f"{path}: {quote(name)} is no LoRA factor of a module")
        if not _is_ordinary(value):
            raise UnreadableAdapter(f"{path}: {quote(name)} is no tensor of float32, bfloat16 or float16 matrices")
    return model


def _check_zip(file: BinaryIO, size: int, path: Path) -> None:
    """torch.save makes a zip file whose members are stored as they are: what it unpacks to is no larger than the file.
    Raises UnreadableAdapter."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise UnreadableAdapter(f"{path} is no file of torch.save ({quote(str(error))})") from None
    if (
        any(member.compress_type != zipfile.ZIP_STORED for member in members)
        or sum(m.file_size for m in members) > size
    ):
        raise UnreadableAdapter(
            f"{path} is compressed, or says that it holds more than it does; torch.save makes no such"
        )
    if any(member.filename.endswith("data.pkl") and member.file_size > PICKLE_BYTES_MAX for member in members):
        raise UnreadableAdapter(f"{path}: its table of tensors has more than {PICKLE_BYTES_MAX} bytes")
    file.seek(0)


def _is_ordinary(value: Any) -> bool:
    """A tensor in memory that really holds the numbers that it says; not sparse, nested, expanded or on no device."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return (
        isinstance(local, Tensor)
        and local.layout == torch.strided
        and not local.is_nested
        and local.device.type == "cpu"
        and local.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and local.dim() in (2, 3)
        and not local.is_neg()
        and local.numel() * local.itemsize <= local.untyped_storage().nbytes()
    )


def _assemble(ranks: Sequence[Mapping[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Whole tensors. Plain ones that are the same on every rank are whole already; else they are pieces of axis 0."""
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    for name in names:
        if absent := [number for number, rank in enumerate(ranks) if name not in rank]:
            raise UnreadableAdapter(f"{folder}: {quote(name)} is missing on rank {listed(map(str, absent))}")
    plain = [name for name in names if not isinstance(ranks[0][name], DTensor)]
    replicated = all(torch.equal(rank[name], ranks[0][name]) for name in plain for rank in ranks[1:])
    whole = {}
    for name in names:
        parts = [rank[name] for rank in ranks]
        if isinstance(parts[0], DTensor):
            whole[name] = _joined_distributed(parts, name, folder)
        else:
            whole[name] = parts[0] if replicated else _joined(parts, name, folder)
    return whole


def _joined_distributed(parts: list[Tensor], name: str, folder: Path) -> Tensor:
    """Raises UnreadableAdapter unless the local pieces make up the shape that they say."""
    first = parts[0]
    assert isinstance(first, DTensor)
    local = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    cuts = [placement for placement in first.placements if isinstance(placement, Shard)]
    whole = local[0] if not cuts else torch.cat([part for part in local if part.numel()], dim=cuts[0].dim)
    if whole.shape != first.shape:
        raise UnreadableAdapter(
            f"{folder}: {quote(name)} is cut as {first.placements}, and the ranks' pieces make {list(whole.shape)} of "
            f"{list(first.shape)}; only one axis of ranks is put together: gather the tensors, and save them again"
        )
    return whole


def _joined(parts: list[Tensor], name: str, folder: Path) -> Tensor:
    held = [part for part in parts if part.numel()]
    if not held or len({part.shape[1:] for part in held}) > 1:
        raise UnreadableAdapter(f"{folder}: the pieces of {quote(name)} on the ranks do not fit together")
    return torch.cat(held)


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor, str]]:
    """Module path -> (A, B, its path in the file). Raises UnreadableAdapter, naming the tensor."""
    sides: dict[str, dict[str, Tensor]] = {}
    modules = {}
    for tensor_name, tensor in tensors.items():
        name = TensorName.parse(tensor_name)
        assert name is not None, "checked when it was loaded"
        if not bool(torch.isfinite(tensor).all()):
            raise UnreadableAdapter(
                f"{folder}: {quote(tensor_name)} holds a number that is not finite; take an earlier step"
            )
        if name.side in sides.setdefault(name.path, {}):
            raise UnreadableAdapter(f"{folder}: {quote(tensor_name)} is a second factor {name.side} of {name.path}")
        sides[name.path][name.side] = tensor
        modules[name.path] = name.module
    found = {}
    for path, both in sorted(sides.items()):
        if len(both) < 2:
            raise UnreadableAdapter(f"{folder}: half of the pair of {path} is missing")
        a, b = both["A"], both["B"]
        axes = 2 if TensorName.parse(f"{path}.lora_A.weight").layout == "dense" else 3  # type: ignore[union-attr]
        alike = a.shape[-2] == b.shape[-1] and a.shape[:-2] == b.shape[:-2]
        if a.dim() != axes or b.dim() != axes or not alike or not a.numel() or not b.numel():
            raise UnreadableAdapter(f"{folder}: {path}: A {list(a.shape)} and B {list(b.shape)} do not belong together")
        found[path] = (a, b, modules[path])
    return found


def rank_file(adapter: Adapter, rank: int, ranks: int) -> bytes:
    """`rank_<rank>.pt` of `ranks`: each tensor's piece of axis 0, cut as torch.chunk and FSDP2 cut it."""
    model = {}
    for path, pair in adapter.pairs.items():
        model[numbered_name(path, "A")] = piece_of(pair.a, rank, ranks).clone()
        model[numbered_name(path, "B")] = piece_of(pair.b, rank, ranks).clone()
    content: dict[str, Any] = {"model": model, "progress": {"step": 0, "total_tokens": 0, "total_samples": 0}}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
