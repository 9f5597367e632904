"""Listen, serve until a signal arrives, answer the requests that were begun, and end."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ehr_embed.core.errors import UserError

log = logging.getLogger(__name__)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
BACKLOG = 512


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine can reach an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("ward.example")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str, allowed: list[str] | None) -> tuple[str, ...] | None:
    """Return the host names under which requests are answered, None for any.

    >>> hosts_of("127.0.0.1", None), hosts_of("0.0.0.0", None), hosts_of("0.0.0.0", ["ward.example"])
    (('localhost', '127.0.0.1', '::1'), None, ('ward.example',))
    """
    if allowed is not None:
        return tuple(name.lower() for name in allowed)
    return tuple(dict.fromkeys((*LOOPBACK, host))) if is_loopback(host) else None


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: address or name of this machine.
        port: 0 = a free one.

    Raises:
        UserError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        told = error.strerror or str(error)
        raise UserError(
            f"host={host} port={port}: cannot listen there ({told}). Type: port={port + 1}, or another host"
        ) from error
    return listener


def serve(app: FastAPI, listener: socket.socket, *, shutdown_s: float, max_connections: int) -> None:
    """Serve until SIGINT or SIGTERM; then no new connection is taken, and requests that were begun are answered.

    Args:
        app: the application.
        listener: what `listen` returned.
        shutdown_s: seconds after which requests that are not answered yet are dropped.
        max_connections: connections and requests above which 503 is answered.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(shutdown_s)),
        limit_concurrency=max_connections,
        lifespan="on",
    )
    server = uvicorn.Server(config)
    with _QuietAfterwards():
        server.run(sockets=[listener])


class _QuietAfterwards:
    """Context in which a signal that uvicorn has obeyed, and raises once more at its end, ends nothing else."""

    def __enter__(self) -> None:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, _ignored)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _ignored(number: int, frame: FrameType | None) -> None:
    log.info("stopped by %s", signal.Signals(number).name)
