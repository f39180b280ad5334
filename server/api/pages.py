"""Pages for browsers, without anything from elsewhere: a playground at /ui, the reference at /docs.

A page runs only its own scripts, talks only to this server, and is in no other page's frame.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

from server.api.context import ContextOf
from server.api.operations import health
from server.errors import NotFoundError

FOLDER = Path(__file__).parent
# Swagger UI, as a package keeps it: the one that lets FastAPI's pages work without a network.
SWAGGER = "fastapi_offline"
SWAGGER_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
DOCS_PATHS = frozenset({"/docs", *(f"/docs/{name}" for name in SWAGGER_FILES)})

router = APIRouter(tags=["operations"])


@router.get("/", include_in_schema=False)
async def root(request: Request, context: ContextOf) -> Response:
    """The playground for who reads pages; for others, who look whether anybody is here, what /health is."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse(f"{context.config.root_path}/ui", 303)
    return await health(context)


@router.get("/ui", response_class=HTMLResponse)
def playground() -> HTMLResponse:
    """A page to write prompts and read texts."""
    return _page("ui.html")


@router.get("/docs", include_in_schema=False)
def docs() -> HTMLResponse:
    """Swagger UI."""
    return _page("docs.html")


@router.get("/docs/{name}", include_in_schema=False)
def swagger_file(name: str) -> Response:
    if name not in SWAGGER_FILES:
        raise NotFoundError("There is no such page.")
    return FileResponse(str(importlib.resources.files(SWAGGER) / "static" / name), media_type=SWAGGER_FILES[name])


def _page(name: str) -> HTMLResponse:
    html, policy = _read(name)
    return HTMLResponse(html, headers={"Content-Security-Policy": policy})


@cache
def _read(name: str) -> tuple[str, str]:
    """A page, and the policy that lets its own scripts and styles run: by their hashes, or as files of this server."""
    html = (FOLDER / name).read_text(encoding="utf-8")
    scripts, styles = (
        " ".join(f"'sha256-{_digest(text)}'" for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' {styles}; connect-src 'self'; "
        "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
    return html, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
