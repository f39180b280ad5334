"""POST /generate, /generate_stream and /, GET /info: the contract of text-generation-inference."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.bodies import JSONRoute
from server.api.context import ContextOf
from server.api.openapi import stream
from server.api.tgi import serving
from server.api.tgi.errors import RESPONSES
from server.api.tgi.protocol import (
    MAX_BEST_OF,
    GenerateRequest,
    GenerateResponse,
    Info,
    StreamEvent,
    StreamRequest,
)

STREAM = stream(StreamEvent, "With `stream`, server-sent events, one for each token")

router = APIRouter(tags=["text-generation-inference"], route_class=JSONRoute)


@router.post("/generate", response_model=GenerateResponse, responses={200: STREAM, **RESPONSES})
async def generate(body: GenerateRequest, context: ContextOf, http_request: Request) -> Response:
    """Generate text: a JSON object, or server-sent events if `stream` is true."""
    if body.streams:
        return await serving.answer_in_events(context, http_request, body)
    return await serving.answer(context, http_request, body)


@router.post("/generate_stream", response_class=Response, responses={200: STREAM, **RESPONSES})
async def generate_stream(body: StreamRequest, context: ContextOf, http_request: Request) -> Response:
    """Generate text as server-sent events, one for each token."""
    return await serving.answer_in_events(context, http_request, body)


@router.post("/invocations", response_model=list[GenerateResponse], responses={200: STREAM, **RESPONSES})
@router.post("/", response_model=list[GenerateResponse], responses={200: STREAM, **RESPONSES})
async def generate_list(body: GenerateRequest, context: ContextOf, http_request: Request) -> Response:
    """As /generate, but the JSON answer is a list of one. SageMaker posts to /invocations."""
    if body.streams:
        return await serving.answer_in_events(context, http_request, body)
    return await serving.answer(context, http_request, body, as_list=True)


@router.get("/info", responses={401: RESPONSES[401]})
def info(context: ContextOf) -> Info:
    """The model, the limits of requests, and what a conversation costs."""
    engine = context.engine.info
    return Info(
        model_id=context.config.model_name,
        model_sha=engine.fingerprint.hex(),
        model_dtype=engine.model_dtype,
        model_device_type=engine.device_type,
        max_concurrent_requests=engine.capacity,
        max_best_of=min(engine.n_slots, MAX_BEST_OF),
        max_input_tokens=engine.max_model_len - 1,
        max_total_tokens=engine.max_model_len,
        max_client_batch_size=context.config.max_prompts,
        version=version("aft-server"),
        variant=engine.variant,
        parameters=engine.parameters,
        state_bytes=engine.state_bytes,
        kv_cache_bytes_per_token=engine.kv_cache_bytes_per_token,
    )
