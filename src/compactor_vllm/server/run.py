"""Runs a server until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from types import FrameType

import uvicorn

from compactor_vllm.config import LLMConfig
from compactor_vllm.core.async_llm import AsyncLLM
from compactor_vllm.errors import ConfigError
from compactor_vllm.server.app import create_app
from compactor_vllm.server.keys import ENVIRONMENT
from compactor_vllm.server.logs import logger
from compactor_vllm.server.parameters import default_method
from compactor_vllm.server.settings import ServerSettings
from compactor_vllm.server.state import ServerState

_CLOSE_SECONDS = 30.0
"""Seconds that an engine gets to end its last step; the process does not wait for one that hangs."""


class Server(uvicorn.Server):
    """A uvicorn server that drains before it stops: the first signal lets running requests finish, a second does not.

    Args:
        engine: served; closed by the caller.
        settings: see `ServerSettings`.
    """

    def __init__(self, engine: AsyncLLM, settings: ServerSettings):
        self.engine, self.settings = engine, settings
        app = create_app(engine, settings)
        self.state: ServerState = app.state.server
        self.load_error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        self._spawn(self._watch_loading())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by signals, in the main thread."""
        if self._loop is None or self.state.draining:
            super().handle_exit(sig, frame)
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """Stops taking requests, and the server when those that run are done; any thread may call it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._spawn(self._drain()))

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        seconds = self.settings.drain_timeout
        logger.info("stopping: %d requests get %g s to finish", len(self.state.jobs), seconds)
        await self.state.drain(seconds)
        self.should_exit = True

    async def _watch_loading(self) -> None:
        try:
            await self.engine.ready()
        except Exception as error:
            self.load_error = error
            self.should_exit = True
        else:
            logger.info("ready: %s", ", ".join(self.settings.model_names))


def run(config: LLMConfig, settings: ServerSettings, host: str, port: int) -> None:
    """Serves a model until SIGTERM or Ctrl-C; running requests get `settings.drain_timeout` to finish.

    Raises:
        ConfigError: the address cannot be bound.
        UnknownMethodError, InvalidInputError: the default compression method cannot be used.
        CompactorError: the model cannot be loaded.
    """
    default_method(settings.defaults)
    listener = bind(host, port)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    if not settings.keys and not is_loopback(host):
        logger.warning(
            "the server listens on %s without keys: whoever reaches it can use it. Set %s or --api-key-file",
            host,
            ENVIRONMENT,
        )
    engine = AsyncLLM(config)
    try:
        server = Server(engine, settings)
        address = listener.getsockname()
        logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, address[1])
        server.run(sockets=[listener])
    finally:
        listener.close()
        engine.close(timeout=_CLOSE_SECONDS)
    if server.load_error is not None:
        raise server.load_error


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        ConfigError: it cannot be had.
    """
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With the protocol named, asyncio turns Nagle's delay off, which would hold up every small write.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
