"""POST /tokenize, /chat_tokenize, /detokenize, GET /tokenizer_info: text and token ids, as other routes read them."""

from __future__ import annotations

import codecs
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, model_validator

from model.tokenizer import END_OF_TEXT, Tokenizer
from server.api.bodies import JSONRoute
from server.api.context import Context, ContextOf
from server.api.messages import TEMPLATE_PEERS, Message, Messages, TemplateOptions
from server.api.streaming import BATCH, aside, json_answer, pieces_answer
from server.api.submission import admit
from server.api.validation import NO_EFFECT, Body, Peers, TokenIds, wrong
from server.errors import InvalidRequestError

ERRORS = (401, 404, 413, 422, 429, 503)
MAX_LENGTH = 2**20  # characters or token ids of a request

router = APIRouter(tags=["tokens"], route_class=JSONRoute)


class TokenizeRequest(TemplateOptions):
    """`inputs` as text-generation-inference has it; `prompt`, or `messages` for the chat template, as vLLM has it.

    A prompt that is just the name of the end-of-text token is that token: lm-eval looks it up so.
    """

    peers: ClassVar[Mapping[str, Peers]] = {
        **TEMPLATE_PEERS,
        # A body of text-generation-inference may be one of /generate.
        **dict.fromkeys(("parameters", "stream", "options"), NO_EFFECT),
    }

    model: str | None = None
    inputs: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="Whether a text follows the token that starts every text; true if not given, refused for chats",
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if sum(value is not None for value in (self.inputs, self.prompt, self.messages)) != 1:
            raise ValueError("the body must have exactly one of inputs, prompt and messages")
        if self.messages is not None and self.add_special_tokens:
            raise wrong("add_special_tokens", "add_special_tokens is the chat template's affair")
        return self


class ChatTokenizeRequest(TemplateOptions):
    """A body of text-generation-inference's chats, of which only what makes the prompt has an effect."""

    peers: ClassVar[Mapping[str, Peers]] = {
        **TEMPLATE_PEERS,
        **dict.fromkeys(
            (
                *("max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logprobs"),
                *("top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty", "response_format"),
                *("tool_choice", "tool_prompt", "guideline"),
            ),
            NO_EFFECT,
        ),
    }

    model: str | None = None
    messages: Messages


class PlacedToken(BaseModel):
    """A token and the characters [start, stop) of the text that it covers."""

    id: int
    text: str
    start: int
    stop: int


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class ChatTokens(BaseModel):
    """The prompt that a chat becomes."""

    tokenize_response: list[PlacedToken]
    templated_text: str


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_LENGTH)]


class Text(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str
    pad_token: None = None
    chat_template: str


@router.post("/tokenize", response_model=list[PlacedToken] | Tokens)
async def tokenize(body: TokenizeRequest, context: ContextOf, http_request: Request) -> Response:
    """The ids of a text: a list of tokens for `inputs`, an object of ids for `prompt` or `messages`."""
    tokenizer = context.engine.info.tokenizer
    with admit(http_request, context, model=body.model):
        ids = await _text_ids(body, context)
    if body.inputs is not None:
        return json_answer(placed(ids, tokenizer))
    strings = map(tokenizer.piece, ids) if body.return_token_strs else None
    told = {"tokens": iter(ids), "count": len(ids), "max_model_len": context.engine.info.max_model_len}
    return json_answer({**told, "token_strs": strings})


@router.post("/chat_tokenize", response_model=ChatTokens)
async def chat_tokenize(body: ChatTokenizeRequest, context: ContextOf, http_request: Request) -> Response:
    """The prompt that a chat becomes, as text and as tokens."""
    tokenizer = context.engine.info.tokenizer
    with admit(http_request, context, model=body.model):
        ids = await _chat_ids(body, body.messages, context)
        text = await aside(len(ids), lambda: "".join(map(tokenizer.token_text, ids)))
    return json_answer({"tokenize_response": placed(ids, tokenizer), "templated_text": text})


@router.post("/detokenize", response_model=Text)
async def detokenize(body: DetokenizeRequest, context: ContextOf, http_request: Request) -> Response:
    """The text of token ids. Bytes that are not UTF-8 become U+FFFD; the end-of-text token is no text."""
    context.model_named(body.model)
    tokenizer, ids = context.engine.info.tokenizer, body.tokens
    await aside(len(ids), lambda: tokenizer.check(ids))
    return pieces_answer(_text_pieces(ids, tokenizer))


@router.get("/tokenizer_info")
def tokenizer_info(context: ContextOf) -> TokenizerInfo:
    """What a client needs to know of the tokenizer."""
    tokenizer = context.engine.info.tokenizer
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        vocab_size=tokenizer.vocab_size,
        bos_token=END_OF_TEXT if tokenizer.starts_texts else None,
        eos_token=END_OF_TEXT,
        chat_template=context.chat_template.source,
    )


async def _text_ids(body: TokenizeRequest, context: Context) -> array[int]:
    if body.messages is not None:
        return await _chat_ids(body, body.messages, context)
    text, starts_texts = body.prompt or body.inputs or "", body.add_special_tokens is not False
    _check_length(len(text))
    if body.prompt == END_OF_TEXT:
        return array("i", [context.engine.info.tokenizer.end_of_text_id])
    return array("i", await context.engine.encode(text, add_special_tokens=starts_texts))


async def _chat_ids(body: TemplateOptions, messages: Sequence[Message], context: Context) -> array[int]:
    """As an array, which is a tenth of a list: clients may be slow to read what is made of it."""
    _check_length(sum(len(message.content) for message in messages))
    return array("i", await body.token_ids(messages, context))


def _check_length(n_characters: int) -> None:
    if n_characters > MAX_LENGTH:
        raise InvalidRequestError(f"The text must have at most {MAX_LENGTH} characters here, not {n_characters}.")


def placed(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Each as a PlacedToken: tokens with their places; a token of a part of a character covers that character."""
    n_started = 0
    for token_id in ids:
        token_bytes = tokenizer.token_bytes[token_id]
        # Bytes 0b10xxxxxx go on with a character that an earlier byte has started.
        starts = sum(byte & 0xC0 != 0x80 for byte in token_bytes)
        goes_on = bool(token_bytes) and token_bytes[0] & 0xC0 == 0x80
        start, n_started = n_started - goes_on, n_started + starts
        text = tokenizer.token_text(token_id) if token_bytes else ""
        yield {"id": token_id, "text": text, "start": start, "stop": n_started}


def _text_pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """A Text, whose tokens are many times as short as their text may be."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield '{"prompt":"'
    for start in range(0, len(ids), BATCH):
        decoded = decoder.decode(tokenizer.decode_bytes(ids[start : start + BATCH]), final=start + BATCH >= len(ids))
        yield json.dumps(decoded, ensure_ascii=False)[1:-1]
    yield '"}'
