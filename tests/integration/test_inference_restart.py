"""An orchestrator over a real inference server that is killed and started again: the run is the run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import random_adapter
from test_inference_server import BASE, RealServer
from test_orchestrator_fakes import FakeTrainer, make_run

from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import load_base
from graftwork.programs import orchestrator
from graftwork.rollouts.client import InferenceClient
from graftwork.store.layout import RunTree
from graftwork.store.queue import Version, publish_version, read_batch

TWO_TURNS = {"name": "test_orchestrator_fakes:TwoTurns"}


class AdapterTrainer(FakeTrainer):
    """Publishes adapters that the shipped base can serve: random, of a seed that depends on all batches so far."""

    def publish(self, step: int) -> None:
        batches = [batch[1] for k in range(1, step + 1) if (batch := read_batch(self.tree, k))]
        seed = int.from_bytes(hashlib.sha256(" ".join(batches).encode()).digest()[:4])
        adapter = random_adapter(shapes(), 8, seed=seed, size=0.05)
        version = Version(self.tree.id, step, adapter.digest())
        publish_version(self.disk, self.tree, version, write_peft(adapter, AdapterFacts()), {})
        self.versions.append(version.name)


@cache
def shapes() -> Mapping[str, tuple[int, ...]]:
    return load_base(ModelConfig(path=str(BASE), dtype="float32", device="cpu"), LoraConfig()).spec.shapes


class Servers:
    """One server at a time, all on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.count = folder, 0, 0
        self.start()
        self.url = self.server.wait_ready()
        self.port = int(self.url.rpartition(":")[2])

    def start(self) -> None:
        """Returns at once: the server takes its time to come up."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        self.server = RealServer(folder, self.port)

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.communicate()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    (tmp_path / "servers").mkdir()
    servers = Servers(tmp_path / "servers")
    yield servers
    servers.kill()


def files_of(tree: RunTree) -> dict[Path, bytes]:
    return {p.relative_to(tree.rollouts): p.read_bytes() for p in sorted(tree.rollouts.rglob("*")) if p.is_file()}


def run(folder: Path, url: str) -> RunTree:
    tree = make_run(folder, BASE, url, environment=TWO_TURNS, max_steps=3)
    with AdapterTrainer(tree, max_steps=3) as trainer:
        orchestrator.main(tree.root)
    assert [step for step, _ in trainer.seen] == [1, 2, 3]
    return tree


def test_a_server_that_goes_away_in_mid_run_changes_no_byte(
    tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(tmp_path / "a", servers.url)
    complete, asked = InferenceClient.complete, Counter[str]()

    async def disturbed(self: InferenceClient, model: str, *arguments: Any) -> Any:
        """The second turn of batch 2 is asked of a server that stands still and is killed then; that of batch 3 of one
        that was told to end."""
        version = model.partition("-")[0]
        asked[version] += 1
        if (version, asked[version]) == ("tiny@2", 2):
            servers.server.end(signal.SIGTERM)
            servers.start()
        if (version, asked[version]) != ("tiny@1", 2):
            return await complete(self, model, *arguments)
        os.kill(servers.server.process.pid, signal.SIGSTOP)
        asking = asyncio.create_task(complete(self, model, *arguments))
        await asyncio.sleep(0.3)  # so that the request is there; if it is not yet, the outcome is the same
        servers.kill()
        servers.start()
        return await asking

    monkeypatch.setattr(InferenceClient, "complete", disturbed)
    tree = run(tmp_path / "b", servers.url)
    assert files_of(tree) == files_of(undisturbed)
    assert tree.samples_jsonl.read_bytes() == undisturbed.samples_jsonl.read_bytes()
    assert asked["tiny@1"] >= 4 and asked["tiny@2"] >= 4
    assert servers.count == 3
    assert served(servers.url) == [str(BASE)]


def served(url: str) -> list[str]:
    async def ask() -> list[str]:
        async with InferenceClient(url, 60) as client:
            return await client.served_models()

    return asyncio.run(ask())
