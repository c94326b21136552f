"""PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`, read with suspicion, written for PEFT and vLLM.

Module paths and tensors come from the safetensors file alone. The patterns in the configuration (target_modules and
its kin) say how the adapter was once made; they are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.canonical import Adapter, LoraPair, alpha_for
from graftwork.adapters.formats.peft_config import PeftConfig, read_config
from graftwork.adapters.formats.tensor_file import TensorFile, open_tensors, tensors_to_bytes
from graftwork.adapters.formats.untrusted import listed, quote
from graftwork.errors import MisfitAdapter, UnreadableAdapter, UnsupportedAdapter
from graftwork.store.disk import dump_json

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT_KEY = "graftwork_base_fingerprint"
WRITTEN_FOR_PEFT = "0.21.0"
TENSOR_NAME = re.compile(
    r"base_model\.model\.(?P<path>[\w-]+(?:\.[\w-]+)*?)\.lora_(?P<side>[AB])(?:\.(?P<name>[\w-]+))?\.weight", re.ASCII
)
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
REFUSED_TENSORS = (
    ("lora_embedding_", "LoRA on embeddings, which no slot has; train the adapter without it"),
    ("lora_magnitude_vector", "DoRA; merge the adapter into the base and train a plain LoRA on that"),
    ("base_layer.", "an adapter of fused expert weights, not yet supported"),
    (".bias", "a trained bias, which no slot has; train with bias = 'none'"),
)
COMPANIONS = ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class PeftFacts:
    """What is known of an adapter beside its tensors. base_model: what adapter_config.json calls the base.
    base_fingerprint: that of the base, when Graftwork wrote the adapter (in the header of the safetensors file)."""

    base_model: str | None = None
    base_fingerprint: str | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """`notes`: what a person should know of the import; none of it changes the function."""

    adapter: Adapter
    facts: PeftFacts
    notes: tuple[str, ...]


def read_peft(folder: Path) -> PeftAdapter:
    """The adapter in `folder`, its tensors in the dtype of the file (float32, bfloat16 or float16), on the CPU.

    Raises UnreadableAdapter when the files are not what they claim to be, UnsupportedAdapter when they are whole but
    the function is not a plain LoRA's; both name the file, and the field or the tensor, and say what to do.
    """
    config = read_config(_present(folder, CONFIG_NAME))
    with open_tensors(_present(folder, TENSORS_NAME)) as file:
        sides = _sides(file)
        for path, names in sides.items():
            _check_pair(file, path, names, config)
        pairs = {
            path: LoraPair(file.load(names["A"]), file.load(names["B"]), config.scale) for path, names in sides.items()
        }
        facts = PeftFacts(config.base_model, _fingerprint(file))
    beside = [name for name in COMPANIONS if (folder / name).exists()]
    notes = [f"{listed(beside)} beside the adapter: not compared with the base's, not carried along"] if beside else []
    return PeftAdapter(Adapter(pairs), facts, (*config.notes, *notes))


def _fingerprint(file: TensorFile) -> str | None:
    """That of the base, where Graftwork wrote the file. Raises UnreadableAdapter when it is no fingerprint."""
    recorded = file.metadata.get(FINGERPRINT_KEY)
    if recorded is not None and not FINGERPRINT.fullmatch(recorded):
        raise UnreadableAdapter(f"{file.path}: {FINGERPRINT_KEY} is {quote(recorded)}, expected 64 hexadecimal digits")
    return recorded


def _present(folder: Path, name: str) -> Path:
    """The path of one of the two files. Raises UnreadableAdapter, saying what is there instead."""
    path = folder / name
    if path.exists() or path.is_symlink():
        return path
    if not folder.is_dir():
        raise UnreadableAdapter(f"no folder at {folder}; an adapter is a folder with {CONFIG_NAME} and {TENSORS_NAME}")
    if name == TENSORS_NAME and (folder / "adapter_model.bin").exists():
        raise UnsupportedAdapter(
            f"{folder} has adapter_model.bin, a pickle, which is never opened; "
            "load it with PEFT and save it again (safe_serialization=True)"
        )
    raise UnreadableAdapter(f"{path} is missing; a PEFT adapter has {CONFIG_NAME} and {TENSORS_NAME}")


def _sides(file: TensorFile) -> dict[str, dict[str, str]]:
    """Module path -> {"A": tensor name, "B": tensor name}, by path. Raises unless every tensor has its place."""
    sides: dict[str, dict[str, str]] = {}
    adapter_names: set[str | None] = set()
    for tensor in file.entries:
        match = TENSOR_NAME.fullmatch(tensor)
        if match is None or "base_layer" in match["path"].split("."):
            raise _refused_tensor(tensor, file.path)
        adapter_names.add(match["name"])
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    if not sides:
        raise UnreadableAdapter(f"{file.path} holds no tensor; was the adapter saved before it was attached?")
    if len(adapter_names) > 1:
        found = listed(sorted(quote(name or "(no name)") for name in adapter_names))
        raise UnsupportedAdapter(f"{file.path} holds several adapters: {found}; save the one that is meant by itself")
    if halves := sorted(path for path, names in sides.items() if len(names) < 2):
        missing = [f"{path}.lora_{'B' if 'A' in sides[path] else 'A'}" for path in halves]
        raise UnreadableAdapter(f"{file.path}: half of a pair is missing: {listed(missing)}; copy or save it again")
    return {path: sides[path] for path in sorted(sides)}


def _refused_tensor(tensor: str, path: Path) -> UnsupportedAdapter:
    """The error for a tensor that is no factor of a linear layer's LoRA."""
    for part, reason in REFUSED_TENSORS:
        if part in tensor:
            return UnsupportedAdapter(f"{path}: tensor {tensor}: {reason}")
    return UnsupportedAdapter(
        f"{path}: tensor {tensor} is no LoRA factor ({PREFIX}<module>.lora_A.weight or lora_B); "
        "full copies of other weights are not part of a slot: save the adapter without it"
    )


def _check_pair(file: TensorFile, path: str, names: dict[str, str], config: PeftConfig) -> None:
    """A is [r, in], B is [out, r], and r is what the configuration says. Raises, naming the tensor."""
    for side, axis in (("A", 0), ("B", 1)):
        name, shape = names[side], list(file.entries[names[side]].shape)
        if len(shape) != 2:
            raise UnsupportedAdapter(f"{file.path}: tensor {name} has shape {shape}; only matrices are read")
        if 0 in shape:
            raise UnreadableAdapter(f"{file.path}: tensor {name} has shape {shape}: it is empty")
        if shape[axis] != config.rank:
            raise UnreadableAdapter(
                f"{file.path}: tensor {name} has shape {shape}, so rank {shape[axis]}; {CONFIG_NAME} says r = "
                f"{config.rank}. The two files do not belong together"
            )


def write_peft(adapter: Adapter, facts: PeftFacts) -> dict[str, bytes]:
    """File name -> bytes: a folder that PEFT 0.21 and vLLM load, and `read_peft` reads back with the same digest.

    Equal adapters and facts give equal bytes. target_modules lists whole module paths: a leaf such as q_proj would
    match modules that the adapter does not have. Raises MisfitAdapter when the pairs differ in rank or scale.
    """
    rank = _common("rank", {path: pair.rank for path, pair in adapter.pairs.items()})
    scale = _common("scale", {path: pair.scale for path, pair in adapter.pairs.items()})
    tensors = {}
    for path, pair in adapter.pairs.items():
        assert pair.a.dim() == 2 and pair.b.dim() == 2 and pair.b.shape[1] == rank, f"{path}: factors do not match"
        tensors[f"{PREFIX}{path}.lora_A.weight"] = pair.a
        tensors[f"{PREFIX}{path}.lora_B.weight"] = pair.b
    metadata = {"format": "pt"}
    if facts.base_fingerprint is not None:
        metadata[FINGERPRINT_KEY] = facts.base_fingerprint
    config = _config(int(rank), scale, adapter.pairs, facts)
    return {CONFIG_NAME: dump_json(config), TENSORS_NAME: tensors_to_bytes(tensors, metadata)}


def _common(what: str, values: dict[str, Any]) -> float:
    """The one value of all modules. Raises MisfitAdapter, naming two modules that differ."""
    if not values:
        raise MisfitAdapter("an adapter without modules cannot be written")
    first = next(iter(values))
    for path, value in values.items():
        if value != values[first]:
            raise MisfitAdapter(
                f"modules of different {what} cannot be written yet: {first} has {values[first]}, {path} has {value}"
            )
    return float(values[first])


def _config(rank: int, scale: float, paths: Iterable[str], facts: PeftFacts) -> dict[str, Any]:
    """adapter_config.json. The number lora_alpha gives back exactly `scale`, with rsLoRA's divisor if it must."""
    rslora, alpha = False, alpha_for(scale, rank)
    if alpha is None:
        rslora, alpha = True, alpha_for(scale, math.sqrt(rank))
    assert alpha is not None, f"no lora_alpha gives the scale {scale!r} at rank {rank}"
    return {
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": WRITTEN_FOR_PEFT,
        "r": rank,
        "target_modules": sorted(paths),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }
