"""Small random models and the adapters that PEFT itself makes for them: what the proof of imports is told against.

Nothing here imports Graftwork's adapters: sources come from PEFT or are written by hand with the safetensors library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 64
EXPERTS, PER_TOKEN, MIDDLE, HIDDEN = 12, 3, 24, 32
ROUTER_MARGIN = 1e-4
SIZE = 0.25
"""Standard deviation of random factors: the adapter's effect on the logits is of the logits' own size."""

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERT_SHAPE: dict[str, Any] = {
    "num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "moe_intermediate_size": MIDDLE, "norm_topk_prob": True,
}  # fmt: skip
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True),
    "phi3": lambda: Phi3Config(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERT_SHAPE, head_dim=16),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def make_base(name: str, folder: Path, seed: int = 0) -> Path:
    """A random model of a kind, on disk, with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / name)
    return folder / name


def load(base: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """In float64 the experts run one after the other: grouped products have no float64."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, experts_implementation="eager").eval()


def randomise(model: torch.nn.Module, seed: int, which: str = "lora_") -> None:
    """Give every factor numbers: PEFT starts B at zero, and such an adapter would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if which in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SIZE)


def save_with_peft(base: Path, folder: Path, seed: int = 1, which: str = "lora_", **config: Any) -> Path:
    """An adapter that PEFT made and saved."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(load(base, torch.float32), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    randomise(wrapped, seed, which)
    wrapped.save_pretrained(folder)
    return folder


def save_experts(folder: Path, *, rank: int, alpha: float, seed: int = 1, layers: int = 2, **fields: Any) -> Path:
    """An adapter of single experts and of the attention, one tensor an expert, written by hand: PEFT on transformers 5
    loads such files and makes none."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = {"gate_proj": (MIDDLE, HIDDEN), "up_proj": (MIDDLE, HIDDEN), "down_proj": (HIDDEN, MIDDLE)}
    modules = {f"mlp.experts.{expert}.{part}": shape for expert in range(EXPERTS) for part, shape in shapes.items()}
    modules |= {"self_attn.q_proj": (64, HIDDEN), "self_attn.o_proj": (HIDDEN, 64)}
    for layer in range(layers):
        for path, (out, width) in modules.items():
            name = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * SIZE
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * SIZE
    targets = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **fields}
    return write(folder, tensors, config)


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    return folder


def rewritten(
    source: Path, folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
) -> Path:
    """The same adapter in another file: `change` gets tensors and configuration, and returns tensors."""
    config = json.loads((source / "adapter_config.json").read_text())
    tensors = change(load_file(source / "adapter_model.safetensors"), config)
    return write(folder, tensors, config)


# --- logits -----------------------------------------------------------------------------------------------------------


def sequences(seed: int = 0, count: int = 8, length: int = 12) -> Tensor:
    """Random token ids [count, length]."""
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(base: Path, adapter: Path | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """PEFT's own forward in float64: ([count, length, vocab], which sequences keep clear of the routers' edges).

    A token whose k-th and next best expert are nearly equal may go to either by rounding; its whole sequence is left
    out, for others attend to it.
    """
    model: Any = load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).to(torch.float64).eval()
    margins: list[Tensor] = []
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda m, _, out: margins.append(_margins(out[0], m.top_k)))
    found = model(tokens).logits
    clear = torch.ones(len(tokens), dtype=torch.bool)
    for margin in margins:
        clear &= margin.view(tokens.shape).min(dim=1).values >= ROUTER_MARGIN
    return found, clear


def _margins(router_logits: Tensor, chosen: int) -> Tensor:
    best = router_logits.softmax(-1, dtype=torch.float64).topk(chosen + 1).values
    return best[..., chosen - 1] - best[..., chosen]
