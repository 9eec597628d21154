"""A live server on a free port, with a tiny model behind it, and the offline engine that answers must equal."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from compactor_vllm import LLM, LLMConfig
from compactor_vllm.core.async_llm import AsyncLLM
from compactor_vllm.server.run import Server, bind
from compactor_vllm.server.settings import ServerSettings
from compactor_vllm.server.state import ServerState
from tests.tiny import save_tiny

ENGINE: dict[str, Any] = {
    "kvcache_page_size": 16,
    "kv_cache_memory_bytes": 4 * 2**20,
    "max_num_seqs": 32,
    "max_model_len": 2048,
    "show_progress_bar": False,
    "device": "cpu",
}

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Spares clients the certificates, which take longer to read than most tests."""


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Live:
    """A server in a thread of its own."""

    def __init__(self, config: LLMConfig, settings: ServerSettings, ready: bool = True):
        self.engine = AsyncLLM(config)
        self.server = Server(self.engine, settings)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._transport = httpx.Client(verify=_NO_TLS, trust_env=False, timeout=60)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)
        if ready:
            wait_until(lambda: self.engine.is_ready, 60)

    @property
    def state(self) -> ServerState:
        return self.server.state

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, http_client=self._transport, **options)

    def http(self, **options: Any) -> httpx.Client:
        options = {"timeout": 60, "trust_env": False, "verify": _NO_TLS} | options
        return httpx.Client(base_url=self.url, **options)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Nothing runs, and every page is free."""

        def idle() -> bool:
            stats = self.engine.stats
            return not self.state.jobs and not stats.running + stats.waiting and stats.free_pages == stats.pages > 0

        wait_until(idle, seconds)

    def wait_until_stopped(self, seconds: float = 30) -> None:
        wait_until(lambda: not self._thread.is_alive(), seconds)

    def stop(self) -> None:
        self._transport.close()
        self.server.should_exit = True
        self._thread.join()
        self.engine.close()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny-server")
    save_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def make_config(checkpoint: Path) -> Callable[..., LLMConfig]:
    def make(**changes: Any) -> LLMConfig:
        return LLMConfig(model=str(checkpoint), **(ENGINE | changes))

    return make


@pytest.fixture
def serve(make_config: Callable[..., LLMConfig]) -> Iterator[Callable[..., Live]]:
    """serve({"max_num_seqs": 1}, max_queue=0) -> a server that ends with the test."""
    started: list[Live] = []

    def start(engine: dict[str, Any] | None = None, ready: bool = True, **settings: Any) -> Live:
        settings = {"model_names": ("tiny",)} | settings
        started.append(Live(make_config(**(engine or {})), ServerSettings(**settings), ready))
        return started[-1]

    yield start
    for live in started:
        live.stop()


@pytest.fixture(scope="session")
def shared_server(make_config: Callable[..., LLMConfig]) -> Iterator[Live]:
    live = Live(make_config(), ServerSettings(model_names=("tiny", "tiny-alias")))
    yield live
    live.stop()


@pytest.fixture
def live(shared_server: Live) -> Iterator[Live]:
    """The server that tests share; each must leave it idle."""
    yield shared_server
    shared_server.wait_until_idle()


@pytest.fixture
def client(live: Live) -> openai.OpenAI:
    return live.client()


@pytest.fixture(scope="session")
def llm(make_config: Callable[..., LLMConfig]) -> LLM:
    """The same model, offline."""
    return LLM(make_config())
