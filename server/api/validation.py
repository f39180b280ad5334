"""What pydantic finds wrong, said to a client."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def validation_sentence(errors: Sequence[Any], body_prefix: int = 0) -> str:
    """The first of pydantic's errors as a sentence that names the field.

    body_prefix: how many parts of a location come before the field (FastAPI's begin with "body").
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}."
    field = ".".join(str(part) for part in first["loc"][body_prefix:])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{field} is not a known parameter."
    if first["type"] == "value_error":
        return f"{message}."
    shown = json.dumps(first.get("input"), default=repr)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return (
        f"{field or 'The body'}: {message}, not {shown}." if shown != "null" else f"{field or 'The body'}: {message}."
    )
