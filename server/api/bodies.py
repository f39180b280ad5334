"""How bodies are read: large ones in a thread, and so that the event loop can go on meanwhile."""

from __future__ import annotations

import asyncio
import json
import json.scanner
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

LARGE = 2**17  # bytes, which json reads in some milliseconds
_threads = ThreadPoolExecutor(2, thread_name_prefix="json")


class JSONRoute(APIRoute):
    """A route of which large bodies hold up nobody else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_patiently(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handle_patiently


class _Request(Request):
    async def json(self) -> Any:
        body = await self.body()
        if len(body) <= LARGE:
            return await super().json()
        return await asyncio.get_running_loop().run_in_executor(_threads, _loads, body)


def _loads(body: bytes) -> Any:
    return json.loads(body, cls=_PatientDecoder)


class _PatientDecoder(json.JSONDecoder):
    """json's scanner in Python: unlike that in C, which reads hundreds of thousands of values at one go, it lets others
    have the interpreter meanwhile. It takes some microseconds a value, and texts are read in C all the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]
