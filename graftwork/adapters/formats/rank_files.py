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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.formats.expert_layout import piece_of
from graftwork.adapters.formats.peft_config import read_config
from graftwork.adapters.formats.untrusted import listed, open_plain, quote
from graftwork.adapters.names import TensorName, numbered_name
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

RANK_FILE = re.compile(r"rank_(0|[1-9][0-9]{0,5})\.pt", re.ASCII)
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
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
        scale = (
            config.scale(module, config.named_rank(module)) if config is not None else float(alpha or 0) / a.shape[-2]
        )
        pairs[path] = LoraPair(a, b, scale)
    notes = (
        f"{len(ranks)} rank files were put together",
        "optimizer, scheduler and progress of the older trainer are not carried over: the run starts at step 0",
    )
    return InMemory(Adapter(pairs), AdapterFacts(config.base_model if config else None), notes)


def _files(folder: Path) -> list[Path]:
    """rank_0.pt to the last, none missing. Raises UnreadableAdapter."""
    found = sorted(int(match[1]) for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name)))
    if absent := sorted(set(range(found[-1] + 1 if found else 1)) - set(found)):
        raise UnreadableAdapter(
            f"{folder}: {listed(f'rank_{rank}.pt' for rank in absent)} is missing; every rank's file is needed"
        )
    return [folder / f"rank_{rank}.pt" for rank in found]


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of one rank. Raises UnreadableAdapter, UnsupportedAdapter, naming the tensor."""
    with open_plain(path) as (file, _):
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise UnreadableAdapter(f"{path} cannot be read as tensors and plain values: {quote(first)}") from None
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise UnreadableAdapter(f"{path} holds no table of tensors")
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise UnreadableAdapter(f"{path}: {quote(name)} is no tensor of numbers")
        if (parsed := TensorName.parse(name)) is None or parsed.layout not in ("dense", "stacked"):
            raise UnsupportedAdapter(f"{path}: {quote(name)} is no LoRA factor of a module")
    return model


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
        sides.setdefault(name.path, {})[name.side] = tensor
        modules[name.path] = name.module
    found = {}
    for path, both in sorted(sides.items()):
        if len(both) < 2:
            raise UnreadableAdapter(f"{folder}: half of the pair of {path} is missing")
        a, b = both["A"], both["B"]
        axes = 2 if TensorName.parse(f"{path}.lora_A.weight").layout == "dense" else 3  # type: ignore[union-attr]
        if a.dim() != axes or b.dim() != axes or a.shape[-2] != b.shape[-1] or a.shape[:-2] != b.shape[:-2]:
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
