"""Prometheus metrics under the names of vLLM, so that its dashboards and autoscalers work.

A "key-value cache" here is the pool of states: its usage is the share of slots taken.
"""

from __future__ import annotations

import time
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import disable_created_metrics as leave_out_times_of_creation

from server.engine import FinishReason, LLMEngine, RequestStream

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)
LABELS = ("model_name",)
leave_out_times_of_creation()  # type: ignore[no-untyped-call]  # they double the page

FINISHED_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.END_OF_TEXT: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}


class Metrics:
    """Observer of an AsyncEngine; `render` is the page that Prometheus scrapes."""

    def __init__(self, engine: LLMEngine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        scheduler, pool = engine.scheduler, engine.pool
        for name, what, value in (
            (
                "num_requests_running",
                "Texts being read or decoded.",
                lambda: scheduler.n_slots - scheduler.n_free_slots,
            ),
            ("num_requests_waiting", "Requests waiting for a slot.", lambda: scheduler.num_waiting),
            (
                "kv_cache_usage_perc",
                "Share of state slots in use, 0 to 1.",
                lambda: 1 - scheduler.n_free_slots / pool.n_slots,
            ),
        ):
            gauge = Gauge(f"vllm:{name}", what, LABELS, registry=self._registry)
            gauge.labels(model_name).set_function(value)
        # A slot holds a text of any length.
        self._info("vllm:cache_config", block_size=str(engine.max_model_len), num_gpu_blocks=str(pool.n_slots))
        self._info("aft:build", version=version("aft-server"))
        ProcessCollector(registry=self._registry)
        self._time_to_first_token = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self._inter_token_latency = self._seconds("inter_token_latency_seconds", "Between two tokens of a text.")
        self._e2e_latency = self._seconds("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue_time = self._seconds("request_queue_time_seconds", "From arrival to a slot.")
        self._prefill_time = self._seconds("request_prefill_time_seconds", "From a slot to the first token.")
        self._inference_time = self._seconds("request_inference_time_seconds", "From a slot to the last token.")
        self._decode_time = self._seconds("request_decode_time_seconds", "From the first token to the last.")
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._request_generation_tokens = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens decoded and read in a step.", TOKENS)
        self._params_n = self._histogram("request_params_n", "Texts that a request asks for.", TEXTS)
        self._params_max_tokens = self._histogram("request_params_max_tokens", "Tokens that it asks for.", TOKENS)
        self._counter("num_preemptions", "Never: a text that has started keeps its slot.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._prefix_cache_queries = self._counter("prefix_cache_queries", "Tokens looked for in the prefix cache.")
        self._prefix_cache_hits = self._counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self._external_queries = self._counter("external_prefix_cache_queries", "Tokens looked for in its store.")
        self._external_hits = self._counter("external_prefix_cache_hits", "Tokens found in its store.")
        self._dropped = Counter(
            "aft:prefix_store_dropped", "Prefixes that could not be stored.", LABELS, registry=self._registry
        ).labels(model_name)
        self._success = Counter(
            "vllm:request_success",
            "Texts that ended, by reason.",
            (*LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._answers = Counter(
            "aft:http_responses", "HTTP requests answered, by status.", ("status",), registry=self._registry
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def on_token(self, stream: RequestStream, interval: float | None) -> None:
        self._generation_tokens.inc()
        if interval is not None:
            self._inter_token_latency.observe(interval)
        elif stream.num_generated_tokens == 1 and stream.first_token_at is not None:
            self._time_to_first_token.observe(stream.first_token_at - stream.request.arrived_at)

    def on_step(self, n_tokens: int) -> None:
        self._iteration_tokens.observe(n_tokens)

    def on_close(self, stream: RequestStream) -> None:
        request, first = stream.request, stream.first_token_at
        last = max(stream.last_token_at.values(), default=time.monotonic())
        self._e2e_latency.observe(last - request.arrived_at)
        self._params_n.observe(request.params.n)
        self._params_max_tokens.observe(request.params.max_tokens)
        self._count_ends(stream)
        if request.admitted_at is None:
            return
        self._queue_time.observe(request.admitted_at - request.arrived_at)
        self._inference_time.observe(last - request.admitted_at)
        if first is not None:
            self._prefill_time.observe(first - request.admitted_at)
            self._decode_time.observe(last - first)
        self._prompt_tokens.inc(request.num_prompt_tokens)
        self._request_prompt_tokens.observe(request.num_prompt_tokens)
        self._prefix_cache_queries.inc(request.num_prompt_tokens)
        self._prefix_cache_hits.inc(request.num_cached_tokens)
        self._request_generation_tokens.observe(stream.num_generated_tokens)

    def on_look_up(self, n_wanted: int, n_found: int) -> None:
        self._external_queries.inc(n_wanted)
        self._external_hits.inc(n_found)

    def on_drop(self) -> None:
        """A prefix could not be stored. May be called from any thread."""
        self._dropped.inc()

    def on_answer(self, status: int) -> None:
        """An HTTP request was answered; 499 if its client had left."""
        self._answers.labels(str(status)).inc()

    def _count_ends(self, stream: RequestStream) -> None:
        unfinished = ["error" if stream.error else "abort"] * stream.num_unfinished
        for reason in [*(FINISHED_REASONS[reason] for reason in stream.finish_reasons), *unfinished]:
            self._success.labels(self._model_name, reason).inc()

    def _seconds(self, name: str, what: str) -> Histogram:
        return self._histogram(name, f"{what} In seconds.", SECONDS)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", what, LABELS, registry=self._registry, buckets=buckets).labels(
            self._model_name
        )

    def _info(self, name: str, **labels: str) -> None:
        """What does not change, as labels of a one."""
        gauge = Gauge(f"{name}_info", "What does not change.", (*LABELS, *labels), registry=self._registry)
        gauge.labels(self._model_name, *labels.values()).set(1)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"vllm:{name}", what, LABELS, registry=self._registry).labels(self._model_name)
