"""What is done to each decoder layer of a base on request: computed again in the backward pass, compiled.

Both replace the layer's `forward` and nothing else: modules keep their places and names, and the hooks of FSDP2 run
around either. Compiling goes inside, computing again outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graftwork.errors import ModelError
from graftwork.model.attention import AttentionPlan
from graftwork.model.inject import Routing


def decoder_layers(body: nn.Module) -> list[nn.Module]:
    """Raises ModelError where the architecture keeps them elsewhere."""
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(body).__name__} has no list of decoder layers named `layers`; it can only be used with "
            'base_placement = "replicated", without activation_checkpointing and without compile_layers'
        )
    return list(layers)


def recompute_layers(body: nn.Module, routing: Routing) -> None:
    """Keep only the layers' inputs for the backward pass, and compute each layer again when it gets there."""
    for layer in decoder_layers(body):
        layer.forward = _recomputed(layer.forward, routing)


def _recomputed(compute: Callable[..., Any], routing: Routing) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        route = routing.current
        if not torch.is_grad_enabled() or route is None:
            return compute(*args, **kwargs)

        def again(*args: Any) -> Any:
            """By the time of the backward pass the route is that of another call, or none."""
            with routing.recalling(route):
                return compute(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    return forward


class PlanOfTheCall:
    """The attention plan as compiled layers get it: always this one object, and its answers always tensors of one
    layout. So neither another plan nor other groups in it are a reason to compile again."""

    def __init__(self) -> None:
        self.plan: AttentionPlan | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        assert self.plan is not None, "set by the layer that is running"
        return self.plan.attend(layer, q, k, v, scale).clone(memory_format=torch.contiguous_format)


def compile_layers(body: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile what lies between the slots' products and attention, once for all layers of a class, and for any number
    of rows above 1. Slots, ranks, scales, segments and plans are not looked at by what is compiled.

    backend: of torch.compile. "inductor" may round otherwise than uncompiled layers.
    """
    held = PlanOfTheCall()
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in decoder_layers(body):
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=backend, dynamic=True)
        layer.forward = _with_held_plan(partial(compiled[kind], layer), held)


def _with_held_plan(compute: Callable[..., Any], held: PlanOfTheCall) -> Callable[..., Any]:
    def forward(*args: Any, plan: AttentionPlan | None = None, **kwargs: Any) -> Any:
        if plan is None:
            return compute(*args, **kwargs)
        before, held.plan = held.plan, plan
        try:
            return compute(*args, plan=held, **kwargs)
        finally:
            held.plan = before

    return forward
