"""PEFT adapters, written for those who read them.

    per expert   one tensor an expert: PEFT 0.21 (which fuses them on loading), vLLM, and ourselves with the same
                 digest: what the run tree holds
    fused        PEFT's `target_parameters` as PEFT itself saves them on transformers 5: flattened, gate above up
    vllm 3-D     the same, both parameters always there: vLLM's loader for models that want their experts in one tensor
    stacked      experts in an axis of their own, [E, r, in] and [E, out, r]

Dense modules are alike in all of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from graftwork.adapters.canonical import Adapter, LoraPair, alpha_for
from graftwork.adapters.formats.expert_layout import flatten_a, flatten_b, fuse
from graftwork.adapters.formats.peft_read import CONFIG_NAME, FILLED_KEY, FINGERPRINT_KEY, TENSORS_NAME
from graftwork.adapters.formats.tensor_file import tensor_chunks
from graftwork.adapters.names import EXPERT_PARTS, FUSED, PREFIX, experts_module, is_expert_stack, peft_name
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import MisfitAdapter
from graftwork.store.files import Pieces, dump_json

WRITTEN_FOR_PEFT = "0.21.0"
ExpertLayout = Literal["per expert", "fused", "vllm 3-D", "stacked"]
Later = Callable[[], Tensor]
"""A tensor that is made when it is written."""


def write_peft(adapter: Adapter, facts: AdapterFacts, layout: ExpertLayout = "per expert") -> dict[str, bytes]:
    """File name -> bytes; `peft_files` in one piece."""
    return {name: b"".join(chunks) for name, chunks in peft_files(adapter, facts, layout).items()}


def peft_files(adapter: Adapter, facts: AdapterFacts, layout: ExpertLayout = "per expert") -> dict[str, Pieces]:
    """File name -> content in chunks, none of them larger than a tensor: a folder that PEFT 0.21 and vLLM load.

    Equal adapters and facts give equal bytes, and `read_peft` reads layout `per expert` back with the same digest.
    target_modules lists whole module paths: a leaf such as q_proj would match modules that the adapter does not have.
    Raises MisfitAdapter for an adapter without modules, and for one whose scales no lora_alpha gives.
    """
    if not adapter.pairs:
        raise MisfitAdapter("an adapter without modules cannot be written")
    dense = {path: pair for path, pair in adapter.pairs.items() if not is_expert_stack(path)}
    stacks = {path: pair for path, pair in adapter.pairs.items() if is_expert_stack(path)}
    filled = {} if layout in ("fused", "stacked") else _filling(stacks, whole=layout == "per expert")
    stacks |= filled
    if layout == "per expert":
        stacks = _of_one_rank_and_scale(stacks)
    modules, parameters = sorted(dense), list[str]()
    tensors: dict[str, Later] = {}
    for path, pair in dense.items():
        tensors.update(_both(path, pair))
    scaled = {path: (pair.rank, pair.scale) for path, pair in dense.items()}
    if layout in ("per expert", "stacked"):
        for path, pair in stacks.items():
            tensors.update(_per_expert(path, pair) if layout == "per expert" else _both(path, pair))
            scaled[path] = (pair.rank, pair.scale)
        modules += sorted({experts_module(path)[1] for path in stacks})
    else:
        fused = dict(_fused(stacks))
        for parameter, (rank, scale, made) in fused.items():
            tensors.update(made)
            scaled[parameter] = (rank, scale)
        parameters = sorted({".".join(name.split(".")[-2:]) for name in fused})
    metadata = {"format": "pt"}
    if filled:
        metadata[FILLED_KEY] = " ".join(sorted(filled))
    if facts.base_fingerprint is not None:
        metadata[FINGERPRINT_KEY] = facts.base_fingerprint
    lead = next(iter(sorted(stacks)), None) if layout == "per expert" else None
    config = _config(scaled, modules, parameters, facts, lead)
    return {CONFIG_NAME: [dump_json(config)], TENSORS_NAME: tensor_chunks(tensors, metadata)}


def _both(path: str, pair: LoraPair) -> dict[str, Later]:
    return {peft_name(path, "A"): lambda: pair.a, peft_name(path, "B"): lambda: pair.b}


def _per_expert(path: str, pair: LoraPair) -> dict[str, Later]:
    made: dict[str, Later] = {}
    for expert in range(pair.shape[0]):
        made[peft_name(path, "A", expert)] = partial(pair.a.select, 0, expert)
        made[peft_name(path, "B", expert)] = partial(pair.b.select, 0, expert)
    return made


def _of_one_rank_and_scale(stacks: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """PEFT fuses single experts by r and lora_alpha alone, whatever patterns say: experts that differ are padded with
    zeros to the highest rank, and B takes up the difference in scale (in fp32)."""
    rank = max((pair.rank for pair in stacks.values()), default=0)
    scale = next((pair.scale for pair in stacks.values()), 1.0)
    return {path: _brought_to(pair, rank, scale) for path, pair in stacks.items()}


def _brought_to(pair: LoraPair, rank: int, scale: float) -> LoraPair:
    a, b, more = pair.a, pair.b, rank - pair.rank
    if more:
        a = torch.nn.functional.pad(a, (0, 0, 0, more))
        b = torch.nn.functional.pad(b, (0, more))
    return LoraPair(a, _rescaled(b, pair.scale, scale), scale)


def _rescaled(b: Tensor, old: float, new: float) -> Tensor:
    return b if old == new else b.float() * (old / new)


def _by_layer(stacks: Mapping[str, LoraPair]) -> dict[str, dict[str, LoraPair]]:
    """`experts` module -> projection -> pair."""
    layers: dict[str, dict[str, LoraPair]] = {}
    for path, pair in sorted(stacks.items()):
        module, part = experts_module(path)
        layers.setdefault(module, {})[part] = pair
    return layers


def _filling(stacks: Mapping[str, LoraPair], *, whole: bool) -> dict[str, LoraPair]:
    """Projections of zeros beside those that the adapter has: PEFT drops half of a layer's experts in silence, and vLLM
    refuses it. The file says which they are (FILLED_KEY), and `read_peft` leaves them out again.

    whole: all three; else gate and up only where both are missing, for one of them comes out of the fused tensor.
    """
    filled = {}
    for module, parts in _by_layer(stacks).items():
        absent = [part for part in EXPERT_PARTS if part not in parts]
        if not whole and len(set(absent) - {"down_proj"}) == 1:
            absent = [part for part in absent if part == "down_proj"]
        filled.update({f"{module}.{part}": _zeros_beside(part, parts) for part in absent})
    return filled


def _zeros_beside(part: str, parts: Mapping[str, LoraPair]) -> LoraPair:
    given, other = next(iter(parts.items()))
    experts, out, width = other.shape
    if (part == "down_proj") != (given == "down_proj"):  # down has gate's shape the other way round
        out, width = width, out
    a, b = other.a.new_zeros(experts, other.rank, width), other.b.new_zeros(experts, out, other.rank)
    return LoraPair(a, b, other.scale)


def _fused(stacks: Mapping[str, LoraPair]) -> Iterator[tuple[str, tuple[int, float, dict[str, Later]]]]:
    """(parameter, (rank, scale, tensors)) of each expert parameter. PEFT's wrapper of gate_up lies inside that of down,
    and is called `base_layer` where there are two."""
    for module, parts in _by_layer(stacks).items():
        down = parts.get("down_proj")
        gate, up = parts.get("gate_proj"), parts.get("up_proj")
        if gate is not None or up is not None:
            gate, up = gate or _zero_like(up), up or _zero_like(gate)
            inner = f"{PREFIX}{module}.base_layer" if down is not None else f"{PREFIX}{module}"
            shared = torch.equal(gate.a, up.a)
            rank = gate.rank if shared else gate.rank + up.rank
            yield f"{module}.{FUSED}", (rank, gate.scale, _flat(inner, partial(_gate_up, gate, up)))
        if down is not None:
            yield f"{module}.down_proj", (down.rank, down.scale, _flat(f"{PREFIX}{module}", partial(_factors, down)))


def _flat(name: str, factors: Callable[[], tuple[Tensor, Tensor]]) -> dict[str, Later]:
    return {
        f"{name}.lora_A.weight": lambda: flatten_a(factors()[0]),
        f"{name}.lora_B.weight": lambda: flatten_b(factors()[1]),
    }


def _factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    return pair.a, pair.b


def _gate_up(gate: LoraPair, up: LoraPair) -> tuple[Tensor, Tensor]:
    """Both brought to gate's scale."""
    up_b = _rescaled(up.b, up.scale, gate.scale)
    dtype = torch.promote_types(gate.b.dtype, up_b.dtype)
    return fuse((gate.a, gate.b.to(dtype)), (up.a, up_b.to(dtype)))


def _zero_like(other: LoraPair | None) -> LoraPair:
    """A projection that the adapter leaves alone, beside one that it has."""
    assert other is not None
    return LoraPair(other.a, torch.zeros_like(other.b), other.scale)


def _config(
    scaled: Mapping[str, tuple[int, float]], modules: list[str], parameters: list[str], facts: AdapterFacts,
    lead: str | None,
) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json: the most common rank and scale (or those of `lead`) as r and lora_alpha, the others in
    patterns, by whole name.

    The number lora_alpha gives back exactly the scale, with rsLoRA's divisor where it must.
    """
    ranks = [rank for rank, _ in scaled.values()]
    common_rank = Counter(ranks).most_common(1)[0][0] if lead is None else scaled[lead][0]
    for rslora in (False, True):
        alphas = {path: alpha_for(scale, math.sqrt(rank) if rslora else rank) for path, (rank, scale) in scaled.items()}
        if None not in alphas.values():
            break
    else:
        raise MisfitAdapter("no lora_alpha gives all of the adapter's scales; import it with an alpha of its own first")
    exact = {path: alpha for path, alpha in alphas.items() if alpha is not None}
    common_alpha = Counter(exact.values()).most_common(1)[0][0] if lead is None else exact[lead]
    return {
        "alpha_pattern": {path: _number(alpha) for path, alpha in exact.items() if alpha != common_alpha},
        "auto_mapping": None,
        "base_model_name_or_path": facts.base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(common_alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": WRITTEN_FOR_PEFT,
        "r": common_rank,
        "rank_pattern": {path: rank for path, (rank, _) in scaled.items() if rank != common_rank},
        "target_modules": modules,
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
