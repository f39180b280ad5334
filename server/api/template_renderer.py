"""Renders chat templates. As a program, in a process with limits: what a template does is not bounded.

Each job is a template's source with its variables, and its answer the text, or what is wrong with either. It imports
little, and so starts in a moment.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.limited_program import serve

MOST_CHARACTERS = 2**24  # of a text


class _Generation(Extension):
    """{% generation %} marks what an assistant says, for training; it changes no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja's name

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(source: str, variables: dict[str, Any]) -> str:
    """As Hugging Face's transformers do."""
    return _template(source).render(variables)


@lru_cache(8)
def _template(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = _to_json  # jinja's own escapes what HTML would misread
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _answer(source: str, variables: dict[str, Any]) -> dict[str, str]:
    try:
        _template(source)
    except Exception as error:
        return {"invalid": _reason(error)}
    try:
        text = render(source, variables)
    except Exception as error:  # whatever a template may raise
        return {"refused": _reason(error)}
    if len(text) > MOST_CHARACTERS:
        return {"refused": f"it writes more than {MOST_CHARACTERS:,} characters"}
    return {"text": text}


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        raise error  # what is left of this process is not to be relied on
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__


if __name__ == "__main__":
    serve(_answer)
