"""PEFT's `adapter_config.json`: what each field means for the function that the adapter computes.

`FIELDS` has every field of LoraConfig in peft 0.21, each with its rule. A field that is not there is refused when it is
set to anything: what it does to the function is not known. Nothing in the file is followed, imported, downloaded
or run as a pattern.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.adapters.canonical import ALPHA_RANGE
from graftwork.adapters.formats.untrusted import open_plain, parse_json_object, quote, read_exactly
from graftwork.errors import UnreadableAdapter, UnsupportedAdapter

CONFIG_BYTES_MAX = 2**20
CONFIG_DEPTH_MAX = 16
RANK_MAX = 65536
REGULAR = re.compile(r"[\\^$*+?{}\[\]|()]")
"""Characters that make a pattern's key a regular expression. A dot is taken for itself."""
ANY_PARENT = r".*\."
"""What PEFT puts before `gate_up_proj` when it loads an adapter of single experts: it names the module's end."""
PLAIN_INITS = frozenset({"gaussian", "eva", "mica", "orthogonal"})

Rule = Callable[[Any], str | None]
"""The reason why a value is refused; None when it leaves the function alone."""


@dataclass(frozen=True)
class Pattern:
    """PEFT's rank_pattern or alpha_pattern. `literal`: a module's name or its end after a dot -> (place in the file,
    number); compared as text, the first in the file wins. `regular`: keys that only a regular expression compares."""

    literal: Mapping[str, tuple[int, float]]
    regular: Mapping[str, float]

    def find(self, name: str) -> float | None:
        """The number of the first literal key that names the module."""
        found = [self.literal[end] for end in ends_of(name) if end in self.literal]
        return min(found)[1] if found else None


@dataclass(frozen=True)
class PeftConfig:
    """What a reader needs of it."""

    path: Path
    rank: int
    alpha: float
    rslora: bool
    ranks: Pattern
    regular_ranks: frozenset[int]
    alphas: Pattern
    target_parameters: frozenset[str]
    base_model: str | None
    ignored: tuple[str, ...]
    """Fields whose effect the user chose to drop."""
    ignored_modules: tuple[str, ...]
    """What those fields copied."""
    notes: tuple[str, ...]

    def scale(self, name: str, rank: int) -> float:
        """What multiplies B A x in the module (or parameter) `name` whose factors have `rank`, as PEFT computes it."""
        alpha = self.alphas.find(name)
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.rslora else rank)

    def named_rank(self, name: str) -> int:
        """The rank that r and the literal keys of rank_pattern give."""
        found = self.ranks.find(name)
        return self.rank if found is None else int(found)

    def may_have_rank(self, name: str, rank: int) -> bool:
        """The tensors decide between r and what regular keys of rank_pattern say."""
        return rank == self.named_rank(name) or rank in self.regular_ranks

    def targets_parameter(self, name: str) -> bool:
        return any(end in self.target_parameters for end in ends_of(name))


def ends_of(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`: what PEFT's lists and literal patterns may call a module or a parameter."""
    yield name
    yield from (name[dot.end() :] for dot in re.finditer(r"\.", name))


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
FULL_COPIES = "full copies of other weights are not part of a slot; train without, or drop them (--ignore {name})"
CAN_BE_IGNORED = frozenset({"modules_to_save", "trainable_token_indices", "ensure_weight_tying"})

FIELDS: Mapping[str, Rule] = {
    # Read by value below.
    "r": _ignored,
    "lora_alpha": _ignored,
    "use_rslora": _ignored,
    "rank_pattern": _ignored,
    "alpha_pattern": _ignored,
    "target_parameters": _ignored,
    "base_model_name_or_path": _ignored,
    "lora_dropout": _ignored,
    # Biases and what they are: the tensors say whether there are any.
    "bias": _only("none", "all", "lora_only", None, reason="no kind of bias that PEFT 0.21 knows"),
    "lora_bias": _ignored,
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
    "ensure_weight_tying": _unset(FULL_COPIES),
    "fan_in_fan_out": _unset("the base's weights are stored transposed (Conv1D), which no supported base has"),
    "init_lora_weights": _plain_init,
    "kasa_config": _unset(FORWARD),
    "layer_replication": _unset("it changes the base's layers; save the replicated model as a base of its own"),
    "modules_to_save": _unset(FULL_COPIES),
    "monteclora_config": _unset(FORWARD),
    "trainable_token_indices": _unset(FULL_COPIES),
    "use_bdlora": _unset(FORWARD),
    "use_dora": _unset("DoRA rescales the base's rows; " + FORWARD),
    "use_qalora": _unset(FORWARD),
}  # fmt: skip

UNKNOWN = _unset(
    "no field of PEFT 0.21, so its effect on the function is unknown; if it has none, remove it from the file"
)


def read_config(path: Path, ignore: Collection[str] = ()) -> PeftConfig:
    """Raises UnreadableAdapter or UnsupportedAdapter, naming the field, why it matters and what to do.

    ignore: names that the user chose to drop; fields of full copies among them are not refused.
    """
    with open_plain(path) as (file, size):
        if size > CONFIG_BYTES_MAX:
            raise UnreadableAdapter(f"{path} has {size} bytes; an adapter_config.json has at most {CONFIG_BYTES_MAX}")
        data = bytearray(size)
        read_exactly(file, memoryview(data), str(path))
    fields = parse_json_object(bytes(data), str(path), CONFIG_DEPTH_MAX)
    if not isinstance(fields.get("peft_type"), str):
        raise UnreadableAdapter(f"{path}: peft_type is missing or not a text; is this a PEFT adapter's folder?")
    copies = {name: _copied(value) for name, value in fields.items() if name in CAN_BE_IGNORED and value}
    ignored = [name for name, of in copies.items() if name in ignore or (of and set(of) <= set(ignore))]
    ignored_modules = tuple(module for name in ignored for module in copies[name])
    for name, value in fields.items():
        reason = None if name in ignored else FIELDS.get(name, UNKNOWN)(value)
        if reason:
            raise UnsupportedAdapter(f"{path}: {name_of(name)} = {quote(value)}: {reason.format(name=name_of(name))}")
    base = fields.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise UnreadableAdapter(f"{path}: base_model_name_or_path is {quote(base)}, expected a text or null")
    ranks = _pattern(fields, "rank_pattern", _rank, path)
    alphas = _pattern(fields, "alpha_pattern", _alpha, path)
    if alphas.regular:
        raise UnsupportedAdapter(
            f"{path}: alpha_pattern has the key {quote(next(iter(alphas.regular)))}, a regular expression, which is "
            "never run; name the modules in it one by one"
        )
    rslora = _switch(fields, "use_rslora", path)
    return PeftConfig(
        path, _rank(fields.get("r"), "r", path), _alpha(fields.get("lora_alpha"), "lora_alpha", path), rslora, ranks,
        frozenset(map(int, ranks.regular.values())), alphas, _texts(fields, "target_parameters", path), base,
        tuple(ignored), ignored_modules, tuple(_notes(fields, rslora, ranks)),
    )  # fmt: skip


def _copied(value: Any) -> list[str]:
    """The modules of which a field of full copies speaks; token indices alone are those of the input embeddings."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    if isinstance(value, dict):
        return list(value)
    return ["embed_tokens"] if isinstance(value, list) else []


def name_of(field: str) -> str:
    """A field's name for a message: bare when it is ordinary, quoted when not."""
    return field if field.isidentifier() and len(field) <= 40 else quote(field)


def _rank(value: Any, name: str, path: Path) -> int:
    if type(value) is not int or not 1 <= value <= RANK_MAX:
        raise UnreadableAdapter(f"{path}: {name} is {quote(value)}, expected a whole number from 1 to {RANK_MAX}")
    return value


def _alpha(value: Any, name: str, path: Path) -> float:
    """Zero and negative ones are refused: such an adapter cannot be trained on as a run with alpha > 0."""
    low, high = ALPHA_RANGE
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UnreadableAdapter(f"{path}: {name} is {quote(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def _pattern(fields: Mapping[str, Any], field: str, check: Callable[[Any, str, Path], float], path: Path) -> Pattern:
    """rank_pattern or alpha_pattern, its keys told apart, its numbers checked."""
    table = fields.get(field) or {}
    if not isinstance(table, dict):
        raise UnreadableAdapter(f"{path}: {field} is {quote(table)}, expected a table")
    literal: dict[str, tuple[int, float]] = {}
    regular: dict[str, float] = {}
    for place, (key, value) in enumerate(table.items()):
        number = check(value, f"{field}[{quote(key)}]", path)
        name = key.removeprefix(ANY_PARENT)
        if REGULAR.search(name):
            regular[key] = number
        else:
            literal.setdefault(name, (place, number))
    return Pattern(literal, regular)


def _texts(fields: Mapping[str, Any], field: str, path: Path) -> frozenset[str]:
    value = fields.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UnreadableAdapter(f"{path}: {field} is {quote(value)}, expected a list of texts")
    return frozenset(value)


def _switch(fields: Mapping[str, Any], name: str, path: Path) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise UnreadableAdapter(f"{path}: {name} is {quote(value)}, expected true or false")
    return bool(value)


def _notes(fields: Mapping[str, Any], rslora: bool, ranks: Pattern) -> list[str]:
    notes = []
    if ranks.regular:
        notes.append("rank_pattern has regular expressions, which are not run: ranks are those of the tensors")
    if rslora:
        notes.append("use_rslora: the scale is lora_alpha / sqrt(r); it is kept as a number")
    if fields.get("lora_dropout"):
        dropout = quote(fields["lora_dropout"])
        notes.append(f"lora_dropout = {dropout} belongs to the earlier training; not carried over")
    if fields.get("velora_config"):
        notes.append("velora_config belongs to the earlier training; not carried over")
    return notes
