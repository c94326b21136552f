"""What adapters' tensors are called, and which module is meant: the one place where names are translated.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight          PEFT; vLLM
    model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight    no prefix, the text part of a larger model
    model.layers.0.mlp.experts.10.gate_proj.lora_A.weight                   expert 10, [r, in]
    model.layers.0.mlp.experts.gate_proj.lora_A.weight                      all experts, [E, r, in]
    model.layers.0.mlp.experts.gate_up_proj.lora_A.weight                   the same, gate above up in B
    model.layers.0.mlp.experts.base_layer.lora_A.weight                     PEFT's target_parameters: flattened, inner
    model.layers.0.mlp.experts.lora_A.weight                                the same, outer
    model.layers.0.mlp.experts.w1_lora_A.weight                             rank_N.pt: w1 gate, w2 down, w3 up

Our own names are paths of the base's modules, the experts of a layer as one: `model.layers.0.mlp.experts.gate_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."
EXPERTS = "experts"
EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")
FUSED = "gate_up_proj"
NUMBERED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names, and those of older trainers."""

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one module that get the same input."""

_WRAPPERS = (
    ("language_model.model.", "model."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
)
"""How models with a text part and others call the text part."""

EXPERT_NUMBER = re.compile(r"[0-9]+", re.ASCII)

Side = Literal["A", "B"]
Layout = Literal["dense", "expert", "stacked", "flat inner", "flat outer"]

_SIDE = r"lora_(?P<side>[AB])(?:\.(?P<adapter>(?!(?:weight|bias)$)[\w-]+))?(?:\.weight)?"
_TENSOR = re.compile(rf"(?P<path>[\w-]+(?:\.[\w-]+)*?)\.{_SIDE}", re.ASCII)
_NUMBERED_TENSOR = re.compile(rf"(?P<path>[\w-]+(?:\.[\w-]+)*)\.(?P<part>w[123])_{_SIDE}", re.ASCII)


@dataclass(frozen=True)
class TensorName:
    """A tensor's name, understood.

    path     the module that it belongs to, in our form; for the flattened layouts, the `experts` module
    module   the same as the file has it, without PEFT's prefix: what patterns in its configuration speak of
    layout   dense, or how the experts lie: one expert a tensor, stacked [E, ., .], or flattened by PEFT
    expert   which one, in layout `expert`
    adapter  PEFT's adapter name, where the file keeps it
    """

    path: str
    module: str
    side: Side
    layout: Layout
    expert: int | None
    adapter: str | None

    @staticmethod
    def parse(name: str) -> TensorName | None:
        """None when `name` is not a LoRA factor's."""
        bare = _without_peft(name)
        if match := _NUMBERED_TENSOR.fullmatch(bare):
            module = f"{match['path']}.{NUMBERED[match['part']]}"
        elif match := _TENSOR.fullmatch(bare):
            module = match["path"]
        else:
            return None
        place = _place(module_path(module).split("."))
        if place is None:
            return None
        path, layout, expert = place
        side: Side = "A" if match["side"] == "A" else "B"
        return TensorName(path, module.removesuffix(".base_layer"), side, layout, expert, match["adapter"])


def siblings(shapes: Mapping[str, Sequence[int]]) -> list[tuple[str, ...]]:
    """The dense modules of `shapes`, path -> (out, in), in tuples that get the same input; each in one, maybe alone."""
    found: list[tuple[str, ...]] = []
    dense = {path: shape[1] for path, shape in shapes.items() if len(shape) == 2}
    for path in dense:
        parent, _, leaf = path.rpartition(".")
        names = next((names for names in SAME_INPUT if leaf in names), (leaf,))
        paths = tuple(f"{parent}.{name}" if parent else name for name in names)
        together = tuple(other for other in paths if dense.get(other) == dense[path])
        if together[0] == path:
            found.append(together)
    return found


def _place(parts: list[str]) -> tuple[str, Layout, int | None] | None:
    """(path, layout, expert) of a module's path in a file."""
    last = NUMBERED.get(parts[-1], parts[-1])
    if len(parts) > 2 and parts[-3] == EXPERTS and EXPERT_NUMBER.fullmatch(parts[-2]) and last in EXPERT_PARTS:
        return ".".join([*parts[:-2], last]), "expert", int(parts[-2])
    if len(parts) > 1 and parts[-2] == EXPERTS and last in (*EXPERT_PARTS, FUSED):
        return ".".join([*parts[:-1], last]), "stacked", None
    if parts[-2:] == [EXPERTS, "base_layer"]:
        return ".".join(parts[:-1]), "flat inner", None
    if "base_layer" in parts:
        return None
    return ".".join(parts), "flat outer" if parts[-1] == EXPERTS else "dense", None


def _without_peft(name: str) -> str:
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def module_path(path: str) -> str:
    """A module's path as a file has it, in our form: without PEFT's prefix and the wrappers around a text model."""
    path = _without_peft(path)
    for wrapper, bare in _WRAPPERS:
        if path.startswith(wrapper):
            return bare + path.removeprefix(wrapper)
    return path


def key_of(path: str) -> str:
    """What two names of one module have in common: `model.` in front or not, Mixtral's older name of its block."""
    bare = module_path(path).removeprefix("model.")
    return bare.replace(".block_sparse_moe.", ".mlp.")


def match_paths(found: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """found path -> the known path that means the same module; equal names first. Unmatched paths are left out."""
    exact = set(known)
    keys: dict[str, list[str]] = {}
    for path in sorted(exact):
        keys.setdefault(key_of(path), []).append(path)
    matched = {}
    for path in found:
        candidates = [path] if path in exact else keys.get(key_of(path), [])
        if len(candidates) == 1:
            matched[path] = candidates[0]
    return matched


def is_expert_stack(path: str) -> bool:
    """Whether `path` is our name of the experts of a layer."""
    parts = path.split(".")
    return len(parts) > 1 and parts[-2] == EXPERTS and parts[-1] in EXPERT_PARTS


def experts_module(path: str) -> tuple[str, str]:
    """(the `experts` module, the projection) of an expert stack's path."""
    module, _, part = path.rpartition(".")
    return module, part


def peft_name(path: str, side: Side, expert: int | None = None) -> str:
    """The name in a PEFT file: of a dense module, or of one expert of a stack."""
    if expert is not None:
        module, part = experts_module(path)
        path = f"{module}.{expert}.{part}"
    return f"{PREFIX}{path}.lora_{side}.weight"


def numbered_name(path: str, side: Side) -> str:
    """The name in a `rank_N.pt`: no prefix, experts by number."""
    if not is_expert_stack(path):
        return f"{path}.lora_{side}.weight"
    module, part = experts_module(path)
    number = next(number for number, name in NUMBERED.items() if name == part)
    return f"{module}.{number}_lora_{side}.weight"


def is_named(path: str, name: str) -> bool:
    """Whether `name` is the module's whole name or its end after a dot: how PEFT's patterns are compared, as text."""
    return path == name or path.endswith(f".{name}")
