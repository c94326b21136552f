"""`graftwork inference` ends when its engine broke."""

import asyncio
from types import SimpleNamespace
from typing import Any

from graftwork.programs.inference import Server


def test_the_server_ends_with_its_engine() -> None:
    engine: Any = SimpleNamespace(fault=None)
    server = Server(engine, SimpleNamespace(), lambda: None)  # type: ignore[arg-type]
    server.config.load()
    assert asyncio.run(server.on_tick(1)) is False
    engine.fault = "the engine failed: out of something"
    assert asyncio.run(server.on_tick(2)) is True
