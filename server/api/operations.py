"""What those who run the server ask: /health, /ready, /metrics; SageMaker's /ping."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from server.api.context import ContextOf

router = APIRouter(tags=["operations"])


@router.get("/ping", response_class=PlainTextResponse, responses={503: {"description": "It must be restarted."}})
@router.get("/health", response_class=PlainTextResponse, responses={503: {"description": "It must be restarted."}})
async def health(context: ContextOf) -> Response:
    """200 while the process can generate, also while it drains; 503, and why, if its engine is dead, hangs, or fails
    again and again.
    """
    problem = context.engine.problem
    return PlainTextResponse(problem or "", 503 if problem else 200)


@router.get("/ready", response_class=PlainTextResponse, responses={503: {"description": "Send requests elsewhere."}})
async def ready(context: ContextOf) -> Response:
    """200 while requests should be sent here; 503 after SIGTERM, and when /health is."""
    return PlainTextResponse(context.engine.problem or "", 200 if context.engine.is_ready else 503)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(context: ContextOf) -> Response:
    """Metrics for Prometheus, under vLLM's names."""
    return PlainTextResponse(context.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
