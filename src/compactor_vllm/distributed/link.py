"""The way on which rank 0 sends its plans: one TCP connection to each other rank, on which the others only report.

Messages of rank 0 are pickles; those of the others are text and are never unpickled. A connection begins with a
secret that only the ranks of one engine know.
"""

from __future__ import annotations

import hmac
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import cloudpickle

from compactor_vllm.errors import WorkerDiedError

START_TIMEOUT = 300.0
"""Seconds that a rank may take until it connects: imports on a busy machine."""

_SECRET_BYTES = 32
_LENGTH = struct.Struct("!Q")


class Listener:
    """Where the other ranks connect to.

    Args:
        host: address to listen on; the port is a free one.
    """

    def __init__(self, host: str):
        self.secret = secrets.token_bytes(_SECRET_BYTES)
        self._socket = socket.create_server((host, 0), backlog=64)
        self._socket.settimeout(0.2)

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def accept(self, count: int, check: Callable[[], None]) -> list[socket.socket]:
        """Connections of ranks 1 to `count`.

        Args:
            check: called while it waits; raises when a rank cannot come any more.

        Raises:
            WorkerDiedError: a rank does not connect.
        """
        found: dict[int, socket.socket] = {}
        deadline = time.monotonic() + START_TIMEOUT
        while len(found) < count:
            check()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, count + 1)) - set(found))
                raise WorkerDiedError(f"ranks {missing} have not connected in {START_TIMEOUT:.0f} seconds")
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            connection.settimeout(10)
            try:
                rank = _receive_exactly(connection, _SECRET_BYTES + 1)
            except OSError:
                rank = None
            if rank is None or not hmac.compare_digest(rank[:-1], self.secret):
                connection.close()
                continue
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found[rank[-1]] = connection
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        self._socket.close()


def connect(host: str, port: int, secret: bytes, rank: int) -> socket.socket:
    """The connection of a rank to rank 0."""
    connection = socket.create_connection((host, port), timeout=START_TIMEOUT)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(secret + bytes([rank]))
    return connection


def send(connections: list[socket.socket], message: Any) -> None:
    """Sends one message of rank 0 to all others.

    Raises:
        WorkerDiedError: one of them is gone.
    """
    data = dumps(message)
    data = _LENGTH.pack(len(data)) + data
    try:
        for connection in connections:
            connection.sendall(data)
    except OSError as error:
        raise WorkerDiedError(f"a process of the tensor-parallel group has died: {error}") from error


def receive(connection: socket.socket) -> Any:
    """The next message of rank 0; None when it is gone."""
    try:
        head = _receive_exactly(connection, _LENGTH.size)
        data = None if head is None else _receive_exactly(connection, _LENGTH.unpack(head)[0])
    except OSError:
        return None
    return None if data is None else pickle.loads(data)


def dumps(message: Any) -> bytes:
    """A pickle of anything that a plan holds; classes of the program that runs travel by value."""
    return cloudpickle.dumps(message)


def _receive_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
