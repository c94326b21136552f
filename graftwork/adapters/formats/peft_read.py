"""PEFT adapters, read with suspicion: `adapter_config.json` and `adapter_model.safetensors`.

Modules and ranks come from the safetensors file; the patterns in the configuration (target_modules and its kin) say how
the adapter was once made, and are not run. What is no LoRA factor is refused, unless the user chose to drop it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.formats.peft_config import PeftConfig, ends_of, read_config
from graftwork.adapters.formats.pieces import ONE_BY_ONE, Piece, Places, pieces_of
from graftwork.adapters.formats.tensor_file import TensorFile, open_tensors
from graftwork.adapters.formats.untrusted import listed, quote
from graftwork.adapters.names import PREFIX, TensorName, is_named, module_path
from graftwork.adapters.source import AdapterFacts, InMemory, ModuleFacts
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
FINGERPRINT_KEY = "graftwork_base_fingerprint"
FILLED_KEY = "graftwork_filled"
"""Modules of zeros that the adapter does not have: PEFT and vLLM want all three projections of an expert or none."""
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
COMPARISONS_MAX = 1_000_000
FULL_COPY = (
    "a full copy of another weight, which is no part of a slot; train without it, or drop it (--ignore {module})"
)
REFUSED_TENSORS = (
    ("lora_embedding_", "LoRA on embeddings, which no slot has; train without it, or drop it (--ignore {module})"),
    ("lora_magnitude_vector", "DoRA; merge the adapter into the base and train a plain LoRA on that"),
    (
        ".base_layer.weight",
        "PEFT's copy of {module}, with LoRA that no slot has; train without it, or --ignore {module}",
    ),
    ("base_layer.base_layer.", "an adapter of more than two parameters of one module, which is not supported"),
    (".lora_B.bias", "a trained bias, which no slot has; train with lora_bias = false"),
    (".bias", "a trained bias, which no slot has; train with bias = 'none', or drop it (--ignore {module})"),
)
TOKEN_PARTS = (".token_adapter.", ".trainable_tokens")


@dataclass(frozen=True)
class Choice:
    """What the user chose among what a file holds. ignore: modules or fields to drop. adapter: PEFT's adapter name."""

    ignore: tuple[str, ...] = ()
    adapter: str | None = None


@dataclass(frozen=True)
class PeftFolder:
    """An open adapter folder: a source."""

    file: TensorFile
    config: PeftConfig
    pieces: Mapping[str, Piece]
    facts: AdapterFacts
    notes: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def modules(self) -> Mapping[str, ModuleFacts]:
        return {path: piece.facts for path, piece in self.pieces.items()}

    def load(self, path: str) -> LoraPair:
        piece = self.pieces[path]
        return LoraPair(*piece.load(self.file), piece.facts.scale)


@contextmanager
def open_peft(folder: Path, choice: Choice = Choice()) -> Iterator[PeftFolder]:
    """The adapter in `folder`. Everything but the numbers is checked before the block begins; no tensor is read.

    Raises UnreadableAdapter when the files are not what they claim to be, UnsupportedAdapter when they are whole but
    the function is not a plain LoRA's; both name the file, and the field or the tensor, and say what to do.
    """
    config = read_config(_present(folder, CONFIG_NAME), choice.ignore)
    with open_tensors(_present(folder, TENSORS_NAME)) as file:
        places, dropped = _sorted_out(file, choice, config)
        _refuse_needless(choice.ignore, {*dropped, *config.ignored, *config.ignored_modules}, file.path)
        pieces = _without_filling(file, pieces_of(file, places, config))
        notes = (*config.notes, *_unnamed(places, config), *_fused_otherwise(pieces, config))
        changes = tuple(f"{name} was dropped, as asked" for name in (*config.ignored, *dropped))
        yield PeftFolder(file, config, pieces, AdapterFacts(config.base_model, _fingerprint(file)), notes, changes)


def read_peft(folder: Path, choice: Choice = Choice()) -> InMemory:
    """The whole adapter in `folder`, its tensors in the dtype of the file (float32, bfloat16 or float16), on the CPU.

    Raises as `open_peft` does, and UnreadableAdapter for a number that is not finite.
    """
    with open_peft(folder, choice) as source:
        pairs = {path: source.load(path) for path in sorted(source.pieces)}
        return InMemory(Adapter(pairs), source.facts, source.notes, source.dropped)


def _fingerprint(file: TensorFile) -> str | None:
    """That of the base, where Graftwork wrote the file. Raises UnreadableAdapter when it is no fingerprint."""
    recorded = file.metadata.get(FINGERPRINT_KEY)
    if recorded is not None and not FINGERPRINT.fullmatch(recorded):
        raise UnreadableAdapter(f"{file.path}: {FINGERPRINT_KEY} is {quote(recorded)}, expected 64 hexadecimal digits")
    return recorded


def _without_filling(file: TensorFile, pieces: dict[str, Piece]) -> dict[str, Piece]:
    """Raises UnreadableAdapter when a module that is said to be of zeros is not there, or not of zeros."""
    filled = set(file.metadata.get(FILLED_KEY, "").split())
    for path in sorted(filled):
        if path not in pieces or any(factor.count_nonzero() for factor in pieces[path].load(file)):
            raise UnreadableAdapter(f"{file.path}: {FILLED_KEY} names {quote(path)}, which is no module of zeros")
    if len(filled) == len(pieces):
        raise UnreadableAdapter(f"{file.path}: {FILLED_KEY} names every module; there is no adapter in the file")
    return {path: piece for path, piece in pieces.items() if path not in filled}


def _unnamed(places: Places, config: PeftConfig) -> list[str]:
    """A note on keys of alpha_pattern that name no module. Raises UnsupportedAdapter when one would if its dots stood
    for any character, as they do in PEFT."""
    modules = {factor["A"][1] for factors in places.values() for factor in factors.values() if "A" in factor}
    names = {f"{module}{end}" for module in modules for end in ("", ".weight", ".gate_up_proj", ".down_proj")}
    ends = {end for name in names for end in ends_of(name)}
    unnamed = [key for key in config.alphas.literal if key not in ends]
    dotted = [key for key in unnamed if "." in key]
    if len(dotted) * len(ends) > COMPARISONS_MAX:
        raise UnsupportedAdapter(
            f"{config.path}: alpha_pattern has {len(dotted)} keys that name no module; remove them"
        )
    for key in dotted:
        loose = re.compile(re.escape(key).replace(r"\.", "."))
        if hit := next((end for end in ends if len(end) == len(key) and loose.fullmatch(end)), None):
            raise UnsupportedAdapter(
                f"{config.path}: alpha_pattern has the key {quote(key)}, which PEFT takes for {quote(hit)}, as a dot "
                "stands for any character there; write the module's name"
            )
    return [f"alpha_pattern names {listed(map(quote, unnamed))}, which the adapter does not have"] if unnamed else []


def _fused_otherwise(pieces: Mapping[str, Piece], config: PeftConfig) -> list[str]:
    """A note where PEFT 0.21 on transformers 5 makes another function of the same file: it fuses single experts by r
    and lora_alpha alone."""
    single = any(piece.facts.layout == ONE_BY_ONE for piece in pieces.values())
    if not single or not (config.rslora or config.ranks.literal or config.alphas.literal):
        return []
    return [
        "single experts with rsLoRA or patterns: each has the scale that it was trained with; PEFT 0.21, which "
        "fuses them on loading, gives some another"
    ]


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


def _sorted_out(file: TensorFile, choice: Choice, config: PeftConfig) -> tuple[Places, list[str]]:
    """Every tensor in its place, and the modules that were dropped as asked. Raises for a tensor that has no place."""
    if not file.entries:
        raise UnreadableAdapter(f"{file.path} holds no tensor; was the adapter saved before it was attached?")
    wishes = (*choice.ignore, *config.ignored_modules)
    dropped: dict[str, None] = {}
    names: dict[str, TensorName] = {}
    for tensor in file.entries:
        name = TensorName.parse(tensor)
        module = name.module if name is not None else module_of(tensor)
        if wanted := next((wish for wish in wishes if is_named(module, wish)), None):
            dropped[wanted] = None
        elif name is not None:
            names[tensor] = name
        elif not (tensor.endswith(".lora_B.bias") and not file.load(tensor).count_nonzero()):  # zeros do nothing
            raise _refused_tensor(tensor, module, file.path)
    chosen = _of_one_adapter(names, choice.adapter, file.path)
    places: Places = {}
    for tensor, name in chosen.items():
        place = places.setdefault((name.path, name.layout), {}).setdefault(name.expert, {})
        if name.side in place:
            other = place[name.side][0]
            raise UnreadableAdapter(
                f"{file.path}: {quote(other)} and {quote(tensor)} are the same factor of one module"
            )
        place[name.side] = (tensor, name.module)
    return places, list(dropped)


def module_of(tensor: str) -> str:
    """The module that a tensor which is no LoRA factor belongs to, as well as its name tells."""
    path = module_path(tensor)
    for part in (*TOKEN_PARTS, ".lora_", ".base_layer"):
        path = path.partition(part)[0]
    return path.removesuffix(".weight").removesuffix(".bias").removesuffix(".modules_to_save")


def _refuse_needless(ignore: Collection[str], had: Collection[str], path: Path) -> None:
    """A name to ignore that nothing has is a slip of the pen. Raises UnsupportedAdapter."""
    if absent := sorted(set(ignore) - set(had)):
        raise UnsupportedAdapter(f"{path} has nothing called {listed(map(quote, absent))} to ignore; check the name")


def _of_one_adapter(names: Mapping[str, TensorName], wanted: str | None, path: Path) -> Mapping[str, TensorName]:
    """The tensors of the adapter that was chosen, or of the only one. Raises UnsupportedAdapter."""
    found = {name.adapter for name in names.values()}
    if wanted is None and len(found) <= 1:
        return names
    if wanted in found and wanted is not None:
        return {tensor: name for tensor, name in names.items() if name.adapter == wanted}
    there = listed(sorted(quote(name) if name else "(no name)" for name in found))
    if wanted is not None:
        raise UnsupportedAdapter(f"{path} holds no adapter called {quote(wanted)}; it holds {there}")
    raise UnsupportedAdapter(f"{path} holds several adapters: {there}; choose one (--adapter NAME)")


def _refused_tensor(tensor: str, module: str, path: Path) -> UnsupportedAdapter:
    """The error for a tensor that is no factor of a linear layer's LoRA."""
    ending = module.rpartition(".")[2]
    for part, reason in REFUSED_TENSORS:
        if part in tensor:
            return UnsupportedAdapter(f"{path}: tensor {tensor}: {reason.format(module=ending)}")
    reason = FULL_COPY.format(module=ending) if tensor.endswith((".weight", "_delta")) else "no part of a LoRA"
    return UnsupportedAdapter(
        f"{path}: tensor {tensor} is no LoRA factor ({PREFIX}<module>.lora_A.weight or lora_B): {reason}"
    )
