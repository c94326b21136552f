"""Telling one adapter from another by what it says next: the trainer's half and the orchestrator's."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.errors import Damaged, InferenceError, Refused, WrongAdapter
from graftwork.model.base import BaseModel
from graftwork.programs.serving import Serving
from graftwork.rollouts.probe import Probe, judge, refuse_raw_logprobs
from graftwork.store.layout import RunId
from graftwork.store.queue import Published, Version
from graftwork.training.learner import Banks
from graftwork.training.probe import CANDIDATES, Prober, Probes, probe_prompt
from proofs.made_up import random_adapter

TOKENS = tuple(range(8))
THIS, BEFORE, BARE = (tuple(-1.0 - 0.1 * i + shift for i in range(8)) for shift in (0.0, -0.4, -2.0))


def probe(**changes: Any) -> Probe:
    lists = {"version": THIS, "previous": BEFORE, "base": BARE, **changes}
    return Probe((1, 2, 3), TOKENS, **lists)


def says(values: tuple[float, ...], noise: float = 0.0) -> dict[int, float]:
    """What a server answers that holds the adapter with these log-probs: and less likely tokens."""
    return {**dict(zip(TOKENS, (v + noise for v in values), strict=True)), 50: -9.0, 51: -9.5}


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_server_that_agrees_with_this_version_and_no_other_is_verified() -> None:
    finding = judge(probe(), says(THIS, 0.02), 0.03)
    assert finding.outcome == "verified"
    assert finding.gap == pytest.approx(0.02)
    assert (finding.previous_gap, finding.base_gap) == (pytest.approx(0.4), pytest.approx(2.0))
    assert str(finding) == (
        "verified: within 0.0200 (tolerance 0.03); the version before is 0.4000 from it; the base is 2.0000 from it"
    )


@pytest.mark.parametrize("alike", ["previous", "base"])
def test_where_another_is_too_much_like_it_nothing_is_decided(alike: str) -> None:
    near = tuple(value + 0.05 for value in THIS)
    assert judge(probe(**{alike: near}), says(THIS), 0.03).outcome == "undecided"
    far = tuple(value + 0.07 for value in THIS)
    assert judge(probe(**{alike: far}), says(THIS), 0.03).outcome == "verified"


def test_the_first_version_has_none_before_it() -> None:
    assert judge(probe(previous=None), says(THIS), 0.03).outcome == "verified"


def test_numbers_that_the_trainer_does_not_have_decide_nothing() -> None:
    assert judge(probe(version=None), says(BARE), 0.03).outcome == "undecided"
    assert judge(probe(base=None), says(THIS), 0.03).outcome == "undecided"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (BEFORE, "it answers as the version before does"),
        (BARE, "it answers as the bare base does"),
        (tuple(-5.0 for _ in TOKENS), "as neither the version before nor the bare base do"),
    ],
)
def test_a_server_that_does_not_agree_is_refused_and_told_what_it_is_like(held: tuple[float, ...], words: str) -> None:
    with pytest.raises(WrongAdapter, match=words):
        judge(probe(), says(held), 0.03)


def test_a_token_that_the_server_did_not_name_is_less_likely_to_it_than_those_that_it_did() -> None:
    served = says(THIS)
    del served[7]
    with pytest.raises(WrongAdapter):  # to this version, 7 is far likelier than what the server did name
        judge(probe(), served, 0.03)
    rare = (*THIS[:7], -20.0)
    assert judge(probe(version=rare), {k: v for k, v in says(rare).items() if k != 7}, 0.03).outcome == "verified"


@given(
    st.lists(st.floats(-10, 0), min_size=8, max_size=8), st.lists(st.floats(-10, 0), min_size=8, max_size=8),
    st.lists(st.floats(-0.03, 0.03), min_size=8, max_size=8),
)  # fmt: skip
def test_verified_means_that_no_other_adapter_could_have_answered_so(
    this: list[float], other: list[float], noise: list[float]
) -> None:
    """Whoever is within the tolerance of what the server said cannot be the other one."""
    served = dict(zip(TOKENS, (t + n for t, n in zip(this, noise, strict=True)), strict=True))
    finding = judge(probe(version=tuple(this), previous=tuple(other)), served, 0.0301)
    if finding.outcome == "verified":
        assert max(abs(served[i] - other[i]) for i in TOKENS) > 0.0301


def test_log_probs_that_leave_the_temperature_out_are_refused() -> None:
    plain = says(THIS)
    sharp = {token: 2 * value + 0.7 for token, value in plain.items()}
    refuse_raw_logprobs(plain, sharp, 0.5)
    with pytest.raises(InferenceError, match="processed_logprobs"):
        refuse_raw_logprobs(plain, plain, 0.5)
    refuse_raw_logprobs({1: -1.0, 2: -1.1}, {1: -1.0, 2: -1.1}, 0.5)  # too near to say


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_the_trainer_writes_is_what_the_orchestrator_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bare, first, second = (np.log(rng.dirichlet(np.ones(30))).astype(np.float32) for _ in range(3))
    probes = Probes([4, 5], bare)
    written = [probes.of("a", first), probes.of("b", second), probes.of("b", second)]
    assert written[0]["previous"] is None
    assert written[1] == written[2], "a version that was skipped is compared with the last one that differed"
    (tmp_path / "probe.json").write_text(json.dumps(written[1]))
    read = Probe.read(tmp_path)
    assert read is not None
    best = np.argsort(-second, kind="stable")[:CANDIDATES]
    assert (read.prompt, read.tokens) == ((4, 5), tuple(best.tolist()))
    assert read.version == tuple(second[best].tolist())
    assert read.previous == tuple(first[best].tolist())
    assert read.base == tuple(bare[best].tolist())


def test_numbers_that_are_not_finite_are_not_written() -> None:
    bare = np.zeros(30, np.float32)
    assert Probes([1], bare).of("a", np.full(30, math.nan, np.float32))["version"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []}, {"tokens": []}, {"tokens": [-1]}, {"version": [0.0]}, {"base": "x"}, {"previous": ["x"] * 8},
        {"version": 3}, {"prompt": None}, {"tokens": 7},
    ],
)  # fmt: skip
def test_a_file_that_is_no_probe_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    good = {"prompt": [1], "tokens": list(TOKENS), "version": list(THIS), "previous": None, "base": list(BARE)}
    (tmp_path / "probe.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(Damaged, match=r"probe\.json is not a probe"):
        Probe.read(tmp_path)


# --- the trainer's numbers --------------------------------------------------------------------------------------------


def test_the_prompt_is_longer_than_a_block_of_a_prefix_cache_and_always_the_same() -> None:
    prompt = probe_prompt(50_000, 4096)
    assert len(prompt) > 128 and prompt == probe_prompt(50_000, 2048)
    assert max(probe_prompt(64, 4096)) < 64
    assert len(probe_prompt(64, 100)) < 100


def test_a_slot_says_what_its_adapter_says_and_the_base_what_no_adapter_says(tiny: BaseModel) -> None:
    banks = Banks.of(tiny, 2)
    prober = Prober(tiny, banks.training)
    one, other = (random_adapter(tiny.spec.shapes, 4, seed=seed) for seed in (1, 2))
    for slot, adapter in ((0, one), (1, other)):
        banks.training.write(slot, PreparedInitAdapter(adapter, 4, 8.0, "", {}))
    said = [prober.of_slot(slot) for slot in (0, 1)]
    assert np.exp(said[0].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    gaps = [np.abs(a - b).max() for a, b in ((said[0], said[1]), (said[0], prober.bare), (said[1], prober.bare))]
    assert min(gaps) > 0.1
    assert (prober.of_slot(0) == said[0]).all(), "to the bit"


# --- the orchestrator's use of it -------------------------------------------------------------------------------------


class FakeVllm:
    """Holds adapters by name: what each says. `disk`: what a load from a path brings."""

    url, is_vllm = "http://fake", True

    def __init__(self, disk: dict[Path, tuple[float, ...]]) -> None:
        self.disk, self.held = disk, dict[str, tuple[float, ...]]()
        self.calls: list[str] = []

    async def load_adapter(self, version: Version, path: Path) -> None:
        if version.name in self.held:
            raise Refused("already loaded")
        self.held[version.name] = self.disk[path]
        self.calls.append("load")

    async def unload_adapter(self, name: str) -> None:
        self.held.pop(name, None)
        self.calls.append("unload")

    async def served_models(self) -> list[str]:
        return ["base", *self.held]

    async def next_tokens(
        self, model: str, prompt: tuple[int, ...], count: int, temperature: float = 1.0
    ) -> dict[int, float]:
        if temperature != 1:
            return {token: value / temperature for token, value in says(self.held[model]).items()}
        self.calls.append("probe")
        return says(self.held[model])


@pytest.fixture
def published(tmp_path: Path) -> Published:
    folder = tmp_path / "step_1"
    folder.mkdir()
    good = {"prompt": [1], "tokens": list(TOKENS), "version": THIS, "previous": BEFORE, "base": BARE}
    (folder / "probe.json").write_text(json.dumps(good))
    return Published(Version(RunId("a"), 1, "0" * 64), folder, {})


def serve(server: FakeVllm, published: Published, times: int = 1) -> Serving:
    serving = Serving(RunId("a"), server, 0.03)  # type: ignore[arg-type]

    async def all_of_it() -> None:
        for _ in range(times):
            await serving.serve(published)

    asyncio.run(all_of_it())
    return serving


def test_a_version_is_probed_once_when_it_is_loaded(published: Published) -> None:
    server = FakeVllm({published.path: THIS})
    serving = serve(server, published, times=3)
    assert server.calls == ["load", "probe"]
    assert serving.findings[published.version.name].outcome == "verified"


def test_a_version_of_an_older_trainer_has_no_probe_and_is_undecided(published: Published) -> None:
    (published.path / "probe.json").unlink()
    serving = serve(FakeVllm({published.path: THIS}), published)
    assert serving.findings[published.version.name].outcome == "undecided"


def test_one_that_is_there_already_is_probed_and_not_loaded(published: Published) -> None:
    server = FakeVllm({})
    server.held[published.version.name] = THIS
    serve(server, published)
    assert server.calls == ["probe"]


def test_a_wrong_one_that_is_there_already_is_replaced(published: Published) -> None:
    server = FakeVllm({published.path: THIS})
    server.held[published.version.name] = BEFORE
    serve(server, published)
    assert server.calls == ["probe", "unload", "load", "probe"]


def test_what_is_wrong_after_it_was_loaded_is_an_error_that_names_run_and_version(published: Published) -> None:
    with pytest.raises(WrongAdapter, match=r"run a: http://fake does not hold a@1-00000000: .*bare base does"):
        serve(FakeVllm({published.path: BARE}), published)
