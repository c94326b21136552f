"""Loading and unloading: what gets into a slot, what is refused, and when a slot is free again."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import random_adapter

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import AdapterError, Damaged, MisfitAdapter
from graftwork.inference.engine import Engine
from graftwork.inference.lanes import Job
from graftwork.inference.requests import BadRequest, GenerationRequest, GenerationResult, UnknownModel
from graftwork.inference.scheduler import Scheduler
from graftwork.inference.shelf import Shelf, read_adapter
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


def names(engine: Engine) -> list[str]:
    return [model.name for model in engine.models()]


@contextmanager
def held_back(engine: Engine, steps: int = 0) -> Iterator[None]:
    """After so many steps requests stay where they are; adapters come and go."""
    step, left = engine._scheduler.step, steps

    def held() -> None:
        nonlocal left
        if left:
            left -= 1
            step()
        else:
            time.sleep(0.001)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._scheduler, "step", held)
        yield


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
    with held_back(engine):
        running = [engine.submit(GenerationRequest(name, [[3]], max_tokens=2, seed=0)) for name in ("one", "two")]
        with pytest.raises(BadRequest, match="all 2 adapter slots are taken: one, two"):
            engine.load("three", folder)
        with pytest.raises(BadRequest, match="one is loaded already"):
            engine.load("one", folder)
    for future in running:
        future.result(timeout=60)
    engine.unload("one")
    engine.load("three", folder)
    with pytest.raises(UnknownModel, match="'one' is not loaded"):
        engine.unload("one")
    with pytest.raises(UnknownModel):
        ask(engine, "one")
    assert names(engine) == ["base", "two", "three"]


def test_the_least_recently_used_adapter_makes_room(
    engine: Engine, adapter: Adapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = save(tmp_path / "a", adapter)
    engine.load("one", folder)
    engine.load("two", folder)
    ask(engine, "one")
    engine.load("three", folder)
    assert names(engine) == ["base", "one", "three"]
    assert "two makes room for three" in caplog.text
    with pytest.raises(UnknownModel, match="'two' is not loaded"):
        ask(engine, "two")
    engine.load("two", folder)
    assert names(engine) == ["base", "three", "two"]
    with pytest.raises(BadRequest, match="three is loaded already"):  # refused before anything makes room
        engine.load("three", folder)
    assert ask(engine, "three")[0] == "three"


@pytest.mark.parametrize("steps", [0, 2])
def test_an_adapter_that_a_request_uses_does_not_make_room(
    engine: Engine, adapter: Adapter, tmp_path: Path, steps: int
) -> None:
    """Whether the request still waits or is under way."""
    folder = save(tmp_path / "a", adapter)
    engine.load("one", folder)
    with held_back(engine, steps):
        running = engine.submit(GenerationRequest("one", [[3, 4]], max_tokens=8, seed=0))
        while engine._scheduler.lanes.count < min(steps, 1):
            time.sleep(0.001)
        engine.load("two", folder)
        engine.load("three", folder)
        assert names(engine) == ["base", "one", "three"]
    assert running.result(timeout=60).version == "one"


@pytest.mark.parametrize("leaves", ["unloaded", "makes room"])
def test_a_slot_that_is_used_again_holds_nothing_of_the_last_adapter(
    engine: Engine, tiny: BaseModel, adapter: Adapter, tmp_path: Path, leaves: str
) -> None:
    small = random_adapter(tiny.spec.shapes, 1, seed=9)
    one, two = save(tmp_path / "a", adapter), save(tmp_path / "b", small)
    engine.load("big", one)
    if leaves == "unloaded":
        engine.unload("big")
    else:
        engine.load("other", two)
    engine.load("small", two)
    assert "big" not in names(engine)
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


def test_a_prompt_that_was_kept_for_more_samples_leaves_with_its_adapter(
    tiny: BaseModel, adapter: Adapter, tmp_path: Path
) -> None:
    """A request is given up while the prompt that its samples share is kept, and others go on: the next adapter in the
    slot must not take up that prompt's keys and values."""
    folders = [save(tmp_path / "a", adapter), save(tmp_path / "b", random_adapter(tiny.spec.shapes, 2, seed=9))]
    first, second = (read_adapter(path.name, path, tiny.spec, tiny.fingerprint) for path in folders)

    def answer(leftovers: bool) -> GenerationResult:
        bank = tiny.new_bank(1, gradients=False)
        shelf = Shelf(bank, "base")
        scheduler = Scheduler(tiny, bank, max_sequences=8, max_model_len=128, eos_token_ids=[], decode=None)

        def add(model: str, **fields: Any) -> Future[GenerationResult]:
            source, future = shelf.find(model), Future[GenerationResult]()
            assert source is not None
            request = GenerationRequest(model, [[3, 4, 5]], **{"max_tokens": 20, **fields})
            scheduler.add(Job(request, source, future, 1))
            return future

        add("base", max_tokens=100)
        scheduler.step()
        if leftovers:
            shelf.put(first)
            given_up = add("a", n=16)
            scheduler.step()
            assert scheduler._prefix is not None
            given_up.cancel()
            scheduler.step()
            source = shelf.withdraw("a")
            assert source is not None
            scheduler.forget(source.slot)
            shelf.free(source)
        shelf.put(second)
        answered = add("b")
        while not answered.done():
            scheduler.step()
        return answered.result()

    (with_leftovers,), (expected,) = answer(True).choices, answer(False).choices
    assert with_leftovers.token_ids.tolist() == expected.token_ids.tolist()
    assert with_leftovers.logprobs.tolist() == pytest.approx(expected.logprobs.tolist(), abs=1e-4)
