"""Loading and unloading: what gets into a slot, what is refused, and when a slot is free again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import random_adapter

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import AdapterError, Damaged, MisfitAdapter
from graftwork.inference.engine import Engine
from graftwork.inference.requests import BadRequest, GenerationRequest, UnknownModel
from graftwork.model.base import BaseModel
from graftwork.store.disk import Disk
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import Version, publish_version

RUN = RunId("r")


@pytest.fixture
def engine(tiny: BaseModel) -> Iterator[Engine]:
    with Engine(tiny, name="base", eos_token_ids=[], max_adapters=2, max_sequences=8, max_model_len=128) as engine:
        yield engine


@pytest.fixture
def adapter(tiny: BaseModel) -> Adapter:
    return random_adapter(tiny.spec.shapes, 4, seed=5)


def save(folder: Path, adapter: Adapter, facts: AdapterFacts | None = None) -> Path:
    folder.mkdir()
    for name, data in write_peft(adapter, facts or AdapterFacts()).items():
        (folder / name).write_bytes(data)
    return folder


def publish(root: Path, adapter: Adapter, step: int = 3) -> tuple[Version, Path]:
    version = Version(RUN, step, adapter.digest())
    tree = RunTree(RUN, root / "run_r")
    return version, publish_version(Disk(), tree, version, write_peft(adapter, AdapterFacts()), {}).path


def ask(engine: Engine, model: str) -> tuple[str, str | None]:
    result = engine.submit(GenerationRequest(model, [[3, 4]], max_tokens=2, seed=0)).result(timeout=60)
    return result.version, result.digest


def test_a_version_answers_with_its_name_and_digest(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    version, folder = publish(tmp_path, adapter)
    assert engine.load(version.name, folder).digest == version.digest
    assert ask(engine, version.name) == (version.name, version.digest)
    assert ask(engine, "base") == ("base", None)
    assert [(model.name, model.path) for model in engine.models()] == [("base", None), (version.name, folder)]


def test_a_name_that_says_another_digest_is_refused(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", adapter)
    name = f"r@3-{'0' * 8}"
    with pytest.raises(BadRequest, match=f"says digest 00000000, the adapter in .* has {adapter.digest()[:8]}"):
        engine.load(name, folder)
    assert len(engine.models()) == 1


def test_damaged_files_are_refused(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    version, folder = publish(tmp_path, adapter)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"adapter_model\.safetensors has sha256"):
        engine.load(version.name, folder)


def test_a_manifest_that_names_another_digest_is_refused(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    with Disk().publish_dir(tmp_path / "w", "weight", {"digest": "f" * 64}) as staging:
        for name, data in write_peft(adapter, AdapterFacts()).items():
            staging.write(name, data)
    with pytest.raises(BadRequest, match="manifest says digest ffffffff"):
        engine.load("w", tmp_path / "w")


def test_what_is_no_adapter_for_this_base_is_refused(engine: Engine, tiny: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="there is no folder"):
        engine.load("x", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        engine.load("x", tmp_path / "empty")
    wide = {path: (out + 1, into) for path, (out, into) in tiny.spec.shapes.items()}
    with pytest.raises(MisfitAdapter):
        engine.load("x", save(tmp_path / "wide", random_adapter(wide, 4)))
    with pytest.raises(MisfitAdapter):
        engine.load("x", save(tmp_path / "rank", random_adapter(tiny.spec.shapes, 5)))
    other = AdapterFacts(base_fingerprint="a" * 64)
    with pytest.raises(MisfitAdapter, match="trained on the base with fingerprint aaaaaaaa"):
        engine.load("x", save(tmp_path / "other", random_adapter(tiny.spec.shapes, 4), other))
    with pytest.raises(BadRequest, match="printable"):
        engine.load("a\nb", tmp_path / "rank")
    assert len(engine.models()) == 1


def test_names_and_slots_run_out_with_a_reason(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", adapter)
    engine.load("one", folder)
    for name in ("one", "base"):
        with pytest.raises(BadRequest, match=f"{name} is loaded already"):
            engine.load(name, folder)
    engine.load("two", folder)
    with pytest.raises(BadRequest, match="all 2 adapter slots are taken: one, two"):
        engine.load("three", folder)
    engine.unload("one")
    engine.load("three", folder)
    with pytest.raises(UnknownModel, match="'one' is not loaded"):
        engine.unload("one")
    with pytest.raises(UnknownModel):
        ask(engine, "one")


def test_a_slot_that_is_used_again_holds_nothing_of_the_last_adapter(
    engine: Engine, tiny: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    small = random_adapter(tiny.spec.shapes, 1, seed=9)
    one, two = save(tmp_path / "a", adapter), save(tmp_path / "b", small)
    engine.load("big", one)
    engine.unload("big")
    engine.load("small", two)
    request = GenerationRequest("small", [[3, 4, 5]], n=4, max_tokens=10, seed=1)
    reused = engine.submit(request).result(timeout=60)
    with Engine(tiny, name="base", eos_token_ids=[], max_adapters=2, max_sequences=8, max_model_len=128) as fresh:
        fresh.load("small", two)
        expected = fresh.submit(request).result(timeout=60)
    for choice, twin in zip(reused.choices, expected.choices, strict=True):
        assert choice.token_ids.tolist() == twin.token_ids.tolist()
        assert choice.logprobs.tolist() == twin.logprobs.tolist()


def test_unloading_waits_for_requests_under_way(engine: Engine, adapter: Adapter, tmp_path: Path) -> None:
    engine.load("one", save(tmp_path / "a", adapter))
    running = engine.submit(GenerationRequest("one", [[3, 4]], n=8, max_tokens=100, seed=0))
    unloading = threading.Thread(target=engine.unload, args=["one"])
    unloading.start()
    while len(engine.models()) > 1:
        time.sleep(0.001)
    assert not running.done()
    with pytest.raises(UnknownModel):
        ask(engine, "one")
    result = running.result(timeout=60)
    assert (result.version, result.digest) == ("one", adapter.digest())
    unloading.join(timeout=60)
    assert not unloading.is_alive()
    assert engine._shelf.bank.free_slot() == 0
