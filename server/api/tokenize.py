"""POST /tokenize and /detokenize, GET /tokenizer_info: text and token ids, as the routes that generate read them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, model_validator

from model.tokenizer import END_OF_TEXT, Tokenizer
from server.api.context import ContextOf
from server.api.messages import Message, as_template_input
from server.api.validation import Body, TokenId

ERRORS = (401, 404, 413, 422)

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Body):
    """`inputs` as text-generation-inference has it; `prompt`, or `messages` for the chat template, as vLLM has it.

    A prompt that is just the name of the end-of-text token is that token: lm-eval looks it up so.
    """

    model: str | None = None
    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(value is not None for value in (self.inputs, self.prompt, self.messages)) != 1:
            raise ValueError("the body must have exactly one of inputs, prompt and messages")
        return self


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


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[TokenId]


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
def tokenize(body: TokenizeRequest, context: ContextOf) -> Response:
    """The ids of a text: a list of tokens for `inputs`, an object of ids for `prompt` or `messages`."""
    # Not a coroutine, and its answer is made here: long texts must not hold up the streams of others.
    tokenizer = context.engine.info.tokenizer
    context.model_named(body.model)
    encode = tokenizer.encode if body.add_special_tokens is False else tokenizer.encode_text
    if body.inputs is not None:
        return JSONResponse(placed(encode(body.inputs), tokenizer))
    if body.messages is not None:
        ids = context.chat_template.token_ids(as_template_input(body.messages), tokenizer)
    else:
        assert body.prompt is not None
        ids = [tokenizer.end_of_text_id] if body.prompt == END_OF_TEXT else encode(body.prompt)
    strings = [tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    told = {"tokens": ids, "count": len(ids), "max_model_len": context.engine.info.max_model_len}
    return JSONResponse({**told, "token_strs": strings})


@router.post("/detokenize")
def detokenize(body: DetokenizeRequest, context: ContextOf) -> Text:
    """The text of token ids. Bytes that are not UTF-8 become U+FFFD; the end-of-text token is no text."""
    context.model_named(body.model)
    return Text(prompt=context.engine.info.tokenizer.decode(body.tokens))


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


def placed(ids: list[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Each as a PlacedToken: tokens with their places; a token of a part of a character covers that character."""
    tokens: list[dict[str, Any]] = []
    n_started = 0
    for token_id in ids:
        token_bytes = tokenizer.token_bytes[token_id]
        # Bytes 0b10xxxxxx go on with a character that an earlier byte has started.
        starts = sum(byte & 0xC0 != 0x80 for byte in token_bytes)
        goes_on = bool(token_bytes) and token_bytes[0] & 0xC0 == 0x80
        start, n_started = n_started - goes_on, n_started + starts
        text = tokenizer.token_text(token_id) if token_bytes else ""
        tokens.append({"id": token_id, "text": text, "start": start, "stop": n_started})
    return tokens
