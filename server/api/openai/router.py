"""POST /v1/completions and /v1/chat/completions, GET /v1/models: OpenAI's contract."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.context import Context, ContextOf
from server.api.openai import chat, completions
from server.api.openai.errors import RESPONSES
from server.api.openai.protocol import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    ModelCard,
    ModelList,
)
from server.api.openapi import stream

router = APIRouter(prefix="/v1", tags=["openai"])


STREAM = "With `stream`, server-sent events: chunks, then `[DONE]`"


@router.post(
    "/completions",
    response_model=CompletionResponse,
    responses={200: stream(CompletionResponse, STREAM), **RESPONSES},
)
async def create_completion(body: CompletionRequest, context: ContextOf, http_request: Request) -> Response:
    """Texts that go on from one prompt or several: a JSON object, or chunks if `stream` is true."""
    return await completions.completions(context, http_request, body)


@router.post(
    "/chat/completions",
    response_model=ChatCompletionResponse,
    responses={200: stream(ChatCompletionChunk, STREAM), **RESPONSES},
)
async def create_chat_completion(body: ChatCompletionRequest, context: ContextOf, http_request: Request) -> Response:
    """The next message of a chat: a JSON object, or chunks if `stream` is true."""
    return await chat.chat_completions(context, http_request, body)


@router.get("/models/", include_in_schema=False)  # and no model with an empty name
@router.get("/models", responses={401: RESPONSES[401]})
def list_models(context: ContextOf) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[_card(context, name) for name in context.model_names])


@router.get("/models/{name:path}", responses={status: RESPONSES[status] for status in (400, 401, 404)})
def get_model(name: str, context: ContextOf) -> ModelCard:
    """The model, if that is its name."""
    return _card(context, context.model_named(name))


def _card(context: Context, name: str) -> ModelCard:
    longest = context.engine.info.max_model_len
    return ModelCard(id=name, created=context.started_at, root=name, max_model_len=longest)
