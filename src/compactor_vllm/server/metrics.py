"""Prometheus metrics. Names follow vLLM's, with our prefix; docs/server.md lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from compactor_vllm.core.engine_thread import EngineStats
from compactor_vllm.utils.sequence import Sequence as EngineSequence

_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_END_TO_END = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)
_RETENTION = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


class HasStats(Protocol):
    """What the collector reads."""

    @property
    def stats(self) -> EngineStats: ...


class EngineCollector(Collector):
    """Reads the engine's state when somebody scrapes."""

    def __init__(self, engine: HasStats):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        used = stats.pages - stats.free_pages
        gauges = {
            "num_requests_running": ("Sequences that are prefilled or generate.", stats.running),
            "num_requests_waiting": ("Sequences in the queue, preempted ones included.", stats.waiting),
            "kv_pages_used": ("Pages of the KV cache in use.", used),
            "kv_pages_free": ("Pages of the KV cache that are free.", stats.free_pages),
            "kv_page_imbalance": ("Pages in use on the fullest rank over the mean of the ranks.", stats.page_imbalance),
            "contexts": ("Open contexts.", stats.contexts),
            "context_bytes": ("Bytes of KV cache pages that open contexts hold.", stats.context_bytes),
            "context_offloaded_bytes": ("Bytes of open contexts in host memory.", stats.offloaded_bytes),
            "cached_prefixes": ("Prefixes that wait for a next request.", stats.prefixes),
            "kv_cache_usage_perc": ("Part of the pages in use, from 0 to 1.", used / stats.pages if stats.pages else 0),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"compactor_{name}", text, value=value)
        counters = {
            "num_preemptions": ("Preempted sequences.", stats.preemptions),
            "prefix_cache_lookups": ("Requests that could begin with a cached prefix.", stats.prefix_lookups),
            "prefix_cache_hits": ("Requests that began with one.", stats.prefix_hits),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"compactor_{name}", text, value=value)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: HasStats):
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engine))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"compactor_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"compactor_{name}", text, labels, buckets=buckets, registry=registry)

        self.http = counter("http_requests", "HTTP responses.", "path", "method", "status")
        self.finished = counter("request_success", "Finished sequences, by reason.", "finished_reason")
        self.refused = counter("requests_refused", "Requests refused for lack of room or while not ready.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.kept_tokens = counter("kept_tokens", "Prompt tokens kept per layer and KV head.")
        self.context_requests = counter("context_requests", "Requests that followed a context.")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that were not computed again.")
        self.saved_bytes = counter("kv_bytes_saved", "KV cache bytes that compression saved, over finished sequences.")
        self.first_token = histogram("time_to_first_token_seconds", "From request to first token.", _FIRST_TOKEN)
        self.between = histogram("inter_token_latency_seconds", "Between tokens of a sequence.", _BETWEEN_TOKENS)
        self.end_to_end = histogram("e2e_request_latency_seconds", "From request to last token.", _END_TO_END)
        self.retention = histogram("retention", "Kept fraction of prompts.", _RETENTION, "method")
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_size = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

    def observe(
        self, sequences: Sequence[EngineSequence], times: Mapping[int, Sequence[float]], began: float, method: str
    ) -> None:
        """Counts the completions of one prompt.

        Args:
            times: for each completion, when its tokens were drawn.
            began: when the request came, by the same clock.
            method: name of the compression method.
        """
        first = sequences[0]
        self.prompt_tokens.inc(len(first.prompt_token_ids))
        self.prompt_size.observe(len(first.prompt_token_ids))
        self.cached_tokens.inc(first.cached_tokens)
        if first.context is not None:
            self.context_requests.inc()
        if first.kept_tokens is not None:
            self.kept_tokens.inc(first.kept_tokens)
        if first.kept_fraction is not None:
            self.retention.labels(method).observe(first.kept_fraction)
        for index, sequence in enumerate(sequences):
            drawn = times.get(index, ())
            self.finished.labels(sequence.finish_reason or "abort").inc()
            self.generation_tokens.inc(len(sequence.output_token_ids))
            self.answer_size.observe(len(sequence.output_token_ids))
            if sequence.kv_bytes is not None and sequence.kv_bytes_full is not None:
                self.saved_bytes.inc(max(sequence.kv_bytes_full - sequence.kv_bytes, 0))
            if drawn:
                self.first_token.observe(drawn[0] - began)
                self.end_to_end.observe(drawn[-1] - began)
            for before, after in pairwise(drawn):
                self.between.observe(after - before)

    def page(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)
