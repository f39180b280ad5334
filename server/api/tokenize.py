"""POST /tokenize and /detokenize, GET /tokenizer_info: text and token ids, as the routes that generate read them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from model.tokenizer import END_OF_TEXT, Tokenizer
from server.api.context import ContextOf
from server.api.errors import TGI_RESPONSES
from server.api.openai.protocol import Message, TokenId
from server.api.openai.serving import check_model
from server.api.validation import Body

RESPONSES: dict[int | str, dict[str, Any]] = {
    401: TGI_RESPONSES[401],
    404: TGI_RESPONSES[401],
    413: TGI_RESPONSES[413],
    422: TGI_RESPONSES[422],
}

router = APIRouter(tags=["tokens"], responses=RESPONSES)


class TokenizeInputs(Body):
    """As text-generation-inference has it."""

    inputs: str
    add_special_tokens: bool | None = None


class TokenizePrompt(Body):
    """As vLLM has it. A prompt that is just the name of the end-of-text token is that token: lm-eval looks it up so."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeMessages(Body):
    """A chat, through the chat template, as vLLM has it."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    return_token_strs: bool | None = None


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
    tokenizer_class: str = "sentencepiece"
    vocab_size: int
    bos_token: str
    eos_token: str
    pad_token: None = None
    chat_template: str


@router.post("/tokenize")
async def tokenize(
    body: TokenizeInputs | TokenizePrompt | TokenizeMessages, context: ContextOf
) -> list[PlacedToken] | Tokens:
    """The ids of a text: a list of tokens for `inputs`, an object of ids for `prompt` or `messages`."""
    engine, tokenizer = context.engine, context.engine.engine.tokenizer
    if isinstance(body, TokenizeInputs):
        special = body.add_special_tokens is not False
        return placed(await engine.encode(body.inputs, add_special_tokens=special), tokenizer)
    check_model(context, body.model)
    if isinstance(body, TokenizeMessages):
        messages = [message.model_dump(include={"role", "content"}) for message in body.messages]
        ids = context.chat_template.token_ids(messages, tokenizer)
    elif body.prompt == END_OF_TEXT:
        ids = [tokenizer.end_of_text_id]
    else:
        ids = await engine.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    strings = [tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return Tokens(tokens=ids, count=len(ids), max_model_len=engine.engine.max_model_len, token_strs=strings)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, context: ContextOf) -> Text:
    """The text of token ids. Bytes that are not UTF-8 become U+FFFD; the end-of-text token is no text."""
    check_model(context, body.model)
    return Text(prompt=context.engine.engine.tokenizer.decode(body.tokens))


@router.get("/tokenizer_info")
def tokenizer_info(context: ContextOf) -> TokenizerInfo:
    """What a client needs to know of the tokenizer."""
    size = context.engine.engine.tokenizer.vocab_size
    return TokenizerInfo(
        vocab_size=size, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, chat_template=context.chat_template.source
    )


def placed(ids: list[int], tokenizer: Tokenizer) -> list[PlacedToken]:
    """Tokens with their places; a token of a part of a character covers that character."""
    tokens, n_started = [], 0
    for token_id in ids:
        token_bytes = tokenizer.token_bytes[token_id]
        # Bytes 0b10xxxxxx go on with a character that an earlier byte has started.
        starts = sum(byte & 0xC0 != 0x80 for byte in token_bytes)
        goes_on = bool(token_bytes) and token_bytes[0] & 0xC0 == 0x80
        start, n_started = n_started - goes_on, n_started + starts
        text = tokenizer.token_text(token_id) if token_bytes else ""
        tokens.append(PlacedToken(id=token_id, text=text, start=start, stop=n_started))
    return tokens
