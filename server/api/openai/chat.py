"""/v1/chat/completions: the next message of a chat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from server.api.context import Context
from server.api.openai.errors import FINISH_REASONS, error_event
from server.api.openai.protocol import ChatCompletionRequest
from server.api.openai.serving import (
    Call,
    admit_body,
    open_call,
    sampling_params,
    token_name,
)
from server.api.streaming import event_answer, sse, whole_answer
from server.engine import Completion, TokenOutput

DEFAULT_MAX_TOKENS = 1024
KIND, CHUNK_KIND = "chat.completion", "chat.completion.chunk"


async def chat_completions(context: Context, http_request: Request, body: ChatCompletionRequest) -> Response:
    with admit_body(http_request, context, body) as admission:
        prompt = await body.token_ids(body.messages, context)
        params = sampling_params(
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens or _default_max_tokens(context, prompt),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        call = await open_call(context, http_request, admission, body, [prompt], params, "chatcmpl")
    if body.stream:
        return await event_answer(http_request, call.streams, _events(call, body), error_event)

    def content(texts: list[list[Completion]]) -> dict[str, Any]:
        choices = [_choice(call, body, text) for text in texts[0]]
        # As vLLM has it, the key is there also if it was not asked for.
        return {**call.head(KIND), "choices": choices, "usage": call.usage(), "prompt_token_ids": _prompt_ids(call)}

    return await whole_answer(http_request, call.streams, content)


def _default_max_tokens(context: Context, prompt: list[int]) -> int:
    """No client that leaves it out wants an error, if the prompt leaves room for anything."""
    return max(1, min(DEFAULT_MAX_TOKENS, context.engine.info.max_model_len - len(prompt)))


def _choice(call: Call, body: ChatCompletionRequest, text: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": text.text}
    return {"message": message, "token_ids": None, **_fields(call, body, text)}


def _fields(call: Call, body: ChatCompletionRequest, text: Completion) -> dict[str, Any]:
    """What a choice has besides its message, and a chunk besides its delta."""
    ended = text.finish_reason
    fields = {
        "index": text.index,
        "logprobs": {"content": (_logprob(call, token) for token in text.tokens)} if body.logprobs else None,
        "finish_reason": FINISH_REASONS[ended] if ended else None,
        "stop_reason": text.stop_reason,
    }
    return fields | ({"token_ids": iter(text.token_ids)} if body.return_token_ids else {})


def _prompt_ids(call: Call) -> Iterator[int] | None:
    return iter(call.streams[0].request.prompt_ids) if call.body.return_token_ids else None


async def _events(call: Call, body: ChatCompletionRequest) -> AsyncIterator[bytes]:
    """A chunk with the role for each choice, then their texts; those that came together are sent together."""
    # The first chunks are sent with the first text: until then, errors have a status.
    events = [_first_chunk(call, i) for i in range(call.n)]
    while outputs := await call.streams[0].read():
        for output in outputs:
            text = Completion.of(output)
            fields = _fields(call, body, text)
            if text.text or fields["finish_reason"] or body.logprobs or body.return_token_ids:
                events.append(_chunk(call, {"content": text.text}, fields))
        yield b"".join(events)
        events = []
    yield call.last_events(CHUNK_KIND)


def _first_chunk(call: Call, index: int) -> bytes:
    fields = {"index": index, "logprobs": None, "finish_reason": None}
    asked = {"prompt_token_ids": _prompt_ids(call)} if call.body.return_token_ids else {}
    return _chunk(call, {"role": "assistant", "content": ""}, fields, **asked)


def _chunk(call: Call, delta: dict[str, Any], fields: dict[str, Any], **others: Any) -> bytes:
    return sse({**call.head(CHUNK_KIND), "choices": [{"delta": delta, **fields}], **call.chunk_usage(), **others})


def _logprob(call: Call, token: TokenOutput) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        name, token_bytes = token_name(call.tokenizer, token_id), call.tokenizer.token_bytes[token_id]
        return {"token": name, "logprob": logprob, "bytes": list(token_bytes)}

    top = [entry(token_id, logprob) for token_id, logprob in token.top_logprobs or ()]
    return {**entry(token.token_id, token.logprob), "top_logprobs": top}
