"""The HTTP API's bodies: OpenAI's fields, typed, and the answers in OpenAI's and vLLM's shapes.

A field that would change the answer and that the engine cannot honour is refused by name, never ignored. What is not
listed here is unknown, and refused too.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from graftwork.inference.engine import ServedModel
from graftwork.inference.requests import BadRequest, Choice, GenerationRequest, GenerationResult, WrongDigest


class Tokenizer(Protocol):
    """What the server asks of `rollouts.chat.ChatTokenizer`."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[Any], add_generation_prompt: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


def only(*neutral: Any) -> BeforeValidator:
    """A field that the engine does not have: absent, null or a value that changes nothing."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return value
        advice = f"leave it out or send {neutral[0]!r}" if neutral else "leave it out"
        raise ValueError(f"{value!r} is not supported by the embedded engine; {advice}")

    return BeforeValidator(check)


def defaulted(default: Any) -> BeforeValidator:
    """null means the default, as in OpenAI's API."""
    return BeforeValidator(lambda value: default if value is None else value)


def _prompts(value: Any) -> list[list[int]] | list[str]:
    """The four forms of `prompt` as two."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("expected a text, a list of texts, a list of token ids or a list of such lists, not empty")


def _stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Unsupported = Annotated[Any, only()]
NoPenalty = Annotated[Any, only(0)]
Off = Annotated[Any, only(False)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Sampling(_Body):
    """How to sample: what all requests have in common."""

    n: Annotated[int, defaulted(1)] = 1
    temperature: Annotated[float, defaulted(1.0)] = 1.0
    top_p: Annotated[float, defaulted(1.0)] = 1.0
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] = []

    logit_bias: Annotated[Any, only({})] = None
    presence_penalty: NoPenalty = 0
    frequency_penalty: NoPenalty = 0
    repetition_penalty: Annotated[Any, only(1)] = 1
    top_k: Annotated[Any, only(-1, 0)] = -1
    min_p: NoPenalty = 0
    min_tokens: NoPenalty = 0
    ignore_eos: Off = False
    stop_token_ids: Annotated[Any, only([])] = None

    def request_to(self, model: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            model, prompts, n=self.n, max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p,
            seed=self.seed, stop=tuple(self.stop),
        )  # fmt: skip


class _SamplingBody(_Sampling):
    """What completions and chat completions have in common."""

    model: str
    return_token_ids: Annotated[bool, defaulted(False)] = False
    user: str | None = None  # says who asks; changes nothing
    stream: Off = False
    stream_options: Unsupported = None
    response_format: Annotated[Any, only({"type": "text"})] = None

    def request(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> GenerationRequest:
        return self.request_to(self.model, prompts, max_tokens)


class CompletionBody(_SamplingBody):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompts)]
    max_tokens: Annotated[int, defaulted(16)] = 16
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """0 or 1: the log-prob of each sampled token; there are no alternatives."""
    best_of: Annotated[Any, only(1)] = None
    echo: Off = False
    suffix: Annotated[Any, only("")] = None
    prompt_logprobs: Unsupported = None

    def token_prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        return [tokenizer.encode(item) if isinstance(item, str) else item for item in self.prompt]


class Message(_Body):
    model_config = ConfigDict(extra="allow")  # a chat template may use fields of its own

    role: str
    content: str


class ChatBody(_SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: Annotated[bool, defaulted(False)] = False
    top_logprobs: NoPenalty = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none")] = None
    chat_template: Unsupported = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    add_generation_prompt: Annotated[Any, only(True)] = True
    continue_final_message: Off = False

    def tokens_limit(self, room: int) -> int:
        """Most tokens to answer with; `room`, what is left of the model's length, where nothing was asked for."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return room if self.max_tokens is None else self.max_tokens


class SamplingParams(_Sampling):
    """vLLM's, in POST /inference/v1/generate. What only says how text is made has no effect: there is none."""

    max_tokens: Annotated[int, defaulted(16)] = 16
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    prompt_logprobs: Unsupported = None
    stop_token_ids: list[int] | None = None
    """Ids that end an answer here in any case; others are refused (`refuse_other_stops`)."""
    routed_experts_prompt_start: int | None = None  # of what is not returned here: routed experts
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    include_stop_str_in_output: bool | None = None


class GenerateBody(_Body):
    """POST /inference/v1/generate: token ids in, token ids out."""

    model: str
    token_ids: Annotated[list[int], Field(min_length=1)]
    sampling_params: SamplingParams = SamplingParams()
    request_id: str | None = None
    stream: Off = False
    stream_options: Unsupported = None
    priority: Annotated[Any, only(0)] = 0
    cache_salt: Unsupported = None
    features: Unsupported = None
    kv_transfer_params: Unsupported = None

    def request(self) -> GenerationRequest:
        request = self.sampling_params.request_to(self.model, [self.token_ids], self.sampling_params.max_tokens)
        return request if request.seed is None else replace(request, seed=prompt_seed(request.seed, self.token_ids))


def prompt_seed(seed: int, token_ids: Sequence[int]) -> int:
    """The seed of a generate request. A client that plays a conversation sends one seed with every turn; what is drawn
    in a turn must not depend on what was drawn in an earlier one, so the tokens that are read count too."""
    return int.from_bytes(hashlib.sha256(f"{seed} {list(token_ids)}".encode()).digest()[:8]) >> 1


def refuse_other_stops(stop_token_ids: Sequence[int] | None, eos_token_ids: Sequence[int]) -> None:
    """Raises BadRequest for a stop token that is not an end token of this engine's."""
    if others := [token for token in stop_token_ids or () if token not in eos_token_ids]:
        raise BadRequest(
            f"stop_token_ids: {others} do not end an answer of the embedded engine, only {list(eos_token_ids)} do;"
            " leave them out",
            "stop_token_ids",
        )


def refuse_other_digest(if_match: str | None, result: GenerationResult) -> None:
    """Raises WrongDigest when the header If-Match names another digest than that of the adapter that was used."""
    if if_match is not None and (wanted := if_match.strip().strip('"')) != result.digest:
        raise WrongDigest(f"{result.version} has digest {result.digest} here, If-Match asks for {wanted}")


class LoadBody(_Body):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: Off = False


class UnloadBody(_Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: Any = None  # vLLM's own number; the name decides there too


def chat_prompt(body: ChatBody, tokenizer: Tokenizer, max_model_len: int) -> tuple[list[int], int]:
    """(token ids, most tokens to answer with). Raises BadRequest when the conversation leaves no room."""
    messages = [message.model_dump() for message in body.messages]
    token_ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
    room = max_model_len - len(token_ids)
    if room < 1:
        raise BadRequest(
            f"messages: {len(token_ids)} tokens leave no room for an answer within {max_model_len} (max_model_len);"
            " shorten the conversation",
            "messages",
        )
    return token_ids, body.tokens_limit(room)


def completion_answer(
    body: CompletionBody, prompts: list[list[int]], result: GenerationResult, tokenizer: Tokenizer
) -> dict[str, Any]:
    def shape(choice: Choice, text: str) -> dict[str, Any]:
        shaped: dict[str, Any] = {"text": text, "logprobs": None}
        if body.logprobs is not None:
            shaped["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in choice.token_ids],
                "token_logprobs": choice.logprobs.tolist(),
                "top_logprobs": None,
                "text_offset": [],
            }
        return shaped

    return _answer("text_completion", "cmpl", body, prompts, result, tokenizer, shape)


def chat_answer(body: ChatBody, prompt: list[int], result: GenerationResult, tokenizer: Tokenizer) -> dict[str, Any]:
    def shape(choice: Choice, text: str) -> dict[str, Any]:
        shaped: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "logprobs": None}
        if body.logprobs:
            shaped["logprobs"] = {"content": _entries(choice)}
        return shaped

    return _answer("chat.completion", "chatcmpl", body, [prompt], result, tokenizer, shape)


def generate_answer(body: GenerateBody, result: GenerationResult) -> dict[str, Any]:
    """The log-probs are always there: who asks for token ids wants to train on them."""
    return {
        "request_id": body.request_id or f"generate-{uuid.uuid4().hex}",
        "choices": [
            {
                "index": index,
                "token_ids": choice.token_ids.tolist(),
                "finish_reason": choice.finish_reason,
                "logprobs": {"content": _entries(choice)},
            }
            for index, choice in enumerate(result.choices)
        ],
        "graftwork": _source(result),
    }


def _entries(choice: Choice) -> list[dict[str, Any]]:
    pairs = zip(choice.token_ids.tolist(), choice.logprobs.tolist(), strict=True)
    return [{"token": f"token_id:{t}", "logprob": p, "bytes": None, "top_logprobs": []} for t, p in pairs]


def _source(result: GenerationResult) -> dict[str, Any]:
    """Which adapter the engine itself used."""
    return {"version": result.version, "digest": result.digest}


def _answer(
    kind: str, prefix: str, body: _SamplingBody, prompts: list[list[int]], result: GenerationResult,
    tokenizer: Tokenizer, shape: Callable[[Choice, str], dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    choices = []
    for index, choice in enumerate(result.choices):
        text = cut_at_stop(tokenizer.decode(choice.token_ids.tolist()), body.stop)
        shaped = {"index": index, "finish_reason": choice.finish_reason, **shape(choice, text)}
        if body.return_token_ids:
            shaped["token_ids"] = choice.token_ids.tolist()
            shaped["prompt_token_ids"] = prompts[choice.prompt_index]
        choices.append(shaped)
    prompt_tokens = sum(map(len, prompts))
    completion_tokens = sum(len(choice.token_ids) for choice in result.choices)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
        "graftwork": _source(result),
    }


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string: OpenAI's texts leave it out, though its tokens were sampled."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def model_list(models: Sequence[ServedModel], created: int, max_model_len: int) -> dict[str, Any]:
    """GET /v1/models: the base, and the adapters as its children."""
    base = models[0].name
    cards: list[dict[str, Any]] = [
        {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "graftwork",
            "root": str(model.path) if model.path else model.name,
            "parent": base if model.path else None,
            "max_model_len": None if model.path else max_model_len,
            "permission": [],
            "digest": model.digest,
        }
        for model in models
    ]
    return {"object": "list", "data": cards}


def error_body(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
