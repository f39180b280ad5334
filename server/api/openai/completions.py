"""/v1/completions: texts that go on from prompts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import repeat
from typing import Any

from fastapi import Request
from fastapi.responses import Response

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
from server.api.streaming import aside, event_answer, long_sse, read_all, sse, whole_answer
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

    def content(texts: list[list[Completion]]) -> dict[str, Any]:
        # As vLLM has it, the keys of ids are there also if they were not asked for.
        choices = [
            {"token_ids": None, "prompt_token_ids": None, **_ChoiceWriter(call, body, prompt, i).write(text)}
            for prompt, several in enumerate(texts)
            for i, text in enumerate(best(several, call.n))
        ]
        return {**call.head(KIND), "choices": choices, "usage": call.usage()}

    return await whole_answer(http_request, call.streams, content)


async def _events(call: Call, body: CompletionRequest) -> AsyncIterator[bytes]:
    """Chunks that have something to say; those that came together are sent together."""
    writers = [[_ChoiceWriter(call, body, prompt, i) for i in range(call.n)] for prompt in range(len(call.streams))]
    async for prompt, outputs in read_all(call.streams):
        events = []
        for output in outputs:
            writer, text = writers[prompt][output.index], Completion.of(output)
            event = await aside(writer.num_tokens_before, partial(_event, call, writer, text))
            if event is not None:
                events.append(event)
        yield b"".join(events)
    yield call.last_events(KIND)


def _event(call: Call, writer: _ChoiceWriter, text: Completion) -> bytes | None:
    write = long_sse if writer.num_tokens_before else sse
    choice = writer.write(text)
    if choice["text"] or choice["finish_reason"] or choice["logprobs"] or call.body.return_token_ids:
        return write({**call.head(KIND), "choices": [choice], **call.chunk_usage()})
    return None


class _ChoiceWriter:
    """Writes one choice, whole or in pieces. The first piece holds the prompt, if it is to be echoed."""

    def __init__(self, call: Call, body: CompletionRequest, prompt: int, i: int) -> None:
        self.tokenizer, self.body = call.tokenizer, body
        self.request, self.index = call.streams[prompt].request, prompt * call.n + i
        self._offsets = TextOffsets()
        self._has_started = False

    @property
    def num_tokens_before(self) -> int:
        """Tokens of the prompt that the next piece tells."""
        tells = self.body.echo or self.body.return_token_ids
        return self.request.num_prompt_tokens if tells and not self._has_started else 0

    def write(self, text: Completion) -> dict[str, Any]:
        """The next piece, which may be all of the text. Long lists are iterators."""
        is_first, self._has_started = not self._has_started, True
        echoes, ids = is_first and self.body.echo, self.request.prompt_ids
        fields: dict[str, Any] = {}
        if self.body.return_token_ids:
            fields = {"prompt_token_ids": iter(ids)} if is_first else {}
            fields["token_ids"] = iter(text.token_ids)
        return {
            "index": self.index,
            "text": (self.tokenizer.decode(ids) if echoes else "") + text.text,
            "logprobs": None if self.body.logprobs is None else self._logprobs(text, of_prompt=bool(echoes)),
            "finish_reason": FINISH_REASONS[text.finish_reason] if text.finish_reason else None,
            "stop_reason": text.stop_reason,
            **fields,
        }

    def _scored(self, text: Completion, *, of_prompt: bool) -> Iterator[ScoredToken]:
        if of_prompt:
            ids = self.request.prompt_ids
            for token_id, known in zip(ids, self.request.prompt_logprobs or repeat(None, len(ids)), strict=True):
                yield token_id, known.logprob if known else None, known.top_logprobs if known else ()
        for token in text.tokens:
            yield token.token_id, token.logprob, token.top_logprobs or ()

    def _logprobs(self, text: Completion, *, of_prompt: bool) -> dict[str, Iterator[Any]]:
        """OpenAI's arrays, one entry for each token; the chosen token is among the most likely ones or besides them."""
        tokenizer = self.tokenizer

        def scored() -> Iterator[ScoredToken]:
            return self._scored(text, of_prompt=of_prompt)

        def most_likely(token_id: int, logprob: float | None, top: TopLogprobs) -> dict[str, float] | None:
            # The likelier of two tokens of the same name is the one that is told.
            tops = {token_name(tokenizer, other): value for other, value in reversed(top)}
            return None if logprob is None else {**tops, token_name(tokenizer, token_id): logprob}

        return {
            "tokens": (token_name(tokenizer, token_id) for token_id, _, _ in scored()),
            "token_logprobs": (logprob for _, logprob, _ in scored()),
            "top_logprobs": (most_likely(*token) for token in scored()),
            "text_offset": (self._offsets.next(tokenizer.token_bytes[token_id]) for token_id, _, _ in scored()),
        }
