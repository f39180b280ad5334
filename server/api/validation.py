"""How bodies are checked, and what pydantic finds wrong, said to a client."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

INT32 = 2**31 - 1
MAX_SHOWN = 80  # characters of a wrong value

# The first wrong item of a list ends its validation: a body may have hundreds of thousands.
TokenId = Annotated[int, Field(ge=0, le=INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
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


@dataclass(frozen=True)
class Peers:
    """A field of other servers that this one does not have, and takes if it asks for nothing.

    values: those that ask for nothing, beside null; None if all do. reason: why others are refused.
    """

    values: tuple[Any, ...] | None = ()
    reason: str = "this server has no such thing"

    def accepts(self, value: object) -> bool:
        return value is None or self.values is None or any(value == other for other in self.values)

    def refusal(self, name: str) -> str:
        allowed = " or ".join(json.dumps(value) for value in (None, *(self.values or ())))
        return f"{name} is not supported: {self.reason}; leave it out, or send {allowed}"


EMPTY: tuple[Any, ...] = ("", [], {})
NO_EFFECT = Peers(None)


class Body(BaseModel):
    """A body of which every field is known, and has just the type it says.

    What nobody knows is taken if it is null, which is the default of whatever it is elsewhere, and refused otherwise.
    peers: fields of other servers that may have other values, too.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    peers: ClassVar[Mapping[str, Peers]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_asks_for_nothing(cls, fields: Any) -> Any:
        """Ends at the first field that is unknown: pydantic would make an error for each."""
        if not isinstance(fields, dict):
            return fields
        names, kept = _names(cls), {}
        for name, value in fields.items():
            if name in names:
                kept[name] = value
            elif value is not None and not ((peer := cls.peers.get(name)) and peer.accepts(value)):
                raise wrong(name, peer.refusal(name) if peer else _unknown(name, names - fields.keys()))
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler(schema)
        described = handler.resolve_ref_schema(found)
        described["additionalProperties"] = {"type": "null"}
        without_effect = [name for name, peer in cls.peers.items() if peer.values is None]
        described.setdefault("properties", {}).update(
            {name: {"description": "Without effect"} for name in without_effect}
        )
        return found


@cache
def _names(kind: type[Body]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in kind.model_fields.items())


def _unknown(name: str, others: frozenset[str] | set[str]) -> str:
    near = difflib.get_close_matches(name[:MAX_SHOWN], others, 1)
    return f"{name[:200]} is not a known parameter" + (f"; did you mean {near[0]}?" if near else "")


def wrong(field: str, sentence: str) -> PydanticCustomError:
    """For a validator of a whole body to raise: what is wrong with one of its fields, in a sentence of its own."""
    # As values of the context: the template of a message must not be made of a client's words.
    return PydanticCustomError("wrong", "{sentence}", {"sentence": sentence, "field": field})


def validation_sentence(errors: Sequence[Any], body_prefix: int = 0) -> str:
    """The first of pydantic's errors as a sentence that names the field.

    body_prefix: how many parts of a location come before the field (FastAPI's begin with "body").
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first['ctx']['error']}."
    place = _place(first, body_prefix)
    if place is None and isinstance(first.get("input"), bytes):
        return "The body must be JSON, sent with Content-Type: application/json."
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "wrong":
        within = f"{place}." if place and message.startswith(first["ctx"]["field"]) else ""
        return f"{within}{message}" + ("" if message.endswith("?") else ".")
    if first["type"] == "value_error":
        return f"{place}: {message}." if place else f"{message}."
    shown = _shown(first.get("input"))
    return (
        f"{place or 'The body'}: {message}, not {shown}." if shown != "null" else f"{place or 'The body'}: {message}."
    )


def invalid_field(errors: Sequence[Any], body_prefix: int = 0) -> str | None:
    """The field of the first of pydantic's errors; None if it is the body itself."""
    first = errors[0]
    if first["type"] == "json_invalid":  # its place is a byte, not a field
        return None
    names = [_place(first, body_prefix), first["ctx"]["field"] if first["type"] == "wrong" else None]
    return ".".join(name for name in names if name)[:200] or None


def _place(error: Any, body_prefix: int) -> str | None:
    return ".".join(str(part) for part in error["loc"][body_prefix:])[:200] or None


def _shown(value: object) -> str:
    """The start of a value as JSON, in ASCII: it may hold lone surrogates, and be as long as a body."""
    try:
        pieces = islice(_pieces(value), MAX_SHOWN + 1)
        shown = "".join(piece[: MAX_SHOWN + 1] for piece in pieces)
    except (ValueError, RecursionError):
        shown = "this"
    return shown if len(shown) <= MAX_SHOWN else f"{shown[: MAX_SHOWN - 3]}..."


def _pieces(value: object) -> Iterator[str]:
    if isinstance(value, str):
        value = value[: MAX_SHOWN + 1]
    return json.JSONEncoder(default=lambda other: repr(other)[:MAX_SHOWN]).iterencode(value)
