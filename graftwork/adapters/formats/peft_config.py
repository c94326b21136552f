"""PEFT's `adapter_config.json`: what each field means for the function that the adapter computes.

`FIELDS` has every field of LoraConfig in peft 0.21, each with its rule. A field that is not there is refused when it is
set to anything: what it does to the function is not known. Nothing in the file is followed, imported, downloaded
or run as a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.canonical import ALPHA_RANGE
from graftwork.adapters.formats.untrusted import open_plain, parse_json_object, quote, read_exactly
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

CONFIG_BYTES_MAX = 2**20
CONFIG_DEPTH_MAX = 16
RANK_MAX = 65536
PLAIN_INITS = frozenset({"gaussian", "eva", "mica", "orthogonal"})

Rule = Callable[[Any], str | None]
"""The reason why a value is refused; None when it leaves the function alone."""


@dataclass(frozen=True)
class PeftConfig:
    """What a reader needs of it. scale: what multiplies B A x, as PEFT computes it."""

    rank: int
    scale: float
    base_model: str | None
    notes: tuple[str, ...]


def _ignored(value: Any) -> str | None:
    return None


def _unset(reason: str) -> Rule:
    """Refused when set to anything but null, false, 0, "" or an empty collection."""
    return lambda value: reason if value not in (None, False, "", [], {}) else None


def _only(*allowed: Any, reason: str) -> Rule:
    return lambda value: reason if value not in allowed else None


def _plain_init(value: Any) -> str | None:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in PLAIN_INITS):
        return None
    return (
        "this initialisation may change the base itself; save it as plain LoRA "
        "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
    )


FORWARD = "it computes another forward pass than plain LoRA; merge it into the base and train a plain LoRA on that"
FULL_COPIES = "full copies of other weights are not part of a slot; train the adapter without it"
NOT_YET = "not yet supported; give every module the same rank and alpha, or merge the adapter into the base"

FIELDS: Mapping[str, Rule] = {
    # Read by value below.
    "r": _ignored,
    "lora_alpha": _ignored,
    "use_rslora": _ignored,
    "base_model_name_or_path": _ignored,
    "lora_dropout": _ignored,
    # No effect on the function of a saved adapter: the tensors say which modules, and the rest is about training.
    "auto_mapping": _ignored,
    "exclude_modules": _ignored,
    "inference_mode": _ignored,
    "layers_pattern": _ignored,
    "layers_to_transform": _ignored,
    "megatron_config": _ignored,
    "megatron_core": _ignored,
    "peft_version": _ignored,
    "qalora_group_size": _ignored,
    "revision": _ignored,
    "runtime_config": _ignored,
    "target_modules": _ignored,
    "task_type": _ignored,
    "velora_config": _ignored,
    # Settings of initialisations; the initialisation itself is judged by init_lora_weights.
    "corda_config": _ignored,
    "eva_config": _ignored,
    "loftq_config": _ignored,
    "lora_ga_config": _ignored,
    # Refused unless they are off.
    "peft_type": _only("LORA", reason="only LORA adapters can be imported"),
    "alora_invocation_tokens": _unset(FORWARD),
    "arrow_config": _unset(FORWARD),
    "bias": _only("none", None, reason="trained biases are not part of a slot; train with bias = 'none'"),
    "ensure_weight_tying": _unset(FULL_COPIES),
    "fan_in_fan_out": _unset("the base's weights are stored transposed (Conv1D), which no supported base has"),
    "init_lora_weights": _plain_init,
    "kasa_config": _unset(FORWARD),
    "layer_replication": _unset("it changes the base's layers; save the replicated model as a base of its own"),
    "lora_bias": _unset("biases of lora_B are not part of a slot; train with lora_bias = false"),
    "modules_to_save": _unset(FULL_COPIES),
    "monteclora_config": _unset(FORWARD),
    "rank_pattern": _unset(NOT_YET),
    "alpha_pattern": _unset(NOT_YET),
    "target_parameters": _unset("adapters of fused expert weights are not yet supported"),
    "trainable_token_indices": _unset(FULL_COPIES),
    "use_bdlora": _unset(FORWARD),
    "use_dora": _unset("DoRA rescales the base's rows; " + FORWARD),
    "use_qalora": _unset(FORWARD),
}  # fmt: skip

UNKNOWN = _unset(
    "no field of PEFT 0.21, so its effect on the function is unknown; if it has none, remove it from the file"
)


def read_config(path: Path) -> PeftConfig:
    """Raises UnreadableAdapter or UnsupportedAdapter, naming the field, why it matters and what to do."""
    with open_plain(path) as (file, size):
        if size > CONFIG_BYTES_MAX:
            raise UnreadableAdapter(f"{path} has {size} bytes; an adapter_config.json has at most {CONFIG_BYTES_MAX}")
        data = bytearray(size)
        read_exactly(file, memoryview(data), str(path))
    fields = parse_json_object(bytes(data), str(path), CONFIG_DEPTH_MAX)
    if not isinstance(fields.get("peft_type"), str):
        raise UnreadableAdapter(f"{path}: peft_type is missing or not a text; is this a PEFT adapter's folder?")
    for name, value in fields.items():
        if reason := FIELDS.get(name, UNKNOWN)(value):
            raise UnsupportedAdapter(f"{path}: {name_of(name)} = {quote(value)}: {reason}")
    rank = _rank(fields, path)
    rslora = _switch(fields, "use_rslora", path)
    scale = _alpha(fields, path) / (math.sqrt(rank) if rslora else rank)
    base = fields.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise UnreadableAdapter(f"{path}: base_model_name_or_path is {quote(base)}, expected a text or null")
    return PeftConfig(rank, scale, base, tuple(_notes(fields, rslora)))


def name_of(field: str) -> str:
    """A field's name for a message: bare when it is ordinary, quoted when not."""
    return field if field.isidentifier() and len(field) <= 40 else quote(field)


def _rank(fields: Mapping[str, Any], path: Path) -> int:
    rank = fields.get("r")
    if type(rank) is not int or not 1 <= rank <= RANK_MAX:
        raise UnreadableAdapter(f"{path}: r is {quote(rank)}, expected a whole number from 1 to {RANK_MAX}")
    return rank


def _alpha(fields: Mapping[str, Any], path: Path) -> float:
    """Zero and negative ones are refused: such an adapter cannot be trained on as a run with alpha > 0."""
    alpha = fields.get("lora_alpha")
    low, high = ALPHA_RANGE
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not low <= alpha <= high:
        raise UnreadableAdapter(f"{path}: lora_alpha is {quote(alpha)}, expected a number from {low:g} to {high:g}")
    return float(alpha)


def _switch(fields: Mapping[str, Any], name: str, path: Path) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UnreadableAdapter(f"{path}: {name} is {quote(value)}, expected true or false")
    return bool(value)


def _notes(fields: Mapping[str, Any], rslora: bool) -> list[str]:
    notes = []
    if rslora:
        notes.append("use_rslora: the scale is lora_alpha / sqrt(r); it is kept as a number")
    if fields.get("lora_dropout"):
        dropout = quote(fields["lora_dropout"])
        notes.append(f"lora_dropout = {dropout} belongs to the earlier training; not carried over")
    if fields.get("velora_config"):
        notes.append("velora_config belongs to the earlier training; not carried over")
    return notes
