"""From bodies of OpenAI's contract to the engine: parameters, prompts, usage, and what both routes share."""

from __future__ import annotations

import codecs
import dataclasses
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request

from model.sampling import SEED_BITS, Grammar, SamplingParams
from model.tokenizer import Tokenizer
from server.api.context import Context
from server.api.grammars import ANY_OBJECT, named_schema
from server.api.openai.errors import DONE
from server.api.openai.protocol import (
    GenerationRequest,
    JSONObjectFormat,
    JSONSchema,
    JSONSchemaFormat,
    RegexFormat,
    StructuredOutputs,
)
from server.api.record import record_of
from server.api.streaming import sse
from server.api.submission import Prompt, Submission, admit, open_streams
from server.api.turns import TextStream
from server.engine import Admission
from server.errors import PromptTooLongError

SAMPLING_FIELDS = tuple(given.name for given in dataclasses.fields(SamplingParams))


@dataclass
class Call:
    """An accepted request: what its answer is made from."""

    body: GenerationRequest
    context: Context
    streams: list[TextStream]
    answer_id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.context.engine.info.tokenizer

    @property
    def n(self) -> int:
        return self.body.n or 1

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that every object of an answer starts with."""
        return {"object": kind, **self._identity}

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {
            "id": self.answer_id,
            "created": self.created,
            "model": self.context.config.model_name,
            "system_fingerprint": f"fp_{self.context.engine.info.fingerprint.hex()[:12]}",
        }

    def usage(self) -> dict[str, Any]:
        requests = [stream.request for stream in self.streams]
        n_prompt = sum(request.num_prompt_tokens for request in requests)
        n_generated = sum(stream.num_generated_tokens for stream in self.streams)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": sum(request.num_cached_tokens for request in requests)},
        }

    def chunk_usage(self) -> dict[str, Any]:
        """What a chunk before the last one says of usage: nothing, null if the last one will tell, or the figures."""
        options = self.body.stream_options
        if not (options and options.include_usage):
            return {}
        return {"usage": self.usage() if options.continuous_usage_stats else None}

    def last_events(self, kind: str) -> bytes:
        told = sse({**self.head(kind), "choices": [], "usage": self.usage()}) if self.chunk_usage() else b""
        return told + DONE


def admit_body(http_request: Request, context: Context, body: GenerationRequest, n_prompts: int = 1) -> Admission:
    """As `admit`, under the id that the body gives."""
    admission = admit(http_request, context, model=body.model, n_prompts=n_prompts)
    if body.request_id is not None:
        record_of(http_request).request_id = body.request_id
    return admission


async def open_call(
    context: Context,
    http_request: Request,
    admission: Admission,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    prefix: str,
    *,
    add_special_tokens: bool = True,
) -> Call:
    """Submit the prompts, to be answered under an id that starts with `prefix`. Raises as `open_streams`."""
    submission = Submission(
        prompts=prompts,
        params=params,
        model=body.model,
        session_id=body.session_id,
        add_special_tokens=add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        streams=bool(body.stream),
    )
    try:
        streams = await open_streams(http_request, context, admission, submission)
    except PromptTooLongError as error:
        error.field = body.prompt_field
        raise
    return Call(body, context, streams, f"{prefix}-{record_of(http_request).request_id}")


def sampling_params(body: GenerationRequest, **others: Any) -> SamplingParams:
    """Fields of the same name, but those that are null; those that differ; and `others`, the route's own."""
    same = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name, None)) is not None}
    differing = {
        "logit_bias": {int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        "seed": secrets.randbits(SEED_BITS) if body.seed is None else body.seed % 2**64,
        "top_k": body.top_k if body.top_k and body.top_k > 0 else None,
        "include_stop": body.include_stop_str_in_output,
        "grammar": _grammar(body),
        # What a route leaves out is not the field of that name.
        "best_of": None,
        "logprobs": None,
        **others,
    }
    given = same | differing
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _grammar(body: GenerationRequest) -> Grammar | None:
    if body.regex is not None:
        return Grammar("regex", body.regex, "regex")
    if body.ebnf is not None:
        return Grammar("grammar", body.ebnf, "ebnf")
    if body.structured_outputs is not None:
        return _structured(body.structured_outputs)
    match body.response_format:
        case JSONSchemaFormat(json_schema=JSONSchema(schema_=schema)):
            return Grammar.json_schema(schema, "response_format.json_schema.schema")
        case JSONSchemaFormat(value=value) | JSONObjectFormat(value=value) if value is not None:
            return named_schema(value, "response_format.value")
        case JSONSchemaFormat(schema_=schema) | JSONObjectFormat(schema_=schema) if schema is not None:
            return Grammar.json_schema(schema, "response_format.schema")
        case JSONObjectFormat():
            return ANY_OBJECT
        case RegexFormat(value=value):
            return Grammar("regex", value, "response_format.value")
        case _:
            return None


def _structured(outputs: StructuredOutputs) -> Grammar:
    if outputs.regex is not None:
        return Grammar("regex", outputs.regex, "structured_outputs.regex")
    if outputs.choice is not None:
        return Grammar("regex", "|".join(re.escape(text) for text in outputs.choice), "structured_outputs.choice")
    if outputs.grammar is not None:
        return Grammar("grammar", outputs.grammar, "structured_outputs.grammar")
    return ANY_OBJECT if outputs.json_ is None else Grammar.json_schema(outputs.json_, "structured_outputs.json")


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a key of log-probabilities: its text, or its bytes where they are not text on their own."""
    token_bytes = tokenizer.token_bytes[token_id]
    try:
        return token_bytes.decode() if token_bytes else tokenizer.token_text(token_id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


class TextOffsets:
    """Where each token of a text starts, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._n_characters = 0

    def next(self, token_bytes: bytes) -> int:
        is_within_character, _ = self._decoder.getstate()
        breaks_off = bool(is_within_character) and bool(token_bytes) and token_bytes[0] & 0xC0 != 0x80
        start = self._n_characters + breaks_off  # the broken character becomes U+FFFD
        self._n_characters += len(self._decoder.decode(token_bytes))
        return start
