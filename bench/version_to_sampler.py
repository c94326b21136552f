"""How long after a version is published does the sampler serve it, beyond reading the file?

The real server (`graftwork inference`, a process of its own) and the project's client, on the tiny base. A round
publishes a version as the trainer does; from then on the clock runs until the first answer of that version is there:
the client asks for the load, the server reads, checks and holds the adapter, and answers a request. Taken off are what
reading and checking the folder takes by itself, and the same request once the version is there. The ratio is what
remains over 20 ms.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from bench.bases import TINY, adapter_for, load
from bench.harness import Measured, Ratio, Setting, at_most, main, medians
from graftwork.adapters.formats.peft_write import peft_files
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import SamplingConfig
from graftwork.config.section import ALL_LINEAR
from graftwork.inference.shelf import read_adapter
from graftwork.model.base import BaseModel
from graftwork.rollouts.client import InferenceClient
from graftwork.store.disk import Disk
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import Published, Version, publish_version

ROW, NAME = 11, "version_to_sampler"
BAR_SECONDS = 0.020
START_SECONDS = 120
PROMPT = [[5, 6, 7, 8]]
SAMPLING = SamplingConfig(max_tokens=1)


@dataclass(frozen=True)
class Round:
    """Seconds. first: from published to the first answer; again: the same request once more; reading: the file."""

    publishing: float
    first: float
    again: float
    reading: float

    @property
    def beyond(self) -> float:
        return self.first - self.again - self.reading


def measure(setting: Setting) -> Iterator[Measured]:
    base = load(TINY, setting.device)
    with tempfile.TemporaryDirectory() as root, _server(base, Path(root)) as url:
        rounds = asyncio.run(_rounds(base, Path(root), url, 3 if setting.quick else 25))
    ratio = Ratio.of([each.beyond for each in rounds], [BAR_SECONDS] * len(rounds))
    columns = ("publishing", "first", "again", "reading", "beyond")
    seconds = medians({name: [getattr(each, name) for each in rounds] for name in columns})
    milliseconds = {name: round(1000 * took, 2) for name, took in seconds.items()}
    yield Measured(
        ROW, NAME, ratio.median, at_most(1.0),
        {**ratio.figures(), "milliseconds": milliseconds, "bar_milliseconds": 1000 * BAR_SECONDS},
    )  # fmt: skip


async def _rounds(base: BaseModel, root: Path, url: str, count: int) -> list[Round]:
    async with InferenceClient(url, 60) as client:
        await _round(base, root, client, 0)  # the first time everything is slow
        return [await _round(base, root, client, step) for step in range(1, count + 1)]


async def _round(base: BaseModel, root: Path, client: InferenceClient, step: int) -> Round:
    began = time.perf_counter()
    published = _publish(base, root, step)
    visible = time.perf_counter()
    await client.load_adapter(published.version, published.path)
    await _ask(client, published)
    served = time.perf_counter()
    await _ask(client, published)
    asked_again = time.perf_counter()
    read_adapter(published.version.name, published.path, base.spec, base.fingerprint)
    read = time.perf_counter()
    await client.unload_adapter(published.version.name)
    return Round(visible - began, served - visible, asked_again - served, read - asked_again)


async def _ask(client: InferenceClient, published: Published) -> None:
    [answer] = await client.complete(published.version.name, PROMPT, 1, SAMPLING, seed=0)
    assert answer.digest == published.version.digest, "another adapter answered"


def _publish(base: BaseModel, root: Path, step: int) -> Published:
    """As the trainer publishes, its rank 16 on all linear layers."""
    adapter, run = adapter_for(base, step), RunId("bench")
    version = Version(run, step, adapter.digest())
    facts = AdapterFacts(base_fingerprint=base.fingerprint)
    return publish_version(Disk(), RunTree(run, root / "run_bench"), version, peft_files(adapter, facts), {})


@contextmanager
def _server(base: BaseModel, root: Path) -> Iterator[str]:
    """Its address, once it answers."""
    ready = root / "ready.json"
    settings = {
        "port": 0, "ready_file": str(ready), "model": {"path": str(TINY), "device": str(base.device)},
        "lora": {"max_rank": base.spec.max_rank, "target_modules": list(ALL_LINEAR)},
    }  # fmt: skip
    (root / "inference.toml").write_text(tomli_w.dumps(settings))
    command = [sys.executable, "-m", "graftwork", "inference", str(root / "inference.toml")]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            assert server.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.05)
        yield json.loads(ready.read_text())["url"]
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
