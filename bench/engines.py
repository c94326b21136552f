"""The embedded engine with made-up adapters in it, and what it is asked in the benchmarks of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.bases import adapter_for, save_adapter
from graftwork.inference.engine import Engine
from graftwork.inference.requests import GenerationRequest, GenerationResult
from graftwork.model.base import BaseModel

ADAPTERS = ("first", "second", "third", "fourth")
BASE_NAME = "base"


def save_all(base: BaseModel, root: Path) -> dict[str, Path]:
    """Four adapters of rank 16 on all linear layers: name -> folder."""
    return {name: save_adapter(adapter_for(base, seed), root / name) for seed, name in enumerate(ADAPTERS)}


def new_engine(base: BaseModel) -> Engine:
    """With room for the adapters; answers end at their own limit, and nowhere else."""
    return Engine(base, name=BASE_NAME, eos_token_ids=[], max_adapters=len(ADAPTERS))


def load_all(engine: Engine, folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        engine.load(name, folder)


def made_prompts(base: BaseModel, count: int, tokens: int) -> list[list[int]]:
    """Made up, [count][tokens]; no two alike, so that each has to be read."""
    return np.random.default_rng(0).integers(3, base.vocab_size, (count, tokens)).tolist()


def answered(engine: Engine, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
    """All at once, as many clients would ask."""
    futures = [engine.submit(request) for request in requests]
    return [future.result() for future in futures]


def tokens_in(results: Sequence[GenerationResult]) -> int:
    return sum(len(choice.token_ids) for result in results for choice in result.choices)
