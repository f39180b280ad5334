"""The FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.api import openapi, operations, pages, tokenize
from server.api import sessions as sessions_api
from server.api.browsers import Hosts, Origins
from server.api.chat_template import ChatTemplate
from server.api.config import APIConfig
from server.api.context import Context
from server.api.contracts import Contracts
from server.api.middleware import APIKeys, BodyLimit, Head, RequestLog, RoutePath
from server.api.openai import OPENAI
from server.api.tgi import TGI
from server.api.tracing import Tracer
from server.engine import AsyncEngine, LLMEngine, PrefixStore, StoredPrefixes
from server.metrics import Metrics
from server.sessions import Sessions, SessionsConfig
from server.stores import SessionStore, SQLiteSessionStore

CONTRACTS = (TGI, OPENAI)
OPEN_PATHS = frozenset({"/health", "/ping", "/ready", "/ui"})
METRICS_PATHS = frozenset({"/metrics", "/openapi.json"}) | pages.DOCS_PATHS  # open unless they are to be protected


def create_app(
    engine: LLMEngine,
    config: APIConfig | None = None,
    chat_template: ChatTemplate | None = None,
    store: SessionStore | None = None,
    sessions_config: SessionsConfig | None = None,
    prefix_store: PrefixStore | None = None,
) -> FastAPI:
    """An application that serves `engine`, whose thread runs for the application's lifetime.

    store: of sessions, without which they are in memory, and end with the application; prefix_store: where the prefix
    cache goes on. Both are closed at the end, as is chat_template. The engine's front is at `app.state.context.engine`.
    """
    config = config or APIConfig()
    metrics = Metrics(engine, config.model_name)
    stored = (
        StoredPrefixes(prefix_store, engine.prefix_cache, engine.state_files, engine.config, metrics.on_drop)
        if prefix_store
        else None
    )
    async_engine = AsyncEngine(engine, metrics, stored, n_owners=len(config.api_keys))
    sessions_config = sessions_config or SessionsConfig()
    store = store or SQLiteSessionStore(":memory:", sessions_config.session_memory)
    sessions = Sessions(store, engine.state_files, sessions_config)
    chat_template = chat_template or ChatTemplate()
    tracer = Tracer(config.otlp_endpoint, config.model_name) if config.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if stored:
            stored.start()
        async_engine.start()
        yield
        # In threads: those who wait for a last step still read their answers.
        await asyncio.to_thread(async_engine.stop)
        await asyncio.to_thread(chat_template.close)
        if stored:
            await asyncio.to_thread(stored.close)
        await asyncio.to_thread(sessions.close)
        if tracer:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="AFT server",
        summary="Text generation with Attention Free Transformers",
        version=version("aft-server"),
        lifespan=lifespan,
        docs_url=None,  # FastAPI's loads from elsewhere
        redoc_url=None,
        servers=[{"url": config.root_path}] if config.root_path else None,
    )
    app.state.context = Context(async_engine, config, metrics, chat_template, sessions, int(time.time()))
    contracts = Contracts(CONTRACTS)
    for contract in CONTRACTS:
        app.include_router(contract.router)
    app.include_router(sessions_api.router, responses=contracts.responses(sessions_api.ERRORS))
    app.include_router(tokenize.router, responses=contracts.responses(tokenize.ERRORS))
    app.include_router(operations.router)
    app.include_router(pages.router)
    open_paths = OPEN_PATHS if config.protect_metrics else OPEN_PATHS | METRICS_PATHS
    with_keys = open_paths if config.api_keys else None
    app.openapi = lru_cache(1)(lambda: openapi.document(app, contracts, with_keys))  # type: ignore[method-assign]
    contracts.add_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(Head)
    larger = {sessions_api.IMPORT_PATH: async_engine.info.file_bytes}  # what /export gives can always come back
    app.add_middleware(
        BodyLimit, contracts=contracts, max_bytes=config.max_body_size, larger=larger, timeout=config.read_timeout
    )
    if config.api_keys:
        app.add_middleware(APIKeys, contracts=contracts, keys=config.api_keys, open_paths=open_paths)
    else:
        app.add_middleware(Hosts, contracts=contracts, allowed=config.allowed_hosts)
    app.add_middleware(Origins, contracts=contracts, allowed=config.cors_origins)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestLog, contracts=contracts, metrics=metrics, tracer=tracer)
    if config.root_path:
        app.add_middleware(RoutePath, root_path=config.root_path)
    return app
