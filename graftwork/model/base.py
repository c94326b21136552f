"""Load the frozen base with transformers and put slots into it (model/inject.py)."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from graftwork.adapters.prepare import SlotSpec
from graftwork.config.schema import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.slots import SlotBank
from graftwork.model import attention
from graftwork.model.attention import AttentionPlan
from graftwork.model.inject import Route, Routing, inject

FINGERPRINT_SAMPLES = 4096  # numbers of each tensor that go into the fingerprint
ARCHITECTURE = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


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
        return SlotBank(self.spec, slots, device=self.device, dtype=self.dtype, gradients=gradients)

    def hidden(self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route) -> Tensor:
        """Last hidden states [T, H] for token ids [T] at positions [T] int64; the plan and the route cover all rows."""
        with self.routing.using(route):
            output = self.body(input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=plan)
        return output.last_hidden_state[0]


def load_base(model: ModelConfig, lora: LoraConfig) -> BaseModel:
    """Raises ModelError, naming the folder or the module that stands in the way."""
    _refuse_absent(model.path)
    attention.register()
    disable_progress_bar()
    device = pick_device(model.device)
    dtype = pick_dtype(model.dtype, device)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype, attn_implementation=attention.NAME)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the base model {model.path!r}: {_first_line(error)}") from None
    nn.Module.to(loaded, device).eval().requires_grad_(False)
    _refuse_unusual(loaded, model.path)
    fingerprint = _fingerprint(loaded)
    routing = Routing()
    spec = SlotSpec(lora.max_rank, inject(loaded, lora.target_modules, routing))
    head = loaded.get_output_embeddings().weight
    return BaseModel(loaded.base_model, head, routing, spec, fingerprint, loaded.config)


def slot_spec(path: str, lora: LoraConfig) -> SlotSpec:
    """The slots that a base would have, from its config.json alone: no weight is read. Raises ModelError."""
    _refuse_absent(path)
    try:
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot make out the base model {path!r}: {_first_line(error)}") from None
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
