"""`graftwork inference` ends when its engine broke."""

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

from graftwork.programs.inference import Server
from graftwork.programs.listening import listen


def test_the_server_ends_with_its_engine() -> None:
    engine: Any = SimpleNamespace(fault=None)
    server = Server(engine, SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    server.config.load()
    assert asyncio.run(server.on_tick(1)) is False
    engine.fault = "the engine failed: out of something"
    assert asyncio.run(server.on_tick(2)) is True


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
