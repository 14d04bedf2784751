"""Metrics: what the server does, in Prometheus' text format, under the names that vLLM has made common.

Whoever has a dashboard for vLLM changes the prefix and keeps it. Added are the figures by thinking mode: how long the
model thought, how long it then answered, and how often a budget ended its thinking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from leadline.serve.worker import Worker

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOKENS = tuple(2**power for power in range(0, 21))


class Metrics:
    """Counters of one server; a registry of its own, so that two servers can live in one process."""

    def __init__(self, worker: Worker, model: str):
        registry = CollectorRegistry()
        registry.register(_Engine(worker, model))
        self._registry, self._model = registry, model

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"leadline:{name}", text, ("model_name", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"leadline:{name}", text, ("model_name", *labels), registry=registry, buckets=buckets)

        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.")
        self._hits = counter("prefix_cache_hits", "Tokens of prompts that the prefix cache had.")
        self._drafts = counter("spec_decode_num_draft_tokens", "Guesses that were verified.")
        self._accepted = counter("spec_decode_num_accepted_tokens", "Guesses that were right.")
        self._drafts_at = counter("spec_decode_num_draft_tokens_per_pos", "The former, by place.", "position")
        self._accepted_at = counter("spec_decode_num_accepted_tokens_per_pos", "The latter, by place.", "position")
        self._ended = counter("request_success", "Answers that ended, by reason.", "finished_reason")
        self._refused = counter("request_refused", "Requests that were refused, by status.", "status")
        self._spent = counter("thinking_budget_spent", "Answers whose budget ended the thinking.", "mode")
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.", _SECONDS)
        self._each = histogram("time_per_output_token_seconds", "Mean time between tokens of an answer.", _SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.", _SECONDS)
        self._thinking = histogram("request_thinking_tokens", "Tokens of thinking of an answer.", _TOKENS, "mode")
        self._answer = histogram("request_answer_tokens", "Tokens of an answer without thinking.", _TOKENS, "mode")

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def refused(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        self._first.labels(self._model).observe(seconds)

    def prompt(self, tokens: int, cached_tokens: int) -> None:
        """What the prefix cache did for an answer's prompt."""
        self._prompt.labels(self._model).inc(tokens)
        self._queries.labels(self._model).inc(tokens)
        self._hits.labels(self._model).inc(cached_tokens)

    def guesses(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Guesses of an answer that were verified, and those that were right, by their place."""
        self._drafts.labels(self._model).inc(sum(drafted))
        self._accepted.labels(self._model).inc(sum(accepted))
        for place, (tried, right) in enumerate(zip(drafted, accepted, strict=True)):
            self._drafts_at.labels(self._model, str(place)).inc(tried)
            self._accepted_at.labels(self._model, str(place)).inc(right)

    def answer(self, mode: str, reason: str, tokens: int, thinking_tokens: int, budget_spent: bool) -> None:
        """An answer has ended."""
        self._generated.labels(self._model).inc(tokens)
        self._ended.labels(self._model, reason).inc()
        self._thinking.labels(self._model, mode).observe(thinking_tokens)
        self._answer.labels(self._model, mode).observe(tokens - thinking_tokens)
        if budget_spent:
            self._spent.labels(self._model, mode).inc()

    def times(self, whole_s: float, per_token_s: float | None) -> None:
        self._whole.labels(self._model).observe(whole_s)
        if per_token_s is not None:
            self._each.labels(self._model).observe(per_token_s)


class _Engine(Collector):
    """What the engine holds at the moment."""

    def __init__(self, worker: Worker, model: str):
        self._worker, self._model = worker, model

    def collect(self) -> Iterator[Metric]:
        look = self._worker.look
        gauges = {
            "num_requests_running": ("Sequences that have a slot.", look.running),
            "num_requests_waiting": ("Sequences that wait for one.", look.waiting),
            "num_free_slots": ("Slots that no sequence has.", look.free_slots),
            "kv_cache_usage_perc": ("Part of the pages that is held, 1 = all.", look.held_pages / look.pages),
            "kv_cache_pages": ("Pages that are held, by sequences or the prefix cache.", look.held_pages),
            "prefix_cache_pages": ("Pages that the prefix cache holds.", look.cached_pages),
            "kv_cache_bytes": ("Bytes of all slots, pages and blocks that are held.", look.cache_bytes),
            "disk_cache_bytes": ("Bytes of all records of the prefix cache on disk.", look.disk_bytes),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"leadline:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        counters = {
            "num_preemptions": ("States given up and computed again.", look.preempted),
            "spec_decode_num_damaged_drafts": ("Guesses that NaN cut short.", look.damaged_drafts),
            "external_prefix_cache_hits": ("Tokens that the prefix cache had back from disk.", look.recalled_tokens),
            "disk_cache_written": ("Records written to the prefix cache on disk.", look.disk.written),
            "disk_cache_evicted": ("Records that went because it was full.", look.disk.evicted),
            "disk_cache_damaged": ("Records that were dropped because they were damaged.", look.disk.damaged),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"leadline:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
