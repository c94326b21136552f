"""Load the frozen base with transformers and put slots into its linear layers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from graftwork.adapters.prepare import SlotSpec
from graftwork.config.schema import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.linear import Segment, slot_linear
from graftwork.lora.slots import SlotBank
from graftwork.model import attention
from graftwork.model.attention import AttentionPlan

FINGERPRINT_SAMPLES = 4096  # numbers of each tensor that go into the fingerprint
ARCHITECTURE = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


@dataclass(frozen=True)
class Route:
    """Which rows of a forward pass belong to which slot of which bank."""

    bank: SlotBank
    segments: Sequence[Segment]


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


class SlotLinear(nn.Module):
    """A frozen linear layer of the base that adds, row by row, what the route says. It holds no adapter weights."""

    def __init__(self, path: str, base: nn.Linear, routing: Routing) -> None:
        super().__init__()
        self.path, self.routing = path, routing
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        route = self.routing.current
        assert route is not None, "the base is called through BaseModel.hidden"
        rows = x.reshape(-1, x.shape[-1])
        factors = route.bank.factors[self.path]
        y = slot_linear(rows, self.weight, self.bias, factors, route.segments, route.bank.anchor)
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class BaseModel:
    """The frozen base with slots.

    body         transformers' decoder without its head
    head         [V, H]
    spec         the slots' modules and shapes
    fingerprint  identifies the base's configuration and weights; not a proof against forgery
    """

    body: nn.Module
    head: Tensor
    routing: Routing
    spec: SlotSpec
    fingerprint: str
    config: Any

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    @property
    def vocab_size(self) -> int:
        return self.head.shape[0]

    @property
    def max_positions(self) -> int:
        return int(self.config.max_position_embeddings)

    def new_bank(self, slots: int, *, gradients: bool) -> SlotBank:
        return SlotBank(self.spec, slots, device=self.device, dtype=self.dtype, gradients=gradients)

    def hidden(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route) -> Tensor:
        """Last hidden states [T, H] for token ids [T] at positions [T] int64; the plan and the route cover all rows."""
        with self.routing.using(route):
            output = self.body(input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=plan)
        return output.last_hidden_state[0]


def load_base(model: ModelConfig, lora: LoraConfig) -> BaseModel:
    """Raises ModelError, naming the folder or the module that stands in the way."""
    attention.register()
    disable_progress_bar()
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the base model {model.path!r}: {str(error).strip().splitlines()[0]}") from None
    nn.Module.to(loaded, device).eval().requires_grad_(False)
    _refuse_unusual(loaded, model.path)
    fingerprint = _fingerprint(loaded)
    routing = Routing()
    shapes = _inject(loaded, lora.target_modules, routing)
    spec = SlotSpec(lora.max_rank, shapes)
    head = loaded.get_output_embeddings().weight
    return BaseModel(loaded.base_model, head, routing, spec, fingerprint, loaded.config)


def pick_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def _inject(model: PreTrainedModel, targets: Sequence[str], routing: Routing) -> dict[str, tuple[int, int]]:
    """Replace every target layer; return module path -> (out, in). Raises ModelError if a target name finds none."""
    shapes: dict[str, tuple[int, int]] = {}
    found: set[str] = set()
    for path, module in list(model.named_modules()):
        parent_path, _, name = path.rpartition(".")
        if name not in targets or not isinstance(module, nn.Linear):
            continue
        setattr(model.get_submodule(parent_path), name, SlotLinear(path, module, routing))
        shapes[path] = (module.out_features, module.in_features)
        found.add(name)
    if missing := sorted(set(targets) - found):
        linear = sorted(
            {p.rpartition(".")[2] for p, m in model.named_modules() if isinstance(m, nn.Linear | SlotLinear)}
        )
        raise ModelError(
            f"{type(model).__name__} has no linear layer named {', '.join(missing)}; it has {', '.join(linear)}"
        )
    return shapes


def _fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the architecture's numbers and evenly spaced elements of every tensor: cheap for any size, and the
    same whether the base was loaded in float32 or bfloat16."""
    digest = hashlib.sha256(json.dumps({k: getattr(model.config, k, None) for k in ARCHITECTURE}).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
