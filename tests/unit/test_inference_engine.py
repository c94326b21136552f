"""The engine against the trainer's path, against transformers, and against itself alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from support import VOCAB, random_adapter
from transformers import AutoModelForCausalLM

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.prepare import prepare
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import InferenceError
from graftwork.inference import scheduler
from graftwork.inference.engine import Engine
from graftwork.inference.requests import BadRequest, EngineFault, GenerationRequest, GenerationResult, UnknownModel
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import BaseModel, Route
from graftwork.model.logprobs import token_logprobs

EOS = 1
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [5, 6, 7, 8, 9], [11], [12, 13, 14], [20, 21, 22, 23, 24, 25, 26]]


def spell(token_ids: object) -> str:
    return "".join(chr(ord("0") + token) for token in token_ids)  # type: ignore[attr-defined]


def save(adapter: Adapter, folder: Path) -> Path:
    folder.mkdir()
    for name, data in write_peft(adapter, AdapterFacts()).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def folders(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of different rank and scale."""
    root = tmp_path_factory.mktemp("adapters")
    first = random_adapter(tiny.spec.shapes, 4, scale=2.0, seed=1)
    second = random_adapter(tiny.spec.shapes, 2, scale=0.5, seed=2, size=0.3)
    return {"first": save(first, root / "first"), "second": save(second, root / "second")}


def engine_of(base: BaseModel, folders: dict[str, Path], max_sequences: int = 64) -> Engine:
    engine = Engine(
        base, name="base", eos_token_ids=[EOS], max_adapters=3, max_sequences=max_sequences, max_model_len=96,
        decode=spell,
    )  # fmt: skip
    engine.start()
    for name, folder in folders.items():
        engine.load(name, folder)
    return engine


@pytest.fixture(scope="module")
def engine(tiny: BaseModel, folders: dict[str, Path]) -> Iterator[Engine]:
    with_adapters = engine_of(tiny, folders)
    yield with_adapters
    with_adapters.close()


def ask(engine: Engine, model: str = "first", **changes: object) -> GenerationResult:
    request = GenerationRequest(model, PROMPTS, n=4, max_tokens=20, seed=3)
    return engine.submit(replace(request, **changes)).result(timeout=60)  # type: ignore[arg-type]


def assert_same(one: GenerationResult, other: GenerationResult, tolerance: float = 0.0) -> None:
    assert len(one.choices) == len(other.choices)
    for a, b in zip(one.choices, other.choices, strict=True):
        assert (a.prompt_index, a.sample_index, a.finish_reason) == (b.prompt_index, b.sample_index, b.finish_reason)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=tolerance)


def trainer_logprobs(
    base: BaseModel, folder: Path | None, prompt: list[int], answer: list[int], temperature: float
) -> np.ndarray:
    bank = base.new_bank(2, gradients=True)
    ids = [*prompt, *answer]
    segments = []
    if folder is not None:
        bank.write(1, prepare(read_peft(folder), base.spec))
        segments = [Segment(1, 0, len(ids), bank.holding(1).scale)]
    plan = PackedPlan([Group(0, 1, len(ids))])
    hidden = base.hidden(torch.tensor(ids), torch.arange(len(ids)), plan, Route(bank, segments))
    logprobs, _ = token_logprobs(
        hidden[len(prompt) - 1 : -1], base.head, torch.tensor(answer), temperature=temperature, chunk=7
    )
    return logprobs.detach().numpy()


@pytest.mark.parametrize("model", ["base", "first", "second"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(
    tiny: BaseModel, folders: dict[str, Path], engine: Engine, model: str, temperature: float
) -> None:
    result = ask(engine, model, temperature=temperature)
    assert [(c.prompt_index, c.sample_index) for c in result.choices] == [(p, s) for p in range(6) for s in range(4)]
    for choice in result.choices:
        expected = trainer_logprobs(
            tiny, folders.get(model), PROMPTS[choice.prompt_index], choice.token_ids.tolist(), temperature
        )
        np.testing.assert_allclose(choice.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["base", "first", "second"])
def test_greedy_tokens_are_those_of_transformers_and_peft(
    tiny_path: Path, folders: dict[str, Path], engine: Engine, model: str
) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    if model != "base":
        oracle = PeftModel.from_pretrained(oracle, str(folders[model]))
    result = ask(engine, model, temperature=0.0, n=1)
    for prompt, choice in zip(PROMPTS, result.choices, strict=True):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=EOS,
            pad_token_id=0,
        )  # fmt: skip
        assert choice.token_ids.tolist() == expected[0, len(prompt) :].tolist()
    answer = result.choices[1].token_ids
    with torch.no_grad():
        logits = oracle(torch.tensor([[*PROMPTS[1], *answer.tolist()]])).logits[0, len(PROMPTS[1]) - 1 : -1]
    expected_logprobs = logits.log_softmax(-1).gather(1, torch.from_numpy(answer).long()[:, None])[:, 0]
    np.testing.assert_allclose(result.choices[1].logprobs, expected_logprobs, rtol=0, atol=1e-5)


def test_adapters_in_one_batch_answer_as_they_do_alone(engine: Engine) -> None:
    models = ["second", "base", "first", "second", "first"]
    alone = [ask(engine, model, seed=i) for i, model in enumerate(models)]
    futures = [
        engine.submit(GenerationRequest(model, PROMPTS, n=4, max_tokens=20, seed=i)) for i, model in enumerate(models)
    ]
    for future, expected in zip(futures, alone, strict=True):
        result = future.result(timeout=60)
        assert (result.version, result.digest) == (expected.version, expected.digest)
        assert_same(result, expected, tolerance=1e-5)


def test_the_same_request_on_an_idle_engine_is_bit_equal(
    tiny: BaseModel, folders: dict[str, Path], engine: Engine
) -> None:
    first = ask(engine)
    ask(engine, "second", prompts=[[3] * 50], max_tokens=40, n=30)  # leaves the cache in another shape, were it kept
    assert_same(ask(engine), first)
    fresh = engine_of(tiny, folders)
    assert_same(ask(fresh), first)
    fresh.close()


def test_the_slot_that_an_adapter_happens_to_get_changes_no_bit(engine: Engine, folders: dict[str, Path]) -> None:
    """A resumed run loads its version into another slot than the run that was never stopped."""
    engine.load("second twice", folders["second"])
    assert_same(ask(engine, "second twice"), ask(engine, "second"))
    engine.unload("second twice")


def test_without_a_seed_every_answer_is_new(engine: Engine) -> None:
    one, other = (ask(engine, seed=None) for _ in range(2))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(one.choices, other.choices, strict=True))


def test_samples_do_not_depend_on_n(engine: Engine) -> None:
    few, many = ask(engine, n=2), ask(engine, n=5)
    for choice in few.choices:
        twin = many.choices[choice.prompt_index * 5 + choice.sample_index]
        np.testing.assert_array_equal(choice.token_ids, twin.token_ids)


@pytest.mark.parametrize("max_sequences", [1, 7])
def test_fewer_lanes_than_sequences(
    tiny: BaseModel, folders: dict[str, Path], engine: Engine, max_sequences: int
) -> None:
    narrow = engine_of(tiny, folders, max_sequences)
    first, second = (ask(engine, model, max_tokens=8) for model in ("first", "second"))
    futures = [narrow.submit(GenerationRequest(m, PROMPTS, n=4, max_tokens=8, seed=3)) for m in ("first", "second")]
    assert_same(futures[0].result(timeout=60), first, tolerance=1e-5)
    assert_same(futures[1].result(timeout=60), second, tolerance=1e-5)
    assert narrow.counters.prefilled_prompts == 2 * len(PROMPTS)  # a group that is split over rounds is prefilled once
    narrow.close()


def test_a_prompt_is_prefilled_once(tiny: BaseModel, folders: dict[str, Path]) -> None:
    engine = engine_of(tiny, folders)
    ask(engine, prompts=[[5, 6, 7], [5, 6, 7], [8, 9]], n=6)
    assert (engine.counters.prefilled_prompts, engine.counters.prefilled_tokens) == (2, 5)
    engine.close()


def test_many_prompts_are_prefilled_in_several_passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ask(engine)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 6)
    assert_same(ask(engine), expected, tolerance=1e-5)


def test_answers_end_at_eos_or_at_the_limit(engine: Engine) -> None:
    reasons = set()
    for choice in ask(engine, temperature=2.0, n=16).choices:
        reasons.add(choice.finish_reason)
        ids = choice.token_ids.tolist()
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == (choice.finish_reason == "stop")
        assert len(ids) == 20 or choice.finish_reason == "stop"
    assert reasons == {"stop", "length"}


def test_stop_strings_end_an_answer_and_its_tokens_stay(engine: Engine) -> None:
    free = ask(engine, n=1)
    longest = max(free.choices, key=lambda choice: len(choice.token_ids))
    stop = spell(longest.token_ids[2:5])
    stopped = ask(engine, n=1, stop=("never seen", stop)).choices[longest.prompt_index]
    assert stopped.finish_reason == "stop"
    ids = stopped.token_ids.tolist()
    assert ids == longest.token_ids[: len(ids)].tolist()
    assert stop in spell(ids) and stop not in spell(ids[:-1])


def test_the_model_length_bounds_every_request(engine: Engine) -> None:
    assert len(ask(engine, prompts=[[5] * 90], max_tokens=6, temperature=0.0, n=1).choices) == 1
    with pytest.raises(BadRequest, match=r"prompt 0 has 90 tokens and max_tokens is 7.*at most 96"):
        ask(engine, prompts=[[5] * 90], max_tokens=7)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompts": []}, "prompt"),
        ({"prompts": [[3], []]}, "prompt"),
        ({"prompts": [[VOCAB]]}, "prompt"),
        ({"prompts": [[-1]]}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
def test_bad_requests_name_the_field_and_the_engine_goes_on(
    engine: Engine, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(BadRequest, match=field) as refusal:
        ask(engine, **changes)
    assert refusal.value.param == field
    assert len(ask(engine, n=1, max_tokens=1).choices) == len(PROMPTS)
    assert engine.fault is None


def test_an_unknown_model_is_never_the_base(engine: Engine) -> None:
    with pytest.raises(UnknownModel, match=r"'third' is not loaded; loaded: base, first, second"):
        ask(engine, "third")


def test_a_cancelled_request_leaves_its_lanes(engine: Engine) -> None:
    gone = engine.submit(GenerationRequest("first", [[7] * 5], n=64, max_tokens=90, temperature=0.0))
    kept = engine.submit(GenerationRequest("first", PROMPTS, n=4, max_tokens=20, seed=3))
    assert gone.cancel()
    assert len(kept.result(timeout=60).choices) == 24
    with pytest.raises(CancelledError):
        gone.result()


def test_weights_that_make_nan_fail_their_own_requests_only(
    tiny: BaseModel, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Broken on the way into the slot, since no file with NaN is ever read; the lanes are used again afterwards."""
    engine = engine_of(tiny, folders)
    expected = ask(engine, "first")
    bank = engine._shelf.bank
    bank.weights[1, :] = torch.nan
    futures = [engine.submit(GenerationRequest(m, PROMPTS, n=4, max_tokens=20, seed=3)) for m in ("second", "first")]
    with pytest.raises(InferenceError, match=r"model second: the probabilities .* are not finite"):
        futures[0].result(timeout=60)
    assert_same(futures[1].result(timeout=60), expected, tolerance=1e-5)
    assert_same(ask(engine, "first", n=8, max_tokens=20), ask(engine, "first", n=8, max_tokens=20))
    assert engine.fault is None
    engine.close()


def test_a_failure_of_the_engine_reaches_everybody(
    tiny: BaseModel, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny, folders)
    monkeypatch.setattr("threading.excepthook", lambda args: None)

    def broken(*args: object) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr(engine._scheduler, "_decode", broken)
    futures = [engine.submit(GenerationRequest("first", PROMPTS, max_tokens=20)) for _ in range(3)]
    for future in futures:
        with pytest.raises(EngineFault, match="RuntimeError: out of something"):
            future.result(timeout=60)
    assert engine.fault is not None and "out of something" in engine.fault
    with pytest.raises(EngineFault):
        engine.submit(GenerationRequest("first", PROMPTS))
    engine.close()


def test_closing_answers_those_who_wait(tiny: BaseModel, folders: dict[str, Path]) -> None:
    engine = engine_of(tiny, folders, max_sequences=1)
    waiting = engine.submit(GenerationRequest("first", PROMPTS, n=50, max_tokens=80, temperature=0.0))
    engine.close()
    with pytest.raises(EngineFault, match="closed"):
        waiting.result(timeout=5)


def test_a_front_gets_answers_from_this_thread_and_the_engine_closes_after_it(tiny: BaseModel) -> None:
    engine = Engine(tiny, name="base", eos_token_ids=[])
    workers: list[threading.Thread] = []
    engine._scheduler.step = noting(engine._scheduler.step, workers)  # type: ignore[method-assign]
    assert len(engine.work_for(lambda: ask(engine, "base")).choices) == 4 * len(PROMPTS)
    assert set(workers) == {threading.current_thread()}
    with pytest.raises(EngineFault, match="closed"):
        ask(engine, "base")


def noting(step: Callable[[], None], workers: list[threading.Thread]) -> Callable[[], None]:
    def noted() -> None:
        workers.append(threading.current_thread())
        step()

    return noted


def test_what_a_front_raises_comes_out(tiny: BaseModel) -> None:
    engine = Engine(tiny, name="base", eos_token_ids=[])
    with pytest.raises(UnknownModel, match="nobody"):
        engine.work_for(lambda: ask(engine, "nobody"))
    assert engine.fault == "the engine was closed"
