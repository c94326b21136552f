"""The HTTP server: OpenAI's routes and vLLM's for adapters, over one engine."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from graftwork.errors import AdapterError, ConfigError, GraftworkError, StoreError
from graftwork.inference import api
from graftwork.inference.engine import Engine
from graftwork.inference.requests import BadRequest, EngineFault, GenerationResult, UnknownModel, WrongDigest

GONE_POLL_SECONDS = 0.5  # how often a request that waits looks whether its client is still there
CLIENT_GONE = 499


class ClientGone(EngineFault):
    """Nobody waits for the answer any more."""


class Ending(EngineFault):
    """The server was told to end, and the time that it gives to what is under way is over."""


STATUS: tuple[tuple[type[GraftworkError], int, str], ...] = (
    (UnknownModel, 404, "NotFoundError"),
    (BadRequest, 400, "BadRequestError"),
    (WrongDigest, 412, "PreconditionFailedError"),
    (AdapterError, 400, "BadRequestError"),
    (StoreError, 400, "BadRequestError"),
    (ConfigError, 400, "BadRequestError"),  # of the chat template: it refuses these messages
    (Ending, 503, "ServiceUnavailableError"),
    (GraftworkError, 500, "InternalServerError"),
)


def build_app(engine: Engine, tokenizer: api.Tokenizer) -> FastAPI:
    """The application; starting and closing the engine is the caller's part."""
    app = FastAPI(title="Graftwork inference", docs_url="/docs", redoc_url=None)
    _add_errors(app)
    _add_sampling(app, engine, tokenizer)
    _add_adapters(app, engine)
    return app


def _add_sampling(app: FastAPI, engine: Engine, tokenizer: api.Tokenizer) -> None:
    @app.post("/v1/completions")
    async def completions(body: api.CompletionBody, request: Request) -> Response:
        prompts = body.token_prompts(tokenizer)
        result = await _answered(engine.submit(body.request(prompts, body.max_tokens)), request)
        return JSONResponse(api.completion_answer(body, prompts, result, tokenizer))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: api.ChatBody, request: Request) -> Response:
        prompt, max_tokens = api.chat_prompt(body, tokenizer, engine.limits.max_model_len)
        result = await _answered(engine.submit(body.request([prompt], max_tokens)), request)
        return JSONResponse(api.chat_answer(body, prompt, result, tokenizer))

    @app.post("/inference/v1/generate")
    async def generate(body: api.GenerateBody, request: Request) -> Response:
        api.refuse_other_stops(body.sampling_params.stop_token_ids, engine.eos_token_ids)
        result = await _answered(engine.submit(body.request()), request)
        api.refuse_other_digest(request.headers.get("if-match"), result)
        return JSONResponse(api.generate_answer(body, result))


def _add_adapters(app: FastAPI, engine: Engine) -> None:
    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return api.model_list(engine.models(), created, engine.limits.max_model_len)

    # Not async: these wait for the disk and for the engine, on a thread of their own.
    @app.post("/v1/load_lora_adapter")
    def load(body: api.LoadBody) -> dict[str, Any]:
        loaded = engine.load(body.lora_name, Path(body.lora_path))
        return {"message": f"adapter {loaded.name} is loaded", "digest": loaded.digest}

    @app.post("/v1/unload_lora_adapter")
    def unload(body: api.UnloadBody) -> dict[str, Any]:
        engine.unload(body.lora_name)
        return {"message": f"adapter {body.lora_name} is unloaded"}

    @app.get("/health")
    async def health() -> Response:
        if engine.fault is not None:
            return JSONResponse(api.error_body(engine.fault, "InternalServerError", 500), 500)
        return JSONResponse({"status": "ok"})


async def _answered(future: Future[GenerationResult], request: Request) -> GenerationResult:
    """The engine's answer; a client that goes away takes its sequences with it."""
    answer = asyncio.wrap_future(future)
    try:
        while not (await asyncio.wait({answer}, timeout=GONE_POLL_SECONDS))[0]:
            if await request.is_disconnected():
                raise ClientGone("the client is gone")
        return answer.result()
    except asyncio.CancelledError:
        raise Ending("the server is about to end; ask again when it was started again") from None
    finally:
        answer.cancel()


def _add_errors(app: FastAPI) -> None:
    """Every answer that is not 2xx has OpenAI's shape."""

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(GraftworkError)
    async def refused(request: Request, error: GraftworkError) -> Response:
        code, kind = next((code, kind) for cls, code, kind in STATUS if isinstance(error, cls))
        param = error.param if isinstance(error, BadRequest) else None
        return JSONResponse(api.error_body(str(error), kind, code, param), code)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        mistakes = [_mistake(mistake) for mistake in error.errors()]
        message = "; ".join(f"{field}: {words}" for field, words in mistakes)
        return JSONResponse(api.error_body(message, "BadRequestError", 400, mistakes[0][0]), 400)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(api.error_body(message, "NotFoundError", error.status_code), error.status_code)


def _mistake(mistake: dict[str, Any]) -> tuple[str, str]:
    """(field, what is wrong with it) of one of pydantic's findings."""
    field = ".".join(str(part) for part in mistake["loc"][1:]) or "body"
    if mistake["type"] == "extra_forbidden":
        return field, "no such field; the embedded engine does not know it, so it cannot honour it"
    if mistake["type"] == "missing":
        return field, "must be given"
    if mistake["type"] == "json_invalid":
        return "body", f"not JSON: {mistake.get('ctx', {}).get('error', mistake['msg'])}"
    return field, str(mistake["msg"]).removeprefix("Value error, ")
