"""Grammars in llguidance's words: the same here as in the process that tries them first."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from server.grammars import json_schema

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A tenth of llguidance's own: a mask that needs more would hold up everyone else's tokens.
LIMITS = LLParserLimits(initial_lexer_fuel=100_000, step_lexer_fuel=20_000, step_max_items=5_000)
# Spaces as Python's json writes them. Where any white space may stand, a small model fills a text with it.
JSON_FORMAT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
KINDS = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "grammar": "grammar in Lark's or llama.cpp's form",
}
# What Lark's form has of llguidance's own would come past the checks of JSON schemas, or leave the text.
NOT_IN_GRAMMARS = re.compile(r"%(json|llguidance)\b")


def read(kind: str, text: str) -> str:
    """A grammar for `matcher`. Raises ValueError, whose message is a clause; what is left is for `reason` to find."""
    if kind == "regex":
        return LLMatcher.grammar_from_regex(json_schema.expression(text))
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(json_schema.read(text), defaults=JSON_FORMAT)
    if found := NOT_IN_GRAMMARS.search(text):
        raise ValueError(f"{found[0]} is not supported")
    try:
        return grammar_from("grammar", text)
    except ValueError as error:
        raise ValueError(str(error).removeprefix("Failed to convert the grammar from GBNF to Lark: ")) from error


def start(tokenizer: LLTokenizer, source: str) -> tuple[LLMatcher, str | None]:
    """A matcher at the start of a grammar, its first mask made, which costs most; and why nothing can follow, if so."""
    matcher = LLMatcher(tokenizer, source, limits=LIMITS, log_level=0)
    if not matcher.is_error():
        matcher.compute_logit_bias()
    return matcher, reason(matcher)


def reason(matcher: LLMatcher) -> str | None:
    """Why a matcher has failed, if it has, as a clause: of llguidance's many lines the one that says it."""
    if not matcher.is_error():
        return None
    problem = matcher.get_error()
    if found := re.search(r"^error: (.+)$", problem, re.MULTILINE):
        return found[1]
    if found := re.search(r"lookarounds not supported yet; (\w+)", problem):
        return f"look-around, including anchors and word boundaries inside, is not supported ({found[1]})"
    line = re.sub(r"^at \d+\(\d+\): ", "", problem.splitlines()[0]).rstrip(".")
    return "nothing can match it" if line in ("NoExtension", "NoExtensionBias") else line
