"""The server: its HTTP shapes in process, and one real process from start to SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
from fastapi.testclient import TestClient
from support import random_adapter

from graftwork.adapters.canonical import Adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import SamplingConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import ConfigError
from graftwork.inference.api import prompt_seed
from graftwork.inference.engine import Engine
from graftwork.inference.local import LocalSampler
from graftwork.inference.server import build_app
from graftwork.model.base import BaseModel, load_base
from graftwork.programs.listening import listen
from graftwork.rollouts.client import InferenceClient
from graftwork.store.disk import Disk
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import Published, Version, publish_version

REPO = Path(__file__).parents[2]
BASE = REPO / "examples/reverse_text/base"
START_SECONDS = 90
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


class Letters:
    """A tokenizer of 26 letters for the random base: a = token 30."""

    def encode(self, text: str) -> list[int]:
        return [30 + ord(letter) - ord("a") for letter in text]

    def encode_chat(self, messages: Sequence[Any], add_generation_prompt: bool) -> list[int]:
        assert add_generation_prompt
        return [2, *(token for message in messages for token in self.encode(message["content"])), 3]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + (token - 30) % 26) for token in token_ids)


def publish(root: Path, adapter: Adapter, step: int = 0) -> Published:
    tree = RunTree(RunId("r"), root / "run_r")
    version = Version(tree.id, step, adapter.digest())
    return publish_version(Disk(), tree, version, write_peft(adapter, AdapterFacts()), {})


@pytest.fixture(scope="module")
def published(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish(tmp_path_factory.mktemp("out"), random_adapter(tiny.spec.shapes, 4))


@pytest.fixture(scope="module")
def engine(tiny: BaseModel, published: Published) -> Iterator[Engine]:
    decode = Letters().decode
    with Engine(tiny, name="tiny", eos_token_ids=[1], max_sequences=16, max_model_len=64, decode=decode) as engine:
        engine.load(published.version.name, published.path)
        yield engine


@pytest.fixture
def client(engine: Engine) -> TestClient:
    return TestClient(build_app(engine, Letters()))


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "seed": 1, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_a_completion_has_openais_and_vllms_fields(client: TestClient, published: Published) -> None:
    name = published.version.name
    answer = complete(client, model=name, prompt=[[5, 6], [7]], n=2, logprobs=1, return_token_ids=True)
    assert (answer["object"], answer["model"]) == ("text_completion", name)
    assert answer["graftwork"] == {"version": name, "digest": published.version.digest}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == [[5, 6], [7]][choice["index"] // 2]
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        assert len(logprobs["token_logprobs"]) == len(choice["token_ids"])
        assert (logprobs["top_logprobs"], logprobs["text_offset"]) == (None, [])
        assert choice["text"] == Letters().decode(choice["token_ids"])
    sampled = sum(len(choice["token_ids"]) for choice in answer["choices"])
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": sampled, "total_tokens": 3 + sampled}


def test_all_forms_of_a_prompt_mean_the_same(client: TestClient) -> None:
    ids = Letters().encode("abc")
    forms = ["abc", ["abc"], ids, [ids]]
    texts = [[choice["text"] for choice in complete(client, prompt=form)["choices"]] for form in forms]
    assert texts == [texts[0]] * 4
    bare = complete(client)["choices"][0]
    assert bare["logprobs"] is None and "token_ids" not in bare


def test_stop_strings_are_cut_from_the_text_only(client: TestClient) -> None:
    whole = complete(client, max_tokens=20)["choices"][0]["text"]
    choice = complete(client, max_tokens=20, stop=whole[2:4], return_token_ids=True)["choices"][0]
    assert choice["text"] == whole[: whole.find(whole[2:4])]
    assert choice["finish_reason"] == "stop"
    assert whole[2:4] in Letters().decode(choice["token_ids"])


def test_chat_is_a_completion_of_the_rendered_messages(client: TestClient, published: Published) -> None:
    name = published.version.name
    body = {
        "model": name, "messages": [{"role": "user", "content": "abc"}], "max_tokens": 6, "seed": 1, "logprobs": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body).json()
    same = complete(client, model=name, prompt=[2, 30, 31, 32, 3], logprobs=1)["choices"][0]
    choice = answer["choices"][0]
    assert answer["graftwork"]["digest"] == published.version.digest
    assert choice["message"] == {"role": "assistant", "content": same["text"]}
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == same["logprobs"]["tokens"]
    assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == same["logprobs"]["token_logprobs"]
    assert choice["prompt_token_ids"] == [2, 30, 31, 32, 3]
    free = client.post("/v1/chat/completions", json={**body, "max_tokens": None, "temperature": 0}).json()
    assert free["choices"][0]["finish_reason"] == "stop" or free["usage"]["total_tokens"] == 64


def test_generate_takes_and_gives_token_ids(client: TestClient, published: Published) -> None:
    """The same tokens and log-probs as a completion; what verifiers' train client reads is there."""
    name = published.version.name
    seed = prompt_seed(1, [5, 6])
    same = complete(client, model=name, prompt=[5, 6], n=2, logprobs=1, return_token_ids=True, seed=seed)["choices"]
    params = {
        "stop_token_ids": [1],
        "routed_experts_prompt_start": 0,
        "max_tokens": 6,
        "seed": 1,
        "n": 2,
        "logprobs": 1,
        "skip_special_tokens": False,
    }
    body = {"model": name, "token_ids": [5, 6], "sampling_params": params, "request_id": "mine"}
    answer = client.post("/inference/v1/generate", json=body).json()
    assert answer["request_id"] == "mine"
    assert answer["graftwork"] == {"version": name, "digest": published.version.digest}
    for choice, other in zip(answer["choices"], same, strict=True):
        assert choice["token_ids"] == other["token_ids"] and choice["finish_reason"] == other["finish_reason"]
        entries = choice["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == other["logprobs"]["tokens"]
        assert [entry["logprob"] for entry in entries] == other["logprobs"]["token_logprobs"]


def test_the_seed_of_a_conversation_draws_anew_in_every_turn() -> None:
    seeds = {prompt_seed(seed, ids) for seed in (1, 2) for ids in ([5, 6], [5, 6, 7], [56])}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_generate_answers_from_the_digest_that_was_asked_for_or_not_at_all(
    client: TestClient, published: Published
) -> None:
    def ask(model: str, digest: str) -> Any:
        body = {"model": model, "token_ids": [5], "sampling_params": {"max_tokens": 2}}
        return client.post("/inference/v1/generate", json=body, headers={"If-Match": f'"{digest}"'})

    name, digest = published.version.name, published.version.digest
    assert ask(name, digest).json()["graftwork"]["digest"] == digest
    for refused in (ask(name, "0" * 64), ask("tiny", digest)):
        assert refused.status_code == 412 and "If-Match asks for" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling_params": {"stop_token_ids": [1, 9]}}, "stop_token_ids: [9]"),
        ({"token_ids": []}, "token_ids"), ({"sampling_params": {"top_k": 5}}, "sampling_params.top_k"),
        ({"features": {"image": 1}}, "features"), ({"sampling_params": {"beam": 2}}, "sampling_params.beam"),
    ],
)  # fmt: skip
def test_generate_refuses_by_name_what_it_cannot_honour(client: TestClient, change: Any, named: str) -> None:
    response = client.post("/inference/v1/generate", json={"model": "tiny", "token_ids": [5], **change})
    assert response.status_code == 400 and named in response.json()["error"]["message"]


def test_models_are_the_base_and_its_adapters(client: TestClient, published: Published) -> None:
    base, adapter = client.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"], base["digest"]) == ("tiny", None, 64, None)
    assert (adapter["id"], adapter["parent"]) == (published.version.name, "tiny")
    assert (adapter["root"], adapter["digest"]) == (str(published.path), published.version.digest)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "abc"}, 400, "model: must be given"),
        ({"model": "tiny"}, 400, "prompt: must be given"),
        ({"model": "other", "prompt": "abc"}, 404, "model 'other' is not loaded; loaded: tiny, r@0-"),
        ({"model": "tiny", "prompt": [[3], [64]]}, 400, "prompt 1: token id 64 is not in the vocabulary"),
        ({"model": "tiny", "prompt": [3, True]}, 400, "prompt: expected a text"),
        ({"model": "tiny", "prompt": [3, "a"]}, 400, "prompt: expected a text"),
        ({"model": "tiny", "prompt": "abc", "max_tokens": 62}, 400, "at most 64"),
        ({"model": "tiny", "prompt": "abc", "temperature": -1}, 400, "temperature: -1"),
        ({"model": "tiny", "prompt": "abc", "n": "many"}, 400, "n: Input should be a valid integer"),
        ({"model": "tiny", "prompt": "abc", "logprobs": 5}, 400, "logprobs"),
        ({"model": "tiny", "prompt": "abc", "best_of": 2}, 400, "best_of: 2 is not supported"),
        ({"model": "tiny", "prompt": "abc", "echo": True}, 400, "echo: True is not supported"),
        ({"model": "tiny", "prompt": "abc", "suffix": "d"}, 400, "suffix"),
        ({"model": "tiny", "prompt": "abc", "logit_bias": {"3": 1}}, 400, "logit_bias"),
        ({"model": "tiny", "prompt": "abc", "presence_penalty": 0.1}, 400, "presence_penalty"),
        ({"model": "tiny", "prompt": "abc", "frequency_penalty": 0.1}, 400, "frequency_penalty"),
        ({"model": "tiny", "prompt": "abc", "repetition_penalty": 1.1}, 400, "repetition_penalty"),
        ({"model": "tiny", "prompt": "abc", "top_k": 5}, 400, "top_k"),
        ({"model": "tiny", "prompt": "abc", "stream": True}, 400, "stream: True is not supported"),
        ({"model": "tiny", "prompt": "abc", "temprature": 1}, 400, "temprature: no such field"),
    ],
)
def test_refusals_name_the_field(client: TestClient, body: dict[str, Any], status: int, message: str) -> None:
    response = client.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, status)
    assert message in error["message"]
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]


def test_fields_that_change_nothing_are_fine(client: TestClient) -> None:
    complete(client, echo=False, best_of=1, stream=False, presence_penalty=0, top_k=-1, n=None, stop=None, user="me")


def test_other_routes_and_bodies_have_the_error_shape(client: TestClient) -> None:
    assert client.get("/v2/models").json()["error"]["code"] == 404
    broken = client.post("/v1/completions", content="{", headers={"content-type": "application/json"})
    assert (broken.status_code, broken.json()["error"]["message"][:14]) == (400, "body: not JSON")
    empty = client.post("/v1/chat/completions", json={"model": "tiny", "messages": []})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "messages")
    messages = [{"role": "user", "content": "a" * 70}]
    long = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert "messages: 72 tokens leave no room" in long.json()["error"]["message"]


def test_adapters_come_and_go(client: TestClient, published: Published, tmp_path: Path) -> None:
    body = {"lora_name": "again", "lora_path": str(published.path)}
    loaded = client.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.json()["digest"]) == (200, published.version.digest)
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 404
    wrong = client.post("/v1/load_lora_adapter", json={**body, "lora_name": "r@0-00000000"})
    assert wrong.status_code == 400 and "says digest 00000000" in wrong.json()["error"]["message"]
    nowhere = client.post("/v1/load_lora_adapter", json={**body, "lora_path": str(tmp_path / "no")})
    assert nowhere.status_code == 400 and nowhere.json()["error"]["param"] == "lora_path"


def test_health_tells_that_the_engine_has_failed(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with Engine(tiny, name="tiny", eos_token_ids=[], max_sequences=4, max_model_len=64) as engine:
        client = TestClient(build_app(engine, Letters()))
        assert client.get("/health").status_code == 200

        def broken() -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr(engine._scheduler, "step", broken)
        failed = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc"})
        assert failed.status_code == 500 and "RuntimeError: boom" in failed.json()["error"]["message"]
        assert client.get("/health").status_code == 500


def test_the_local_sampler_answers_as_the_http_client_would(engine: Engine, published: Published) -> None:
    sampling = SamplingConfig(max_tokens=6, temperature=0.9, top_p=0.8)
    name = published.version.name
    completions = asyncio.run(LocalSampler(engine).complete(name, [[5, 6], [7]], 2, sampling, 11))
    body = {"prompt": [[5, 6], [7]], "n": 2, "temperature": 0.9, "top_p": 0.8, "seed": 11, "logprobs": 1}
    answer = complete(TestClient(build_app(engine, Letters())), model=name, return_token_ids=True, **body)
    assert [list(c.token_ids) for c in completions] == [choice["token_ids"] for choice in answer["choices"]]
    assert [list(c.logprobs) for c in completions] == [c["logprobs"]["token_logprobs"] for c in answer["choices"]]
    assert {(c.version_name, c.digest) for c in completions} == {(name, published.version.digest)}


# --- a real process -------------------------------------------------------------------------------------------------


class RealServer:
    """`graftwork inference` in a process of its own, on the shipped base."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.ready = folder / "ready.json"
        self.config = folder / "inference.toml"
        settings = {
            "model": {"path": str(BASE), "dtype": "float32"}, "port": port, "threads": 1, "max_sequences": 32,
            "max_model_len": 256, "ready_file": str(self.ready),
        }  # fmt: skip
        self.config.write_text(tomli_w.dumps(settings))
        command = [sys.executable, "-m", "graftwork", "inference", str(self.config)]
        self.process = subprocess.Popen(command, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_ready(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while not self.ready.exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the server does not get ready"
            time.sleep(0.05)
        about = json.loads(self.ready.read_text())
        assert about["pid"] == self.process.pid
        return str(about["url"])

    def end(self, number: signal.Signals) -> tuple[str, str, float]:
        """(stdout, stderr, seconds) of a server that is told to end."""
        start = time.monotonic()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return out, err, time.monotonic() - start


@pytest.fixture(scope="module")
def shipped_adapter(tmp_path_factory: pytest.TempPathFactory) -> Published:
    base = load_base(ModelConfig(path=str(BASE), dtype="float32", device="cpu"), LoraConfig())
    return publish(tmp_path_factory.mktemp("shipped"), random_adapter(base.spec.shapes, 8, size=0.05))


def test_a_server_from_start_to_sigterm(tmp_path: Path, shipped_adapter: Published) -> None:
    server = RealServer(tmp_path)
    try:
        url = server.wait_ready()
        asyncio.run(_use(url, shipped_adapter))
        _leave_in_the_middle(url)
        port = int(url.rpartition(":")[2])
        (tmp_path / "second").mkdir()
        second = RealServer(tmp_path / "second", port)
        _, words = second.process.communicate(timeout=60)
        assert second.process.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in words and "set inference.port" in words.replace("\n", " ")
        out, err, seconds = server.end(signal.SIGTERM)
    finally:
        server.process.kill()
    assert server.process.returncode == 0, err
    assert seconds < 10
    assert out == f"inference: serving {BASE} on {url}\n"
    assert "Traceback" not in err


async def _use(url: str, published: Published) -> None:
    """What an orchestrator does."""
    sampling = SamplingConfig(max_tokens=8)
    name, digest = published.version.name, published.version.digest
    async with InferenceClient(url, 60) as client:
        await client.health()
        await client.load_adapter(published.version, published.path)
        assert await client.served_models() == [str(BASE), name]
        first, again = [await client.complete(name, [[9, 8, 7], [5]], 3, sampling, 5) for _ in range(2)]
        assert first == again
        assert {(c.version_name, c.digest) for c in first} == {(name, digest)}
        base = await client.complete(str(BASE), [[9, 8, 7]], 1, sampling, 5)
        assert (base[0].version_name, base[0].digest) == (str(BASE), None)
        await client.unload_adapter(name)
        assert await client.served_models() == [str(BASE)]


def _leave_in_the_middle(url: str) -> None:
    """A client that hangs up does not disturb the next one."""
    body = {"model": str(BASE), "prompt": [[9, 8, 7]], "n": 32, "max_tokens": 250, "logit_bias": {}}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(trust_env=False) as client:
        client.post(f"{url}/v1/completions", json=body, timeout=0.05)
    with httpx.Client(trust_env=False) as client:
        answer = client.post(f"{url}/v1/completions", json={**body, "n": 1, "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200


def test_sigint_ends_it_while_a_request_is_under_way(tmp_path: Path) -> None:
    server = RealServer(tmp_path)
    try:
        url = server.wait_ready()
        statuses: list[int] = []
        body = {"model": str(BASE), "prompt": [[9, 8, 7]] * 64, "n": 64, "max_tokens": 250}

        def post() -> None:
            with httpx.Client(trust_env=False) as client:
                try:
                    statuses.append(client.post(f"{url}/v1/completions", json=body, timeout=60).status_code)
                except httpx.TransportError:
                    statuses.append(0)

        poster = threading.Thread(target=post)
        poster.start()
        time.sleep(1.0)
        _, err, seconds = server.end(signal.SIGINT)
        poster.join(timeout=60)
    finally:
        server.process.kill()
    assert server.process.returncode == 0, err
    assert seconds < 15
    assert statuses and statuses[0] in (0, 503)  # 503: it was told that the server ends
    assert "Traceback" not in err


def test_a_socket_that_is_bound_is_a_port_that_is_taken() -> None:

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ConfigError, match="cannot listen on"):
            listen("127.0.0.1", holder.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen("192.0.2.1", 0)
