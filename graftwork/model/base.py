"""Load the frozen base, whole or cut over ranks (model/shard.py), and put slots into it (model/inject.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_default_handler, disable_progress_bar, enable_propagation

from graftwork.adapters.prepare import SlotSpec
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.slots import SlotBank
from graftwork.model import attention
from graftwork.model.attention import AttentionPlan
from graftwork.model.fingerprint import fingerprint
from graftwork.model.inject import Route, Routing, inject
from graftwork.model.layers import compile_layers, recompute_layers
from graftwork.model.shard import shard
from graftwork.model.trunk import Ask, Trunk
from graftwork.parallel.ranks import Ranks

__all__ = ["Ask", "BaseModel", "Placement", "Route", "load_base", "pick_device", "slot_spec"]


@dataclass(frozen=True)
class Placement:
    """Where a base lies, and how its layers run.

    sharded                   with several ranks: cut over them, else whole on each
    activation_checkpointing  layers keep their input alone, and are computed again in the backward pass
    compile_layers            torch.compile what lies between the slots' products
    """

    ranks: Ranks = field(default_factory=Ranks.alone)
    sharded: bool = True
    activation_checkpointing: bool = False
    compile_layers: bool = False


ALONE = Placement()


@dataclass(frozen=True)
class BaseModel:
    """The frozen base with slots.

    trunk        transformers' decoder and its head
    spec         the slots' modules and shapes
    fingerprint  identifies the base's configuration and weights; not a proof against forgery
    ranks        those that train with it; all of them take part in every call of a base that is cut
    sharded      whether it is cut over the ranks
    """

    trunk: Trunk
    routing: Routing
    spec: SlotSpec
    fingerprint: str
    config: Any
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    sharded: bool

    @property
    def body(self) -> nn.Module:
        """transformers' decoder without its head, of a base that is whole."""
        assert not self.sharded, "a base that is cut is called through `logprobs`"
        return self.trunk.body

    @property
    def head(self) -> Tensor:
        """[V, H], of a base that is whole."""
        assert not self.sharded, "a base that is cut is called through `logprobs`"
        return self.trunk.head.weight

    @property
    def vocab_size(self) -> int:
        return self.trunk.head.out_features

    @property
    def max_positions(self) -> int:
        """Longest sequence that the plain causal forward pass computes as the architecture means it: within the window
        of sliding attention, and before position embeddings are rescaled for long texts."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        rescaled = rope.get("rope_type") in ("dynamic", "longrope")
        limits = (
            self.config.max_position_embeddings,
            getattr(self.config, "sliding_window", None),
            getattr(self.config, "original_max_position_embeddings", None) if rescaled else None,
        )
        return min(int(limit) for limit in limits if limit is not None)

    def new_bank(self, slots: int, *, gradients: bool) -> SlotBank:
        """One that trains cuts its masters over the ranks."""
        mesh = self.ranks.mesh if gradients else None
        return SlotBank(self.spec, slots, device=self.device, dtype=self.dtype, gradients=gradients, mesh=mesh)

    def hidden(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route) -> Tensor:
        """Last hidden states [T, H] for token ids [T] at positions [T] int64; the plan and the route cover all rows.
        The base must be whole."""
        assert not self.sharded, "a base that is cut is called through `logprobs`"
        with self.routing.using(route):
            return self.trunk.hidden(tokens, positions, plan)

    def logprobs(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route, asks: Sequence[Ask], chunk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """As `hidden`, then (log-probs [N], entropies [N]) in fp32 for each ask. See Trunk.forward."""
        with self.routing.using(route):
            return self.trunk(tokens, positions, plan, asks, chunk)


def load_base(model: ModelConfig, lora: LoraConfig, placement: Placement = ALONE) -> BaseModel:
    """Raises ModelError, naming the folder, the file, the tensor or the module that stands in the way; of a base that
    is cut, on all ranks alike."""
    _refuse_absent(model.path)
    attention.register()
    disable_progress_bar()
    disable_default_handler()  # what transformers says goes where everything goes
    enable_propagation()
    ranks = placement.ranks
    sharded = placement.sharded and ranks.size > 1
    device = pick_device(model.device)
    dtype = _agreed_dtype(model.dtype, device, ranks)
    loaded = _without_weights(model.path, dtype) if sharded else _with_weights(model.path, dtype, device)
    loaded.eval().requires_grad_(False)
    _refuse_unusual(loaded, model.path)
    routing = Routing()
    spec = SlotSpec(lora.max_rank, inject(loaded, lora.target_modules, routing))
    trunk = Trunk(loaded.base_model, loaded.get_output_embeddings())
    if placement.compile_layers:
        compile_layers(trunk.body)
    if placement.activation_checkpointing:
        recompute_layers(trunk.body, routing)
    if sharded:
        shard(loaded, trunk, model.path, ranks, device)
    mark = fingerprint(loaded, ranks if sharded else Ranks.alone())
    return BaseModel(trunk, routing, spec, mark, loaded.config, device, dtype, ranks, sharded)


def _with_weights(path: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the base model {path!r}: {_first_line(error)}") from None
    return nn.Module.to(loaded, device)


def _without_weights(path: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """On the meta device, from config.json alone. dtype None: whichever."""
    wishes = {} if dtype is None else {"dtype": dtype, "attn_implementation": attention.NAME}
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **wishes)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot make out the base model {path!r}: {_first_line(error)}") from None


def slot_spec(path: str, lora: LoraConfig) -> SlotSpec:
    """The slots that a base would have, from its config.json alone: no weight is read. Raises ModelError."""
    _refuse_absent(path)
    model = _without_weights(path)
    _refuse_unusual(model, path)
    return SlotSpec(lora.max_rank, inject(model, lora.target_modules, Routing()))


def _refuse_absent(path: str) -> None:
    """What can only be a folder and is none is not asked for at a hub. Raises ModelError."""
    is_path = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if is_path and not Path(path).is_dir():
        raise ModelError(f"cannot load the base model: there is no folder {path!r}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def pick_device(name: str) -> torch.device:
    """A GPU comes with its number: the current one where the name has none. Raises ModelError where there is none."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f'model.device = "{name}": torch {torch.__version__} sees no GPU here')
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _agreed_dtype(name: str, device: torch.device, ranks: Ranks) -> torch.dtype:
    """Rank 0 decides for all: what is measured may differ. All ranks take part."""
    if name != "auto":
        return pick_dtype(name, device)
    if ranks.leads:
        ranks.tell(str(picked := pick_dtype(name, device)).removeprefix("torch."))
        return picked
    return pick_dtype(ranks.hear()[0], device)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU; on a CPU whichever multiplies faster, measured now."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type != "cpu":
        return torch.bfloat16
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def _matmul_seconds(dtype: torch.dtype) -> float:
    x = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - start)
    return best


def _refuse_unusual(model: PreTrainedModel, path: str) -> None:
    """What our forward pass does not reproduce must not be dropped in silence."""
    config = model.config
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ModelError(f"{path}: layers with a sliding attention window are not supported")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{path}: config.{name} = {getattr(config, name)} changes the head, which is not supported"
            )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"{path}: its head is {type(head).__name__}, expected a linear layer without bias")
