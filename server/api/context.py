"""What the routes of an application share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.api.chat_template import ChatTemplate
from server.api.config import APIConfig
from server.engine import AsyncEngine
from server.metrics import Metrics


@dataclass(frozen=True)
class Context:
    engine: AsyncEngine
    config: APIConfig
    metrics: Metrics
    chat_template: ChatTemplate
    started_at: int  # seconds since 1970


def _of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextOf = Annotated[Context, Depends(_of)]
