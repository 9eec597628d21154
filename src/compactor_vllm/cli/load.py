"""Load for a server that speaks OpenAI's interface: requests at random times, and when their tokens come."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compactor_vllm.errors import CompactorError, InvalidInputError

if TYPE_CHECKING:
    import httpx

PERCENTILES = (50, 90, 95, 99)
PROBE_WORDS = 64
_TEXT = """
the river house light under water story people morning street green table paper garden window winter music letter market
bridge corner summer number family silver engine valley forest yellow doctor little matter simple centre circle narrow
silent broken ground always before across
"""
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a server.

    Attributes:
        url: of the server, without /v1.
        model: its name there; None for the first one that the server lists.
        requests: how many.
        input_tokens, output_tokens: of each; prompts are words, so that their number is met approximately.
        compression: sent with each request, if not None; for servers that know it.
        ignore_eos: sent too, so that answers have `output_tokens` tokens.
        seed: of times and prompts.
        timeout: seconds without a byte after which a request has failed.
    """

    url: str
    model: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    compression: dict[str, Any] | None = None
    ignore_eos: bool = True
    seed: int = 0
    timeout: float = 600


@dataclass(kw_only=True)
class Outcome:
    """One request.

    Attributes:
        sent: clock when it was sent.
        times: clock of each piece of text.
        ended: clock at its end.
        usage: as the server reports it.
        error: why it failed.
    """

    sent: float
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        return int(self.usage.get("completion_tokens") or len(self.times))

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage.get("prompt_tokens") or 0)


class Bench:
    """Sends load to a server.

    Args:
        load: what.
        client: with the server's URL and key.
    """

    def __init__(self, load: Load, client: httpx.AsyncClient):
        self.load, self._client = load, client
        self.model = load.model
        self._words = 0

    async def prepare(self) -> None:
        """Finds the model's name, and how many words make the wanted number of tokens. It warms the server up, too.

        Raises:
            CompactorError: the server does not answer.
        """
        if self.model is None:
            self.model = (await self._call("GET", "/v1/models"))["data"][0]["id"]
        body = self._body(prompt(PROBE_WORDS, self.load.seed, -1)) | {"stream": False, "max_tokens": 1}
        del body["stream_options"]
        usage = (await self._call("POST", "/v1/completions", json=body)).get("usage") or {}
        per_word = (usage.get("prompt_tokens") or PROBE_WORDS) / PROBE_WORDS
        self._words = max(round(self.load.input_tokens / per_word), 1)

    async def run(self, rate: float) -> dict[str, Any]:
        """Sends all requests, `rate` a second on average (infinity: all at once).

        Raises:
            CompactorError: not one of them was answered.
        """
        began = time.perf_counter()
        waits = arrivals(rate, self.load.requests, self.load.seed)
        outcomes = await asyncio.gather(*(self._request(i, began + wait) for i, wait in enumerate(waits)))
        if all(outcome.error for outcome in outcomes):
            raise CompactorError(f"every request failed: {outcomes[0].error}")
        return {"rate": rate if math.isfinite(rate) else "inf", **summarise(outcomes)}

    def _body(self, text: str) -> dict[str, Any]:
        load = self.load
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": text,
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if load.ignore_eos:
            body["ignore_eos"] = True
        if load.compression is not None:
            body["compression"] = load.compression
        return body

    async def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        import httpx

        try:
            response = await self._client.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CompactorError(f"{self.load.url} does not answer: {_name(error)}") from error
        if response.status_code != 200:
            raise CompactorError(f"{path} answered {response.status_code}: {response.text[:300]}")
        result: dict[str, Any] = response.json()
        return result

    async def _request(self, index: int, at: float) -> Outcome:
        import httpx

        body = self._body(prompt(self._words, self.load.seed, index))
        await asyncio.sleep(max(at - time.perf_counter(), 0))
        outcome = Outcome(sent=time.perf_counter())
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    outcome.error = f"status {response.status_code}"
                else:
                    await _read(response, outcome)
        except httpx.HTTPError as error:
            outcome.error = _name(error)
        outcome.ended = time.perf_counter()
        if outcome.error is None and not outcome.times:
            outcome.error = "no text"
        return outcome


async def _read(response: httpx.Response, outcome: Outcome) -> None:
    """Notes when text comes."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            outcome.error = f"error in the stream: {chunk['error'].get('code') or chunk['error'].get('type')}"
        if chunk.get("usage"):
            outcome.usage = chunk["usage"]
        if any(choice.get("text") for choice in chunk.get("choices") or ()):
            outcome.times.append(time.perf_counter())


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# ---- what is sent ----------------------------------------------------------------------------------------------------


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds after the start at which requests are sent: a Poisson process, the first one at 0.

    Raises:
        InvalidInputError: the rate is not positive.
    """
    if not rate > 0:
        raise InvalidInputError(f"a rate is more than 0 requests a second (inf: all at once), not {rate!r}")
    if math.isinf(rate):
        return [0.0] * count
    generator, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(now)
        now += generator.expovariate(rate)
    return times


def prompt(words: int, seed: int, index: int) -> str:
    """Words in an order of its own for every request, so that no server has seen the beginning before."""
    return " ".join(random.Random(f"{seed} {index}").choices(WORDS, k=words))


# ---- what comes of it ------------------------------------------------------------------------------------------------


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Throughput, and percentiles of the times in seconds.

    `ttft` is the time from request to first text, `itl` that between pieces of text, `tpot` a request's mean time for a
    token after the first one, `e2e` that from request to end.
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max(outcome.ended for outcome in outcomes) - min(outcome.sent for outcome in outcomes)
    output = sum(outcome.output_tokens for outcome in good)
    total = output + sum(outcome.prompt_tokens for outcome in good)
    kept = [outcome.usage["kept_tokens"] for outcome in good if outcome.usage.get("kept_tokens")]
    chosen = [outcome.usage["chosen_ratio"] for outcome in good if outcome.usage.get("chosen_ratio")]
    several = [outcome for outcome in good if outcome.output_tokens > 1]
    return {
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": output / seconds,
        "total_tokens_per_second": total / seconds,
        "mean_prompt_tokens": sum(outcome.prompt_tokens for outcome in good) / len(good),
        "mean_output_tokens": output / len(good),
        "mean_kept_tokens": sum(kept) / len(kept) if kept else None,
        "mean_chosen_ratio": sum(chosen) / len(chosen) if chosen else None,
        "ttft": spread([outcome.times[0] - outcome.sent for outcome in good]),
        "itl": spread([after - before for outcome in good for before, after in pairwise(outcome.times)]),
        "tpot": spread([(o.times[-1] - o.times[0]) / (o.output_tokens - 1) for o in several]),
        "e2e": spread([outcome.ended - outcome.sent for outcome in good]),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and maximum; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {**found, "max": ordered[-1]}


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest of sorted values, linearly."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
