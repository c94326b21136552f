"""The inference client: what it sends, what it believes, how it gives up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from graftwork.config.run import SamplingConfig
from graftwork.errors import ConfigError, InferenceError, Refused, ServerGone
from graftwork.rollouts import client as module
from graftwork.rollouts.client import InferenceClient, read_completions
from graftwork.store.layout import RunId
from graftwork.store.queue import Version

VERSION = Version(RunId("tiny"), 3, "ab" * 32)
SAMPLING = SamplingConfig(max_tokens=4, temperature=0.5, top_p=0.9)
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(module, "READY_POLL_SECONDS", 0.0)


def ask(handler: Handler, question: Callable[[InferenceClient], Awaitable[Any]]) -> Any:
    async def talk() -> Any:
        async with InferenceClient("http://engine:8000/", 5.0) as client:
            client._http = httpx.AsyncClient(transport=httpx.MockTransport(handler))
            return await question(client)

    return asyncio.run(talk())


def choice(index: int, **changes: Any) -> dict[str, Any]:
    made = {"index": index, "token_ids": [5, 1], "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, -1]}}
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


def answer(given: list[Any], **changes: Any) -> dict[str, Any]:
    about = {"version": VERSION.name, "digest": VERSION.digest}
    made = {"model": VERSION.name, "choices": given, "graftwork": about}
    return {key: value for key, value in {**made, **changes}.items() if value is not ...}


def test_a_request_holds_everything_by_name_and_choices_come_back_in_order():
    seen = []

    def handler(request):
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=answer([choice(i, token_ids=[i, 1]) for i in (3, 1, 0, 2)]))

    completions = ask(handler, lambda c: c.complete(VERSION.name, [(7, 8), (9,)], 2, SAMPLING, seed=11))
    assert [c.token_ids for c in completions] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert completions[0].logprobs == (-0.5, -1.0)
    assert (completions[0].version_name, completions[0].digest) == (VERSION.name, VERSION.digest)
    assert seen == [
        {
            "model": VERSION.name, "prompt": [[7, 8], [9]], "n": 2, "max_tokens": 4, "temperature": 0.5, "top_p": 0.9,
            "seed": 11, "logprobs": 1, "return_token_ids": True,
        }
    ]  # fmt: skip


def test_vllm_gets_no_seed_and_every_sampling_default():
    seen, owner = [], "vllm"

    def handler(request):
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base", "owned_by": owner}]})
        seen.append(json.loads(request.content))
        return httpx.Response(200, json=answer([choice(0)], graftwork=...))

    async def question(client):
        nonlocal owner
        assert await client.served_models() == ["base"]
        (completion,) = await client.complete(VERSION.name, [[7]], 1, SAMPLING, seed=11)
        owner = "graftwork"  # it was started again, and is another
        await client.served_models()
        await client.complete(VERSION.name, [[7]], 1, SAMPLING, seed=11)
        return completion

    assert ask(handler, question).digest is None
    assert "seed" not in seen[0]
    assert seen[0]["top_k"] == -1
    assert seen[1]["seed"] == 11


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ([], "model"),
        (answer([choice(0)], choices=...), "choices"),
        (answer([choice(0)]), "choices has 1"),
        (answer([choice(0), choice(0)]), "index"),
        (answer([choice(0), choice(2)]), "index"),
        (answer([choice(0), "x"]), "index"),
        (answer([choice(0), choice(1, token_ids=...)]), "token_ids"),
        (answer([choice(0), choice(1, token_ids=[])]), "token_ids"),
        (answer([choice(0), choice(1, token_ids=[5, 1.0])]), "token_ids"),
        (answer([choice(0), choice(1, token_ids=[True, 1])]), "token_ids"),
        (answer([choice(0), choice(1, logprobs=None)]), "logprobs"),
        (answer([choice(0), choice(1, logprobs={})]), "token_logprobs"),
        (answer([choice(0), choice(1, logprobs={"token_logprobs": [-1.0]})]), "token_logprobs has 1"),
        (answer([choice(0), choice(1, logprobs={"token_logprobs": [None, -1.0]})]), "token_logprobs"),
        (answer([choice(0), choice(1, logprobs={"token_logprobs": [float("nan"), -1.0]})]), "token_logprobs"),
        (answer([choice(0), choice(1, finish_reason="abort")]), "finish_reason"),
        (answer([choice(0), choice(1, prompt_token_ids=[1, 2])]), "prompt_token_ids"),
        (answer([choice(0), choice(1)], graftwork={"version": "base", "digest": None}), "answered by 'base'"),
        (answer([choice(0), choice(1)], graftwork={"digest": None}), "graftwork: version"),
        (answer([choice(0), choice(1)], graftwork={"version": VERSION.name, "digest": 7}), "graftwork.digest"),
        (answer([choice(0), choice(1)], graftwork=..., model="base"), "answered by 'base'"),
    ],
)
def test_a_malformed_answer_is_refused_and_the_field_named(body, word):
    with pytest.raises(InferenceError) as caught:
        read_completions(body, VERSION.name, [[7], [8]], 1)
    assert word in str(caught.value)
    assert VERSION.name in str(caught.value)


def test_an_answer_that_is_not_json():
    with pytest.raises(InferenceError, match="not JSON"):
        ask(lambda _: httpx.Response(200, text="<html>"), lambda c: c.served_models())


@pytest.mark.parametrize(
    "body", [{"error": {"message": "no room"}}, {"message": "no room"}, {"detail": "no room"}, "no room"]
)
def test_refused_carries_the_servers_words(body):
    with pytest.raises(Refused, match=r"load_lora_adapter answered 400: .*no room"):
        ask(lambda _: httpx.Response(400, json=body), lambda c: c.load_adapter(VERSION, Path("/a")))


def test_a_server_fault_is_not_a_refusal():
    with pytest.raises(InferenceError, match="500: boom") as caught:
        ask(lambda _: httpx.Response(500, text="boom"), lambda c: c.health())
    assert not isinstance(caught.value, (Refused, ServerGone))


def test_load_and_unload():
    seen = []

    def handler(request):
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(404 if "unload" in request.url.path else 200, text="done")

    ask(handler, lambda c: c.load_adapter(VERSION, Path("/runs/b/step_3")))
    ask(handler, lambda c: c.unload_adapter(VERSION.name))
    assert seen == [
        ("/v1/load_lora_adapter", {"lora_name": VERSION.name, "lora_path": "/runs/b/step_3"}),
        ("/v1/unload_lora_adapter", {"lora_name": VERSION.name}),
    ]


@pytest.mark.parametrize("first", ["refused", "503"])
def test_a_short_absence_is_waited_out(first):
    calls = []

    def handler(request):
        calls.append(request)
        if len(calls) < module.ATTEMPTS:
            if first == "503":
                return httpx.Response(503, text="busy")
            raise httpx.ConnectError("refused")
        return httpx.Response(200)

    ask(handler, lambda c: c.health())
    assert len(calls) == module.ATTEMPTS


def test_a_dead_server_is_named_with_the_call_and_the_last_error():
    def handler(request):
        raise httpx.ConnectError("connection refused by nobody")

    with pytest.raises(ServerGone, match=r"GET http://engine:8000/v1/models.*connection refused by nobody"):
        ask(handler, lambda c: c.served_models())
    with pytest.raises(ServerGone, match="503: still loading"):
        ask(lambda _: httpx.Response(503, text="still loading"), lambda c: c.wait_ready(0.01))


def test_a_slow_server_is_not_asked_twice():
    calls = []

    def handler(request):
        calls.append(request)
        raise httpx.ReadTimeout("slow")

    with pytest.raises(InferenceError, match=r"no answer within 5 seconds.*raise request_timeout_seconds") as caught:
        ask(handler, lambda c: c.complete(VERSION.name, [[7]], 1, SAMPLING, seed=1))
    assert not isinstance(caught.value, ServerGone)
    assert len(calls) == 1


def test_a_server_that_is_slow_where_there_is_nothing_to_do_is_gone():
    def handler(request):
        raise httpx.ReadTimeout("slow")

    with pytest.raises(ServerGone, match=r"/v1/models: no answer within 30 seconds"):
        ask(handler, lambda c: c.served_models())


@pytest.mark.parametrize("trouble", ["gone", "slow", "503", "500"])
def test_a_server_is_waited_for_until_it_is_well(trouble):
    calls = []

    def handler(request):
        calls.append(request.url.path)
        if len(calls) > 3:
            return httpx.Response(200)
        if trouble in ("gone", "slow"):
            raise httpx.ConnectError("refused") if trouble == "gone" else httpx.ReadTimeout("slow")
        return httpx.Response(int(trouble), text="not now")

    assert ask(handler, lambda c: c.is_well()) is False
    ask(handler, lambda c: c.wait_ready(60))
    assert calls == ["/health"] * 4
    assert ask(handler, lambda c: c.is_well()) is True


def test_a_server_that_does_not_get_well_is_named_with_its_own_words():
    with pytest.raises(InferenceError, match="500: the engine failed"):
        ask(lambda _: httpx.Response(500, text="the engine failed"), lambda c: c.wait_ready(0.01))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://[::1"])
def test_a_url_that_is_none(url):
    with pytest.raises(ConfigError, match="inference_url"):
        InferenceClient(url, 1.0)
