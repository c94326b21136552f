"""Slots in a base model: which of its modules can carry them, and what stands there afterwards.

A linear layer becomes a `SlotLinear`, a layer's fused experts become `SlotExperts`. Neither holds adapter weights: they
ask the route of the running forward pass for them. torch.compile passes both by: what depends on the route is in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.adapters.canonical import Shape
from graftwork.adapters.names import EXPERT_PARTS, EXPERTS, FUSED, siblings
from graftwork.config.section import ALL_LINEAR
from graftwork.errors import ModelError
from graftwork.lora.experts import ExpertWeights, slot_experts
from graftwork.lora.linear import Frozen, Segment, SlotBatch, slot_linears, slot_linears_batched
from graftwork.lora.slots import SlotBank


@dataclass(frozen=True)
class Route:
    """Which rows of a forward pass belong to which slot of which bank. batch: the same segments for one batched product
    a layer, in a pass without gradients."""

    bank: SlotBank
    segments: Sequence[Segment]
    batch: SlotBatch | None = None


@dataclass
class Routing:
    """The route of the forward pass that is running. transformers hands its MLPs nothing but activations, so the
    layers of one model share this object; it belongs to the model, and is set for the time of one call."""

    current: Route | None = field(default=None)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        assert self.current is None, "a forward pass is running already"
        self.current = route
        try:
            yield
        finally:
            self.current = None

    @contextmanager
    def recalling(self, route: Route) -> Iterator[None]:
        """For computing a layer again: the route of the call that it was first computed in, whatever runs now."""
        before, self.current = self.current, route
        try:
            yield
        finally:
            self.current = before


class SlotLinear(nn.Module):
    """A frozen linear layer of the base that adds, row by row, what the route says. It holds no adapter weights."""

    same_input: SameInput

    def __init__(self, path: str, base: nn.Linear) -> None:
        super().__init__()
        self.path = path
        self.weight, self.bias = base.weight, base.bias

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.same_input.output(self.path, x)


class SameInput:
    """Layers that transformers gives the same input one after another, as q, k and v. The first that is called computes
    all of them; the others' outputs wait for the call with that very tensor."""

    def __init__(self, members: Sequence[SlotLinear], routing: Routing) -> None:
        self.members, self.routing = members, routing
        self.paths = tuple(member.path for member in members)
        self._x: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    def output(self, path: str, x: Tensor) -> Tensor:
        if x is not self._x or path not in self._waiting:
            self._x, self._waiting = x, dict(zip(self.paths, self._outputs(x), strict=True))
        y = self._waiting.pop(path)
        if not self._waiting:
            self._x = None
        return y

    def _outputs(self, x: Tensor) -> list[Tensor]:
        route = self.routing.current
        assert route is not None, "the base is called through BaseModel"
        rows = x.reshape(-1, x.shape[-1])
        layers = [Frozen(member.weight, member.bias) for member in self.members]
        siblings = route.bank.siblings[self.paths]
        if route.batch is not None:
            ys = slot_linears_batched(rows, layers, siblings, route.batch)
        else:
            ys = slot_linears(rows, layers, siblings, route.segments, route.bank.anchor)
        return [y.view(*x.shape[:-1], -1) for y in ys]


class SlotExperts(nn.Module):
    """The frozen experts of a layer that add, row by row, what the route says."""

    def __init__(self, path: str, base: Any, routing: Routing, targets: Sequence[str]) -> None:
        super().__init__()
        self.routing = routing
        self.targets = {part: f"{path}.{part}" for part in targets}
        self.gate_up_proj, self.down_proj, self.act_fn = base.gate_up_proj, base.down_proj, base.act_fn

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        route = self.routing.current
        assert route is not None, "the base is called through BaseModel"
        parts = {part: route.bank.factors[path] for part, path in self.targets.items()}
        weights = ExpertWeights(self.gate_up_proj, self.down_proj, self.act_fn)
        return slot_experts(
            hidden_states, top_k_index, top_k_weights, weights, parts, route.segments, route.bank.anchor
        )


def inject(model: Any, targets: Sequence[str], routing: Routing) -> dict[str, Shape]:
    """Replace every target; return module path -> (out, in), experts (E, out, in).

    targets: last parts of module names; ALL_LINEAR for every linear layer but the head, and every expert.
    Raises ModelError, naming the module that cannot carry a slot, or the names that no module has.
    """
    shapes: dict[str, Shape] = {}
    everything = tuple(targets) == ALL_LINEAR
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        parent_path, _, name = path.rpartition(".")
        if module is head:
            continue
        if isinstance(module, nn.Linear) and (everything or name in targets):
            _refuse_lone_expert(path)
            setattr(model.get_submodule(parent_path), name, SlotLinear(path, module))
            shapes[path] = (module.out_features, module.in_features)
        elif parts := _expert_parts(module, EXPERT_PARTS if everything else targets):
            _refuse_unusual_experts(path, module)
            setattr(model.get_submodule(parent_path), name, SlotExperts(path, module, routing, parts))
            shapes.update({f"{path}.{part}": _expert_shape(module, part) for part in parts})
    _refuse_absent(model, targets, shapes, everything)
    for paths in siblings(shapes):
        members = [model.get_submodule(path) for path in paths]
        together = SameInput(members, routing)
        for member in members:
            member.same_input = together
    return shapes


def _expert_parts(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """The projections of a fused experts' module that are targets; empty for any other module."""
    own = dict(module.named_parameters(recurse=False))
    stacked = any(name in own and own[name].dim() == 3 for name in (FUSED, *EXPERT_PARTS))
    return [part for part in EXPERT_PARTS if part in targets] if stacked else []


def _expert_shape(module: Any, part: str) -> Shape:
    experts, hidden, middle = module.down_proj.shape
    return (experts, hidden, middle) if part == "down_proj" else (experts, middle, hidden)


def _refuse_unusual_experts(path: str, module: Any) -> None:
    """Only what `slot_experts` reproduces: gate above up, an activation and a product, no biases."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    usual = names == {"gate_up_proj", "down_proj"} and path.rpartition(".")[2] == EXPERTS
    usual = usual and module.gate_up_proj.shape[1] == 2 * module.down_proj.shape[2]
    gate = getattr(type(module), "_apply_gate", None)
    usual = (
        usual and getattr(gate, "__name__", "") == "_default_apply_gate" and callable(getattr(module, "act_fn", None))
    )
    switches = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    if not usual or any(getattr(module, name, None) is not value for name, value in switches.items()):
        raise ModelError(
            f"{path} ({type(module).__name__}) are experts of a kind that cannot carry slots: expected gate_up_proj "
            f"[E, 2I, H] and down_proj [E, H, I] without biases, found {sorted(names)}. Leave their names out of "
            "lora.target_modules"
        )


def _refuse_lone_expert(path: str) -> None:
    """Experts as modules of their own would have the names of stacked ones in every file."""
    parts = path.split(".")
    if EXPERTS in parts[:-1] and parts[parts.index(EXPERTS) + 1].isdecimal():
        raise ModelError(
            f"{path}: this model keeps each expert as a module of its own, which is not supported; leave "
            f"{parts[-1]} out of lora.target_modules"
        )


def _refuse_absent(model: Any, targets: Sequence[str], shapes: dict[str, Shape], everything: bool) -> None:
    found = {path.rpartition(".")[2] for path in shapes}
    head = model.get_output_embeddings()
    if missing := ([] if everything else sorted(set(targets) - found)):
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                found.add(path.rpartition(".")[2])
            found.update(_expert_parts(module, EXPERT_PARTS))
        raise ModelError(
            f"{type(model).__name__} has no linear layer named {', '.join(missing)} that can carry a slot; it has "
            f"{', '.join(sorted(found))}"
        )
    if not shapes:
        raise ModelError(f"{type(model).__name__} has no linear layer that can carry a slot")
