"""From bodies of text-generation-inference's contract to the engine, and back."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from model.sampling import SEED_BITS, Grammar, SamplingParams
from model.tokenizer import Tokenizer
from server.api.context import Context
from server.api.grammars import named_schema
from server.api.streaming import event_answer, whole_answer
from server.api.submission import Submission, admit, open_streams
from server.api.tgi import errors
from server.api.tgi.errors import FINISH_REASONS
from server.api.tgi.protocol import GenerateParameters, GenerateRequest, GrammarParameter
from server.api.turns import TextStream
from server.engine import Completion, TokenOutput, best
from server.engine import Request as EngineRequest

DEFAULT_MAX_NEW_TOKENS = 100

T = TypeVar("T")


def sampling_params(given: GenerateParameters) -> SamplingParams:
    return SamplingParams(
        best_of=given.best_of,
        max_tokens=_or(given.max_new_tokens, DEFAULT_MAX_NEW_TOKENS),
        temperature=_or(given.temperature, 1.0) if given.samples else 0.0,
        top_k=given.top_k,
        top_p=_or(given.top_p, 1.0),
        typical_p=_or(given.typical_p, 1.0),
        repetition_penalty=_or(given.repetition_penalty, 1.0),
        frequency_penalty=_or(given.frequency_penalty, 0.0),
        seed=_or(given.seed, secrets.randbits(SEED_BITS)),
        stop=tuple(given.stop or ()),
        watermark=bool(given.watermark),
        ignore_eos=bool(given.ignore_eos_token),
        logprobs=given.top_n_tokens or None,
        prompt_logprobs=0 if given.decoder_input_details else None,
        grammar=_grammar(given.grammar) if given.grammar else None,
    )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _grammar(given: GrammarParameter) -> Grammar:
    name = "parameters.grammar.value"
    if given.type == "regex":
        assert isinstance(given.value, str)
        return Grammar("regex", given.value, name)
    return named_schema(given.value, name)


async def answer(context: Context, http_request: Request, body: GenerateRequest, *, as_list: bool = False) -> Response:
    (stream,) = streams = await _open(context, http_request, body)

    def content(completions: list[list[Completion]]) -> dict[str, Any] | list[dict[str, Any]]:
        found = whole(body, stream, completions[0], context.engine.info.tokenizer)
        return [found] if as_list else found

    return await whole_answer(http_request, streams, content)


async def answer_in_events(context: Context, http_request: Request, body: GenerateRequest) -> Response:
    streams = await _open(context, http_request, body)
    events = _events(body, streams[0], context.engine.info.tokenizer)
    return await event_answer(http_request, streams, events, errors.error_event)


async def _open(context: Context, http_request: Request, body: GenerateRequest) -> list[TextStream]:
    submission = Submission(
        prompts=[body.inputs],
        params=sampling_params(body.given),
        session_id=body.session_id,
        truncate=body.given.truncate,
        streams=body.streams,
    )
    with admit(http_request, context, model=None) as admission:
        return await open_streams(http_request, context, admission, submission)


def whole(
    body: GenerateRequest, stream: TextStream, completions: list[Completion], tokenizer: Tokenizer
) -> dict[str, Any]:
    """A GenerateResponse, whose long lists are iterators."""
    (chosen,) = best(completions, 1)
    result: dict[str, Any] = {"generated_text": body.prefix + chosen.text}
    if body.given.details:
        request = stream.request
        others = [text for text in completions if text is not chosen]
        result["details"] = {
            **sequence(chosen, request.params, tokenizer),
            "cached_tokens": request.num_cached_tokens,
            "prefill": _prefill(request, tokenizer) if request.params.prompt_logprobs is not None else [],
            "best_of_sequences": [_not_best(text, body, request.params, tokenizer) for text in others] or None,
        }
    return result


def sequence(text: Completion, params: SamplingParams, tokenizer: Tokenizer) -> dict[str, Any]:
    """What is told of the best text and of the others alike."""
    assert text.finish_reason is not None
    return {
        "finish_reason": FINISH_REASONS[text.finish_reason],
        "generated_tokens": len(text.tokens),
        "seed": _told_seed(params, text.index),
        "prefill": [],
        "tokens": map(_token, text.tokens),
        "top_tokens": (_top_tokens(token, tokenizer) for token in text.tokens) if params.logprobs else None,
    }


def _not_best(text: Completion, body: GenerateRequest, params: SamplingParams, tokenizer: Tokenizer) -> dict[str, Any]:
    return {"generated_text": body.prefix + text.text, **sequence(text, params, tokenizer)}


def _prefill(request: EngineRequest, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    for token_id, known in zip(request.prompt_ids, request.prompt_logprobs, strict=True):
        yield {"id": token_id, "text": tokenizer.token_text(token_id), "logprob": known.logprob if known else None}


async def _events(body: GenerateRequest, stream: TextStream, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
    """An event for each token; those that came together are sent together."""
    text = Completion(0)
    while outputs := await stream.read():
        events = []
        for output in outputs:
            text.add(output)
            events.append(errors.event(event(body, stream.request, text, tokenizer)))
        yield b"".join(events)


def event(body: GenerateRequest, request: EngineRequest, text: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The StreamEvent of the last token of the text so far. Plain dictionaries: one is made for every token."""
    token, ended = text.tokens[-1], text.finish_reason
    content = {
        "index": len(text.tokens),
        "token": _token(token),
        "generated_text": body.prefix + text.text if ended else None,
        "details": None,
    }
    if request.params.logprobs:
        content["top_tokens"] = _top_tokens(token, tokenizer)
    if ended and body.given.details:
        content["details"] = {
            "finish_reason": FINISH_REASONS[ended],
            "generated_tokens": len(text.tokens),
            "seed": _told_seed(request.params, text.index),
            "input_length": request.num_prompt_tokens,
            "cached_tokens": request.num_cached_tokens,
        }
    return content


def _token(token: TokenOutput) -> dict[str, Any]:
    return {"id": token.token_id, "text": token.text, "logprob": token.logprob, "special": token.special}


def _top_tokens(token: TokenOutput, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "id": token_id,
            "text": tokenizer.token_text(token_id),
            "logprob": logprob,
            "special": not tokenizer.token_bytes[token_id],
        }
        for token_id, logprob in token.top_logprobs or ()
    ]


def _told_seed(params: SamplingParams, index: int) -> int | None:
    """The seed that gives text `index` again, alone; greedy texts have none."""
    return (params.seed + index) % 2**64 if params.temperature > 0 else None
