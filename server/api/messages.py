"""Messages of a chat, as bodies have them and as the chat template wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from server.api.validation import Body


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


class Message(Body):
    """name goes to the chat template. What a client copies from an earlier answer has no effect."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


def as_template_input(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in messages]
