"""The one client for both inference servers: the embedded engine and vLLM speak the same HTTP API.

It believes nothing: counts, lengths, types and the name of the adapter that answered are checked on every reply.

What vLLM would do otherwise, in silence or by dying, and what keeps it from that here:
- its log-probs leave out temperature and top-p, unless it is started with `--logprobs-mode processed_logprobs`
- a `seed` together with chunked prefill kills its engine: it gets none
- sampling settings that are missing come from the base's generation_config.json: it gets every one by name
- a request for the bare base may be answered with an adapter (on CPU, once every place has held one; unloading does not
  empty a place): it is asked for versions only
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from graftwork.config.run import SamplingConfig
from graftwork.errors import ConfigError, InferenceError, Refused, ServerGone
from graftwork.rollouts.sampling import Completion
from graftwork.store.queue import VERSION_NAME, Version

ATTEMPTS = 5
BACKOFF_SECONDS = 0.1
"""Wait before the second attempt; each further wait is twice as long."""
QUICK_SECONDS = 30.0
"""Longest wait for calls that do no work: health, models. A server that takes longer is as good as gone; it may be
loading its base, with its port open already."""
READY_POLL_SECONDS = 0.2
READY_POLL_SECONDS_MAX = 1.0
"""Between two looks at a server that is not well: the first and the longest pause. Many may be waiting for it."""
FINISH_REASONS = ("stop", "length")
RETRIED = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
"""Nobody answered. A server that takes too long is not asked again: it may still be at work."""
VLLM_DEFAULTS = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}


class InferenceClient:
    """Use as `async with InferenceClient(url, timeout_seconds) as client`. Satisfies `Sampler`.

    Every call raises ServerGone (nobody is there; url, call and last error named), Refused (HTTP 4xx, with the server's
    own words) or InferenceError (any other answer that is not what was asked for, or none in `timeout_seconds`).
    """

    def __init__(self, url: str, timeout_seconds: float) -> None:
        """`url` is the server's root. Raises ConfigError for a url that is none."""
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"inference_url = {url!r} is not a url: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"inference_url = {url!r} is not a url; expected something like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.timeout_seconds = timeout_seconds
        self.is_vllm = False
        """`served_models` finds it out, after a restart too."""
        # trust_env: a proxy that is set for downloads must not stand between two programs of ours.
        self._http = httpx.AsyncClient(trust_env=False, timeout=timeout_seconds)

    async def __aenter__(self) -> InferenceClient:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    # --- sampling ---------------------------------------------------------------------------------------------------

    async def complete(
        self, model: str, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int
    ) -> list[Completion]:
        """`n` answers of `model` to each prompt, in one request; see `Sampler.complete`."""
        self._refuse_base(model)
        payload: dict[str, Any] = {
            "model": model, "prompt": [list(prompt) for prompt in prompts], "n": n, "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "logprobs": 1, "return_token_ids": True,
        }  # fmt: skip
        payload |= VLLM_DEFAULTS if self.is_vllm else {"seed": seed}
        answer = await self._json("POST", "/v1/completions", payload)
        return read_completions(answer, model, prompts, n)

    def _refuse_base(self, model: str) -> None:
        if self.is_vllm and VERSION_NAME.fullmatch(model) is None:
            raise Refused(
                f"{self.url}: {model!r} is no version of a run, and vLLM is asked for nothing else: beside adapters it "
                "may answer for the bare base with one of them"
            )

    async def next_tokens(
        self, model: str, prompt: Sequence[int], count: int, temperature: float = 1.0
    ) -> dict[int, float]:
        """Log-probs of the `count` tokens that `model` finds likeliest to come next; asked of vLLM, by an ordinary
        completion (prompt_logprobs beside requests with adapters kill its engine)."""
        payload: dict[str, Any] = {
            "model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": temperature, "top_p": 1.0,
            "logprobs": count, "return_token_ids": True, "return_tokens_as_token_ids": True, **VLLM_DEFAULTS,
        }  # fmt: skip
        answer = await self._json("POST", "/v1/completions", payload)
        read_completions(answer, model, [prompt], 1)
        found = read_likeliest(answer["choices"][0], f"/v1/completions for {model}: choices[0]")
        return dict(sorted(found.items(), key=lambda item: -item[1])[:count])  # the sampled token is given beyond them

    # --- adapters ---------------------------------------------------------------------------------------------------

    async def load_adapter(self, version: Version, path: Path) -> None:
        """Make the adapter in folder `path` (on the server's file system) available under the version's name."""
        payload = {"lora_name": version.name, "lora_path": str(path.absolute())}
        await self._call("POST", "/v1/load_lora_adapter", payload, self.timeout_seconds)

    async def unload_adapter(self, name: str) -> None:
        """Let go of an adapter. One that the server does not hold is fine."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, self.timeout_seconds, fine=(404,))

    async def served_models(self) -> list[str]:
        """Names that can be asked: the base and the loaded adapters."""
        answer = await self._json("GET", "/v1/models", None)
        cards = _field(answer, "data", list, "/v1/models")
        names = [_field(card, "id", str, "/v1/models: data[]") for card in cards]
        self.is_vllm = any(card.get("owned_by") == "vllm" for card in cards)
        return names

    async def lists_digest(self, name: str, digest: str | None) -> bool:
        """Whether the server says which tensors it holds under `name`, and they are those: then it also heeds
        If-Match. Raises InferenceError when it holds others."""
        answer = await self._json("GET", "/v1/models", None)
        cards = _field(answer, "data", list, "/v1/models")
        held = next((card.get("digest") for card in cards if card.get("id") == name), None)
        if digest is None or held is None:
            return False
        if held != digest:
            raise InferenceError(
                f"the engine's {name} has digest {held}, published was {digest}; nothing was sampled. Restart the"
                " inference server"
            )
        return True

    async def health(self, attempts: int = ATTEMPTS) -> None:
        """Returns if the server answers that it is well."""
        await self._call("GET", "/health", None, QUICK_SECONDS, attempts=attempts)

    async def is_well(self) -> bool:
        """Whether it is well at this moment: asked once."""
        try:
            await self.health(attempts=1)
        except InferenceError:
            return False
        return True

    async def wait_ready(self, seconds: float) -> None:
        """Wait until the server is well; it may be coming up, or have failed and be about to be started again. Raises
        the last error, most often ServerGone, after `seconds`."""
        deadline, pause = time.monotonic() + seconds, READY_POLL_SECONDS
        while True:
            try:
                return await self.health(attempts=1)
            except InferenceError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, READY_POLL_SECONDS_MAX)

    # --- HTTP -------------------------------------------------------------------------------------------------------

    async def _json(self, method: str, path: str, payload: dict[str, Any] | None) -> Any:
        timeout = QUICK_SECONDS if payload is None else self.timeout_seconds
        response = await self._call(method, path, payload, timeout)
        try:
            return response.json()
        except ValueError as error:
            raise InferenceError(f"{self.url}{path} answered something that is not JSON ({error})") from None

    async def _call(
        self, method: str, path: str, payload: dict[str, Any] | None, timeout_seconds: float,
        fine: tuple[int, ...] = (), attempts: int = ATTEMPTS,
    ) -> httpx.Response:  # fmt: skip
        response = await self._send(method, path, payload, timeout_seconds, attempts)
        if response.is_success or response.status_code in fine:
            return response
        words = f"{method} {self.url}{path} answered {response.status_code}: {_server_message(response)}"
        if 400 <= response.status_code < 500:
            raise Refused(words)
        raise InferenceError(words)

    async def _send(
        self, method: str, path: str, payload: dict[str, Any] | None, timeout_seconds: float, attempts: int
    ) -> httpx.Response:
        """One request, again after a while if nobody answered or the server said 503. Raises ServerGone, and
        InferenceError when it is at work for too long."""
        call, last = f"{method} {self.url}{path}", ""
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                response = await self._http.request(method, self.url + path, json=payload, timeout=timeout_seconds)
            except RETRIED as error:
                last = f"{type(error).__name__}: {error}"
            except httpx.TimeoutException as error:
                words = f"{call}: no answer within {timeout_seconds:g} seconds ({type(error).__name__})"
                if payload is None:
                    raise ServerGone(f"{words}; see the inference log") from None
                raise InferenceError(f"{words}; see the inference log, or raise request_timeout_seconds") from None
            except httpx.TransportError as error:
                raise InferenceError(f"{call} failed: {type(error).__name__}: {error}") from None
            else:
                if response.status_code != 503:
                    return response
                last = f"503: {_server_message(response)}"
        raise ServerGone(
            f"{call}: the inference server does not answer after {attempts} attempt{'s' * (attempts > 1)};"
            f" last: {last}; start it (again)"
        )


def _server_message(response: httpx.Response) -> str:
    """What the server said, out of the ways that servers say it; at most 2000 characters."""
    try:
        body = response.json()
    except ValueError:
        return response.text[:2000]
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if body.get(key)), str(body))
    return str(body)[:2000]


def read_completions(answer: Any, model: str, prompts: Sequence[Sequence[int]], n: int) -> list[Completion]:
    """The completions in an answer of /v1/completions, in order of (prompt, sample).

    Raises InferenceError, naming the field, for anything but `len(prompts) * n` whole answers of `model`.
    """
    where = f"/v1/completions for {model}"
    about = answer.get("graftwork") if isinstance(answer, dict) else None
    if about is not None:
        name = _field(about, "version", str, f"{where}: graftwork")
        digest = about.get("digest")
        if digest is not None and not isinstance(digest, str):
            raise InferenceError(f"{where}: graftwork.digest is {digest!r}, expected text or null")
    else:
        name, digest = _field(answer, "model", str, where), None
    if name != model:
        raise InferenceError(f"{where}: answered by {name!r}; nothing of that answer is used")
    choices = _field(answer, "choices", list, where)
    if len(choices) != len(prompts) * n:
        raise InferenceError(f"{where}: choices has {len(choices)} entries, expected {len(prompts)} prompts x {n}")
    by_index = {_field(choice, "index", int, f"{where}: choices"): choice for choice in choices}
    if by_index.keys() != set(range(len(choices))):
        raise InferenceError(f"{where}: choices[].index are not 0 to {len(choices) - 1}, each once")
    return [
        _read_choice(by_index[i], prompts[i // n], f"{where}: choices[{i}]", name, digest) for i in range(len(choices))
    ]


def _read_choice(choice: Any, prompt: Sequence[int], where: str, name: str, digest: str | None) -> Completion:
    token_ids = _field(choice, "token_ids", list, where)
    if not token_ids or not all(type(i) is int and i >= 0 for i in token_ids):
        raise InferenceError(f"{where}.token_ids is {str(token_ids)[:100]}, expected one or more token ids")
    logprobs = _field(_field(choice, "logprobs", dict, where), "token_logprobs", list, f"{where}.logprobs")
    if len(logprobs) != len(token_ids):
        raise InferenceError(f"{where}.logprobs.token_logprobs has {len(logprobs)} entries, token_ids {len(token_ids)}")
    if not all(type(p) in (int, float) and math.isfinite(p) for p in logprobs):
        raise InferenceError(f"{where}.logprobs.token_logprobs is {str(logprobs)[:100]}, expected finite numbers")
    finish_reason = choice.get("finish_reason")
    if finish_reason not in FINISH_REASONS:
        raise InferenceError(f"{where}.finish_reason is {finish_reason!r}, expected one of {FINISH_REASONS}")
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(prompt):
        raise InferenceError(f"{where}.prompt_token_ids differ from the prompt that was sent")
    return Completion(tuple(token_ids), tuple(map(float, logprobs)), finish_reason, name, digest)


def read_likeliest(choice: Any, where: str) -> dict[int, float]:
    """Token id -> log-prob, of the first sampled token's alternatives. Raises InferenceError, naming the field."""
    name = "logprobs.top_logprobs"
    entries = _field(_field(choice, "logprobs", dict, where), "top_logprobs", list, f"{where}.logprobs")
    try:
        found = {int(token.removeprefix("token_id:")): float(value) for token, value in entries[0].items()}
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InferenceError(f"{where}.{name}: {error}; expected a table of token_id:<id> and numbers") from None
    if not found or not all(map(math.isfinite, found.values())):
        raise InferenceError(f"{where}.{name} is {str(entries)[:100]}, expected finite numbers")
    return found


def _field(value: Any, name: str, kind: type[Any], where: str) -> Any:
    """`value[name]`, which must be a `kind`. Raises InferenceError, naming the field."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise InferenceError(f"{where}: {name} is {str(found)[:100]}, expected a {kind.__name__}")
    return found
