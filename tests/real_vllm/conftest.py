"""The real vLLM, one server for all tests, started as `graftwork rl --inference vllm` starts it: `make test-vllm`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_versions import BASE, MAX_ADAPTERS, MAX_LENGTH, MAX_RANK, MODEL, START_SECONDS, Bench, Talk

from graftwork.config.load import dump
from graftwork.config.schema import InferenceConfig, VllmSection
from graftwork.config.section import LoraConfig
from graftwork.model.base import BaseModel, load_base
from graftwork.programs.serving import Serving
from graftwork.programs.start import said_by
from graftwork.rollouts.client import InferenceClient
from graftwork.store.layout import OutputTree, RunId
from graftwork.training.learner import Banks
from graftwork.training.probe import Prober, Probes

PYTHON = os.environ.get("GRAFTWORK_VLLM_PYTHON")
"""The interpreter of an environment with vLLM. Without it there is nothing to test here."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.timeout(2 * START_SECONDS))
        if PYTHON is None:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: `make test-vllm`"))


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`graftwork inference` with vLLM, up and well: the process and its URL."""
    ready, settings, log = folder / "ready.json", folder / "inference.toml", folder / "inference.log"
    vllm = VllmSection(python=PYTHON, start_timeout_seconds=START_SECONDS)
    config = InferenceConfig(
        model=MODEL, lora=LoraConfig(max_rank=MAX_RANK), engine="vllm", vllm=vllm, port=0, ready_file=str(ready),
        max_adapters=MAX_ADAPTERS, max_model_len=MAX_LENGTH, max_sequences=32, threads=1,
    )  # fmt: skip
    settings.write_bytes(dump(config))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "graftwork", "inference", str(settings)], stdout=out, stderr=out
        )
    deadline = time.monotonic() + START_SECONDS
    while (said := said_by(ready, process.pid)) is None:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)
    return process, str(said["url"])


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start_server(tmp_path_factory.mktemp("vllm"))
    yield url
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="session")
def base() -> BaseModel:
    torch.set_num_threads(1)
    return load_base(MODEL, LoraConfig(max_rank=MAX_RANK))


@pytest.fixture
def bench(base: BaseModel, tmp_path: Path) -> Bench:
    banks = Banks.of(base, 1)
    prober = Prober(base, banks.training)
    # A run of its own: no name and no path comes twice, whatever the tests' order.
    tree = OutputTree(tmp_path).run(RunId.parse(f"t{time.time_ns()}"))
    tree.broadcasts.mkdir(parents=True)
    return Bench(base, banks, prober, tree, Probes(prober.prompt, prober.bare))


@pytest.fixture
def talk(url: str, bench: Bench) -> Iterator[Talk]:
    yield Talk(url, bench.tree.id)

    async def clear(client: InferenceClient, serving: Serving) -> None:
        """Whatever a test left behind is gone for the next."""
        for name in await client.served_models():
            if name != BASE:
                await client.unload_adapter(name)

    Talk(url, bench.tree.id)(clear)
