"""Small random models that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import BaseModel, load_base
from proofs.adapter_models import make_base


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers on disk: head size 16, 4 query heads, 2 key heads."""
    return make_base("qwen3", tmp_path_factory.mktemp("tiny"))


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders whose tests start processes first: else two test processes would end with one of them waiting alone."""
    items.sort(key=lambda item: item.path.parent.name not in ("integration", "distributed"))
