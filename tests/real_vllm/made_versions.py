"""Versions of a run made as the trainer makes them, of made-up adapters; and what the trainer's own pass says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.adapters.source import AdapterFacts
from graftwork.config.section import ModelConfig
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Route
from graftwork.programs.serving import Serving
from graftwork.rollouts.client import InferenceClient
from graftwork.store.disk import Disk
from graftwork.store.files import json_line
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import Published, Version, publish_version
from graftwork.training.learner import Banks
from graftwork.training.probe import Prober, Probes
from proofs.made_up import random_adapter

T = TypeVar("T")

BASE = str(Path(__file__).parents[2] / "examples" / "reverse_text" / "base")
MODEL = ModelConfig(path=BASE, dtype="float32", device="cpu")
MAX_RANK, MAX_ADAPTERS, MAX_LENGTH = 8, 2, 256
START_SECONDS = 600.0
TOLERANCE = 0.03


@dataclass
class Bench:
    """Makes versions of a run as the trainer does, from made-up adapters, and knows what they say."""

    base: BaseModel
    banks: Banks
    prober: Prober
    tree: RunTree
    probes: Probes
    step: int = 0

    def adapter(self, seed: int, rank: int = 4, scale: float = 2.0, size: float = 0.12) -> Adapter:
        return random_adapter(self.base.spec.shapes, rank, scale=scale, seed=seed, size=size)

    def publish(self, adapter: Adapter) -> Published:
        """The next version of the run."""
        self.hold(adapter)
        version = Version(self.tree.id, self.step, adapter.digest())
        files = {name: [data] for name, data in self.files(adapter).items()}
        files["probe.json"] = [json_line(self.probes.of(version.digest, self.prober.of_slot(0))).encode()]
        published = publish_version(Disk(), self.tree, version, files, {"chain": "made up"})
        self.step += 1
        return published

    def files(self, adapter: Adapter) -> dict[str, bytes]:
        return write_peft(adapter, AdapterFacts(BASE, self.base.fingerprint))

    def hold(self, adapter: Adapter) -> None:
        """Put it into the slot that the questions below are about."""
        ranks = {pair.rank for pair in adapter.pairs.values()}
        self.banks.reset(0)
        alpha = max(ranks) * next(iter(adapter.pairs.values())).scale
        self.banks.training.write(0, PreparedInitAdapter(adapter, max(ranks), alpha, "", {}))

    def logprobs(self, adapter: Adapter | None, tokens: list[int], start: int, temperature: float = 1.0) -> np.ndarray:
        """Of tokens[start:], by the trainer's own forward pass."""
        segments = []
        if adapter is not None:
            self.hold(adapter)
            segments = [Segment(0, 0, len(tokens), self.banks.training.holding(0).scale)]
        rows = torch.arange(start - 1, len(tokens) - 1)
        ids = torch.tensor(tokens)
        ask = Ask(rows, ids[start:], temperature)
        plan, route = PackedPlan([Group(0, 1, len(tokens))]), Route(self.banks.training, segments)
        with torch.no_grad():
            [(found, _)] = self.base.logprobs(ids, torch.arange(len(tokens)), plan, route, [ask], 64)
        return found.numpy()


@dataclass
class Talk:
    """A client and a run's serving, for tests that are not async themselves: `talk(work)`."""

    url: str
    run: RunId

    def __call__(self, work: Callable[[InferenceClient, Serving], Awaitable[T]]) -> T:
        async def all_of_it() -> T:
            async with InferenceClient(self.url, 120) as client:
                await client.served_models()
                return await work(client, Serving(self.run, client, TOLERANCE))

        return asyncio.run(all_of_it())
