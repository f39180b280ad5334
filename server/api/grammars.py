"""Grammars as bodies of both contracts carry them."""

from __future__ import annotations

from typing import Any

from model.sampling import Grammar

ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


def named_schema(value: str | dict[str, Any], name: str) -> Grammar:
    """From text-generation-inference's form `{"name": ..., "schema": {...}}`, or a schema itself."""
    inner = value.get("schema") if isinstance(value, dict) and value.keys() <= {"name", "schema"} else None
    return Grammar.json_schema(value, name) if inner is None else Grammar.json_schema(inner, f"{name}.schema")
