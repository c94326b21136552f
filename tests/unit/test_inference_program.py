"""`graftwork inference` ends when its engine broke."""

import asyncio
import signal
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from graftwork.config.schema import InferenceConfig
from graftwork.config.section import ModelConfig
from graftwork.inference.engine import Engine
from graftwork.inference.requests import EngineFault
from graftwork.model.base import BaseModel
from graftwork.programs import inference
from graftwork.programs.inference import Server
from graftwork.programs.listening import listen


def test_the_server_ends_with_its_engine() -> None:
    engine: Any = SimpleNamespace(fault=None)
    server = Server(engine, SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    server.config.load()
    assert asyncio.run(server.on_tick(1)) is False
    engine.fault = "the engine failed: out of something"
    assert asyncio.run(server.on_tick(2)) is True


def test_the_program_ends_with_its_engine_and_says_why(monkeypatch: pytest.MonkeyPatch, tiny: BaseModel) -> None:
    def broken() -> None:
        raise MemoryError("no room")

    engine, tokenizer = Engine(tiny, name="tiny", eos_token_ids=[1]), SimpleNamespace()
    monkeypatch.setattr(engine._scheduler, "step", broken)
    monkeypatch.setattr(inference, "build_engine", lambda *_: engine)
    monkeypatch.setattr(inference.ChatTokenizer, "load", lambda _: tokenizer)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(EngineFault, match="MemoryError: no room"):
        inference.main(InferenceConfig(model=ModelConfig(path="tiny")))
    assert signal.getsignal(signal.SIGTERM) == before


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm and delayed acknowledgements together hold a small answer back for 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(note, sock=listen("127.0.0.1", 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            no_delay = await found
            writer.close()
            return no_delay

    assert asyncio.run(accepted()) != 0
