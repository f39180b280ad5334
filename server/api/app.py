"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response

from server.api import generate
from server.api.errors import add_error_handlers
from server.engine import AsyncEngine, LLMEngine


def create_app(engine: LLMEngine, *, request_timeout: float | None = None) -> FastAPI:
    """An application that serves `engine`, whose thread runs for the application's lifetime.

    request_timeout: seconds after which a request fails, waiting included. The engine is at `app.state.engine`.
    """
    async_engine = AsyncEngine(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async_engine.start()
        yield
        async_engine.stop()

    app = FastAPI(title="AFT text generation", lifespan=lifespan)
    app.state.engine, app.state.request_timeout = async_engine, request_timeout
    app.include_router(generate.router)
    add_error_handlers(app)

    @app.get("/health", responses={503: {}})
    def health() -> Response:
        """200 once the server can generate; 503 when it no longer can."""
        return Response(status_code=200 if async_engine.is_ready else 503)

    return app
