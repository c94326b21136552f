"""`graftwork inference`: the base, the engine and the HTTP server in one process."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn

from graftwork.config.schema import InferenceConfig, InferenceSection
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.inference.engine import Engine
from graftwork.inference.requests import GenerationRequest
from graftwork.inference.server import build_app
from graftwork.logs import say
from graftwork.model.base import load_base
from graftwork.programs.listening import listen, url_of
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.store.disk import Disk

KEEP_ALIVE_SECONDS = 75  # longer than clients keep an idle connection: who is about to ask must not find it shut
SHUTDOWN_SECONDS = 3  # what requests under way are given when the server is told to end
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(config: InferenceConfig) -> None:
    """Serve until SIGTERM or SIGINT: the engine works in this thread, the server on another. Raises ConfigError (port,
    tokenizer), ModelError, and EngineFault when the engine broke: a server that can only say so is of no use, and
    whoever started it can start another."""
    listener = listen(config.host, config.port)
    url = url_of(config.host, listener.getsockname()[1])
    tokenizer = ChatTokenizer.load(config.model.path)
    engine = build_engine(config.model, config.lora, config, tokenizer)

    def announce() -> None:
        if config.ready_file is not None:
            Disk().publish_json(Path(config.ready_file), {"url": url, "pid": os.getpid()})
        say(f"inference: serving {engine.base_name} on {url}", stream=sys.stdout)

    server = Server(engine, tokenizer, announce)

    def serve() -> None:
        engine.submit(GenerationRequest(engine.base_name, [[0]], max_tokens=1)).result()
        server.run([listener])

    with ended_by_signals(server):
        engine.work_for(serve)


def build_engine(model: ModelConfig, lora: LoraConfig, section: InferenceSection, tokenizer: ChatTokenizer) -> Engine:
    """The engine that the settings describe, not started. Raises ModelError."""
    if section.threads:
        torch.set_num_threads(section.threads)
    return Engine(
        load_base(model, lora),
        name=model.path,
        eos_token_ids=tokenizer.eos_token_ids,
        max_adapters=section.max_adapters,
        max_sequences=section.max_sequences,
        max_model_len=section.max_model_len,
        decode=tokenizer.decode,
    )


@contextmanager
def ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """A signal ends the server, which gives requests under way some seconds; a second one gives them none."""
    before = {number: signal.signal(number, server.handle_exit) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn, with two changes: it says when it listens, and a fault of the engine ends it. On asyncio's own loop and
    h11, whatever else happens to be installed. It runs on a thread, where uvicorn leaves signals alone."""

    def __init__(self, engine: Engine, tokenizer: ChatTokenizer, announce: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                build_app(engine, tokenizer), loop="asyncio", http="h11", ws="none", access_log=False,
                log_config=None, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )  # fmt: skip
        self._announce, self._engine = announce, engine

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.fault is not None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()
