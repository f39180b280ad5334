"""POST /generate, /generate_stream and / in the contract of text-generation-inference."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from model.sampling import Sampling
from model.tokenizer import Tokenizer
from server import engine
from server.api.errors import error_body
from server.api.protocol import (
    Details,
    ErrorResponse,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    StreamDetails,
    StreamEvent,
    Token,
)
from server.engine import AsyncEngine, TokenOutput
from server.errors import ServerError

DEFAULT_MAX_NEW_TOKENS = 100
CLIENT_CLOSED_REQUEST = 499  # nobody reads this answer; it is for the log
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (422, 424, 429, 500, 503)}

router = APIRouter()


@dataclass(frozen=True)
class Generation:
    """A request of the API, ready for the engine, and what its answer needs."""

    request: engine.Request
    prefix: str  # of generated_text
    details: bool

    @property
    def seed(self) -> int | None:
        sampling = self.request.sampling
        return sampling.seed if sampling.do_sample else None


def prepare(body: GenerateRequest, tokenizer: Tokenizer) -> Generation:
    """Raises TokenizationError for text that is not Unicode."""
    # TGI samples unless there is a parameters object; in it, any sampling parameter asks for sampling.
    given = body.parameters or GenerateParameters(do_sample=True)
    prompt_ids = tokenizer.encode(body.inputs)
    if given.truncate is not None:
        prompt_ids = prompt_ids[-given.truncate :]
    asks_for_sampling = any(value is not None for value in (given.temperature, given.top_k, given.top_p))
    sampling = Sampling(
        do_sample=bool(given.do_sample) or asks_for_sampling,
        temperature=1.0 if given.temperature is None else given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        seed=secrets.randbits(64) if given.seed is None else given.seed,
    )
    request = engine.Request(
        request_id=uuid.uuid4().hex,
        prompt_ids=[tokenizer.end_of_text_id, *prompt_ids],  # it ends every text, so it also starts one
        sampling=sampling,
        max_new_tokens=given.max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        stop=tuple(given.stop or ()),
    )
    return Generation(request, body.inputs if given.return_full_text else "", bool(given.details))


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(body: GenerateRequest, http_request: Request) -> Response:
    """Generate text: a JSON object, or server-sent events if `stream` is true."""
    generation = prepare(body, http_request.app.state.tokenizer)
    if body.stream:
        return await stream(http_request, generation)
    return await answer(http_request, generation)


@router.post("/generate_stream", response_class=StreamingResponse, responses=ERRORS)
async def generate_stream(body: GenerateRequest, http_request: Request) -> Response:
    """Generate text as server-sent events, one for each token."""
    return await stream(http_request, prepare(body, http_request.app.state.tokenizer))


@router.post("/", response_model=list[GenerateResponse], responses=ERRORS)
async def generate_list(body: GenerateRequest, http_request: Request) -> Response:
    """As /generate, but the JSON answer is a list of one."""
    generation = prepare(body, http_request.app.state.tokenizer)
    if body.stream:
        return await stream(http_request, generation)
    return await answer(http_request, generation, as_list=True)


async def answer(http_request: Request, generation: Generation, *, as_list: bool = False) -> Response:
    """The whole text as JSON. If the client leaves before it is complete, generation stops."""
    collecting = asyncio.create_task(collect(http_request.app.state.engine, generation.request))
    leaving = asyncio.create_task(wait_for_disconnect(http_request))
    await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not collecting.done():
        collecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collecting
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    outputs = collecting.result()
    response = GenerateResponse(generated_text=generation.prefix + text_of(outputs))
    finish_reason = outputs[-1].finish_reason
    if generation.details and finish_reason is not None:
        response.details = Details(
            finish_reason=finish_reason,
            generated_tokens=len(outputs),
            seed=generation.seed,
            tokens=[token(output) for output in outputs],
        )
    content = response.model_dump(exclude_none=not generation.details)
    return JSONResponse([content] if as_list else content)


async def collect(async_engine: AsyncEngine, request: engine.Request) -> list[TokenOutput]:
    return [output async for output in async_engine.generate(request)]


async def wait_for_disconnect(http_request: Request) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass


async def stream(http_request: Request, generation: Generation) -> Response:
    """Server-sent events. An error before the first token gets its real status; a later one becomes an event."""
    outputs = http_request.app.state.engine.generate(generation.request)
    first = await anext(outputs)
    events = sse_events(first, outputs, generation)
    return StreamingResponse(events, media_type="text/event-stream", headers=STREAM_HEADERS)


async def sse_events(
    first: TokenOutput, outputs: AsyncIterator[TokenOutput], generation: Generation
) -> AsyncIterator[bytes]:
    sent = []
    try:
        output: TokenOutput | None = first
        while output is not None:
            sent.append(output)
            yield sse(event(sent, generation))
            output = await anext(outputs, None)
    except ServerError as error:
        yield sse(error_body(error))
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]


def event(sent: list[TokenOutput], generation: Generation) -> dict[str, object]:
    """The event of the last of the outputs `sent` so far."""
    last = sent[-1]
    result = StreamEvent(index=len(sent), token=token(last))
    if last.finish_reason is not None:
        result.generated_text = generation.prefix + text_of(sent)
        if generation.details:
            result.details = StreamDetails(
                finish_reason=last.finish_reason,
                generated_tokens=len(sent),
                seed=generation.seed,
                input_length=len(generation.request.prompt_ids),
            )
    return result.model_dump()


def sse(content: object) -> bytes:
    """ASCII JSON: clients that split on every Unicode line end would cut at U+2028."""
    return f"data:{json.dumps(content, ensure_ascii=True)}\n\n".encode()


def token(output: TokenOutput) -> Token:
    return Token(id=output.token_id, text=output.text, logprob=output.logprob, special=output.special)


def text_of(outputs: list[TokenOutput]) -> str:
    return "".join(output.text for output in outputs if not output.special)
