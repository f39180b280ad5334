"""OpenTelemetry traces: one span for each request, with the attributes of its log line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.errors import ConfigurationError

NANOSECONDS = 10**9
# Names of OpenTelemetry's conventions for generative models, where there are some.
NAMES = {
    "status": "http.response.status_code",
    "method": "http.request.method",
    "path": "url.path",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "request_id": "gen_ai.response.id",
    "time_to_first_token": "gen_ai.server.time_to_first_token",
}


class Tracer:
    """Sends spans to the OTLP collector at `endpoint`, http://host:4318 say, in a thread of its own.

    Raises ConfigurationError where the packages of the "tracing" extra are not installed.
    """

    def __init__(self, endpoint: str, model_name: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigurationError(
                "otlp_endpoint needs OpenTelemetry: pip install opentelemetry-exporter-otlp-proto-http."
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "aft-server"}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("server")
        self._model_name = model_name

    def record(self, headers: Mapping[str, str], started_at: float, fields: Mapping[str, Any]) -> None:
        """A span of a request that is over; its parent is the one in the traceparent header, if there is one.

        started_at: seconds since 1970; fields: of the log line.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes = {NAMES.get(name, f"aft.{name}"): value for name, value in fields.items() if value is not None}
        span = self._tracer.start_span(
            f"{fields['method']} {fields['path']}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={**attributes, "gen_ai.request.model": self._model_name},
            start_time=int(started_at * NANOSECONDS),
        )
        span.end(int((started_at + fields["seconds"]) * NANOSECONDS))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
