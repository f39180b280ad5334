"""What is written of an HTTP request when it is over."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from server.engine import RequestStream


@dataclass
class Record:
    """One HTTP request, for its log line and its trace; `record_of` gives it to who opens streams for it."""

    request_id: str
    method: str
    path: str
    headers: dict[str, str]
    started_at: float = field(default_factory=time.time)  # seconds since 1970
    started: float = field(default_factory=time.monotonic)
    status: int = 499  # nobody was there to read an answer
    streams: list[RequestStream] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Times in seconds. Of several prompts, tokens are summed and times are the latest."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "method": self.method,
            "path": self.path,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 6),
        }
        if self.streams:
            requests = [stream.request for stream in self.streams]
            fields |= {
                "prompt_tokens": sum(request.num_prompt_tokens for request in requests),
                "cached_tokens": sum(request.num_cached_tokens for request in requests),
                "generated_tokens": sum(stream.num_generated_tokens for stream in self.streams),
                "finish_reasons": [reason for stream in self.streams for reason in _reasons(stream)],
                "queue_seconds": _latest((request.admitted_at, request.arrived_at) for request in requests),
                "time_to_first_token": _latest((s.first_token_at, s.request.arrived_at) for s in self.streams),
            }
        return fields


def record_of(request: Request) -> Record:
    record: Record = request.state.record
    return record


def _reasons(stream: RequestStream) -> list[str]:
    unfinished = [type(stream.error).__name__ if stream.error else "abandoned"] * stream.num_unfinished
    return [*stream.finish_reasons, *unfinished]


def _latest(spans: Any) -> float | None:
    known = [end - start for end, start in spans if end is not None]
    return round(max(known), 6) if known else None
