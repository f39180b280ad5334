"""/v1/completions: texts that go on from prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from server.api.context import Context
from server.api.openai.errors import FINISH_REASONS, error_event
from server.api.openai.protocol import CompletionRequest
from server.api.openai.serving import (
    Call,
    TextOffsets,
    admit_body,
    open_call,
    sampling_params,
    token_name,
)
from server.api.streaming import event_answer, read_all, sse, whole_answer
from server.engine import Completion, TopLogprobs, best

DEFAULT_MAX_TOKENS = 16
KIND = "text_completion"

ScoredToken = tuple[int, float | None, TopLogprobs]  # id, log-probability, most likely tokens


async def completions(context: Context, http_request: Request, body: CompletionRequest) -> Response:
    params = sampling_params(
        body,
        best_of=body.best_of,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    with admit_body(http_request, context, body, len(body.prompt)) as admission:
        call = await open_call(
            context,
            http_request,
            admission,
            body,
            body.prompt,
            params,
            "cmpl",
            add_special_tokens=body.add_special_tokens is not False,
        )
    if body.stream:
        return await event_answer(http_request, call.streams, _events(call, body), error_event)

    def respond(texts: list[list[Completion]]) -> Response:
        choices = [
            _ChoiceWriter(call, body, prompt, i).write(text)
            for prompt, several in enumerate(texts)
            for i, text in enumerate(best(several, call.n))
        ]
        return JSONResponse({**call.head(KIND), "choices": choices, "usage": call.usage()})

    return await whole_answer(http_request, call.streams, respond)


async def _events(call: Call, body: CompletionRequest) -> AsyncIterator[bytes]:
    """Chunks that have something to say; those that came together are sent together."""
    writers = [[_ChoiceWriter(call, body, prompt, i) for i in range(call.n)] for prompt in range(len(call.streams))]
    async for prompt, outputs in read_all(call.streams):
        events = []
        for output in outputs:
            choice = writers[prompt][output.index].write(Completion.of(output))
            if choice["text"] or choice["finish_reason"] or choice["logprobs"] or body.return_token_ids:
                events.append(sse({**call.head(KIND), "choices": [choice], **call.chunk_usage()}))
        yield b"".join(events)
    yield call.last_events(KIND)


class _ChoiceWriter:
    """Writes one choice, whole or in pieces. The first piece holds the prompt, if it is to be echoed."""

    def __init__(self, call: Call, body: CompletionRequest, prompt: int, i: int) -> None:
        self.tokenizer, self.body = call.tokenizer, body
        self.request, self.index = call.streams[prompt].request, prompt * call.n + i
        self._offsets = TextOffsets()
        self._has_started = False

    def write(self, text: Completion) -> dict[str, Any]:
        """The next piece, which may be all of the text."""
        before, scored, fields = self._start()
        scored += [(token.token_id, token.logprob, token.top_logprobs or ()) for token in text.tokens]
        if self.body.return_token_ids:
            fields["token_ids"] = text.token_ids
        return {
            "index": self.index,
            "text": before + text.text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(scored),
            "finish_reason": FINISH_REASONS[text.finish_reason] if text.finish_reason else None,
            "stop_reason": text.stop_reason,
            **fields,
        }

    def _start(self) -> tuple[str, list[ScoredToken], dict[str, Any]]:
        """What comes before the generated text: text, tokens, fields. Nothing after the first call."""
        if self._has_started:
            return "", [], {}
        self._has_started = True
        ids = self.request.prompt_ids
        fields: dict[str, Any] = {"prompt_token_ids": ids} if self.body.return_token_ids else {}
        if not self.body.echo:
            return "", [], fields
        scored: list[ScoredToken] = [
            (token_id, known.logprob if known else None, known.top_logprobs if known else ())
            for token_id, known in zip(ids, self.request.prompt_logprobs or [None] * len(ids), strict=True)
        ]
        return self.tokenizer.decode(ids), scored, fields

    def _logprobs(self, scored: Sequence[ScoredToken]) -> dict[str, Any]:
        """OpenAI's arrays, one entry for each token; the chosen token is among the most likely ones or besides them."""
        arrays: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, logprob, top in scored:
            name = token_name(self.tokenizer, token_id)
            # The likelier of two tokens of the same name is the one that is told.
            tops = {token_name(self.tokenizer, other): value for other, value in reversed(top)}
            arrays["tokens"].append(name)
            arrays["token_logprobs"].append(logprob)
            arrays["top_logprobs"].append(None if logprob is None else {**tops, name: logprob})
            arrays["text_offset"].append(self._offsets.next(self.tokenizer.token_bytes[token_id]))
        return arrays
