"""How bodies are checked, and what pydantic finds wrong, said to a client."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

INT32 = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopSequence = Annotated[str, Field(min_length=1, max_length=256)]

SESSION_ID = r"^[0-9a-f]{32}$"


def _session_id(value: str) -> str:
    if not re.fullmatch(SESSION_ID, value):
        raise ValueError("must be the id of a session, 32 digits from 0 to 9 and a to f")
    return value


SessionId = Annotated[str, AfterValidator(_session_id), Field(json_schema_extra={"pattern": SESSION_ID})]
SessionName = Annotated[
    SessionId | None,
    Field(description="The session that this continues; its next turn is what this generates"),
]


class Body(BaseModel):
    """A body of which every field is known, and has just the type it says."""

    model_config = ConfigDict(extra="forbid", strict=True)


def validation_sentence(errors: Sequence[Any], body_prefix: int = 0) -> str:
    """The first of pydantic's errors as a sentence that names the field.

    body_prefix: how many parts of a location come before the field (FastAPI's begin with "body").
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}."
    field = invalid_field(errors, body_prefix)
    if field is None and isinstance(first.get("input"), bytes):
        return "The body must be JSON, sent with Content-Type: application/json."
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{field} is not a known parameter."
    if first["type"] == "value_error":
        return f"{field}: {message}." if field else f"{message}."
    shown = _shown(first.get("input"))
    return (
        f"{field or 'The body'}: {message}, not {shown}." if shown != "null" else f"{field or 'The body'}: {message}."
    )


def invalid_field(errors: Sequence[Any], body_prefix: int = 0) -> str | None:
    """The field of the first of pydantic's errors; None if it is the body itself."""
    first = errors[0]
    if first["type"] == "json_invalid":  # its place is a byte, not a field
        return None
    return ".".join(str(part) for part in first["loc"][body_prefix:])[:200] or None


def _shown(value: object) -> str:
    """The start of a value as JSON, in ASCII: it may hold lone surrogates, and be long."""
    if isinstance(value, str | list):
        value = value[:80]
    try:
        shown = json.dumps(value, default=repr)
    except (ValueError, RecursionError):
        shown = "this"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
