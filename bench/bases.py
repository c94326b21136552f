"""Bases to measure on, and what a run learns from: made here, from a seed, so that nothing has to be downloaded.

Arithmetic does not depend on the weights' values, so that the larger bases have the shapes of published models and
random weights. The tiny base is the one of examples/reverse_text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.prepare import prepare
from graftwork.adapters.snapshot import Snapshot, snapshot_of
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.config.section import ALL_LINEAR, LoraConfig, ModelConfig
from graftwork.model.base import BaseModel, Placement, load_base
from graftwork.training.packer import Example

FOLDER = Path("outputs/bench/bases")
TINY = Path("examples/reverse_text/base")
RANK = 16

_qwen3 = partial(
    Qwen3Config, vocab_size=151936, num_hidden_layers=28, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
    max_position_embeddings=40960, tie_word_embeddings=True,
)  # fmt: skip
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ),
    "qwen3-0.6b": lambda: _qwen3(hidden_size=1024, intermediate_size=3072, num_attention_heads=16),
    "qwen3-4b": lambda: _qwen3(
        hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_hidden_layers=36
    ),
}  # fmt: skip


def base_folder(name: str) -> Path:
    """A folder that transformers loads, bfloat16; made once."""
    out = FOLDER / name
    if not (out / "config.json").is_file():
        torch.manual_seed(0)
        config = SHAPES[name]()
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        staged = out.parent / f".{name}-unfinished"
        model.save_pretrained(staged)
        staged.rename(out)
    return out


def load(path: Path, device: torch.device, dtype: str = "auto", *, rank: int = RANK, **placement: bool) -> BaseModel:
    """The base with slots of `rank` on all linear layers. dtype auto: the faster one."""
    config = ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": str(device)})
    return load_base(config, LoraConfig(max_rank=rank, target_modules=ALL_LINEAR), Placement(**placement))


def adapter_for(base: BaseModel, seed: int = 0, rank: int | None = None) -> Adapter:
    """Small random factors of every module, alpha twice the rank: neither A nor B is zero, so that no gradient is."""
    rank = rank or base.spec.max_rank
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    pairs = {
        path: LoraPair(factor(*experts, rank, in_features), factor(*experts, out_features, rank), 2.0)
        for path, (*experts, out_features, in_features) in base.spec.shapes.items()
    }
    return Adapter(pairs)


def save_adapter(adapter: Adapter, folder: Path) -> Path:
    """As a new folder that PEFT loads too."""
    folder.mkdir(parents=True)
    for name, data in write_peft(adapter, AdapterFacts()).items():
        (folder / name).write_bytes(data)
    return folder


def start_of(base: BaseModel, adapter: Adapter) -> Snapshot:
    """A run that begins with `adapter`."""
    return snapshot_of(prepare(InMemory(adapter), base.spec), base.fingerprint)


def answers(
    base: BaseModel, sequences: int, prompt_tokens: int, answer_tokens: int, *, group: int = 1, seed: int = 0
) -> list[Example]:
    """Made-up rollouts: `group` answers share a prompt; the loss is on the answers' tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(sequences):
        if index % group == 0:
            prompt = rng.integers(3, base.vocab_size, prompt_tokens)
        tokens = np.concatenate([prompt, rng.integers(3, base.vocab_size, answer_tokens)]).astype(np.int32)
        mask = np.arange(len(tokens)) >= prompt_tokens
        sampled = np.full(len(tokens), -np.log(base.vocab_size), np.float32)
        made.append(Example(tokens, mask, sampled, float(rng.normal())))
    return made
