"""A port to serve on, and the URL that leads to it."""

from __future__ import annotations

import socket

from graftwork.errors import ConfigError

BACKLOG_CONNECTIONS = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow begins: a port that is taken is said at once. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on the connections; without, a body waits 40 ms for its headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Stop the program that has the port, or set"
            " inference.port to another one (0: any free one)"
        ) from None
    return listener


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches who listens there."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{reachable}]" if ":" in reachable else reachable
    return f"http://{shown}:{port}"
