"""The OpenAPI document: what FastAPI makes of the routes, and what it does not know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api.contracts import Contracts
from server.api.streaming import EVENT_STREAM

REFERENCE = "#/components/schemas/"
KEYS: dict[str, dict[str, str]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def document(app: FastAPI, contracts: Contracts, open_paths: Collection[str] | None) -> dict[str, Any]:
    """open_paths: those that need no key, if others do."""
    found = FastAPI.openapi(app)
    schemas = found["components"]["schemas"]
    schemas |= {name: schema for name, schema in _event_schemas(contracts).items() if name not in schemas}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            # FastAPI adds it by itself, where a contract has another for invalid bodies, too.
            if 422 not in contracts.of(path).responses:
                operation["responses"].pop("422", None)
            if open_paths is not None and path in open_paths:
                operation["security"] = []
    if open_paths is not None:
        found["components"]["securitySchemes"] = KEYS
        found["security"] = [{name: []} for name in KEYS]
    used = _used(found["paths"], schemas)
    found["components"]["schemas"] = {name: schema for name, schema in schemas.items() if name in used}
    return found


def stream(event: type[BaseModel], description: str) -> dict[str, Any]:
    """Of a response of 200: server-sent events, whose data is an `event` each."""
    return {
        "description": description,
        "content": {EVENT_STREAM: {"schema": {"$ref": f"{REFERENCE}{event.__name__}"}}},
    }


def _event_schemas(contracts: Contracts) -> dict[str, Any]:
    """No route returns events as a model, so FastAPI does not know them."""
    models: list[Any] = [(event, "serialization") for event in contracts.events]
    definitions: dict[str, Any] = models_json_schema(models, ref_template=f"{REFERENCE}{{model}}")[1]["$defs"]
    return definitions


def _used(paths: Any, schemas: dict[str, Any]) -> set[str]:
    """Names of the schemas that the paths refer to, also by others."""
    used: set[str] = set()
    found = set(_references(paths))
    while new := found - used:
        used |= new
        found = {name for schema in new for name in _references(schemas[schema])}
    return used


def _references(value: object) -> Iterator[str]:
    return (name for name in re.findall(rf"{REFERENCE}(\w+)", repr(value)))
