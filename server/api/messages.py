"""Messages of a chat, as bodies have them and as the chat template wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from server.api.chat_template import encode
from server.api.context import Context
from server.api.validation import EMPTY, Body, Peers, wrong

NO_TOOLS = "this server calls none"
# Of /v1/chat/completions and of /tokenize alike.
TEMPLATE_PEERS: Mapping[str, Peers] = {
    "tools": Peers(EMPTY, NO_TOOLS),
    "chat_template": Peers((), "chats are rendered by the model's own"),
    **dict.fromkeys(("chat_template_kwargs", "documents", "media_io_kwargs", "mm_processor_kwargs"), Peers(EMPTY)),
}


def _to_text(value: Any) -> Any:
    """The content of a message: a text, or parts that must all be texts."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError("content must be a text, or parts of type text")
    return "".join(part["text"] for part in value)


_TEXT = {"type": "string"}
Content = Annotated[
    str,
    BeforeValidator(_to_text),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class Message(BaseModel):
    """The chat template sees all of it, but for what a client copies from an earlier answer, which has no effect."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: Content
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[Any], Field(description=f"Refused unless empty: {NO_TOOLS}")] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if self.tool_calls:
            raise wrong("tool_calls", f"tool_calls are not supported: {NO_TOOLS}")
        return self

    @property
    def for_template(self) -> dict[str, Any]:
        given = {"role": self.role, "content": self.content, **(self.model_extra or {})}
        return {name: value for name, value in given.items() if value is not None}


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class TemplateOptions(Body):
    """How the chat template makes a prompt of messages, in the bodies that may have some."""

    add_generation_prompt: bool | None = Field(
        None, description="Whether the template begins an answer; true if not given, unless continue_final_message is"
    )
    continue_final_message: bool | None = Field(
        None, description="Whether the text goes on from the last message, as if its author had not ended"
    )

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
        return self

    async def token_ids(self, messages: Sequence[Message], context: Context) -> list[int]:
        """The prompt. Raises InvalidRequestError if the template refuses the messages, and OverloadedError."""
        texts = await context.chat_template.render_in_thread(
            [message.for_template for message in messages],
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
        )
        return await context.engine.aside(sum(map(len, texts)), encode, texts, context.engine.info.tokenizer)
