"""POST /generate, /generate_stream and / in the contract of text-generation-inference."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.sampling import Grammar, SamplingParams
from server.api.errors import error_body
from server.api.protocol import (
    Details,
    ErrorResponse,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    GrammarParameter,
    StreamDetails,
    StreamEvent,
    Token,
)
from server.engine import AsyncEngine, FinishReason, RequestOutput, TokenOutput
from server.engine.async_engine import RequestStream
from server.errors import ServerError

DEFAULT_MAX_NEW_TOKENS = 100
CLIENT_CLOSED_REQUEST = 499  # nobody reads this answer; it is for the log
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ERROR_STATUSES = (422, 424, 429, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in ERROR_STATUSES}

router = APIRouter()
T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """A request that the engine has taken, and what its answer needs besides."""

    stream: RequestStream
    prefix: str  # of generated_text
    details: bool


async def submit(body: GenerateRequest, http_request: Request) -> Generation:
    """Hand a request to the engine. Raises what `AsyncEngine.submit` does."""
    state = http_request.app.state
    engine: AsyncEngine = state.engine
    params, given = sampling_params(body.given), body.given
    stream = await engine.submit(body.inputs, params, truncate=given.truncate, timeout=state.request_timeout)
    return Generation(stream, body.prefix, bool(given.details))


def sampling_params(given: GenerateParameters) -> SamplingParams:
    """Tokens are sampled if any parameter asks for it, and the most likely ones are taken otherwise."""
    filters = (given.temperature, given.top_k, given.top_p, given.typical_p)
    samples = bool(given.do_sample) or any(value is not None for value in filters)
    return SamplingParams(
        max_tokens=_or(given.max_new_tokens, DEFAULT_MAX_NEW_TOKENS),
        temperature=_or(given.temperature, 1.0) if samples else 0.0,
        top_k=given.top_k,
        top_p=_or(given.top_p, 1.0),
        typical_p=_or(given.typical_p, 1.0),
        repetition_penalty=_or(given.repetition_penalty, 1.0),
        frequency_penalty=_or(given.frequency_penalty, 0.0),
        seed=_or(given.seed, secrets.randbits(64)),
        stop=tuple(given.stop or ()),
        grammar=_grammar(given.grammar) if given.grammar else None,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _grammar(given: GrammarParameter) -> Grammar:
    if given.type == "regex":
        assert isinstance(given.value, str)
        return Grammar("regex", given.value)
    return Grammar("json_schema", given.value if isinstance(given.value, str) else json.dumps(given.value))


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(body: GenerateRequest, http_request: Request) -> Response:
    """Generate text: a JSON object, or server-sent events if `stream` is true."""
    generation = await submit(body, http_request)
    return await (stream if body.stream else answer)(http_request, generation)


@router.post("/generate_stream", response_class=StreamingResponse, responses=ERRORS)
async def generate_stream(body: GenerateRequest, http_request: Request) -> Response:
    """Generate text as server-sent events, one for each token."""
    return await stream(http_request, await submit(body, http_request))


@router.post("/", response_model=list[GenerateResponse], responses=ERRORS)
async def generate_list(body: GenerateRequest, http_request: Request) -> Response:
    """As /generate, but the JSON answer is a list of one."""
    generation = await submit(body, http_request)
    return await (stream(http_request, generation) if body.stream else answer(http_request, generation, as_list=True))


async def answer(http_request: Request, generation: Generation, *, as_list: bool = False) -> Response:
    """The whole text as JSON. If the client leaves before it is complete, generation stops."""
    try:
        outputs = await unless_left(http_request, collect(generation.stream))
    finally:
        generation.stream.close()
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    content = response(generation, outputs).model_dump(exclude_none=not generation.details)
    return JSONResponse([content] if as_list else content)


def response(generation: Generation, outputs: list[RequestOutput]) -> GenerateResponse:
    tokens = [output.token for output in outputs if output.token]
    result = GenerateResponse(generated_text=generation.prefix + text_of(tokens))
    finish_reason = outputs[-1].finish_reason
    if generation.details and finish_reason is not None:
        request = generation.stream.request
        result.details = details(tokens, finish_reason, request.params, request.num_cached_tokens)
    return result


def details(tokens: list[TokenOutput], reason: FinishReason, params: SamplingParams, n_cached: int) -> Details:
    return Details(
        finish_reason=reason,
        generated_tokens=len(tokens),
        seed=told_seed(params),
        cached_tokens=n_cached,
        tokens=[api_token(token) for token in tokens],
    )


def told_seed(params: SamplingParams) -> int | None:
    return params.seed if params.temperature > 0 else None


async def collect(request_stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in request_stream]


async def unless_left(http_request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, and `work` cancelled, if the client leaves before it is done."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(wait_for_disconnect(http_request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def wait_for_disconnect(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def stream(http_request: Request, generation: Generation) -> Response:
    """Server-sent events. An error before the first token gets its real status; a later one becomes an event."""
    outputs = aiter(generation.stream)
    try:
        first = await unless_left(http_request, first_of(outputs))
    except BaseException:
        generation.stream.close()
        raise
    if first is None:
        generation.stream.close()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(sse_events(first, outputs, generation), generation.stream)


async def first_of(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return await anext(outputs)


class EventStream(StreamingResponse):
    """Lets go of its request however it ends, even if the client has left before the first event."""

    def __init__(self, events: AsyncIterator[bytes], request_stream: RequestStream) -> None:
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self.request_stream = request_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.request_stream.close()


async def sse_events(
    first: RequestOutput, outputs: AsyncIterator[RequestOutput], generation: Generation
) -> AsyncIterator[bytes]:
    sent: list[TokenOutput] = []
    try:
        output: RequestOutput | None = first
        while output is not None:
            assert output.token is not None
            sent.append(output.token)
            yield sse(event(sent, output, generation))
            output = await anext(outputs, None)
    except ServerError as error:
        yield sse(error_body(error))


def event(sent: list[TokenOutput], last: RequestOutput, generation: Generation) -> dict[str, object]:
    """The event of the last of the tokens `sent` so far."""
    result = StreamEvent(index=len(sent), token=api_token(sent[-1]))
    if last.finish_reason is not None:
        result.generated_text = generation.prefix + text_of(sent)
        if generation.details:
            request = generation.stream.request
            result.details = StreamDetails(
                finish_reason=last.finish_reason,
                generated_tokens=len(sent),
                seed=told_seed(request.params),
                input_length=request.num_prompt_tokens,
                cached_tokens=request.num_cached_tokens,
            )
    return result.model_dump()


def sse(content: object) -> bytes:
    """ASCII JSON: clients that split on every Unicode line end would cut at U+2028."""
    return f"data:{json.dumps(content, ensure_ascii=True)}\n\n".encode()


def api_token(token: TokenOutput) -> Token:
    return Token(id=token.token_id, text=token.text, logprob=token.logprob, special=token.special)


def text_of(tokens: list[TokenOutput]) -> str:
    return "".join(token.text for token in tokens if not token.special)
