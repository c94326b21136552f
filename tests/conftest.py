"""Small random models that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import VOCAB
from transformers import Qwen3Config, Qwen3ForCausalLM

from graftwork.config.schema import LoraConfig, ModelConfig
from graftwork.model.base import BaseModel, load_base
from proofs.adapter_models import make_base


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers on disk: head size 16, 4 query heads, 2 key heads."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("tiny") / "base"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_model_config(tiny_path: Path) -> ModelConfig:
    return ModelConfig(path=str(tiny_path), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny(tiny_model_config: ModelConfig) -> BaseModel:
    """The tiny base with slots of rank 4 at most. Banks are made by each test, so nothing leaks between them."""
    torch.set_num_threads(1)
    return load_base(tiny_model_config, LoraConfig(max_rank=4))


@pytest.fixture(scope="session")
def moe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers, 12 experts each, 3 of them a token."""
    return make_base("moe", tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session")
def moe_model_config(moe_path: Path) -> ModelConfig:
    return ModelConfig(path=str(moe_path), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def moe(moe_model_config: ModelConfig) -> BaseModel:
    """The same with slots of rank 4 at most, for attention and experts."""
    torch.set_num_threads(1)
    return load_base(moe_model_config, LoraConfig(max_rank=4))
