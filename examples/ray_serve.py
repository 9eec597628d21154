"""Replicas of the HTTP server behind one address: Ray Serve starts them, spreads requests and replaces those that fail.

pip install 'compactor-vllm[server,ray]'
python examples/ray_serve.py [MODEL] [REPLICAS]

Every replica is a whole server with an engine of its own; with tensor_parallel_size=N it starts its ranks itself and
needs N GPUs. What one replica remembers (contexts by id, the prefix cache) the others do not know.
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from ray import serve

from compactor_vllm import AsyncLLM, LLMConfig
from compactor_vllm.server.app import create_app
from compactor_vllm.server.settings import ServerSettings


def server_app(
    config: LLMConfig, settings: ServerSettings, replicas: int = 2, **actor_options: Any
) -> serve.Application:
    """The application for `serve.run`.

    Args:
        actor_options: what Ray sets aside for a replica; on GPUs num_gpus=config.tensor_parallel_size.
    """

    def build() -> Any:  # in each replica, which gets requests when this is done
        engine = AsyncLLM(config)
        while not engine.is_ready:
            if engine.failure is not None:
                raise RuntimeError(engine.failure)
            time.sleep(0.1)
        return create_app(engine, settings)

    @serve.deployment(num_replicas=replicas, ray_actor_options=actor_options, max_ongoing_requests=settings.max_queue)
    @serve.ingress(build)
    class Server:
        pass

    return Server.bind()


def main(model: str = "smollm2-135m-instruct", replicas: str = "2") -> None:
    import torch

    config = LLMConfig(model=model, show_progress_bar=False)
    options = {"num_gpus": config.tensor_parallel_size} if torch.cuda.is_available() else {"num_cpus": 1}
    serve.run(server_app(config, ServerSettings(model_names=(model,)), int(replicas), **options))
    print("http://127.0.0.1:8000/v1, Ctrl-C ends it", flush=True)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
